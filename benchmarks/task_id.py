"""Which task does a prompt of the real TRACE belong to? infer_task() on all test prompts.

    python -m benchmarks.task_id --data FOLDER    # results/task-id.json and .md

FOLDER is TRACE's LLM-CL-Benchmark_500. The keys are made of all training prompts, and no pass
through a model is needed: the token embeddings of tiny-llm (in this repository) and of SmolLM2-135M
(assets/get_smollm2.py, in runs/smollm2) are enough. Nothing is drawn at random, so there is no seed.
"""

import argparse
import json
import platform
import warnings
from pathlib import Path

import torch
import transformers

import train_trace
from mose import MoSE
from tracebench.data import padded_batches
from tracebench.options import Args

ROOT = Path(__file__).resolve().parent.parent
BASES = {"tiny-llm": ROOT / "assets/tiny-llm", "SmolLM2-135M": Path("runs/smollm2")}


def inferred(model, tokenizer, tasks):
    """{task: {inferred task: test prompts}}."""
    mose = MoSE(model)
    for task in tasks:
        mose.begin_task(task.name)
        for ids, mask in padded_batches(task.train_prompt_ids, tokenizer):
            mose.observe(ids, mask)
        with warnings.catch_warnings(action="ignore"):  # that the task has learned nothing
            mose.end_task()
    found = {}
    for task in tasks:
        names = []
        for ids, mask in padded_batches(task.test_prompt_ids, tokenizer):
            names += mose.infer_task(ids, mask)
        found[task.name] = {name: names.count(name) for name in dict.fromkeys(names)}
    return found


def report(results):
    """Markdown from the JSON alone."""
    lines = ["# Inferred tasks on the real TRACE\n",
             "Made by `python -m benchmarks.task_id --data FOLDER` on TRACE-0.5K. The keys are made "
             "of all training prompts (those of MeetingBank are a stand-in). Then `infer_task` "
             "chooses one of the eight tasks for each test prompt. Nothing is trained. "
             f"{results['machine']}.\n",
             "| task | test prompts | right, with tiny-llm | wrong | right, with SmolLM2-135M | "
             "wrong |", "|---|---|---|---|---|---|"]
    every = [*results["found"].values()]
    for task in every[0]:
        cells = [task, sum(every[0][task].values())]
        for found in every:
            wrong = [f"{n} as {name}" for name, n in found[task].items() if name != task]
            cells += [found[task].get(task, 0), ", ".join(wrong)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    right = [sum(found[task].get(task, 0) for task in found) for found in every]
    count = sum(sum(row.values()) for row in every[0].values())
    shares = [f"{n} ({100 * n / count:.1f} %)" for n in right]
    lines.append(f"| all | {count} | {shares[0]} | | {shares[1]} | |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="the folder of TRACE-0.5K")
    data = parser.parse_args().data
    found = {}
    for name, base in BASES.items():
        args = Args(model=str(base), data=data, device="cpu", epochs="1")
        model, tokenizer = train_trace.load_model(args)
        found[name] = inferred(model, tokenizer, train_trace.load_tasks(args, tokenizer, model))
    results = {"found": found, "machine": (
        f"CPU, {platform.machine()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}")}
    (ROOT / "results/task-id.json").write_text(json.dumps(results) + "\n")
    (ROOT / "results/task-id.md").write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
