"""Nothing lost: killed, cut short, fed nonsense, run a hundred times over."""

import contextlib
import copy
import dataclasses
import fcntl
import gc
import io
import json
import lzma
import os
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from tqdm import tqdm

import mose as module
import train_trace
from mose import MoSE, MoSEConfig, SubExperts, top_k_mask
from tracebench import runs
from tracebench.data import encode
from tracebench.options import Args

reliability = pytest.importorskip("benchmarks.reliability")  # it needs hypothesis
learn, tiny = reliability.learn, reliability.tiny
IDS = torch.arange(24).view(3, 8)


class Stopped(Exception):
    """The process is killed here."""


def ready(*names, **config):
    """A model that has learned these tasks."""
    mose = MoSE(tiny(), MoSEConfig(**config))
    for name in names:
        learn(mose, name)
        mose.end_task()
    return mose


@pytest.fixture(scope="module")
def base():
    return train_trace.load_model(Args(device="cpu"))


# ------------------------------------------------------------------------------ kill and resume


@pytest.mark.skipif(not os.environ.get("CI"), reason="it kills many runs: set CI=1")
def test_killed_runs_lose_nothing():
    assert reliability.kills(3, seed=1)[0] == 3


SHORT = Args(tasks="FOMC,NumGLUE-cm", max_train=32, max_test=4, epochs="1", methods="lora,mose",
             device="cpu")


def test_resume_after_every_task_gives_the_same_as_never_stopping(tmp_path, monkeypatch, guard,
                                                                  no_figures):
    """Off: the order of the data is another after the start, and the check sees it."""
    monkeypatch.chdir(tmp_path)
    train_trace.main(dataclasses.replace(SHORT, name="alone"))
    write, batches, stops = runs.write_json, train_trace.batches, []

    def stop_after(file, value):
        write(file, value)
        if "progress" in file.name:
            stops.append(file.name)
            raise Stopped

    def other(*given):
        return [*batches(*given)][::-1]

    monkeypatch.setattr(runs, "write_json", stop_after)
    args = dataclasses.replace(SHORT, name="stopped")
    while True:
        try:
            train_trace.main(args)
        except Stopped:
            args = train_trace.parse(["--resume", "runs/stopped"])
            guard or monkeypatch.setattr(train_trace, "batches", other)
        else:
            break
    assert len(stops) == 4  # after each of two tasks, with each of two methods
    same = reliability.outcome(tmp_path / "runs/stopped") == reliability.outcome(
        tmp_path / "runs/alone")
    assert same == guard


@pytest.fixture(params=[True, False], ids=["guarded", "control"])
def guard(request):
    return request.param


def test_resume_takes_no_other_method_and_a_finished_run_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_trace.main(dataclasses.replace(SHORT, name="a", methods="lora"))
    before = reliability.outcome(tmp_path / "runs/a")
    options = "--resume: the run goes on with the options that it began with"
    for argv, message in ((["--resume", "runs/a", "--lr", "1"], options),
                          (["--resume", "runs/a", "--tasks", "FOMC"], options),
                          (["--resume", "runs/a", "--lr", "0"], options),  # also a default
                          (["--resume", "runs/a", "--tokens", "9", "--lr", "1"], options),
                          (["--resume", "runs/a", "--tokens", "0"], "--tokens: got 0"),
                          (["--resume", "runs/none"], "there is no runs/none/args.json")):
        with pytest.raises(SystemExit):
            train_trace.parse(argv)
        assert message in capsys.readouterr().err
    began = train_trace.parse(["--resume", "runs/a"])
    for argv, changed in (([], {}), (["--tokens", "99"], {"tokens": 99}),
                          (["--tokens", str(Args.tokens)], {"tokens": Args.tokens}),
                          (["--checkpointing"], {"checkpointing": True})):
        args = train_trace.parse(["--resume", "runs/a", *argv])
        assert args == dataclasses.replace(began, **changed)
    monkeypatch.setattr(train_trace, "load_model", None)  # not even the model is loaded
    train_trace.main(began)
    assert reliability.outcome(tmp_path / "runs/a") == before


def test_resume_goes_on_in_the_folder_that_is_named(tmp_path, monkeypatch):
    """Moved, renamed, and called from another folder; data and model were given as relative."""
    data = Path(Args.data).parent
    monkeypatch.chdir(data)
    args = train_trace.parse(["--model", "tiny-llm", "--data", "trace-mini", "--name", "r"])
    monkeypatch.chdir(tmp_path)
    args = dataclasses.replace(SHORT, name="r", methods="lora", data=args.data, model=args.model)
    train_trace.main(dataclasses.replace(args, name="alone"))
    train, learned = train_trace.train, []

    def second_fails(*given):
        learned.append(given[3].name)
        return train(*given) if len(learned) != 2 else 1 / 0

    monkeypatch.setattr(train_trace, "train", second_fails)
    with pytest.raises(ZeroDivisionError):
        train_trace.main(args)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs/r").rename(tmp_path / "kept")
    monkeypatch.chdir(tmp_path / "elsewhere")
    train_trace.main(train_trace.parse(["--resume", "../kept"]))
    assert not (tmp_path / "elsewhere/runs").exists() and not (tmp_path / "runs/r").exists()
    assert learned[2:] == ["NumGLUE-cm"], "the first task was not learned again"
    assert reliability.outcome(tmp_path / "kept") == reliability.outcome(tmp_path / "runs/alone")


def test_resume_refuses_data_that_has_changed_since(tmp_path, monkeypatch, guard):
    """Off: the digests are not compared, and the run goes on with half of one data, half of other."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Args.data, "data")
    args = dataclasses.replace(SHORT, name="r", methods="lora", data="data")
    write = runs.write_json

    def stop_after(file, value):
        write(file, value)
        if "progress" in file.name:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(runs, "write_json", stop_after)
        train_trace.main(args)
    file = Path("data/NumGLUE-cm/train.json")
    before = file.read_bytes()
    file.write_text(json.dumps(json.loads(before)[1:]))
    if guard:
        with pytest.raises(ValueError, match="has changed since.*: NumGLUE-cm/train.json; put"):
            train_trace.main(train_trace.parse(["--resume", "runs/r"]))
        file.write_bytes(before)
    else:
        monkeypatch.setattr(train_trace, "note_inputs", lambda *given: None)
    train_trace.main(train_trace.parse(["--resume", "runs/r"]))
    assert Path("runs/r/lora.json").exists()


@pytest.mark.parametrize("noted", [True, False])
def test_resume_refuses_another_base(tmp_path, monkeypatch, noted):
    """Off: nothing is noted of the base, and the run goes on with it in another dtype."""
    monkeypatch.chdir(tmp_path)
    train_trace.main(dataclasses.replace(SHORT, name="r", methods="lora", dtype="auto"))
    Path("runs/r/lora.json").unlink()
    notes = json.loads(Path("runs/r/args.json").read_text())
    assert notes["base"] == "torch.float32 on cpu"
    if not noted:
        del notes["base"]
        Path("runs/r/args.json").write_text(json.dumps(notes))
    # As on a machine whose default is bf16.
    monkeypatch.setattr("tracebench.model.choose_device", lambda args: ("cpu", torch.bfloat16))
    again = train_trace.parse(["--resume", "runs/r", "--tokens", "700"])
    if noted:
        says = "was torch.float32 on cpu when this run began, and is torch.bfloat16 on cpu now"
        with pytest.raises(ValueError, match=says):
            train_trace.main(again)
    else:
        train_trace.main(again)
        # Another --tokens is noted, so that the next --resume goes on with it.
        assert train_trace.parse(["--resume", "runs/r"]).tokens == 700


@pytest.mark.parametrize("noted", [True, False])
def test_resume_refuses_a_base_with_other_weights(tmp_path, monkeypatch, noted):
    """Off: nothing is noted of the weights, and the run goes on with others."""
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(Args.model, "base")
    train_trace.main(dataclasses.replace(SHORT, name="r", methods="lora", model=str(model)))
    Path("runs/r/lora.json").unlink()
    notes = json.loads(Path("runs/r/args.json").read_text())
    if not noted:
        del notes["weights"]
        Path("runs/r/args.json").write_text(json.dumps(notes))
    other = transformers.AutoModelForCausalLM.from_pretrained(model)
    other.lm_head.weight.data.mul_(2.0)
    other.save_pretrained(model)
    again = train_trace.parse(["--resume", "runs/r"])
    if noted:
        with pytest.raises(ValueError, match="the base is another one than when.*embed_tokens"):
            train_trace.main(again)
    else:
        train_trace.main(again)
        assert Path("runs/r/lora.json").exists()


def test_resume_removes_what_a_killed_run_has_left(tmp_path):
    """Of a method that is done, and files half written. What is not done keeps its files."""
    kept = {"mose-3.pt", "mose.progress.json", "lora.json", "lora.pt", "args.json"}
    for name in (*kept, "lora-8.pt", "lora.progress.json", "mose-4.pt.1a2b.tmp"):
        (tmp_path / name).touch()
    runs.remove_leftovers(tmp_path, ["lora", "mose"])
    assert {file.name for file in tmp_path.iterdir()} == kept


def test_two_runs_of_one_name_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)
    other = open(tmp_path / "runs/a/lock", "w")
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="runs/a is in use by another run: choose another --name"):
        runs.claim(Path("runs/a"))
    other.close()  # as the system does for a process that died
    runs.claim(Path("runs/a")).close()


def test_an_end_of_task_that_fails_halfway_can_be_repeated(tmp_path, monkeypatch, guard):
    """Off: each layer is finished at once, before the next one has selected its entries."""
    mose, whole = ready("a"), ready("a")
    for each in (mose, whole):
        torch.manual_seed(0)
        learn(each, "b")
    select, calls = SubExperts.select, []

    def no_memory(layer):
        calls.append(layer)
        new = select(layer) if len(calls) != 2 else 1 / 0
        if not guard:
            layer.owner.masked_fill_(new, 2)
        return new

    monkeypatch.setattr(SubExperts, "select", no_memory)
    before = [layer.owner.clone() for layer in mose.layers]
    with pytest.raises(ZeroDivisionError):
        mose.end_task()
    assert mose.open == "b" and [*mose.tasks] == ["a"]
    unchanged = [torch.equal(layer.owner, old) for layer, old in zip(mose.layers, before)]
    assert all(unchanged) == guard
    if not guard:
        return
    assert not any(2 in layer.routers for layer in mose.layers)
    mose.end_task()
    whole.end_task()
    mose.save(tmp_path / "m")
    again = MoSE.load(tiny(), tmp_path / "m")
    assert torch.equal(logits(again, "b"), logits(whole, "b"))
    assert torch.equal(logits(mose, "a"), logits(whole, "a"))


def test_processes_that_save_at_the_same_time_do_not_share_a_file(guard, tmp_path, monkeypatch):
    if not guard:  # off: the name of the new file is always the same
        monkeypatch.setattr(module.os, "urandom", bytes)
    first, second, path, flush = ready("a"), ready("a", "b"), tmp_path / "m", module.os.fsync

    def meanwhile(file):
        """The second one saves just when the first has written its file and not yet renamed it."""
        monkeypatch.setattr(module.os, "fsync", flush)
        second.save(path)
        flush(file)

    monkeypatch.setattr(module.os, "fsync", meanwhile)
    with contextlib.nullcontext() if guard else pytest.raises(FileNotFoundError):
        first.save(path)
    assert [*MoSE.load(tiny(), path).tasks] == (["a"] if guard else ["a", "b"])
    assert [*tmp_path.iterdir()] == [path]


def test_a_full_disk_is_noticed_before_training_and_a_failed_save_harms_nothing(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = type(runs.shutil.disk_usage("."))(1, 1, 2**20)
    with monkeypatch.context() as patch:
        patch.setattr(runs.shutil, "disk_usage", lambda _: few)
        with pytest.raises(ValueError, match="less than 256 MB are free"):
            runs.claim(Path("runs/a"))
    mose = ready("a")
    mose.save("m")
    before = Path("m").read_bytes()

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        mose.save("m")
    assert Path("m").read_bytes() == before
    assert not [*Path().glob("*.tmp")]


# ------------------------------------------------------------------------------ damaged files


def test_every_cut_and_flipped_bit_is_refused():
    assert reliability.damage(flips=60) == [100, 60]


def test_a_file_that_is_something_else_or_holds_objects_is_never_run(tmp_path):
    file, proof = tmp_path / "m", tmp_path / "proof"

    class Evil:
        def __reduce__(self):
            return Path.touch, (proof,)

    buffer = io.BytesIO()
    torch.save({"config": Evil()}, buffer)
    for content in (b"text", lzma.compress(b"text"), buffer.getvalue(),
                    module.FORMAT + b"text", module.FORMAT + lzma.compress(b"text"),
                    module.FORMAT + lzma.compress(buffer.getvalue())):
        file.write_bytes(content)
        ours = content.startswith(module.FORMAT)
        with pytest.raises(ValueError, match="damaged, or no adapter" if ours else "its format is"):
            MoSE.load(tiny(), file)
        assert not proof.exists()
    buffer.seek(0)
    torch.load(buffer, weights_only=False)
    assert proof.exists()  # control: without weights_only it would have run


def edited(path, edit):
    """Write the file anew, as `save` would, after edit(its content)."""
    content = torch.load(io.BytesIO(lzma.decompress(path.read_bytes()[len(module.FORMAT):])))
    edit(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(module.FORMAT + lzma.compress(buffer.getvalue()))


def of(numbers):
    """Numbers as the file holds those of its entries."""
    dtype = torch.int32 if isinstance(numbers[0], int) else torch.float32
    return module.compressed(torch.tensor(numbers, dtype=dtype))


def entry(**changes):
    """An edit of the entries of task "a": how many, gaps between their places, values."""
    def edit(content):
        fields = dict(zip(("count", "gaps", "values"), content["entries"][1]))
        content["entries"][1] = (*{**fields, **changes}.values(),)
    return edit


EDITS = {
    **{f"without {key}": lambda c, key=key: c.pop(key)
       for key in "config base last_number tasks entries routers keys".split()},
    "with something more": lambda c: c.update(extra=1),
    "another base": lambda c: c["base"].update({"lm_head.weight": [1.0, 1.0, 1.0]}),
    "no layer of the base": lambda c: c.update(base={}),
    "a base as a list": lambda c: c.update(base=[1.0]),
    "rank 0": lambda c: c["config"].update(rank=0),
    "another rank": lambda c: c["config"].update(rank=4),
    "other targets": lambda c: c["config"].update(targets=("q_proj",)),
    "a target that is not there": lambda c: c["config"].update(targets=("nope",)),
    "a field more": lambda c: c["config"].update(depth=3),
    "another key_dim": lambda c: c["config"].update(key_dim=8),
    "a task without router": lambda c: c["tasks"].update(z=[9]) or c.update(last_number=9),
    "two tasks of one number": lambda c: c["tasks"].update(z=[1]),
    "a task of a later number": lambda c: c["tasks"].update(a=[9]),
    "a task of number 0": lambda c: c["tasks"].update(a=[0]),
    "a source of a later number": lambda c: c.update(last_number=2) or c["tasks"].update(a=[1, 2]),
    "a source of number 0": lambda c: c["tasks"].update(a=[1, 0]),
    "a source that is the task": lambda c: c["tasks"].update(a=[1, 1]),
    "a task without number": lambda c: c["tasks"].update(a=[]),
    "tasks as a list": lambda c: c.update(tasks=["a"]),
    "entries of a later number": lambda c: c["entries"].update({9: c["entries"].pop(1)}),
    "entries of number 0": lambda c: c["entries"].update({0: c["entries"].pop(1)}),
    "another count": entry(count=1),
    "no count": entry(count=0, gaps=lzma.compress(b""), values=lzma.compress(b"")),
    "no places": entry(gaps=b""),
    "empty places": entry(gaps=lzma.compress(b"")),
    "half a place": entry(gaps=lzma.compress(b"123")),
    "a place too few": entry(count=1, gaps=of([1])),
    "a place beyond the pools": entry(count=1, gaps=of([2**31 - 1]), values=of([1.0])),
    "a place before the pools": entry(count=1, gaps=of([0]), values=of([1.0])),
    "a value that is not finite": entry(count=1, gaps=of([1]), values=of([torch.nan])),
    "routers as a list": lambda c: c.update(routers=[]),
    "a layer too few": lambda c: c["routers"].update({1: c["routers"][1][1:]}),
    "a router of other size": lambda c: c["routers"].update({1: torch.ones(4, 8, 9)}),
    "a key of no task": lambda c: c["keys"][0].update(z=c["keys"][0]["a"]),
    "a mean of other size": lambda c: c["keys"][0].update(a=(4, torch.ones(9), 1.0, {})),
    "half a key": lambda c: c["keys"][0].update(a=(4, torch.ones(32))),
    "a triangle of other size": lambda c: c.update(keys=(c["keys"][0], torch.ones(9))),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_whole_file_with_another_content_is_refused_and_the_model_left_alone(what, tmp_path):
    mose, model, path = ready("a"), tiny(), tmp_path / "m"
    mose.save(path)
    edited(path, lambda _: None)
    MoSE.load(model, path).detach()  # control: unchanged, it is read
    edited(path, entry(count=1, gaps=of([1]), values=of([1.0])))
    MoSE.load(model, path).detach()  # control: so is another entry that is whole
    mose.save(path)
    edited(path, EDITS[what])
    with pytest.raises(ValueError, match="damaged|targets: no linear layer"):
        MoSE.load(model, path)
    assert not any(isinstance(m, SubExperts) for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------ wrong inputs


def infinite(mose):
    mose.begin_task("c")
    mose.layers[0].weight.data[0] = float("inf")
    mose.end_task()


def from_text(text, base, tmp_path, **options):
    """Load a task whose files hold this text or these bytes."""
    (tmp_path / "FOMC").mkdir()
    for split in ("train", "test"):
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "FOMC" / f"{split}.json").write_bytes(content)
    args = Args(data=str(tmp_path), tasks="FOMC", **options)
    return train_trace.load_tasks(args, base[1], base[0])


def rows(*pairs):
    return json.dumps([{"prompt": p, "answer": a} for p, a in pairs])


def without(base, token):
    """A tokenizer that lacks this special token."""
    import copy
    tokenizer = copy.deepcopy(base[1])
    setattr(tokenizer, token, None)
    return tokenizer


def parse(*argv):
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        said = io.StringIO()
        patch.setattr(sys, "stderr", said)
        train_trace.parse(argv)
    raise ValueError(said.getvalue())


def load(content, tmp_path):
    (tmp_path / "m").write_bytes(content)
    MoSE.load(tiny(), tmp_path / "m")


def stripping(tokenizer):
    """A copy of a tokenizer that drops spaces around a text."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Strip()
    return tokenizer


MISTAKES = {  # what: (message, call with (a mose that knows "a" and "b", base, tmp_path))
    "task name None": ("got None as a name, expected a str", lambda m, b, p: m.begin_task(None)),
    "the source as a probe": ("source: got <", lambda m, b, p: m.begin_task("c", len)),
    "a probe that gives NaN": (r"probe\(\) gave nan", lambda m, b, p: (
        m.best_source(lambda: float("nan")))),
    "save while open": ("call end_task", lambda m, b, p: (m.begin_task("c"), m.save(p / "m"))),
    "a list as the source": (r"source: got \['a'\], expected None or one of", lambda m, b, p: (
        m.begin_task("c", ["a"]))),
    "a list in the list": (r"unknown tasks \[\['a'\]\]: expected finished ones, \['a', 'b'\]$",
                           lambda m, b, p: m.set_task([["a"], "b"])),
    "rename a list": (r"can't rename \['a'\]", lambda m, b, p: m.rename(["a"], "c")),
    "a guess that is no number": ("guess: got nan, expected an error >= 0", lambda m, b, p: (
        m.best_source(lambda: 1.0, float("nan")))),
    "a mask that is added to scores": ("attention_mask: expected 1 for text", lambda m, b, p: (
        m.infer_task(IDS, torch.zeros(IDS.shape).fill_(-torch.inf)))),
    "a mask of another shape": (r"ids \(3, 8\) and an attention_mask \(3, 7\)", lambda m, b, p: (
        m.infer_task(IDS, torch.ones(3, 7)))),
    "a config that is a dict": ("expected a MoSEConfig", lambda m, b, p: MoSE(tiny(), {"rank": 8})),
    "a model without embeddings": ("Sequential has no get_input_embeddings", lambda m, b, p: (
        MoSE(torch.nn.Sequential(torch.nn.Linear(2, 2))))),
    "set a number": ("task: got 3, expected a name", lambda m, b, p: m.set_task(3)),
    "set a tuple": (r"task: got \('a', 'b'\), expected a name, None or a list", lambda m, b, p: (
        m.set_task(("a", "b")))),
    "observe for a number": ("got 3 as a name", lambda m, b, p: m.observe(IDS, task=3)),
    "a list with the open task": (r"unknown tasks \['c'\]", lambda m, b, p: (
        m.begin_task("c"), m.set_task(["a", "c"]))),
    "too many tasks": ("a list of 6 tasks.*as many rows", lambda m, b, p: (
        m.set_task(["a", "b"] * 3), m.model(IDS))),
    "rename to 3": ("got 3 as a name, expected a str", lambda m, b, p: m.rename("a", 3)),
    "load on what is attached": ("detach\\(\\) it", lambda m, b, p: (
        m.save(p / "m"), MoSE.load(m.model, p / "m"))),
    "no such layer": (r"no linear layer has the name \['nope'\]; there are", lambda m, b, p: MoSE(
        tiny(), MoSEConfig(targets=("q_proj", "nope")))),
    "no linear layer": (r"no linear layer has the name \['norm'\]", lambda m, b, p: MoSE(
        tiny(), MoSEConfig(targets=("norm",)))),
    "top_k above experts": ("top_k: got 5", lambda m, b, p: MoSEConfig(top_k=5)),
    "infinite weight": ("weights that are not finite: forget", lambda m, b, p: infinite(m)),
    "an empty checkpoint": ("its format is b''", lambda m, b, p: load(b"", p)),
    "text as checkpoint": ("its format is b'hellohe'", lambda m, b, p: load(b"hello" * 99, p)),
    "a checkpoint of before": ("expected b'MoSE 6.n'.*learn its tasks again", lambda m, b, p: load(
        b"MoSE 3\n" + b"hello" * 99, p)),
    "empty data file": ("can't be read as JSON", lambda m, b, p: from_text("", b, p)),
    "broken JSON": ("can't be read as JSON", lambda m, b, p: from_text("[{", b, p)),
    "not UTF-8": ("can't be read as JSON", lambda m, b, p: from_text(b"[\xff\xfe]", b, p)),
    "UTF-16": ("can't be read as JSON", lambda m, b, p: from_text(
        rows(("p", "a")).encode("utf-16"), b, p)),
    "an object, no list": ("got dict", lambda m, b, p: from_text("{}", b, p)),
    "an empty list": ("got an empty list", lambda m, b, p: from_text("[]", b, p)),
    "empty prompt": ("row 0", lambda m, b, p: from_text(rows(("", "a")), b, p)),
    "empty answer": ("row 1", lambda m, b, p: from_text(rows(("p", "a"), ("q", "")), b, p)),
    "answer above the limit": ("leaves no room", lambda m, b, p: from_text(
        rows(("p", "no " * 3000)), b, p)),
    "no such folder": ("FOMC/train.json: can't be read", lambda m, b, p: train_trace.load_tasks(
        Args(data="/nowhere", tasks="FOMC"), b[1], b[0])),
    "a task twice": ("each once", lambda m, b, p: train_trace.load_tasks(
        Args(tasks="FOMC,FOMC"), b[1], b[0])),
    "a task without metric": ("--metric", lambda m, b, p: train_trace.load_tasks(
        Args(tasks="mine"), b[1], b[0])),
    "no epoch": ("--epochs 0", lambda m, b, p: train_trace.load_tasks(
        Args(tasks="FOMC", epochs="0"), b[1], b[0])),
    "a lone surrogate": ("FOMC/train.json: row 1 has a lone surrogate", lambda m, b, p: from_text(
        rows(("p", "a"), ("half of \ud83d", "a")), b, p)),
    "epochs that do not fit": ("--epochs", lambda m, b, p: train_trace.load_tasks(
        Args(epochs="1,2,3"), b[1], b[0])),
    "unknown method": ("--methods", lambda m, b, p: parse("--methods", "sorcery")),
    "unknown flag": ("unrecognized", lambda m, b, p: parse("--sorcery")),
    "batch 0": ("--batch", lambda m, b, p: parse("--batch", "0")),
    "seed x": ("--seeds", lambda m, b, p: parse("--seeds", "x")),
    "lr x": ("invalid float", lambda m, b, p: parse("--lr", "x")),
    "ask without prompt": ("expected FILE and", lambda m, b, p: parse("--ask", "m.pt")),
    "ask with an empty prompt": ("the prompt is empty", lambda m, b, p: train_trace.main(
        Args(ask=[__file__, ""]))),
    "ask with a folder": ("expected the file of a run", lambda m, b, p: train_trace.main(
        Args(ask=[str(p), "x"]))),
    "a folder without a model": ("--model .*: can't be loaded", lambda m, b, p: (
        train_trace.load_model(Args(model=str(p), device="cpu")))),
    "an answer that the tokenizer drops": ("comes back .* as an empty text", lambda m, b, p: from_text(
        rows(("p", "a"), ("q", " ")), (b[0], stripping(b[1])), p)),
    "no eval.json": ("since --split eval asks for it", lambda m, b, p: from_text(
        rows(("p", "a")), b, p, split="eval")),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_gets_its_message_and_harms_no_task(what, base, tmp_path):
    mose = ready("a", "b")
    before = {name: logits(mose, name) for name in "ab"}
    message, call = MISTAKES[what]
    with pytest.raises(ValueError, match=message):
        call(mose, base, tmp_path)
    assert all(torch.equal(logits(mose, name), before[name]) for name in "ab")


@torch.no_grad()
def logits(mose, name, ids=IDS):
    with mose.task(name):
        return mose.model(ids).logits


class Int8Linear(torch.nn.Module):
    """A quantised layer as libraries have it: in_features, out_features, and no float weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("weight8", (linear.weight.detach() / self.scale).round().char())

    def forward(self, x):
        return x @ (self.weight8.float() * self.scale).T


def quantised(base, tmp_path, capsys):
    model = tiny()
    for block in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(block.self_attn, name, Int8Linear(getattr(block.self_attn, name)))
    bare = model(IDS).logits
    mose = MoSE(model)
    learn(mose, "a", steps=5)
    mose.end_task()
    assert not torch.equal(logits(mose, "a"), bare)
    mose.detach()
    assert torch.equal(model(IDS).logits, bare)


def tied(base, tmp_path, capsys):
    model, _ = base
    before = model.lm_head.weight.detach().clone()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    mose = MoSE(model)
    learn(mose, "a")
    mose.detach()
    assert torch.equal(model.lm_head.weight, before)


def million_characters(base, tmp_path, capsys):
    task, = from_text(rows(("word " * 200_000, "a"), ("q", "a")), base, tmp_path)
    for ids, _ in task.train:
        assert len(ids) <= task.limit + task.max_new
    assert len(train_trace.generate(*base, task, [0, 1], Args(device="cpu"))) == 2


def rows_of_train_in_test(base, tmp_path, capsys):
    from_text(rows(("p", "a"), ("q", "b")), base, tmp_path)
    assert "2 of 2 test prompts stand in train too" in capsys.readouterr().out


def no_bos(base, tmp_path, capsys):
    prompt, answer = encode(without(base, "bos_token"), {"prompt": "p", "answer": "a"})
    assert prompt == encode(base[1], {"prompt": "p", "answer": "a"})[0][1:]


def saved_base(base, tmp_path, token):
    base[0].save_pretrained(tmp_path)
    without(base, token).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items()
                                if k != token}))
    return Args(model=str(tmp_path), device="cpu")


def no_pad(base, tmp_path, capsys):
    _, tokenizer = train_trace.load_model(saved_base(base, tmp_path, "pad_token"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def no_eos(base, tmp_path, capsys):
    with pytest.raises(ValueError, match="has no EOS, so answers would never end"):
        train_trace.load_model(saved_base(base, tmp_path, "eos_token"))


def one_example(base, tmp_path, capsys):
    task, = from_text(rows(("p", "a")), base, tmp_path)
    args = Args(epochs="1")
    record = train_trace.Record(tmp_path, "mose", [task], args)
    train_trace.learn_in_a_row(record, *base, [task], tqdm(disable=True))
    assert record.result["new"][0] > 0


def any_script(base, tmp_path, capsys):
    words = ("立场", "für Straße", "def f():\n\t", "\u202eabc", "🙂" * 50)
    texts = [(f"{word} ?", word) for word in words]
    task, = from_text(rows(*texts), base, tmp_path)
    answers = [[label for label in labels if label != -100] for _, labels in task.train]
    assert [base[1].decode(a[:-1]) for a in answers] == [a for _, a in texts]


def one_target_as_text(base, tmp_path, capsys):
    mose = MoSE(tiny(), MoSEConfig(targets="q_proj"))
    assert mose.config.targets == ("q_proj",) and len(mose.layers) == 2


def one_entry_that_others_read(base, tmp_path, capsys):
    """Of the forgotten "a" one entry of A is left, since "b" reads it."""
    mose = ready("a", targets="layers.0.self_attn.q_proj", num_experts=1, rank=1, top_k=1,
                 density=0.04)
    mose.begin_task("b"), mose.observe(IDS), mose.end_task()
    mose.forget("a")
    assert [int((mose.layers[0].owner == number).sum()) for number in (1, 2)] == [1, 2]
    mose.save(tmp_path / "m")
    again = MoSE.load(tiny(), tmp_path / "m")
    assert torch.equal(again.layers[0].owner, mose.layers[0].owner)
    assert torch.equal(again.layers[0].frozen, mose.layers[0].frozen)


def two_devices(base, tmp_path, capsys):
    """The second half of the layers on another device: here meta, the only other one at hand."""
    model = tiny()
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match="part of the base is offloaded"):
        MoSE(model)


def no_example_of_a_task(base, tmp_path, capsys):
    mose = MoSE(tiny())
    mose.begin_task("a")
    mose.end_task()  # after zero steps
    assert mose.capacity()["a"]["new"] > 0 and torch.equal(logits(mose, "a"), logits(mose, None))


ODD_INPUTS = {f.__name__: f for f in (
    quantised, tied, million_characters, rows_of_train_in_test, no_bos, no_pad, no_eos,
    one_example, any_script, one_target_as_text, one_entry_that_others_read, two_devices,
    no_example_of_a_task)}


@pytest.mark.parametrize("what", ODD_INPUTS)
def test_an_odd_input_gets_the_right_result(what, base, tmp_path, capsys):
    ODD_INPUTS[what](base, tmp_path, capsys)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_or_gradient_that_is_not_finite_costs_the_open_task_alone(bad):
    mose = ready("a")
    before = logits(mose, "a")
    mose.begin_task("b")
    optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=0.1)
    (mose.model(input_ids=IDS, labels=IDS).loss * bad).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="'b' has weights that are not finite: forget"):
        mose.end_task()
    mose.forget("b")
    learn(mose, "b")
    mose.end_task()
    assert torch.equal(logits(mose, "a"), before) and logits(mose, "b").isfinite().all()


# ------------------------------------------------------------------------------ properties


def test_no_order_of_calls_changes_a_learned_task():
    explored, steps = reliability.sequences(12, length=8)
    assert explored >= 12 and steps > 50


def test_the_search_over_orders_finds_a_fault(monkeypatch):
    """Control: used entries that go on being overwritten."""
    finish = SubExperts.finish
    monkeypatch.setattr(SubExperts, "finish", lambda layer, *given: (
        finish(layer, *given), setattr(layer, "frozen", layer.weight.detach())))
    with pytest.raises(AssertionError):
        reliability.sequences(12, length=8, phases=[reliability.hypothesis.Phase.generate])


# ------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_huge_gates_and_equal_scores_give_no_nan(dtype):
    mose = MoSE(tiny().to(dtype), MoSEConfig(top_k=2))
    learn(mose, "a")
    for layer in mose.layers:
        layer.router.data.fill_(3e4)
        layer.router.data[0] = -3e4
        layer.score.data.fill_(0.5)
    assert all(int(layer.select().sum()) == sum(layer.num_new) > 0 for layer in mose.layers)
    mose.end_task()
    assert logits(mose, "a").isfinite().all()


def test_a_pool_with_one_free_entry_goes_on_and_a_full_one_says_so():
    mose = ready("a", density=1.0, num_experts=1, rank=1, top_k=1)
    assert mose.capacity()["a"]["share"] == 1.0
    with pytest.raises(ValueError, match="gets no entry"):
        mose.begin_task("b")
    for layer in mose.layers:  # one free entry left, of B
        layer.owner[-1] = 0
    mose.begin_task("b")
    for layer in mose.layers:
        assert sum(layer.num_new) == 1 and layer.select().nonzero().tolist() == [
            [len(layer.owner) - 1]]


def test_exactly_k_of_any_scores():
    for score in (torch.zeros(50), torch.full((50,), float("-inf")), torch.randn(50)):
        assert [int(top_k_mask(score, k).sum()) for k in (0, 1, 49, 50)] == [0, 1, 49, 50]


# ------------------------------------------------------------------------------ long runs


def held(mose):
    """Bytes of all tensors that can be reached from it, each storage once, and of task records."""
    seen = {}
    tensors = [t for layer in mose.layers for t in [*layer.parameters(), *layer.buffers()]]
    tensors += [t for layer in mose.layers for _, pair in layer.in_force for t in pair]
    tensors += [mose.keys.pooled, *(mean for _, mean, *_ in mose.keys.tasks.values())]
    for t in tensors:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    records = [t for layer in mose.layers for t in layer.routers.values()]
    return sum(seen.values()), sum(t.nbytes for t in records)


def test_memory_stays_flat_over_a_hundred_tasks(monkeypatch):
    monkeypatch.setattr(MoSE, "best_source", lambda mose, probe: (  # as if it probed them all
        ([*mose.tasks][-1], 0.5) if mose.tasks else (None, 1.0)))
    mose = MoSE(tiny())
    sizes, tensors = [], []
    for i in range(100):
        learn(mose, f"{i}", steps=1)
        mose.end_task()
        if i in (19, 99):
            gc.collect()
            sizes.append(held(mose))
            tensors.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    pool, records = zip(*sizes)
    keys = 80 * len(mose.keys.pooled) * 4
    assert pool[1] - pool[0] <= keys + 80 * 64  # a key for each task, and nothing else
    assert records[1] == 5 * records[0]
    assert tensors[1] - tensors[0] <= 80 * (1 + len(mose.layers)) + 10


def test_a_thousand_times_on_and_off_leaves_no_hook(monkeypatch):
    monkeypatch.setattr(module, "fingerprint", lambda model: {})  # for speed
    model = tiny()

    def count():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = count()
    for _ in range(1000):
        mose = MoSE(model, MoSEConfig(num_experts=1, rank=1, top_k=1))
        assert count() > before
        mose.detach()
    assert count() == before and not any(isinstance(m, SubExperts) for m in model.modules())
