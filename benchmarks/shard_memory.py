"""Peak memory of a process that learns a task with a base in shards: 1, 2 and 4 processes.

    python -m benchmarks.shard_memory       # CPU, gloo; writes results/shard-memory.md

The base is a random Llama of 117 million numbers in fp32. Each process loads its shards, observes
prompts, makes two steps, ends the task, and saves. Memory is what torch allocates, as its profiler
counts it; that of a process as a whole also holds files and what the C library keeps.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from mose import MoSE

ROOT = Path(__file__).resolve().parent.parent
SIZE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 8192,
        "num_attention_heads": 16, "num_key_value_heads": 16}
MB = 2**20


def peak(profile):
    """Bytes that torch had allocated at most, beyond what it held when the profile began."""
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def work(base):
    """What one process does; it prints its part of the numbers."""
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shards = transformers.distributed.DistributedConfig(fsdp_size=world)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, distributed_config=shards)
    parts = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
    with torch.profiler.profile(profile_memory=True) as profile:
        entries = learn(model, rank, world, Path(base) / f"{world}-{rank}.pt")
    notes = {"base": sum(part.nbytes for part in parts), "peak": peak(profile), "entries": entries}
    every = [None] * world
    torch.distributed.all_gather_object(every, notes)
    if rank == 0:
        worst = {key: max(notes[key] for notes in every) for key in notes}
        print("RESULT", json.dumps(worst), flush=True)
    torch.distributed.destroy_process_group()


def learn(model, rank, world, file):
    """One task; returns the number of entries of its pools."""
    mose = MoSE(model)
    mose.begin_task("a")
    ids = torch.randint(8192, (4, 32), generator=torch.Generator().manual_seed(0))
    mose.observe(ids)
    own = mose.trainable_parameters()
    optimizer = torch.optim.AdamW(own, lr=1e-3)
    for _ in range(2):
        part = ids[rank::world]
        model(input_ids=part, labels=part).loss.backward()
        for parameter in own:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= world
        optimizer.step(), optimizer.zero_grad()
    mose.end_task()
    mose.save(file)
    return sum(len(layer.weight) for layer in mose.layers)


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
            f"{32 * entries / MB:.0f} MB with Adam's states). The largest of all processes, in MB of "
            "what", "torch allocates. Beyond the base, the peak holds the experts, one or two whole "
            "layers of the base, and what a pass", "keeps. `python -m benchmarks.shard_memory` writes "
            "this file.", "", "| processes | its part of the base | peak of learning a task, beyond "
            "that | in all |", "|---|---|---|---|"]
    text += [f"| {count} | {r['base'] / MB:.0f} | {r['peak'] / MB:.0f} | "
             f"{(r['base'] + r['peak']) / MB:.0f} |" for count, r in rows]
    (ROOT / "results/shard-memory.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    work(sys.argv[1]) if len(sys.argv) > 1 else main()
