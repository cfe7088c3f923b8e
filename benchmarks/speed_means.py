"""What each means of mose.py's speed gives: as it is and changed, in turns (A B A B ..).

    pip install peft
    python -m benchmarks.speed_means       # the best device here; writes results/speed-means-DEVICE

Everything is one process on the base of bench_peft.py. Ratio: a step with the change to a step of
mose.py as it is. The predictions were written down before anything was measured.
"""

import argparse
import contextlib
import functools
import json
import statistics
from pathlib import Path

import torch

from benchmarks.bench_peft import System, machine, markdown
from mose import SubExperts, this_thread

ROOT = Path(__file__).resolve().parent.parent

real = {name: getattr(SubExperts, name) for name in ("route", "add_delta", "select")}
now = dict(real)  # what runs; hooks are bound when they are attached, so they come through here
for method in real:
    setattr(SubExperts, method, lambda self, *args, method=method: now[method](self, *args))


# ------------------------------------------------------------------------------ the changes


def expert_loop(self, i, layer, args, out):
    """add_delta with two small products for each expert."""
    rank = self.config.rank
    for _, weights, matrices in self.now[this_thread()]:
        A, B = matrices[2 * i:2 * i + 2]
        for e in range(self.config.num_experts):
            own = slice(e * rank, (e + 1) * rank)
            out = out + (args[0] @ A[:, own] * weights[..., own]) @ B[own]
    return out


def mask_at_every_token(self, attention, args, kwargs):
    """route that masks the pool of a finished task anew in every forward pass."""
    if not self.learning:
        self.activate(self.names)
    return real["route"](self, attention, args, kwargs)


def route_for_every_target(self, i, layer, args, out):
    """add_delta that makes the gates once more, for its target alone."""
    real["route"](self, None, args, {})
    return real["add_delta"](self, i, layer, args, out)


def select_once(self):
    """select that chooses once for each optimizer step."""
    if getattr(self, "chosen_at", None) != self.score._version:
        self.chosen, self.chosen_at = real["select"](self), self.score._version
    return self.chosen


@contextlib.contextmanager
def using(name, other, system):
    now[name] = other
    yield
    now[name] = real[name]


@contextlib.contextmanager
def compiled(system):
    if not hasattr(system, "compiled"):
        system.compiled = torch.compile(system.model)
    eager, system.model = system.model, system.compiled
    yield
    system.model = eager


def instead(name, other):
    return functools.partial(using, name, other)


# ------------------------------------------------------------------------------ measuring


CHANGES = [  # what is changed; the step; how; the predicted ratio and why
    ("a loop over experts", "train", instead("add_delta", expert_loop), 1.1,
     "4 pairs of small products in place of one; with all gates on it was 1.08"),
    ("mask chosen once for 4 micro-batches", "accumulate", instead("select", select_once), 0.94,
     "saves 3 of 4 top-k of 6 x 131,072 scores"),
    ("a loop over experts", "decode", instead("add_delta", expert_loop), 1.2,
     "4 times as many small products; with all gates on it was 1.17"),
    ("masks applied at every token", "decode", instead("route", mask_at_every_token), 1.15,
     "12 MB more to read and write for a token; the base reads 90"),
    ("gates made for every target", "decode", instead("add_delta", route_for_every_target), 1.05,
     "twice as many routers of some 8 small operations"),
    ("torch.compile", "forward", compiled, 0.9, "fused element-wise operations; products dominate"),
]


STEPS = {  # each gives its seconds
    "train": System.train,
    "accumulate": lambda system: system.train(parts=4),
    "forward": System.forward,
    "decode": lambda system: system.decode(1),
}


def ratio(system, step, change, rounds, warm=2):
    """The median ratio of the step with a change to the step without, in turns."""
    ratios = []
    for _ in range(warm + rounds):
        before = step(system)
        with change(system):
            ratios.append(step(system) / before)
    return statistics.median(ratios[warm:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=best)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    system, table = System("MoSEs, 1st task", args.device), []
    for name, what, change, predicted, why in CHANGES:
        if what in ("decode", "forward") and system.optimizer:
            system.finish()
        gave = ratio(system, STEPS[what], change, args.rounds)
        table.append((name, what, f"{predicted:.2f}", f"{gave:.3f}", why))
        print(f"{name:42} {what:11} predicted {predicted:.2f}  measured {gave:.3f}", flush=True)
    head = ("change", "step", "predicted ratio", "measured", "why it was predicted")
    text = [f"# What each means of speed gives, {args.device}\n",
            f"`python -m benchmarks.speed_means --device {args.device}`: "
            f"{machine(args.device)}, torch {torch.__version__}, seed 0, medians of "
            f"{args.rounds} ratios in turns; base and sizes as in speed-{args.device}.md.\n",
            *markdown([head, *table])]
    file = args.out / f"speed-means-{args.device}"
    file.with_suffix(".md").write_text("\n".join(text) + "\n")
    record = [dict(zip(head, row)) for row in table]
    file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
