"""Any linear layer can be a target: which layers learn, which are refused, and what a layer is given."""

import copy
import gc
import importlib
import shutil
import sys
import threading
import types
import weakref
from pathlib import Path

import pytest
import torch
import transformers

import mose as module
from mose import MoSE, MoSEConfig, SubExperts
from test_mose import data, guard, learn, refuses, snapshot, tiny  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------ bases


def seq2seq(kind):
    """An encoder and a decoder of one block each. The decoder attends to what was encoded."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_layers": 1,
             "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    other = {"init_std": 0.2, "pad_token_id": 0, "decoder_start_token_id": 0, "bos_token_id": 0,
             "eos_token_id": None, "forced_eos_token_id": None}
    config = transformers.AutoConfig.for_model(kind, **sizes, **other)
    return transformers.AutoModelForSeq2SeqLM.from_config(config).eval()


def latent():
    """Multi-head latent attention: keys and values are made from 16 compressed numbers."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4,
        n_group=2, topk_group=1, num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=24,
        qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8, first_k_dense_replace=1,
        initializer_range=0.2, eos_token_id=None)
    return transformers.DeepseekV3ForCausalLM(config).eval()


class ManyExperts(torch.nn.Module):
    """A language model with a Mixture-of-Experts MLP. Even tokens go to the expert "even", odd ones
    to the other: each gets its tokens as (number of tokens, D), without their batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(64, 32)
        self.even, self.odd, self.head = (torch.nn.Linear(32, out) for out in (32, 32, 64))

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, labels=None):
        x = self.table(input_ids)
        y = torch.zeros_like(x)
        for rest, expert in enumerate((self.even, self.odd)):
            own = input_ids % 2 == rest  # (B, T)
            y[own] = expert(x[own])  # (number of tokens, D)
        logits = self.head(x + y)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1),
                                                 input_ids[:, 1:].flatten())
        return types.SimpleNamespace(logits=logits, loss=loss)


@torch.no_grad()
def said(mose, task, ids=data("a")):
    """Logits (B, T, V) under a task; a decoder gets the same tokens as the encoder, shifted."""
    with mose.task(task):
        return mose.model(input_ids=ids, labels=ids).logits


def generated(mose, task, ids, **options):
    """(answers, logits of each answered token)."""
    with mose.task(task):
        out = mose.model.generate(ids, max_new_tokens=6, pad_token_id=0, output_logits=True,
                                  return_dict_in_generate=True, **options)
    return out.sequences, torch.stack(out.logits)


# ------------------------------------------------------------------------------ which can learn


@pytest.mark.parametrize("model, targets, count", [
    (tiny, "o_proj", 2), (tiny, ("gate_proj", "up_proj", "down_proj"), 6), (tiny, "lm_head", 1),
    (tiny, "layers.1.self_attn.q_proj", 1),
    (lambda: tiny("fused"), ("query_key_value", "dense_4h_to_h"), 4),
    (lambda: tiny("conv1d"), ("c_attn", "c_fc", "attn.c_proj"), 6),
    (lambda: seq2seq("t5"), ("q", "v"), 6),  # of the encoder, the decoder, and from one to the other
    (lambda: seq2seq("t5"), ("EncDecAttention.k", "EncDecAttention.v"), 2),
    (lambda: seq2seq("bart"), ("encoder_attn.q_proj", "encoder_attn.v_proj"), 2),
    (latent, ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), 10),
], ids=["o", "mlp", "lm_head", "one path", "fused", "conv1d", "t5", "t5 cross", "bart cross", "mla"])
def test_any_linear_layer_that_is_named_learns_and_does_not_forget(model, targets, count, guard,
                                                                   monkeypatch):
    if not guard:  # off: what a finished task reads lies where the next optimizer moves it
        finish = SubExperts.finish
        monkeypatch.setattr(SubExperts, "finish", lambda layer, *given: (
            finish(layer, *given), setattr(layer, "frozen", layer.weight.detach())))
    mose, falls = MoSE(model(), MoSEConfig(targets=targets)), []
    assert len(mose.layers) == count
    before = said(learn(mose, "a", falls=falls), "a")
    assert torch.equal(said(learn(mose, "b", falls=falls), "a"), before) == guard
    assert min(falls) > 0
    if guard:
        each_row_has_its_task_with_and_without_the_cache(mose)


def each_row_has_its_task_with_and_without_the_cache(mose):
    ids, names = data("c", 2), ["b", "a"]
    mixed, alone = said(mose, names, ids), [said(mose, name, ids) for name in "ab"]
    for row, name in enumerate(names):  # control: it is not what the other task says
        fits = [torch.allclose(mixed[row], logits[row], atol=1e-4) for logits in alone]
        assert fits == [other == name for other in "ab"]
    answers, logits = generated(mose, names, ids)
    again = generated(mose, names, ids, use_cache=False)
    assert torch.equal(answers, again[0]) and torch.allclose(logits, again[1], atol=1e-4)
    assert not torch.allclose(logits, generated(mose, None, ids)[1], atol=1e-4)  # control


@pytest.mark.parametrize("experts", [1, 4])
def test_a_task_of_one_expert_can_be_merged_into_the_base(experts):
    """By the recipe of the page. Control: with more experts it is not the same."""
    page = (ROOT / "docs/works-with.md").read_text(encoding="utf-8")
    recipe = page.split("**Merging a task into the base.**")[1].split("```python\n")[1]
    config = MoSEConfig(num_experts=experts, top_k=1, density=0.3)
    mose = learn(MoSE(tiny(), config), "other", "FOMC")
    bare, before = said(mose, None), said(mose, "FOMC")
    exec(recipe.split("```")[0], {"mose": mose, "model": mose.model})
    merged = said(MoSE(mose.model), None)
    assert not torch.allclose(bare, before, atol=1e-3)  # control: the task says something
    assert torch.allclose(merged, before, atol=1e-4) == (experts == 1)


@pytest.mark.parametrize("name", ["nope", "embed_tokens", "input_layernorm", "self_attn", "proj"])
def test_a_name_that_no_linear_layer_has_is_answered_by_those_there_are(name):
    base, there = tiny(), ["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj",
                           "up_proj", "v_proj"]
    with pytest.raises(ValueError) as error:
        MoSE(base, MoSEConfig(targets=("q_proj", name)))
    assert str(error.value) == f"targets: no linear layer has the name {[name]}; there are {there}"
    assert all(p.requires_grad for p in base.parameters())
    assert len(MoSE(base, MoSEConfig(targets=there)).layers) == 2 * 7 + 1  # control: these can


# ------------------------------------------------------------------------------ without their batch


def test_a_layer_that_gets_tokens_without_their_batch_has_one_task_and_never_a_list(guard,
                                                                                   monkeypatch):
    mose = MoSE(ManyExperts(), MoSEConfig(targets=("even", "odd"), density=0.03))
    before = snapshot(learn(mose, "a"), "a")
    assert torch.equal(snapshot(learn(mose, "b"), "a"), before)
    ids = torch.tensor([[0, 1], [2, 4]])  # "even" gets 3 tokens, and "odd" one
    alone = [snapshot(mose, name, ids=ids)[0] for name in "ab"]
    assert not torch.allclose(*alone, atol=1e-4)
    refuses("A layer that gets tokens without their batch takes one task only", snapshot, mose,
            ["a", "b"])
    ids = torch.tensor([[0, 2], [1, 3]])  # "even" gets 2 tokens, as many as the list has tasks
    if guard:
        refuses(r"a list of 2 tasks.* a layer got \(2, 32\)", lambda: snapshot(
            mose, ["a", "b"], ids=ids))
        return
    # Off: the number of rows alone is compared. Then a token of row 0 gets the task of row 1.
    monkeypatch.setattr(module, "expect_rows", lambda x, rows: module.expect(len(x) == rows, ""))
    wrong = snapshot(mose, ["a", "b"], ids=ids)[0, 0, 1]
    one, other = (snapshot(mose, name, ids=ids)[0, 0, 1] for name in "ab")
    assert torch.allclose(wrong, other, atol=1e-5) and not torch.allclose(wrong, one, atol=1e-4)


def test_an_expert_that_gets_no_token_changes_nothing():
    mose, ids = MoSE(ManyExperts(), MoSEConfig(targets=("even", "odd"), density=0.1)), data("a") // 2 * 2
    for name in "ab":
        mose.begin_task(name)
        mose.observe(ids)
        optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=0.03)
        mose.model(ids).loss.backward()  # "odd" gets (0, D)
        optimizer.step()
        with pytest.warns(UserWarning, match="'odd'.*No gradient reached them"):
            mose.end_task()
    assert snapshot(mose, "a", ids=ids).isfinite().all()
    odd = data("a") // 2 * 2 + 1
    assert torch.equal(snapshot(mose, "a", ids=odd), snapshot(mose, None, ids=odd))
    assert not torch.equal(snapshot(mose, "a", ids=ids), snapshot(mose, None, ids=ids))  # control


def test_examples_packed_into_one_row_have_one_task_in_common():
    mose, ids = learn(MoSE(tiny()), *"ab"), data("c", 2)
    places = torch.arange(8).repeat(2)[None]  # (1, 16): positions begin anew with each example

    def packed(task, **more):
        with mose.task(task), torch.no_grad():
            return mose.model(ids.view(1, 16), use_cache=False, **more).logits.view(2, 8, 64)

    apart = snapshot(mose, "a", ids=ids)[0]
    assert torch.allclose(packed("a", position_ids=places), apart, atol=1e-4)
    assert torch.allclose(packed(["a"], position_ids=places), apart, atol=1e-4)
    assert not torch.allclose(packed("a"), apart, atol=1e-4)  # control: as one long example
    for names in (["a", "b"], ["a"] * 4):  # 1 and 16 could be taken for a part or a multiple
        refuses(rf"a list of {len(names)} tasks.*got \(1, 16, 32\).*as many rows", packed, names)


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "a"], ["a", "b"] * 4])
def test_a_list_needs_a_name_for_each_row_and_no_number_is_guessed(names):
    mose, ids = learn(MoSE(tiny()), *"ab"), data("c", 4)
    refuses(f"a list of {len(names)} tasks is in force, and a layer got .4, 8, 32.: expected as "
            "many rows.*repeat its name as often", snapshot, mose, names)
    assert snapshot(mose, ["a", "b"] * 2, ids=ids).shape == (1, 4, 8, 64)  # control
    beams = {"num_beams": 2, "max_new_tokens": 3}
    with mose.task(["a", "b"] * 2):
        refuses("a list of 4 tasks", lambda: mose.model.generate(ids, **beams))
    with mose.task(["a", "a", "b", "b"] * 2):
        assert len(mose.model.generate(ids, **beams)) == 4  # control: repeated as `generate` does


def test_beams_of_an_encoder_and_a_decoder_take_a_list_on_the_decoder_alone():
    ids, beams = data("c", 2), {"num_beams": 2}
    mose = learn(MoSE(seq2seq("t5"), MoSEConfig(targets=("q", "v"), density=0.1)), *"ab", steps=9)
    alone, bare = ([generated(mose, task, ids[i:i + 1], **beams)[0] for i in range(2)]
                   for task in ("a", None))
    together = generated(mose, "a", ids, **beams)[0].chunk(2)
    assert all(map(torch.equal, together, alone))
    assert not all(map(torch.equal, together, bare))  # control
    for times in (1, 2):  # the encoder gets 2 rows, and the decoder 4
        refuses(f"a list of {2 * times} tasks", lambda: generated(
            mose, ["a"] * 2 * times, ids, **beams))
    mose = learn(MoSE(seq2seq("t5"), MoSEConfig(targets=("decoder.block.0.layer.0.SelfAttention.q",
                                                         "EncDecAttention.v"))), *"ab")
    _, mixed = generated(mose, ["a", "a", "b", "b"], ids, **beams)  # logits (6 tokens, 4 rows, V)
    for row, name in enumerate("ab"):  # control: it is not what the other task says
        fits = [torch.allclose(mixed[:, 2 * row:2 * row + 2], generated(
            mose, other, ids[row:row + 1], **beams)[1], atol=1e-4) for other in "ab"]
        assert fits == [other == name for other in "ab"]


# ------------------------------------------------------------------------------ which layers are there


def test_a_layer_that_stands_in_two_places_has_one_pool_for_both():
    model = tiny()
    first, second = (block.self_attn for block in model.model.layers)
    second.q_proj = first.q_proj
    bare = model(data("a")).logits
    mose, falls = MoSE(model), []
    assert len(mose.layers) == 3  # control: four layers would have four
    before = snapshot(learn(mose, "a", falls=falls), "a")
    assert torch.equal(snapshot(learn(mose, "b"), "a"), before) and falls[0] > 0
    inputs, delta = [], SubExperts.delta
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SubExperts, "delta", lambda *x: inputs.append(x) or delta(*x))
        snapshot(mose, "a")
    assert [layer for layer, *_ in inputs].count(first.q_proj.sub_experts) == 2
    mose.detach()
    assert torch.equal(model(data("a")).logits, bare)


@pytest.mark.parametrize("name", ["q_proj", "other"])
def test_a_layer_with_two_names_is_found_by_either(name):
    model = tiny()
    attention = model.model.layers[0].self_attn
    attention.other = attention.q_proj
    mose = MoSE(model, MoSEConfig(targets=(f"layers.0.self_attn.{name}",)))
    assert mose.layers == [attention.q_proj.sub_experts]


@pytest.mark.filterwarnings("ignore:target layers learned nothing")
def test_a_layer_that_is_never_called_harms_nothing(tmp_path):
    def idle():
        model = tiny()
        model.model.layers[0].idle = torch.nn.Linear(7, 9).requires_grad_(False)
        torch.nn.init.ones_(model.model.layers[0].idle.weight)
        torch.nn.init.ones_(model.model.layers[0].idle.bias)
        return model

    mose = MoSE(idle(), MoSEConfig(targets=("q_proj", "idle")))
    before = snapshot(learn(mose, "a"), "a")
    assert torch.equal(snapshot(learn(mose, "b"), "a"), before)
    assert not torch.equal(before, snapshot(mose, None))  # control: the others did learn
    mose.save(tmp_path / "m")
    assert torch.equal(snapshot(MoSE.load(idle(), tmp_path / "m"), "a"), before)


# ------------------------------------------------------------------------------ hooks and copies


@pytest.mark.parametrize("task", ["a", ["a"] * 4])
def test_a_hook_that_somebody_removed_is_seen_when_a_task_is_set(task, guard, monkeypatch):
    guard or monkeypatch.setattr(module, "check_layers", lambda *given: None)
    mose = learn(MoSE(tiny()), "a")
    before = snapshot(mose, "a")
    mose.model.model.layers[1].self_attn.v_proj._forward_hooks.clear()
    if guard:
        refuses("the hook of a target is gone", mose.set_task, task)
        refuses("the hook of a target is gone", learn, mose, "b")
    else:  # off: one layer is the bare base, and nobody is told
        mose.set_task(task)
        assert not torch.equal(snapshot(mose, "a"), before)
    mose.detach()
    assert torch.equal(mose.model(data("a")).logits, tiny()(data("a")).logits)


def test_detach_finds_a_hook_that_somebody_wrapped_in_a_function():
    mose = learn(MoSE(tiny()), "a")
    hooks = mose.model.model.layers[1].self_attn.v_proj._forward_hooks
    for key, hook in hooks.items():
        hooks[key] = lambda *given, hook=hook: hook(*given)
    before = snapshot(mose, "a")
    with mose.task(None):
        assert not torch.equal(snapshot(mose, None), before)  # control: the hook is at work
    mose.set_task("a")
    mose.detach()
    assert torch.equal(mose.model(data("a")).logits, tiny()(data("a")).logits)


class FullyShardedDataParallel(torch.nn.Module):
    """As the wrapper of FSDP1 is named. It keeps the shapes of weights whose memory it frees."""


@pytest.mark.parametrize("table", [torch.empty(0), torch.empty(2048), None])
def test_a_base_that_fsdp1_or_zero3_has_sharded_is_refused(table):
    model = tiny()
    if table is None:
        model.model.wrapper = FullyShardedDataParallel()
    else:
        model.get_input_embeddings().weight.data = table
    refuses("sharded by FSDP1 or ZeRO-3, which are not supported", MoSE, model)


@pytest.mark.parametrize("collected", [False, True], ids=["old layer kept", "old layer gone"])
def test_a_layer_that_somebody_replaced_is_seen_when_a_task_is_set(collected):
    """`resize_token_embeddings` does so with `lm_head`, and the new layer has no hook."""
    mose = learn(MoSE(tiny(), MoSEConfig(targets=("q_proj", "lm_head"))), "a")
    kept = mose.model.lm_head
    mose.model.lm_head = torch.nn.Linear(32, 64)
    if collected:
        del kept
        gc.collect()
    for task in ("a", ["a"]):
        refuses("the hook of a target is gone", mose.set_task, task)
    refuses("the hook of a target is gone", mose.begin_task, "b")
    if not collected:
        mose.model.lm_head = kept
        mose.set_task("a")  # control: what it hangs on is there again
    mose.detach()


def in_its_place(model):
    attention = model.model.layers[0].self_attn
    attention.q_proj = copy.deepcopy(attention.q_proj)


def in_a_new_block(model):
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))


@pytest.mark.parametrize("copied, count", [(in_its_place, 1), (in_a_new_block, 2)])
def test_a_target_that_somebody_copied_is_seen_when_a_task_is_set(copied, count, tmp_path):
    """The copy has a hook of the same id, and experts of its own, which no task would reach."""
    mose = learn(MoSE(tiny()), *"ab")
    mose.set_task("a")  # control
    copied(mose.model)
    for call in (lambda: mose.set_task("a"), lambda: mose.set_task(None),
                 lambda: mose.begin_task("c")):
        refuses(f"{count} layers of the model are copies of targets", call)
    mose.save(tmp_path / "m")
    mose.detach()
    assert not any(module._forward_hooks for module in mose.model.modules())
    if copied is in_its_place:  # the copy is as good as the original
        MoSE.load(mose.model, tmp_path / "m").set_task("a")


class Wrapping:
    """An object whose method calls a hook of ours."""

    def __init__(self, hook):
        self.hook = hook

    def call(self, *given):
        return self.hook(*given)


def test_a_hook_may_be_wrapped_in_a_method_of_another_object():
    mose = learn(MoSE(tiny()), *"ab")
    before = snapshot(mose, "a")
    hooks = mose.model.model.layers[0].self_attn.q_proj._forward_hooks
    for key, hook in hooks.items():
        hooks[key] = Wrapping(hook).call
    assert torch.equal(snapshot(mose, "a"), before)
    mose.detach()
    assert not hooks


@pytest.mark.parametrize("how", ["in another package", "reloaded in a notebook"])
def test_a_second_copy_of_the_file_is_refused_on_the_same_model(how, monkeypatch, tmp_path):
    shutil.copy(module.__file__, tmp_path / "another_mose.py")
    monkeypatch.syspath_prepend(tmp_path)
    other = importlib.import_module("another_mose")
    first = other if how.startswith("reloaded") else module
    model, old = tiny(), first.SubExperts
    mose = learn(first.MoSE(model), "a")
    before, second = snapshot(mose, "a"), importlib.reload(other)
    assert type(mose.layers[0]) is old
    assert not any(isinstance(m, second.SubExperts) for m in model.modules())  # control: by class
    refuses("a MoSE is attached to this model already: detach", second.MoSE, model)
    refuses("a MoSE is attached to this model already", second.MoSE.load, model, __file__)
    refuses("a MoSE is attached to this model already", second.MoSE, model.model)
    assert torch.equal(snapshot(learn(mose, "b"), "a"), before)
    mose.detach()
    assert len(second.MoSE(model).layers) == 4  # control: after the first has gone
    del sys.modules["another_mose"]


# ------------------------------------------------------------------------------ no state between hooks


@pytest.fixture
def new_objects():
    """A function that lists what was made since the test began, and is still alive."""
    gc.collect()
    gc.freeze()  # what was there before is left out
    yield lambda: (gc.collect(), gc.get_objects())[1]
    gc.unfreeze()


@pytest.mark.parametrize("backward", [True, False], ids=["after backward", "forward alone"])
def test_nothing_that_was_part_of_a_graph_outlives_its_task(backward, guard, new_objects,
                                                            monkeypatch):
    nodes, forward, delta = [], module.StraightThrough.forward, SubExperts.delta

    def noted(ctx, *given):
        nodes.append(weakref.ref(ctx))  # a node of the graph, and with it all that it saved
        return forward(ctx, *given)

    def kept(layer, x, matrices):
        vars(layer)["now"] = matrices
        return delta(layer, x, matrices)

    def in_a_graph():
        tensors = [x for x in new_objects() if issubclass(type(x), torch.Tensor)]
        return [x for x in tensors if x.grad_fn is not None]

    monkeypatch.setattr(module.StraightThrough, "forward", staticmethod(noted))
    # Off: a hook leaves its matrices on the layer, for the next hook to find.
    guard or monkeypatch.setattr(SubExperts, "delta", kept)
    mose = MoSE(tiny())
    mose.begin_task("a")
    mose.observe(data("a"))
    loss = mose.model(data("a"), labels=data("a")).loss
    assert len(nodes) == 4 and all(node() is not None for node in nodes)  # control: alive by now
    backward and loss.backward()
    del loss
    mose.end_task()
    assert (in_a_graph() == []) == guard
    assert all(node() is None for node in nodes) == guard


@pytest.mark.parametrize("task", ["open", "finished"])
def test_memory_does_not_grow_with_the_number_of_threads_that_ever_ran(task, guard, new_objects,
                                                                      monkeypatch):
    delta, together = SubExperts.delta, threading.Barrier(7)

    def kept(layer, x, matrices):
        layer.__dict__.setdefault("now", {})[threading.get_ident()] = x
        return delta(layer, x, matrices)

    def one_pass():
        together.wait()  # all are there at the same time, so none has the number of an ended one
        loss = mose.model(data("a"), labels=data("a")).loss
        task == "open" and loss.backward()
        together.wait()

    def tensors():
        return sum(issubclass(type(x), torch.Tensor) for x in new_objects())

    # Off: what one hook has for the next is kept by thread.
    guard or monkeypatch.setattr(SubExperts, "delta", kept)
    mose = learn(MoSE(tiny()), "a", end=task == "finished", steps=1)
    before = tensors()
    threads = [threading.Thread(target=one_pass) for _ in range(7)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    del threads
    assert (tensors() <= before) == guard
