"""The continual loop: honest examples, one loop for all methods, clear errors, complete results."""

import contextlib
import copy
import dataclasses
import functools
import http.server
import json
import random
import re
import shutil
import signal
import threading
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from tqdm import tqdm

import train_trace
from figures import report
from tracebench import options, processes
from tracebench.data import batches, cut, encode, pad, passes, read, to_text
from tracebench.methods import (
    KINDS, METHODS, attach, check_density, check_targets, lessons, rate, tasks_to_test)
from tracebench.model import choose_device
from tracebench.options import PRESETS, READ_BY, ROOT, Args
from tracebench.runs import Record, claim, start_anew
from tracebench.scores import TASKS, floor
from test_works_with import multimodal

QUIET = tqdm(disable=True)
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
        methods = ",".join(METHODS)
        train_trace.main(Args(methods=methods, name="a", device="cpu", **SHORT))
    files = {method: folder / f"runs/a/{method}.json" for method in METHODS}
    return {m: json.loads(file.read_text()) for m, file in files.items()}, folder / "runs/a"


# ------------------------------------------------------------------------------ examples


def test_every_example_ends_in_eos_and_its_labels_are_the_answer(base):
    model, tokenizer = base
    rows = [{"prompt": p, "answer": a} for p in ("Stance:", " x", "é\n漢字", "a" * 500)
            for a in ("C", " C", "\n", "漢")]
    for task in TASKS:
        for split in ("train", "eval", "test"):
            rows += [*read(Args.data, task, split)]
    for row in rows:
        prompt, answer = encode(tokenizer, row)
        assert prompt[0] == tokenizer.bos_token_id and answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(prompt[1:]) == row["prompt"]
        assert tokenizer.decode(answer[:-1]) == row["answer"]


def test_a_special_token_in_an_answer_is_only_text(base):
    tokenizer = base[1]
    eos = tokenizer.eos_token
    prompt, answer = encode(tokenizer, {"prompt": f"p {eos}", "answer": f"a {eos} b"})
    assert tokenizer.eos_token_id not in answer[:-1]
    assert to_text(tokenizer, answer) == f"a {eos} b"
    assert tokenizer.eos_token_id in prompt, "control: in a prompt it is the token, as in a template"


def test_a_padding_token_that_the_model_lacks_is_not_used(base, monkeypatch):
    model, tokenizer = base[0], copy.deepcopy(base[1])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= len(model.get_input_embeddings().weight)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: tokenizer)
    _, tokenizer = train_trace.load_model(Args(device="cpu"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_long_prompt_keeps_bos_and_its_end():
    assert cut([1, 5, 6, 7, 8], 3, bos=1) == [1, 7, 8]
    assert cut([5, 6, 7, 8], 3, bos=None) == [6, 7, 8]
    assert cut([1, 5], 2, bos=1) == [1, 5]


def test_generation_never_sees_the_answer(base):
    """The ids that reach the model are those of the prompts, and of nothing else."""
    model, tokenizer = base
    args = Args(**{**SHORT, "tasks": "FOMC"})
    task, = train_trace.load_tasks(args, tokenizer, model)
    seen = []
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].clone()))
    train_trace.generate(model, tokenizer, task, range(8), args)
    handle.remove()
    expected, _ = pad(sorted(task.test_prompt_ids, key=len), tokenizer.pad_token_id, "left")
    assert torch.equal(seen[0], expected)


def test_batched_generation_equals_one_by_one(base):
    model, tokenizer = base
    tasks = train_trace.load_tasks(Args(tasks="MeetingBank,Py150", max_test=12), tokenizer, model)
    for task in tasks:
        together = train_trace.generate(model, tokenizer, task, range(12), Args())
        alone = train_trace.generate(model, tokenizer, task, range(12), Args(tokens=1))
        assert together == alone and len({*together.values()}) > 1


def test_every_epoch_takes_each_example_once():
    plan = [*batches([*range(7)], 3, 2, random.Random(0))]
    assert sorted(i for batch in plan[:3] for i in batch) == [*range(7)]
    assert sorted(i for batch in plan[3:] for i in batch) == [*range(7)]
    assert plan[:3] != plan[3:], "control: epochs are shuffled"


def test_no_pass_has_more_tokens_than_allowed_but_one_example_alone():
    rng = random.Random(0)
    rows = [([0] * rng.randint(1, 90), i) for i in range(200)]
    for tokens in (1, 60, 300, 10**6):
        groups = [*passes(rows, tokens)]
        sizes = [len(group) * max(len(ids) for ids, _ in group) for group in groups]
        assert all(size <= tokens or len(g) == 1 for size, g in zip(sizes, groups))
        assert sorted(i for group in groups for _, i in group) == [*range(200)]
    assert len(groups) == 1, "control: with room for all there is one pass"


def test_one_example_above_the_budget_is_said_and_trained_alone(base, capsys):
    args = Args(**{**SHORT, "tasks": "FOMC", "max_train": 4, "tokens": 3, "epochs": "1"})
    task, = train_trace.load_tasks(args, base[1], base[0])
    assert "more than --tokens 3, so it makes a pass of its own" in capsys.readouterr().out
    sizes, answers = [], train_trace.answer_logits
    adapter = train_trace.attach("lora", args, base[0])
    adapter.begin_task("FOMC")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_trace, "answer_logits", lambda model, tokenizer, rows: (
            sizes.append(len(rows)) or answers(model, tokenizer, rows)))
        train_trace.train(*base, adapter.trainable_parameters(), task, args, 1e-3, QUIET)
    adapter.detach()
    assert sizes == [1] * 4


@pytest.mark.parametrize("tokens", [300, 1])
def test_accumulation_does_not_change_what_is_learned(base, tokens):
    model, tokenizer = base
    weights = []
    for size in (10**6, tokens):
        args = Args(**{**SHORT, "tasks": "FOMC", "tokens": size})
        task, = train_trace.load_tasks(args, tokenizer, model)
        torch.manual_seed(0)
        adapter = train_trace.attach("lora", args, model)
        adapter.begin_task("FOMC")
        train_trace.train(model, tokenizer, adapter.trainable_parameters(), task, args, 1e-4, QUIET)
        weights.append(torch.cat([p.flatten() for p in adapter.get_weights()]))
        adapter.detach()
    assert torch.allclose(*weights, atol=2e-4)
    assert weights[0].abs().max() > 1e-2, "control: it did learn"


# ------------------------------------------------------------------------------ samples


def by_answer(count):
    """Rows that are sorted by answer: the first half says "A"."""
    return [{"prompt": f"question {i}", "answer": "AB"[2 * i // count]} for i in range(count)]


def sorted_task(tmp_path, base, **options):
    """A task whose files are sorted by answer, 400 rows each."""
    data = tmp_path / "data"
    if not data.exists():
        task_folder(data, json.dumps(by_answer(400)), "sorted")
    args = Args(data=str(data), tasks="sorted", metric="sorted=accuracy", **options)
    task, = train_trace.load_tasks(args, base[1], base[0])
    return task, args


def test_samples_are_not_the_first_rows_and_are_the_same_for_all_seeds(tmp_path, base):
    for seeds in ("0", "1"):
        task, _ = sorted_task(tmp_path, base, max_train=100, max_test=24, seeds=seeds)
        assert len(task.train) == 100 and len(task.golds) == len(task.test_prompt_ids) == 24
        answers = [labels[-2] for _, labels in task.train]
        assert 30 < answers.count(answers[0]) < 70 and 4 < task.golds.count("A") < 20
        again, _ = sorted_task(tmp_path, base, max_train=100, max_test=24, seeds="7")
        assert (again.train, again.test_prompt_ids, again.golds) == (task.train, task.test_prompt_ids, task.golds)
    assert {row["answer"] for row in by_answer(400)[:100]} == {"A"}, "control: of the first rows"


def test_the_probe_reads_a_sample_and_knows_what_a_constant_answer_gets_wrong(tmp_path, base):
    task, args = sorted_task(tmp_path, base)
    assert 0.3 < task.error_of_a_constant() <= 0.5
    first = dataclasses.replace(task, train=task.train[:64])
    assert first.error_of_a_constant() == 0.0, "control: the first rows would need no learning"
    # A base that always says "A" and EOS is wrong as often as the guess, and not always right.
    says_a = task.train[0][1][-2]

    def always_a(model, tokenizer, rows):
        labels = torch.tensor([label for _, labels in rows for label in labels if label != -100])
        example = torch.arange(len(rows)).repeat_interleave(2)
        said = torch.where(labels == tokenizer.eos_token_id, labels, says_a)
        return torch.nn.functional.one_hot(said, 3000).float(), labels, example

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_trace, "answer_logits", always_a)
        wrong = float(train_trace.probe(*base, task, args))
    assert min(wrong, 1 - wrong) == pytest.approx(task.error_of_a_constant())


def test_the_loop_says_what_a_guess_leaves(tmp_path, base, monkeypatch):
    task, args = sorted_task(tmp_path, base, max_train=32, max_test=4, epochs="1")
    guesses, choose = [], train_trace.MoSE.best_source

    def spy(adapter, probe, guess):
        guesses.append(guess)
        return choose(adapter, probe, guess)

    monkeypatch.setattr(train_trace.MoSE, "best_source", spy)
    record = Record(tmp_path, "mose", [task], args)
    train_trace.learn_in_a_row(record, *base, [task], QUIET)
    assert guesses == [task.error_of_a_constant()] and 0 < guesses[0] < 1


def test_more_rows_than_there_are_is_said_and_all_are_taken(tmp_path, base, capsys):
    task, _ = sorted_task(tmp_path, base, max_train=500, max_test=401)
    assert len(task.train) == len(task.test_prompt_ids) == 400
    said = capsys.readouterr().out
    assert said.count("sorted, --max_train: 500 were asked for, but there are 400") == 1
    assert said.count("sorted, --max_test: 401 were asked for, but there are 400") == 1
    sorted_task(tmp_path, base, max_train=400)
    assert "asked for" not in capsys.readouterr().out, "control"


# ------------------------------------------------------------------------------ right answers


def test_a_perfect_model_scores_100_though_the_tokenizer_normalises(tmp_path, base, capsys):
    """The answer is decomposed (u and two dots), and the tokenizer composes it."""
    model, tokenizer = base[0], copy.deepcopy(base[1])
    plain = tokenizer.backend_tokenizer.normalizer
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    rows = [{"prompt": f"where {i} ?", "answer": text}
            for i, text in enumerate(["Mu\u0308nchen", "Bern", "Zu\u0308rich"])]
    data = task_folder(tmp_path / "data", json.dumps(rows), "towns")
    args = Args(data=data, tasks="towns", metric="towns=accuracy")
    task, = train_trace.load_tasks(args, tokenizer, model)
    assert "towns: 2 of 3 right answers come back from the tokenizer" in capsys.readouterr().out

    def perfect(model, tokenizer, task, rows, args):
        return {i: to_text(tokenizer, [label for label in task.train[i][1] if label != -100])
                for i in rows}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_trace, "generate", perfect)
        tested = train_trace.evaluate(model, tokenizer, None, task, args)
        assert tested.known == [100.0] * 3
        raw = dataclasses.replace(task, golds=[row["answer"] for row in rows])
        tested = train_trace.evaluate(model, tokenizer, None, raw, args)
        assert tested.known == [0.0, 100.0, 0.0], "control: compared with the file's own text"
    tokenizer.backend_tokenizer.normalizer = plain
    task, = train_trace.load_tasks(args, tokenizer, model)
    assert task.golds == [row["answer"] for row in rows] and "right" not in capsys.readouterr().out


def test_nothing_is_cleaned_up_in_an_answer(base):
    """Some tokenizers, and all of transformers 4.56, drop spaces where they are not told to."""
    class Cleaning:
        def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces=True):
            text = base[1].decode(ids, skip_special_tokens=skip_special_tokens)
            return text.replace(" .", ".") if clean_up_tokenization_spaces else text

    text = "print ( x ) ; do n't , see ."
    ids = encode(base[1], {"prompt": "p", "answer": text})[1]
    assert to_text(Cleaning(), ids) == text
    assert Cleaning().decode(ids, skip_special_tokens=True) != text, "control"


# ------------------------------------------------------------------------------ steps


def test_every_step_has_a_rate_above_zero():
    for steps in (1, 2, 3, 19, 20, 21, 100, 1000):
        rates = [train_trace.share_of_rate(step, steps) for step in range(steps)]
        assert 0 < min(rates) and max(rates) == 1.0
    assert rates[0] < rates[25] < rates[50] == 1.0, "it rises for a twentieth of the steps"
    assert rates[-1] < 0.01


def test_a_run_of_one_step_moves_the_weights(base):
    args = Args(**{**SHORT, "tasks": "FOMC", "max_train": 10, "epochs": "1"})
    task, = train_trace.load_tasks(args, base[1], base[0])
    moved = []
    for share in (train_trace.share_of_rate, lambda *given: 0.0):  # control: as it was
        torch.manual_seed(0)
        adapter = train_trace.attach("lora", args, base[0])
        adapter.begin_task("FOMC")
        before = torch.cat([p.flatten() for p in adapter.get_weights()])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_trace, "share_of_rate", share)
            train_trace.train(*base, adapter.trainable_parameters(), task, args, 1e-2, QUIET)
        after = torch.cat([p.flatten() for p in adapter.get_weights()])
        moved.append(float((after - before).abs().max()))
        adapter.detach()
    assert moved[0] > 1e-3 and moved[1] == 0.0


# ------------------------------------------------------------------------------ the loop


def test_prompt_ids_of_any_length_and_script_are_learned_and_answered(tmp_path, monkeypatch):
    texts = ["立场" * 20000, "Stadträte, " * 9000, "def f ( x ) : <EOL> " * 5000, "?"]
    rows = [{"prompt": f"{i} {text}", "answer": f"{text[:3]}."} for i, text in enumerate(texts)]
    data = task_folder(tmp_path / "data", json.dumps(rows), "long")
    monkeypatch.chdir(tmp_path)
    train_trace.main(Args(data=data, tasks="long", metric="long=rouge_l", epochs="1",
                          methods="mose", max_prompt=64, device="cpu"))
    result = json.loads((tmp_path / "runs/default/mose.json").read_text())
    assert result["examples"] == {"long": [4, 4]} and result["task_id_accuracy"] == [100.0]
    assert result["bwt"] is None  # of one task alone


def test_the_result_holds_everything_that_was_done(run):
    results, folder = run
    assert {*results} == {*METHODS}
    for method, r in results.items():
        fields = {"method", "args", "tasks", "zero_shot", "R", "R_tail", "op", "bwt", "op_tail",
                  "bwt_tail", "task_id_accuracy", "used", "bytes", "parameters", "tokens",
                  "seconds_training", "seconds_testing", "peak_memory_bytes", "device", "versions"}
        assert fields <= {*r} and r["method"] == method
        assert r["tasks"] == ["FOMC", "NumGLUE-cm"] and len(r["zero_shot"]) == 2
        assert r["op"] == sum(r["R"][-1]) / 2 and None not in r["R"][-1]
        if method in ("floor", "base", "joint"):
            assert len(r["R"]) == 1 and r["bwt"] is r["learned"] is r["fwt"] is None
            continue
        assert r["op"] == r["learned"] + r["bwt"] / 2
        assert r["bwt"] == r["R"][1][0] - r["R"][0][0]
        goes_on = method in ("lora", "replay", "moe_lora")  # others start from the bare base
        assert (r["R"][0][1] is not None) == goes_on
        assert r["fwt"] == (r["R"][0][1] - r["zero_shot"][1] if goes_on else 0.0)
    assert results["base"]["R"][-1] == results["base"]["zero_shot"]
    assert len(results["mose"]["R_tail"]) == 2 and not results["lora"]["R_tail"]


def test_mose_and_one_lora_per_task_forget_nothing_and_a_lora_in_sequence_does(run):
    results, _ = run
    assert results["mose"]["bwt"] == results["task_lora"]["bwt"] == 0.0
    assert results["lora"]["R"][1] != results["task_lora"]["R"][1], "control"


def test_bytes_are_those_of_the_files(run):
    results, folder = run
    for method in ("lora", "task_lora", "moe_lora", "mose"):
        assert results[method]["bytes"][-1] == (folder / f"{method}.pt").stat().st_size
    one, two = results["task_lora"]["bytes"]
    assert two == pytest.approx(2 * one, rel=0.02), "a LoRA more for each task"
    one, two = results["lora"]["bytes"]
    assert two == pytest.approx(one, rel=0.1), "the same LoRA for all tasks"


def test_the_same_seed_gives_the_same_result_and_another_does_not(run, tmp_path, monkeypatch,
                                                                  no_figures):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        train_trace.main(Args(methods="mose", name=f"s{seed}", seeds=str(seed), **SHORT))
    before, again = run[0]["mose"], json.loads((tmp_path / "runs/s0/mose.json").read_text())
    measured = ("args", "seconds_training", "seconds_testing", "peak_memory_bytes", "date")
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
    assert len([row for row in rows if row.startswith("|")]) == 2 + len(METHODS)


def test_the_stage_is_fair_zero_shot_the_model_knows_no_more_than_a_guess(base):
    model, tokenizer = base
    for task in train_trace.load_tasks(Args(), tokenizer, model):
        zero_shot = train_trace.evaluate(model, tokenizer, None, task, Args()).known
        assert sum(zero_shot) <= sum(floor(task.metric, task.train_texts, task.test_texts)), task.name


def test_replay_trains_on_a_share_of_earlier_examples_and_joint_on_all(base):
    args = Args(**{**SHORT, "tasks": "FOMC,NumGLUE-cm,ScienceQA", "epochs": "2,1,1"})
    tasks = train_trace.load_tasks(args, base[1], base[0])

    def taught(method, args=args):
        return [task.train for task in lessons(method, args, tasks)]

    own = [task.train for task in tasks]
    assert taught("lora") == own
    first, second, third = taught("replay")
    assert first == own[0] and second[:48] == own[1] and third[:48] == own[2]
    assert len(second) == 48 + 3 and all(row in own[0] for row in second[48:])  # 5 % of 48
    assert [row in own[0] for row in third[48:]] == [True] * 3 + [False] * 3
    assert all(row in own[1] for row in third[51:])
    assert taught("replay", dataclasses.replace(args, replay=0.0)) == own, "control"
    assert taught("joint") == [own[0] * 2 + own[1] + own[2]]


def test_ends_tests_each_task_when_it_is_learned_and_all_at_the_end(base):
    tasks = train_trace.load_tasks(Args(**{**SHORT, "tasks": ",".join(TASKS)}), base[1], base[0])
    counts = {args.test: sum(len(tasks_to_test("mose", args, tasks, t)) for t in range(8))
              for args in (Args(), Args(test="ends"))}
    assert counts == {"all": 36, "ends": 15}


def test_the_letter_of_an_answer_is_all_that_is_generated_where_only_it_is_read(base):
    science, fomc = train_trace.load_tasks(Args(tasks="ScienceQA,MeetingBank"), base[1], base[0])
    assert science.max_new == 4 < fomc.max_new
    texts = train_trace.generate(*base, science, range(20), Args())
    whole = dataclasses.replace(science, max_new=40)
    for i, text in train_trace.generate(*base, whole, range(20), Args()).items():
        assert texts[i][:1] == text[:1]


def test_a_preset_is_other_defaults_and_options_go_before_it():
    gpu = train_trace.parse(["--preset", "gpu"])
    for name, value in PRESETS["gpu"].items():
        assert getattr(gpu, name) == value != getattr(Args(), name)
    assert train_trace.parse(["--lr", "0.5", "--preset", "gpu", "--epochs", "1"]) == (
        dataclasses.replace(gpu, lr=0.5, epochs="1"))


def test_several_seeds_are_several_runs_and_one_table(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    short = {**SHORT, "tasks": "FOMC", "epochs": "1"}
    train_trace.main(Args(methods="lora", name="n", seeds="3,4", device="cpu", **short))
    assert (tmp_path / "runs/n-4/lora.json").exists()
    table = (tmp_path / "runs/n-3/table.md").read_text()
    assert "±" in table and "mean of seeds 3,4" in table
    results = report.load(["runs/n-3"])
    assert "seed 3, " in report.title_of(results) and "mean" not in report.title_of(results)
    # A mean is over seeds alone.
    other = json.loads(Path("runs/n-4/lora.json").read_text())
    args = other["args"] | {"tokens": 9, "model": "/elsewhere/tiny-llm"}  # these do not matter
    for wrong in ({}, {"lora_lr": 1.0}, {"model": "other"}):
        Path("runs/n-4/lora.json").write_text(json.dumps(other | {"args": args | wrong}))
        says = f"lora: the runs have --{''.join(wrong)} .* the seed alone"
        with pytest.raises(ValueError, match=says) if wrong else contextlib.nullcontext():
            report.load(["runs/n-3", "runs/n-4"])


def test_an_adapter_is_removed_when_the_next_one_is_tested(tmp_path, base, monkeypatch):
    args = Args(methods="task_lora", device="cpu", **{**SHORT, "tasks": "FOMC,NumGLUE-cm,ScienceQA"})
    tasks = train_trace.load_tasks(args, base[1], base[0])
    record, there = Record(tmp_path, "task_lora", tasks, args), []
    add = Record.add

    def seen(record, tests):
        there.append(sorted(file.name for file in tmp_path.glob("*.pt")))
        return add(record, tests)

    monkeypatch.setattr(Record, "add", seen)
    train_trace.learn_in_a_row(record, *base, tasks, QUIET)
    one, two, three = (f"task_lora-{i}.pt" for i in (1, 2, 3))
    assert there == [[one], [one, two], [two, three]]  # until a task is tested, both are there
    assert [file.name for file in tmp_path.glob("*.pt")] == [three]


def test_a_mixture_of_loras_has_the_size_of_one(base):
    sizes = {}
    for method, experts in (("lora", 4), ("moe_lora", 4), ("moe_lora", 8)):
        adapter = attach(method, Args(experts=experts), base[0])
        routers = sum(p.numel() for layer in adapter.layers for name, p in layer.named_parameters()
                      if "router" in name)
        sizes[method, experts] = sum(p.numel() for p in adapter.trainable_parameters()) - routers
        adapter.detach()
    assert len({*sizes.values()}) == 1
    for experts in (3, 16):
        with pytest.raises(ValueError, match=f"--experts {experts} can't share --lora_rank 8"):
            attach("moe_lora", Args(experts=experts), base[0])


def test_ask_infers_the_task_or_leaves_a_far_prompt_to_the_base(run, capsys):
    _, folder = run
    prompt = read(Args.data, "NumGLUE-cm", "test")[0]["prompt"]
    for text, name in ((prompt, "NumGLUE-cm"), ("@@ $$ \u00e9\u00e9 %% ^^ ~~ {}" * 9, "base")):
        train_trace.main(train_trace.parse(["--device", "cpu", "--ask", f"{folder}/mose.pt", text]))
        out = capsys.readouterr().out
        assert "answer: " in out and (name in out) and ("far from every" in out) == (name == "base")


def test_ask_takes_the_base_of_this_clone_if_that_of_the_run_is_gone(run, tmp_path, capsys):
    shutil.copytree(run[1], tmp_path / "moved")
    file = tmp_path / "moved/args.json"
    notes = json.loads(file.read_text())
    notes["options"]["model"] = "/an/old/clone/assets/tiny-llm"
    file.write_text(json.dumps(notes))
    prompt = read(Args.data, "NumGLUE-cm", "test")[0]["prompt"]
    train_trace.main(train_trace.parse(
        ["--device", "cpu", "--ask", f"{tmp_path}/moved/mose.pt", prompt]))
    assert "task: NumGLUE-cm" in capsys.readouterr().out


@pytest.mark.parametrize("ended", [True, False])
def test_ask_says_when_an_answer_was_cut(run, base, monkeypatch, capsys, ended):
    _, folder = run
    last = base[1].eos_token_id if ended else 7

    def answer(model, input_ids, **more):
        return torch.cat([input_ids, torch.tensor([[7, last]])], dim=1)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", answer)
    train_trace.main(train_trace.parse(["--device", "cpu", "--ask", f"{folder}/mose.pt", "a"]))
    assert ("(it was cut after 2 tokens)" in capsys.readouterr().out) == (not ended)


@pytest.mark.parametrize("positions", [96, 160])
def test_ask_reads_the_tokens_of_a_prompt_that_training_and_testing_read(
        tmp_path, monkeypatch, capsys, positions):
    """A base with few positions, prompts that are longer, and answers of 40 words."""
    model, tokenizer = train_trace.load_model(Args(device="cpu"))
    model.config.max_position_embeddings = positions
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"{i} " + "one two three four " * 60, "answer": "yes " * 20}
            for i in range(4)]
    data = task_folder(tmp_path / "data", json.dumps(rows), "long")
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(tmp_path / "base"), "--device", "cpu"]
    train_trace.main(train_trace.parse([
        *options, "--data", data, "--tasks", "long", "--metric", "long=rouge_l", "--epochs", "1",
        "--methods", "mose"]))
    args = train_trace.parse([*options, "--data", data, "--tasks", "long", "--metric",
                              "long=rouge_l"])
    task, = train_trace.load_tasks(args, tokenizer, model)
    assert task.limit < positions < len(task.test_prompt_ids[0])
    read_by_training = task.train[0][0][:task.limit]
    asked, generate = [], transformers.LlamaForCausalLM.generate

    def spy(model, input_ids, max_new_tokens, **more):
        asked.append((input_ids[0].tolist(), max_new_tokens))
        return generate(model, input_ids=input_ids, max_new_tokens=max_new_tokens, **more)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", spy)
    monkeypatch.setattr("tracebench.ask.SURE", 0.0)
    prompt = ["--ask", "runs/default/mose.pt", rows[0]["prompt"]]
    capsys.readouterr()
    train_trace.main(train_trace.parse(["--device", "cpu", *prompt]))  # the model is in the notes
    (ids, answer), = asked
    assert ids == read_by_training and answer == positions - len(ids)
    assert answer == task.longest == task.max_new
    out = capsys.readouterr().out
    assert f"the model reads the last {task.limit} of them" in out
    notes = Path("runs/default/args.json")
    other = tmp_path / "other.pt"
    other.write_bytes(b"no adapter")
    with pytest.raises(ValueError, match="other.pt begins with b'no adap'.*expected mose.pt"):
        train_trace.main(train_trace.parse([*options, "--ask", str(other), "a prompt"]))
    notes.unlink()  # control: without the notes of its run
    train_trace.main(train_trace.parse([*options, *prompt]))
    assert asked[1][0] != read_by_training


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
    ("{}", "got dict '{}'"),
    ("[]", "got an empty list"),
    (json.dumps(GOOD) + "\n" + json.dumps(GOOD), "a row of JSON in each line needs commas"),
    ("3", "got int '3', expected a list"),
    (json.dumps(GOOD), "got dict \"{'prompt'"),
    (json.dumps([GOOD, "x"]), "row 1"),
    (json.dumps([GOOD, GOOD, {"prompt": "p"}]), "row 2: its 'answer' is missing"),
    (json.dumps([{"prompt": "p" * 99, "answer": 3}]), "row 0: its 'answer' is 3, expected a text"),
    (json.dumps([GOOD, {"prompt": "", "answer": "a"}]), "row 1: its 'prompt' is ''"),
    (json.dumps([{"prompt": "p", "answer": ""}]), "row 0"),
    (json.dumps([{"prompt": "p", "answer": None}]), "row 0"),
    (json.dumps([GOOD, {"prompt": "half of \ud83d", "answer": "a"}]), "row 1 has a lone surrogate"),
]


@pytest.mark.parametrize("text, message", BAD_FILES)
def test_a_file_of_another_shape_is_named_with_its_row(tmp_path, base, text, message):
    data = task_folder(tmp_path, text)
    with pytest.raises(ValueError, match="train.json") as error:
        train_trace.load_tasks(Args(data=data, tasks="FOMC"), base[1], base[0])
    assert message in str(error.value)


def test_data_can_come_from_a_url_and_what_is_not_data_is_named(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        log_message = staticmethod(lambda *given: None)

    handler = functools.partial(Quiet, directory=Args.data)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        there, here = (read(base, "FOMC", "test") for base in (url, Args.data))
        with pytest.raises(ValueError, match="none/test.json.*404"):
            read(url, "none", "test")
        (tmp_path / "page").mkdir()
        (tmp_path / "page/test.json").write_text("<!DOCTYPE html><html>Sign in</html>")
        handler.keywords["directory"] = tmp_path
        with pytest.raises(ValueError, match="page/test.json: can't be read as JSON"):
            read(url, "page", "test")
        server.shutdown()
    assert there.to_list() == here.to_list()


def test_a_whole_character_of_two_halves_is_read(tmp_path):
    """The control of the lone surrogate among BAD_FILES."""
    text = json.dumps([{"prompt": "\U0001f600", "answer": "a"}])
    assert "\\ud83d" in text
    data = task_folder(tmp_path, text)
    assert read(data, "FOMC", "train")[0]["prompt"] == "\U0001f600"


def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_it(tmp_path):
    """Editors of Windows write it."""
    data = task_folder(tmp_path, "\ufeff" + json.dumps([GOOD]))
    assert read(data, "FOMC", "train").to_list() == [GOOD]


def test_a_good_file_is_read(tmp_path, base, capsys):
    rows = [{**GOOD, "id": "1a"}, {**GOOD, "id": 2}]  # Arrow refuses such a column
    data = task_folder(tmp_path, json.dumps(rows), "mine")
    args = Args(data=data, tasks=" mine ", metric="mine = rouge_l", epochs="3")
    task, = train_trace.load_tasks(args, base[1], base[0])
    assert (task.metric, task.epochs, len(task.train)) == ("rouge_l", 3, 2)
    assert "2 of 2 test prompts stand in train too" in capsys.readouterr().out


def test_a_test_answer_that_is_longer_than_all_in_train_is_warned_of(tmp_path, base, capsys):
    """Generating stops where the longest training answer ends, so it could never be right."""
    data = task_folder(tmp_path, json.dumps([GOOD, {"prompt": "q", "answer": "a b c"}]), "mine")
    test = [{"prompt": "r", "answer": "a b c"}, {"prompt": "s", "answer": "a b c d e"}]
    file = tmp_path / "mine/test.json"
    for metric, warned in (("accuracy", True), ("first_letter", False)):
        file.write_text(json.dumps(test))
        args = Args(data=data, tasks="mine", metric=f"mine={metric}", epochs="1")
        train_trace.load_tasks(args, base[1], base[0])
        said = capsys.readouterr().out
        assert ("1 of 2 test answers are longer than the longest" in said) == warned
    file.write_text(json.dumps(test[:1]))  # control
    train_trace.load_tasks(dataclasses.replace(args, metric="mine=accuracy"), base[1], base[0])
    assert "longer than" not in capsys.readouterr().out


def test_a_task_may_have_any_name_that_a_folder_can_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("en/T", "x y", "a=b"):
        task_folder(tmp_path / "data", json.dumps([GOOD] * 4), name)
    train_trace.main(Args(data="data", tasks="en/T, x y,a=b", epochs="1", methods="task_lora,mose",
                          metric="en/T=accuracy,x y=accuracy,a=b=rouge_l", device="cpu"))
    for method in ("task_lora", "mose"):
        result = json.loads(Path(f"runs/default/{method}.json").read_text())
        assert result["tasks"] == ["en/T", "x y", "a=b"] and result["bwt"] == 0.0


@pytest.mark.parametrize("options, message", [
    ({"tasks": "FOMCC"}, "TRACE has no 'FOMCC', only .* Correct the name, or give its metric"),
    ({"tasks": "FOMC,"}, "TRACE has no ''"),
    ({"tasks": "mine", "metric": "mine=acc"}, "got 'mine=acc', expected one of accuracy, "),
    ({"tasks": "A,B", "metric": "A=accuracy,A=sari"}, "got 'A=sari', expected .* once .*: A, B"),
    ({"metric": "Py150=sari"}, "got 'Py150=sari', .* that is not TRACE's: there is none"),
    ({"tasks": "FOMC", "data": "http://[x"}, "FOMC/train.json: can't be read"),
    ({"tasks": "FOMC", "data": "http://.foo"}, "FOMC/train.json: can't be read"),
    ({"tasks": "FOMC,FOMC"}, "each once"),
    ({"tasks": "FOMC", "data": "/nowhere"}, "FOMC/train.json"),
    ({"epochs": "1,2"}, "--epochs"),
    ({"epochs": "x"}, "--epochs"),
    ({"epochs": "0"}, "--epochs 0: expected a number from 1 on"),
    ({"tasks": "FOMC,ScienceQA", "epochs": "2,0"}, "--epochs"),
    ({"metric": "fomc=rouge_l"}, "--metric: got 'fomc=rouge_l', expected TASK=METRIC"),
    ({"metric": "rouge_l"}, "--metric: got 'rouge_l', expected TASK=METRIC"),
])
def test_a_wrong_option_is_named(base, options, message):
    with pytest.raises(ValueError, match=message):
        train_trace.load_tasks(Args(**options), base[1], base[0])


@pytest.mark.parametrize("argv", [
    ["--method", "sorcery"], ["--methods", "sorcery"], ["--nonsense"], ["--batch", "0"],
    ["--dtype", "int8"], ["--lr", "x"], ["--preset", "tpu"],
    ["--tokens", "0"], ["--replay", "2"], ["--lr", "-1"], ["--lora_lr", "-1"], ["--lr", "nan"],
    ["--test", "never"], ["--top_k", "5"], ["--experts", "0"], ["--lora_scale", "0"],
    ["--router_std", "inf"], ["--name", ""], ["--seeds", str(10**15)], ["--device_map", "auto", "--device", "cpu"],
    ["--device", "mps"], ["--tasks", "FOMCC"], ["--tasks", "FOMC,FOMC"], ["--epochs", "5,3"],
    ["--metric", "FOMC=sari"], ["--density", "2"],  # all before the base is loaded
])
def test_a_wrong_flag_ends_with_a_message(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        train_trace.parse(argv)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize("fault, message, has_traceback", [
    (lambda args: open("assets"), "Is a directory", False),  # an OSError
    (lambda args: claim(Path("train_trace.py")), "is a file, expected a folder", False),
    (lambda args: train_trace.load_tasks(Args(tasks="x"), None, None), "TRACE has no 'x'", False),
    (lambda args: json.loads("{"), "Expecting property name", True),  # of another library
    (lambda args: torch.zeros(2**60), "can't allocate memory", False),
    (lambda args: signal.raise_signal(signal.SIGINT), "interrupted", False),
    (lambda args: torch.zeros(2) @ torch.zeros(3), None, None),  # control: no error of the user
])
def test_an_error_of_the_user_is_one_message(fault, message, has_traceback, monkeypatch, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train_trace, "parse", lambda: None)
    monkeypatch.setattr(train_trace, "main", fault)
    with pytest.raises(RuntimeError if message is None else SystemExit) as stop:
        train_trace.from_the_command_line()
    if message:
        assert message in str(stop.value)
        assert ("Traceback" in capsys.readouterr().err) == has_traceback


def a_run_that_fails(error, tmp_path, monkeypatch, where="train_trace.learn_in_a_row"):
    """Start a short run, as from the command line, in which a function raises the error."""
    def fails(*given, **options):
        raise error

    monkeypatch.chdir(tmp_path)
    args = Args(methods="lora", name="full", device="cpu", **SHORT)
    monkeypatch.setattr(train_trace, "parse", lambda: args)
    monkeypatch.setattr(where, fails)
    train_trace.from_the_command_line()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[..] can't allocate memory"),
    RuntimeError("MPS backend out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")])
@pytest.mark.parametrize("where, message", [
    ("transformers.AutoModelForCausalLM.from_pretrained", "\n.*The base does not fit"),
    ("train_trace.train", "\nGo on .*:\npython .*train_trace.py --resume runs/full --tokens 768"),
    ("train_trace.evaluate", "\nGo on .*\n.*--resume runs/full --tokens 768")])  # of the bare base
def test_out_of_memory_says_how_to_go_on(where, message, error, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        a_run_that_fails(error, tmp_path, monkeypatch, where)


def test_another_error_says_too_that_the_run_can_go_on(tmp_path, monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="illegal"):
        a_run_that_fails(RuntimeError("an illegal memory access"), tmp_path, monkeypatch)
    assert "--resume runs/full" in capsys.readouterr().err


def test_decoding_that_runs_out_of_memory_goes_on_in_smaller_passes(base, monkeypatch):
    model, tokenizer = base
    task, = train_trace.load_tasks(Args(tasks="FOMC", max_test=20), tokenizer, model)
    answers = train_trace.generate(model, tokenizer, task, range(20), Args())
    sizes, generate = [], model.generate

    def small(input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", small)
    most = 6
    assert train_trace.generate(model, tokenizer, task, range(20), Args()) == answers
    assert sizes == [20, 10, 5, 5, 10, 5, 5]
    most = 0  # control: a single row does not fit
    with pytest.raises(torch.OutOfMemoryError):
        train_trace.generate(model, tokenizer, task, range(20), Args())
    most = 6
    sizes.clear()
    monkeypatch.setattr(processes, "SHARDED", True)  # the others would wait for more passes
    with pytest.raises(torch.OutOfMemoryError):
        train_trace.generate(model, tokenizer, task, range(20), Args())
    assert sizes == [20]


@pytest.mark.parametrize("max_prompt, positions, says", [
    (8, 2048, r"500 of 500 prompts have more than 8 tokens, .* the last ones \(--max_prompt\)"),
    (1024, 10, r"500 of 500 .* more than 8 .*the model has 10 positions, .* longest answer .* takes 2"),
    (1024, 2048, None)])
def test_prompts_that_are_cut_are_counted(max_prompt, positions, says, base, capsys, monkeypatch):
    monkeypatch.setattr(base[0].config, "max_position_embeddings", positions)
    train_trace.load_tasks(Args(tasks="FOMC", max_prompt=max_prompt), base[1], base[0])
    out = capsys.readouterr().out
    assert re.search(f"FOMC: {says}", out) if says else "FOMC" not in out


def test_damaged_progress_is_named(tmp_path):
    (tmp_path / "mose.progress.json").write_text("{")
    with pytest.raises(ValueError, match=r"mose.progress.json is damaged .* delete it"):
        Record(tmp_path, "mose", [], Args())


def test_a_full_disk_says_how_to_go_on(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="No space left(.|\n)*go on:\n.*--resume runs/full$"):
        a_run_that_fails(OSError(28, "No space left on device"), tmp_path, monkeypatch)


def test_an_interrupt_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    args = Args(methods="lora", name="two words", seeds="0,01", device="cpu", **SHORT)
    monkeypatch.setattr(train_trace, "learn_in_a_row", interrupted)
    with pytest.raises(SystemExit) as stop:
        train_trace.main(args)
    script = train_trace.SCRIPT
    assert str(stop.value).endswith(
        f"To go on:\npython {script} --resume 'runs/two words-0'\n"
        f"python {script} --resume 'runs/two words-1'\n"
        f"(cd {ROOT} && python -m figures.report '{tmp_path}/runs/two words-0' "
        f"'{tmp_path}/runs/two words-1')")
    assert train_trace.parse(["--resume", "runs/two words-1"]).seeds == "1"


@pytest.mark.parametrize("methods, decoded", [("floor", 0), ("base", 1), ("base,lora", 2)])
def test_the_base_is_tested_only_where_a_result_needs_it(methods, decoded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_the_base, evaluate = [], train_trace.evaluate

    def noted(model, tokenizer, adapter, task, args):
        if adapter is None:
            of_the_base.append(task.name)
        return evaluate(model, tokenizer, adapter, task, args)

    monkeypatch.setattr(train_trace, "evaluate", noted)
    train_trace.main(Args(methods=methods, name="r", device="cpu", **SHORT))
    assert len(of_the_base) == decoded * len(SHORT["tasks"].split(","))


@pytest.mark.parametrize("at_the_end", [True, False])
def test_a_last_step_that_spoils_the_weights_ends_the_run(at_the_end, base, monkeypatch):
    args = Args(device="cpu", **SHORT)
    task = train_trace.load_tasks(args, base[1], base[0])[0]
    adapter, steps = train_trace.attach("lora", args, base[0]), []
    adapter.begin_task(task.name)

    class Spoiled(torch.optim.AdamW):
        def step(self):
            super().step()
            steps.append(None)
            if at_the_end and len(steps) == -(-len(task.train) // args.batch) * task.epochs:
                self.param_groups[0]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim, "AdamW", Spoiled)
    says = "not finite after the last step.*lower one"
    try:
        with pytest.raises(ValueError, match=says) if at_the_end else contextlib.nullcontext():
            train_trace.train(*base, adapter.trainable_parameters(), task, args, 1e-3, QUIET)
    finally:
        adapter.detach()


def test_one_of_several_processes_does_not_take_all_gpus(monkeypatch, capsys):
    argv = ["--device_map", "auto"]
    train_trace.parse(argv)  # control
    monkeypatch.setattr("tracebench.processes.WORLD", 2)
    with pytest.raises(SystemExit):
        train_trace.parse(argv)
    assert "--device_map spreads a base over the GPUs of one process" in capsys.readouterr().err


@pytest.mark.parametrize("here", [None, torch.device("cuda")])
def test_the_preset_for_a_gpu_needs_one(here, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: here)
    preset = Args(preset="gpu", **PRESETS["gpu"])
    assert choose_device(dataclasses.replace(preset, device="cpu")) == ("cpu", torch.float32)
    raises = pytest.raises(ValueError, match="torch sees no GPU.*--device cpu")
    with contextlib.nullcontext() if here else raises:
        choose_device(preset)


@pytest.mark.parametrize("options, warned", [
    ("--methods lora --lr 1e-3", True), ("--methods mose --lr 1e-3", False),
    ("--methods mose --lora_rank 4", True), ("--methods moe_lora --experts 8", False),
    ("--methods mose --replay 0.1", True), ("--methods floor,replay --replay 0.1", False),
    ("--preset gpu --device cpu --methods mose", False)])  # the preset has another lora_lr
def test_an_option_that_nothing_reads_makes_a_warning(options, warned, capsys):
    train_trace.parse(options.split())
    assert ("has no effect here" in capsys.readouterr().out) == warned


def test_several_processes_need_a_cpu_or_gpus_of_nvidia(monkeypatch):
    monkeypatch.setattr(processes, "WORLD", 2)
    with pytest.raises(ValueError, match="2 processes .* got mps: add --device cpu"):
        processes.start("mps")
    monkeypatch.setattr(processes, "WORLD", 1)  # control
    processes.start("mps")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "WORLD", 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="number 2 .* torch sees 2 GPUs: .*nproc-per-node 2"):
        processes.start("cuda")
    monkeypatch.delenv("LOCAL_RANK")  # another launcher
    with pytest.raises(ValueError, match="number -1 .* start it by torchrun"):
        processes.start("cuda")


def without_a_weight(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["_orig_mod.model.norm.weight"] = weights.pop("model.norm.weight")
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))


@pytest.mark.parametrize("spoil, says", [
    (without_a_weight, "1 of its weights are not in its files, such as model.norm.weight"),
    (with_another_size, "can't be loaded")])
def test_a_base_that_would_be_partly_random_is_refused(spoil, says, base, tmp_path):
    for part in base:
        part.save_pretrained(tmp_path)
    train_trace.load_model(Args(model=str(tmp_path), device="cpu"))  # control
    spoil(tmp_path)
    with pytest.raises(ValueError, match=says):
        train_trace.load_model(Args(model=str(tmp_path), device="cpu"))


def test_a_prompt_that_begins_with_the_bos_gets_no_second_one(base):
    tokenizer = base[1]
    plain, _ = encode(tokenizer, {"prompt": "one two", "answer": "x"})
    ids, _ = encode(tokenizer, {"prompt": f"{tokenizer.bos_token}one two", "answer": "x"})
    assert ids == plain and ids.count(tokenizer.bos_token_id) == 1


def test_targets_outside_of_the_language_model_are_refused(base):
    check_targets(base[0], Args())
    check_targets(base[0], Args(targets="lm_head,down_proj"))
    check_targets(multimodal(), Args(targets="down_proj"))  # control: its vision tower has none
    says = "4 of these layers are outside of the language model, such as model.vision_tower"
    with pytest.raises(ValueError, match=says):
        check_targets(multimodal(), Args())


def test_targets_are_checked_before_a_run_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_trace, "check_targets", lambda model, args: fail(model))
    with pytest.raises(ValueError, match="no fingerprint"):
        train_trace.main(Args(methods="lora", name="r", device="cpu", **SHORT))


@pytest.mark.parametrize("resumed, says", [(True, "--resume runs/r"), (False, "--shard ..")])
def test_how_to_start_several_processes_fits_the_run(resumed, says, tmp_path, monkeypatch):
    args = Args(shard=True, resume="runs/r" if resumed else "")
    with pytest.raises(ValueError, match=re.escape(f"train_trace.py {says}")):
        options.check(args)


def test_force_removes_nothing_before_the_run_can_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Args(methods="floor", name="old", device="cpu", **SHORT)
    train_trace.main(args)
    before = (tmp_path / "runs/old/floor.json").read_bytes()
    monkeypatch.setattr("tracebench.runs.fingerprint", fail)
    with pytest.raises(ValueError, match="no fingerprint"):
        train_trace.main(dataclasses.replace(args, force=True))
    assert (tmp_path / "runs/old/floor.json").read_bytes() == before


def fail(model):
    raise ValueError("no fingerprint")


@pytest.mark.parametrize("error, works", [(OSError(95, "Operation not supported"), True),
                                          (BlockingIOError(), False)])
def test_a_file_system_without_locks_makes_a_warning(error, works, tmp_path, monkeypatch, capsys):
    def flock(*given):
        raise error

    monkeypatch.setattr("tracebench.runs.fcntl.flock", flock)
    with contextlib.nullcontext() if works else pytest.raises(ValueError, match="in use"):
        claim(tmp_path / "run")
        assert "can't be locked" in capsys.readouterr().out


def test_a_density_that_leaves_nothing_for_the_last_task_is_refused(base):
    """The largest pool of B has 8,192 entries. With 0.7, the eighth task gets one of the last two."""
    for density, fits in ((0.01, True), (0.7, True), (0.75, False), (1.0, False)):
        mose = attach("mose", Args(density=density), base[0])
        try:
            for name in "1234567":
                mose.begin_task(name)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # nothing is learned
                    mose.end_task()
            mose.begin_task("8")
            has_room = True
        except ValueError:
            has_room = False
        assert has_room == fits
        raises = pytest.raises(ValueError, match=f"--density {density}: .* the last of 8")
        with contextlib.nullcontext() if fits else raises:
            check_density(mose, 8)
        mose.detach()


@pytest.mark.parametrize("method", KINDS)
def test_the_options_that_a_method_reads_are_those_of_the_table(method, base):
    read = []

    class Spy(Args):
        def __getattribute__(self, name):
            read.append(name)
            return super().__getattribute__(name)

    args = Spy()
    read.clear()
    attach(method, args, base[0]).detach()
    rate(method, args, base[0])
    lessons(method, args, train_trace.load_tasks(Args(**SHORT), base[1], base[0]))
    assert {*read} & {*READ_BY} == {name for name, by in READ_BY.items() if method in by}


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
    claim(Path("runs/new")).close()  # of a run that failed at once nothing is lost


@pytest.mark.parametrize("name, is_kept", [
    ("mose.pt", True), ("joint-1.pt", True), ("mose.progress.json", True), ("table.md", True),
    ("mose.pt.tmp", False)])  # control: half of a file
def test_an_adapter_without_its_result_is_not_overwritten_either(tmp_path, name, is_kept):
    (tmp_path / "args.json").write_text(json.dumps({"options": {}}))
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="--force") if is_kept else contextlib.nullcontext():
        claim(tmp_path).close()
    claim(tmp_path, force=True).close()


@pytest.mark.parametrize("force", [False, True])
def test_files_that_no_run_has_made_are_never_overwritten(tmp_path, force):
    """Say a base that lies in runs/, whose name a run was given."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not of a run of this script, such as config.json"):
        claim(tmp_path, force=force)
    assert (tmp_path / "config.json").exists()
    for text in ("{}", "", "3"):  # other programs write a file of this name too
        (tmp_path / "args.json").write_text(text)
        with pytest.raises(ValueError, match="not of a run of this script"):
            claim(tmp_path, force=force)
    # Control: this one is the folder of a run.
    (tmp_path / "args.json").write_text(json.dumps({"options": {}}))
    if force:
        claim(tmp_path, force=force).close()
    else:
        with pytest.raises(ValueError, match="or --force to overwrite it"):
            claim(tmp_path, force=force)
    assert (tmp_path / "config.json").exists()


def test_a_folder_is_of_a_run_until_all_its_files_are_removed(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("mose.json", "args.json", "mose.pt", "lora.pt")]
    for file in files:
        file.write_text(json.dumps({"options": {}}))
    removed, unlink = [], Path.unlink

    def killed(file):
        unlink(file)
        removed.append(file.name)
        if len(removed) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        start_anew(tmp_path, {})
    assert [file.name for file in tmp_path.iterdir()] == ["args.json"]
    claim(tmp_path).close()


def test_force_removes_nothing_before_all_options_are_checked(run, tmp_path, monkeypatch):
    _, folder = run
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "runs/a")
    (tmp_path / "runs/a/lock").unlink()
    before = {file.name: file.read_bytes() for file in Path("runs/a").iterdir()}
    own = Args(device="cpu", name="a", force=True, methods="mose", **SHORT)
    for wrong in ({"targets": "q_porj"}, {"epochs": "4,4,4"}, {"data": "nowhere"},
                  {"density": 1e-9}, {"density": 1.0}):
        with pytest.raises(ValueError):
            train_trace.main(dataclasses.replace(own, **wrong))
        assert {name: Path("runs/a", name).read_bytes() for name in before} == before
    # Control: with right options, all that was there goes.
    assert "lora.json" in before
    train_trace.main(own)
    assert Path("runs/a/mose.json").exists() and not Path("runs/a/lora.json").exists()


def test_the_seconds_of_the_base_are_not_those_of_the_methods_before_it(base, tmp_path):
    args = Args(device="cpu", **SHORT)
    tasks = train_trace.load_tasks(args, base[1], base[0])
    record = Record(tmp_path, "floor", tasks, args)
    record.clock -= 1000  # it was made before another method learned
    train_trace.test_once(record, *base, tasks, QUIET)
    assert 0 < record.result["seconds_testing"] < 1000


@pytest.mark.parametrize("source, fwt", [(None, 0.0), ("FOMC", None)])
def test_what_a_task_gains_from_a_source_is_not_made_up(base, tmp_path, source, fwt):
    args = Args(device="cpu", **SHORT)
    tasks = train_trace.load_tasks(args, base[1], base[0])
    record = Record(tmp_path, "mose", tasks, args)
    record.result |= {"R": [[50.0, None], [50.0, 60.0]], "source": [None, source]}
    record.finish({}, zero_shot=[10.0, 20.0])
    result = json.loads((tmp_path / "mose.json").read_text())
    assert result["fwt"] == fwt and result["op"] == 55.0


def test_a_loss_that_is_not_finite_stops_and_keeps_the_earlier_tasks(base, tmp_path, monkeypatch):
    model, tokenizer = base
    args = Args(device="cpu", **SHORT)
    tasks = train_trace.load_tasks(args, tokenizer, model)
    learn = train_trace.train

    def explode(model, tokenizer, parameters, task, *rest):
        if task.name == "NumGLUE-cm":
            parameters[0].data.fill_(float("inf"))
        return learn(model, tokenizer, parameters, task, *rest)

    monkeypatch.setattr(train_trace, "train", explode)
    with pytest.raises(ValueError, match="NumGLUE-cm: the loss is nan"):
        record = Record(tmp_path, "mose", tasks, args)
        train_trace.learn_in_a_row(record, model, tokenizer, tasks, QUIET)
    fresh, _ = train_trace.load_model(args)
    adapter = train_trace.MoSE.load(fresh, tmp_path / "mose-1.pt")
    assert [*adapter.tasks] == ["FOMC"]
    for module in model.modules():  # the failed run left its adapter on the shared base
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
        module._modules.pop("sub_experts", None)
