"""A pretrained base: SmolLM2-135M-Instruct (dequantised from Q4_1, see assets/get_smollm2.py).

    python -m benchmarks.smollm2 search              # the rates of LoRAs and of MoSEs
    python -m benchmarks.smollm2 long                # all methods on trace-mini, three seeds
    python -m benchmarks.smollm2 steps               # trace-mini with 25 steps a task
    python -m benchmarks.smollm2 whole --data PATH   # TRACE-0.5K: all eight tasks, one epoch
    python -m benchmarks.smollm2 memory --data PATH  # its longest answers and prompts: peak memory
    python -m benchmarks.smollm2 gpu --data PATH     # one GPU: all eight tasks, 1 to 3 epochs
    python -m benchmarks.smollm2 report              # results/smollm2.json and .md of all that ran

`search` looks for the rates of LoRAs of rank 1 and 8 and of MoSEs: 100 steps a task, `eval`, seed 0.
It was made in steps, and the rule of each was written before it ran (the last steps are about `long`
and `steps`):

1. Rank 1 on C-STANCE and NumGLUE-ds, rates 3e-3 and 1e-2; the larger mean wins. 3e-3 won, the lower
   one, so 1e-3 was added. `long` ran with 3e-3.
2. Most of MoSEs' lead in `long` came from two tasks that the search did not have. So these follow
   (`search more`: NumGLUE-cm and ScienceQA), and 5e-3 too. The largest mean of all four tasks wins;
   if it is not 3e-3, `long` runs rank 1 again with it. 1e-2 won: 78.0, and 3e-3 had 60.5. (1e-3
   ran on the first two tasks alone: 30.0. 5e-3 ran on the last two alone: 69.0. To win, it would
   need more than 87 on the first two, where 3e-3 and 1e-2 have 61 and 56.)
3. MoSEs on the same four tasks, with 4.3e-3 (their default then) and with 1e-2; whatever wins,
   `long` shows. 1e-2 won: 83.0, and 4.3e-3 had 74.5. So `long` has MoSEs with both.
4. For both methods 1e-2 was the highest rate that was tried. So 2e-2 follows on the same tasks:
   where its mean is larger than with 1e-2, `long` runs that method again with it. MoSEs have 84.0
   (75.0 and 93.0), so `long` has it as well: there it is below 1e-2. Rank 1 has 56.5 (62.0 and 51.0).
5. In `long`, MoSEs with 1e-2 reach the score of a LoRA of rank 8, whose 3e-3 was chosen with 25
   steps. So rank 8 gets the same search, with 3e-3 and 1e-2: if 1e-2 wins, `long` runs it again.
   3e-3 has 90.5. 1e-2 has 62.0 on the last two tasks, so it can't win, and the others were left
   out.
6. MoSEs with a fixed A, at density 0.02: about as many numbers for a task as the default has. In
   `long` they had 33 on NumGLUE-cm with 1e-2 (density 0.01, seed 0), where the default has 98, so
   higher rates follow: 2e-2 and 4e-2 on the four tasks. `long` shows the better one. If it is 4e-2,
   8e-2 is tried before. Both have 78.0 (70.0 and 86.0, 71.0 and 85.0), and `long` has 2e-2
   (seed 0: 90.2).
7. The density: MoSEs with 1e-2 and the densities 0.001, 0.003 and 0.03 beside the 0.01 of step 3.
   The rule, and what came of it, is that of the density in benchmarks/frontier.py.
8. LoRAs of rank 2, the size between ranks 1 and 8, with the two rates of rank 8. `long` has them with
   the better one. 3e-3 has 73.0 (68.0 and 78.0), and 1e-2 has 82.0 (64.0 and 100.0).
9. VeRA of rank 256, the rank that it has on tiny-llm: 38,400 numbers for a task. Rates 3e-2 and
   1e-1 (1e-1 was the best of four on tiny-llm). If 3e-2 wins, 1e-2 follows, and if 1e-1 wins, 3e-1.
   `long` runs the best of the three. 3e-2 has 65.0 (60.0 and 70.0) and 1e-1 has 82.5 (67.0 and
   98.0). 3e-1 has 23.0 on the first two tasks, so it can't win, and the others were left out.
10. The LoRAs of rank 8 in `long` were of an earlier version, which drew other numbers. They run again
    with three seeds and today's code, and replace the old ones whatever comes out. (They have 92.1,
    and had 93.9 before.)
11. Four more rows of `long`, with three seeds each. Nothing is chosen by them: they show more sizes,
    and how much of a difference is chance. They are rank 2 (step 8), the densities 0.001 and 0.03
    with 1e-2, and `mose again`: the default density with 1e-2, other draws and another order of the
    data.
12. The smallest size of all, density 0.0003 with 1e-2: some 1,100 numbers for a task. Nothing is
    chosen by it. And `lora`, `replay` and `joint` in `long` were of the earlier version too (step
    10). They run again with today's code, and replace the old ones whatever comes out. (Density
    0.0003 has 63.9, `lora` 17.4 and `replay` 63.5. Of `joint`, seed 0 alone ran so far: 96.6.)
13. The default rate of MoSEs is 9.2e-3, near their 1e-2 of step 3. (It was set after the results of
    1e-2 were known, also those on `test`.) So `long` has MoSEs with no option but the seed, three
    seeds: `mose 9.2e-3`. Nothing is chosen by it, and the first table of the README shows it,
    whatever comes out. `own alone` (a task reads what it owns and nothing else) follows with
    three seeds, too, beside `free A` and `fixed A` of seed 0. (The default has 93.6. Of `own alone`
    only seed 0 ran: 93.7.)
14. One expert with a fixed A and density 0.02 has the highest score of the first table on tiny-llm.
    `long` has it as well, with the rate of step 6 (2e-2), the scale that one expert has on tiny-llm,
    and three seeds. Nothing is chosen by it, and the first table shows it, whatever comes out. (Only
    seeds 0 and 1 ran: 87.5.)
15. A mask without scores (`moved most` of benchmarks/frontier.py), with 5e-3, since half of the rate
    of MoSEs was its best on tiny-llm. One seed; nothing is chosen by it. (It has 87.2.)
16. `steps`: 25 steps a task. MoSEs with their default rate, half of it and twice it, and LoRAs of rank
    8 with 3e-3 and 1e-2 (`eval`, all eight tasks, seed 0). Nothing is chosen by it: it shows whether
    one rate does for 25 and for 100 steps. (63.1 with the default, 59.7 with half and 64.0 with twice
    it, and the LoRAs have 55.6 with 3e-3. They did not run with 1e-2.)

Each is a list of runs of train_trace.py, two at a time with one thread each, into runs/; those of
`gpu` share the GPU, all at the same time. (The runs of MoSEs and `tested once` in `whole` had both
cores for themselves, and two threads.) Called again, a list goes on where it was stopped. `report`
adds what has run here to what results/smollm2.json holds already.

On an AMD core MKL takes kernels of half the speed. The runs preloaded a library (LD_PRELOAD) that
holds `int mkl_serv_intel_cpu_true(void) { return 1; }`, so that it takes those for AVX-512. The base
is in fp32, but in bf16 for `gpu` and `whole` (whose rows of `replay` and `joint` are older: fp32).

Rates. LoRAs have 3e-3: with 25 steps a task it was the best of 3e-4, 1e-3, 3e-3 and 1e-2 for
task_lora on `eval` of four tasks, and with 100 steps it had 87.5 against 72.5 with 1e-3 (seed 0).
(These results were not kept.) The rate of MoSEs stands in the name of a run of `long`. Their default
is 9.2e-3 now, and was 4.3e-3 before.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.frontier import CHANGES, ONE_EXPERT, SCRIPT
from figures.report import public, spread, standard_error
from tracebench.methods import METHODS, OURS
from tracebench.scores import TASKS, mean

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("search", "long", "steps", "whole", "memory", "gpu")
SEARCHED = {"search": "C-STANCE,NumGLUE-ds", "search more": "NumGLUE-cm,ScienceQA"}
# {what: the option of its rate, and the rates}
RATES = {"task_lora": ("--lora_lr", ("3e-3", "1e-2")),
         "task_lora r1": ("--lora_lr", ("3e-3", "1e-2", "5e-3", "2e-2")),
         "mose": ("--lr", ("4.3e-3", "1e-2", "2e-2")),
         "fixed A .02": ("--lr", ("2e-2", "4e-2")),
         "mose .003": ("--lr", ("1e-2",)),
         "mose .03": ("--lr", ("1e-2",)),
         "mose .001": ("--lr", ("1e-2",)),
         "task_lora r2": ("--lora_lr", ("3e-3", "1e-2")),
         "VeRA r256": ("--lora_lr", ("3e-2", "1e-1", "3e-1"))}
# {name of a run: its options}, of trace-mini with 100 steps a task. The names of ours end with the
# rate. (4.3e-3 was their default rate when these runs were made.)
ABOUT_OURS = {
    "mose": ["--methods", "mose"],
    "one expert": ["--methods", "mose", *ONE_EXPERT],
    "mose_fixed": ["--methods", "mose_fixed"],
    "mose .003": ["--methods", "mose", "--density", "0.003"],  # far below the smallest LoRA
}
FIXED_A = ["--methods", "mose", "--fixed_A", "--density", "0.02"]
FEW_STEPS = (("mose", "--lr", ("9.2e-3", "4.6e-3", "1.84e-2")),
             ("task_lora", "--lora_lr", ("3e-3", "1e-2")))
ONLY_SEARCHED = {
    "fixed A .02": FIXED_A,
    "mose .03": ["--methods", "mose", "--density", "0.03"],
    "mose .001": ["--methods", "mose", "--density", "0.001"],
    "task_lora r2": ["--methods", "task_lora", "--lora_rank", "2"],
    "VeRA r256": ["--methods", "task_lora", "--lora_rank", "256"],  # needs peft
}
LONG = {f"{name} {rate}": [*options, "--lr", rate]
        for rate in ("1e-2", "4.3e-3") for name, options in ABOUT_OURS.items()}
LONG |= {
    "mose 9.2e-3": ["--methods", "mose"],  # the default, as it is
    "mose 2e-2": ["--methods", "mose", "--lr", "2e-2"],
    "mose .02 1e-2": ["--methods", "mose", "--density", "0.02", "--lr", "1e-2"],
    "mose .005 1e-2": ["--methods", "mose", "--density", "0.005", "--lr", "1e-2"],
    "mose .0003 1e-2": ["--methods", "mose", "--density", "0.0003", "--lr", "1e-2"],
    "mose .001 1e-2": ["--methods", "mose", "--density", "0.001", "--lr", "1e-2"],
    "mose .03 1e-2": ["--methods", "mose", "--density", "0.03", "--lr", "1e-2"],
    "mose again 1e-2": ["--methods", "mose", "--lr", "1e-2"],  # the A/A row
    # About the bytes of MoSEs, with the rate of the other LoRAs and with its own.
    "task_lora r1": ["--methods", "task_lora", "--lora_rank", "1"],
    "task_lora r1 1e-2": ["--methods", "task_lora", "--lora_rank", "1", "--lora_lr", "1e-2"],
    "task_lora r2 1e-2": ["--methods", "task_lora", "--lora_rank", "2", "--lora_lr", "1e-2"],
    **{method: ["--methods", method] for method in ("lora", "replay", "joint", "task_lora")},
    "VeRA r256 1e-1": [*ONLY_SEARCHED["VeRA r256"], "--lora_lr", "1e-1"],
    "fixed A 1e-2": ["--methods", "mose", "--fixed_A", "--lr", "1e-2"],
    "fixed A .02 2e-2": [*FIXED_A, "--lr", "2e-2"],
    "fixed A, one expert .02 2e-2": [*FIXED_A, *ONE_EXPERT, "--lr", "2e-2"],
}
LONG |= {f"{change} 1e-2": LONG["mose 1e-2"] for change in ("free A", "own alone")}
LONG["moved most 5e-3"] = ["--methods", "mose", "--lr", "5e-3"]
# A LoRA that only its own task has is tested when it is learned. It does not change after that, so
# this is its score at the end as well.
CHANGES["tested once"] = """
tests = {}
def evaluate(model, tokenizer, adapter, task, args, evaluate=train_trace.evaluate):
    if task.name not in tests:
        tests[task.name] = evaluate(model, tokenizer, adapter, task, args)
    return tests[task.name]
train_trace.evaluate = evaluate
"""
CHANGED = ("free A", "own alone", "moved most", "tested once", "VeRA", "again")  # of the frontier


def jobs(what, data):
    """{name of the run: its options}, in the order of running."""
    own = ["--test", "ends", "--lora_lr", "3e-3"]
    if what == "search":
        own += ["--split", "eval"]
        options = ABOUT_OURS | LONG | ONLY_SEARCHED
        return {f"{start} {name} {rate} 0": [*own, *options[name], "--tasks", tasks, option, rate]
                for name, (option, rates) in RATES.items() for rate in rates
                for start, tasks in SEARCHED.items()}
    if what == "long":
        todo = {"long floor,base 0": [*own, "--methods", "floor,base"]}
        for seed in "012":
            for name, options in LONG.items():
                todo[f"long {name} {seed}"] = [*own, "--seeds", seed, *options]
        return todo
    if what == "steps":
        own += ["--split", "eval", "--epochs", "1"]  # one epoch is 25 steps
        return {f"25 steps {method} {rate} 0": [*own, "--methods", method, option, rate]
                for method, option, rates in FEW_STEPS for rate in rates}
    own += ["--data", str(data)]
    if what == "gpu":
        own += ["--preset", "gpu", "--epochs", "short", "--tokens", "20000"]
        return {f"gpu {method} 0": [*own, "--methods", method]
                for method in ("floor", "mose", "lora", "task_lora")}
    own += ["--epochs", "1"]
    if what == "memory":
        own += ["--tasks", "ScienceQA,MeetingBank", "--max_train", "96", "--max_test", "20"]
        return {"memory mose 0": [*own, "--methods", "mose"]}
    own += ["--dtype", "bfloat16"]  # a third less time on these cores
    methods = ("floor,base", "mose", "lora", "task_lora", "replay", "joint")
    runs = {some: ["--methods", some] for some in methods}
    runs["task_lora r1 1e-2, tested once"] = LONG["task_lora r1 1e-2"]
    return {f"whole {name} 0": [*own, *options] for name, options in runs.items()}


def work(name, options, model):
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
    change = next((change for change in CHANGED if change in name), "")
    command = [sys.executable, "-c", SCRIPT, CHANGES[change],
               *(again or ["--model", model, "--name", name, *options])]
    with open(f"runs/{name}.log", "a") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True, env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


# ------------------------------------------------------------------------------ the report


def collected():
    """{"runs": {"name: method": result}}, without texts: those of the JSON, and all that ran here."""
    runs = json.loads((ROOT / "results/smollm2.json").read_text())["runs"]
    for file in sorted(Path("runs").glob("* */*.json")):
        if file.name != "args.json" and not file.name.endswith("progress.json"):
            commit = file.parent.with_name(f"{file.parent.name}.commit").read_text().strip()
            runs[f"{file.parent.name}: {file.stem}"] = (
                public(json.loads(file.read_text())) | {"commit": commit})
    return {"runs": dict(sorted(runs.items()))}


def of(results, start):
    """{name without its seed: [its results]} of the runs whose names start so."""
    found = {}
    for name, result in results["runs"].items():
        if name.startswith(start):
            run, method = name.removeprefix(start).split(": ")
            group, _ = run.rsplit(" ", 1)
            found.setdefault(method if group == "floor,base" else group, []).append(result)
    order = [*METHODS]
    return dict(sorted(found.items(), key=lambda item: (order.index(item[1][0]["method"]), item[0])))


def rate_of(name, run):
    """The learning rate of a run of this name, in words."""
    if run["method"] not in OURS:
        return run["args"]["lora_lr"]
    if run["args"]["lr"]:
        return run["args"]["lr"]
    return "4.3e-3, the default then" if name.endswith("4.3e-3") else "9.2e-3, the default"


def cost(runs):
    """What the runs took, in words."""
    testing = sum(r["seconds_testing"] for r in runs)
    seconds = testing + sum(r["seconds_training"] for r in runs)
    return (f"{seconds / 3600:.1f} hours in all, {testing / seconds:.0%} of them for testing; at "
            f"most {max(r['peak_memory_bytes'] for r in runs) / 2**30:.1f} GiB")


def table(results, start, title, about, tasks):
    """Lines: each method, and what is left of each task at the end."""
    methods = of(results, start)
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
    for method, runs in methods.items():
        if runs[0]["tokens"]:
            commits = sorted({commit for r in runs for commit in r["commit"].split(", ")})
            base = "bf16" if runs[0]["args"]["dtype"] == "bfloat16" else "fp32"
            yield (f"\n`{method}`: commit {', '.join(commits)}, "
                   f"rate {rate_of(method, runs[0])}, base in "
                   f"{base}; {runs[0]['device']}, {cost(runs)}.")
    if not any(runs[0]["method"] == "mose" for runs in methods.values()):
        yield "\nMoSEs at the default density were not measured here with this version."
    for name, runs in methods.items():
        if runs[0]["method"] in OURS:
            yield from about_moses(name, runs, methods)
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


def about_moses(name, runs, methods):
    """Lines: what runs of MoSEs own and store, and how far they are from the LoRAs."""
    tasks = runs[0]["tasks"]
    right = mean([share for r in runs for share in r["task_id_accuracy"]])
    new = mean([mean(r["new"]) for r in runs])
    total, first, last = (mean(sizes) for sizes in zip(*(
        (r["bytes"][-1], r["bytes"][0], r["bytes"][-1] - r["bytes"][-2]) for r in runs)))
    sources = sorted({f"{task} from {source}" for r in runs
                      for task, source in zip(tasks, r["source"]) if source})
    yield (f"\n`{name}`, density {runs[0]['args']['density']}: the task of {right:.2f} % of the test "
           f"prompts is inferred right. A task owns {new:,.0f} numbers and has "
           f"{total / len(tasks):,.0f} bytes (the first {first:,.0f}, the last {last:,.0f}). Tasks "
           f"that start from another: {', '.join(sources) or 'none'}.")
    compared = ["task_lora", "task_lora r1", "task_lora r1 1e-2", "VeRA r256 1e-1",
                f"mose {name.split()[-1]}"]  # of its rate
    if name in ("mose 1e-2", "mose 2e-2"):
        compared.append("mose 4.3e-3")
    if name == "mose 9.2e-3":
        compared.append("mose 1e-2")
    for other in compared:
        if other == name:
            continue
        # (The A/A row has seeds from 1000 on.)
        gaps = [a["op"] - b["op"] for a in runs for b in methods.get(other, [])
                if int(a["args"]["seeds"]) % 1000 == int(b["args"]["seeds"])]
        if len(gaps) > 1:
            yield (f"Paired over {len(gaps)} seeds, `{name}` - `{other}`: {mean(gaps):+.1f}, "
                   f"standard error {standard_error(gaps):.1f}.")
        elif gaps:
            yield f"With the same seed, `{name}` - `{other}`: {gaps[0]:+.1f}."


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


def report(results):
    """Markdown from the JSON alone."""
    lora = results["runs"]["long task_lora 0: task_lora"]
    long = ("All eight tasks in a row, 100 `test` examples a task; ±: deviation over seeds (0, 1, "
            "..). Scores of the tasks are those at the end.")
    real = ("All training examples (500; MeetingBank 376, a stand-in) and all of `test` "
            "(100; NumGLUE-cm 81), seed 0. `base` is zero-shot, `floor` a guess without a model.")
    gpu = ("{device}, bf16, torch {versions[torch]}: the methods at the same time, each a process "
           "of its own, with --preset gpu --epochs {args[epochs]} --tokens {args[tokens]}. " + real)
    lines = [
        "# A pretrained base: SmolLM2-135M-Instruct\n",
        "Dequantised from Q4_1 ([`get_smollm2.py`](../assets/get_smollm2.py)), so not the original "
        "weights. `python -m benchmarks.smollm2 long`, `whole`, `gpu`, then `report`; except `gpu`, "
        "on two CPU cores: two runs at a time with one thread each, or one with two threads. Other "
        "work ran beside some, so their seconds compare with nothing. These runs are of before "
        "train_trace.py was rewritten: `joint` with seeds 1 and 2 on trace-mini, `replay` and `joint` "
        "on TRACE-0.5K, and those on a GPU. They are the "
        "same function as now, but other numbers were drawn, the first step of the warm-up had a "
        "rate of 0, and their files are larger. A LoRA of rank 8 in bf16 has "
        f"{2 * lora['new'][0]:,} bytes a task. The LoRAs of rank 1 of before 8daee77 were saved again "
        "by its code, so their bytes are those of today. "
        "[`smollm2.json`](smollm2.json) holds every number. What is missing was not measured.",
        *table(results, "long ", "trace-mini (synthetic), 100 steps a task", long, TASKS),
        *table(results, "whole ", "TRACE-0.5K, all eight tasks", f"One epoch. {real}", TASKS)]
    for run in of(results, "gpu ").get("task_lora", []):
        lines += [*table(results, "gpu ", "TRACE-0.5K, all eight tasks, on a GPU",
                         gpu.format_map(run), TASKS), *speed(results),
                  f"\nBWT of `task_lora` is {run['bwt']:+.2f} there, and not exactly 0, though each "
                  "task has a file of its own: the answers to MeetingBank, of up to 515 tokens, "
                  "were not all the same when they were made again. The cause was not found."]
    few_steps = of(results, "25 steps ")
    if few_steps:
        lines += few_steps_table(few_steps)
    searched = of(results, "search ")
    if searched:
        lines += search_table(searched)
    for run in of(results, "memory ").get("mose", []):
        lines += [f"\n## Memory\n\nScienceQA and MeetingBank of TRACE-0.5K, 96 training examples "
                  f"each, --tokens {run['args']['tokens']}: {cost([run])}."]
    return "\n".join(lines) + "\n"


def few_steps_table(few_steps):
    """Lines: runs with 25 steps a task. few_steps: {name: [result]}, one each."""
    yield ("\n## 25 steps a task\n\ntrace-mini, `eval`, seed 0. The name ends with the rate. Scores of "
           "the tasks are those at the end.\n")
    yield "| run | OP | " + " | ".join(TASKS) + " |"
    yield "|---" * (2 + len(TASKS)) + "|"
    for name, (run,) in few_steps.items():
        yield f"| `{name}` | {run['op']:.1f} | " + " | ".join(f"{x:.1f}" for x in run["R"][-1]) + " |"


def search_table(searched):
    """Lines: what was searched, of all four tasks. searched: {name: [result]} of pairs of tasks."""
    yield ("\n## Rates and densities that were searched\n\ntrace-mini, 100 steps a task, `eval`, "
           "seed 0. OP of two tasks each, the mean of all four, and the bytes of a task (half of the "
           "matrix that the keys of MoSEs share is in them). The name ends with the rate.\n")
    yield "| run | " + " | ".join(SEARCHED.values()).replace(",", ", ") + " | mean | bytes |"
    yield "|---" * (3 + len(SEARCHED)) + "|"
    for name in dict.fromkeys(name.removeprefix("more ") for name in searched):
        pairs = [run for start in ("", "more ") for run in searched.get(start + name, [])]
        op = {run["args"]["tasks"]: run["op"] for run in pairs}
        cells = [f"{op[tasks]:.1f}" if tasks in op else "" for tasks in SEARCHED.values()]
        cells.append(f"{mean([*op.values()]):.1f}" if len(op) == len(SEARCHED) else "")
        size = mean([run["bytes"][-1] / len(run["tasks"]) for run in pairs])
        yield f"| `{name}` | " + " | ".join(cells) + f" | {size:,.0f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=(*RUNS, "report"))
    parser.add_argument("--model", default="runs/smollm2")
    parser.add_argument("--data", help="of whole, memory, gpu: the folder of TRACE-0.5K")
    args = parser.parse_args()
    Path("runs").mkdir(exist_ok=True)
    if args.what == "report":
        results = collected()
        (ROOT / "results/smollm2.json").write_text(json.dumps(results) + "\n")
        (ROOT / "results/smollm2.md").write_text(report(results), encoding="utf-8")
        return print(report(results))
    todo = jobs(args.what, args.data)
    with concurrent.futures.ThreadPoolExecutor(len(todo) if args.what == "gpu" else 2) as pool:
        every = [pool.submit(work, name, options, args.model) for name, options in todo.items()]
        for job in every:
            job.result()


if __name__ == "__main__":
    main()
