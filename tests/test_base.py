"""Which base a file fits, and weights of all kinds: quantised, offloaded, sharded."""

import copy
import enum
import gc
import importlib.util
import weakref

import pytest
import torch
import transformers
from torch.nn.utils import parametrize, prune

import mose as module
from mose import MoSE, MoSEConfig, differences, plain
from test_mose import attach, data, learn, refuses, snapshot, tiny


def llama(dtype=torch.float32, **rope):
    """A tiny base with rotary positions of some kind, the same weights at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64,
             "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.2}
    if transformers.__version__ >= "5":
        rope = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", **rope}}
    else:
        rope = {"rope_theta": rope.pop("rope_theta", 1e4), "rope_scaling": rope or None}
    config = transformers.LlamaConfig(**sizes, **rope, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gemma(**theta):
    """A tiny Gemma 3: positions of two kinds, in buffers of other names."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    config = transformers.Gemma3TextConfig(
        **sizes, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    if theta and transformers.__version__ >= "5":
        config.rope_parameters["full_attention"] |= theta
    elif theta:
        config.rope_theta = theta["rope_theta"]
    return transformers.Gemma3ForCausalLM(config).eval()


def saved(model, path):
    """A file of two tasks learned on `model`, whose logits are returned too."""
    mose = learn(MoSE(model), *"ab")
    mose.save(path)
    return mose, snapshot(mose, *"ab")


def fits(path, model, logits=None):
    again = MoSE.load(model, path)
    assert [*again.tasks] == ["a", "b"]
    assert logits is None or torch.allclose(snapshot(again, *"ab"), logits, atol=1e-4)


# ------------------------------------------------------------------------------ one moment

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 32, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


@pytest.mark.parametrize("rope, other", [
    (DYNAMIC, {"factor": 2.0}), (LONGROPE, {"long_factor": [4.0] * 8})], ids=["dynamic", "longrope"])
def test_a_long_batch_makes_no_other_base(rope, other, tmp_path):
    long, path = torch.arange(100)[None] % 64, tmp_path / "m"
    mose = learn(MoSE(llama(**rope)), *"ab")
    fresh = {name: b.clone() for name, b in mose.model.named_buffers() if "inv_freq" in name}
    with torch.no_grad():
        mose.model(long)
    assert any(not torch.equal(b, fresh[name]) for name, b in mose.model.named_buffers()
               if name in fresh)  # control: it did move them
    mose.save(path)
    fits(path, llama(**rope))
    moved = llama(**rope)
    with torch.no_grad():
        moved(long)
    fits(path, moved)
    refuses("factor", MoSE.load, llama(**{**rope, **other}), path)  # control: no buffer shows it


def test_4_bit_weights_that_a_pass_packs_for_the_cpu_are_the_same_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    llama(torch.bfloat16).save_pretrained(tmp_path / "base")

    def quantised():
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, device_map="cpu").eval()

    # `learn` trains, which packs nothing; `snapshot` runs without gradients, which does.
    mose, logits = saved(quantised(), tmp_path / "m")
    fits(tmp_path / "m", quantised(), logits)
    mose.save(tmp_path / "m")
    fits(tmp_path / "m", quantised(), logits)
    other = quantised()  # control
    weight = other.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.flip(0).contiguous()
    refuses(r"differ: model.layers.0.self_attn.q_proj.weight$", MoSE.load, other, tmp_path / "m")


# ------------------------------------------------------------------------------ versions


def renamed(base, *pairs):
    """A fingerprint as another version of transformers would give it."""
    return {next((name.replace(a, b) for a, b in pairs if a in name), name): value
            for name, value in base.items()}


def test_what_versions_of_transformers_call_otherwise_is_not_compared():
    mose = attach()
    other = renamed(mose.base_fingerprint, ("mlp", "block_sparse_moe"), ("lm_head", "embed_out"))
    assert differences(mose.base_fingerprint, other, mose.needed_paths) == []
    here = {**other, "model.norm.weight": [0.5, 0.5, 0.5]}  # control: both have it
    assert differences(mose.base_fingerprint, here, mose.needed_paths) == ["model.norm.weight"]


@pytest.mark.parametrize("lost", ["embed_tokens", "layers.1.self_attn.v_proj"])
def test_adapted_layers_and_embeddings_are_always_compared(lost):
    mose = attach()
    here = renamed(mose.base_fingerprint, (lost, "elsewhere"))
    assert differences(mose.base_fingerprint, here, mose.needed_paths) == [f"model.{lost}"]


def test_a_lora_beside_the_adapted_layers_is_another_base(tmp_path):
    peft = pytest.importorskip("peft")
    saved(tiny(), tmp_path / "m")
    config = peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)
    beside = peft.inject_adapter_in_model(config, tiny())  # all other names stay as they are
    refuses("number of weights", MoSE.load, beside, tmp_path / "m")


# ------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("make, other, differs", [
    (gemma, {"rope_theta": 1e4}, "frequencies of positions"),
    (llama, {"rope_theta": 1e5}, "frequencies of positions"),
    (llama, {"rope_type": "linear", "factor": 4.0}, "frequencies of positions"),
    (llama, {"rope_type": "dynamic", "factor": 4.0}, "config.rope_type"),
], ids=["gemma 3", "theta", "linear", "dynamic"])
def test_other_positions_are_another_base(make, other, differs, tmp_path):
    saved(make(), tmp_path / "m")
    fits(tmp_path / "m", make())  # control
    refuses(f"differ: .*{differs}", MoSE.load, make(**other), tmp_path / "m")


def test_another_scale_of_a_weight_is_another_base(tmp_path):
    saved(tiny(), tmp_path / "m")
    other = tiny()
    other.model.layers[0].mlp.up_proj.weight.data *= 1.05
    refuses(r"differ: model.layers.0.mlp.up_proj.weight$", MoSE.load, other, tmp_path / "m")


# ------------------------------------------------------------------------------ kinds of weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_may_lie_under_it(bits, tmp_path):
    ao = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup
    kind = ao.Int8WeightOnlyConfig() if bits == 8 else ao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(32))

    def quantised(change=1.0):
        model = tiny(dtype=torch.bfloat16)
        model.model.layers[1].self_attn.q_proj.weight.data *= change
        ao.quantize_(model, kind)
        return model

    assert type(plain(quantised().model.layers[0].self_attn.q_proj.weight)) is torch.Tensor
    _, logits = saved(quantised(), tmp_path / "m")
    fits(tmp_path / "m", quantised(), logits)
    refuses("layers.1.self_attn.q_proj.weight$", MoSE.load, quantised(-1.0), tmp_path / "m")


@pytest.mark.parametrize("bits", ["qint8", "qint4"])
def test_quanto_may_lie_under_it(bits, tmp_path):
    quanto = pytest.importorskip("optimum.quanto")

    def quantised():
        model = tiny()
        quanto.quantize(model, weights=getattr(quanto, bits))
        quanto.freeze(model)
        return model

    _, logits = saved(quantised(), tmp_path / "m")
    fits(tmp_path / "m", quantised(), logits)


def test_an_offloaded_base_still_infers_and_saves(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    mose, logits = saved(tiny(), tmp_path / "m")
    names = mose.infer_task(data("new a"))
    accelerate.cpu_offload(mose.model, execution_device="cpu")
    assert mose.model.get_input_embeddings().weight.is_meta  # control
    assert mose.infer_task(data("new a")) == names == [*"aaaa"]
    mose.save(tmp_path / "m")
    fits(tmp_path / "m", tiny(), logits)
    offloaded = accelerate.cpu_offload(tiny(), execution_device="cpu") or tiny().to("meta")
    refuses("offloaded .meta device.", MoSE, offloaded)
    mose.model.get_input_embeddings()._hf_hook.weights_map = None
    refuses("no hook of accelerate", mose.infer_task, data("a"))


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "control"])
def test_an_offload_frees_the_memory_of_the_base_and_can_be_removed(guard, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    mose, logits = saved(tiny(), tmp_path / "m")
    old = [weakref.ref(p) for p in mose.model.parameters()]
    kept = None if guard else [*mose.model.parameters()]  # Off: as if MoSE kept the Parameters
    accelerate.cpu_offload(mose.model, execution_device="cpu")
    gc.collect()
    assert (not any(reference() is not None for reference in old)) == guard
    del kept
    refuses(r"offloaded with the base .* detach\(\), remove the offload", mose.begin_task, "c")
    mose.detach()
    accelerate.hooks.remove_hook_from_submodules(mose.model)
    assert all(p.requires_grad and not p.is_meta for p in mose.model.parameters())
    fits(tmp_path / "m", mose.model, logits)


def test_a_task_that_was_offloaded_while_open_can_still_be_ended():
    accelerate = pytest.importorskip("accelerate")
    mose = learn(attach(), "a", end=False)
    before = snapshot(mose, "a")
    accelerate.cpu_offload(mose.model, execution_device="cpu")
    refuses("no task can be learned: remove the offload, and go on", mose.end_task)
    accelerate.hooks.remove_hook_from_submodules(mose.model)
    mose.end_task()
    assert torch.equal(snapshot(mose, "a"), before)


@pytest.mark.parametrize("replace", [
    lambda model: model.load_state_dict(model.state_dict(), assign=True),
    lambda model: parametrize.register_parametrization(
        model.lm_head, "weight", torch.nn.Identity()),
    lambda model: prune.identity(model.lm_head, "weight")])
def test_detach_finds_parameters_that_others_have_replaced_or_renamed(replace):
    mose = attach()
    names = [name for name, _ in mose.model.named_parameters()]
    old = mose.model.lm_head.weight
    replace(mose.model)
    new = mose.model.lm_head.weight
    assert new is not old or [name for name, _ in mose.model.named_parameters()] != names
    assert not any(p.requires_grad for p in mose.model.lm_head.parameters())
    mose.detach()
    assert all(p.requires_grad for p in mose.model.parameters())


def test_detach_leaves_frozen_what_was_frozen_beside_a_renamed_parameter():
    model = tiny()
    head = model.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features), requires_grad=False)
    mose = MoSE(model)
    prune.identity(head, "weight")
    mose.detach()
    assert head.weight_orig.requires_grad and not head.bias.requires_grad


def test_a_model_may_make_its_frequencies_later():
    model = tiny()
    model.lazy_inv_freq = None
    MoSE(model)


def test_shapes_can_be_computed_on_the_meta_device():
    mose = learn(attach(), "a")
    there = copy.deepcopy(mose)
    there.model.to("meta")
    assert all(matrix.is_meta for layer in there.layers for _, two in layer.in_force
               for matrix in two) and there.active == "a"
    assert there.model(data("a").to("meta")).logits.shape == snapshot(mose, "a")[0].shape


def test_a_target_that_is_called_by_name_is_refused():
    mose = learn(attach(), "a")
    linear = next(m for m in mose.model.modules() if hasattr(m, "sub_experts"))
    with pytest.raises(ValueError, match=r"called as layer\(input=x\)"):
        linear(input=torch.zeros(1, 2, linear.in_features))


def test_a_base_whose_weights_are_dtensors(tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, model = torch.distributed.device_mesh.init_device_mesh("cpu", (1,)), tiny()
        for block in (*model.model.layers, model):
            fsdp.fully_shard(block, mesh=mesh)
        assert hasattr(model.get_input_embeddings().weight, "full_tensor")  # control
        mose, _ = saved(model, tmp_path / "m")
        assert mose.infer_task(data("new b")) == [*"bbbb"]
    finally:
        torch.distributed.destroy_process_group()
    fits(tmp_path / "m", tiny())


# ------------------------------------------------------------------------------ names, copies


def test_another_copy_of_this_file_sees_what_hangs_on_the_model():
    spec = importlib.util.spec_from_file_location("another_mose", module.__file__)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    mose = attach()
    assert another.SubExperts is not module.SubExperts  # control: it is no class that they share
    refuses("attached", another.MoSE, mose.model)
    mose.detach()
    another.MoSE(mose.model)


class Name(str, enum.Enum):
    A = "a"


@pytest.mark.parametrize("kind", ["numpy", "enum"])
def test_names_and_targets_of_any_str_can_be_loaded(kind, tmp_path):
    numpy = pytest.importorskip("numpy")
    name = numpy.str_("a") if kind == "numpy" else Name.A
    targets = tuple(numpy.unique(["v_proj", "q_proj"]))
    mose = learn(MoSE(tiny(), MoSEConfig(targets=targets)), name)
    mose.set_task(name)
    assert mose.active == "a"
    mose.keys.tasks.clear()
    mose.observe(data("a"), task=name)
    mose.save(tmp_path / "m")
    again = MoSE.load(tiny(), tmp_path / "m")
    assert [*map(type, [*again.keys.tasks])] == [str]
    assert [*map(type, [*again.tasks, *again.config.targets])] == [str] * 3
    refuses("expected a str", mose.begin_task, 1)


# ------------------------------------------------------------------------------ at home


def test_a_random_head_is_refused_since_it_would_stay_random():
    config = tiny().config
    config.pad_token_id = 0
    model = transformers.LlamaForSequenceClassification(config)
    refuses("ForSequenceClassification has a head", MoSE, model)
    assert all(p.requires_grad for p in model.parameters())  # it is as it was
    MoSE(transformers.LlamaForCausalLM(config))  # control


def test_a_hook_that_is_gone_is_noticed():
    mose = learn(attach(), "a")
    layer = mose.model.model.layers[1].self_attn.v_proj
    kept = dict(layer._forward_hooks)
    layer._forward_hooks.clear()
    refuses("hook of a target is gone", mose.set_task, "a")
    layer._forward_hooks.update(kept)
    mose.set_task("a")  # control


def test_another_default_device_changes_nothing(tmp_path):
    prompts, model, fresh = {n: data(n, 64) for n in "ab"}, tiny(), tiny()
    torch.set_default_device("meta")  # "cuda" would do the same, where there is one
    try:
        assert torch.zeros(1).is_meta  # control
        mose = MoSE(model)
        for name, ids in prompts.items():
            mose.begin_task(name)
            mose.observe(ids)
            model(ids, labels=ids).loss.backward()
            mose.end_task()
        assert mose.infer_task(prompts["b"])[0] == "b"
        mose.save(tmp_path / "m")
        again = MoSE.load(fresh, tmp_path / "m")
        assert again.infer_task(prompts["a"])[0] == "a"
    finally:
        torch.set_default_device(None)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "m").symlink_to(tmp_path / "real" / "file")
    learn(attach(), "a").save(tmp_path / "m")
    assert (tmp_path / "m").is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["file"]  # no .tmp beside it
    assert [*MoSE.load(tiny(), tmp_path / "m").tasks] == ["a"]


def test_a_setting_that_was_a_tuple_and_is_now_a_list_is_the_same():
    saved, here = {"config.mrope_section": (1, 2)}, {"config.mrope_section": [1, 2]}
    assert differences(saved, here, []) == differences(here, saved, []) == []
    here["config.mrope_section"][1] = 3  # control
    assert differences(saved, here, []) == ["config.mrope_section"]
