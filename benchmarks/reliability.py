"""Kill it, corrupt it, drive it in any order, and count what it survives.

    pip install hypothesis
    python -m benchmarks.reliability           # writes results/reliability.md; ten minutes on a CPU

kills      a short run of train_trace.py is killed (SIGKILL) at random moments, about every other
           time while a file is being written, and resumed each time: every file must be whole after
           each kill, and the final adapters and scores those of a run that was left alone
damage     a checkpoint cut at each 1 % of its length, and with single bits flipped
sequences  random legal orders of begin, train, end, set, forget, save and load: after every step
           all learned tasks give the same logits, bit for bit

tests/test_reliability.py runs a short form of each.
"""

import argparse
import contextlib
import json
import lzma
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import hypothesis
import hypothesis.stateful as stateful
import torch
import transformers

import mose
import train_trace
from mose import MoSE, MoSEConfig

ROOT = Path(__file__).resolve().parent.parent

SHORT = ["--tasks", "FOMC,NumGLUE-cm", "--max_train", "16", "--max_test", "4", "--epochs", "1",
         "--methods", "lora,task_lora,mose", "--device", "cpu"]


# ---------------------------------------------------------------- kills


def run(folder, options):
    """A child process that runs train_trace.py in `folder`; its process id."""
    child = os.fork()
    if child:
        return child
    with contextlib.suppress(BaseException):
        os.chdir(folder)
        for stream in (1, 2):  # of the report, which is a process of its own, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        torch.set_num_threads(1)
        train_trace.main(train_trace.parse(options))
        os._exit(0)
    os._exit(1)


def ended(child):
    return os.waitpid(child, os.WNOHANG) != (0, 0)


def whole(runs):
    """Raises unless every file is a whole version of itself. A *.tmp is not yet a file."""
    for file in runs.glob("*/*.json"):
        json.loads(file.read_text())
    for file in runs.glob("*/*.pt"):
        lzma.decompress(file.read_bytes().removeprefix(mose.FORMAT))  # raises if it is damaged


def outcome(folder):
    """What a run ends with: scores and the bytes of its adapters."""
    results = {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")
               if file.name != "args.json"}
    scores = {name: (r["R"], r["R_tail"], r["used"], r["samples"]) for name, r in results.items()}
    return scores, {file.name: file.read_bytes() for file in folder.glob("*.pt")}


def kills(count, seed=0):
    """(kills survived, of these while a file was being written)."""
    rng, hits, writing = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        start = time.time()
        child = run(folder, [*SHORT, "--name", "alone"])
        assert os.waitpid(child, 0)[1] == 0
        length = time.time() - start
        while hits < count:
            name = f"killed-{hits}"
            while hits < count:
                resume = (folder / "runs" / name / "args.json").exists()
                again, first = ["--resume", f"runs/{name}"], [*SHORT, "--name", name]
                child = run(folder, again if resume else first)
                until = time.time() + rng.uniform(0.1, length)
                busy, seen = rng.random() < 0.5, False
                while not ended(child):
                    seen = busy and any((folder / "runs").glob("*/*.tmp"))
                    if seen and rng.random() < 0.3 or not busy and time.time() > until:
                        os.kill(child, signal.SIGKILL)
                        os.waitpid(child, 0)
                        hits, writing = hits + 1, writing + seen
                        break
                else:
                    break
                whole(folder / "runs")
            if (folder / "runs" / name / "args.json").exists():
                child = run(folder, ["--resume", f"runs/{name}"])
                assert os.waitpid(child, 0)[1] == 0, "resume failed"
                assert outcome(folder / "runs" / name) == outcome(folder / "runs/alone")
    return hits, writing


# ---------------------------------------------------------------- damage and sequences


def tiny():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=64,
        num_attention_heads=4, initializer_range=0.2)).eval()


def learn(mose, name, steps=2):
    mose.begin_task(name, *mose.best_source(lambda: 0.5 if mose.active else 1.0))
    optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=0.03, weight_decay=0.1)
    for _ in range(steps):
        ids = torch.randint(64, (4, 8))
        mose.observe(ids)
        mose.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def damage(flips, seed=0):
    """(truncations refused, flipped bits refused); raises if a damaged file is read."""
    rng, refused = random.Random(seed), [0, 0]
    with tempfile.TemporaryDirectory() as folder:
        path, adapter = Path(folder) / "m", MoSE(tiny())
        learn(adapter, "a")
        adapter.end_task()
        adapter.save(path)
        data, model = path.read_bytes(), tiny()
        broken = [(0, data[:len(data) * percent // 100]) for percent in range(100)]
        for place in (rng.randrange(8 * len(data)) for _ in range(flips)):
            other = bytearray(data)
            other[place // 8] ^= 1 << place % 8
            broken.append((1, bytes(other)))
        for kind, content in broken:
            path.write_bytes(content)
            try:
                MoSE.load(model, path)
            except ValueError:
                refused[kind] += 1
            else:
                raise AssertionError("a damaged file was read")
    return refused


class AnyOrder(stateful.RuleBasedStateMachine):
    """Any legal order of calls; after each of them, no learned task has changed."""

    config, ids = MoSEConfig(density=0.1), torch.arange(16).view(2, 8)
    steps = sequences = 0

    def __init__(self):
        super().__init__()
        self.mose, self.logits = MoSE(tiny(), self.config), {}
        AnyOrder.sequences += 1

    def names(self):
        return sorted(self.mose.tasks)

    @torch.no_grad()
    def look(self, name):
        with self.mose.task(name):
            return self.mose.model(self.ids).logits

    @stateful.rule(name=stateful.st.sampled_from("abcd"), steps=stateful.st.integers(0, 2))
    @stateful.precondition(lambda self: self.mose.open is None)
    def begin(self, name, steps):
        if name not in self.mose.tasks:
            learn(self.mose, name, steps)

    @stateful.rule()
    @stateful.precondition(lambda self: self.mose.open is not None)
    def end(self):
        name = self.mose.open
        before = self.look(name)
        self.mose.end_task()
        self.logits[name] = self.look(name)
        assert torch.equal(before, self.logits[name])

    @stateful.rule(data=stateful.st.data())
    @stateful.precondition(lambda self: self.mose.tasks)
    def choose(self, data):
        some = stateful.st.sampled_from([None, *self.names()])
        self.mose.set_task(data.draw(some | stateful.st.lists(some, min_size=1, max_size=3)))

    @stateful.rule(data=stateful.st.data())
    @stateful.precondition(lambda self: self.mose.tasks or self.mose.open)
    def forget(self, data):
        name = self.mose.open or data.draw(stateful.st.sampled_from(self.names()))
        self.mose.forget(name)
        self.logits.pop(name, None)

    @stateful.rule()
    @stateful.precondition(lambda self: self.mose.open is None)
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.mose.save(f"{folder}/m")
            self.mose = MoSE.load(tiny(), f"{folder}/m")

    @stateful.invariant()
    def nothing_is_forgotten(self):
        AnyOrder.steps += 1
        assert {*self.logits} == {*self.mose.tasks}
        for name, logits in self.logits.items():
            assert torch.equal(self.look(name), logits)


def sequences(count, length=12, phases=tuple(hypothesis.Phase)):
    """(sequences, steps) explored."""
    AnyOrder.steps = AnyOrder.sequences = 0
    settings = hypothesis.settings(max_examples=count, stateful_step_count=length, deadline=None,
                                   database=None, derandomize=True, phases=phases)
    stateful.run_state_machine_as_test(AnyOrder, settings=settings)
    return AnyOrder.sequences, AnyOrder.steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--sequences", type=int, default=300)
    args = parser.parse_args()
    killed, writing = kills(args.kills)
    cut, flipped = damage(args.flips)
    explored, steps = sequences(args.sequences)
    from tests import test_reliability
    inputs = len(test_reliability.MISTAKES) + len(test_reliability.ODD_INPUTS)
    text = "\n".join([
        "# What it survives\n",
        "`python -m benchmarks.reliability` (CPU, seed 0); every line is checked, a single miss "
        "stops the script. A short form of each stands in tests/test_reliability.py.\n",
        "| what | count | held |", "|---|---|---|",
        f"| kills (SIGKILL) of a short run, then `--resume`: files whole, result bit-identical | "
        f"{killed}, of these {writing} while a file was written | all |",
        f"| checkpoint cut short, at each 1 % of its length: ValueError | {cut} | all |",
        f"| checkpoint with one bit flipped: ValueError | {flipped} | all |",
        f"| random legal orders of calls, all learned tasks bit-identical after every step | "
        f"{explored} orders, {steps} steps | all |",
        f"| wrong or odd inputs with the expected message or result (`pytest "
        f"tests/test_reliability.py`) | {inputs} | all |"]) + "\n"
    (ROOT / "results/reliability.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
