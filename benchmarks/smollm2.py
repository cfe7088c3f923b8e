"""A pretrained base: SmolLM2-135M-Instruct (dequantised from Q4_1, see assets/get_smollm2.py).

    python -m benchmarks.smollm2 search              # rates, on `eval` of four tasks
    python -m benchmarks.smollm2 mini                # five methods on trace-mini, three seeds
    python -m benchmarks.smollm2 ablation            # one change at a time, on `eval` of four tasks
    python -m benchmarks.smollm2 surgery             # other gates in the place of MoSEs' own
    python -m benchmarks.smollm2 trace --data PATH   # TRACE-0.5K: the tasks with short prompts
    python -m benchmarks.smollm2 report              # results/smollm2.json and .md of all that ran

Most are a list of runs of train_trace.py, two at a time with one thread each, into runs/. Called
again, it goes on where it was stopped. Two cores train some 450 tokens a second in all, so a task
of trace-mini has one epoch here, 25 steps, in place of four.

Rule of the search, written before it ran: seed 0, the tasks of SEARCH in a row, one epoch each, all
scored on `eval` at the end. LoRA's rate is the one with the largest OP of task_lora among 3e-4,
1e-3 and 3e-3, and the same for all LoRAs; that of MoSEs is the one with the largest OP of mose
among 1e-3, 3e-3 and 1e-2. The ablation is reported, and changes no default: those are from
results/routing.md. (Both were the largest of their three. So one more rate of each was run
afterwards, 1e-2 and 3e-2, and the rule applied to all four.)
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import train_trace
from benchmarks import routing
from mose import MoSE
from results.report import public, spread
from trace.scores import TASKS, mean

ROOT = Path(__file__).resolve().parent.parent
SEARCH = "C-STANCE,FOMC,ScienceQA,NumGLUE-ds"
SHORT = "C-STANCE,FOMC,ScienceQA,NumGLUE-cm,NumGLUE-ds"  # of TRACE: prompts of few tokens
RATES = {"task_lora": ("3e-4", "1e-3", "3e-3", "1e-2"), "mose": ("1e-3", "3e-3", "1e-2", "3e-2")}
MINI = ("lora", "replay", "joint", "task_lora", "mose")
ABLATION = {
    "one expert of rank 64, scale 4": "--experts 1 --rank 64 --top_k 1 --scale 4",
    "density 0.1": "--density 0.1",
    "q, k, v and o": "--targets q_proj,k_proj,v_proj,o_proj",
    "mask never learned": "train_trace.KINDS['mose'] = FixedMask",
    "no start from a finished task": "train_trace.probe = lambda *given: 1.0",
}
# One script for all runs: what is changed in the code stands before its options.
SCRIPT = """import sys, train_trace
from benchmarks.routing import FixedMask
exec(sys.argv.pop(1))
train_trace.main(train_trace.parse())
"""


def jobs(what, args):
    """{name of the run: (what is changed in the code, its options)}, in the order of running."""
    short = ["--epochs", "1", "--test", "ends"]
    search = [*short, "--tasks", SEARCH, "--split", "eval"]
    own = [*short, "--lr", args.lr, "--lora_lr", args.lora_lr]
    if what == "search":
        return {f"search {method} {rate}": ("", [*search, "--methods", method, "--lr", rate])
                for method, rates in RATES.items() for rate in rates}
    if what == "ablation":
        changes = {name: ("", change.split()) if change.startswith("--") else (change, [])
                   for name, change in ABLATION.items()}
        search += ["--methods", "mose", "--lr", args.lr]
        return {f"ablation {name}": (code, [*search, *options])
                for name, (code, options) in changes.items()}
    if what == "mini":
        every = [("0", "floor,base")] + [("0", method) for method in MINI]
        every += [(seed, method) for seed in "12" for method in ("mose", "lora", "task_lora")]
        every += [(seed, method) for seed in "12" for method in ("replay", "joint")]
        return {f"mini {method} {seed}": ("", [*own, "--methods", method, "--seeds", seed])
                for seed, method in every}
    own += ["--data", str(args.data), "--tasks", SHORT]
    return {f"trace {methods} 0": ("", [*own, "--methods", methods]) for methods in
            ("floor,base", "mose", "lora", "task_lora", "replay", "joint")}


def work(name, code, options, model):
    """One run, or what is left of it."""
    folder = Path("runs") / name
    methods = options[options.index("--methods") + 1].split(",")
    if all((folder / f"{method}.json").exists() for method in methods):
        return
    again = ["--resume", str(folder)] if (folder / "args.json").exists() else None
    command = [sys.executable, "-c", SCRIPT, code,
               *(again or ["--model", model, "--name", name, *options])]
    with open(f"runs/{name}.log", "a") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True, env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


@torch.no_grad()
def surgery(prompts=20):
    """{gates: [OP of each seed]}: MoSEs of `mini` with other gates than its own."""
    result = {how: [] for how in routing.SURGERY}
    for file in sorted(Path("runs").glob("mini mose ?/mose.json")):
        args = train_trace.Args(**json.loads(file.read_text())["args"] | {"max_test": prompts})
        base, tokenizer = train_trace.load_model(args)
        tasks = train_trace.load_tasks(args, tokenizer, base)
        adapter = MoSE.load(base, file.with_suffix(".pt"))
        scores = routing.operated(adapter, base, tokenizer, tasks, args, routing.SURGERY)
        for how in routing.SURGERY:
            result[how].append(mean(scores[how]))
        Path("runs/surgery.json").write_text(json.dumps(result))
    return result


# ------------------------------------------------------------------------------ the report


def collected():
    """All that has run: {"runs": {"name: method": result}, "surgery": ..}, without texts."""
    files = [file for file in sorted(Path("runs").glob("* */*.json"))
             if file.name != "args.json" and not file.name.endswith("progress.json")]
    runs = {f"{file.parent.name}: {file.stem}": public(json.loads(file.read_text()))
            for file in files}
    other = Path("runs/surgery.json")
    return {"runs": runs, "surgery": json.loads(other.read_text()) if other.exists() else {}}


def of(results, start):
    """{method: [its results]} of the runs whose names start so."""
    found = {}
    for name, result in results["runs"].items():
        if name.startswith(start):
            found.setdefault(result["method"], []).append(result)
    return {method: found[method] for method in train_trace.METHODS if method in found}


def by_task(results, start, tasks):
    """A table of what is left of each task at the end; "learned" and BWT for those in a row."""
    lines = ["| method | seeds | OP | BWT | learned | OP, inferred | bytes | "
             + " | ".join(tasks) + " |", "|---" * (7 + len(tasks)) + "|"]
    for method, runs in of(results, start).items():
        cells = [spread([r[key] for r in runs]) for key in ("op", "bwt", "learned", "op_tail")]
        sizes = [r["bytes"][-1] for r in runs if r["bytes"]]
        cells.append(f"{mean(sizes):,.0f}" if sizes else "")
        cells += [spread(column) for column in zip(*(r["R"][-1] for r in runs))]
        lines.append(f"| `{method}` | {len(runs)} | " + " | ".join(cells) + " |")
    return lines


def report(results):
    """Markdown from the JSON alone."""
    runs = results["runs"]
    some = next(iter(runs.values()))
    trained = [r for r in runs.values() if r["tokens"]]
    hours = sum(r["seconds_training"] + r["seconds_testing"] for r in runs.values()) / 3600
    share = statistics.mean(r["seconds_testing"] / (r["seconds_testing"] + r["seconds_training"])
                            for r in trained)
    memory = max(r["peak_memory_bytes"] for r in trained) / 2**30
    lines = [
        "# A pretrained base: SmolLM2-135M-Instruct\n",
        "Dequantised from Q4_1 ([`get_smollm2.py`](../assets/get_smollm2.py)), so not the original "
        "weights. `python -m benchmarks.smollm2 search`, then `mini`, `ablation`, `surgery`, "
        f"`trace`, `report`; {some['device']} for each run, two runs at a time on two cores (and, "
        f"at times, other work beside them), {hours:.1f} hours in all; testing took {share:.0%} of "
        f"the time, and the peak memory was {memory:.1f} GiB. [`smollm2.json`](smollm2.json) holds "
        "every number. What is missing below has not been run yet.\n",
        "## Rates\n", f"{SEARCH} of trace-mini (synthetic) in a row, seed 0, 25 steps a task, "
        "scored on `eval` (50 examples a task) at the end; the rule stands in the script.\n",
        "| method | rate | OP | " + SEARCH.replace(",", " | ") + " |", "|---" * 7 + "|"]
    for name, r in runs.items():
        if name.startswith("search "):
            lines.append(f"| `{r['method']}` | {name.split()[2][:-1]} | {r['op']:.1f} | "
                         + " | ".join(f"{score:.1f}" for score in r["R"][-1]) + " |")
    mini = of(results, "mini ")
    if "mose" in mini:
        lines += ["\n## trace-mini (synthetic)\n", "All eight tasks in a row, 25 steps a task, 100 "
                  f"`test` examples a task, MoSEs at {mini['mose'][0]['args']['lr']}, LoRAs at "
                  f"{mini['mose'][0]['args']['lora_lr']}; ±: deviation over seeds (0, 1, ..). "
                  "Scores of the tasks are those at the end.\n", *by_task(results, "mini ", TASKS)]
        right = [share for r in mini["mose"] for share in r["task_id_accuracy"]]
        sources = {f"{task} from {source}" for r in mini["mose"]
                   for task, source in zip(r["tasks"], r["source"]) if source}
        each = mini["mose"][0]["bytes"][-1] / len(TASKS)
        lora = 2 * mini["lora"][0]["parameters"]
        lines.append(f"\nMoSEs: the task of a test prompt is inferred right in "
                     f"{statistics.mean(right):.2f} %; {each:,.0f} bytes a task, where a LoRA "
                     f"of rank 8 in bf16 has {lora:,}; tasks that start from another: "
                     f"{', '.join(sorted(sources)) or 'none'}.")
        scores = [mean(column) for column in zip(*(r["R"][-1] for r in mini["mose"]))]
        near = [task for task, x, y in zip(TASKS, scores, mini["floor"][0]["R"][-1]) if x < y + 10]
        lines.append(f"Less than ten points above `floor`, so hardly learned: {', '.join(near)}.")
    if results["surgery"]:
        own = results["surgery"]["own"]
        lines += ["\n## Other gates than its own\n", "MoSEs of the table above, 20 `test` prompts "
                  "a task; difference to its own gates, paired over seeds.\n",
                  "| gates | OP | difference |", "|---|---|---|"]
        for how, ops in results["surgery"].items():
            lines.append(f"| {how} | {spread(ops)} | "
                         f"{spread([a - b for a, b in zip(ops, own)])} |")
    if any(name.startswith("ablation ") for name in runs):
        lines += ["\n## One change at a time\n", "As under Rates, one seed: differences of a few "
                  "points say nothing.\n", "| changed | OP | bytes | starts from another |",
                  "|---|---|---|---|"]
        best = max((r for n, r in runs.items() if n.startswith("search mose")),
                   key=lambda r: r["op"])
        rows = {"nothing": best} | {name.removeprefix("ablation ").removesuffix(": mose"): r
                                    for name, r in runs.items() if name.startswith("ablation ")}
        lines += [f"| {name} | {r['op']:.1f} | {r['bytes'][-1]:,} | "
                  f"{sum(source is not None for source in r['source'])} |"
                  for name, r in rows.items()]
    if of(results, "trace "):
        lines += ["\n## TRACE-0.5K, the tasks with short prompts\n", "One epoch, all 500 training "
                  "and 100 `test` examples (NumGLUE-cm 81), seed 0. `base` is zero-shot, `floor` "
                  "a guess without a model.\n", *by_task(results, "trace ", SHORT.split(","))]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("search", "mini", "ablation", "surgery", "trace",
                                         "report"))
    parser.add_argument("--model", default="runs/smollm2")
    parser.add_argument("--data", help="of trace: the folder of TRACE-0.5K")
    parser.add_argument("--lr", default="1e-2", help="of mose")
    parser.add_argument("--lora_lr", default="3e-3")
    args = parser.parse_args()
    Path("runs").mkdir(exist_ok=True)
    if args.what == "surgery":
        return print(surgery())
    if args.what == "report":
        results = collected()
        (ROOT / "results/smollm2.json").write_text(json.dumps(results) + "\n")
        (ROOT / "results/smollm2.md").write_text(report(results), encoding="utf-8")
        return print(report(results))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        every = [pool.submit(work, name, *job, args.model)
                 for name, job in jobs(args.what, args).items()]
        for job in every:
            job.result()


if __name__ == "__main__":
    main()
