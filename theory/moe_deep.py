"""From linear to deep: the same question in a small LLM. When must a router stop learning?

    python -m theory.moe_deep       # two CPU cores, 10 minutes; writes results/theory_deep.*

Four ways to learn the eight tasks of trace-mini (synthetic) in a row with tiny-llm, through the own
loop of train_trace.py: a mixture whose one shared router never stops (moe_lora, --router_stop 0),
stops after the first task (1) or the fourth (4), and MoSEs with a router per task. Note that only
MoSEs protects the experts too, so only the first three differ in the router alone.

For each task: the score when learned and after the last task; the routing entropy (mean over tokens
of the gates' entropy, 1 = all experts alike); how far the gates of its test prompts moved meanwhile
(mean total variation distance, 0 = not at all, 1 = other experts altogether).
"""

import argparse
import json
import math
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import train_trace
from figures.gates import last_gates
from tracebench.data import pad
from tracebench.scores import TASKS, backward_transfer, mean

ROOT = Path(__file__).resolve().parent.parent

WAYS = {"never stops": ("moe_lora", 0), "stops after task 1": ("moe_lora", 1),
        "stops after task 4": ("moe_lora", 4), "a router per task (MoSEs)": ("mose", 0)}
STYLES = dict(zip(WAYS, (("#d55e00", "s"), ("#009e73", "^"), ("#0072b2", "v"), ("#000000", "o"))))


@torch.no_grad()
def gates_of(model, tokenizer, adapter, task):
    """Gates of all layers for the tokens of 32 test prompts: (tokens, layers, E)."""
    ids, mask = pad(task.test[:32], tokenizer.pad_token_id)
    model(input_ids=ids, attention_mask=mask)
    return torch.stack(last_gates(adapter), dim=2)[mask.bool()]  # of (B, T, layers, E)


def one(way, seed):
    """One way with one seed, in a process of its own."""
    torch.set_num_threads(1)
    train_trace.transformers.logging.set_verbosity_error()
    train_trace.transformers.utils.logging.disable_progress_bar()
    method, stop = WAYS[way]
    args = train_trace.Args(seeds=str(seed), router_stop=stop, device="cpu")
    model, tokenizer = train_trace.load_model(args)
    tasks = train_trace.load_tasks(args, tokenizer, model)
    evaluate, seen = train_trace.evaluate, {task.name: [] for task in tasks}

    def watch(model, tokenizer, adapter, task, args):
        result = evaluate(model, tokenizer, adapter, task, args)
        if task.name not in adapter.tasks:  # tested before it is learned
            return result
        with adapter.task(task.name):
            seen[task.name].append(gates_of(model, tokenizer, adapter, task))
        return result

    train_trace.evaluate = watch
    with tempfile.TemporaryDirectory() as folder:
        record = train_trace.open_record(method, tasks, args, Path(folder))
        train_trace.run(record, model, tokenizer, tasks, args, tqdm(disable=True))
    train_trace.evaluate = evaluate
    R = record.result["R"]
    result = {"R": R, "op": mean(R[-1]), "bwt": backward_transfer(R), "seed": seed, "entropy": [],
              "moved": []}
    for gates in seen.values():
        last = gates[-1].clamp(min=1e-12)
        entropy = -(last * last.log()).sum(-1) / math.log(last.shape[-1])
        result["entropy"].append(entropy.mean().item())
        result["moved"].append(0.5 * (gates[-1] - gates[0]).abs().sum(-1).mean().item())
    return result


def mean_sd(values, digits=1):
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def draw(rows, tasks, seeds, file):
    """Forgetting, routing entropy and movement of the gates, for each task."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    x = range(len(tasks))
    for way, runs in rows.items():
        color, marker = STYLES[way]
        forgotten = [statistics.mean(r["R"][i][i] - r["R"][-1][i] for r in runs) for i in x]
        series = (forgotten, *([statistics.mean(r[key][i] for r in runs) for i in x]
                               for key in ("entropy", "moved")))
        for axis, values in zip(axes, series):
            axis.plot(x, values, color=color, marker=marker, label=way)
    names = ("score lost since learned, points", "routing entropy, 1 = all experts alike",
             "gates moved since learned, 0-1")
    for axis, name in zip(axes, names):
        axis.set(ylabel=name, xlabel="task, in the order of learning")
        axis.set_xticks(x, tasks, rotation=45, ha="right", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"tiny-llm on trace-mini (synthetic), mean of seeds {seeds}; 400 training and "
                    "100 test examples a task", fontsize=9)
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    rows = {way: [] for way in WAYS}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        seeds = [int(s) for s in args.seeds.split(",")]
        jobs = {pool.submit(one, way, seed): way for way in WAYS for seed in seeds}
        bar = tqdm(as_completed(jobs), "from linear to deep", len(jobs), unit="run", ncols=100)
        for job in bar:
            rows[jobs[job]].append(job.result())
    tasks = list(TASKS)
    out = ROOT / "results/theory_deep"
    out.with_suffix(".json").write_text(json.dumps({"tasks": tasks, "rows": rows}, indent=1) + "\n")
    draw(rows, tasks, args.seeds, out.with_suffix(".png"))
    print("| router | OP | BWT | entropy, mean | gates moved, mean |\n|---|---|---|---|---|")
    for way, runs in rows.items():
        cells = [mean_sd([r["op"] for r in runs]), mean_sd([r["bwt"] for r in runs])]
        for key in ("entropy", "moved"):
            cells.append(mean_sd([statistics.mean(r[key]) for r in runs], 3))
        print(f"| {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
