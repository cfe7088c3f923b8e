"""The folder of a run: locked, every file replaced whole or not at all, and what a killed run
needs to go on. It knows the names of all files, so that the loop of train_trace.py need not.

    lock                  held while a process works in the folder
    args.json             what `note_inputs` notes of the run: its options, base and data
    METHOD.pt             the adapter that has learned all tasks
    METHOD.json           the result
    METHOD-3.pt           the adapter after three tasks, the last ones that were tested
    METHOD.progress.json  the result so far

The last two are removed when the method is finished.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
import transformers

from mose import differences, fingerprint
from tracebench import processes
from tracebench.data import listed
from tracebench.files import write_bytes, write_json
from tracebench.methods import attach
from tracebench.scores import bootstrap, mean, summarize

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------ folders

# Files that a run makes, or leaves half written when it is killed.
KINDS_OF_FILES = ("*.json", "*.pt", "*.png", "table.md", "page.html", "*.tmp")


def notes_of(folder):
    """What a run noted in the args.json of its folder; {} if there is none, or if another program
    wrote it."""
    try:
        notes = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) and "options" in notes else {}


def files_of(folder):
    """The files in a folder that a run may have made."""
    return [file for kind in KINDS_OF_FILES for file in folder.glob(kind)]


def claim(folder, go_on=False, force=False):
    """Make a run's folder, and return the lock on it, which has to be kept. It deletes nothing.

    go_on: the run of that folder will go on, so its files may be there. Raises ValueError if the
    folder is not free.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{folder} is a file, expected a folder: choose another --name") from error
    lock = open(folder / "lock", "a")  # "w" would empty a file of this name that is not ours
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a dead process holds no lock
    except BlockingIOError:
        advice = "wait until it ends" if go_on else "choose another --name"
        raise ValueError(f"{folder} is in use by another run: {advice}") from None
    except OSError as error:
        print(f"warning: {folder} can't be locked ({error}): start no second run there")
    if shutil.disk_usage(folder).free < 2**28:
        raise ValueError(f"{folder}: less than 256 MB are free there: make room before you train")
    if not go_on:
        files = files_of(folder)
        if files and not notes_of(folder):  # whoever made them would lose them
            raise ValueError(f"{folder} has files that are not of a run of this script, such as "
                             f"{files[0].name}: choose another --name")
        # A run that failed before its first adapter was saved has nothing to lose.
        kept = [file for file in files if file.name != "args.json" and file.suffix != ".tmp"]
        if kept and not force:
            raise ValueError(f"{folder} exists: choose another --name, --resume "
                             f"{shlex.quote(str(folder))} to go on with it, or --force to overwrite it")
    return lock


def remove_steps(folder, method):
    """Remove what only an unfinished method needs: its progress, and its last adapter. (A killed run
    may have left an earlier one too.)"""
    for file in (folder / f"{method}.progress.json", *folder.glob(f"{method}-*.pt")):
        file.unlink(missing_ok=True)


def remove_leftovers(folder, methods):
    """Remove what a killed run has left: files half written, and the steps of methods that are done."""
    for file in folder.glob("*.tmp"):
        file.unlink()
    for method in methods:
        if (folder / f"{method}.json").exists():
            remove_steps(folder, method)


def start_anew(folder, options):
    """Remove what an earlier run left in a folder, and note the options of this one."""
    # args.json goes last: as long as it is there, the other files are known to be of a run.
    for file in sorted(files_of(folder), key=lambda file: file.name == "args.json"):
        file.unlink()
    write_json(folder / "args.json", {"options": options})


@contextlib.contextmanager
def locked_folders(args):
    """{folder: Args} of the runs that were asked for, one for each seed. They stay locked."""
    seeds, runs = [str(int(seed)) for seed in listed(args.seeds)], {}  # 00 is 0
    for seed in seeds:
        name = args.name if len(seeds) == 1 else f"{args.name}-{seed}"
        runs[Path(args.resume or f"runs/{name}")] = dataclasses.replace(
            args, seeds=seed, name=name, force=False, resume="")
    with contextlib.ExitStack() as stack:
        if processes.RANK == 0:
            for folder in runs:
                stack.enter_context(claim(folder, bool(args.resume), args.force))
                if args.resume:
                    remove_leftovers(folder, listed(args.methods))
        processes.wait()
        yield runs


def unfinished(runs, go_on):
    """[(folder, Args, method)] of all that is to be done. go_on: what has a result is done."""
    return [(folder, its_args, method) for folder, its_args in runs.items()
            for method in listed(its_args.methods)
            if not (go_on and (folder / f"{method}.json").exists())]


def inputs_of(model, tasks):
    """What a run reads: the base, the data, how much of a prompt, and how long the answers are."""
    return {
        # --device auto and --dtype auto mean another thing on another machine.
        "base": f"{model.dtype} on {model.device.type}",
        "weights": fingerprint(model),
        "data": {task.name: task.digests for task in tasks},
        "limits": {task.name: task.limit for task in tasks},
        "answers": {task.name: task.longest for task in tasks}}


def note_inputs(runs, inputs):
    """Note in each run's args.json its options (--tokens may have changed), and what it reads.
    Raises ValueError if an interrupted run began with another base, or in another dtype, on another
    device or with other data.

    runs: {folder: its Args}. inputs: what `inputs_of` returned.
    """
    dtype_and_device, weights, digests = inputs["base"], inputs["weights"], inputs["data"]
    for folder, args in runs.items():
        notes = notes_of(folder)
        began_with = notes.get("base", dtype_and_device)
        if began_with != dtype_and_device:
            raise ValueError(f"{folder}: the base was {began_with} when this run began, and is "
                             f"{dtype_and_device} now: resume it on a machine like that, or start again "
                             "with another --name")
        other = differences(notes.get("weights", weights), weights, [])
        if other:
            raise ValueError(f"{folder}: the base is another one than when this run began: "
                             f"{len(other)} tensors or settings differ, {', '.join(other[:3])}. Put it "
                             "back, or start again with another --name")
        began = notes.get("data", digests)
        changed = [f"{name}/{split}.json" for name in digests for split in digests[name]
                   if digests[name][split] != began[name][split]]
        if changed:
            raise ValueError(f"{folder}: the data has changed since this run began: "
                             f"{', '.join(changed)}; put it back, or start again with another --name")
        if processes.RANK == 0:
            write_json(folder / "args.json",
                       notes | inputs | {"options": dataclasses.asdict(args)})


def write_report(runs):
    """Tables and figures of finished runs, by a process of its own: whatever it does, the results
    are safe."""
    # (Without flush, this would stand below what the other process prints.)
    print("making tables and figures, and page.html if there are MoSEs (it loads the base on the CPU)",
          flush=True)
    command = [sys.executable, "-m", "figures.report", *map(str, runs)]
    # It is one process, though torchrun may have started this one as one of several.
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    if subprocess.run(command, env=env).returncode:
        command = [*command[:3], *(str(folder.resolve()) for folder in runs)]
        print(f"the results are safe; for their tables, in {ROOT}: {shlex.join(command)}")


# ------------------------------------------------------------------------------ records


class Tested(NamedTuple):
    """What a test of one task gave: scores of each example with the task known; for MoSEs, also
    those with it inferred, and for how many percent that was right; the first two answers."""

    known: list
    inferred: list | None = None
    right: float | None = None
    answers: list = ()


class Record:
    """What one method has done so far in a folder; on disk after every lesson.

    parameters: how many numbers were trained in the last lesson. tokens: those of all training
    examples of all lessons and epochs, with prompts.
    R[t][i]: the score of task i after lesson t, None if it was not tested; R_tail the same with the
    task inferred from the prompt. samples[t]: the first two answers to each task tested then.
    A value for each lesson: bytes, of the adapter's file; source, the finished task that it started
    from, or None; new, how many numbers it added; used, which share of all numbers of the adapter is
    in use after it (for a LoRA 1); epochs.
    seconds_training: of all lessons without their tests, so with the probes, the keys and the files.
    task_id_accuracy: for each task of the last test, the percent of prompts whose task was inferred
    right. op_error: the standard error of the mean of all tasks, when all were tested last.
    """

    def __init__(self, folder, method, tasks, args):
        self.folder, self.method, self.args = folder, method, args
        self.tasks = [task.name for task in tasks]
        self.start_clock()
        self.state = folder / f"{method}.progress.json"
        lists = ("R", "R_tail", "task_id_accuracy", "samples", "bytes", "source", "new", "used",
                 "epochs")
        self.result = {key: [] for key in lists} | {
            "parameters": 0, "tokens": 0, "seconds_training": 0.0, "seconds_testing": 0.0}
        if self.state.exists():  # `start_anew` has removed it, unless this run goes on
            self.result = self.result_so_far()

    def result_so_far(self):
        """What an interrupted run has noted. Raises ValueError if its file is damaged."""
        try:
            return json.loads(self.state.read_text())
        except ValueError as error:
            raise ValueError(
                f"{self.state} is damaged ({error}): delete it, and all {self.method}-*.pt there, to "
                f"learn all tasks of {self.method} again") from error

    def num_done(self):
        """The number of lessons that are learned and tested."""
        return len(self.result["R"])

    def remaining(self, lessons):
        """[(number, Task)] of the lessons that are not done yet."""
        return [*enumerate(lessons)][self.num_done():]

    def adapter(self, model):
        """The adapter as the last lesson left it, or a new one; attached to the model."""
        file = self.folder / f"{self.method}-{self.num_done()}.pt" if self.num_done() else None
        return attach(self.method, self.args, model, file)

    def start_clock(self):
        """What is noted next takes its time from here on."""
        self.clock = time.time()

    def note_seconds(self, what):
        """Those since the last note, or since the clock was started."""
        now = time.time()
        self.result[f"seconds_{what}"] += now - self.clock
        self.clock = now

    def save_and_reopen(self, adapter, task, source, num_trained, report):
        """Write the adapter of a finished task, and return it as it is read from that file.

        num_trained: how many numbers were trained. report: what end_task() returned.

        What is tested and goes on is always what is on the disk. So every score is one of the file,
        and an interrupted run ends as if it had not been interrupted. (On a GPU it ends with other
        rounding, since the same sums may be added in another order there.)
        """
        result = self.result
        file = self.folder / f"{self.method}-{self.num_done() + 1}.pt"
        if processes.RANK == 0:
            adapter.save(file)
        processes.wait()
        adapter.detach()
        result["bytes"].append(file.stat().st_size)
        result["parameters"] = num_trained
        result["tokens"] += task.epochs * sum(len(ids) for ids, _ in task.train)
        for key, value in (("source", source), ("new", report["new"]), ("used", report["share"]),
                           ("epochs", task.epochs)):
            result[key].append(value)
        adapter = attach(self.method, self.args, adapter.model, file)
        self.note_seconds("training")
        return adapter

    def add(self, tests):
        """Note a lesson's tests {name of a task: Tested}; returns its row of R."""
        self.note_seconds("testing")
        result = self.result
        row = [mean(tests[name].known) if name in tests else None for name in self.tasks]
        result["R"].append(row)
        result["samples"].append({name: test.answers for name, test in tests.items()})
        if None not in row:
            result["op_error"] = bootstrap([tests[name].known for name in self.tasks])
        if all(test.inferred for test in tests.values()):
            result["R_tail"].append([mean(tests[name].inferred) if name in tests else None
                                     for name in self.tasks])
            result["task_id_accuracy"] = [test.right for test in tests.values()]
        if processes.RANK == 0:
            write_json(self.state, result)
            before = self.folder / f"{self.method}-{self.num_done() - 1}.pt"
            before.unlink(missing_ok=True)
        return row

    def finish(self, facts, zero_shot):
        """Write the result and the last adapter under their final names; the rest goes."""
        processes.wait()  # another process may still be reading the last adapter
        if processes.RANK > 0:
            return
        result = self.result
        last = self.folder / f"{self.method}-{self.num_done()}.pt"
        if result["bytes"]:  # floor and base have no adapter
            write_bytes(self.folder / f"{self.method}.pt", last.read_bytes())
        tail = summarize(result["R_tail"]) if result["R_tail"] else {}
        # A task that starts from a source begins with the source's score, which nobody has tested.
        gain_is_known = not any(result["source"])
        scores = summarize(result["R"], zero_shot if gain_is_known else None) | {
            "zero_shot": zero_shot, "op_tail": tail.get("op"), "bwt_tail": tail.get("bwt")}
        write_json(self.folder / f"{self.method}.json", facts | result | scores)
        remove_steps(self.folder, self.method)


def facts_of_run(record, model, tasks):
    """What a result file says of its run, beside the scores: options, examples, memory, versions."""
    cuda = model.device.type == "cuda"
    name = f"{model.device.type}, {torch.get_num_threads()} threads"
    return {
        "method": record.method, "args": dataclasses.asdict(record.args), "tasks": record.tasks,
        "examples": {t.name: [len(t.train), len(t.test_prompt_ids)] for t in tasks},
        "asked": {t.name: [{"prompt": row["prompt"], "answer": gold}
                           for row, gold in zip(t.test_texts[:2], t.golds)] for t in tasks},
        "peak_memory_bytes": peak_memory(model.device), "processes": processes.WORLD,
        "device": torch.cuda.get_device_name() if cuda else name,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, datasets)}
        | {"python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d")}


def peak_memory(device):
    """Bytes. On GPUs, the peak of what this process has allocated on all of them, for this method
    alone. On a CPU, the peak of this process since it was started, so of all methods so far. Either
    way, what a run did before it was interrupted does not count."""
    if device.type == "cuda":
        return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
