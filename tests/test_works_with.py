"""It works with what others wrote, as the table in docs/works-with.md says row by row."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
from mose import MoSE, SubExperts
from test_mose import attach, data, guard, learn, refuses, snapshot, tiny  # noqa: F401

# ------------------------------------------------------------------------------ the table


def test_every_row_names_a_test_that_is_there_and_every_test_here_has_a_row():
    there = set()
    for file in (ROOT / "test_mose.py", *(ROOT / "tests").glob("test_*.py")):
        names = (getattr(node, "name", "") for node in ast.parse(file.read_text("utf-8")).body)
        there |= {f"{file.relative_to(ROOT)}::{name}" for name in names if name[:5] == "test_"}
    page = (ROOT / "docs/works-with.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in page if line.startswith("|")][2:]
    rows = [re.findall(r"`([\w/]+\.py::\w+)`", line) for line in table]
    named = {name for row in rows for name in row}
    assert len(rows) > 20 and all(rows) and named <= there
    here = {name for name in there if "works_with.py" in name or "trainer.py" in name}
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
    assert not torch.equal(plain, snapshot(mose, None)) and control.isnan().any()
    assert torch.equal(left_out, snapshot(mose, None))


TWO_RANKS = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
from test_mose import adam, attach, data, snapshot, step

torch.distributed.init_process_group("gloo")
rank, ends = torch.distributed.get_rank(), []
for wrap in (DistributedDataParallel, lambda model: model):
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
    assert same == [True] * 3 + [False] * 3  # controls: each rank for itself
    first, after, *_ = torch.load(tmp_path / "0")
    assert torch.equal(first, after)
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
    again = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert torch.equal(snapshot(MoSE.load(again, tmp_path / "m"), None, "a"), before)
    refuses("not for this base", MoSE.load, tiny(), tmp_path / "m")  # control: without the LoRA


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
    mose.model = model  # `learn` and `snapshot` run the whole
    before = snapshot(learn(mose, "a"), "a")
    assert not torch.equal(before, snapshot(mose, None))
    assert torch.equal(snapshot(learn(mose, "b"), "a"), before)


def test_more_tokens_are_another_base_so_they_come_before_the_tasks(tmp_path):
    def bigger():
        torch.manual_seed(1)
        model = tiny()
        model.resize_token_embeddings(70, mean_resizing=False)
        return model

    learn(attach(), "a").save(tmp_path / "old")
    refuses("a base of other layers", MoSE.load, bigger(), tmp_path / "old")
    mose = learn(MoSE(bigger()), "a")
    mose.save(tmp_path / "new")
    assert MoSE.load(bigger(), tmp_path / "new").tasks == ["a"]  # control: resized in time


@pytest.mark.filterwarnings("ignore")  # of what is deprecated
def test_layers_may_be_quantised_after_learning():
    mose, exact = learn(attach("grouped"), "a"), learn(attach("grouped"), "a")
    torch.ao.quantization.quantize_dynamic(mose.model, {torch.nn.Linear}, inplace=True)
    far = [(snapshot(mose, task) - snapshot(exact, "a")).abs().mean() for task in ("a", None)]
    assert 0 < far[0] < far[1] / 4  # its experts still speak, over layers that round


# ------------------------------------------------------------------------------ devices, graphs


@pytest.mark.parametrize("how", ["dispatched", "offloaded"])
def test_hooks_of_accelerate_and_of_the_experts_do_not_meet(how):
    accelerate = pytest.importorskip("accelerate")
    before, model = snapshot(learn(attach(), "a"), "a", None), tiny()
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
