"""The folder of a run: locked, every file replaced whole or not at all, and what a killed run
needs to go on. train_trace.py's loop calls this, so that it need not speak of files."""

import contextlib
import fcntl
import json
import os
import shutil
import time

from trace import processes
from trace.scores import bootstrap, mean, summarize


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
        for file in folder.glob("*.json"):
            file.unlink()
        write(folder / "args.json", options)
    return lock


class Record:
    """What one method has done so far in a folder; on disk after every lesson.

    R[t][i]: the score of task i after lesson t, None if it was not tested; R_tail the same with the
    task inferred from the prompt. samples[t]: its first answers to each task tested then.
    """

    def __init__(self, folder, method, tasks, lessons, keep_all):
        """keep_all: a file for each task, not only the last one's."""
        self.folder, self.method, self.tasks = folder, method, tasks
        self.lessons, self.keep_all = lessons, keep_all
        self.state = folder / f"{method}.progress.json"
        self.result = {"R": [], "R_tail": [], "task_id_accuracy": [], "samples": [], "bytes": [],
                       "files": [], "parameters": 0, "tokens": 0, "padding": [], "used": [],
                       "seconds_training": 0.0, "seconds_testing": 0.0}
        if self.state.exists():  # `claim` has removed it, unless this run goes on
            self.result = json.loads(self.state.read_text())

    def rest(self):
        """(number, lesson) of the lessons that are not done yet."""
        return [*enumerate(self.lessons)][len(self.result["R"]):]

    @contextlib.contextmanager
    def seconds(self, what):
        start = time.time()
        yield
        self.result[f"seconds_{what}"] += time.time() - start

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
        result["parameters"] = notes.pop("parameters")
        result["tokens"] += notes.pop("tokens")
        for key, value in notes.items():
            result.setdefault(key, []).append(value)

    def file(self, task=-1):
        """The adapter that knows a task, by its number, or the last; None before the first."""
        files = self.result["files"]
        return self.folder / files[task if self.keep_all else -1] if files else None

    def tested(self, scores):
        """Note a lesson's tests: {number of a task: what `evaluate` returned}."""
        result, names = self.result, [task.name for task in self.tasks]
        til, tail, right, answers = zip(*scores.values())
        row = dict(zip(scores, map(mean, til)))
        result["R"].append([row.get(i) for i in range(len(names))])
        result["samples"].append({names[i]: some for i, some in zip(scores, answers)})
        if len(row) == len(names):
            result["op_error"] = bootstrap(til)
        if tail[0] is not None:
            row = dict(zip(scores, map(mean, tail)))
            result["R_tail"].append([row.get(i) for i in range(len(names))])
            result["task_id_accuracy"] = right
        write(self.state, result)

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
