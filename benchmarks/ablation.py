"""What matters and what does not: one change at a time, three seeds, scored on `eval` alone.

    python -m benchmarks.ablation        # writes results/ablation.json and results/ablation.md

Each row learns four tasks of trace-mini (synthetic) in a row with train_trace.py's own loop: those
that one LoRA does not always solve, since the others tell no settings apart. Every task starts from
the bare base: transfer is off. Rows run side by side, one thread each.
"""

import argparse
import json
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

import mose
import train_trace
from figures.report import spread
from tracebench.scores import mean

ROOT = Path(__file__).resolve().parent.parent

TASKS = "FOMC,MeetingBank,Py150,ScienceQA"
begin, straight_through = mose.SubExperts.begin, mose.straight_through


@torch.no_grad()
def carry_over(layer, *start):
    """Scores go on from where the last task left them, as in Winning SubNetworks."""
    before = layer.score.clone()
    begin(layer, *start)
    if layer.used.any():
        layer.score.copy_(before)


@torch.no_grad()
def wide_start(layer, *start):
    """Scores start ten times as far apart, so the first random mask changes less."""
    begin(layer, *start)
    layer.score.mul_(10.0)


@torch.no_grad()
def fixed_mask(layer, *start):
    """The mask stays as it was drawn."""
    begin(layer, *start)
    layer.score.requires_grad_(False)


def score_only(weight, score, frozen, used, mask):
    """The straight-through gradient reaches the scores; weights learn inside the mask alone."""
    value = torch.where(used, frozen, weight)
    learned = value.detach() * score
    return torch.where(mask, value, 0.0) + (learned - learned.detach())


# The former default, but for its scale of 32: all gates, and a router that hardly differs between
# tokens. Routing has a search of its own: benchmarks/routing.py.
CENTRE = {"experts": 4, "rank": 16, "top_k": 4, "router_std": 0.02, "density": 0.03, "scale": 16.0,
          "lr": 0.01}
# Name of the row: (method, changed options, changed function of mose.py).
ROWS = {
    "centre": ("mose", {}, None),
    "density 0.02": ("mose", {"density": 0.02}, None),
    "density 0.05": ("mose", {"density": 0.05}, None),
    "no mixture, E=1 R=64": ("mose", {"experts": 1, "rank": 64, "top_k": 1}, None),
    "E=8 R=16": ("mose", {"experts": 8, "top_k": 8}, None),
    "top-1": ("mose", {"top_k": 1}, None),
    "top-2": ("mose", {"top_k": 2}, None),
    "scale 8": ("mose", {"scale": 8.0}, None),
    "scale 32 (the former default)": ("mose", {"scale": 32.0}, None),
    "scale 64": ("mose", {"scale": 64.0}, None),
    "lr 0.005": ("mose", {"lr": 0.005}, None),
    "lr 0.02": ("mose", {"lr": 0.02}, None),
    "scores start in 0 .. 0.1": ("mose", {}, ("begin", wide_start)),
    "scores carried over": ("mose", {}, ("begin", carry_over)),
    "mask drawn at random, never learned": ("mose", {}, ("begin", fixed_mask)),
    "straight-through to the score only": ("mose", {}, ("straight_through", score_only)),
    "task_lora, lr 0.005": ("task_lora", {"lr": 0.005}, None),
    "task_lora, lr 0.01": ("task_lora", {"lr": 0.01}, None),
    "task_lora, lr 0.02": ("task_lora", {"lr": 0.02}, None),
    "task_lora, rank 64, scale 4": ("task_lora", {"lora_rank": 64}, None),
    "task_lora, rank 64, scale 1": ("task_lora", {"lora_rank": 64, "lora_scale": 1.0}, None),
    "lora, lr 0.001": ("lora", {"lr": 0.001}, None),
    "lora, lr 0.003": ("lora", {"lr": 0.003}, None),
    "lora, lr 0.01": ("lora", {"lr": 0.01}, None),
}


def one(name, seed):
    """The results of one row with one seed, in a process of its own."""
    torch.set_num_threads(1)
    train_trace.transformers.logging.set_verbosity_error()
    train_trace.transformers.utils.logging.disable_progress_bar()
    method, options, patch = ROWS[name]
    mose.SubExperts.begin, mose.straight_through = begin, straight_through
    train_trace.probe = lambda *given: 1.0  # every task starts from the base
    if patch:
        setattr(mose.SubExperts if patch[0] == "begin" else mose, *patch)
    args = train_trace.Args(tasks=TASKS, seeds=str(seed), split="eval", test="ends", device="cpu",
                            **{**CENTRE, **options})
    model, tokenizer = train_trace.load_model(args)
    tasks = train_trace.load_tasks(args, tokenizer, model)
    with tempfile.TemporaryDirectory() as folder:
        record = train_trace.Record(Path(folder), method, tasks, args)
        train_trace.learn_in_a_row(record, model, tokenizer, tasks, args, tqdm(disable=True))
    result = record.result
    last = result["R"][-1]
    return {"seed": seed, "op": mean(last), "tasks": last, "used": result["used"][-1],
            "bytes": result["bytes"][-1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", default="", help="only rows whose name holds this; others stay")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    seeds, names = [int(s) for s in args.seeds.split(",")], [r for r in ROWS if args.rows in r]
    rows, file = {name: [] for name in names}, args.out / "ablation.json"
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = {pool.submit(one, name, seed): name for seed in seeds for name in names}
        for job in tqdm(as_completed(jobs), "ablation", len(jobs), unit="run", ncols=100):
            rows[jobs[job]].append(job.result())
    former = json.loads(file.read_text()) if file.exists() else {}
    old, note = former.get("rows", {}), former.get("note")
    rows = {name: rows.get(name) or old[name] for name in ROWS if name in {**rows, **old}}
    lines = [
        "# One change at a time\n",
        *([f"{note}\n"] if note else []),
        f"`python -m benchmarks.ablation`: {TASKS} of trace-mini (synthetic) in a row with "
        f"tiny-llm, two CPU cores, seeds {args.seeds}, 50 `eval` examples a task; bytes: seed 0.\n",
        "Centre: " + ", ".join(f"{key} {value}" for key, value in CENTRE.items()) + ".\n",
        "| changed | OP, mean ± deviation | lowest task, mean | used share | bytes |",
        "|---|---|---|---|---|",
    ]
    for name, runs in rows.items():
        lowest = min(statistics.mean(column) for column in zip(*(r["tasks"] for r in runs)))
        lines.append(f"| {name} | {spread([r['op'] for r in runs])} | {lowest:.1f} | "
                     f"{statistics.mean(r['used'] for r in runs):.3f} | {runs[0]['bytes']:,} |")
    (args.out / "ablation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    file.write_text(json.dumps({"note": note, "centre": CENTRE, "rows": rows}, indent=1) + "\n")
    print("\n".join(lines[-len(rows) - 2:]))


if __name__ == "__main__":
    main()
