"""A base in shards on several processes (FSDP2): what they learn together is what one process learns.

Processes on the CPU (gloo) stand for GPUs. Each group of them runs a function of this file.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
import transformers

from mose import MoSE
from tracebench import options, processes

TINY = ROOT / "assets/tiny-llm"
pytestmark = pytest.mark.skipif(
    not os.environ.get("CI"), reason="it takes minutes to start so many processes: set CI=1")


def launch(count, *command, folder, fails=False, seconds=240):
    """The output of `count` processes; they have to end well, or not, as `fails` says."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    done = subprocess.run([*torchrun, *map(str, command)], cwd=folder, text=True, timeout=seconds,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode != 0) == fails, done.stdout[-5000:]
    return done.stdout


def each(count, function, folder):
    """What a function of this file noted in each of `count` processes."""
    launch(count, __file__, function.__name__, folder, folder=folder)
    return [torch.load(folder / f"{function.__name__}-{count}-{rank}.pt") for rank in range(count)]


def note(folder, function, **values):
    torch.save(values, folder / f"{function.__name__}-{processes.WORLD}-{processes.RANK}.pt")


def recipe(number):
    """A code block of docs/works-with.md, below "A base that outgrows one GPU"."""
    page = (ROOT / "docs/works-with.md").read_text(encoding="utf-8")
    page = page.partition("**A base that outgrows one GPU**")[2]
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)[number]


def load(**how):
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, **how)


def data(rows=8, seed=0):
    return torch.randint(5, 2000, (rows, 12), generator=torch.Generator().manual_seed(seed))


def pool(mose):
    """What finished tasks are made of: values, owners and routers."""
    return [torch.cat([layer.frozen for layer in mose.layers]),
            torch.cat([layer.owner for layer in mose.layers]),
            *(router for layer in mose.layers for router in layer.routers.values())]


@torch.no_grad()
def logits(mose, task):
    with mose.task(task):
        return mose.model(input_ids=data()).logits


def train(mose, name, average=True, steps=3, optimizer=None):
    """One task, as the recipe learns it: each process has a part of each batch. With an optimizer,
    the task is open already."""
    if optimizer is None:
        mose.begin_task(name)
        optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=1e-2)
    mose.observe(data())
    rank, world = processes.RANK, processes.WORLD
    for _ in range(steps):
        mose.model(input_ids=data()[rank::world], labels=data()[rank::world]).loss.backward()
        for parameter in mose.trainable_parameters() if average else ():
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= world
        optimizer.step(), optimizer.zero_grad()
    mose.end_task()
    return mose


def message(call, *args):
    """What a ValueError says."""
    try:
        call(*args)
    except ValueError as error:
        return str(error)


# ------------------------------------------------------------------------------ what processes run


def by_recipe(folder):
    """The recipe; then answers, files that go both ways, and a task without the sum of gradients."""
    os.chdir(folder)
    torch.manual_seed(processes.RANK)  # processes may draw other numbers: the task is the same
    names = {"torch": torch, "transformers": transformers, "MoSE": MoSE, "base": TINY,
             "prompts": data(), "batches": [(data(), data())] * 3}
    exec(recipe(0), names)
    mose, world = names["mose"], processes.WORLD
    notes = {"pool": pool(mose), "logits": logits(mose, "FOMC"),
             "numbers": sum(getattr(p, "to_local", lambda p=p: p)().numel()
                            for name, p in mose.model.model.layers.named_parameters()
                            if "sub_experts" not in name)}
    # Prompts and answers of other lengths: some processes are done long before the others.
    answers = []
    for i in range(processes.RANK, 4, world):
        prompt = data(seed=i)[:1, :3 + 2 * i]
        out = mose.model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                  max_new_tokens=2 + 3 * i, synced_gpus=world > 1)
        answers.append((i, out[0].tolist()))
    notes["answers"] = answers
    os.replace("mose.pt", f"mose-{world}.pt") if processes.RANK == 0 else None
    torch.distributed.barrier()
    mose.detach()
    other = MoSE.load(mose.model, "mose-1.pt")  # the file of one process, here perhaps in shards
    notes["other"] = logits(other, "FOMC")
    notes["alone"] = pool(train(other, "alone", average=False))
    note(folder, by_recipe, **notes)


def kinds_of_bases(folder):
    """Tied and untied, bf16 with norms in fp32, checkpointing; sharded as the second recipe does, or
    as transformers does; each beside the same base in one piece."""
    torch.distributed.init_process_group("gloo")
    notes = {}
    for kind in ("tied", "untied", "mixed", "checkpointing"):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=2048,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
            tie_word_embeddings=kind != "untied")
        bases = []
        for _ in range(2):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            if kind == "mixed":
                model.to(torch.bfloat16)
                for name, module in model.named_modules():
                    if "norm" in name:
                        module.float().register_forward_hook(lambda norm, x, y: y.bfloat16())
            if kind == "checkpointing":
                model.train().gradient_checkpointing_enable({"use_reentrant": False})
            bases.append(model)
        torch.manual_seed(0)
        whole = train(MoSE(bases[0]), "a")
        torch.manual_seed(0)
        mose = MoSE(bases[1])
        exec(recipe(1), {"model": bases[1], "mose": mose})
        train(mose, "a")
        mose.save(folder / f"{kind}-{processes.RANK}.pt")
        whole.detach()
        loaded = MoSE.load(bases[0], folder / f"{kind}-{processes.RANK}.pt")
        notes[kind] = {"whole": pool(whole), "shards": pool(mose), "logits": logits(mose, "a"),
                       "loaded": logits(loaded, "a")}
    note(folder, kinds_of_bases, **notes)


def wrong_ways(folder):
    """What is said to those who shard the experts, before and after a task is open."""
    from torch.distributed.fsdp import fully_shard
    torch.distributed.init_process_group("gloo")
    said = {}
    for when in ("before", "after"):
        mose = MoSE(load())
        mose.begin_task("a") if when == "after" else None
        for part in [*mose.model.model.layers, mose.model]:
            fully_shard(part)
        said[when] = [message(mose.begin_task, "b")] if when == "before" else [
            message(mose.trainable_parameters), message(mose.end_task),
            message(mose.set_task, "a")]
    split = load(tp_plan="auto")
    said["tensor parallel"] = [message(MoSE, split)]
    note(folder, wrong_ways, **said)


def with_accelerate(folder):
    """The third recipe. accelerate takes its FSDP plugin on GPUs alone, so its state is set here."""
    import accelerate
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"], cpu_ram_efficient_loading=False)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    names = {"torch": torch, "MoSE": MoSE, "model": load(), "accelerator": accelerator}
    torch.manual_seed(0)
    exec(recipe(2), names)
    mose = train(names["mose"], "FOMC", average=False, optimizer=names["optimizer"])
    train(mose, "later", average=False)
    note(folder, with_accelerate, pool=pool(mose), logits=logits(mose, "FOMC"),
         wrapped=[type(names["model"]).__name__, type(mose.layers[0].weight).__name__])


# ------------------------------------------------------------------------------ the recipes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shard")


@pytest.fixture(scope="module")
def one(folder):
    return each(1, by_recipe, folder)[0]


@pytest.mark.parametrize("count", [2, 4])
def test_a_base_in_shards_learns_what_one_process_learns(count, one, folder):
    ranks = each(count, by_recipe, folder)
    for rank in ranks:
        assert all(map(torch.equal, rank["pool"], ranks[0]["pool"]))  # bit for bit
        assert torch.equal(rank["pool"][1], one["pool"][1])  # the same masks
        assert torch.allclose(rank["logits"], one["logits"], atol=1e-3)
        # The file of one process says the same in shards, and the other way round.
        assert torch.allclose(rank["other"], one["logits"], atol=1e-4)
        assert rank["numbers"] == one["numbers"] / count  # of the layers of the base
    loaded = MoSE.load(load(), folder / f"mose-{count}.pt")
    assert torch.allclose(logits(loaded, "FOMC"), ranks[0]["logits"], atol=1e-4)
    answers = dict(answer for rank in ranks for answer in rank["answers"])
    assert answers == dict(one["answers"])
    # Control: without the sum of the gradients each process learns for itself.
    assert not torch.equal(ranks[0]["alone"][0], ranks[1]["alone"][0])


def test_bases_that_are_tied_or_of_mixed_dtypes_or_recompute_learn_the_same_in_shards(folder):
    ranks = each(2, kinds_of_bases, folder)
    for kind in ranks[0]:
        a, b = (rank[kind] for rank in ranks)
        assert all(map(torch.equal, a["shards"], b["shards"])), kind
        near = 0.02 if kind == "mixed" else 1e-4
        assert torch.allclose(a["shards"][0], a["whole"][0], atol=near), kind
        assert torch.allclose(a["logits"].float(), a["loaded"].float(), atol=10 * near), kind


def test_experts_in_shards_and_tensor_parallelism_are_refused_at_once(folder):
    for rank in each(2, wrong_ways, folder):
        for said in rank["before"] + rank["after"]:
            assert said and "shard the base first" in said
        assert "tensor parallel" in rank["tensor parallel"][0]


def test_the_fsdp_plugin_of_accelerate_learns_the_same(one, folder):
    pytest.importorskip("accelerate")
    ranks = each(2, with_accelerate, folder)
    assert ranks[0]["wrapped"] == ["FSDPLlamaForCausalLM", "Parameter"]
    assert all(map(torch.equal, ranks[0]["pool"], ranks[1]["pool"]))
    assert torch.allclose(ranks[0]["logits"], one["logits"], atol=1e-3)


# ------------------------------------------------------------------------------ train_trace.py

SCRIPT = ROOT / "train_trace.py"
SHORT = ["--tasks", "FOMC,NumGLUE-cm", "--max_train", "13", "--max_test", "9", "--epochs", "2",
         "--methods", "lora,mose", "--lr", "1e-3", "--batch", "5", "--tokens", "120",
         "--device", "cpu"]
FEW = ["--max_train", "3", "--max_test", "3", "--batch", "2", "--checkpointing"]


@pytest.mark.parametrize("count, more", [(2, []), (4, FEW)], ids=["2", "4, and fewer rows"])
def test_train_trace_in_shards_gets_the_scores_of_one_process(count, more, tmp_path):
    launch(1, SCRIPT, *SHORT, *more, "--name", "one", folder=tmp_path)
    launch(count, SCRIPT, *SHORT, *more, "--name", "all", "--shard", folder=tmp_path)
    for method in ("lora", "mose"):
        a, b = (json.loads((tmp_path / f"runs/{name}/{method}.json").read_text())
                for name in ("one", "all"))
        assert b["processes"] == count
        for key in ("R", "R_tail", "used", "source", "task_id_accuracy", "samples"):
            assert a[key] == b[key], key
    a, b = (MoSE.load(load(), tmp_path / f"runs/{name}/mose.pt") for name in ("one", "all"))
    assert torch.equal(pool(a)[1], pool(b)[1])
    assert torch.allclose(pool(a)[0], pool(b)[0], atol=1e-5)


def test_a_process_that_dies_ends_all_and_resume_goes_on(tmp_path):
    (tmp_path / "dies.py").write_text(
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); import train_trace\n"
        "begun, train = [], train_trace.train\n"
        "def dying(*args):\n"
        "    begun.append(args)\n"
        "    if len(begun) == 2 and train_trace.processes.RANK == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    train(*args)\n"
        "train_trace.train = dying\n"
        "train_trace.main(train_trace.parse())\n")
    launch(1, SCRIPT, *SHORT, "--name", "one", "--methods", "mose", folder=tmp_path)
    start = time.time()
    launch(2, "dies.py", *SHORT, "--name", "all", "--methods", "mose", "--shard", folder=tmp_path,
           fails=True)
    assert time.time() - start < 120  # with the time that two processes need to start
    assert (tmp_path / "runs/all/mose-1.pt").exists()
    assert not (tmp_path / "runs/all/mose.json").exists()
    launch(2, SCRIPT, "--resume", "runs/all", folder=tmp_path)
    a, b = (json.loads((tmp_path / f"runs/{name}/mose.json").read_text()) for name in ("one", "all"))
    assert a["R"] == b["R"] and a["source"] == b["source"]


def test_all_processes_make_as_many_passes(monkeypatch):
    monkeypatch.setattr(processes, "WORLD", 4)
    for sharded in (True, False):  # without shards none waits for another: no pass is added
        monkeypatch.setattr(processes, "SHARDED", sharded)
        for rows in range(9):
            plans = []
            for rank in range(4):
                monkeypatch.setattr(processes, "RANK", rank)
                plans.append([*processes.own_passes(
                    range(rows), lambda part: [[row] for row in part if row % 3], idle="idle")])
            assert sum(([row] in plan) for plan in plans for row in range(rows)) == sum(
                row % 3 > 0 for row in range(rows))
            if sharded:
                assert len({*map(len, plans)}) == 1
    assert len({*map(len, plans)}) > 1


@pytest.mark.parametrize("world, wrong, says", [
    (1, ["--shard"], "there is one process"),
    (2, ["--shard", "--device_map", "auto"], "expected one of them"),
    (2, ["--shard", "--ask", "mose.pt", "Why?"], "answers in one process")])
def test_a_wrong_option_says_what_to_do(world, wrong, says, monkeypatch, capsys):
    monkeypatch.setattr(processes, "WORLD", world)
    with pytest.raises(SystemExit):
        options.parse(wrong)
    assert says in capsys.readouterr().err


# ------------------------------------------------------------------------------ offload


def test_a_base_on_the_disk_is_refused_and_one_spread_by_device_map_learns(tmp_path):
    pytest.importorskip("accelerate")
    ends = []
    for where in (None, {"": "cpu"}):  # more devices than one would need a GPU
        torch.manual_seed(0)
        mose = MoSE(load(device_map=where))
        mose.begin_task("a")
        optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=1e-2)
        mose.model(input_ids=data(), labels=data()).loss.backward()
        optimizer.step()
        mose.observe(data())
        mose.end_task()
        ends.append(pool(mose))
    assert all(map(torch.equal, *ends))
    parts = ("embed_tokens", "rotary_emb", "norm", *(f"layers.{i}" for i in range(4)))
    places = {f"model.{part}": "disk" if part == "layers.1" else "cpu" for part in parts}
    base = load(device_map=places | {"lm_head": "cpu"}, offload_folder=tmp_path)
    assert "offloaded" in message(MoSE, base)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
