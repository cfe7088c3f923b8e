"""What mose.py promises: the method's specification, to be run, or read from top to bottom.

Each test's name is a claim. Where a claim rests on certain lines of mose.py, its guard, a control
shows that the check can fail. Either the test runs twice, as [guarded] and as [control]: in the
control the guard is off, and the very same check has to fail. Or a parameter names what is off or
wrong. Or a line with the word "control" shows it. The bases are tiny, random and made here, so the
tests need no network and no GPU, and take about a minute:

    pip install -r requirements.txt pytest && pytest test_mose.py
"""

import contextlib
import copy
import itertools
import math
import pickle
import re
import zlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mose import (
    MoSE, MoSEConfig, StraightThrough, SubExperts, TaskKeys, top_k_gates, top_k_mask)

# {kind of attention: (an architecture that has it, its target layers)}
KINDS = {
    "multi-head": ("llama", ("q_proj", "v_proj")),
    "grouped": ("llama", ("q_proj", "k_proj", "v_proj", "o_proj")),  # grouped-query
    "fused": ("gpt_neox", ("query_key_value",)),
    "conv1d": ("gpt2", ("c_attn",)),  # GPT-2 has a linear layer of its own, transposed
}
every_kind = pytest.mark.parametrize("kind", KINDS)
# (Some tests end a task that has learned nothing.)
pytestmark = pytest.mark.filterwarnings("ignore:task .* learned nothing")
both_modes = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "modern"])


@pytest.fixture(params=[True, False], ids=["guarded", "control"])
def guard(request):
    """True: the code as it is. False: the control, for which the test switches a guard off.

    `guard or monkeypatch.setattr(..)` does that. What the code does instead stands behind "Off:". A
    check with `== guard` has to hold with the guard, and to fail without it.
    """
    return request.param


def tiny(kind="multi-head", dtype=torch.float32):
    """A random base, the same at every call. Its weights are large, so that attention matters."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2 if kind == "grouped" else 4}
    other = {"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(KINDS[kind][0], **size, **heads, **other)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def attach(kind="multi-head", dtype=torch.float32, **config):
    return MoSE(tiny(kind, dtype), MoSEConfig(targets=KINDS[kind][1], **config))


def data(name, size=4, length=8):
    """Prompts (size, length) of the task of this name. The last letter of the name chooses the 8 of
    the 64 tokens that they consist of, others for each of a to h. So "new a" gives other prompts
    than "a", of the same tokens."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(8, (size, length), generator=generator) + 8 * (ord(name[-1]) % 8)


def adam(mose):
    """An optimizer that could serve all tasks: it holds every Parameter of the experts."""
    parameters = torch.nn.ModuleList(mose.layers).parameters()
    return torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.1)


def step(model, optimizer, ids, factor=1.0):
    """One step, as hard as can be on what has to stay: gradients become 0, not None, so momentum
    and weight decay go on moving all that the optimizer holds. `factor` multiplies the loss."""
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.zero_grad(set_to_none=False)
    (factor * loss).backward()
    optimizer.step()
    return loss.item()


def learn(mose, *names, steps=3, optimizer=None, falls=None, end=True, source=None):
    """Tasks from begin to end: learn(mose, *"ab") learns "a" and then "b". Each has an optimizer of
    its own, unless one is given. `falls` gets how far the loss of each fell."""
    for name in names:
        mose.begin_task(name, source)
        mose.observe(data(name, 64))
        its_optimizer = optimizer or adam(mose)
        losses = [step(mose.model, its_optimizer, data(name)) for _ in range(steps)]
        if falls is not None:
            falls.append(losses[0] - losses[-1])
        if end:
            mose.end_task()
    return mose


@torch.no_grad()
def snapshot(mose, *tasks, ids=data("a")):
    """Logits (tasks, B, T, V)."""
    logits = []
    for task in tasks:
        with mose.task(task):
            logits.append(mose.model(ids).logits)
    return torch.stack(logits)


def reloaded(mose, path, *base):
    mose.save(path)
    return MoSE.load(tiny(*base), path)


def refuses(says, call, *args):
    with pytest.raises(ValueError, match=says):
        call(*args)


def checkpoint(model, reentrant):
    """Gradient checkpointing; its old mode needs an input with a gradient, as with any adapter."""
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()


# ------------------------------------------------------------------------------ learns, keeps all


def test_tasks_are_learned_found_by_their_prompts_and_leave_the_base_as_it_is():
    mose = attach()
    base = snapshot(mose, None)
    for name in "ab":
        mose.begin_task(name)
        mose.observe(data(name, 64))
        optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=0.03)
        losses = [step(mose.model, optimizer, data(name)) for _ in range(20)]
        mose.end_task()
        assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(snapshot(mose, None), base)
    prompts = torch.cat([data("new b", 1), data("new a", 1)])
    alone = snapshot(mose, "b", "a", ids=prompts)
    assert not torch.allclose(alone[0], alone[1], atol=0.1)  # control: they say different things
    mose.set_task(mose.infer_task(prompts))
    logits = mose.model(prompts).logits
    assert mose.active == ["b", "a"]
    for row in range(2):
        assert torch.allclose(logits[row], alone[row, row], atol=1e-4)


def begin_that_keeps_what_is_used(layer, *given, begin=SubExperts.begin):
    """`begin`, but the used entries of `weight` keep what their tasks have learned."""
    before, used = layer.weight.detach().clone(), layer.owner > 0
    begin(layer, *given)
    layer.weight.data[used] = before[used]  # so only the optimizer can change it


def finished_from_the_weights(layer, lineage):
    """`finished_matrices`, but made of `weight` and not of `frozen`."""
    pool = torch.where(layer.read_by(lineage), layer.weight.detach(), 0.0)
    return layer.matrices(pool, layer.routers[lineage[0]])


def select_from_all(layer):
    """`select` without its guard: used entries compete too."""
    score_A, score_B = layer.score[:layer.size_A], layer.score[layer.size_A:]
    new_A, new_B = layer.num_new
    return torch.cat([top_k_mask(score_A, new_A), top_k_mask(score_B, new_B)])


@both_modes
@pytest.mark.parametrize("off", [None, "buffers", "selection"], ids=str)
def test_a_finished_task_never_changes(off, reentrant, tmp_path, monkeypatch):
    """Not by weight decay, one AdamW for all tasks, checkpointing, a bf16 base, forget() of another
    task, or save and load."""
    if off == "buffers":  # what a finished task reads is in the Parameter, which an optimizer holds
        monkeypatch.setattr(SubExperts, "begin", begin_that_keeps_what_is_used)
        monkeypatch.setattr(SubExperts, "finished_matrices", finished_from_the_weights)
    if off == "selection":  # a new task takes over entries that finished tasks own
        monkeypatch.setattr(SubExperts, "select", select_from_all)
    base = ("grouped", torch.bfloat16)
    mose = attach(*base)
    checkpoint(mose.model, reentrant)
    optimizer, logits = adam(mose), {}
    for name in "abc":
        learn(mose, name, optimizer=optimizer)
        logits[name] = snapshot(mose, name)
        assert torch.equal(snapshot(mose, name), logits[name])  # a pass repeats exactly
    if off != "buffers":  # (A file holds `frozen`, not `weight`: loading would change the tasks.)
        mose.forget("b")
        momentum = optimizer.state_dict()
        mose = reloaded(mose, tmp_path / "m", *base)
        checkpoint(mose.model, reentrant)
        optimizer = adam(mose)
        optimizer.load_state_dict(momentum)
    learn(mose, "d", "e", optimizer=optimizer)
    same = [torch.equal(snapshot(mose, name), logits[name]) for name in "ac"]
    assert same == [off is None] * 2


def test_zeroed_gradients_would_not_keep_a_task_but_buffers_do():
    mose = attach()
    layer, optimizer = mose.layers[0], adam(mose)
    learn(mose, "a", optimizer=optimizer).begin_task("b")
    frozen, stored_router, weight = copy.deepcopy([layer.frozen, layer.routers[1], layer.weight])
    step(mose.model, optimizer, data("b"))
    assert torch.equal(layer.frozen, frozen) and torch.equal(layer.routers[1], stored_router)
    used = layer.owner > 0
    assert not layer.weight.grad[used].any()
    assert (layer.weight != weight)[used].any()  # control: weight decay moves them all the same


def unread_but_own(layer, lineages, unread=SubExperts.unread):
    """`unread` as if a task read what its lineage owns and nothing else: with 0 as its root, it
    reads no earlier entries of A."""
    return unread(layer, [[*lineage, 0] for lineage in lineages])


def test_forgetting_frees_and_clears_what_only_that_task_read(guard, monkeypatch):
    # Off: all that the task owned is freed, though later tasks read its A.
    guard or monkeypatch.setattr(SubExperts, "unread", unread_but_own)
    mose = learn(attach(), *"abc")
    before, share = snapshot(mose, "a", "c"), mose.capacity()["c"]["share"]
    values = [layer.frozen.clone() for layer in mose.layers]
    mose.forget("b")
    assert torch.equal(snapshot(mose, "a", "c"), before) == guard
    assert mose.capacity()["c"]["share"] < share
    for layer, old in zip(mose.layers, values):
        read = layer.read_by(mose.tasks["a"]) | layer.read_by(mose.tasks["c"])
        assert torch.equal(layer.owner > 0, read)
        assert torch.equal(layer.frozen, old.where(read, 0.0))
        assert (layer.owner[:layer.size_A] == 2).any() == guard
        assert not (layer.owner[layer.size_A:] == 2).any()
    # What "b" left to "c" counts with "c".
    used = sum(int((layer.owner > 0).sum()) for layer in mose.layers)
    assert sum(entry["new"] for entry in mose.capacity().values()) == used
    mose.forget("a")
    mose.forget("c")
    assert not any(layer.owner.any() for layer in mose.layers)


# First the source of "c"; first the newest task; first the middle of the chain a - c - e.
@pytest.mark.parametrize("order", ["acbe", "ebac", "cbae"])
def test_tasks_are_forgotten_in_several_orders_and_the_others_stay(
        order, guard, tmp_path, monkeypatch):
    # Off: all that a task owned is freed.
    guard or monkeypatch.setattr(SubExperts, "unread", unread_but_own)
    mose = learn(attach(density=0.2), *"ab")
    learn(mose, "c", source="a")
    learn(mose, "d")
    learn(mose, "e", source="c")
    before, same = dict(zip("abcde", snapshot(mose, *"abcde"))), []
    for gone in order:
        mose.forget(gone)
        mose = reloaded(mose, tmp_path / "m")
        same += [torch.equal(snapshot(mose, name)[0], before[name]) for name in mose.tasks]
    learn(mose, "f")  # it may take what was freed, but nothing that "d" reads
    same.append(torch.equal(snapshot(mose, "d")[0], before["d"]))
    assert all(same) == guard


@both_modes
def test_gradients_are_the_same_with_checkpointing(guard, reentrant):
    mose, ids = learn(learn(attach("grouped"), "a"), "b", end=False), data("b")
    own = mose.trainable_parameters()
    plain = torch.autograd.grad(mose.model(ids, labels=ids).loss, own)
    checkpoint(mose.model, reentrant)
    mose.model.zero_grad(set_to_none=False)
    loss = mose.model(ids, labels=ids).loss
    # Control: the caller changes the task before backward(), which runs each layer again.
    guard or mose.set_task("a")
    with contextlib.suppress(RuntimeError):  # the modern mode notices that
        loss.backward()
    assert all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(own, plain)) == guard


# ------------------------------------------------------------------------------ masks


def test_a_mask_has_exactly_k_entries_though_all_scores_tie():
    score = torch.full((100,), 0.5)
    assert all(top_k_mask(score, k).sum() == k for k in range(101))
    assert (score >= score.topk(3).values[-1]).all()  # control: a threshold keeps them all


def worst_first(layer, select=SubExperts.select):
    """`select` with the order of the scores turned round."""
    layer.score.data.neg_()
    mask = select(layer)
    layer.score.data.neg_()
    return mask


def test_a_task_selects_the_free_entries_with_the_best_scores(guard, monkeypatch):
    # Off: it selects those with the worst.
    guard or monkeypatch.setattr(SubExperts, "select", worst_first)
    mose, best = learn(learn(attach(), "a"), "b", end=False), []
    for layer in mose.layers:
        parts = map(layer.split, (layer.score, layer.select(), layer.owner))
        for score, own, owner in zip(*parts):  # in A, and in B
            rest = (owner == 0) & ~own
            assert own.any() and not own[owner > 0].any()
            best.append(bool(score[own].min() >= score[rest].max()))
    assert all(best) == guard


def test_gradients_decide_which_entries_a_task_takes_and_not_the_random_start(guard, monkeypatch):
    # Off: the scores start so far apart that three steps hardly change their order.
    guard or monkeypatch.setattr("mose.SCORE_SPREAD", 4.0)
    mose = learn(attach(), "a", steps=0, end=False)
    first, optimizer = [layer.select() for layer in mose.layers], adam(mose)
    for _ in range(3):
        step(mose.model, optimizer, data("a"))
    kept = sum(int((old & layer.select()).sum()) for old, layer in zip(first, mose.layers))
    number = sum(int(old.sum()) for old in first)
    assert (kept < 0.3 * number) == guard  # 0.1 of them as it is


def test_the_gradient_is_that_of_equation_3_as_if_all_entries_were_read():
    weight, score, frozen, grad = torch.randn(4, 200)
    used, reads = torch.rand(2, 200) < 0.5
    weight.requires_grad_()
    score.requires_grad_()
    pool = StraightThrough.apply(weight, score, frozen, used, reads)
    value = frozen.where(used, weight)
    assert torch.equal(pool, reads * value)
    grad_weight, grad_score = torch.autograd.grad(pool, (weight, score), grad)
    # Here all entries are read, and each value is multiplied by a score of 1.
    ones = torch.ones(200, requires_grad=True)
    expected_weight, expected_score = torch.autograd.grad(ones * value, (weight, ones), grad)
    # (Used entries can't be selected, so their scores get no gradient.)
    assert torch.equal(grad_weight, expected_weight)
    assert torch.equal(grad_score, expected_score.where(~used, 0.0))
    assert grad_weight[~reads & ~used].all() and not grad_weight[used].any()


def test_a_second_derivative_is_refused_and_not_wrong():
    weight, score = torch.ones(2, 1, requires_grad=True)
    used, reads = torch.tensor([[False], [True]])
    pool = StraightThrough.apply(weight, score, torch.zeros(1), used, reads)
    grad_score, = torch.autograd.grad(pool**2, score, create_graph=True)
    assert grad_score == 2  # control: the first derivative is there
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_score.backward()


class OnlyWeightsThatAreRead:
    """The straight-through of Winning SubNetworks: an entry that is not read learns its score, but
    not its weight."""

    @staticmethod
    def apply(weight, score, frozen, used, reads):
        value = frozen.where(used, weight)
        return value * reads + value.detach() * (score - score.detach())


def test_the_scores_of_entries_of_matrix_b_outside_the_mask_learn(guard, monkeypatch):
    # Off: these entries keep the value 0 that B starts with, and the gradient of a score is the
    # value times that of the entry. So it stays 0, and no such entry can win a place in the mask.
    guard or monkeypatch.setattr("mose.StraightThrough", OnlyWeightsThatAreRead)
    mose = learn(attach(), "a", steps=0, end=False)
    layer, optimizer = mose.layers[0], adam(mose)
    in_B = torch.arange(len(layer.owner)) >= layer.size_A
    outside = in_B & ~layer.select()
    for _ in range(2):
        step(mose.model, optimizer, data("a"))
    assert layer.score.grad[outside].any() == guard


# ------------------------------------------------------------------------------ router, experts


class Slow(SubExperts):
    """Equations (1) to (3) for the open task "c" as they stand: example by example, token by token,
    expert by expert. `mistake` names what it gets wrong in a control."""

    def add_delta(self, layer, args, out):
        E, R, K = self.config.num_experts, self.config.rank, self.config.top_k
        D, (_, O), fixed_A = len(self.projection), self.shape_B, self.config.fixed_A
        size_A = 0 if fixed_A else D * E * R
        # What "c" reads: its new entries, those of its source "b" (number 2), and of A also those
        # of "a" (number 1), which were used when "b" started.
        reads = self.select()
        for n, owner in enumerate(self.owner.tolist()):
            of_source = owner == 2 and self.mistake != "no source"
            of_earlier = owner == 1 and n < size_A and self.mistake != "no earlier A"
            reads[n] |= of_source or of_earlier
        pool = reads * self.frozen.where(self.owner > 0, self.weight)
        A = (self.fixed_A if fixed_A else pool[:size_A]).view(D, E, R)
        B = pool[size_A:].view(E, R, O)
        x, delta = args[0], torch.zeros_like(out)
        for b, t in itertools.product(*map(range, out.shape[:2])):
            exps = [math.exp(x[b, t] @ self.projection @ row) for row in self.router]
            best = sorted(range(E), key=lambda e: exps[e])[-K:]
            total = sum(exps[e] for e in (best if self.mistake == "sum to 1" else range(E)))
            for e in best:
                delta[b, t] += exps[e] / total * x[b, t] @ A[:, e] @ B[e]
        return out + (1.0 if self.mistake == "no scale" else self.config.scale) * delta


@torch.no_grad()
@pytest.mark.parametrize("kind, top_k, fixed_A, mistake", [
    *itertools.product(KINDS, (1, 2, 3), (False,), (None,)),
    *((kind, 2, True, None) for kind in KINDS),
    *(("grouped", 2, False, mistake) for mistake in ("sum to 1", "no source", "no earlier A",
                                                     "no scale")),  # controls
    ("grouped", 2, True, "no source")])  # control
def test_the_fast_path_equals_a_loop_over_tokens_and_experts(
        kind, top_k, fixed_A, mistake, monkeypatch):
    config = {"num_experts": 3, "rank": 2, "top_k": top_k, "density": 0.5, "scale": 3.0,
              "fixed_A": fixed_A}
    with torch.enable_grad():
        mose = learn(learn(attach(kind, **config), "a", "b"), "c", end=False, source="b")
    monkeypatch.setattr("mose.SubExperts", Slow)
    slow = attach(kind, **config)
    for theirs, ours in zip(slow.layers, mose.layers):
        # All state but the hook, which is that of Slow. It computes "c" whatever is in force.
        vars(theirs).update(vars(ours), mistake=mistake)
    logits = snapshot(mose, "c", ids=data("c", 2)), snapshot(slow, None, ids=data("c", 2))
    assert torch.allclose(*logits, atol=1e-4) == (mistake is None)


def test_a_token_goes_to_exactly_k_experts_and_the_router_decides_which(guard, monkeypatch):
    for logits in (torch.randn(2, 5, 8), torch.zeros(2, 5, 8)):  # (without and with ties)
        assert ((top_k_gates(logits, 2) != 0).sum(-1) == 2).all()
    # Off: gates of 1/E, and then a router that sends its tokens elsewhere changes nothing.
    guard or monkeypatch.setattr("mose.top_k_gates", lambda logits, k: logits * 0 + 0.125)
    mose = learn(attach(num_experts=8, rank=2, top_k=2, density=0.5), "a")
    before = snapshot(mose, "a")
    for layer in mose.layers:
        layer.routers[1] = layer.routers[1].flip(0)  # expert e gets the tokens of E - 1 - e
    assert torch.equal(snapshot(mose, "a"), before) == (not guard)


@pytest.mark.parametrize("dtype, auto, guard", [
    (torch.bfloat16, False, True), (torch.float16, False, True),  # (without x.float() torch raises)
    (torch.float32, True, True), (torch.float32, True, False)],
    ids=["bf16", "fp16", "autocast-guarded", "autocast-control"])
def test_experts_are_fp32_whatever_the_base_and_autocast_are(dtype, auto, guard, monkeypatch):
    mose, calls = learn(attach(dtype=dtype), "a", end=False), []
    # Off: under autocast, the products of the experts are in bf16.
    guard or monkeypatch.setattr("mose.autocast_off", lambda device: contextlib.nullcontext())

    def noted(layer, x, matrices, delta=SubExperts.delta):
        out = delta(layer, x, matrices)
        calls.append((layer, x, matrices, out))
        return out

    with monkeypatch.context() as while_noted, torch.autocast("cpu", torch.bfloat16, enabled=auto):
        while_noted.setattr(SubExperts, "delta", noted)
        logits = mose.model(data("a")).logits
    assert logits.dtype == (torch.bfloat16 if auto else dtype)
    own = mose.trainable_parameters()
    assert all(grad.any() for grad in torch.autograd.grad(logits.float().square().mean(), own))
    assert len(calls) == len(mose.layers)
    for layer, x, matrices, delta in calls:
        assert torch.equal(delta, layer.delta(x, matrices)) == guard  # here without autocast
        assert (delta.dtype == torch.float32) == guard
        rounded = [matrix.bfloat16().float() for matrix in matrices]
        assert not torch.equal(delta, layer.delta(x, rounded))  # control: rounding would show


def gates_that_sum_to_1(logits, k):
    gates = top_k_gates(logits, k)
    return gates / gates.sum(-1, keepdim=True)


def test_a_router_learns_though_each_token_has_one_expert(guard, monkeypatch):
    # Off: the gates are scaled to sum to 1, so the only one is always 1.
    guard or monkeypatch.setattr("mose.top_k_gates", gates_that_sum_to_1)
    mose, ids = learn(attach(top_k=1), "a", end=False), data("a")
    mose.model.zero_grad()
    mose.model(ids, labels=ids).loss.backward()
    assert (max(layer.router.grad.abs().max() for layer in mose.layers) > 1e-4) == guard


# ------------------------------------------------------------------------------ the life of a task


def begin_without_new_weights(layer, lineage, need, generator, begin=SubExperts.begin):
    """`begin`, but `weight` keeps what the last task has left there."""
    before = layer.weight.detach().clone()
    begin(layer, lineage, need, generator)
    layer.weight.data.copy_(before)


@every_kind
def test_a_new_task_is_the_bare_base_until_its_first_step(kind, guard, monkeypatch):
    mose, base = attach(kind, density=0.5), tiny(kind)(data("a")).logits[None]
    for name in "ab":
        mose.begin_task(name)
        mose.observe(data(name))
        assert torch.equal(snapshot(mose, name), base) == (guard or name == "a")
        mose.end_task()  # after zero steps
        learn(mose, f"more {name}")
        # Off from here on: a new task starts with all weights that the last one has moved, also
        # those outside its mask.
        guard or monkeypatch.setattr(SubExperts, "begin", begin_without_new_weights)


def test_a_task_with_a_source_starts_as_its_source_bit_for_bit(guard, monkeypatch):
    def reads_all_of_A(layer, lineage, reads=SubExperts.read_by):
        return reads(layer, [*lineage, lineage[0]])  # its own number as the root

    # Off: it reads all used entries of A, which are more than its source read.
    guard or monkeypatch.setattr(SubExperts, "read_by", reads_all_of_A)
    mose = learn(attach(density=0.3), *"abc")
    learn(mose, "d", source="a")
    learn(mose, "f")
    for source in "ad":  # "d" has a source itself
        before = snapshot(mose, source)
        mose.begin_task("e", source)
        assert torch.equal(snapshot(mose, "e"), before) == guard
        mose.forget("e")


def finish_with_other_entries(layer, selected, router, finish=SubExperts.finish):
    finish(layer, selected.roll(1), router)


@every_kind
def test_a_task_computes_the_same_before_and_after_it_ends(kind, guard, monkeypatch):
    # Off: it keeps other entries than those that it was trained with.
    guard or monkeypatch.setattr(SubExperts, "finish", finish_with_other_entries)
    mose = learn(attach(kind), *"ab")
    learn(mose, "c", end=False)
    before = snapshot(mose, "c")
    assert mose.end_task() == mose.capacity()["c"]
    assert torch.equal(snapshot(mose, "c"), before) == guard


def test_a_new_task_reads_all_used_entries_of_matrix_a_and_owns_a_share_of_the_free_ones():
    mose, new = learn(attach(density=0.2), *"abc"), [0, 0, 0]
    for layer in mose.layers:
        a, b, c = (layer.read_by(mose.tasks[name]) for name in "abc")
        own_a, own_b, own_c = (layer.owner == number for number in (1, 2, 3))
        in_A = torch.arange(len(layer.owner)) < layer.size_A
        assert torch.equal(a, own_a)
        assert torch.equal(b, own_b | own_a & in_A)
        assert torch.equal(c, own_c | (own_a | own_b) & in_A)
        for owner in layer.split(layer.owner):
            free = owner.numel()
            for i in range(3):
                wanted = int(0.2 * free)
                assert (owner == i + 1).sum() == wanted  # later tasks have taken none of them
                free -= wanted
                new[i] += wanted
        assert (layer.owner > 0).float().mean() <= 1 - (1 - 0.2) ** 3
    assert new == [entry["new"] for entry in mose.capacity().values()]


def test_with_a_fixed_matrix_a_tasks_learn_and_store_b_alone(tmp_path):
    mose = learn(attach(density=0.2, fixed_A=True), *"ab")
    learn(mose, "c", source="a")
    before = snapshot(mose, *"abc")
    assert not torch.equal(before[0], snapshot(mose, None)[0])  # control: it has learned something
    for layer in mose.layers:
        assert len(layer.owner) == layer.weight.numel() == math.prod(layer.shape_B)
        a, b, c = (layer.read_by(mose.tasks[name]) for name in "abc")
        assert not (a & b).any()
        # "c" reads what its source reads, and what it owns.
        assert torch.equal(c, a | (layer.owner == 3))
        # Nobody stores A, so files rely on its values: signs, as `fixed_signs` gives them, with the
        # variance 1 / (3 D) of an A that is learned.
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
        assert torch.allclose(layer.fixed_A[0, :4], signs / math.sqrt(3 * 32))
        assert layer.fixed_A.shape == (32, 64)
    mose.begin_task("d", "b")
    assert torch.equal(snapshot(mose, "d")[0], before[1])  # it starts as its source
    assert not any("fixed_A" in key for key in mose.model.state_dict())
    mose.forget("d")
    copied = copy.deepcopy(mose)
    assert torch.equal(snapshot(copied, *"abc"), before)
    copied.model.bfloat16()
    assert all(layer.fixed_A.dtype == torch.float32 for layer in copied.layers)
    again = reloaded(mose, tmp_path / "m")
    learn(again, "d")
    assert torch.equal(snapshot(again, *"abc"), before)
    again.forget("b")
    assert torch.equal(snapshot(again, *"ac"), before[[0, 2]])
    learned_A = learn(attach(density=0.2), "a").capacity()["a"]
    assert learned_A["new"] > again.capacity()["a"]["new"] > 0


def test_the_source_is_the_task_that_leaves_least_to_learn():
    mose = learn(attach(), *"abc")
    left = {None: 0.8, "a": 0.5, "b": 0.2, "c": 0.9}  # best_source puts each of them in force
    source, need = mose.best_source(lambda: left[mose.active])
    assert (source, need) == ("b", 0.25)
    mose.begin_task("d", source, need)
    for layer in mose.layers:  # it will own a quarter of the usual number of new entries
        free = [int((owner == 0).sum()) for owner in layer.split(layer.owner)]
        assert layer.num_new == [int(0.25 * 0.01 * count) for count in free]
        assert layer.num_new != [int(0.01 * count) for count in free]  # control
    mose.forget("d")
    assert mose.best_source(lambda: left[mose.active], guess=0.4) == ("b", 0.5)
    # "b" leaves a little less than a constant answer, but not under WELL_BELOW = 0.75 times that.
    assert mose.best_source(lambda: left[mose.active], guess=0.26) == (None, 1.0)
    assert mose.best_source(lambda: left[mose.active], guess=0.27)[0] == "b"
    assert mose.best_source(lambda: 1.0) == (None, 1.0)
    assert attach().best_source(None) == (None, 1.0)  # nothing is finished: no probe is needed
    for bad in (-1.0, math.nan, math.inf):
        refuses(r"probe\(\) gave", mose.best_source, lambda: bad)


def test_training_means_that_a_task_is_open_not_model_training():
    mose = learn(attach(), "a", end=False)
    assert not mose.model.training
    logits = mose.model(data("a")).logits
    mose.end_task()
    after = mose.model.train()(data("a")).logits
    assert logits.requires_grad and not after.requires_grad and torch.equal(logits, after)


def share_of_all(layer, *given, begin=SubExperts.begin):
    """`begin` with a density that is a share of all entries, and not of the free ones."""
    begin(layer, *given)
    for part, owner in enumerate(layer.split(layer.owner)):
        wanted = int(layer.config.density * owner.numel())
        layer.num_new[part] = min(wanted, int((owner == 0).sum()))


def test_the_hundredth_task_still_gets_entries_and_learns_something(guard, monkeypatch):
    # Off: 34 tasks of 3 % take all there is, and the next one is refused.
    guard or monkeypatch.setattr(SubExperts, "begin", share_of_all)
    # (With so few entries, only a large scale shows in six steps that a task learns.)
    mose, falls = learn(attach(scale=32.0, density=0.03), *map(str, range(34)), steps=0), []
    works = contextlib.nullcontext() if guard else pytest.raises(ValueError, match="gets no entry")
    with works:
        learn(mose, *map(str, range(34, 100)), steps=6, falls=falls)
    assert len(mose.tasks) == (100 if guard else 34)
    if guard:
        new = [entry["new"] for entry in mose.capacity().values()]
        assert new == sorted(new, reverse=True)
        assert falls[-1] > 0.01 and 0 < new[-1] < new[0] / 10  # ever less, but never nothing


def test_a_task_that_would_get_no_entry_is_refused_and_harms_none():
    # A and B have 32 entries each. "a" takes 28 of them, and "b" 3. One is left, and 90 % of it,
    # rounded down, are none.
    mose = learn(attach(num_experts=1, rank=1, top_k=1, density=0.9), *"ab", steps=1)
    before = snapshot(mose, *"ab")
    refuses(r"'c' gets no entry of A or none of B.*forget\(\) a task", mose.begin_task, "c")
    assert torch.equal(snapshot(mose, *"ab"), before) and mose.open is None
    mose.begin_task("c", "a")  # a source is enough
    mose.forget("c")
    mose.forget("a")
    mose.begin_task("c")  # and so is the room in B that "a" has left


def test_a_task_for_which_no_entry_of_matrix_b_is_left_is_refused():
    mose = learn(attach(density=0.03), "a", steps=0)
    for layer in mose.layers:  # "a" owns the whole of B, and A is free
        layer.owner[layer.size_A:] = 1
    refuses("'c' gets no entry of A or none of B", mose.begin_task, "c")
    mose.layers[0].owner[-40:] = 0  # control: 3 % of 40 entries is one entry, and it is enough
    mose.begin_task("c")
    assert [layer.num_new[1] for layer in mose.layers] == [1, 0, 0, 0]


def test_the_task_in_force_outlives_a_with_block_and_leaves_when_it_is_forgotten(tmp_path):
    base, mose = tiny()(data("a")).logits, learn(attach(), *"abc")
    with pytest.raises(KeyError), mose.task("a"):
        with mose.task(None):
            assert mose.active is None
        assert mose.active == "a"
        raise KeyError
    mose.forget("a")
    assert mose.active == "c"  # the last to be learned: neither the error nor forget() changed it
    mose.begin_task("d")
    with mose.task("b"):
        assert mose.active == "b"
    assert mose.active == "d"  # an open task comes back too
    mose.forget("d")
    mose.set_task("c")
    for active, gone in (("c", "c"), (["b", None], "b")):
        mose.set_task(active)
        mose.forget(gone)
        assert mose.active is None and torch.equal(mose.model(data("a")).logits, base)
    learn(mose, "a")  # its name was free again
    assert reloaded(mose, tmp_path / "m").active is None  # a file puts no task in force


def test_a_renamed_task_is_the_same_one_under_its_new_name(tmp_path):
    mose = learn(attach(), *"abc")
    before, prompts = snapshot(mose, *"abc"), data("new b")
    mose.set_task(["b", "a", None, "b"])
    mose.rename("b", "new")
    assert [*mose.tasks] == ["a", "new", "c"] and mose.active == ["new", "a", None, "new"]
    for each in (mose, reloaded(mose, tmp_path / "m")):
        assert torch.equal(snapshot(each, "a", "new", "c"), before)
        assert each.infer_task(prompts) == 4 * ["new"]
        refuses(r"unknown tasks \['b'\]", each.set_task, "b")
    mose.set_task("new")
    mose.rename("new", "b")
    assert mose.active == "b"


def test_training_goes_on_in_a_new_task_that_takes_the_name_of_its_source():
    mose = learn(learn(attach(), *"ab"), "more a", source="a")
    before, prompts = snapshot(mose, "more a", "b"), data("new a")
    assert mose.infer_task(prompts) != 4 * ["more a"]  # control: both tasks have such prompts
    mose.forget("a")
    mose.rename("more a", "a")
    assert torch.equal(snapshot(mose, "a", "b"), before)
    assert mose.infer_task(prompts) == 4 * ["a"]


def test_some_tasks_of_a_file_can_be_loaded_alone(tmp_path):
    mose, path = learn(attach(), *"abc"), tmp_path / "m"
    before, whole = snapshot(mose, *"ac"), reloaded(mose, path)
    part = MoSE.load(tiny(), path, tasks=["c", "a"])
    assert [*part.tasks] == [*"ac"] and torch.equal(snapshot(part, *"ac"), before)
    used, all_used = (sum(int((layer.owner > 0).sum()) for layer in each.layers)
                      for each in (part, whole))
    assert used < all_used  # control: "b" had entries of B, which nobody else reads
    model = tiny()
    says = r"it has no tasks \['z'\], expected some of \['a', 'b', 'c'\]"
    refuses(says, MoSE.load, model, path, ["z"])
    refuses("tasks: got 'abc', expected a list", MoSE.load, model, path, "abc")
    assert not any(module._forward_hooks for module in model.modules())


def interrupt(*args):
    raise KeyboardInterrupt


def test_an_interrupt_while_a_part_of_a_file_is_loaded_leaves_the_model_alone(
        guard, tmp_path, monkeypatch):
    # Off: nothing takes the experts off again.
    learn(attach(), *"ab").save(tmp_path / "m")
    model = tiny()
    monkeypatch.setattr(MoSE, "forget", interrupt)
    guard or monkeypatch.setattr(MoSE, "detach", lambda mose: None)
    with pytest.raises(KeyboardInterrupt):
        MoSE.load(model, tmp_path / "m", tasks=["b"])
    assert any(module._forward_hooks for module in model.modules()) != guard


def test_a_forget_that_fails_midway_leaves_the_bare_base_in_force(monkeypatch):
    mose = learn(attach(), *"ab")
    before = snapshot(mose, None, "a")
    assert mose.active == "b"
    monkeypatch.setattr(mose.layers[1], "clear", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mose.forget("b")
    assert mose.active is None and [*mose.tasks] == ["a"]
    with torch.no_grad():
        assert torch.equal(mose.model(data("a")).logits, before[0])
    monkeypatch.undo()
    assert torch.equal(snapshot(mose, "a")[0], before[1])
    assert any((layer.owner == 2).any() for layer in mose.layers)  # control: something is left
    mose.forget("a")  # the next one frees that as well
    assert not any(layer.owner.any() for layer in mose.layers)


def test_a_forget_that_runs_out_of_memory_changes_nothing_and_can_be_repeated(monkeypatch):
    mose = learn(attach(), *"ab")
    before, capacity = snapshot(mose, *"ab"), mose.capacity()
    monkeypatch.setattr(mose.layers[1], "unread", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mose.forget("b")
    assert torch.equal(snapshot(mose, *"ab"), before) and mose.capacity() == capacity
    assert {*mose.keys.tasks} == {*"ab"}
    monkeypatch.undo()
    mose.forget("b")
    assert not any((layer.owner == 2).any() or 2 in layer.routers for layer in mose.layers)


class Interrupting(dict):
    """Routers, in the place of a layer's: an interrupt comes before one can be stored."""

    __setitem__ = interrupt


def test_an_interrupted_end_of_a_task_can_be_repeated(guard, monkeypatch):
    mose = learn(attach(), "a", end=False)
    before = snapshot(mose, "a")
    monkeypatch.setattr(mose.layers[1], "routers", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        mose.end_task()
    monkeypatch.undo()
    assert mose.open == "a" and mose.layers[1].owner.any()  # it owns its entries, and no router yet
    assert torch.equal(snapshot(mose, "a"), before)
    if not guard:  # Off: a second set of entries is selected, from those that are left.
        for layer in mose.layers:
            monkeypatch.setattr(layer, "number", 0)
    selected = [int(layer.select().sum()) for layer in mose.layers]
    assert (torch.equal(mose.layers[1].select(), mose.layers[1].owner > 0)) == guard
    monkeypatch.undo()
    mose.end_task()
    assert [int((layer.owner > 0).sum()) for layer in mose.layers] == selected
    assert torch.equal(snapshot(mose, "a"), before)


@pytest.mark.parametrize("says, call", [
    ("is open: call begin_task", MoSE.end_task), ("call begin_task", MoSE.trainable_parameters),
    (r"source: got 'z'.*\['a', 'b'\]", lambda mose: mose.begin_task("c", "z")),
    ("need: got 1.5", lambda mose: mose.begin_task("c", "a", 1.5)),
    ("need: got -0.1", lambda mose: mose.begin_task("c", "a", -0.1)),
    ("need: got nan", lambda mose: mose.begin_task("c", "a", math.nan)),
    ("got 3 as a name, expected a str", lambda mose: mose.begin_task(3)),
    (r"can't rename 'z'.*\['a', 'b'\]", lambda mose: mose.rename("z", "c")),
    ("there is a task 'b' already", lambda mose: mose.rename("a", "b")),
    ("empty list of tasks", lambda mose: mose.set_task([])),
    ("no task is open: call begin_task", lambda mose: mose.observe(data("a"))),
    (r"unknown tasks \['z'\].*\['a', 'b'\]", lambda mose: mose.set_task("z")),
    (r"unknown tasks \['z'\].*\['a', 'b'\]", lambda mose: mose.set_task(["a", "z"])),
    (r"'a' is finished: expected a new name", lambda mose: mose.begin_task("a")),
    (r"'c' is open: end_task\(\)", lambda mose: [mose.begin_task(name) for name in "cd"]),
    (r"'z'.*one of \['a', 'b'\]", lambda mose: mose.forget("z")),
    (r"'a': expected one of \['c'\]", lambda mose: (mose.begin_task("c"), mose.forget("a"))),
    ("unknown task 'z'", lambda mose: mose.observe(data("a"), task="z")),
    ("no task has a key", lambda mose: attach().infer_task(data("a"))),
    ("nothing but padding", lambda mose: mose.infer_task(data("a"), torch.zeros(4, 8))),
    ("is attached to this model already: detach", lambda mose: MoSE(mose.model)),
    # (This is refused before the file, which is no adapter, is read.)
    ("is attached to this model already: detach", lambda mose: MoSE.load(mose.model, __file__)),
    ("a list of 2 tasks.*as many rows", lambda mose: snapshot(mose, ["a", "b"], ids=data("a", 4))),
    (r"has the name \['c'\]; there are .*'v_proj'", lambda _: MoSE(tiny(), MoSEConfig("c"))),
    (r"has the name \['embed_tokens'\]", lambda _: MoSE(tiny(), MoSEConfig("embed_tokens"))),
    (r"offloaded \(meta device\)", lambda _: MoSE(tiny().to("meta"))),
])
def test_a_mistake_is_answered_by_what_to_do_and_harms_no_task(says, call):
    mose = learn(attach(), "a", "b")
    before = snapshot(mose, "a", "b")
    refuses(says, call, mose)
    assert torch.equal(snapshot(mose, "a", "b"), before)


def test_a_loss_of_nan_costs_only_the_open_task():
    mose = learn(attach(), "a", "b")
    before, start = snapshot(mose, "a", "b"), snapshot(mose, None)
    mose.begin_task("c")
    step(mose.model, adam(mose), data("c"), factor=math.nan)
    refuses(r"'c' has weights that are not finite: forget\(\)", mose.end_task)
    mose.forget("c")
    assert torch.equal(snapshot(mose, "a", "b"), before)
    mose.begin_task("c")
    assert torch.equal(snapshot(mose, "c"), start)  # as if nothing had been


# ------------------------------------------------------------------------------ which task runs


@every_kind
def test_each_example_of_a_batch_may_run_its_own_task(kind):
    mose, ids = learn(attach(kind), "a", "b"), data("c", 4)
    tasks, others = ["b", None, "a", "b"], [None, "a", "b"]
    mixed, alone = snapshot(mose, tasks, ids=ids)[0], snapshot(mose, *others, ids=ids)
    for i, task in enumerate(tasks):  # control: it is not what the other tasks say
        fits = [torch.allclose(mixed[i], logits[i], atol=1e-4) for logits in alone]
        assert fits == [task == other for other in others]


@pytest.mark.parametrize("task", ["a", ["a", "b", None]], ids=["one", "mixed"])
def test_generation_is_the_same_without_the_cache_and_without_padding(task):
    mose, ids = learn(attach("grouped"), "a", "b", steps=20), data("c", 3)
    mask = torch.ones_like(ids)
    ids[1, :3] = mask[1, :3] = 0  # left-padded

    def answers(task, ids=ids, mask=mask, **other):
        with mose.task(task):
            return mose.model.generate(ids, attention_mask=mask, max_new_tokens=8, **other)[:, -8:]

    cached, base = answers(task), answers(None)
    assert torch.equal(cached, answers(task, use_cache=False))
    second = task[1] if isinstance(task, list) else task
    assert torch.equal(cached[1:2], answers(second, ids[1:2, 3:], mask[1:2, 3:]))
    for i in (0, 1):  # control: the base says something else
        assert not torch.equal(cached[i], base[i])


# ------------------------------------------------------------------------------ task keys


@pytest.mark.parametrize("key_dim", [256, 16])  # the embeddings have 32 numbers
def test_a_prompt_finds_its_task_without_a_pass_through_the_model(key_dim, monkeypatch):
    mose = attach(key_dim=key_dim)
    mose.model.get_input_embeddings().weight.data[48:56] *= 4  # the tokens of "f", like no others
    learn(mose, *"abc")
    assert mose.keys.tasks["a"][1].shape == (min(key_dim, 32),)
    for module in mose.model.modules():
        monkeypatch.setattr(module, "forward", None)
    prompts = torch.cat([data(f"new {name}", 1) for name in "bacabf"])  # "f" is far from them all
    for opened in (False, True):
        names, sure = mose.infer_task(prompts, return_confidence=True)
        assert names[:5] == [*"bacab"] and min(sure[:5]) > 0.9 and sure[5] < 0.01
        # Each prompt is judged alone.
        assert names == [mose.infer_task(prompt[None])[0] for prompt in prompts]
        if not opened:
            mose.begin_task("d")
            mose.observe(data("d", 200))
            # A task that is still open is never the answer, not even for its own prompts.
            assert "d" not in mose.infer_task(data("new d"))
    mose.forget("d")
    mose.forget("b")
    assert mose.infer_task(prompts)[1:4] == [*"aca"] and {*mose.keys.tasks} == {*"ac"}


def test_neither_a_key_nor_its_sums_keep_a_prompt_so_they_do_not_grow_with_them():
    mose = learn(attach(), "b")
    mose.begin_task("a")
    mose.observe(data("a", 20))  # these hold all tokens of the task
    mose.observe(data("b", 20), task="b")
    for prompts, what in (("a", lambda: mose.open_sums), ("b", lambda: mose.keys.tasks["b"])):
        size = len(pickle.dumps(what()))
        more = data(f"more {prompts}", 200)
        mose.observe(more, task=prompts)
        assert len(pickle.dumps(what())) <= size + 50  # the counts have more digits
        assert len(pickle.dumps((what(), more))) > size + 50  # control: if the prompts were kept


def test_a_token_that_occurs_n_times_counts_1_plus_log_n_times():
    tokens, weights = attach().keys.tokens_and_weights(torch.tensor([9, 9, 5, 9]))
    assert tokens.tolist() == [5, 9]
    assert torch.allclose(weights[1] / weights[0], torch.tensor(1 + math.log(3)))
    assert torch.allclose(weights.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("copies", [1, 50])  # copies have no spread: a covariance of 0
def test_one_prompt_is_enough_for_a_key(copies, guard, monkeypatch):
    # Off: there is no imaginary prompt, so the variances are 0, or nothing but rounding.
    guard or monkeypatch.setattr(TaskKeys, "IMAGINARY", 0.0)
    mose = attach()
    fails = pytest.raises((ValueError, RuntimeError), match="math domain|not positive-definite")
    with contextlib.nullcontext() if guard else fails:
        for name in "abc":
            mose.begin_task(name)
            mose.observe(data(name, 1).repeat(copies, 1))
            mose.end_task()
        assert mose.infer_task(torch.cat([data(name, 1) for name in "cab"])) == [*"cab"]


def test_a_task_without_prompts_gives_a_warning_and_prompts_may_come_later():
    mose = learn(attach(), "a", "c")
    mose.begin_task("b")
    with pytest.warns(UserWarning, match="'b' has no key.*observe"):
        mose.end_task()
    new = torch.cat([data("new a"), data("new b")])
    assert mose.infer_task(new)[:4] == [*"aaaa"]  # the others can still be found
    mose.observe(data("b", 40), task="b")
    assert mose.infer_task(new) == [*"aaaabbbb"]


def test_prompts_that_come_in_portions_make_the_same_mean_and_variance():
    whole, late = attach(), learn(attach(), "a", "b")
    prompts = data("b", 64), data("more b", 64)
    for name in "ab":
        whole.begin_task(name)
        whole.observe(torch.cat(prompts) if name == "b" else data("a", 64))
        whole.end_task()
    late.observe(prompts[1], task="b")
    count, mean, variance, _ = whole.keys.tasks["b"]
    late_count, late_mean, late_variance, _ = late.keys.tasks["b"]
    assert count == late_count == 128
    assert torch.allclose(mean, late_mean, rtol=1e-4)
    assert math.isclose(variance, late_variance, rel_tol=1e-4)


# 32 tokens that tell nothing about a task: the tasks a to d below use others, 8 to 39.
TEMPLATE = torch.cat([torch.arange(40, 64), torch.arange(8)]).expand(64, 32)


@pytest.mark.parametrize("shared, guard", [(False, True), (True, True), (True, False)],
                         ids=["plain", "template", "template-control"])
def test_a_prompt_of_no_task_is_doubted_also_behind_text_that_all_share(shared, guard, monkeypatch):
    # Off: the shared text is a part of each prompt like any other, and it fits every task.
    nothing = torch.tensor([], dtype=torch.long)
    guard or monkeypatch.setattr("mose.TaskKeys.shared_tokens", lambda keys: nothing)
    mose, size = attach(), 32 if shared else 0

    def prompts(name, count, length=3):
        return torch.cat([TEMPLATE[:count, :size], data(name, count, length)], dim=1)

    for name in "ab":
        mose.begin_task(name)
        mose.observe(prompts(name, 64))
        mose.end_task()
    own = torch.cat([prompts(f"new {name}", 20) for name in "ab"])
    # These fit no task. They have one token of their own, so the shared text is most of them.
    far = torch.cat([prompts(f"new {name}", 20, length=1) for name in "cd"])
    names, sure = mose.infer_task(own, return_confidence=True)
    assert names == 20 * ["a"] + 20 * ["b"] and min(sure) > 0.5
    if shared and guard:  # a prompt of nothing else says nothing
        assert mose.infer_task(TEMPLATE[:1], return_confidence=True)[1] == [0.0]
    _, far_sure = mose.infer_task(far, return_confidence=True)
    assert (max(far_sure) < 0.5) == guard


def test_a_task_of_short_prompts_is_found_beside_long_ones(guard):
    mose = attach()
    # First of 24 tokens, and length. The tokens of the three overlap, and the prompts of "short"
    # vary most, so they are often nearer to the mean of another task.
    shape_of = {"a": (0, 200), "b": (12, 200), "short": (6, 2)}

    def prompts(name, seed, count=60):
        first, length = shape_of[name]
        draw = torch.Generator().manual_seed(seed)
        return first + torch.randint(24, (count, length), generator=draw)

    for i, name in enumerate(shape_of):
        mose.begin_task(name)
        mose.observe(prompts(name, i))
        mose.end_task()
    if not guard:  # off: one variance for all tasks
        tasks = mose.keys.tasks
        typical = sum(variance for _, _, variance, _ in tasks.values()) / len(tasks)
        for name, (count, mean, _, common) in [*tasks.items()]:
            tasks[name] = count, mean, typical, common
    names, sure = mose.infer_task(prompts("short", 9), return_confidence=True)
    assert (names == ["short"] * 60 and sum(s < 0.5 for s in sure) <= 3) == guard
    for name in "ab":
        found = mose.infer_task(prompts(name, 9))
        if guard:
            assert found == [name] * 60


def test_a_task_whose_prompts_are_mostly_shared_text_is_found(guard, monkeypatch):
    def undivided(keys, name, table, shared, own_distribution=TaskKeys.own_distribution):
        mean, deviation = own_distribution(keys, name, table, shared)
        common = keys.tasks[name][-1]
        left = 1 - sum(common[token] for token in shared.tolist())
        return left * mean, left * deviation

    # Off: nothing is divided by the share of own text, which is small where most is shared.
    guard or monkeypatch.setattr(TaskKeys, "own_distribution", undivided)
    mose = attach()
    shape_of = {"a": (8, 1), "b": (16, 16)}  # first of 8 tokens, how many own ones a prompt has

    def prompts(name, seed, count):
        first, length = shape_of[name]
        draw = torch.Generator().manual_seed(seed)
        own = first + torch.randint(8, (count, length), generator=draw)
        return torch.cat([TEMPLATE[:count], own], dim=1)

    for seed, name in enumerate(shape_of):
        mose.begin_task(name)
        mose.observe(prompts(name, seed, 64))
        mose.end_task()
    found = [mose.infer_task(prompts(name, 9, 20)) for name in shape_of]
    assert (found == [20 * ["a"], 20 * ["b"]]) == guard


def test_a_task_of_nothing_but_shared_text_is_found(guard, monkeypatch):
    # Off: its text counts as shared, and nothing is left of it.
    guard or monkeypatch.setattr(TaskKeys, "LEAST_OWN", -math.inf)
    mose = attach()
    prompts = {"constant": TEMPLATE, "b": torch.cat([TEMPLATE, data("b", 64, 16)], dim=1)}
    for name, its_prompts in prompts.items():
        mose.begin_task(name)
        mose.observe(its_prompts)
        mose.end_task()
    try:
        found = [mose.infer_task(its_prompts[:20]) for its_prompts in prompts.values()]
    except (ZeroDivisionError, ValueError):  # the division by nothing, or the log of it
        found = None
    assert (found == [20 * ["constant"], 20 * ["b"]]) == guard


def test_a_few_prompts_without_the_system_prompt_spoil_no_key(guard, monkeypatch):
    # Off: a Gaussian, which is a t distribution with very many degrees of freedom.
    guard or monkeypatch.setattr(TaskKeys, "FREEDOM", 10**6)
    draw = torch.Generator().manual_seed(0)
    system_prompt = (40 + torch.randint(24, (200,), generator=draw)).expand(90, 200)
    mose = attach()
    for name in "abcd":
        mose.begin_task(name)
        mose.observe(torch.cat([system_prompt, data(name, 90)], dim=1))
        mose.observe(data(f"more {name}", 10))
        mose.end_task()
    right = 0
    for name in "abcd":
        prompts = torch.cat([system_prompt[:20], data(f"new {name}", 20)], dim=1)
        right += mose.infer_task(prompts).count(name)
    assert (right > 60) == guard  # of 80


def test_padding_is_no_part_of_a_prompt():
    mose, ids = learn(attach(), *"abc"), data("new b", 2)
    padded = torch.cat([data("a", 2, 20), ids], dim=1)  # its padding looks like task "a"
    answer = mose.infer_task(ids, return_confidence=True)
    own = (torch.arange(28) >= 20).expand(2, 28)
    assert mose.infer_task(padded, own, return_confidence=True) == answer
    assert answer[0] == ["b", "b"]
    assert mose.infer_task(padded) != answer[0]  # control: without the mask
    keys = []
    for prompts, mask in ((ids, None), (padded, own), (padded, None)):
        other = attach()
        other.begin_task("b")
        other.observe(prompts, mask)
        other.end_task()
        keys.append(other.keys.tasks["b"][1])
    assert torch.equal(keys[0], keys[1]) and not torch.equal(keys[0], keys[2])


# ------------------------------------------------------------------------------ the model around it


def test_detaching_gives_back_the_base_bit_for_bit():
    model = tiny()
    model.lm_head.requires_grad_(False)
    before = copy.deepcopy(model)
    for _ in range(2):  # it can be attached to again
        mose = learn(MoSE(model), "a")
        assert not torch.equal(model(data("a")).logits, before(data("a")).logits)  # control
        mose.detach()
    for p, old in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, old) and p.requires_grad == old.requires_grad
    assert torch.equal(model(data("a")).logits, before(data("a")).logits)


def test_a_deepcopy_has_a_life_of_its_own(guard):
    mose = learn(attach(), "a", end=False)
    hooks = mose.model.model.layers[0].self_attn.v_proj._forward_hooks
    # Off: a function instead of a method goes on with the original's experts.
    guard or hooks.update({key: lambda *args, f=f: f(*args) for key, f in hooks.items()})
    logits = mose.model(data("a")).logits  # deepcopy has to cope with its graph, which is alive
    other = copy.deepcopy(mose)
    mose.set_task(None)
    assert torch.equal(mose.model(data("a")).logits, tiny()(data("a")).logits)
    assert torch.equal(other.model(data("a")).logits, logits) == guard
    other.end_task()
    learn(other, "b").detach()
    assert torch.equal(snapshot(mose, "a")[0], logits)


def test_the_saved_base_holds_no_adapter_when_no_task_is_open(guard, monkeypatch, tmp_path):
    # Off: the Parameters are in state_dict() though no task is open.
    guard or monkeypatch.setattr(
        SubExperts, "_save_to_state_dict", torch.nn.Module._save_to_state_dict)
    model = learn(attach(), "a").model
    model.save_pretrained(tmp_path)
    assert (b"sub_experts" not in (tmp_path / "model.safetensors").read_bytes()) == guard
    logits = AutoModelForCausalLM.from_pretrained(tmp_path)(data("a")).logits
    assert torch.equal(logits, tiny()(data("a")).logits)


# ------------------------------------------------------------------------------ cost, and the file


@pytest.mark.parametrize("more", [{}, {"round_to_bf16": True}, {"fixed_A": True}], ids=str)
def test_capacity_counts_the_bytes_of_the_file(more, tmp_path):
    mose, sizes, counted = attach("grouped", router_dim=4, **more), [], []
    for name in "abcdefgh":
        learn(mose, name)
        mose.save(tmp_path / "m")
        sizes.append((tmp_path / "m").stat().st_size)
        report = [*mose.capacity().values()]
        counted.append({kind: sum(entry["bytes"][kind] for entry in report)
                        for kind in report[0]["bytes"]})
        used = sum(int((layer.owner > 0).sum()) for layer in mose.layers)
        total = sum(len(layer.owner) for layer in mose.layers)
        assert sum(entry["new"] for entry in report) == used
        assert report[-1]["share"] == used / total
    assert abs(sizes[0] - sum(counted[0].values())) < 2000  # what the container takes
    # What seven more tasks add: the container hardly counts there.
    added = sizes[-1] - sizes[0]
    grown = {kind: counted[-1][kind] - counted[0][kind] for kind in counted[0]}
    total, tolerance = sum(grown.values()), 0.05 * added
    assert abs(added - total) < tolerance
    for kind in grown:  # controls: if one kind were not counted
        assert abs(added - (total - grown[kind])) > tolerance


def test_what_a_task_has_learned_may_be_rounded_to_bf16_and_then_takes_fewer_bytes(tmp_path):
    sizes = {}
    for on in (False, True):  # False: control
        mose = learn(learn(attach(round_to_bf16=on), *"ab"), "c", source="a")
        for layer in mose.layers:
            for numbers in (layer.frozen, *layer.routers.values()):
                assert numbers.dtype == torch.float32
                assert torch.equal(numbers, numbers.bfloat16().float()) == on
        before = snapshot(mose, *"abc")
        assert torch.equal(snapshot(reloaded(mose, tmp_path / "m"), *"abc"), before)
        size = mose.capacity()["b"]["bytes"]
        sizes[on] = size["values"] + size["routers"]
    assert sizes[True] < 0.6 * sizes[False]


def test_learning_goes_on_after_loading_as_if_it_had_never_stopped(tmp_path):
    mose = learn(attach(), "a")
    again = reloaded(mose, tmp_path / "m")
    for m in (mose, again):
        torch.manual_seed(1)  # begin_task draws its seed from torch's generator
        learn(m, "b")
    assert torch.equal(snapshot(mose, "a", "b"), snapshot(again, "a", "b"))
    assert mose.infer_task(data("b")) == again.infer_task(data("b")) == [*"bbbb"]


def test_a_file_fits_its_base_in_any_precision_and_no_other_base(tmp_path):
    path = tmp_path / "m"
    for dtype in (torch.bfloat16, torch.float16):
        mose = learn(attach(dtype=dtype), "a")
        again = reloaded(mose, path)  # onto a base of fp32
        assert again.tasks == {"a": [1]}
        for one, two in zip(mose.layers, again.layers):
            assert torch.equal(one.owner, two.owner) and torch.equal(one.frozen, two.frozen)
            assert torch.equal(one.routers[1], two.routers[1])
    other = tiny()
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 0.5
    refuses("1 differ: model.layers.0.mlp.up_proj", MoSE.load, other, path)
    refuses("no linear layer has the name.*there are", MoSE.load, tiny("fused"), path)


def test_a_damaged_file_or_one_of_another_format_is_refused(tmp_path):
    path = tmp_path / "m"
    learn(attach(), "a").save(path)
    MoSE.load(tiny(), path)  # control
    whole = path.read_bytes()
    one_bit = whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]  # in the compressed part
    for damaged in (whole[:-100], one_bit):
        path.write_bytes(damaged)
        refuses("damaged", MoSE.load, tiny(), path)
    for begin in (b"", b"MoSE 3\n"):  # an empty file, and how earlier files began
        path.write_bytes(begin and begin + whole[7:])
        says = f"its format is {begin!r}, expected {whole[:7]!r}"
        refuses(re.escape(says), MoSE.load, tiny(), path)


def test_a_save_that_breaks_off_leaves_the_old_file_whole(guard, monkeypatch, tmp_path):
    mose, path = learn(attach(), "a"), tmp_path / "m"
    mose.save(path)
    old = path.read_bytes()
    monkeypatch.setattr("mose.os.fsync", lambda _: 1 / 0)
    # Off: written in place.
    guard or monkeypatch.setattr("mose.open", lambda _, mode: open(path, mode), raising=False)
    with pytest.raises(ZeroDivisionError):
        learn(mose, "b").save(path)
    assert (path.read_bytes() == old) == guard
    assert [*tmp_path.iterdir()] == [path]  # nothing half written is left


def test_targets_that_are_no_names_are_refused():
    for targets in (3, None, {"q_proj": 1}):
        refuses("targets: got", MoSEConfig, targets)
    refuses("targets: got none", MoSEConfig, ())
    refuses("got 3 as a name, expected a str", MoSEConfig, ("q_proj", 3))
    assert MoSEConfig(["q_proj"]) == MoSEConfig({"q_proj"}) == MoSEConfig("q_proj")  # control


@pytest.mark.parametrize(
    "field", "num_experts rank top_k density scale router_dim router_std key_dim".split())
def test_a_value_out_of_range_names_its_field(field):
    more = {"density": [1.01], "scale": [], "router_std": []}  # of floats; all others are integers
    for value in [0, -1, math.nan, math.inf, "1", *more.get(field, [1.5, 5.5])]:
        # (top_k=1, since num_experts=1 has to be possible.)
        refuses(f"{field}: got", lambda: MoSEConfig(**{"top_k": 1, field: value}))
    MoSEConfig(**{"top_k": 1, field: 1})  # control: 1 is in every range
    refuses("top_k: got 5", lambda: MoSEConfig(top_k=5))


@pytest.mark.parametrize("field", ["fixed_A", "round_to_bf16"])
def test_a_switch_is_a_bool(field):
    for value in (0, 1, "yes", None):
        refuses(f"{field}: got {value!r}, expected a bool", lambda: MoSEConfig(**{field: value}))
    assert getattr(MoSEConfig(**{field: True}), field)  # control
