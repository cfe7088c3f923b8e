"""A pretrained base: SmolLM2-135M-Instruct (dequantised from Q4_1, see assets/get_smollm2.py).

    python -m benchmarks.smollm2 search              # rates, on `eval` of four tasks
    python -m benchmarks.smollm2 search100           # two of them with four epochs in place of one
    python -m benchmarks.smollm2 mini                # six methods on trace-mini, three seeds
    python -m benchmarks.smollm2 long                # the same with four epochs in place of one
    python -m benchmarks.smollm2 ablation            # one change at a time, on `eval` of four tasks
    python -m benchmarks.smollm2 surgery             # other gates in the place of MoSEs' own
    python -m benchmarks.smollm2 trace --data PATH   # TRACE-0.5K: the tasks with short prompts
    python -m benchmarks.smollm2 whole --data PATH   # TRACE-0.5K: all eight tasks
    python -m benchmarks.smollm2 memory --data PATH  # its longest answers and prompts: peak memory
    python -m benchmarks.smollm2 gpu --data PATH     # one GPU: all eight tasks, 1 to 3 epochs
    python -m benchmarks.smollm2 report              # results/smollm2.json and .md of all that ran

Most are a list of runs of train_trace.py, two at a time with one thread each, into runs/; those of
`gpu` share it, all at the same time. Called again, it goes on where it was stopped. Two cores train
some 500 tokens a second in all, so a task of trace-mini has one epoch in `mini`, 25 steps, in place
of the default's four. Into commit 2212850, from which `gpu` ran, its epochs and tokens were put by
hand as they stand below. A fourth method, `base`, ran out of memory beside the others.

On an AMD core MKL takes kernels of half the speed. The runs of commit 9ff157e and later preloaded a
library (LD_PRELOAD) that holds `int mkl_serv_intel_cpu_true(void) { return 1; }`, so that it takes
those for AVX-512. All runs but `gpu` are in fp32.

Rule of the search, written before it ran: seed 0, the tasks of SEARCH in a row, one epoch each, all
scored on `eval` at the end. LoRA's rate is the one with the largest OP of task_lora among 3e-4,
1e-3 and 3e-3, and the same for all LoRAs; that of MoSEs is the one with the largest OP of mose
among 1e-3, 3e-3 and 1e-2. The ablation is reported, and changes no default: those are from
results/routing.md. (Both were the largest of their three. So one more rate of each was run
afterwards, 1e-2 and 3e-2, and the rule applied to all four.)

Rule of search100, written before it ran, when `long` had shown task_lora ahead of mose: the same
with four epochs, for each method its rate and the next lower one. It is reported beside `long`,
which keeps its rates, and says whether a longer run wants a lower one.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import train_trace
from benchmarks import routing
from mose import MoSE
from figures.report import public, spread
from tracebench.methods import METHODS
from tracebench.scores import TASKS, mean

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("search", "search100", "mini", "long", "ablation", "trace", "whole", "memory", "gpu")
SEARCH = "C-STANCE,FOMC,ScienceQA,NumGLUE-ds"
SHORT = "C-STANCE,FOMC,ScienceQA,NumGLUE-cm,NumGLUE-ds"  # of TRACE: prompts of few tokens
RATES = {"task_lora": ("3e-4", "1e-3", "3e-3", "1e-2"), "mose": ("1e-3", "3e-3", "1e-2", "3e-2")}
RATES_100 = {"task_lora": ("1e-3", "3e-3"), "mose": ("3e-3", "1e-2")}
MINI = ("lora", "replay", "joint", "task_lora", "mose", "mose_fixed")
ABLATION = {
    "one expert of rank 64, scale 4": "--experts 1 --rank 64 --top_k 1 --scale 4",
    "density 0.1": "--density 0.1",
    "half the scale": "--scale 4",
    "twice the scale": "--scale 16",
    "q, k, v and o": "--targets q_proj,k_proj,v_proj,o_proj",
    "mask never learned": "methods.KINDS['mose'] = FixedMask",
    "router never trained": "methods.KINDS['mose'] = methods.KINDS['mose_fixed']",
    "no start from a finished task": "train_trace.probe = lambda *given: 1.0",
}
# One script for all runs: what is changed in the code stands before its options.
SCRIPT = """import sys, train_trace
from benchmarks.routing import FixedMask
from tracebench import methods
exec(sys.argv.pop(1))
train_trace.main(train_trace.parse())
"""


def jobs(what, args):
    """{name of the run: (what is changed in the code, its options)}, in the order of running."""
    short = ["--epochs", "1", "--test", "ends"]
    search = [*short, "--tasks", SEARCH, "--split", "eval"]
    own = [*short, "--lr", args.lr, "--lora_lr", args.lora_lr]
    if what == "gpu":
        own = ["--preset", "gpu", "--epochs", "short", "--tokens", "20000", "--data",
               str(args.data)]  # a fourth did not fit into 80 GB beside them
        return {f"gpu {method} 0": ("", [*own, "--methods", method])
                for method in ("floor", "mose", "lora", "task_lora")}
    if what in ("search", "search100"):
        rates = RATES_100 if what == "search100" else RATES
        search += ["--epochs", "4"] if what == "search100" else []
        return {f"{what} {method} {rate}": ("", [*search, "--methods", method, "--lr", rate])
                for method in rates for rate in rates[method]}
    if what == "ablation":
        changes = {name: ("", change.split()) if change.startswith("--") else (change, [])
                   for name, change in ABLATION.items()}
        search += ["--methods", "mose", "--lr", args.lr]
        return {f"ablation {name}": (code, [*search, *options])
                for name, (code, options) in changes.items()}
    if what in ("mini", "long"):
        every = [("0", "floor,base"), *((seed, method) for seed in "012" for method in MINI)]
        own += ["--epochs", "4"] if what == "long" else []
        return {f"{what} {method} {seed}": ("", [*own, "--methods", method, "--seeds", seed])
                for seed, method in every}
    own += ["--data", str(args.data)]
    if what == "memory":
        own += ["--tasks", "ScienceQA,MeetingBank", "--max_train", "96", "--max_test", "20"]
        return {"memory mose 0": ("", [*own, "--methods", "mose"])}
    own += ["--tasks", SHORT] if what == "trace" else []
    return {f"{what} {methods} 0": ("", [*own, "--methods", methods]) for methods in
            ("floor,base", "mose", "lora", "task_lora", "replay", "joint")}


def work(name, code, options, model):
    """One run, or what is left of it."""
    folder = Path("runs") / name
    methods = options[options.index("--methods") + 1].split(",")
    if all((folder / f"{method}.json").exists() for method in methods):
        return
    again = ["--resume", str(folder)] if (folder / "args.json").exists() else None
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                            capture_output=True, text=True).stdout.strip() or "unknown"
    file = Path(f"runs/{name}.commit")  # of all its commits: it may have gone on with another
    commits = file.read_text().split(", ") if again else []
    file.write_text(", ".join(dict.fromkeys([*commits, commit])))
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
            | {"commit": file.parent.with_name(f"{file.parent.name}.commit").read_text()}
            for file in files}
    other = Path("runs/surgery.json")
    return {"runs": runs, "surgery": json.loads(other.read_text()) if other.exists() else {}}


def of(results, start):
    """{method: [its results]} of the runs whose names start so."""
    found = {}
    for name, result in results["runs"].items():
        if name.startswith(start):
            found.setdefault(result["method"], []).append(result)
    return {method: found[method] for method in METHODS if method in found}


def cost(runs):
    """What the runs took, in words."""
    testing = sum(r["seconds_testing"] for r in runs)
    seconds = testing + sum(r["seconds_training"] for r in runs)
    return (f"{seconds / 3600:.1f} hours in all, {testing / seconds:.0%} of them for testing; at "
            f"most {max(r['peak_memory_bytes'] for r in runs) / 2**30:.1f} GiB")


def rates(results):
    """Lines: the search of the learning rates."""
    yield ("\n## Rates\n\n" + SEARCH.replace(",", ", ") + " of trace-mini (synthetic) in a row, "
           "seed 0, scored on `eval` (50 examples a task) at the end; the rules stand in the "
           "script.\n")
    yield "| method | steps a task | rate | OP | " + SEARCH.replace(",", " | ") + " |"
    yield "|---" * 8 + "|"
    for name, r in results["runs"].items():
        if name.startswith("search"):
            steps = 100 if name.startswith("search100 ") else 25
            yield (f"| `{r['method']}` | {steps} | {name.split()[2][:-1]} | {r['op']:.1f} | "
                   + " | ".join(f"{score:.1f}" for score in r["R"][-1]) + " |")


def table(results, start, title, about, tasks):
    """Lines: each method, and what is left of each task at the end."""
    methods = of(results, start)
    if "mose" not in methods:
        return
    yield f"\n## {title}\n\n{about}\n"
    yield ("| method | seeds | OP | BWT | learned | OP, inferred | bytes | "
           + " | ".join(tasks) + " |")
    yield "|---" * (7 + len(tasks)) + "|"
    for method, runs in methods.items():
        cells = [spread([r[key] for r in runs]) for key in ("op", "bwt", "learned", "op_tail")]
        sizes = [r["bytes"][-1] for r in runs if r["bytes"]]
        cells.append(f"{mean(sizes):,.0f}" if sizes else "")
        cells += [spread(column) for column in zip(*(r["R"][-1] for r in runs))]
        yield f"| `{method}` | {len(runs)} | " + " | ".join(cells) + " |"
    trained = [r for runs in methods.values() for r in runs if r["tokens"]]
    mose = methods["mose"]
    commits = sorted({commit for r in trained for commit in r["commit"].split(", ")})
    yield (f"\nMoSEs at a rate of {mose[0]['args']['lr']}, LoRAs at {mose[0]['args']['lora_lr']}; "
           f"commit {', '.join(commits)}; {cost(trained)}.")
    right = [share for r in mose for share in r["task_id_accuracy"]]
    sources = sorted({f"{task} from {source}" for r in mose
                      for task, source in zip(r["tasks"], r["source"]) if source})
    yield (f"MoSEs infer the task of {mean(right):.2f} % of the test prompts right, and have "
           f"{mean([r['bytes'][-1] for r in mose]) / len(tasks):,.0f} bytes a task. Tasks that "
           f"start from another: {', '.join(sources) or 'none'}.")
    yield "\nAbove `floor` right after learning (less than ten points says nothing):\n"
    yield "| method | " + " | ".join(tasks) + " |"
    yield "|---" * (1 + len(tasks)) + "|"
    floor = methods["floor"][0]["R"][-1]
    for method, runs in [(m, runs) for m, runs in methods.items() if m not in ("floor", "base")]:
        # (The first score of a task is the one right after learning.)
        scores = [[next(score for score in column if score is not None)
                   for column in zip(*r["R"])] for r in runs]
        yield f"| `{method}` | " + " | ".join(
            f"{mean(column) - low:+.1f}" for column, low in zip(zip(*scores), floor)) + " |"


def speed(results):
    """Lines: what the runs on a GPU took."""
    methods = {method: run for method, (run,) in of(results, "gpu ").items() if run["tokens"]}
    if methods:
        yield "\n| method | training, s | tokens a second | testing, s | peak memory, GiB |"
        yield "|---" * 5 + "|"
    for method, r in methods.items():
        yield (f"| `{method}` | {r['seconds_training']:.0f} | "
               f"{r['tokens'] / r['seconds_training']:,.0f} | {r['seconds_testing']:.0f} | "
               f"{r['peak_memory_bytes'] / 2**30:.1f} |")


def gates(results):
    """Lines: the surgery."""
    if not results["surgery"]:
        return
    yield ("\n## Other gates than its own\n\nMoSEs of the first table of trace-mini, 20 `test` "
           "prompts a task; difference to its own gates, paired over seeds.\n")
    yield "| gates | OP | difference |"
    yield "|---|---|---|"
    own = results["surgery"]["own"]
    for how, ops in results["surgery"].items():
        yield f"| {how} | {spread(ops)} | {spread([a - b for a, b in zip(ops, own)])} |"


def ablation(results):
    """Lines: one change at a time, beside the run of the search that it changes."""
    rows = {name.removeprefix("ablation ").removesuffix(": mose"): r
            for name, r in results["runs"].items() if name.startswith("ablation ")}
    if not rows:
        return
    same = max((r for name, r in results["runs"].items() if name.startswith("search mose")),
               key=lambda r: r["op"])
    yield ("\n## One change at a time\n\nAs under Rates, one seed, which says little: a router "
           "that is never trained loses much here, and nothing in the first table, where "
           f"`mose_fixed` has three. {cost(rows.values())}.\n")
    yield ("| changed | OP | " + SEARCH.replace(",", " | ") + " | bytes | starts from another |")
    yield "|---" * 8 + "|"
    for name, r in {"nothing": same, **rows}.items():
        yield (f"| {name} | {r['op']:.1f} | " + " | ".join(f"{x:.1f}" for x in r["R"][-1])
               + f" | {r['bytes'][-1]:,} | {sum(source is not None for source in r['source'])} |")


def report(results):
    """Markdown from the JSON alone."""
    runs = [r for name, r in results["runs"].items()
            if r["tokens"] and not name.startswith("gpu ")]
    lora = next(r for r in runs if r["method"] == "task_lora")
    mini = ("All eight tasks in a row, {} steps a task, 100 `test` examples a task; ±: deviation "
            "over seeds (0, 1, ..). Scores of the tasks are those at the end.")
    real = ("All training examples (500; MeetingBank 376, a stand-in) and all of `test` "
            "(100; NumGLUE-cm 81), seed 0. `base` is zero-shot, `floor` a guess without a model.")
    gpu = ("{device}, bf16, torch {versions[torch]}: the methods at the same time, each a process "
           "of its own, with --preset gpu --epochs {args[epochs]} --tokens {args[tokens]}. " + real)
    lines = [
        "# A pretrained base: SmolLM2-135M-Instruct\n",
        "Dequantised from Q4_1 ([`get_smollm2.py`](../assets/get_smollm2.py)), so not the original "
        "weights. `python -m benchmarks.smollm2 search`, then `mini`, `long`, `search100`, "
        "`ablation`, `surgery`, `trace`, `whole`, `memory`, `gpu`, `report`; but for `gpu`, "
        f"{runs[0]['device']} for each run, two runs at a time on two cores. Other work ran beside "
        "some, and those of commit 9ff157e and later took other kernels (see the script), twice as "
        f"fast: the hours compare with nothing. {cost(runs)}. A LoRA of rank 8 in bf16 has "
        f"{2 * lora['parameters']:,} bytes a task. "
        "[`smollm2.json`](smollm2.json) holds every number. What is missing was not measured.",
        *rates(results),
        *table(results, "mini ", "trace-mini (synthetic)", mini.format(25), TASKS),
        *table(results, "long ", "trace-mini, four epochs", mini.format(100), TASKS),
        *gates(results), *ablation(results),
        *table(results, "trace ", "TRACE-0.5K, the tasks with short prompts",
               f"One epoch. {real}", SHORT.split(",")),
        *table(results, "whole ", "TRACE-0.5K, all eight tasks", f"One epoch. {real}", TASKS)]
    for run in of(results, "gpu ").get("mose", []):
        again = of(results, "gpu ")["task_lora"][0]["bwt"]
        lines += [*table(results, "gpu ", "TRACE-0.5K, all eight tasks, on a GPU",
                         gpu.format_map(run), TASKS), *speed(results),
                  f"\nBWT is {run['bwt']:+.2f} there, and not exactly 0: the answers to "
                  "MeetingBank, of up to 515 tokens, were not all the same when they were made "
                  f"again. `task_lora`, which has a file for them alone, has {again:+.2f}, so that "
                  "is not forgetting; its cause was not found."]
    for run in of(results, "memory ").get("mose", []):
        lines += [f"\n## Memory\n\nScienceQA and MeetingBank of TRACE-0.5K, 96 training examples "
                  f"each, --tokens {run['args']['tokens']}: {cost([run])}. (Runs of TRACE before "
                  "commit 1f434ae had 2048 tokens.)"]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=(*RUNS, "surgery", "report"))
    parser.add_argument("--model", default="runs/smollm2")
    parser.add_argument("--data", help="of trace, whole, memory, gpu: the folder of TRACE-0.5K")
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
    todo = jobs(args.what, args)
    with concurrent.futures.ThreadPoolExecutor(len(todo) if args.what == "gpu" else 2) as pool:
        every = [pool.submit(work, name, *job, args.model) for name, job in todo.items()]
        for job in every:
            job.result()


if __name__ == "__main__":
    main()
