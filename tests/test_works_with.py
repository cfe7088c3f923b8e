"""It works with what others wrote, as the table in docs/works-with.md says row by row."""

import ast
import copy
import gc
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
import mose as module
from mose import MoSE, MoSEConfig, SubExperts
from test_mose import attach, data, guard, learn, refuses, snapshot, step, tiny  # noqa: F401

# ------------------------------------------------------------------------------ the table


def test_every_row_names_a_test_that_is_there_and_every_test_here_has_a_row():
    there = set()
    for file in (ROOT / "test_mose.py", *(ROOT / "tests").glob("test_*.py")):
        names = (getattr(node, "name", "") for node in ast.parse(file.read_text("utf-8")).body)
        there |= {f"{file.relative_to(ROOT)}::{name}" for name in names if name[:5] == "test_"}
    page = (ROOT / "docs/works-with.md").read_text(encoding="utf-8").splitlines()
    heads = ("| with |", "|---|")
    table = [line for line in page if line.startswith("|") and not line.startswith(heads)]
    rows = [re.findall(r"`([\w/]+\.py::\w+)`", line) for line in table]
    named = {name for row in rows for name in row}
    assert len(rows) > 20 and all(rows) and named <= there
    files = ("works_with.py", "trainer.py", "layers.py")
    here = {name for name in there if name.partition("::")[0].endswith(files)}
    assert [name for name in here - named if "every_row" not in name] == []


# ------------------------------------------------------------------------------ generate


def answers(mose, task, ids, **options):
    with mose.task(task):
        return mose.model.generate(ids, max_new_tokens=8, pad_token_id=0, **options)


@pytest.mark.parametrize("task", ["a", ["b", "a"]], ids=["one", "mixed"])
def test_a_static_cache_gives_the_same_answers(task):
    mose, ids = learn(attach("grouped"), *"ab"), data("c", 2)
    plain = answers(mose, task, ids)
    assert torch.equal(answers(mose, task, ids, cache_implementation="static"), plain)
    assert not torch.equal(answers(mose, None, ids), plain)  # control: no task


@pytest.mark.parametrize("assistant", [
    lambda: {"assistant_model": tiny("grouped")}, lambda: {"prompt_lookup_num_tokens": 2}],
    ids=["another model", "the prompt"])
def test_an_assistant_changes_no_answer(assistant):
    mose, ids = learn(attach("grouped"), "a"), data("c", 1)
    plain = answers(mose, "a", ids)
    assert torch.equal(answers(mose, "a", ids, **assistant()), plain)
    assert not torch.equal(answers(mose, None, ids), plain)  # control: what the assistant says


def test_a_pipeline_answers_as_its_task():
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "assets/tiny-llm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "assets/tiny-llm")
    mose = learn(MoSE(model, MoSEConfig(density=0.03)), *"ab", steps=6)
    prompts = ["a b c", "how are you"]
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")

    def said(task, **options):
        with mose.task(task):
            answers = pipeline(prompts, max_new_tokens=6, do_sample=False, **options)
        return [answer["generated_text"] for answer, in answers]

    def told(task):
        with mose.task(task):
            ids = model.generate(**batch, max_new_tokens=6, do_sample=False)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    for task in ("a", "b", None):
        assert said(task) == told(task)
    assert said(["a", "b"], batch_size=2) == [told("a")[0], told("b")[1]]
    assert len({*map(str, map(told, ("a", "b", None)))}) == 3  # control: each says something else


def test_continuous_batching_answers_as_one_task_and_never_as_a_list():
    mose, ids = learn(attach("grouped"), *"ab"), data("c", 2)
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}

    def batched(task):
        with mose.task(task):
            done = mose.model.generate_batch(
                ids.tolist(), generation_config=transformers.GenerationConfig(**greedy),
                continuous_batching_config=transformers.ContinuousBatchingConfig(
                    num_blocks=8, max_batch_tokens=64))
        return [answer.generated_tokens for answer in done.values()]

    with mose.task("a"):
        plain = mose.model.generate(ids, **greedy)[:, -5:].tolist()
    assert batched("a") == plain != batched(None)  # control: what the base says
    assert batched(["a", "b"]) == [[], []]  # the reason is in its log: its rows are no examples


# ------------------------------------------------------------------------------ architectures


RECENT = {  # what is not the same as in Llama
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "num_hidden_layers": 6},
    "gpt_oss": {"head_dim": 8, "sliding_window": 4, "num_local_experts": 4},
    "qwen3_next": {"head_dim": 8, "num_hidden_layers": 4, "linear_num_value_heads": 4,
                   "linear_num_key_heads": 2, "linear_key_head_dim": 8, "num_experts": 4,
                   "linear_value_head_dim": 8, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "falcon_h1": {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                  "mamba_d_state": 8, "mamba_chunk_size": 8},
}


@pytest.mark.filterwarnings("ignore")  # of kernels that are not installed
@pytest.mark.parametrize("kind, targets", [
    ("gemma3_text", ("q_proj", "v_proj")), ("gpt_oss", ("q_proj", "v_proj")),
    ("qwen3_next", ("q_proj", "v_proj", "in_proj_qkvz")),
    ("jamba", ("q_proj", "v_proj", "in_proj")),
    ("falcon_h1", ("q_proj", "v_proj", "in_proj"))])
def test_recent_and_hybrid_architectures_learn_and_do_not_forget(kind, targets):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64,
            "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, **RECENT[kind]}
    config = transformers.AutoConfig.for_model(kind, **size)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.requires_grad_(False)  # Jamba rounds otherwise if its weights need gradients
    bare, ids = model(data("a")).logits, data("c", 2)
    mose = learn(MoSE(model, MoSEConfig(targets=targets)), "a")
    assert all(layer.split(layer.weight)[1].any() for layer in mose.layers)  # each has learned
    before = snapshot(mose, "a", None)
    assert torch.equal(before[1], bare) and not torch.equal(*before)
    assert torch.equal(snapshot(learn(mose, "b"), "a", None), before)
    mixed, alone = snapshot(mose, ["b", "a"], ids=ids)[0], snapshot(mose, "b", "a", ids=ids)
    for row in range(2):  # control: it is not what the other task says
        fits = [torch.allclose(mixed[row], logits[row], atol=1e-4) for logits in alone]
        assert fits == [row == 0, row == 1]
    told = {"return_dict_in_generate": True, "output_logits": True}
    cached, slow, other = (
        torch.stack(answers(mose, task, ids, **told, **options).logits) for task, options in (
            (["b", "a"], {}), (["b", "a"], {"use_cache": False}), (["a", "b"], {})))
    assert torch.allclose(cached, slow, atol=1e-3) and not torch.allclose(cached, other, atol=1e-3)
    mose.detach()
    assert torch.equal(model(data("a")).logits, bare)


# ------------------------------------------------------------------------------ training


def test_a_grad_scaler_changes_nothing_and_leaves_out_a_step_that_is_not_finite():
    ends = {}
    for scale, spoilt in ((None, False), (2.0 ** 16, False), (2.0 ** 16, True), (None, True)):
        mose = learn(attach(), "a", end=False, steps=0)
        optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=0.03)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(mose.model(data("a"), labels=data("a")).loss).backward()
            spoilt and mose.layers[0].router.grad.fill_(torch.inf)
            scaler.step(optimizer), scaler.update()
        ends[scale, spoilt] = snapshot(mose, "a")
    plain, scaled, left_out, control = ends.values()
    assert torch.equal(plain, scaled)
    assert not torch.equal(plain, snapshot(mose, None)) and control.isnan().any()
    assert torch.equal(left_out, snapshot(mose, None))


def test_a_moving_average_of_the_weights_can_become_the_task():
    mose = learn(attach(), "a")
    before = snapshot(mose, "a")
    mose.begin_task("b")
    optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=0.03)
    half = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    average = torch.optim.swa_utils.AveragedModel(mose.model, multi_avg_fn=half)
    for _ in range(4):
        step(mose.model, optimizer, data("b"))
        average.update_parameters(mose.model)
    with torch.no_grad():
        logits = average(data("a")).logits
    assert not torch.equal(snapshot(mose, "b")[0], logits)  # control: the last weights are others
    mose.model.load_state_dict(average.module.state_dict())
    mose.observe(data("b")), mose.end_task()
    assert torch.equal(snapshot(mose, "b")[0], logits) and torch.equal(snapshot(mose, "a"), before)


TWO_RANKS = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
from test_mose import adam, attach, data, snapshot, step

torch.distributed.init_process_group("gloo")
rank, ends = torch.distributed.get_rank(), []
for wrap in (DistributedDataParallel,
             lambda model: DistributedDataParallel(model, forward_sync_buffers=False),
             lambda model: model):
    mose = attach()
    model = wrap(mose.model)
    torch.manual_seed(rank)
    for name in "ab":
        mose.begin_task(name)
        optimizer = adam(mose)
        for _ in range(3):
            step(model, optimizer, data(name)[2 * rank:2 * rank + 2])
        mose.end_task()
        ends.append(snapshot(mose, "a"))
    ends.append(snapshot(mose, "b"))
torch.save(ends, f"{sys.argv[1]}/{rank}")
torch.distributed.destroy_process_group()
"""


def test_two_ranks_of_ddp_learn_the_same_and_forget_nothing(tmp_path):
    (tmp_path / "two.py").write_text(TWO_RANKS)
    command = "-m torch.distributed.run --nproc-per-node 2".split()
    done = subprocess.run(
        [sys.executable, *command, tmp_path / "two.py", tmp_path], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = zip(*(torch.load(tmp_path / f"{rank}") for rank in range(2)))
    same = [torch.equal(*pair) for pair in ranks]
    assert same == [True] * 6 + [False] * 3  # controls: each rank for itself
    first, after, _, unsynced, *_ = torch.load(tmp_path / "0")
    assert torch.equal(first, after) and torch.equal(first, unsynced)
    torch.manual_seed(0)
    one = attach()
    torch.manual_seed(0)
    assert torch.allclose(snapshot(learn(one, "a"), "a"), first, atol=1e-4)


# ------------------------------------------------------------------------------ the base


def test_lora_of_peft_may_lie_under_it(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    lora = peft.get_peft_model(tiny(), config).eval()
    bare = lora(data("a")).logits
    mose = learn(MoSE(lora), "a")
    before = snapshot(mose, None, "a")
    assert torch.equal(before[0], bare) and not torch.equal(before[1], bare)
    assert not torch.equal(bare, tiny()(data("a")).logits)  # control: the LoRA says something
    lora.save_pretrained(tmp_path), mose.save(tmp_path / "m")
    assert torch.equal(snapshot(learn(mose, "b"), None, "a"), before)
    again = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert torch.equal(snapshot(MoSE.load(again, tmp_path / "m"), None, "a"), before)
    other = tiny()
    refuses("not for this base", MoSE.load, other, tmp_path / "m")  # control: without the LoRA
    assert not any(type(m) is SubExperts for m in other.modules())


@pytest.mark.parametrize("layers", [("q_proj", "v_proj"), ("q_proj",)], ids=["all", "control"])
def test_a_checkpoint_of_peft_holds_of_an_open_task_what_lies_on_layers_of_its_lora(layers,
                                                                                   tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=[*layers], init_lora_weights=False)
    lora, file = peft.get_peft_model(tiny(), config).eval(), tmp_path / "adapter_model.safetensors"
    lora.save_pretrained(tmp_path)
    bare, logits = {*safetensors.torch.load_file(file)}, snapshot_of(lora)
    mose = learn(MoSE(lora), "a")  # on q_proj and v_proj
    mose.save(tmp_path / "m")
    lora.save_pretrained(tmp_path)
    assert {*safetensors.torch.load_file(file)} == bare  # nothing of a finished task
    before = snapshot(learn(mose, "b", end=False), "a", "b")
    lora.save_pretrained(tmp_path)
    more = {name for name in safetensors.torch.load_file(file) if "sub_experts" in name}
    assert more | bare == {*safetensors.torch.load_file(file)} and len(more) == 6 * len(layers)
    model = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert torch.equal(snapshot_of(model), logits)  # what does not belong to peft is left out
    again = MoSE.load(model, tmp_path / "m")
    again.begin_task("b")
    model.load_adapter(tmp_path, "default", is_trainable=True)  # so does Trainer when it resumes
    whole = len(layers) == 2  # off: the experts on v_proj are not in it
    assert [*map(torch.equal, snapshot(again, "a", "b"), before)] == [True, whole]


@torch.no_grad()
def snapshot_of(model):
    return model(data("a")).logits


def multimodal():
    """A tiny Llava: a vision tower and a Llama."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64,
            "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**size, image_size=16, patch_size=8, projection_dim=32)
    text = transformers.LlamaConfig(**size)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_of_a_multimodal_base_the_language_model_alone_may_learn(guard):
    model = multimodal()
    # Off: attached to the whole, the vision tower gets experts too.
    mose = MoSE(model.model.language_model if guard else model)
    parts = {name.split(".")[1] for name, m in model.named_modules() if type(m) is SubExperts}
    assert (parts == {"language_model"}) == guard
    # What it is not attached to, it does not freeze: here the tower's first parameter.
    assert next(model.parameters()).requires_grad == guard
    model.requires_grad_(False)
    mose.model = model  # `learn` and `snapshot` run the whole
    before = snapshot(learn(mose, "a"), "a")
    assert not torch.equal(before, snapshot(mose, None))
    assert torch.equal(snapshot(learn(mose, "b"), "a"), before)


def test_a_saved_multimodal_base_holds_an_open_task_and_otherwise_the_base_alone(tmp_path):
    model, file = multimodal().requires_grad_(False), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    bare = file.read_bytes()
    mose = MoSE(model.model.language_model)
    mose.model = model  # `learn` and `snapshot` run the whole
    learn(learn(mose, "a"), "b", end=False)
    model.save_pretrained(tmp_path)
    assert b"sub_experts" in file.read_bytes()  # control: while a task is open
    mose.end_task()
    model.save_pretrained(tmp_path)
    assert file.read_bytes() == bare


def test_more_tokens_are_another_base_so_they_come_before_the_tasks(tmp_path):
    def bigger():
        torch.manual_seed(1)
        model = tiny()
        model.resize_token_embeddings(70, mean_resizing=False)
        return model

    learn(attach(), "a").save(tmp_path / "old")
    refuses("a base of other layers, weights or positions: 3 differ", MoSE.load, bigger(), tmp_path / "old")
    mose = learn(MoSE(bigger()), "a")
    mose.save(tmp_path / "new")
    assert [*MoSE.load(bigger(), tmp_path / "new").tasks] == ["a"]  # control: resized in time


@pytest.mark.filterwarnings("ignore")  # of what is deprecated
def test_layers_may_be_quantised_after_learning():
    mose, exact = (learn(attach("grouped", density=0.03), "a") for _ in range(2))
    torch.ao.quantization.quantize_dynamic(mose.model, {torch.nn.Linear}, inplace=True)
    rounded = snapshot(mose, None)[0]
    far = [(snapshot(mose, task) - snapshot(exact, "a")).abs().mean() for task in ("a", None)]
    assert 0 < far[0] < far[1] / 4  # its experts still speak, over layers that round
    gc.collect()  # the layers that were replaced are gone, and with them the handles of their hooks
    refuses("is attached to this model already", MoSE, mose.model)
    mose.set_task("a"), mose.detach()
    with torch.no_grad():
        assert torch.equal(mose.model(data("a")).logits, rounded)


# ------------------------------------------------------------------------------ Python and torch


def test_torch_can_save_a_whole_model_and_a_whole_mose(tmp_path):
    mose = learn(attach(), *"ab")
    before, base = snapshot(mose, "a", "b"), tiny()(data("a")).logits
    mose.set_task("a")
    torch.save(mose.model, tmp_path / "model"), torch.save(mose, tmp_path / "mose")
    mose.set_task("b")
    model, again = (torch.load(tmp_path / x, weights_only=False) for x in ("model", "mose"))
    with torch.no_grad():
        assert torch.equal(model(data("a")).logits, before[0])  # the task that was in force then
    refuses("attached to this model already", MoSE, model)
    assert again.active == "a" and torch.equal(snapshot(again, "a", "b"), before)
    learn(again, "c")
    assert torch.equal(snapshot(again, "a", "b"), before) and [*mose.tasks] == ["a", "b"]
    again.detach()
    assert torch.equal(again.model(data("a")).logits, base)  # control: without it, the bare base
    assert torch.equal(snapshot(mose, "b")[0], before[1])


def test_nothing_rests_on_assert(monkeypatch, tmp_path):
    """mose.py as `python -OO` compiles it, without its assert statements and docstrings."""
    code = compile(Path(module.__file__).read_text("utf-8") + "\nassert False, 'is left out'",
                   "mose.py", "exec", optimize=2)
    other = types.ModuleType("optimised")
    monkeypatch.setitem(sys.modules, "optimised", other)
    exec(code, vars(other))  # control: with its last line it would end here
    mose = learn(other.MoSE(tiny()), *"ab")
    before = snapshot(mose, "a", "b")
    for says, mistake in {
            "is finished: expected a new name": lambda: mose.begin_task("a"),
            "no task is open": mose.end_task, "unknown tasks": lambda: mose.set_task("z"),
            "is attached": lambda: other.MoSE(mose.model), "top_k": lambda: other.MoSEConfig(top_k=9),
            "a list of 3 tasks": lambda: snapshot(mose, ["a"] * 3),
            "damaged": lambda: (tmp_path / "m").write_bytes(other.FORMAT) and other.MoSE.load(
                tiny(), tmp_path / "m")}.items():
        refuses(says, mistake)
    mose.save(tmp_path / "m")
    assert torch.equal(snapshot(other.MoSE.load(tiny(), tmp_path / "m"), "a", "b"), before)
    assert torch.equal(snapshot(learn(mose, "c"), "a", "b"), before) and other.MoSE.__doc__ is None


@pytest.mark.filterwarnings("error")
def test_no_warning_is_given_where_nothing_is_wrong(tmp_path):
    mose = learn(attach("grouped"), *"ab")
    learn(mose, "c", source="a")
    mose.infer_task(data("a"), return_confidence=True), mose.capacity()
    mose.set_task(["a", None]), mose.model(data("a", 2))
    mose.rename("b", "d"), mose.forget("a"), mose.save(tmp_path / "m")
    mose.model.half(), copy.deepcopy(mose), mose.detach()
    mose = MoSE.load(tiny("grouped"), tmp_path / "m")
    mose.begin_task("e")
    with pytest.raises(UserWarning, match="'e' learned nothing"):  # control
        mose.end_task()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype, tmp_path):
    def life(base, path):
        torch.manual_seed(0)
        mose = learn(learn(MoSE(base), "a"), "b", source="a")
        mose.save(path)
        return mose

    bases, prompts = [tiny() for _ in range(4)], torch.cat([data("new a"), data("new b")])
    plain = life(bases[0], tmp_path / "plain")
    expected = snapshot(plain, "a", "b"), plain.infer_task(prompts, return_confidence=True)
    torch.set_default_dtype(dtype)
    try:
        assert torch.zeros(1).dtype == dtype  # control
        mose = life(bases[1], tmp_path / "m")
        loaded = [MoSE.load(base, tmp_path / x) for base, x in zip(bases[2:], ("m", "plain"))]
        for each in (mose, *loaded):
            assert {p.dtype for p in each.layers[0].parameters()} == {torch.float32}
            assert each.layers[0].frozen.dtype == torch.float32
            assert torch.equal(snapshot(each, "a", "b"), expected[0])
            assert each.infer_task(prompts, return_confidence=True) == expected[1]
    finally:
        torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------ devices, graphs


@pytest.mark.parametrize("how", ["dispatched", "offloaded"])
def test_hooks_of_accelerate_and_of_the_experts_do_not_meet(how):
    accelerate = pytest.importorskip("accelerate")
    before, model = snapshot(learn(MoSE(tiny()), "a"), "a", None), tiny()
    if how == "dispatched":  # as with device_map, on each layer
        places = dict.fromkeys([name for name, _ in model.named_modules() if "layers" in name]
                               + ["model.embed_tokens", "model.norm", "model.rotary_emb",
                                  "lm_head"], "cpu")
        mose = learn(MoSE(accelerate.dispatch_model(model, places, force_hooks=True)), "a")
    else:  # after learning: an offloaded base is refused
        mose = learn(MoSE(model), "a")
        accelerate.cpu_offload(model, execution_device="cpu")
        assert next(model.parameters()).is_meta
    assert hasattr(model.lm_head, "_hf_hook") and torch.equal(snapshot(mose, "a", None), before)


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "control"])
def test_an_exported_graph_runs_under_autocast(guard, monkeypatch):
    """It was exported without, and a graph can't look whether autocast is on."""
    guard or monkeypatch.setattr(torch.compiler, "is_exporting", lambda: False)
    mose = learn(attach(), "a")
    linear = next(m for m in mose.model.modules() if hasattr(m, "sub_experts"))
    x = torch.randn(2, 3, linear.in_features)
    graph = torch.export.export(linear, (x,)).module()
    with torch.autocast("cpu", torch.bfloat16):
        if not guard:
            with pytest.raises(RuntimeError, match="[Dd]type"):
                graph(x)
            return
        assert torch.allclose(graph(x), linear(x).float(), atol=0.02)
        mose.set_task(None)
        assert not torch.allclose(graph(x), linear(x).float(), atol=0.02)  # it has the task in it


def test_an_exported_graph_is_that_of_the_task_in_force():
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    mose = learn(attach(), *"ab")
    with mose.task("a"):
        graph = torch.export.export(Logits(mose.model), (data("a"),)).module()
    for task in ("a", "b", None):  # whatever is set later
        logits = snapshot(mose, task, ids=data("c"))[0]
        assert torch.allclose(graph(data("c")), logits, atol=1e-5) == (task == "a")
