"""Numbers, edges and orders of calls that test_mose.py leaves out. When a test was added, it noticed
a change of one line of mose.py that no other test did."""

import dataclasses
import math
import os

import pytest
import torch

from mose import MoSE, MoSEConfig, TaskKeys
from test_mose import (
    TEMPLATE, adam, attach, data, guard, interrupt, learn, refuses, reloaded, snapshot, step, tiny)


def recognising(**prompts):
    """A MoSE that has a key of each of these tasks, {name: prompts}, and has learned nothing."""
    mose = attach()
    for name, its_prompts in prompts.items():
        mose.begin_task(name)
        mose.observe(its_prompts)
        mose.end_task()
    return mose


def test_a_new_task_starts_from_an_a_and_a_router_of_the_promised_spread():
    mose = attach(router_std=2.0)
    mose.begin_task("a")
    for layer in mose.layers:
        A, B = layer.split(layer.weight * math.sqrt(32))  # now uniform in -1 .. 1
        assert not B.any() and A.abs().max() <= 1 and A.mean().abs() < 0.1
        assert A.min() < -0.99 and A.max() > 0.99
        x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
        logits = x @ layer.projection @ layer.router.T  # they vary by router_std * sqrt(router_dim)
        assert 0.6 < logits.std() / (2.0 * math.sqrt(16)) < 1.4


def test_the_fixed_projections_are_those_that_saved_files_rely_on():
    mose, signs = attach(), torch.tensor([1.0, -1.0, -1.0, 1.0])
    for layer in mose.layers:
        assert torch.allclose(layer.projection[0, :4], signs / math.sqrt(32))
    assert torch.equal(mose.keys.projection[0, :4], signs)


def test_a_task_that_can_not_be_put_in_force_leaves_all_layers_with_the_one_before(monkeypatch):
    mose = learn(attach(), *"ab")
    mose.set_task("a")
    before = mose.model(data("a")).logits
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mose.layers[-1], "finished_matrices", interrupt)
        mose.set_task("b")
    assert mose.active == "a" and torch.equal(mose.model(data("a")).logits, before)
    mose.set_task("b")
    assert not torch.equal(mose.model(data("a")).logits, before)  # control


def test_at_the_edges_of_the_rule_no_source_is_chosen():
    mose = learn(attach(), "a")
    assert mose.best_source(lambda: 0.0) == (None, 1.0)  # the base makes no error: 0 / 0
    assert mose.best_source(lambda: 0.75 if mose.active else 1.0) == (None, 1.0)
    assert mose.best_source(lambda: 0.0 if mose.active else 1.0) == ("a", 0.0)  # control


def test_a_key_never_outlives_its_task(monkeypatch, tmp_path):
    class Interrupting(dict):
        pop = interrupt

    mose = learn(attach(), *"ab")
    tasks = mose.tasks
    mose.tasks = Interrupting(tasks)
    with pytest.raises(KeyboardInterrupt):
        mose.forget("b")
    mose.tasks = tasks
    assert {*mose.keys.tasks} == {"a"}
    # `load` refuses a file with a key without its task.
    assert [*reloaded(mose, tmp_path / "m").tasks] == [*"ab"]


def test_a_layer_too_narrow_for_an_entry_of_b_gets_none_of_a():
    model = tiny()
    model.narrow = torch.nn.Linear(32, 1)  # 1 % of the 64 entries of its B is none
    mose = MoSE(model, MoSEConfig(("q_proj", "narrow")))
    with pytest.warns(UserWarning, match="no key"):
        learn_nothing(mose, "a")
        learn_nothing(mose, "b", source="a")  # the source has no B there either
    *wide, narrow = mose.layers
    assert not narrow.owner.any() and all((layer.owner == 2).any() for layer in wide)


def learn_nothing(mose, name, source=None, need=1.0):
    mose.begin_task(name, source, need)
    return mose.end_task()


@pytest.mark.filterwarnings("ignore:task .* has no key")
def test_a_layer_in_which_the_source_owns_nothing_learns_from_a_random_a():
    model = tiny()
    model.large = torch.nn.Linear(64, 64)
    mose = MoSE(model, MoSEConfig(("q_proj", "large"), density=0.02, rank=1))
    small, *_, large = mose.layers
    learn_nothing(mose, "a", need=0.25)  # 0.5 % of 128 and of 256 entries of A, rounded down
    assert not small.owner.any() and large.owner.any()
    before = snapshot(mose, "a")
    mose.begin_task("b", "a")
    assert torch.equal(snapshot(mose, "b"), before)  # it starts as its source all the same
    A, B = small.split(small.weight)
    assert A.any() and not B.any()
    A, _ = large.split(large.weight)
    assert not A.any()  # control: here the source has an A, which can be learned with


def test_a_probe_makes_no_graph():
    mose, grad = learn(attach(), "a"), []
    mose.best_source(lambda: grad.append(torch.is_grad_enabled()) or 1.0)
    assert grad == [False, False] and torch.is_grad_enabled()


def test_prompts_count_for_the_task_that_is_named_though_another_is_open():
    mose = learn(attach(), "a")  # with 64 prompts
    mose.begin_task("b")
    mose.observe(data("b", 4))
    mose.observe(data("more a", 5), task="a")
    mose.observe(data("more b", 6), task="b")
    assert (mose.keys.tasks["a"][0], mose.open_sums["count"]) == (64 + 5, 4 + 6)


def test_a_task_whose_end_was_interrupted_late_can_be_forgotten(monkeypatch):
    mose = learn(attach(), "a", end=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mose, "_close", interrupt)
        mose.end_task()
    assert mose.open == "a" and [*mose.tasks] == ["a"]  # control: it is both, open and finished
    assert mose.active is None  # so the bare base is in force
    mose.forget("a")
    assert mose.open is None and not mose.tasks
    assert not any(layer.owner.any() for layer in mose.layers)


def test_a_forget_that_was_interrupted_leaves_no_layer_open(monkeypatch):
    mose = learn(attach(), "a")
    mose.begin_task("b")
    assert any("sub_experts" in key for key in mose.model.state_dict())  # control: "b" is open
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mose.layers[0], "clear", interrupt)
        mose.forget("b")
    assert not any("sub_experts" in key for key in mose.model.state_dict())


def test_a_file_is_right_after_a_forget_that_was_interrupted_late(monkeypatch, tmp_path):
    mose = learn(attach(), *"abc")  # end_task() has compressed the entries of each
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mose, "_counts", interrupt)
        mose.forget("b")
    for one, two in zip(mose.layers, reloaded(mose, tmp_path / "m").layers):
        assert torch.equal(one.owner, two.owner) and torch.equal(one.frozen, two.frozen)


def test_a_second_detach_is_refused_so_it_can_not_free_the_base_of_the_next_mose():
    model = tiny()
    first = MoSE(model)
    first.detach()
    assert model.lm_head.weight.requires_grad  # control
    MoSE(model)
    refuses("is detached already", first.detach)
    assert not model.lm_head.weight.requires_grad


def test_no_task_can_be_renamed_to_the_open_one():
    mose = learn(attach(), "a")
    mose.begin_task("c")
    refuses("there is a task 'c' already", mose.rename, "a", "c")


@pytest.mark.parametrize("part", ["weight", "score", "router"])
def test_any_number_that_is_not_finite_is_seen(part):
    mose = learn(attach(), "a", end=False)
    getattr(mose.layers[1], part).data.view(-1)[0] = math.inf
    refuses("'a' has weights that are not finite", mose.end_task)


def test_the_whole_file_is_on_the_disk_before_it_takes_the_place_of_the_old(monkeypatch, tmp_path):
    mose, path, seen = learn(attach(), "a"), tmp_path / "m", []
    # A buffer that holds the whole file: without flush() nothing of it is written at fsync().
    monkeypatch.setattr("mose.open", lambda file, mode: open(file, mode, 2**20), raising=False)
    monkeypatch.setattr("mose.os.fsync",
                        lambda file: seen.append((os.fstat(file).st_size, path.exists())))
    mose.save(path)
    assert seen == [(path.stat().st_size, False)]


def test_who_saves_finds_tasks_as_surely_as_who_loads(guard, monkeypatch, tmp_path):
    mose, path = learn(attach(), *"ab"), tmp_path / "m"
    with monkeypatch.context() as patch:
        # Off: the object keeps what it had, and the file the rounded covariance.
        guard or patch.setattr(TaskKeys, "restore", lambda *given: None)
        mose.save(path)
    sure = [each.infer_task(data("new a"), return_confidence=True)
            for each in (mose, MoSE.load(tiny(), path))]
    assert (sure[0] == sure[1]) == guard


def test_a_task_may_begin_in_inference_mode(guard, monkeypatch):
    # Off: its sums can't be changed outside of that mode.
    guard or monkeypatch.setattr(TaskKeys, "new_sums", TaskKeys.new_sums.__wrapped__)
    mose = attach()
    with torch.inference_mode():
        mose.begin_task("a")
    if not guard:
        with pytest.raises(RuntimeError, match="[Ii]nference"):
            mose.observe(data("a"))
        return
    mose.observe(data("a"))
    step(mose.model, adam(mose), data("a"))
    mose.end_task()
    assert mose.infer_task(data("a")) == [*"aaaa"]


@pytest.mark.filterwarnings("ignore:task .* has no key")
def test_tasks_without_any_key_can_be_saved(tmp_path):
    mose = attach()
    mose.begin_task("a")
    mose.end_task()
    again = reloaded(mose, tmp_path / "m")
    again.observe(data("a"), task="a")
    assert again.infer_task(data("a")) == [*"aaaa"]


def test_a_task_counts_in_the_covariance_by_the_root_of_its_variance():
    def pooled(scale):
        mose = attach()
        mose.model.get_input_embeddings().weight.data *= scale
        return learn(mose, "a").keys.pooled

    # The scatter grows by 4^2, and the root of the variance by 4.
    assert torch.allclose(pooled(4.0), 4.0 * pooled(1.0), rtol=1e-4)


def test_distances_do_not_depend_on_how_much_the_covariance_is_shrunk(monkeypatch):
    mose, sure = recognising(a=data("a", 4), b=data("b", 4)), []
    for shrinkage in (1e3, 1e6):  # with both it is the identity
        monkeypatch.setattr(TaskKeys, "SHRINKAGE", shrinkage)
        sure.append(torch.tensor(mose.infer_task(data("new c"), return_confidence=True)[1]))
    assert torch.allclose(*sure, rtol=0.05, atol=1e-3)
    assert sure[0].min() < 0.01  # (with distances that shrink as well, all would be sure)


def test_a_few_prompts_are_enough_to_be_sure(guard, monkeypatch):
    # Off: the covariance of five prompts is taken as it is.
    guard or monkeypatch.setattr(TaskKeys, "SHRINKAGE", 0.0)
    mose = recognising(**{name: data(name, 5) for name in "abc"})
    prompts = torch.cat([data(f"new {name}", 20) for name in "abc"])
    _, sure = mose.infer_task(prompts, return_confidence=True)
    assert (sum(s > 0.5 for s in sure) > 30) == guard  # of 60


def test_between_two_tasks_that_are_alike_nothing_is_sure():
    alike, apart = (learn(attach(), *names) for names in (("a", "more a"), "ab"))
    means = [sum(mose.infer_task(data("new a", 20), return_confidence=True)[1]) / 20
             for mose in (alike, apart)]
    assert 0.5 < means[0] < 0.85 and means[1] > 0.95  # control: two that are not alike


def test_prompts_that_come_in_portions_make_the_same_common_tokens():
    common = []
    whole = data("a", 64, 60)
    for portions in ([whole], whole.split(16)):
        mose = recognising(a=portions[0])
        for more in portions[1:]:
            mose.observe(more, task="a")
        common.append(mose.keys.tasks["a"][-1])
    assert {*common[0]} == {*common[1]} == {*range(8, 16)}
    assert all(math.isclose(common[0][token], common[1][token], rel_tol=1e-4)
               for token in common[0])


def test_a_token_is_common_if_19_of_20_prompts_hold_it():
    for held, common in ((19, {60}), (18, set())):
        mose = recognising(a=torch.tensor([[60]] * held + [[1]] * (20 - held)))
        assert {*mose.keys.tasks["a"][-1]} == common


def test_one_task_alone_shares_nothing():
    mose = recognising(a=torch.cat([TEMPLATE, data("a", 64)], dim=1))
    assert mose.keys.tasks["a"][-1] and mose.keys.shared_tokens().tolist() == []


@pytest.mark.filterwarnings("ignore:task .* has no key")
def test_the_covariance_counts_with_the_first_task_that_has_a_key():
    mose = attach()
    mose.begin_task("without key")
    mose.end_task()
    learn(mose, *"ab")
    size = {name: entry["bytes"]["keys"] for name, entry in mose.capacity().items()}
    assert size["without key"] == 0
    assert size["a"] - size["b"] == 2 * 32 * 33 // 2  # a triangle in bf16
    mose.forget("a")
    assert mose.capacity()["b"]["bytes"]["keys"] == size["a"]


def test_the_router_of_a_finished_task_is_brought_to_its_layer():
    layer, asked = learn(attach(), "a").layers[0], []
    router = layer.routers[1]

    class Elsewhere:  # on the CPU, while the layer is on a GPU
        def to(self, device):
            asked.append(device)
            return router

    layer.routers[1] = Elsewhere()
    layer.finished_matrices([1])
    assert asked == [layer.frozen.device]


def test_a_config_is_of_the_right_type_and_can_not_change():
    refuses("rank: got True", lambda: MoSEConfig(rank=True))
    for config in ({}, 0, "q_proj"):
        refuses("config: got .*, expected a MoSEConfig", MoSE, tiny(), config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoSEConfig().rank = 2


def test_prompts_that_say_nothing_are_refused():
    mose = learn(attach(), "a")
    for call in (mose.infer_task, lambda ids: mose.observe(ids, task="a")):
        refuses("got no prompts", call, data("a")[:0])
    mose.model.get_input_embeddings().weight.data[63] = math.inf
    refuses("mean embedding of a prompt is not finite", mose.infer_task, torch.tensor([[63, 9]]))
