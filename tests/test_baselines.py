"""The baselines are what they are called: against slow references, from begin to file."""

import copy
import math

import pytest
import torch
import transformers

from tracebench.baselines import FixedRouter, LoRA, LoRAPerTask, MoELoRA

IDS = torch.arange(24).view(3, 8)
TARGETS = ("q_proj", "v_proj")
LORA = {"rank": 4, "scale": 4.0}
MIXTURE = {"rank": 2, "scale": 4.0, "experts": 4, "top_k": 2, "router_std": 1.0}
KINDS = [(LoRA, LORA), (LoRAPerTask, LORA), (MoELoRA, MIXTURE)]


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=64,
        num_attention_heads=4, initializer_range=0.2)).to(dtype).eval()


def learn(adapter, name, steps=5):
    adapter.begin_task(name, *adapter.best_source(lambda: 1.0))
    optimizer = torch.optim.AdamW(adapter.trainable_parameters(), lr=0.03)
    for _ in range(steps):
        ids = torch.randint(64, (4, 8))
        adapter.observe(ids)
        adapter.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter.end_task()


@torch.no_grad()
def logits(adapter, task):
    adapter.set_task(task)
    return adapter.model(IDS).logits


def test_a_lora_adds_scale_times_x_a_b():
    lora, x = LoRA(tiny(), TARGETS, **LORA), torch.randn(1, 5, 32)
    learn(lora, "a")
    linear = lora.model.model.layers[1].self_attn.v_proj
    A, B = (p.detach() for p in lora.layers[3].parameters())
    assert A.shape == (32, 4) and B.shape == (4, 32)
    expected = x @ linear.weight.T + 4.0 * (x @ A) @ B
    assert torch.allclose(linear(x), expected, atol=1e-5)
    assert not torch.allclose(linear(x), x @ linear.weight.T, atol=1e-2), "control"


def test_a_mixture_sends_each_token_to_its_best_experts():
    mixture, x = MoELoRA(tiny(), TARGETS, **MIXTURE), torch.randn(1, 5, 32)
    learn(mixture, "a")
    layer = mixture.layers[0]
    for t, token in enumerate(x[0]):
        gates = torch.softmax(layer.router @ (layer.projection.T @ token), 0)
        best = gates.topk(2).indices.tolist()
        expected = sum(4.0 * gates[e] * (token @ layer.A[:, 2 * e:2 * e + 2])
                       @ layer.B[2 * e:2 * e + 2] for e in best)
        assert torch.allclose(layer(x)[0, t], expected, atol=1e-5)
        everything = 4.0 * (token @ layer.A) @ layer.B
        assert not torch.allclose(expected, everything, atol=1e-3), "control: gates matter"


@pytest.mark.parametrize("kind, config", KINDS)
def test_it_starts_as_the_base_and_the_base_comes_back_bit_for_bit(kind, config):
    model = tiny()
    bare, trainable = model(IDS).logits, sum(p.requires_grad for p in model.parameters())
    weights = copy.deepcopy(model.state_dict())
    adapter = kind(model, TARGETS, **config)
    adapter.begin_task("a")
    assert torch.equal(model(IDS).logits, bare)
    bound = 1 / math.sqrt(32)
    for layer in adapter.layers:
        assert 0.9 * bound < layer.A.abs().max() <= bound and not layer.B.any()
    adapter.end_task()
    learn(adapter, "b")
    assert not torch.equal(logits(adapter, "b"), bare), "control: it did learn"
    assert torch.equal(logits(adapter, None), bare)
    adapter.detach()
    assert torch.equal(model(IDS).logits, bare)
    assert sum(p.requires_grad for p in model.parameters()) == trainable
    assert all(map(torch.equal, model.state_dict().values(), weights.values()))


def test_a_lora_in_sequence_forgets_and_one_for_each_task_does_not():
    for kind, config in KINDS:
        adapter = kind(tiny(), TARGETS, **config)
        first = learn(adapter, "a")
        before = logits(adapter, "a")
        second = learn(adapter, "b")
        apart = kind is LoRAPerTask
        assert torch.equal(logits(adapter, "a"), before) == apart
        assert torch.equal(logits(adapter, "a"), logits(adapter, "b")) != apart
        assert second["new"] == (first["new"] if apart else 0) and [*adapter.tasks] == ["a", "b"]


@pytest.mark.parametrize("kind, config", KINDS)
def test_what_is_loaded_answers_and_goes_on_as_what_was_saved(kind, config, tmp_path):
    adapter = kind(tiny(), TARGETS, **config)
    for name in ("a", "b"):
        learn(adapter, name)
    adapter.save(tmp_path / "m.pt")
    again = kind.load(tiny(), tmp_path / "m.pt")
    assert [*again.tasks] == ["a", "b"]
    for name in (None, "a", "b"):
        assert torch.equal(logits(adapter, name), logits(again, name))
    for each in (adapter, again):
        torch.manual_seed(1)
        learn(each, "c")
    assert torch.equal(logits(adapter, "c"), logits(again, "c"))
    assert [*tmp_path.iterdir()] == [tmp_path / "m.pt"]


def test_a_damaged_file_is_named(tmp_path):
    adapter = LoRA(tiny(), TARGETS, rank=2, scale=4.0)
    adapter.save(tmp_path / "m.pt")
    LoRA.load(tiny(), tmp_path / "m.pt")  # control
    (tmp_path / "m.pt").write_bytes((tmp_path / "m.pt").read_bytes()[:-9])
    with pytest.raises(ValueError, match="m.pt: damaged, or no adapter.*Learn its tasks again"):
        LoRA.load(tiny(), tmp_path / "m.pt")


@pytest.mark.parametrize("kind, config", KINDS)
def test_a_file_has_little_more_than_four_bytes_for_each_number(kind, config, tmp_path):
    adapter = kind(tiny(), TARGETS, **config | {"rank": 32})
    for name in ("a", "b", "c"):
        learn(adapter, name)
    adapter.save(tmp_path / "m.pt")
    count = sum(p.numel() for p in adapter.trainable_parameters())
    count *= 3 if kind is LoRAPerTask else 1
    assert 0.85 * 4 * count < (tmp_path / "m.pt").stat().st_size < 1.1 * 4 * count + 2000


def test_on_a_bf16_base_it_learns_in_fp32():
    adapter = LoRA(tiny(torch.bfloat16), TARGETS, **LORA)
    learn(adapter, "a")
    assert {p.dtype for p in adapter.trainable_parameters()} == {torch.float32}
    assert logits(adapter, "a").dtype == torch.bfloat16
    assert not torch.equal(logits(adapter, "a"), logits(adapter, None))


def test_a_target_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="nope"):
        LoRA(tiny(), ("nope",), **LORA)


def test_the_routers_of_fixed_router_stay_as_they_were_drawn():
    for kind, moves in ((FixedRouter, False), (FixedRouter.__base__, True)):
        adapter = kind(tiny())
        adapter.begin_task("a")
        drawn = adapter.layers[0].router.detach().clone()
        optimizer = torch.optim.AdamW(adapter.trainable_parameters(), lr=0.1)
        adapter.model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        adapter.model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        assert torch.equal(adapter.layers[0].router, drawn) != moves


@pytest.mark.parametrize("name, numbers", [
    ("SHiRA", 4 * 2 * (32 + 32)), ("VeRA", 4 * (2 + 32)), ("FrozenA", 4 * 2 * 32)])
def test_an_adapter_of_peft_stores_only_what_it_trained(name, numbers, tmp_path, monkeypatch):
    """Four layers, rank 2. All else is drawn from the seed again."""
    pytest.importorskip("peft")
    from benchmarks import peft_tasks
    kind = getattr(peft_tasks, name)
    adapter = kind(tiny(), TARGETS, rank=2, scale=4.0)
    base = logits(adapter, None)
    learn(adapter, "a")
    first = logits(adapter, "a")
    assert not torch.equal(first, base)
    assert learn(adapter, "b")["new"] == numbers
    assert torch.equal(logits(adapter, "a"), first) and torch.equal(logits(adapter, None), base)
    adapter.save(tmp_path / "m")
    assert torch.equal(logits(kind.load(tiny(), tmp_path / "m"), "a"), first)
    monkeypatch.setattr(peft_tasks, "SEED", 1)  # control
    assert not torch.equal(logits(kind.load(tiny(), tmp_path / "m"), "a"), first)
