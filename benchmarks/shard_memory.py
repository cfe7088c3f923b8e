"""Peak memory of a process that learns a task with a base in shards: 1, 2 and 4 processes.

    python -m benchmarks.shard_memory       # CPU, gloo; writes results/shard-memory.md

The base is a random Llama of 200 million numbers in fp32. Each process loads its shards, observes
prompts, makes three steps, ends the task, and saves. What the imports alone take is subtracted.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from mose import MoSE

ROOT = Path(__file__).resolve().parent.parent
SIZE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 8192,
        "num_attention_heads": 16, "num_key_value_heads": 16}
MB = 2**20


def peak():
    """Bytes of this process's memory, at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_use():
    """Bytes that this process alone holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def work(base):
    """What one process does; it prints its part of the numbers."""
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    before, held = peak(), in_use()
    shards = transformers.distributed.DistributedConfig(fsdp_size=world)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, distributed_config=shards)
    notes = {"loading": peak() - before, "base": in_use() - held}
    mose = MoSE(model)
    mose.begin_task("a")
    ids = torch.randint(8192, (4, 32), generator=torch.Generator().manual_seed(0))
    mose.observe(ids)
    own = mose.trainable_parameters()
    optimizer = torch.optim.AdamW(own, lr=1e-3)
    for _ in range(3):
        part = ids[rank::world]
        model(input_ids=part, labels=part).loss.backward()
        for parameter in own:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= world
        optimizer.step(), optimizer.zero_grad()
    mose.end_task()
    mose.save(Path(base) / f"{world}-{rank}.pt")
    notes |= {"all": peak() - before, "entries": sum(len(layer.weight) for layer in mose.layers)}
    every = [None] * world
    torch.distributed.all_gather_object(every, notes)
    if rank == 0:
        worst = {key: max(notes[key] for notes in every) for key in notes}
        print("RESULT", json.dumps(worst), flush=True)
    torch.distributed.destroy_process_group()


def main():
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model("llama", **SIZE)
        model = transformers.AutoModelForCausalLM.from_config(config)
        numbers = sum(p.numel() for p in model.parameters())
        model.save_pretrained(folder)
        del model
        for count in (1, 2, 4):
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count),
                 "-m", "benchmarks.shard_memory", folder], cwd=ROOT, text=True, check=True,
                stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
            result = next(line for line in done.stdout.splitlines() if "RESULT" in line)
            rows.append((count, json.loads(result.partition("RESULT")[2])))
    entries = rows[0][1]["entries"]
    text = ["# Memory of a process when the base lies in shards", "",
            f"Two CPU cores, gloo, a random Llama of {numbers / 1e6:.0f} million numbers in fp32 "
            f"({4 * numbers / MB:.0f} MB), experts", f"on q and v ({entries:,} entries, "
            f"{32 * entries / MB:.0f} MB with Adam's states). The largest of all processes, in MB, "
            "without", "what the imports take. `python -m benchmarks.shard_memory` writes this "
            "file.", "", "| processes | the base, when it is loaded | peak while loading | peak until "
            "the task is saved |", "|---|---|---|---|"]
    text += [f"| {count} | {r['base'] / MB:.0f} | {r['loading'] / MB:.0f} | {r['all'] / MB:.0f} |"
             for count, r in rows]
    (ROOT / "results/shard-memory.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    work(sys.argv[1]) if len(sys.argv) > 1 else main()
