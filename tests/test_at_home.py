"""At home in other people's code: casts, beams, state_dict, inference mode, threads, odd bases."""

import contextlib
import copy
import sys
import threading

import pytest
import torch

import mose as own
from mose import MoSE, MoSEConfig, SubExperts, TaskKeys, fixed_signs
from test_mose import (  # noqa: F401
    attach, checkpoint, data, guard, learn, refuses, snapshot, step, tiny)

# ------------------------------------------------------------------------------ casts and devices


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(),
                                  lambda m: m.to("cpu", torch.float16)])
def test_a_cast_of_the_model_never_changes_the_adapter(cast, guard, monkeypatch, tmp_path):
    # Off: the cast reaches the pool, and rounds what the finished task reads.
    guard or monkeypatch.setattr(SubExperts, "_apply", torch.nn.Module._apply)
    mose = learn(attach(), "a")
    before = copy.deepcopy([[*layer.parameters(), *layer.buffers()] for layer in mose.layers])
    cast(mose.model)
    same = [torch.equal(old.float(), new.float()) for tensors, layer in zip(before, mose.layers)
            for old, new in zip(tensors, [*layer.parameters(), *layer.buffers()])]
    assert all(same) == guard
    if guard:
        assert mose.layers[0].frozen.dtype == torch.float32
        snapshot(mose, "a"), learn(mose, "b"), mose.save(tmp_path / "m")
        assert [*MoSE.load(tiny(), tmp_path / "m").tasks] == ["a", "b"]


def test_a_task_in_force_follows_its_layer_to_another_device(guard, monkeypatch):
    # Off: the move reaches Parameters and buffers alone.
    guard or monkeypatch.setattr(SubExperts, "_apply", torch.nn.Module._apply)
    mose = learn(attach(), *"ab")
    mose.set_task(["a", "b", "a"])
    mose.model.to("meta")
    for layer in mose.layers:
        tensors = [tensor for rows, pair in layer.in_force for tensor in (rows, *pair)]
        assert len(tensors) == 6 and {x.device.type for x in tensors} == {"meta" if guard else "cpu"}
        assert {x.device.type for x in layer.buffers()} == {"meta"}


# ------------------------------------------------------------------------------ generate


@pytest.mark.parametrize("options, times", [
    ({"num_beams": 3}, 3), ({"num_beams": 2, "num_return_sequences": 2}, 2),
    ({"do_sample": True, "num_return_sequences": 4}, 4)])
def test_each_example_keeps_its_task_through_beams_and_several_answers(options, times):
    mose, ids = learn(attach("grouped"), *"ab"), data("c", 2)
    mose.model.generation_config.pad_token_id = 0

    def generate(task, ids):
        torch.manual_seed(0)
        with mose.task(task):
            return mose.model.generate(ids, max_new_tokens=6, **options)

    alone = [generate(task, ids[i:i + 1]) for i, task in enumerate("ba")]
    mixed = generate(["b"] * times + ["a"] * times, ids).chunk(2)
    if "do_sample" not in options:  # a sample of two examples draws other numbers than of one
        assert all(map(torch.equal, mixed, alone))
        assert not torch.equal(generate("a", ids).chunk(2)[0], alone[0])  # control: another task
    # A name for each example is not enough, though the number of rows is a multiple of it: four new
    # prompts would get the tasks of two.
    refuses(r"a list of 2 tasks.*beams and for several answers: repeat its name as often",
            generate, ["b", "a"], ids)
    refuses(f"a list of {2 * times} tasks", generate, ["b"] * times + ["a"] * times, ids[:1])


def test_a_mixed_batch_costs_by_distinct_task():
    mose, names = learn(attach(), *"ab"), ["a", "b"] * 50

    def held(task):
        mose.set_task(task)
        sizes = {}  # of each storage once
        for layer in mose.layers:
            for _, matrices in layer.in_force:
                for tensor in matrices:
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
        return sum(sizes.values())

    assert held(names) <= 1.2 * (held("a") + held("b"))
    assert held([*names, None]) == held(["a", "b"]) > 1.2 * held("a")  # control: two, not one


# ------------------------------------------------------------------------------ state and modes


def test_state_dict_is_the_base_alone_and_the_open_task_while_one_is_open(guard, monkeypatch):
    if not guard:  # off: SubExperts are saved like any module
        monkeypatch.setattr(SubExperts, "_save_to_state_dict",
                            torch.nn.Module._save_to_state_dict)
    mose, base = attach(), {*tiny().state_dict()}
    for name in ("a", "b"):
        assert ({*mose.model.state_dict()} == base) == guard
        mose.begin_task(name)
        more = {*mose.model.state_dict()} - base
        places = [f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in ("q_proj", "v_proj")]
        assert more == {f"{place}.sub_experts.{own}" for place in places
                        for own in ("weight", "score", "router")}
        mose.observe(data(name)), mose.end_task()
    assert ({*mose.model.state_dict()} == base) == guard
    mose.begin_task("c"), mose.forget("c")
    assert ({*mose.model.state_dict()} == base) == guard


def test_what_state_dict_gives_can_be_put_back():
    mose = learn(learn(attach(), "a"), "b", end=False)
    state = copy.deepcopy(mose.model.state_dict())
    before = snapshot(mose, "b")
    step(mose.model, torch.optim.AdamW(mose.trainable_parameters(), lr=0.1), data("b"))
    assert not torch.equal(snapshot(mose, "b"), before)
    assert mose.model.load_state_dict(state) == torch.nn.modules.module._IncompatibleKeys([], [])
    assert torch.equal(snapshot(mose, "b"), before)


def test_a_state_dict_with_a_task_is_refused_while_none_is_open(guard, monkeypatch):
    if not guard:  # off: it is passed over, and training would start anew without a word
        monkeypatch.setattr(
            SubExperts, "_load_from_state_dict", lambda layer, *args:
            layer.number and torch.nn.Module._load_from_state_dict(layer, *args))
    state = learn(attach(), "a", end=False).model.state_dict()
    mose = attach()
    if guard:
        with pytest.raises(RuntimeError, match="Unexpected key.*q_proj.sub_experts.weight"):
            mose.model.load_state_dict(state)
    else:
        mose.model.load_state_dict(state)
    mose.begin_task("a")
    mose.model.load_state_dict(state)
    learned = state["model.layers.0.self_attn.q_proj.sub_experts.weight"]
    assert torch.equal(mose.layers[0].weight, learned)


def test_an_older_state_dict_does_not_undo_a_finished_task(guard, monkeypatch):
    if not guard:  # off: what finished tasks read is part of it
        register = SubExperts.register_buffer
        monkeypatch.setattr(SubExperts, "register_buffer",
                            lambda layer, name, x, **_: register(layer, name, x))
    mose = learn(attach(), "a", end=False)
    state = copy.deepcopy(mose.model.state_dict())
    mose.end_task()
    before = snapshot(mose, "a")
    mose.begin_task("b")
    mose.model.load_state_dict(state)
    mose.forget("b")
    assert torch.equal(snapshot(mose, "a"), before) == guard


class ReadsWeight(torch.nn.Module):
    """A layer that has a linear one. It calls that, or reads its weight without calling it."""

    def __init__(self, linear, calls):
        super().__init__()
        self.inner, self.calls = linear, calls

    def forward(self, x):
        if self.calls:
            return self.inner(x)
        return torch.nn.functional.linear(x, self.inner.weight)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("calls", [True, False])
def test_a_target_that_is_never_called_is_warned_of(calls):
    model = tiny()
    mlp = model.model.layers[1].mlp
    mlp.down_proj = ReadsWeight(mlp.down_proj, calls)
    mose = MoSE(model, MoSEConfig(targets=("q_proj", "inner")))
    learn(mose, "a", end=False)
    if calls:
        mose.end_task()
    else:
        with pytest.warns(UserWarning, match=r"1 in all: \['model.layers.1.mlp.down_proj.inner'\]"):
            mose.end_task()


@pytest.mark.filterwarnings("error")
def test_a_layer_that_gets_no_entry_of_a_is_not_warned_of(guard, monkeypatch):
    guard or monkeypatch.setattr(SubExperts, "gets_new_B", lambda layer: True)
    mose = attach()
    mose.begin_task("a"), mose.observe(data("a"))
    mose.layers[0].num_new = [0, 0]  # as in a narrow layer at a low density
    mose.model(data("a"), labels=data("a")).loss.backward()
    torch.optim.AdamW(mose.trainable_parameters(), lr=0.01).step()
    if guard:
        mose.end_task()
    else:
        with pytest.warns(UserWarning, match="1 in all"):
            mose.end_task()


@pytest.mark.parametrize("in_force", [True, False])
def test_a_task_that_was_trained_while_another_was_in_force_is_warned_of(in_force, recwarn):
    mose = learn(attach(), "a")
    mose.begin_task("b")
    mose.observe(data("b"))
    optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=0.03)
    if not in_force:
        mose.set_task("a")
    checkpoint(mose.model, False)  # it gives the inputs a gradient, so backward() finds one
    step(mose.model, optimizer, data("b"))
    mose.end_task()
    said = [str(warning.message) for warning in recwarn]
    assert any("has to be in force while it is trained" in text for text in said) == (not in_force)


def test_the_base_has_to_stay_frozen(guard, monkeypatch):
    # Off: a base that somebody has set free is trained too, and a finished task changes.
    guard or monkeypatch.setattr("mose.check_base_is_frozen", lambda model, layers: None)
    mose = learn(attach(), "a")
    before = snapshot(mose, "a")
    mose.begin_task("b")
    mose.model.lm_head.requires_grad_(True)

    def train():
        mose.trainable_parameters()
        free = [p for p in mose.model.parameters() if p.requires_grad]
        step(mose.model, torch.optim.AdamW(free, lr=0.03), data("b"))

    if guard:
        refuses(r"1 of its parameters require a gradient: \['lm_head.weight'\]", train)
        refuses("has to stay frozen", mose.end_task)
        mose.forget("b")
        refuses("has to stay frozen", mose.begin_task, "b")
    else:
        train()
        mose.forget("b")
    assert torch.equal(snapshot(mose, "a"), before) == guard


@pytest.mark.parametrize("broken", ["begin", "gets_new_B"])
def test_a_task_that_could_not_begin_leaves_no_trace(broken, monkeypatch):
    mose = learn(attach(), "a")
    names, before = [*mose.model.state_dict()], snapshot(mose, "a")
    real = getattr(SubExperts, broken)

    def fails_at_the_third(layer, *given):
        if layer is mose.layers[2] or broken == "gets_new_B":
            raise MemoryError
        return real(layer, *given)

    monkeypatch.setattr(SubExperts, broken, fails_at_the_third)
    with pytest.raises(MemoryError):
        mose.begin_task("b")
    monkeypatch.undo()
    assert mose.open is None and [*mose.model.state_dict()] == names
    assert torch.equal(snapshot(mose, "a"), before)
    learn(mose, "b")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("need", [0.0, 1.0])
@pytest.mark.parametrize("experts", [1, 2])
def test_a_task_that_can_only_be_a_copy_is_named_when_it_begins(experts, need):
    mose = learn(attach(num_experts=experts, top_k=1, density=0.1), "a")
    # Controls: with new entries it can learn, and with two experts its routers can.
    is_copy = experts == 1 and need == 0.0
    with pytest.raises(UserWarning, match="copy of 'a'") if is_copy else contextlib.nullcontext():
        mose.begin_task("b", "a", need)
    assert mose.open == mose.active == "b"
    before = snapshot(mose, "b")
    optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=0.03)
    for _ in range(3):
        step(mose.model, optimizer, data("b"))
    assert torch.equal(snapshot(mose, "b"), before) == is_copy


def test_a_set_of_targets_has_an_order():
    names = ["v_proj", "q_proj", "k_proj", "o_proj"]
    assert MoSEConfig({*names}).targets == tuple(sorted(names))
    assert MoSEConfig(names).targets == tuple(names)  # control


def test_the_open_task_can_be_dropped_though_a_hook_is_lost(tmp_path):
    mose = learn(learn(attach(), "a"), "b", end=False)
    before = snapshot(mose, "a")
    hooks = mose.model.model.layers[0].self_attn.v_proj._forward_hooks
    hooks.clear()
    mose.forget("b")
    assert torch.equal(mose.model(data("a")).logits, tiny()(data("a")).logits)
    mose.save(tmp_path / "m")  # so what was learned before is not lost
    assert torch.equal(snapshot(MoSE.load(tiny(), tmp_path / "m"), "a"), before)


def test_a_task_that_is_forgotten_while_another_is_in_force_for_a_while_leaves_the_bare_base():
    mose = learn(attach(), *"ab")
    mose.set_task(["a", None])
    with pytest.raises(KeyError), mose.task("b"):  # the caller's own error, and none about "a"
        mose.forget("a")
        mose.begin_task("a")  # its name is free again, and an open task can't be in a list
        raise KeyError
    assert mose.active is None


def test_weights_that_are_not_finite_are_seen_though_they_are_frozen():
    mose = learn(attach(), "a", end=False)
    mose.layers[0].weight.data[0] = float("nan")
    mose.model.requires_grad_(False)
    refuses("'a' has weights that are not finite", mose.end_task)


@pytest.mark.filterwarnings("error")
def test_where_warnings_are_errors_a_task_that_learned_nothing_is_finished_all_the_same():
    mose = attach()
    mose.begin_task("a")
    mose.observe(data("a"))
    with pytest.raises(UserWarning, match="'a' learned nothing"):
        mose.end_task()
    assert mose.open is None and [*mose.tasks] == ["a"] and mose.active == "a"


@pytest.mark.filterwarnings("error")
def test_where_warnings_are_errors_a_task_without_a_key_is_finished_all_the_same():
    mose = attach()
    mose.begin_task("a")
    mose.model(data("a"), labels=data("a")).loss.backward()
    torch.optim.AdamW(mose.trainable_parameters(), lr=0.01).step()
    with pytest.raises(UserWarning, match="'a' has no key"):
        mose.end_task()
    now = mose.model(data("a")).logits
    assert torch.equal(now, snapshot(mose, "a")[0]) and not torch.equal(now, snapshot(mose, None)[0])


@pytest.mark.parametrize("in_force", ["b", "a", ["a", None]])
def test_a_task_that_could_not_be_put_in_force_when_it_ended_leaves_the_bare_base(
        in_force, monkeypatch):
    def no_memory(layer, lineage):
        raise torch.OutOfMemoryError

    mose = learn(learn(attach(), "a"), "b", end=False)
    mose.set_task(in_force)
    monkeypatch.setattr(SubExperts, "finished_matrices", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        mose.end_task()
    monkeypatch.undo()
    assert mose.active is None
    now = mose.model(data("a")).logits
    assert torch.equal(now, snapshot(mose, None)[0]) and not torch.equal(now, snapshot(mose, "b")[0])


def test_gradients_of_a_dropped_task_do_not_reach_the_next(guard, monkeypatch):
    guard or monkeypatch.setattr(SubExperts, "zero_grad", lambda layer: None)
    mose = attach()
    mose.begin_task("a")
    (mose.model(data("a"), labels=data("a")).loss * float("nan")).backward()
    mose.forget("a")
    mose.begin_task("a")
    mose.model(data("a"), labels=data("a")).loss.backward()
    assert all(p.grad.isfinite().all() for p in mose.trainable_parameters()) == guard


def test_a_list_of_tasks_is_that_of_the_call():
    mose, names = learn(attach(), *"ab"), ["a", "b"]
    mose.set_task(names)
    before = mose.model(data("c", 2)).logits
    names.reverse()
    assert torch.equal(mose.model(data("c", 2)).logits, before) and mose.active == ["a", "b"]


def test_dropping_many_tasks_leaves_the_keys_of_others_sure():
    mose = learn(attach(), *"ab")
    for _ in range(60):
        mose.begin_task("x")
        mose.observe(data("c", 64))
        mose.forget("x")
    names, sure = mose.infer_task(torch.cat([data("new a"), data("new b")]), return_confidence=True)
    assert names == [*"aaaabbbb"] and min(sure) > 0.9


@pytest.mark.parametrize("shares", [{"a": -1.0}, {"a": float("nan")}, {None: float("inf")}])
def test_a_probe_gives_numbers_or_is_refused(shares):
    mose = learn(attach(), "a")
    refuses(r"probe\(\) gave", mose.best_source, lambda: shares.get(mose.active, 1.0))
    assert mose.open is None and mose.active == "a" and [*mose.tasks] == ["a"]


@pytest.mark.parametrize("ids, mask", [(data("a")[0], None), (data("a"), torch.ones(2, 8))])
def test_prompt_ids_of_another_shape_are_refused(ids, mask):
    refuses(r"expected \(B, T\) for both", learn(attach(), "a").infer_task, ids, mask)


def test_padding_by_a_negative_id_needs_a_mask():
    mose, ids = learn(attach(), *"ab"), data("new a", 2)
    padded = torch.cat([torch.full((2, 3), -60), ids], dim=1)  # -60 would be a row of the table
    refuses("got the id -60, expected ids >= 0", mose.infer_task, padded)
    mask = (padded >= 0).long()
    assert mose.infer_task(padded, mask, True) == mose.infer_task(ids, None, True)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_prompt_without_an_embedding_is_refused_and_harms_no_key(value, guard, monkeypatch):
    mose = attach()
    mose.model.get_input_embeddings().weight.data[63] = value  # as the row of a padding token
    learn(mose, "a")
    bad = torch.full((2, 5), 63)
    if not guard:  # off: the covariance that all keys share becomes nan
        monkeypatch.setattr("mose.expect", lambda condition, message: None)
    mose.begin_task("b")
    if guard:
        refuses("mean embedding of a prompt is 0 or not finite", mose.observe, bad)
        refuses("mean embedding", lambda: mose.observe(bad, task="a"))
        mose.observe(data("b"))
        mose.end_task()
        assert mose.infer_task(torch.cat([data("new a"), data("new b")])) == [*"aaaabbbb"]
    else:
        mose.observe(bad)
        mose.end_task()
        assert not mose.keys.pooled.isfinite().all()


def test_one_later_prompt_without_the_shared_text_does_not_make_a_key_lose_it():
    mose, template = attach(), torch.arange(40, 60).expand(64, 20)
    for name in "ab":
        mose.begin_task(name)
        mose.observe(torch.cat([template, data(name, 64)], dim=1))
        mose.end_task()
    shared = [*range(40, 60)]
    assert mose.keys.shared_tokens().tolist() == shared
    mose.observe(data("one more a", 1), task="a")
    assert mose.keys.shared_tokens().tolist() == shared
    mose.observe(data("many more a", 64), task="a")  # control: half of the prompts lack it now
    assert mose.keys.shared_tokens().tolist() == []


def test_prompts_whose_mean_is_nothing_still_make_a_key_that_can_be_saved():
    mose = attach()
    table = mose.model.get_input_embeddings().weight.data
    table[1] = -table[0]
    mose.begin_task("a")
    mose.observe(torch.tensor([[0], [1]]))
    mose.end_task()
    assert not mose.keys.tasks["a"][1].any()  # control: the mean is 0
    torch.linalg.cholesky(mose.keys.pooled)  # `save` does this
    assert mose.infer_task(torch.tensor([[0], [1]])) == ["a", "a"]


def test_signs_are_those_that_saved_files_rely_on():
    assert fixed_signs(2, 4).tolist() == [[1, -1, -1, 1], [-1, -1, 1, 1]]


def test_ids_of_another_tokenizer_are_refused():
    mose = learn(attach(), "a")
    for use in (lambda ids: mose.observe(ids, task="a"), mose.infer_task):
        use(torch.tensor([[63]]))  # control
        refuses(r"got the ids \[64, 70\], but there are 64 embeddings", use,
                torch.tensor([[70, 5, 64]]))


def test_keys_are_the_same_under_autocast(guard, monkeypatch):
    def embed(keys, table, tokens, weights):  # off: as if `embed` took no care of it
        return (weights @ table[tokens].float() @ keys.projection).double()

    guard or monkeypatch.setattr(TaskKeys, "embed", embed)
    means = []
    for enabled in (False, True):
        mose = attach()
        mose.begin_task("a")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            mose.observe(data("a"))
        mose.end_task()
        means.append(mose.keys.tasks["a"][1])
    assert torch.equal(*means) == guard


def test_prompts_that_come_later_one_by_one_count_as_much_as_together(guard, monkeypatch):
    def rounded(keys, name, sums, merge=TaskKeys.merge):
        merge(keys, name, sums)
        keys.restore(*keys.state())

    # Off: the sums are rounded after each prompt, so that a few more change nothing.
    guard or monkeypatch.setattr(TaskKeys, "merge", rounded)
    together, alone = learn(attach(), *"ab"), learn(attach(), *"ab")
    prompts = data("more b", 600)
    together.observe(prompts, task="b")
    for prompt in prompts:
        alone.observe(prompt[None], task="b")
    ratio = alone.keys.pooled.diagonal().mean() / together.keys.pooled.diagonal().mean()
    # (Not exactly 1: a scatter is divided by the variance that the task has by then.)
    assert (abs(ratio - 1) < 0.05) == guard


def test_nothing_of_a_forgotten_task_is_kept():
    mose = learn(attach(), *"ab")
    only_b = [layer.owner == 2 for layer in mose.layers]
    assert {*mose.packed} == {1, 2}  # control: what `capacity` compressed is kept for `save`
    mose.forget("b")
    assert {*mose.packed} == {1} and all({*layer.routers} == {1} for layer in mose.layers)
    assert not any(layer.frozen[mask].any() for layer, mask in zip(mose.layers, only_b))


def test_a_new_task_can_be_trained_whatever_was_switched_off_before(guard, monkeypatch):
    mose = attach()
    mose.model.requires_grad_(False)
    # Off: the state of attaching is trusted.
    guard or monkeypatch.setattr(SubExperts, "requires_grad_", lambda layer, on: layer)
    mose.begin_task("a")
    assert bool(mose.trainable_parameters()) == guard


@pytest.mark.parametrize("what", ["load", "end_task", "set_task"])
def test_training_goes_on_after_inference_mode(what, guard, monkeypatch, tmp_path):
    if not guard:  # off: what is made in inference mode stays unfit for training
        for name in ("set_task", "__init__"):
            monkeypatch.setattr(MoSE, name, getattr(MoSE, name).__wrapped__)
    mose, base = learn(learn(attach(), "a"), "b", end=what != "end_task"), tiny()
    if what == "load":
        mose.save(tmp_path / "m")
    with torch.inference_mode():
        mose = MoSE.load(base, tmp_path / "m") if what == "load" else mose
        if what == "end_task":
            mose.end_task()
        mose.set_task("a")

    def go_on():
        inputs = torch.randn(2, 4, 32, requires_grad=True)
        mose.model(inputs_embeds=inputs).logits.sum().backward()  # under what was set there
        falls, before = [], snapshot(mose, *"ab")
        learn(mose, "c", steps=6, falls=falls)
        assert falls[0] > 0 and torch.equal(snapshot(mose, *"ab"), before)

    if guard:
        return go_on()
    with pytest.raises(RuntimeError, match="[Ii]nference"):
        go_on()


# ------------------------------------------------------------------------------ the same base


def test_a_base_is_the_same_under_autocast(guard, monkeypatch):
    guard or monkeypatch.setattr(own, "autocast_off", lambda device: contextlib.nullcontext())
    codes = torch.randint(2**31 - 1, (8, 8), dtype=torch.int32)  # as GPTQ packs its weights
    plain = own.numbers_of(codes)
    with torch.autocast("cpu", torch.float16):
        assert (own.numbers_of(codes) == plain) == guard


def test_a_model_may_have_a_config_that_is_not_one_of_transformers():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model.config = {"n_layer": 12}
    assert {*own.fingerprint(model)} > {"0.weight"}


def swapped_rows(model):
    table = model.get_input_embeddings().weight.data
    table.copy_(table.roll(1, dims=0))


def transposed(model):
    weight = model.model.layers[0].self_attn.o_proj.weight.data
    weight.copy_(weight.T.clone())


def permuted_heads(model):
    attention = model.model.layers[0].self_attn
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        layer.weight.data.copy_(layer.weight.data.view(4, 8, 32).flip(0).reshape(32, 32))
    out = attention.o_proj.weight.data
    out.copy_(out.view(32, 4, 8).flip(1).reshape(32, 32))


def other_positions(model):
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq ** 1.5


@pytest.mark.parametrize("change", [swapped_rows, transposed, permuted_heads, other_positions])
def test_a_base_that_is_another_is_seen_and_its_copies_are_not(change, tmp_path):
    learn(attach(), "a").save(tmp_path / "m")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert [*MoSE.load(tiny(dtype=dtype), tmp_path / "m").tasks] == ["a"]
    other = tiny()
    change(other)
    refuses("a base of other layers, weights or positions: [1-4] differ", MoSE.load, other, tmp_path / "m")


# ------------------------------------------------------------------------------ processes, threads


def test_all_ranks_draw_what_the_first_draws(guard, monkeypatch):
    """Two processes in one: the second gets the first one's number, as broadcasting gives it."""
    sent = []

    def broadcast(box):
        sent.append([*box])
        box[:] = sent[0]

    if guard:  # off: no process group
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    ranks = []
    for seed in (1, 2):
        ranks.append(attach())
        torch.manual_seed(seed)
        ranks[-1].begin_task("a")
    weights = [torch.cat([layer.weight for layer in mose.layers]) for mose in ranks]
    assert torch.equal(*weights) == guard


def test_all_ranks_choose_the_source_that_the_first_one_chooses(guard, monkeypatch):
    """As above. Each rank has computed the best constant answer from its own share of the data."""
    sent, chosen = [], []
    for guess in (0.8, 0.25):
        mose, errors, is_first = learn(attach(), "a"), iter((0.9, 0.2)), not chosen
        numbers = iter([*sent])

        def broadcast(box):
            if is_first:
                sent.append(box[0])
            else:
                box[0] = next(numbers)

        if guard:  # off: no process group
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
        chosen.append(mose.best_source(lambda: next(errors), guess))
        monkeypatch.undo()
    assert chosen[0] == ("a", 0.25) and (chosen[1] == chosen[0]) == guard


def test_threads_share_a_model(guard, monkeypatch):
    mose, wrong, count = learn(attach(), "a"), [], 4
    inputs = [data(f"{i} a") for i in range(count)]
    expected = [snapshot(mose, "a", ids=ids)[0] for ids in inputs]
    mose.set_task("a")
    together, delta = threading.Barrier(count), SubExperts.delta

    def handed_over(layer, x, matrices):
        layer.now = x
        together.wait()
        return delta(layer, layer.now, matrices)

    # Off: what a hook works with lies on its layer, where all threads write.
    guard or monkeypatch.setattr(SubExperts, "delta", handed_over)

    def work(i):
        with torch.no_grad():
            for _ in range(40 if guard else 4):
                wrong.append(not torch.equal(mose.model(inputs[i]).logits, expected[i]))

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    sys.setswitchinterval(switch)
    assert any(wrong) != guard and len(wrong) == (160 if guard else 16)


def test_gates_are_fp32_though_the_task_was_set_under_autocast():
    mose = learn(attach(), "a")
    before, layer = snapshot(mose, "a")[0], mose.layers[0]
    with torch.autocast("cpu", torch.bfloat16):
        mose.set_task("a")
        rounded = layer.projection @ layer.routers[1].mT
    assert rounded.dtype == torch.bfloat16  # control: this is what autocast does to such a product
    assert {matrix.dtype for matrix in layer.in_force[0][1]} == {torch.float32}
    assert torch.equal(mose.model(data("a")).logits, before)
