"""Does a new task learn from old ones? Related, repeated and unrelated tasks, and long streams.

    python -m benchmarks.transfer                    # all of it: some hours on two cores
    python -m benchmarks.transfer --only "stream 4"  # only the 32 tasks in a row
    python -m benchmarks.transfer --only report      # results/transfer.md and .png of the JSON

Everything is synthetic (assets/trace-mini, assets/transfer-mini) and runs through train_trace.py's
own training and scoring. Jobs run side by side, one thread each, and a job whose result stands in
results/transfer.json is not run again. All is scored on `test`.

The rates and the ranks of the LoRAs are the best of the frontier (benchmarks/frontier.py): rank 8
with 1e-2, and in streams rank 1 with 2e-2, which has about as many bytes for a task as MoSEs have.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

import mose
import train_trace as loop
from benchmarks.frontier import CHANGES
from figures.report import spread, standard_error
from tracebench.baselines import LoRA
from tracebench.data import encode, pad, padded_batches, writable_golds
from tracebench.options import Args
from tracebench.scores import TASKS, mean

ROOT = Path(__file__).resolve().parent.parent

EARLY = ("Vault", "FOMC", "NumGLUE-ds", "MeetingBank")
# Later task: the earlier one that it is related to.
RELATED = {"Fetch": "Vault", "Verdict": "MeetingBank"}
CONTROLS = ("C-STANCE", "20Minuten", "Shuffled")  # unrelated, unrelated, contradicts Vault
SIZES, SEEDS, STEPS = (20, 50, 100, 400), range(5), 100
QUIET = tqdm(disable=True)
# What a task starts from: "ours" what best_source chooses, or always the bare base.
METHODS = {"ours": loop.probe, "reuse off": lambda *given: 1.0}
LORAS = ("LoRA from scratch", "LoRA continued")
# Of the 32 tasks in a row. With "own alone", a task does not read what others own in A.
STREAMED = ("task_lora", "own alone", "ours")


# ---------------------------------------------------------------- jobs


def setup(seed, split="test"):
    torch.set_num_threads(1)
    loop.transformers.logging.set_verbosity_error()
    loop.transformers.logging.disable_progress_bar()
    loop.datasets.disable_progress_bars()
    args = Args(seeds=str(seed), device="cpu", split=split, lora_lr=1e-2)
    return args, *loop.load_model(args)


def load(args, model, tokenizer, name, size=400, called=None, steps=STEPS):
    """A task with a sample of `size` training examples, and about as many steps for every size."""
    folder, metric = ("trace-mini", "") if name in TASKS else ("transfer-mini", f"{name}=accuracy")
    args = dataclasses.replace(args, tasks=name, data=str(ROOT / "assets" / folder), metric=metric,
                               max_train=size)
    task, = loop.load_tasks(args, tokenizer, model)
    epochs = round(steps * (3 if name == "Vault" and size == 400 else 1) / -(-size // args.batch))
    return dataclasses.replace(task, name=called or name, epochs=epochs)


def learn(adapter, base, task, args):
    """One task; {"score", "new", "source"}."""
    torch.manual_seed(1000 * int(args.seeds) + 7)
    notes = begin_to_end(adapter, base, task, args)
    return {"score": score(adapter, base, task, args), "new": notes["new"],
            "source": notes["source"]}


def begin_to_end(adapter, base, task, args):
    """The steps of the loop of train_trace.py for one task; what to note of it."""
    source, need = adapter.best_source(
        lambda: loop.probe(*base, task, args), task.error_of_a_constant())
    adapter.begin_task(task.name, source, need)
    for ids, mask in padded_batches(task.train_prompt_ids, base[1]):
        adapter.observe(ids, mask)
    method = "lora" if isinstance(adapter, LoRA) else "mose"
    lr = loop.rate(method, args, base[0])
    loop.train(*base, adapter.trainable_parameters(), task, args, lr, QUIET)
    report = adapter.end_task()
    return {"source": source, "new": report["new"], "used": report["share"]}


def score(adapter, base, task, args):
    adapter.set_task(task.name)
    return mean(loop.evaluate(*base, None, task, args).known)


def related(seed):
    """Early tasks once, and from there every later task: rows of results."""
    args, *base = setup(seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        loop.probe = METHODS["reuse off"]
        adapter = loop.attach("mose", args, base[0])
        for name in EARLY:
            first = learn(adapter, base, load(args, *base, name), args)
            rows.append({"task": name, "size": 400, "method": "first time", **first})
        adapter.save(f"{folder}/early.pt")
        adapter.detach()
        for name in EARLY:
            adapter = loop.attach("lora", args, base[0])
            learn(adapter, base, load(args, *base, name), args)
            adapter.save(f"{folder}/{name}.pt")
            adapter.detach()
        plan = [(name, size, False) for name in RELATED for size in SIZES]
        plan += [(name, 50, False) for name in CONTROLS]
        plan += [(name, 400, True) for name in ("Vault", "FOMC")]
        for name, size, again in plan:
            task = load(args, *base, name, size, f"{name} again" if again else None)
            for method in METHODS if again else (*METHODS, *LORAS):
                loop.probe = METHODS.get(method, METHODS["ours"])
                if method in METHODS:
                    adapter = mose.MoSE.load(base[0], f"{folder}/early.pt")
                elif method == "LoRA continued":
                    adapter = best_lora(base, task, args, folder)
                else:
                    adapter = loop.attach("lora", args, base[0])
                before = {n: snapshot(adapter, base, task, n) for n in [*adapter.tasks]}
                result = learn(adapter, base, task, args)
                same = all(torch.equal(snapshot(adapter, base, task, n), before[n]) for n in before)
                rows.append({"task": task.name, "size": size, "method": method, **result,
                             "earlier unchanged": same})
                adapter.detach()
    return rows


def best_lora(base, task, args, folder):
    """The earlier LoRA that a task should go on from, or a new one, by the rule of best_source."""
    errors = {}
    for name in EARLY:
        adapter = LoRA.load(base[0], f"{folder}/{name}.pt")
        adapter.set_task(name)
        errors[name] = float(loop.probe(*base, task, args))
        adapter.detach()
    without = min(float(loop.probe(*base, task, args)), task.error_of_a_constant())
    best = min(errors, key=errors.get)
    if errors[best] < mose.MoSE.WELL_BELOW * without:
        return LoRA.load(base[0], f"{folder}/{best}.pt")
    return loop.attach("lora", args, base[0])


@torch.no_grad()
def snapshot(adapter, base, task, name):
    """Logits of some prompts under a finished task."""
    ids, mask = pad(task.test_prompt_ids[:8], base[1].pad_token_id)
    adapter.set_task(name)
    return base[0](input_ids=ids, attention_mask=mask).logits


def variants(task, count):
    """A task under other surfaces: another last line; letters turned; answers in brackets."""
    turn = str.maketrans("ABC", "BCA")
    changes = [lambda p, a: (p, a),
               lambda p, a: (f"{p.rpartition(chr(10))[0]}\nReply here:", a),
               lambda p, a: (p + " turned", a.translate(turn)),
               lambda p, a: (p + " [", f"{a} ]")][:count]
    for i, change in enumerate(changes):
        both = task.train_texts, task.test_texts
        pairs = [[change(row["prompt"], row["answer"]) for row in rows] for rows in both]
        yield f"{task.name} {i}", [[{"prompt": p, "answer": a} for p, a in rows] for rows in pairs]


def stream(seed, method, count):
    """trace-mini in a row, each task in `count` variants (1: as it is): scores, entries, bytes."""
    args, *base = setup(seed)
    args = dataclasses.replace(args, lora_rank=1, lora_lr=2e-2)
    loop.probe = METHODS.get(method, loop.probe)
    if method == "own alone":
        exec(CHANGES[method], {"SubExperts": mose.SubExperts, "torch": torch})
    tasks = []
    for name in TASKS:
        task = load(args, *base, name)
        for called, texts in variants(task, count):
            train, test = ([encode(base[1], row) for row in rows] for rows in texts)
            tasks.append(dataclasses.replace(
                task, name=called, train_texts=texts[0], test_texts=texts[1],
                train_prompt_ids=[prompt for prompt, _ in train],
                train=[(p + a, [-100] * len(p) + a) for p, a in train],
                test_prompt_ids=[prompt for prompt, _ in test],
                golds=writable_golds(base[1], called, texts[1], [answer for _, answer in test]),
                max_new=max(len(answer) for _, answer in train)))
    tasks = [tasks[i * count + v] for v in range(count) for i in range(len(TASKS))]
    notes, files = [], []
    with tempfile.TemporaryDirectory() as folder:
        adapter = None
        for t, task in enumerate(tasks):
            if method == "task_lora":
                adapter = loop.attach("task_lora", args, base[0])
            elif not adapter:
                adapter = loop.attach("mose", args, base[0])
            torch.manual_seed(1000 * seed + t)
            notes.append(begin_to_end(adapter, base, task, args))
            if method == "task_lora":
                notes[-1]["score"] = score(adapter, base, task, args)
            adapter.save(f"{folder}/m.pt")
            size = os.path.getsize(f"{folder}/m.pt")
            files.append(size if method == "task_lora" else size - sum(files))
            if method == "task_lora":
                adapter.detach()
        last = [n["score"] if method == "task_lora" else score(adapter, base, task, args)
                for n, task in zip(notes, tasks)]
    return {"op": statistics.mean(last), "scores": last, "tasks": [t.name for t in tasks],
            "new": [n["new"] for n in notes], "used": [n["used"] for n in notes],
            "sources": [n["source"] for n in notes],
            "bytes": files}


# ---------------------------------------------------------------- the report


def report(results):
    """Markdown from the JSON alone."""
    lines = ["# Transfer and growth\n",
             f"`python -m benchmarks.transfer`: tiny-llm, two CPU cores, synthetic tasks, {STEPS} steps "
             "of 16 examples for every size, scores 0-100 on `test`. What has no row was not measured.",
             *streams(results)]
    every = [row for key, rows in results.items() if key.startswith("related") for row in rows]
    return "\n".join(lines + (related_tasks(every) if every else [])) + "\n"


def streams(results):
    """Lines: how scores and bytes develop over many tasks in a row."""
    lines = ["\n## Growth\n",
             "The eight tasks of trace-mini, and for 32 tasks each in four variants: as it is, under "
             "another last line, with other letters as answers, and with answers in brackets. "
             "Tasks come variant by variant, so the last 8 are those with brackets. "
             "`task_lora`: a LoRA of rank 1 for each task, in a file of its own; its numbers were "
             "compressed as they stand in memory, where MoSEs' are sorted by bytes first. So in one "
             "file and coded as MoSEs are, it would have some 7,490 bytes a task, as in the "
             "[frontier](frontier.md), and 240 kB in all. `own alone`: MoSEs that do not read the "
             "entries of A of earlier tasks. `reuse off`: no task starts from another.\n",
             "| tasks | method | seeds | OP | OP, first 8 | OP, last 8 | bytes of a task, first 8 | "
             "last 8 | all bytes | pool in use | start from another |", "|---" * 11 + "|"]
    for count in (1, 4):
        for method in ("task_lora", "own alone", "reuse off", "ours"):
            runs = [r for key, r in results.items() if key.startswith(f"stream {count} {method} ")]
            if not runs:
                continue
            row = [8 * count, f"`{method}`", len(runs), spread([r["op"] for r in runs])]
            row += [spread([mean(r["scores"][part]) for r in runs])
                    for part in (slice(8), slice(-8, None))]
            row += [f"{mean([mean(r['bytes'][part]) for r in runs]):,.0f}"
                    for part in (slice(8), slice(-8, None))]
            row.append(f"{mean([sum(r['bytes']) for r in runs]):,.0f}")
            if method == "task_lora":
                row += ["", ""]
            else:
                row.append(f"{mean([r['used'][-1] for r in runs]):.3f}")
                row.append(f"{mean([sum(map(bool, r['sources'])) for r in runs]):.1f}")
            lines.append("| " + " | ".join(map(str, row)) + " |")
    for other in ("own alone", "task_lora"):
        pairs = [(results[f"stream 4 ours {seed}"]["op"], results[f"stream 4 {other} {seed}"]["op"])
                 for seed in SEEDS if f"stream 4 {other} {seed}" in results]
        gaps = [ours - op for ours, op in pairs]
        if len(gaps) > 1:
            lines.append(f"\nPaired over {len(gaps)} seeds, `ours` - `{other}` with 32 tasks: "
                         f"{mean(gaps):+.1f}, standard error {standard_error(gaps):.1f}.")
    return lines


def related_tasks(every):
    """Lines: what tasks that follow related or unrelated ones score with few examples."""
    methods = ("LoRA from scratch", "LoRA continued", "reuse off", "ours")

    def cells(rows, key="score", **where):
        found = [r[key] for r in rows if all(r[k] == v for k, v in where.items())]
        return spread(found) if found else ""

    seeds = len([r for r in every if r["method"] == "first time"]) // len(EARLY)
    lines = ["\n![Score by number of examples; share of the pool in use](transfer.png)\n",
             "## Related tasks: score by the number of training examples\n",
             f"Earlier tasks: {', '.join(EARLY)}. Mean ± deviation of {seeds} seeds. LoRA continued "
             "goes on from the best of the four earlier LoRAs, or from scratch, by the probe and "
             "the rule by which MoSEs choose a source.\n",
             "| task | examples | LoRA from scratch | LoRA continued | MoSEs, reuse off | MoSEs |"
             " new entries, off | new entries |", "|---" * 8 + "|"]
    for name in RELATED:
        for size in SIZES:
            at = {"task": name, "size": size}
            row = [cells(every, **at, method=m) for m in methods]
            row += [cells(every, "new", **at, method=m) for m in ("reuse off", "ours")]
            lines.append(f"| {name} | {size} | " + " | ".join(row) + " |")
    lines += ["\n## Controls at 50 examples, and exact repeats\n",
              "| task | LoRA from scratch | LoRA continued | MoSEs, reuse off | MoSEs | "
              "new entries, off | new entries | started from |", "|---" * 8 + "|"]
    for name in (*CONTROLS, "Vault again", "FOMC again"):
        row = [cells(every, task=name, method=m) for m in methods]
        row += [cells(every, "new", task=name, method=m) for m in ("reuse off", "ours")]
        names = [str(r["source"]) for r in every if r["task"] == name and r["method"] == "ours"]
        row.append(", ".join(f"{n} x {names.count(n)}" for n in sorted({*names})))
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    first = [cells(every, task=n, method="first time") + " with " +
             cells(every, "new", task=n, method="first time") for n in ("Vault", "FOMC")]
    lines.append(f"\nThe first time: Vault {first[0]} new entries, FOMC {first[1]}.")
    same = [r["earlier unchanged"] for r in every if r["method"] == "ours"]
    lines.append(f"\nLogits of every earlier task bit-identical after the later one: {sum(same)} "
                 f"of {len(same)} runs of MoSEs.")
    return lines


def draw(results, file):
    """Left: score by examples, related tasks. Right: the pool's used share along the stream."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(RELATED) + 1, figsize=(13, 4), layout="constrained")
    every = [row for key, rows in results.items() if key.startswith("related") for row in rows]
    looks = {"LoRA from scratch": ("#0072b2", "--", "s"), "LoRA continued": ("#cc79a7", "-.", "^"),
             "reuse off": ("#999999", ":", "v"), "ours": ("#000000", "-", "o")}
    for axis, name in zip(axes, RELATED):
        for i, (method, (color, line, marker)) in enumerate(looks.items()):
            found = [[r["score"] for r in every if
                      (r["task"], r["size"], r["method"]) == (name, size, method)]
                     for size in SIZES]
            beside = [size * 1.05 ** (i - 1.5) for size in SIZES]  # or error bars hide one another
            axis.errorbar(beside, [statistics.mean(v) for v in found],
                          [statistics.stdev(v) if len(v) > 1 else 0 for v in found], color=color,
                          linestyle=line, marker=marker, capsize=3, label={
                              "ours": "MoSEs", "reuse off": "MoSEs, reuse off"}.get(
                              method, method))
        axis.set(title=f"{name} (after {RELATED[name]} and others)", xscale="log", ylim=(0, 122),
                 xlabel="training examples", ylabel="score, 0-100")
        axis.set_xticks(SIZES, SIZES)
        axis.minorticks_off()
    for method, label in (("own alone", "MoSEs, own alone"), ("ours", "MoSEs")):
        runs = [r["used"] for key, r in results.items() if key.startswith(f"stream 4 {method} ")]
        color, line, _ = looks["ours" if method == "ours" else "reuse off"]
        if runs:
            axes[-1].plot(range(33), [0] + [statistics.mean(v) for v in zip(*runs)], color=color,
                          linestyle=line, label=label)
    most = [1 - (1 - mose.MoSEConfig.density) ** t for t in range(33)]
    axes[-1].plot(range(33), most, color="#0072b2", linestyle="--", label="the most it can be")
    axes[-1].set(title="32 tasks in a row (three seeds)", xlabel="tasks learned",
                 ylabel="share of the pool in use")
    for axis in axes:
        axis.legend(fontsize=8, ncols=2, loc="upper left")
        axis.grid(alpha=0.3)
    seeds = len({key for key in results if key.startswith("related")})
    figure.suptitle(f"tiny-llm, synthetic tasks, n = 100 test examples; left and middle: mean and "
                    f"deviation of {seeds} seeds", fontsize=9)
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="jobs whose name begins like this, or report")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="jobs at a time")
    args = parser.parse_args()
    jobs = {f"stream 4 {m} {s}": (stream, s, m, 4) for s in range(3) for m in STREAMED}
    jobs |= {f"related {seed}": (related, seed) for seed in SEEDS}
    jobs |= {f"stream 1 {m} {s}": (stream, s, m, 1) for s in range(3) for m in METHODS}
    file = ROOT / "results/transfer.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    todo = {key: job for key, job in jobs.items()
            if key not in results and key.startswith(args.only)}
    with ProcessPoolExecutor(args.workers, max_tasks_per_child=1) as pool:
        futures = {pool.submit(*job): key for key, job in todo.items()}
        for future in tqdm(as_completed(futures), "transfer", len(todo), unit="job", ncols=100):
            results[futures[future]] = future.result()
            file.write_text(json.dumps(results, indent=1) + "\n")
    text = report(results)
    (ROOT / "results/transfer.md").write_text(text, encoding="utf-8")
    if any(key.startswith("related") for key in results):
        draw(results, ROOT / "results/transfer.png")
    print(text)


if __name__ == "__main__":
    main()
