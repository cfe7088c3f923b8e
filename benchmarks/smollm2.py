"""A pretrained base: SmolLM2-135M-Instruct (dequantised from Q4_1, see assets/get_smollm2.py).

    python -m benchmarks.smollm2 search              # rates, on `eval` of four tasks
    python -m benchmarks.smollm2 mini                # all methods on trace-mini, three seeds
    python -m benchmarks.smollm2 trace --data PATH   # TRACE-0.5K: the tasks with short prompts

Each is a list of runs of train_trace.py, two at a time with one thread each, into runs/. Called
again, it goes on where it was stopped. Two cores train some 450 tokens a second in all, so a task
of trace-mini has one epoch here, 25 steps, in place of four.

Rule of the search, written before it ran: seed 0, the tasks of SEARCH in a row, one epoch each, all
scored on `eval` at the end. LoRA's rate is the one with the largest OP of task_lora among 3e-4,
1e-3 and 3e-3, and the same for all LoRAs; that of MoSEs is the one with the largest OP of mose
among 1e-3, 3e-3 and 1e-2. Then, at that rate, MoSEs with scale 4 and 16, and density 0.1, on the
same four tasks: reported, and not taken, since the defaults are those of results/routing.md.
"""

import argparse
import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SEARCH = "C-STANCE,FOMC,ScienceQA,NumGLUE-ds"
RATES = {"task_lora": ("3e-4", "1e-3", "3e-3"), "mose": ("1e-3", "3e-3", "1e-2")}
MINI = ("lora", "replay", "joint", "task_lora", "mose")


def jobs(what, args):
    """{name of the run: its options}, in the order of running."""
    short = ["--epochs", "1", "--test", "ends"]
    if what == "search":
        search = [*short, "--tasks", SEARCH, "--split", "eval"]
        plan = {f"search-{method}-{rate}": [*search, "--methods", method, "--lr", rate]
                for method, rates in RATES.items() for rate in rates}
        more = {"scale-4": ["--scale", "4"], "scale-16": ["--scale", "16"],
                "density-0.1": ["--density", "0.1"]}
        return plan | {f"search-mose-{name}": [*search, "--methods", "mose", "--lr", args.lr, *new]
                       for name, new in more.items()}
    own = ["--lr", args.lr, "--lora_lr", args.lora_lr, *short]
    if what == "mini":
        plan = {f"mini-{seed}-floor-base": [*own, "--methods", "floor,base"] for seed in "0"}
        return plan | {f"mini-{seed}-{method}": [*own, "--methods", method, "--seeds", seed]
                       for seed in "012" for method in MINI}
    own += ["--data", args.data, "--tasks", "C-STANCE,FOMC,ScienceQA,NumGLUE-cm,NumGLUE-ds"]
    return {f"trace-0-{methods}": [*own, "--methods", methods]
            for methods in ("floor,base", "mose", "lora", "task_lora", "replay", "joint")}


def work(name, options, model):
    folder = Path("runs") / name
    methods = options[options.index("--methods") + 1].split(",")
    if all((folder / f"{method}.json").exists() for method in methods):
        return
    again = ["--resume", str(folder)] if (folder / "args.json").exists() else None
    command = [sys.executable, str(ROOT / "train_trace.py"),
               *(again or ["--model", model, "--name", name, *options])]
    with open(f"runs/{name}.log", "a") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("search", "mini", "trace"))
    parser.add_argument("--model", default="runs/smollm2")
    parser.add_argument("--data", help="of trace: the folder of TRACE-0.5K")
    parser.add_argument("--lr", default="3e-3", help="of mose")
    parser.add_argument("--lora_lr", default="1e-3")
    args = parser.parse_args()
    Path("runs").mkdir(exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        done = [pool.submit(work, name, options, args.model)
                for name, options in jobs(args.what, args).items()]
        for job in done:
            job.result()


if __name__ == "__main__":
    main()
