"""The folder of a run: locked, every file replaced whole or not at all, and what a killed run
needs to go on. It knows the names of all files, so that the loop of train_trace.py need not."""

import fcntl
import json
import os
import resource
import shutil
import sys
import time
from typing import NamedTuple

import torch

from tracebench import processes
from tracebench.scores import bootstrap, mean, summarize


def write(file, value):
    """A JSON file, replaced whole or not at all; by one process."""
    if processes.RANK == 0:
        temporary = file.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as out:
            json.dump(value, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)


def claim(folder, options, go_on=False, force=False):
    """Make a run's folder, note its options there, and return the lock on it, which has to be kept.

    go_on: with what the run of that folder has done so far. Raises ValueError if it is not free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a dead process holds no lock
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another run: choose another --name") from None
    if shutil.disk_usage(folder).free < 2**28:
        raise ValueError(f"{folder}: less than 256 MB are free there: make room before you train")
    if not go_on:
        done = [file for file in folder.glob("*.json") if file.name != "args.json"]
        if done and not force:  # nothing is lost of a run that failed before its first task
            raise ValueError(f"{folder} exists: choose another --name, --resume {folder} to go on "
                             "with it, or --force to overwrite it")
        for kind in ("*.json", "*.pt", "*.png", "table.md", "page.html"):
            for file in folder.glob(kind):
                file.unlink()
        write(folder / "args.json", options)
    return lock


def peak_memory(device):
    """Bytes: of the GPU's memory, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Tested(NamedTuple):
    """What a test of one task gave: scores of each example with the task known; for MoSEs, also
    those with it inferred, and for how many percent that was right; the first two answers."""

    known: list
    inferred: list | None = None
    right: float | None = None
    answers: list = ()


class Record:
    """What one method has done so far in a folder; on disk after every lesson.

    R[t][i]: the score of task i after lesson t, None if it was not tested; R_tail the same with the
    task inferred from the prompt. samples[t]: the first two answers to each task tested then.
    """

    def __init__(self, folder, method, tasks, lessons, keep_all):
        """keep_all: a file for each task, not only the last one's."""
        self.folder, self.method, self.tasks = folder, method, tasks
        self.lessons, self.keep_all, self.clock = lessons, keep_all, 0.0
        self.state = folder / f"{method}.progress.json"
        lists = ("R", "R_tail", "task_id_accuracy", "samples", "bytes", "files", "source", "new",
                 "used", "epochs")
        self.result = {key: [] for key in lists} | {
            "parameters": 0, "tokens": 0, "seconds_training": 0.0, "seconds_testing": 0.0}
        if self.state.exists():  # `claim` has removed it, unless this run goes on
            self.result = json.loads(self.state.read_text())

    def rest(self):
        """(number, lesson) of the lessons that are not done yet."""
        for t, lesson in [*enumerate(self.lessons)][len(self.result["R"]):]:
            self.clock = time.time()
            yield t, lesson

    def note_seconds(self, what):
        """Those since the last note."""
        now = time.time()
        self.result[f"seconds_{what}"] += now - self.clock
        self.clock = now

    def save(self, adapter, t, notes):
        """Write the adapter of lesson t: whatever is tested, or goes on, comes from the disk, so a
        run that was interrupted and one that was not do the same."""
        result, last = self.result, t + 1 == len(self.lessons)
        name = self.method + ("" if last and not self.keep_all else f"-{t + 1}") + ".pt"
        if processes.RANK == 0:
            adapter.save(self.folder / name)
        processes.wait()
        result["files"] = [*result["files"], name] if self.keep_all else [name]
        sizes = [(self.folder / file).stat().st_size for file in result["files"]]
        result["bytes"].append(sum(sizes))
        result["parameters"] = notes["parameters"]
        result["tokens"] += notes["tokens"]
        for key in ("source", "new", "used", "epochs"):
            result[key].append(notes[key])
        self.note_seconds("training")

    def last(self):
        """The adapter that the next task goes on from; None: it starts from the bare base."""
        files = self.result["files"]
        return self.folder / files[-1] if files and not self.keep_all else None

    def file(self, i):
        """The adapter that knows task i best; None: the bare base."""
        files = self.result["files"]
        return self.folder / files[i if self.keep_all else -1] if files else None

    def tested(self, tests):
        """Note a lesson's tests {number of a task: Tested}; returns its row of R."""
        self.note_seconds("testing")
        result, every = self.result, range(len(self.tasks))
        row = [mean(tests[i].known) if i in tests else None for i in every]
        result["R"].append(row)
        result["samples"].append({self.tasks[i].name: tests[i].answers for i in tests})
        if None not in row:
            result["op_error"] = bootstrap([tests[i].known for i in every])
        if all(test.inferred for test in tests.values()):
            result["R_tail"].append([mean(tests[i].inferred) if i in tests else None
                                     for i in every])
            result["task_id_accuracy"] = [test.right for test in tests.values()]
        write(self.state, result)
        return row

    def finish(self, about, zero_shot):
        """Write the result; what no later task needs goes."""
        result = self.result
        tail = summarize(result["R_tail"]) if result["R_tail"] else {}
        write(self.folder / f"{self.method}.json", about | result | summarize(
            result["R"], zero_shot) | {"op_tail": tail.get("op"), "bwt_tail": tail.get("bwt")})
        if processes.RANK == 0:
            for file in [self.state, *self.folder.glob(f"{self.method}-*.pt")]:
                if file.name not in result["files"]:
                    file.unlink()
