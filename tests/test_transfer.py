"""A new task may start from a related one: where it starts, whom it chooses, what it takes."""

from types import SimpleNamespace

import pytest
import torch

import train_trace
from benchmarks import transfer
from test_mose import attach, data, learn, reloaded, snapshot, step, tiny
from tracebench.options import Args


def left(mose, **shares):
    """A probe: what is left to learn under each task, 1.0 where nothing is said."""
    return lambda: shares.get(mose.active, 1.0)


def begin(mose, name, **shares):
    """Open a task as the loop does; returns the task that it starts from."""
    source, need = mose.best_source(left(mose, **shares))
    mose.begin_task(name, source, need)
    return source


def test_a_task_with_a_source_starts_as_that_task_bit_for_bit():
    mose = learn(attach(), "a", "b")
    assert begin(mose, "c", a=0.5) == "a"
    assert torch.equal(snapshot(mose, "c"), snapshot(mose, "a"))
    assert not torch.equal(snapshot(mose, "c"), snapshot(mose, None))
    mose.forget("c")
    assert begin(mose, "c") is None  # control: where no task helps, it starts as the bare base
    assert torch.equal(snapshot(mose, "c"), snapshot(mose, None))


@pytest.mark.parametrize("shares, source", [
    ({"a": 0.5, "b": 0.4}, "b"), ({"a": 0.1, "b": 0.4}, "a"), ({"a": 0.74}, "a"),
    ({"a": 0.76}, None), ({}, None), ({"a": 2.0}, None)])
def test_the_source_leaves_least_to_learn_and_well_below_the_base(shares, source):
    mose = learn(attach(), "a", "b")
    assert begin(mose, "c", **shares) == source


def test_new_entries_are_as_many_as_what_is_left_asks_for():
    new = {}
    for share in (1.0, 0.5, 0.1, 0.0):
        mose = learn(attach(), "a")
        free = [int((part == 0).sum()) for layer in mose.layers
                for part in layer.split(layer.owner)]
        begin(mose, "b", a=share)
        new[share] = mose.end_task()["new"]
        need = share if share < 0.75 else 1.0
        assert new[share] == sum(int(need * mose.config.density * n) for n in free)
    assert new[0.0] == 0 < new[0.1] < new[0.5] < new[1.0]


def test_what_is_inherited_is_read_and_never_written():
    mose = learn(attach(), "a")
    before = snapshot(mose, "a")
    begin(mose, "b", a=0.5)
    inherited = [layer.owner == 1 for layer in mose.layers]
    learn_on(mose)
    for layer, mask in zip(mose.layers, inherited):
        assert torch.equal(layer.inherited, mask)  # all of it, whatever the gradient
        assert not (layer.select() & mask).any()
    mose.end_task()
    assert torch.equal(snapshot(mose, "a"), before)
    assert not torch.equal(snapshot(mose, "b"), before), "control: it did learn"


def learn_on(mose, steps=5):
    optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        step(mose.model, optimizer, data("c"))


def test_a_task_outlives_its_source(tmp_path):
    mose = learn(attach(), "a")
    begin(mose, "b", a=0.5)
    learn_on(mose)
    mose.end_task()
    before = snapshot(mose, "b")
    mose.forget("a")
    assert torch.equal(snapshot(mose, "b"), before)
    assert torch.equal(snapshot(reloaded(mose, tmp_path / "m"), "b"), before)


def test_a_probe_that_fails_leaves_everything_as_it_was():
    mose = learn(attach(), "a", "b")
    with pytest.raises(ZeroDivisionError):
        mose.best_source(lambda: 1 / 0)
    assert mose.open is None and mose.active == "b" and [*mose.tasks] == ["a", "b"]


def test_the_probe_counts_answers_that_are_not_right_in_every_token(monkeypatch):
    labels = torch.tensor([5, 2, 6, 2, 7, 2])  # three answers of two tokens
    example = torch.tensor([0, 0, 1, 1, 2, 2])
    guess = torch.tensor([5, 2, 9, 2, 9, 9])  # the first is right, the others are not
    logits = torch.nn.functional.one_hot(guess, 10).float()
    monkeypatch.setattr(train_trace, "answer_logits", lambda *given: (logits, labels, example))
    model, tokenizer = train_trace.load_model(Args(device="cpu"))
    args = Args(tasks="FOMC", max_train=3)
    task, = train_trace.load_tasks(args, tokenizer, model)
    assert train_trace.probe(model, tokenizer, task, args) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", [*transfer.EARLY, *transfer.RELATED, *transfer.CONTROLS])
def test_the_benchmark_loads_each_of_its_tasks(name):
    args, *base = transfer.setup(seed=0)
    task = transfer.load(args, *base, name, size=50, called="other")
    assert (task.name, len(task.train), task.epochs) == ("other", 50, 25)


@pytest.mark.parametrize("errors, guess, best", [
    ([0.5, 0.4, 0.9, 0.9, 1.0], 1.0, "FOMC"), ([0.8, 0.8, 0.8, 0.8, 1.0], 1.0, None),
    ([0.5, 0.4, 0.9, 0.9, 1.0], 0.5, None), ([0.5, 0.3, 0.9, 0.9, 1.0], 0.5, "FOMC")])
def test_the_lora_that_continues_is_chosen_by_the_rule_of_best_source(
        errors, guess, best, tmp_path, monkeypatch):
    """The errors are those of the four earlier LoRAs, and of the base."""
    for name in transfer.EARLY:
        lora = train_trace.attach("lora", Args(), tiny())
        lora.begin_task(name)
        lora.end_task()
        lora.save(tmp_path / f"{name}.pt")
    monkeypatch.setattr(train_trace, "probe", lambda *given, left=iter(errors): next(left))
    task = SimpleNamespace(error_of_a_constant=lambda: guess)
    lora = transfer.best_lora((tiny(), None), task, Args(), tmp_path)
    assert [*lora.tasks] == ([best] if best else [])
