"""The README says what the code does: its choices, its limits, its code blocks, its links."""

import doctest
import json
import re
import shlex
import statistics
import textwrap
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

import mose
import train_trace
from benchmarks import bf16, frontier, smollm2, task_id, transfer
from examples import two_tasks
from figures import page as run_page
from figures import report
from tracebench.methods import METHODS, RATE_TIMES_ROOT_OF_WIDTH, rate
from tracebench.options import Args
from tracebench.scores import backward_transfer, mean

ROOT = Path(__file__).resolve().parent.parent

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "docs/measurements.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGES, re.S)


def tags():
    """The first sentence of every CHOICE and DIFFERS comment of mose.py, in order."""
    lines = (ROOT / "mose.py").read_text(encoding="utf-8").splitlines()
    found = []
    for i, line in enumerate(lines):
        match = re.match(r"\s*# (CHOICE|DIFFERS): (.*)", line)
        if match:
            text = [match[2]]
            while (more := re.match(r"\s*# (.*)", lines[i + len(text)])):
                text.append(more[1])
            found.append((match[1], re.split(r"(?<=\.)\s", " ".join(text))[0]))
    return found


def test_the_table_of_choices_is_that_of_the_code():
    table = (ROOT / "docs/choices.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (CHOICE|DIFFERS) \| (.*?) \|", table, re.M)
    assert rows == tags() and len(rows) >= 8


def rows_of(name):
    """{first cell: other cells} of the table of either page below the line `<!-- name -->`."""
    _, text = PAGES.split(f"<!-- {name} -->")
    table = re.search(r"(?:^\|.*\n)+", text, re.M)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize("name, start", [("trace", "whole "), ("trace-mini", "long ")])
def test_the_tables_of_the_readme_are_those_of_the_json(name, start):
    found = smollm2.of(json.loads((ROOT / "results/smollm2.json").read_text()), start)
    rows = rows_of(name)
    shown = {re.search(r"`(.+?)`", first)[1]: cells for first, cells in rows.items()}
    assert len(rows) <= 25 and {*shown} <= {*found, *smollm2.LONG, *METHODS}
    for method, (op, bwt, size) in shown.items():
        runs = found.get(method)
        if not runs:
            assert {op, bwt, size} == {"not measured"}
            continue
        assert op == report.spread([r["op"] for r in runs])
        assert bwt == report.spread([r["bwt"] for r in runs])
        sizes = [r["bytes"][-1] for r in runs if r["bytes"]]
        assert size == (f"{statistics.mean(sizes) / 1e6:.2f}" if sizes else "")


# {what the first table of the README calls a row: its runs on tiny-llm and on SmolLM2}
BOTH = {
    "a LoRA of rank 8 for each task": (frontier.LORAS[8], "task_lora"),
    "a LoRA of rank 1 for each task": (frontier.LORAS[1], "task_lora r1 1e-2"),
    "a LoRA of rank 2 for each task": (frontier.LORAS[2], "task_lora r2 1e-2"),
    "a VeRA of rank 256 for each task": ("VeRA r256 1e-1", "VeRA r256 1e-1"),
    "**MoSEs**, density 0.01 (the default)": ("mose 0.01", "mose 9.2e-3"),
    "MoSEs, density 0.02": ("mose 0.02", "mose .02 1e-2"),
    "MoSEs, one expert": ("one expert 0.01", "one expert 1e-2"),
    "MoSEs, density 0.001": ("mose 0.001", "mose .001 1e-2"),
    "MoSEs, density 0.003": ("mose 0.003", "mose .003 1e-2"),
    "MoSEs, fixed A": ("fixed A 0.01", "fixed A 1e-2"),
    "MoSEs, fixed A, density 0.02": ("fixed A 0.02", "fixed A .02 2e-2"),
    "MoSEs, one expert, fixed A, density 0.02": ("fixed A, one expert 0.02",
                                                 "fixed A, one expert .02 2e-2"),
}


def kilobytes(runs):
    """kB a task, the mean over runs."""
    return statistics.mean(map(frontier.size, runs)) / 1000


def test_the_first_table_of_the_readme_is_that_of_the_json():
    tiny = frontier.groups(json.loads((ROOT / "results/frontier.json").read_text()))
    large = smollm2.of(json.loads((ROOT / "results/smollm2.json").read_text()), "long ")
    rounded = frontier.groups(json.loads((ROOT / "results/bf16.json").read_text()))

    def in_bf16(name):
        return statistics.mean(r["bytes_bf16"] / r["tasks"] for r in rounded[name].values()) / 1000

    rows = rows_of("both")
    assert {*rows} == {*BOTH}
    for name, cells in rows.items():
        small, other = BOTH[name]
        runs = tiny[small].values()
        expected = [report.spread([r["op"] for r in runs]),
                    f"{kilobytes(runs):.1f} / {in_bf16(small):.1f}"]
        runs = large[other]
        expected += [report.spread([r["op"] for r in runs]),
                     f"{kilobytes(runs):,.0f} / {in_bf16(f'long {other}'):,.0f}"]
        assert cells == expected


def test_what_the_first_command_gives_is_that_of_the_page_of_its_run():
    page = (ROOT / "results/page.html").read_text(encoding="utf-8")
    data, = re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, re.S)
    methods = json.loads(data)["methods"]
    rows = rows_of("default")
    assert len(rows) == len(methods) == 4
    for name, cells in rows.items():
        R = methods[re.search(r"`(.+?)`", name)[1]]["R"]
        assert cells == [report.spread([x]) for x in (mean(R[-1]), backward_transfer(R))]


# {what the page on measurements calls a row of its table of tiny-llm: its runs}
FRONTIER = {
    **{f"a LoRA of rank {rank}": name for rank, name in frontier.LORAS.items()},
    "a VeRA of rank 256": "VeRA r256 1e-1",
    "a SHiRA of the size of a LoRA of rank 1": "SHiRA r1 1e-1",
    "a LoRA of rank 2 with a frozen A": "FrozenA r2 1e-1",
    "a LoRA of rank 4 with a frozen A": "FrozenA r4 5e-2",
    "MoSEs, density 0.001": "mose 0.001",
    "MoSEs, density 0.003": "mose 0.003",
    "**MoSEs**, density 0.01, the default": "mose 0.01",
    "MoSEs, density 0.015": "mose 0.015",
    "MoSEs, density 0.02": "mose 0.02",
    "MoSEs, density 0.03": "mose 0.03",
    "MoSEs, density 0.01, one expert of rank 64": "one expert 0.01",
    "MoSEs, fixed A, density 0.01": "fixed A 0.01",
    "MoSEs, fixed A, density 0.02": "fixed A 0.02",
    "MoSEs, fixed A, density 0.01, one expert": "fixed A, one expert 0.01",
    "MoSEs, fixed A, density 0.02, one expert": "fixed A, one expert 0.02",
}


def test_the_table_of_tiny_llm_is_that_of_the_json():
    results = json.loads((ROOT / "results/frontier.json").read_text())
    bf16_results = json.loads((ROOT / "results/bf16.json").read_text())
    found, rounded, without_keys = (frontier.groups(some) for some in (
        results, frontier.in_bf16(results, bf16_results),
        frontier.in_bf16(results, bf16_results, "bytes_bf16_without_keys")))
    rows = rows_of("frontier")
    assert {*rows} == {*FRONTIER}
    for name, (seeds, op, *sizes) in rows.items():
        every = [some[FRONTIER[name]] for some in (found, rounded, without_keys)]
        assert all(sorted(runs) == [*range(int(seeds))] for runs in every)
        assert op == report.spread([r["op"] for r in every[0].values()])
        assert sizes == [f"{kilobytes(runs.values()):.1f}" for runs in every]


def test_every_method_has_a_style_and_a_name():
    assert {*report.STYLES} == {*run_page.METHODS} == {*METHODS}


def test_the_page_on_the_frontier_is_that_of_its_json():
    results = json.loads((ROOT / "results/frontier.json").read_text())
    assert frontier.report(results) == (ROOT / "results/frontier.md").read_text(encoding="utf-8")


def test_the_page_on_bf16_is_that_of_its_json():
    results = json.loads((ROOT / "results/bf16.json").read_text())
    assert bf16.report(results) == (ROOT / "results/bf16.md").read_text(encoding="utf-8")


def test_the_page_on_inferred_tasks_is_that_of_its_json():
    results = json.loads((ROOT / "results/task-id.json").read_text())
    assert task_id.report(results) == (ROOT / "results/task-id.md").read_text(encoding="utf-8")


def test_the_page_on_growth_is_that_of_its_json():
    results = json.loads((ROOT / "results/transfer.json").read_text())
    assert transfer.report(results) == (ROOT / "results/transfer.md").read_text(encoding="utf-8")


def test_the_page_on_smollm2_is_that_of_its_json():
    results = json.loads((ROOT / "results/smollm2.json").read_text())
    assert smollm2.report(results) == (ROOT / "results/smollm2.md").read_text(encoding="utf-8")


def test_the_runs_of_the_benchmarks_have_options_that_are_there():
    jobs = {f"{what} {name}": options for what in smollm2.RUNS
            for name, options in smollm2.jobs(what, "trace_500").items()}
    searches = [frontier.search(kind, kind, rank, rates, frontier.SCALES)
                for kind, (ranks, rates) in frontier.PEFT.items() for rank in ranks]
    for some in (frontier.jobs(), frontier.memory_jobs(), frontier.clash_search(), *searches):
        jobs |= {name: options for name, (_, options) in some.items()}
    for options in jobs.values():
        own = train_trace.parse(options)
        assert {*own.methods.split(",")} <= {*METHODS}
    with pytest.raises(SystemExit):
        train_trace.parse([*options, "--option", "1"])


def test_the_head_of_the_script_asks_for_what_the_requirements_do():
    """PEP 723: `uv run train_trace.py` reads its dependencies from there."""
    source = (ROOT / "train_trace.py").read_text(encoding="utf-8")
    block, = re.findall(r"(?m)^# /// script\n((?:# .*\n)+?)# ///$", source)
    head = tomllib.loads(block.replace("# ", ""))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    *needed, drawing = head["dependencies"]
    assert needed == [line.split()[0] for line in lines if line[0] != "#"]
    assert drawing.startswith("matplotlib")  # for the figures, which pip users may leave out
    assert head["requires-python"][2:] in lines[0]


def test_the_speed_table_is_that_of_the_json():
    rows = json.loads((ROOT / "results/speed-cpu.json").read_text())["table"]
    page = (ROOT / "results/speed-cpu.md").read_text(encoding="utf-8")
    assert all(f"| {' | '.join(row)} |" in page for row in rows) and len(rows) > 5


def test_numbers_with_a_deviation_stand_in_a_file_of_results():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "results").glob("*.md"))
    text = re.sub(r"(?m)^\|.*$", "", PAGES)  # the tables have tests of their own
    numbers = re.findall(r"[+-]?\d+\.\d ± \d+\.\d", text)
    assert [n for n in numbers if n not in pages] == []


def test_the_python_blocks_run_as_they_stand(tmp_path, monkeypatch):
    block, answering = (text for kind, text in BLOCKS if kind == "python")
    code = [line for line in block.splitlines() if line.strip() and "import" not in line]
    assert len(code) <= 14
    monkeypatch.chdir(tmp_path)
    model, tokenizer = train_trace.load_model(Args(device="cpu"))
    tasks = {}
    for name, texts in {"x": ["a one two", "a one two three"], "y": ["b", "b four five"]}.items():
        prompts = tokenizer(texts, return_tensors="pt", padding=True)
        tasks[name] = prompts, 3 * [{**prompts, "labels": prompts["input_ids"]}]
    exec(block, {"model": model, "tasks": tasks})
    model, tokenizer = train_trace.load_model(Args(device="cpu"))
    scope = {"model": model, "tokenizer": tokenizer, "texts": ["b four six", "b"], "MoSE": mose.MoSE}
    exec(answering, scope)  # "To answer"
    assert [*scope["mose"].tasks] == ["x", "y"] and scope["names"] == ["y", "y"]
    assert scope["mose"].active == ["y", "y"] and len(scope["answers"]) == 2


def test_the_script_to_start_from_learns_two_tasks_and_forgets_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    two_tasks.main()
    after_first, *after_last = capsys.readouterr().out.splitlines()
    shares = [int(re.search(r"(\d+)% right", line)[1]) for line in (after_first, *after_last)]
    assert len(shares) == 3 and min(shares) > 90
    model, tokenizer = train_trace.load_model(Args(device="cpu"))
    mose_of_file = mose.MoSE.load(model, tmp_path / "two_tasks.pt")
    assert [*mose_of_file.tasks] == two_tasks.TASKS
    # Control: the bare base can't answer these prompts.
    monkeypatch.setattr(mose_of_file, "infer_task", lambda input_ids, **_: [None] * len(input_ids))
    for task in two_tasks.TASKS:
        assert two_tasks.accuracy(mose_of_file, model, tokenizer, task) < 0.2


def test_the_example_by_hand_gives_what_it_says():
    block, = (text for kind, text in BLOCKS if kind == "pycon")
    test = doctest.DocTestParser().get_doctest(block, {}, "README", "README.md", 0)
    assert doctest.DocTestRunner().run(test).failed == 0 and len(test.examples) > 8


def test_the_example_in_the_docstring_runs():
    block = re.search(r"\n    mose = MoSE.*?\n\n", mose.__doc__, re.S)[0]
    model, _ = train_trace.load_model(Args(device="cpu"))
    ids = torch.arange(24).view(3, 8)
    scope = {"model": model, "MoSE": mose.MoSE, "torch": torch,
             "train_prompt_ids": ids, "test_prompt_ids": ids,
             "train_mask": torch.ones_like(ids), "test_mask": torch.ones_like(ids)}
    exec(textwrap.dedent(block), scope | {"batches": [(ids, ids)]})


def test_every_python_command_names_a_script_that_is_there():
    every = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    files = [word for line in every for word in line.split() if word.endswith(".py")]
    assert len(files) > 3 and all((ROOT / file).exists() for file in files)


@pytest.mark.parametrize("line", [
    line for kind, text in BLOCKS if kind == "bash"
    for line in text.replace("\\\n", " ").splitlines() if "train_trace.py" in line])
def test_the_commands_are_understood(line):
    words = shlex.split(line.split("train_trace.py", 1)[1], comments=True)
    assert train_trace.parse(words)


def test_ci_runs_the_test_command_of_the_readme():
    command = next(text for kind, text in BLOCKS if "pytest -q" in text)
    assert "pytest -q" in (ROOT / ".ci/run").read_text()
    for package in re.search(r"requirements.txt (.*?) &&", command)[1].split():
        assert package in (ROOT / ".ci/run").read_text()


def test_every_link_to_a_file_resolves():
    for page in (ROOT / "README.md", ROOT / "theory/README.md", *(ROOT / "results").glob("*.md"),
                 *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page, target)


def test_every_example_has_the_default_rate():
    pages = ["README.md", "mose.py", "docs/works-with.md"]
    found = [number for page in pages for number in re.findall(
        r"([\d.]+) / model\.config\.hidden_size ?\*\* ?0\.5", (ROOT / page).read_text("utf-8"))]
    assert len(found) >= 5 and {*map(float, found)} == {RATE_TIMES_ROOT_OF_WIDTH}
    small, large = (SimpleNamespace(config=LlamaConfig(hidden_size=width)) for width in (64, 1024))
    rates = [rate("mose", Args(), model) for model in (small, large)]
    assert rates == [pytest.approx(float(found[0]) / 8), pytest.approx(float(found[0]) / 32)]
    assert rate("mose", Args(lr=0.5), small) == 0.5  # control
    # The LoRAs have two defaults, which do not depend on the base.
    assert [rate(method, Args(), model) for method in ("lora", "task_lora")
            for model in (small, large)] == [5e-3, 5e-3, 1e-2, 1e-2]
    assert rate("task_lora", Args(lora_lr=0.5), small) == 0.5  # control
