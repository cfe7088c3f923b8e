"""Does the router matter? The search behind the defaults, surgery on gates, and who takes what.

    python -m benchmarks.routing     # results/routing.json, .md and .png; two hours on two cores

Everything is synthetic (trace-mini, and Clash of transfer-mini) and learned by train_trace.py's own
loop; every task starts from the bare base. Jobs run side by side, one thread each; what stands in
the JSON is not run again. Two measures:

Clash   one task of two contradicting halves, Vault and Shuffled: 800 examples, 12 epochs. The first
        line of a prompt tells which half is right; one answer for both is right half of the time.
OP      mean score after the eight tasks of trace-mini in a row, 400 examples and 4 epochs each.

The rule of the search, written before it ran (a first look at seeds 10-13 had set its range):

1. Each candidate learns Clash with seeds 20-29, scored on `eval`. They are ordered by their mean.
2. In this order, each is asked (seeds 20-24, `eval`) whether (a) uniform gates, 1/E for each
   expert, put in place of its own after training, cost at least 20 points of OP; and (c) its OP is
   not below that of the former default by more than one standard error of the paired difference.
3. The first that meets both is the default. The candidates after it are not asked. Only then it,
   its controls and the former default are scored on `test`, once.

Added after the search had run, for what the rule did not foresee: none met (c). The default is then
the one that meets (a) and loses least OP.

All have a total rank of 64 and density 0.03. Controls on Clash: one expert at three scales, and
uniform gates that are the same function as one expert (A/A: what the draw alone does). One expert
at scale 2 was added after the search too, since scale 4 was the best of the three.
"""

import argparse
import dataclasses
import json
import os
import re
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

import mose
import train_trace as loop
from benchmarks.transfer import QUIET, setup
from figures.gates import gates_of
from figures.report import spread
from tracebench.baselines import FixedRouter
from tracebench.data import pad
from tracebench.scores import mean

ROOT = Path(__file__).resolve().parent.parent


def options(experts, rank, top_k, std, scale):
    return {"num_experts": experts, "rank": rank, "top_k": top_k, "router_std": std,
            "scale": scale, "density": 0.03}


CANDIDATES = {
    "E8 R8 top-2, scale 8": options(8, 8, 2, 1.0, 8.0),
    "E8 R8 top-2, scale 4": options(8, 8, 2, 1.0, 4.0),
    "E8 R8 top-2, scale 16": options(8, 8, 2, 1.0, 16.0),
    "E8 R8 top-2, scale 8, std 0.3": options(8, 8, 2, 0.3, 8.0),
    "E8 R8 top-1, scale 8": options(8, 8, 1, 1.0, 8.0),
    "E4 R16 top-2, scale 8": options(4, 16, 2, 1.0, 8.0),
    "E4 R16 top-1, scale 8": options(4, 16, 1, 1.0, 8.0),
    "E16 R4 top-2, scale 8": options(16, 4, 2, 1.0, 8.0),
    "E16 R4 top-4, scale 8": options(16, 4, 4, 1.0, 8.0),
}
FORMER = "former default: E4 R16, all gates, scale 32"
SINGLE = [f"one expert, R64, scale {scale}" for scale in (2, 4, 8, 16)]
UNIFORM = "uniform gates, the same as one expert, scale 8"
CONTROLS = {
    FORMER: options(4, 16, 4, 0.02, 32.0),
    **{name: options(1, 64, 1, 1.0, float(name.split()[-1])) for name in SINGLE},
    # Eight gates of 1/8 at eight times the scale: the router is all but 0, and never trained.
    UNIFORM: options(8, 8, 8, 1e-9, 64.0),
}
EVERY = CANDIDATES | CONTROLS
NEVER, RANDOM = "router never trained: ", "mask never learned: "  # before a name
CLASH_SEEDS, STREAM_SEEDS, TEST_SEEDS = range(20, 30), range(20, 25), range(20, 23)


class FixedMask(mose.MoSE):
    """MoSEs whose masks stay as they were drawn."""

    def trainable_parameters(self):
        scores = {id(layer.score) for layer in self.layers}
        return [p for p in super().trainable_parameters() if id(p) not in scores]


def new_adapter(name, model):
    fixed = name.startswith(NEVER) or name == UNIFORM
    kind = FixedRouter if fixed else FixedMask if name.startswith(RANDOM) else mose.MoSE
    known = EVERY[name.removeprefix(NEVER).removeprefix(RANDOM)]
    return kind(model, mose.MoSEConfig(**known))


# ---------------------------------------------------------------- learning


def tasks_of(what, args, model, tokenizer):
    """The tasks of a measure."""
    if what == "clash":
        args = dataclasses.replace(args, tasks="Clash", epochs="12",
                                   data=str(ROOT / "assets/transfer-mini"))
    return loop.load_tasks(args, tokenizer, model)


def learned(what, name, args, model, tokenizer, tasks):
    """The adapter that has learned the tasks: from its file, or now."""
    file = ROOT / "runs/routing" / f"{what}, {name}, {args.seeds}.pt"
    if file.exists():
        return mose.MoSE.load(model, file)
    adapter = new_adapter(name, model)
    for t, task in enumerate(tasks):
        torch.manual_seed(1000 * int(args.seeds) + t)
        adapter.begin_task(task.name)
        loop.train(model, tokenizer, adapter.trainable_parameters(), task, args, args.lr, QUIET)
        adapter.end_task()
    file.parent.mkdir(parents=True, exist_ok=True)
    adapter.save(file)
    return adapter


# ---------------------------------------------------------------- surgery on gates


real_gates = mose.top_k_gates


@torch.no_grad()
def mean_gates(adapter, tokenizer, task):
    """The mean gates (E,) of each layer over all tokens of 64 training prompts of a task."""
    ids, mask = pad(task.prompts[:64], tokenizer.pad_token_id)
    gates = gates_of(adapter, task.name, ids, mask)
    return [layer[mask.bool()].mean(0) for layer in gates]


def operate(how, adapter, means, other):
    """Put other gates in the place of the active task's own, until the next `set_task`."""
    if how == "another task's router":
        lineage = adapter.tasks[adapter.active]
        for layer in adapter.layers:
            pool = torch.where(layer.reads(lineage), layer.frozen, 0.0)
            layer.in_force = [(None, layer.matrices(pool, layer.routers[other]))]
    calls = iter(range(10**9))

    def changed(logits, k):
        gates = real_gates(logits, k)
        if how == "uniform":
            return torch.full_like(gates, 1 / gates.shape[-1])
        if how == "reversed":
            return gates.flip(-1)
        return means[next(calls) % len(means)].expand_as(gates)  # mean over tokens

    if how in ("uniform", "reversed", "mean over tokens"):
        mose.top_k_gates = changed


SURGERY = ("own", "uniform", "mean over tokens", "reversed", "another task's router")


def operated(adapter, model, tokenizer, tasks, args, surgery):
    """{gates: [score of each task]} of an adapter, for each kind of surgery."""
    result = {}
    for task, other in zip(tasks, tasks[1:] + tasks[:1]):
        for how in surgery:
            adapter.set_task(task.name)
            wanted = how == "mean over tokens"
            means = mean_gates(adapter, tokenizer, task) if wanted else None
            operate(how, adapter, means, other.name)
            values = loop.evaluate(model, tokenizer, None, task, args).known
            mose.top_k_gates = real_gates
            result.setdefault(how, []).append(mean(values))
    return result


def score(what, name, seed, split, surgery):
    """{gates: [score of each task]} after all tasks of a measure are learned."""
    args, model, tokenizer = setup(seed, split)
    tasks = tasks_of(what, args, model, tokenizer)
    adapter = learned(what, name, args, model, tokenizer, tasks)
    return operated(adapter, model, tokenizer, tasks, args, surgery)


# ---------------------------------------------------------------- the search


def run(jobs, results, file):
    """Jobs {key: arguments of `score`} side by side; results go to the JSON as they come."""
    todo = {key: job for key, job in jobs.items() if key not in results}
    with ProcessPoolExecutor(os.cpu_count(), max_tasks_per_child=1) as pool:
        futures = {pool.submit(score, *job): key for key, job in todo.items()}
        for future in tqdm(as_completed(futures), "routing", len(todo), unit="run", ncols=100):
            results[futures[future]] = future.result()
            file.write_text(json.dumps(results, indent=1) + "\n")


def jobs_of(what, names, seeds, split, surgery):
    return {f"{what} | {name} | {split} | {seed}": (what, name, seed, split, surgery)
            for name in names for seed in seeds}


def means_of(results, what, name, split, gates="own"):
    """{seed: mean score over the tasks} of what was run."""
    start, found = f"{what} | {name} | {split} | ", {}
    for key, result in results.items():
        if key.startswith(start) and gates in result:
            found[int(key.removeprefix(start))] = statistics.mean(result[gates])
    return found


def paired(ours, theirs):
    """(mean, standard error) of the difference over the seeds that both have."""
    differences = [ours[seed] - theirs[seed] for seed in sorted({*ours} & {*theirs})]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences), error


def order(results):
    """Candidates by their mean on Clash, the best first."""
    def on_clash(name):
        return statistics.mean(means_of(results, "clash", name, "eval").values())

    return sorted(CANDIDATES, key=on_clash, reverse=True)


def meets(results, name):
    """(what uniform gates cost, difference of OP to the former default, its error, both met)."""
    own = means_of(results, "stream", name, "eval")
    cost, _ = paired(own, means_of(results, "stream", name, "eval", "uniform"))
    below, error = paired(own, means_of(results, "stream", FORMER, "eval"))
    return cost, below, error, cost >= 20 and below >= -error


def search(results, file):
    """Follow the rule; returns the default."""
    run(jobs_of("clash", EVERY, CLASH_SEEDS, "eval", ["own"]), results, file)
    run(jobs_of("stream", [FORMER], STREAM_SEEDS, "eval", ["own", "uniform"]), results, file)
    for name in order(results):
        run(jobs_of("stream", [name], STREAM_SEEDS, "eval", ["own", "uniform"]), results, file)
        if meets(results, name)[-1]:
            break
    return by_the_rule(results)


def by_the_rule(results):
    """The default, of candidates that were asked: the first that meets all, or the nearest."""
    asked = [n for n in order(results) if means_of(results, "stream", n, "eval")]
    fit = [name for name in asked if meets(results, name)[-1]]
    matters = [name for name in asked if meets(results, name)[0] >= 20]
    return fit[0] if fit else max(matters, key=lambda name: meets(results, name)[1])


def final(default, results, file):
    """What is scored on `test`, once."""
    rows = [default, NEVER + default, FORMER, *SINGLE[1:3], UNIFORM]
    run(jobs_of("clash", rows, CLASH_SEEDS, "test", SURGERY[:-1]), results, file)
    run(jobs_of("stream", [default, FORMER], TEST_SEEDS, "test", SURGERY), results, file)
    others = [NEVER + default, RANDOM + default]
    run(jobs_of("stream", others, TEST_SEEDS, "test", ["own", "uniform"]), results, file)


# ---------------------------------------------------------------- who takes what


PARTS = re.compile(r"(?P<header>.*)\n(?P<who>.*) stores the (?P<word>.*?) "
                   r"(?P<when>(?:at|on|after|this|in|once) .*)\n(?P<cue>.*)")


def shares(name, seed=20):
    """{kind of token: (layers, E)}: for which share of its tokens an expert has the top gate."""
    args, model, tokenizer = setup(seed, "test")
    task, = tasks_of("clash", args, model, tokenizer)
    adapter, counts = learned("clash", name, args, model, tokenizer, [task]), {}
    adapter.set_task("Clash")
    for row in task.texts[1]:
        half = "Vault" if row["prompt"].startswith("Vault") else "Shuffled"
        spans = PARTS.fullmatch(row["prompt"])
        coded = tokenizer(row["prompt"], return_offsets_mapping=True, add_special_tokens=False)
        ids = torch.tensor([[tokenizer.bos_token_id, *coded["input_ids"]]])
        gates = [layer[0, 1:] for layer in gates_of(adapter, "Clash", ids)]
        best = torch.stack([layer.argmax(-1) for layer in gates])  # (layers, T)
        for t, (_, end) in enumerate(coded["offset_mapping"]):
            for part in PARTS.groupindex:
                if spans.start(part) < end <= spans.end(part):
                    kind = counts.setdefault(f"{half}: {part}", torch.zeros(
                        len(best), adapter.config.num_experts))
                    kind[torch.arange(len(best)), best[:, t]] += 1
    return {kind: (count / count.sum(1, keepdim=True)).tolist() for kind, count in counts.items()}


def draw(taken, default, file):
    """A panel for each layer: kinds of tokens against experts, 0 to 1."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = sorted(taken, key=lambda kind: ([*PARTS.groupindex].index(kind.split(": ")[1]), kind))
    layers = len(taken[kinds[0]])
    figure, axes = plt.subplots(1, layers, figsize=(4 + 3 * layers, 4.4), layout="constrained")
    for n, axis in enumerate(axes):
        values = [taken[kind][n] for kind in kinds]
        image = axis.imshow(values, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(values[0])))
        axis.set_yticks(range(len(kinds)), kinds if n == 0 else [])
        axis.set(title=f"layer {n}", xlabel="expert")
    figure.colorbar(image, ax=axes, label="share of these tokens")
    figure.suptitle(f"Which expert has the top gate, by kind of token: Clash, {default}, seed 20, "
                    "tiny-llm, synthetic, 200 test prompts", fontsize=10)
    figure.savefig(file, dpi=100)


# ---------------------------------------------------------------- the report


def with_error(difference):
    return "{:+.1f} ± {:.1f}".format(*difference)


def report(results, default):
    """Markdown from the JSON alone."""
    lines = [
        "# Routing\n",
        "`OMP_NUM_THREADS=1 python -m benchmarks.routing`: tiny-llm, synthetic tasks, two CPU "
        f"cores; Clash: seeds {min(CLASH_SEEDS)}-{max(CLASH_SEEDS)}, OP on trace-mini: seeds "
        f"{min(STREAM_SEEDS)}-{max(STREAM_SEEDS)} (on `test` {min(TEST_SEEDS)}-{max(TEST_SEEDS)}). "
        "Mean ± deviation over seeds; differences are paired by seed, ± their standard error. The "
        "rule stands in the script.\n",
        "## The search (`eval`)\n",
        "| candidate | Clash | uniform gates cost, OP | OP minus that of the former default | "
        "meets the rule |", "|---" * 5 + "|"]
    for name in order(results):
        row = [spread([*means_of(results, "clash", name, "eval").values()])]
        if means_of(results, "stream", name, "eval"):
            cost, below, error, met = meets(results, name)
            row += [f"{cost:.1f}", with_error((below, error)), "yes" if met else "no"]
        else:
            row += ["not asked", "not asked", ""]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    for name in CONTROLS:
        values = [*means_of(results, "clash", name, "eval").values()]
        lines.append(f"| (control) {name} | {spread(values)} | | | |")
    lines += [f"\nThe default is **{default}**.\n", "## Clash (`test`)\n",
              "| | own gates | the default minus it | uniform | mean over tokens | reversed |",
              "|---" * 6 + "|"]
    ours = means_of(results, "clash", default, "test")
    for name in (default, NEVER + default, FORMER, *SINGLE[1:3], UNIFORM):
        own = means_of(results, "clash", name, "test")
        row = [spread([*own.values()]), with_error(paired(ours, own)) if name != default else ""]
        row += [spread([*means_of(results, "clash", name, "test", how).values()])
                for how in SURGERY[1:-1]]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    one, same = (means_of(results, "clash", name, "test") for name in (SINGLE[2], UNIFORM))
    lines += [f"\nA/A: the last row and one expert at scale 8 are the same function, drawn "
              f"differently: {with_error(paired(same, one))}.\n",
              "## Gate surgery: OP on trace-mini (`test`)\n",
              "| | " + " | ".join(SURGERY) + " |", "|---" * 6 + "|"]
    for name in (default, FORMER, NEVER + default, RANDOM + default):
        row = [[*means_of(results, "stream", name, "test", how).values()] for how in SURGERY]
        lines.append(f"| {name} | " + " | ".join(spread(v) if v else "" for v in row) + " |")
    lines += ["\n## Which expert takes which token\n",
              "![For each layer: kinds of tokens against experts](routing.png)"]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    file = args.out / "routing.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    default = search(results, file)
    final(default, results, file)
    (args.out / "routing.md").write_text(report(results, default), encoding="utf-8")
    draw(shares(default), default, args.out / "routing.png")
    print(report(results, default))


if __name__ == "__main__":
    main()
