"""The continual loop: honest examples, one loop for all methods, clear errors, complete results."""

import dataclasses
import functools
import http.server
import json
import random
import sys
import threading
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_trace  # noqa: E402
from train_trace import Args  # noqa: E402

SHORT = {"tasks": "FOMC,NumGLUE-cm", "max_train": 48, "max_test": 8, "epochs": "2"}


@pytest.fixture(scope="module")
def base():
    return train_trace.load_model(Args(device="cpu"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All methods on two short tasks: {method: result}, and the folder that holds them."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        methods = ",".join(train_trace.METHODS)
        train_trace.main(Args(methods=methods, name="a", device="cpu", **SHORT))
    files = {method: folder / f"runs/a/{method}.json" for method in train_trace.METHODS}
    return {m: json.loads(file.read_text()) for m, file in files.items()}, folder / "runs/a"


# ------------------------------------------------------------------------------ examples


def test_every_example_ends_in_eos_and_its_labels_are_the_answer(base):
    model, tokenizer = base
    rows = [{"prompt": p, "answer": a} for p in ("Stance:", " x", "é\n漢字", "a" * 500)
            for a in ("C", " C", "\n", "漢")]
    for task in train_trace.TASKS:
        for split in ("train", "eval", "test"):
            rows += [*train_trace.read(Args.data, task, split)]
    for row in rows:
        prompt, answer = train_trace.encode(tokenizer, row)
        assert prompt[0] == tokenizer.bos_token_id and answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(prompt[1:]) == row["prompt"]
        assert tokenizer.decode(answer[:-1]) == row["answer"]


def test_a_long_prompt_keeps_bos_and_its_end():
    assert train_trace.cut([1, 5, 6, 7, 8], 3, bos=1) == [1, 7, 8]
    assert train_trace.cut([5, 6, 7, 8], 3, bos=None) == [6, 7, 8]
    assert train_trace.cut([1, 5], 2, bos=1) == [1, 5]


def test_generation_never_sees_the_answer(base):
    """The ids that reach the model are those of the prompts, and of nothing else."""
    model, tokenizer = base
    args = Args(**{**SHORT, "tasks": "FOMC"})
    task, = train_trace.load_tasks(args, tokenizer, model)
    seen = []
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].clone()))
    train_trace.generate(model, tokenizer, task, range(8), 8)
    handle.remove()
    expected, _ = train_trace.pad(sorted((p for p, _ in task.test), key=len),
                                  tokenizer.pad_token_id, "left")
    assert torch.equal(seen[0], expected)


def test_batched_generation_equals_one_by_one(base):
    model, tokenizer = base
    tasks = train_trace.load_tasks(Args(tasks="MeetingBank,Py150", max_test=12), tokenizer, model)
    for task in tasks:
        together = train_trace.generate(model, tokenizer, task, range(12), 12)
        alone = train_trace.generate(model, tokenizer, task, range(12), 1)
        assert together == alone and len({*together.values()}) > 1


def test_every_epoch_takes_each_example_once():
    lengths = [7, 3, 9, 1, 5, 2, 8]
    plan = [*train_trace.batches(lengths, 3, 2, random.Random(0))]
    assert sorted(i for batch in plan[:3] for i in batch) == [*range(7)]
    assert sorted(i for batch in plan[3:] for i in batch) == [*range(7)]
    assert plan[:3] != plan[3:], "control: epochs are shuffled"
    assert all([lengths[i] for i in batch] == sorted(lengths[i] for i in batch) for batch in plan)


@pytest.mark.parametrize("micro_batch", [5, 1])
def test_accumulation_does_not_change_what_is_learned(base, micro_batch):
    model, tokenizer = base
    weights = []
    for size in (0, micro_batch):
        args = Args(**{**SHORT, "tasks": "FOMC", "micro_batch": size, "lr": 1e-4})
        task, = train_trace.load_tasks(args, tokenizer, model)
        torch.manual_seed(0)
        adapter = train_trace.attach(model, "lora", args)
        adapter.begin_task("FOMC")
        train_trace.train(model, tokenizer, adapter.trainable_parameters(), task, args, "")
        weights.append(torch.cat([layer.weight.detach() for layer in adapter.layers]))
        adapter.detach()
    assert torch.allclose(*weights, atol=2e-4)
    assert weights[0].abs().max() > 1e-2, "control: it did learn"


# ------------------------------------------------------------------------------ the loop


def test_prompts_of_any_length_and_script_are_learned_and_answered(tmp_path, monkeypatch):
    texts = ["立场" * 20000, "Stadträte, " * 9000, "def f ( x ) : <EOL> " * 5000, "?"]
    rows = [{"prompt": f"{i} {text}", "answer": f"{text[:3]}."} for i, text in enumerate(texts)]
    data = task_folder(tmp_path / "data", json.dumps(rows), "long")
    monkeypatch.chdir(tmp_path)
    train_trace.main(Args(data=data, tasks="long", metric="long=rouge_l", epochs="1",
                          methods="mose", max_prompt=64, device="cpu"))
    result = json.loads((tmp_path / "runs/default/mose.json").read_text())
    assert result["examples"] == {"long": [4, 4]} and result["task_id_accuracy"] == [100.0]


def test_the_result_holds_everything_that_was_done(run):
    results, folder = run
    assert {*results} == {*train_trace.METHODS}
    for method, r in results.items():
        fields = {"method", "args", "tasks", "zero_shot", "R", "R_tail", "op", "bwt", "op_tail",
                  "bwt_tail", "task_id_accuracy", "used", "bytes", "parameters", "seconds",
                  "peak_memory_bytes", "device", "versions"}
        assert fields <= {*r} and r["method"] == method
        assert r["tasks"] == ["FOMC", "NumGLUE-cm"] and len(r["zero_shot"]) == 2
        assert [[v is None for v in row] for row in r["R"]] == [[False, True], [False, False]]
        assert r["op"] == r["learned"] + r["bwt"] / 2 == sum(r["R"][-1]) / 2
        assert r["bwt"] == r["R"][1][0] - r["R"][0][0]
        assert r["fwt"] == r["before"][1] - r["zero_shot"][1]
    assert results["base"]["R"][-1] == results["base"]["zero_shot"]
    assert len(results["mose"]["R_tail"]) == 2 and not results["lora"]["R_tail"]


def test_mose_and_one_lora_per_task_forget_nothing_and_a_lora_in_sequence_does(run):
    results, _ = run
    assert results["mose"]["bwt"] == results["task_lora"]["bwt"] == 0.0
    assert results["lora"]["R"][1] != results["task_lora"]["R"][1], "control"


def test_bytes_are_those_of_the_files(run):
    results, folder = run
    assert results["mose"]["bytes"][-1] == (folder / "mose.pt").stat().st_size
    each = [(folder / f"task_lora-{task}.pt").stat().st_size for task in ("FOMC", "NumGLUE-cm")]
    assert results["task_lora"]["bytes"] == [each[0], sum(each)]


def test_the_same_seed_gives_the_same_result_and_another_does_not(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        train_trace.main(Args(methods="mose", name=f"s{seed}", seeds=str(seed), **SHORT))
    before, again = run[0]["mose"], json.loads((tmp_path / "runs/s0/mose.json").read_text())
    measured = ("args", "seconds", "peak_memory_bytes", "date")
    for key in before.keys() - measured:
        assert before[key] == again[key], key
    files = [folder / "mose.pt" for folder in (run[1], tmp_path / "runs/s0", tmp_path / "runs/s1")]
    first, second, other = (file.read_bytes() for file in files)
    assert first == second and first != other


def test_figures_come_from_the_results_alone(run):
    pytest.importorskip("matplotlib")
    _, folder = run
    for name in ("matrices.png", "growth.png", "table.md"):
        assert (folder / name).stat().st_size > 100
    rows = (folder / "table.md").read_text().splitlines()
    assert len([row for row in rows if row.startswith("|")]) == 3 + len(train_trace.METHODS)


def test_the_stage_is_fair_zero_shot_the_model_knows_no_more_than_a_guess(base):
    model, tokenizer = base
    for task in train_trace.load_tasks(Args(), tokenizer, model):
        zero_shot, _, _ = train_trace.evaluate(model, tokenizer, None, task, Args())
        assert sum(zero_shot) <= sum(train_trace.floor(task)), task.name


def test_summaries_of_a_small_matrix():
    R = [[50.0, None, None], [80.0, 60.0, None], [20.0, 70.0, 90.0]]
    got = train_trace.summarize(R, zero_shot=[1.0, 2.0, 3.0], before=[1.0, 12.0, 23.0])
    assert got == {"op": 60.0, "learned": (50 + 60 + 90) / 3, "bwt": (-30 + 10) / 2, "fwt": 15.0,
                   "bwt_treelora": 30 / 3, "forgetting": (60 + 0) / 2}


def test_the_standard_error_is_that_of_the_mean():
    rows = [[0.0, 100.0] * 50, [100.0] * 100]
    assert train_trace.bootstrap(rows) == pytest.approx(50 / 100**0.5 / 2, rel=0.1)
    assert train_trace.bootstrap([[7.0] * 9]) == 0.0


def test_several_seeds_are_several_runs_and_one_table(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    short = {**SHORT, "tasks": "FOMC", "epochs": "1"}
    train_trace.main(Args(methods="lora", name="n", seeds="3,4", device="cpu", **short))
    assert (tmp_path / "runs/n-4/lora.json").exists()
    assert "±" in (tmp_path / "runs/n-3/table.md").read_text() and "seed 3,4" in (
        tmp_path / "runs/n-3/table.md").read_text()


def test_ask_infers_the_task_or_leaves_a_far_prompt_to_the_base(run, capsys):
    _, folder = run
    prompt = train_trace.read(Args.data, "NumGLUE-cm", "test")[0]["prompt"]
    for text, name in ((prompt, "NumGLUE-cm"), ("@@ $$ \u00e9\u00e9 %% ^^ ~~ {}" * 9, "base")):
        train_trace.main(train_trace.parse(["--device", "cpu", "--ask", f"{folder}/mose.pt", text]))
        out = capsys.readouterr().out
        assert "answer: " in out and (name in out) and ("far from every" in out) == (name == "base")


# ------------------------------------------------------------------------------ bad input


def task_folder(folder, text, name="FOMC"):
    (folder / name).mkdir(parents=True)
    for split in ("train", "test"):
        (folder / name / f"{split}.json").write_text(text, encoding="utf-8")
    return str(folder)


GOOD = {"prompt": "p", "answer": "a"}
BAD_FILES = [
    ("", "can't be read as JSON"),
    ("[{", "can't be read as JSON"),
    ("{}", "got dict of 0"),
    ("[]", "got list of 0"),
    (json.dumps(GOOD), "got dict of 2"),
    (json.dumps([GOOD, "x"]), "row 1"),
    (json.dumps([GOOD, GOOD, {"prompt": "p"}]), "row 2"),
    (json.dumps([{"prompt": "p", "answer": 3}]), "row 0"),
    (json.dumps([GOOD, {"prompt": "", "answer": "a"}]), "row 1"),
    (json.dumps([{"prompt": "p", "answer": ""}]), "row 0"),
    (json.dumps([{"prompt": "p", "answer": None}]), "row 0"),
]


@pytest.mark.parametrize("text, message", BAD_FILES)
def test_a_file_of_another_shape_is_named_with_its_row(tmp_path, base, text, message):
    data = task_folder(tmp_path, text)
    with pytest.raises(ValueError, match="train.json") as error:
        train_trace.load_tasks(Args(data=data, tasks="FOMC"), base[1], base[0])
    assert message in str(error.value)


def test_data_can_come_from_a_url():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        log_message = staticmethod(lambda *given: None)

    handler = functools.partial(Quiet, directory=Args.data)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        there, here = (train_trace.read(base, "FOMC", "test") for base in (url, Args.data))
        with pytest.raises(ValueError, match="none/test.json"):
            train_trace.read(url, "none", "test")
        server.shutdown()
    assert there.to_list() == here.to_list()


def test_a_good_file_is_read(tmp_path, base, capsys):
    data = task_folder(tmp_path, json.dumps([{**GOOD, "more": 1}]), "mine")
    args = Args(data=data, tasks="mine", metric="mine=rouge_l", epochs="3")
    task, = train_trace.load_tasks(args, base[1], base[0])
    assert (task.metric, task.epochs, len(task.train)) == ("rouge_l", 3, 1)
    assert "1 of 1 test prompts stand in train too" in capsys.readouterr().out


@pytest.mark.parametrize("options, message", [
    ({"tasks": "nonsense"}, "--metric"),
    ({"tasks": "FOMC,FOMC"}, "each once"),
    ({"tasks": "FOMC", "data": "/nowhere"}, "FOMC/train.json"),
    ({"epochs": "1,2"}, "--epochs"),
    ({"epochs": "x"}, "--epochs"),
    ({"metric": "FOMC=nonsense"}, "FOMC"),
])
def test_a_wrong_option_is_named(base, options, message):
    with pytest.raises(ValueError, match=message):
        train_trace.load_tasks(Args(**options), base[1], base[0])


@pytest.mark.parametrize("argv", [
    ["--method", "sorcery"], ["--methods", "sorcery"], ["--nonsense"], ["--batch", "0"],
    ["--schedule", "zigzag"], ["--dtype", "int8"], ["--lr", "x"],
])
def test_a_wrong_flag_ends_with_a_message(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        train_trace.parse(argv)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_every_option_has_its_default_and_a_help(capsys):
    assert train_trace.parse([]) == Args()
    with pytest.raises(SystemExit):
        train_trace.parse(["-h"])
    help = capsys.readouterr().out
    assert all(f"--{field.name} " in help for field in dataclasses.fields(Args))


def test_results_are_not_overwritten_without_force(run, monkeypatch):
    _, folder = run
    monkeypatch.chdir(folder.parent.parent)
    before = (folder / "mose.json").read_bytes()
    with pytest.raises(ValueError, match="--force"):
        train_trace.main(Args(name="a"))
    assert (folder / "mose.json").read_bytes() == before
    with pytest.raises(ValueError, match="can't be read"):
        train_trace.main(Args(name="new", data="nowhere"))
    train_trace.claim(Args(name="new"))[1].close()  # of a run that failed at once nothing is lost


def test_a_loss_that_is_not_finite_stops_and_keeps_the_earlier_tasks(base, tmp_path, monkeypatch):
    model, tokenizer = base
    args = Args(device="cpu", **SHORT)
    tasks = train_trace.load_tasks(args, tokenizer, model)
    learn = train_trace.train

    def explode(model, tokenizer, parameters, task, args, title):
        if task.name == "NumGLUE-cm":
            parameters[0].data.fill_(float("inf"))
        return learn(model, tokenizer, parameters, task, args, title)

    monkeypatch.setattr(train_trace, "train", explode)
    with pytest.raises(ValueError, match="NumGLUE-cm: the loss is nan"):
        train_trace.run("mose", model, tokenizer, tasks, args, tmp_path, [0.0, 0.0])
    fresh, _ = train_trace.load_model(args)
    adapter = train_trace.MoSE.load(fresh, tmp_path / "mose-FOMC.pt")
    assert [*adapter.tasks] == ["FOMC"]
    for module in model.modules():  # the failed run left its adapter on the shared base
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
        module._modules.pop("sub_experts", None)
