"""The continual loop of TRACE: learn eight tasks in a row, and test every seen task after each one.

    python train_trace.py                   # two CPU cores: tiny-llm on trace-mini, in 4 minutes
    python train_trace.py --preset gpu      # one GPU: SmolLM2-135M on TRACE-0.5K, TRACE's epochs
    python train_trace.py --ask runs/default/mose.pt "Dovish (A), hawkish (B) or neutral (C)? .."

The first command needs no network and uses synthetic data: a real causal LM of 1M parameters, and
eight generated stand-ins for the TRACE tasks, in their format, names, order and metrics. It shows
the method, not TRACE.

All methods that learn go through the same loop and data, in the same order of tasks (joint has no
order, and replay takes some more steps):

    floor      no model, but a constant answer or a piece of the prompt, the best on a part of train
    base       the model as it is
    lora       one LoRA, trained in sequence: it forgets
    replay     the same, with a share of the earlier tasks' examples in each task
    joint      one LoRA, trained on all tasks at the same time: the usual upper bound
    task_lora  one LoRA for each task, and the task is known: what MoSEs has to reach
    moe_lora   a mixture of LoRAs without masks, in sequence, with one router for all tasks
    mose       MoSEs. The task of a test prompt is known (the paper calls this TIL, for
               task-incremental learning), or it is inferred from the prompt (TaIL).
    mose_fixed the same, but its routers stay as they were drawn, and are not trained

By default these are lora, replay, task_lora and mose.

Answers are decoded greedily (TRACE samples at temperature 0.1), up to the length of the longest
answer in train (TRACE: up to 512 tokens), or four tokens where only the first letter counts. They
are scored by TRACE's metrics. On real TRACE data the scores compare with papers that use its 0.5K
split, order and metrics, for the same base model only. No score on trace-mini compares with any
paper's.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.13", "transformers>=4.56", "datasets>=3.0", "tqdm>=4.66.3", "matplotlib>=3.8",
# ]
# ///

import dataclasses
import math
import os
import random
import shlex
import sys
import traceback
from pathlib import Path

import datasets
import torch
import transformers
from torch.nn import functional as F
from tqdm import tqdm

from mose import MoSE
from tracebench import processes
from tracebench.ask import ask
from tracebench.data import batches, load_tasks, padded_batches
from tracebench.methods import (
    KINDS, OURS, attach, check_density, check_targets, lessons, rate, tasks_to_test)
from tracebench.model import (
    TOKENS_FACTOR_WITHOUT_GRADIENTS, answer_logits, choose_device, generate, is_out_of_memory,
    load_model, passes_of_this_process)
from tracebench.options import ROOT, parse
from tracebench.runs import (
    Record, Tested, facts_of_run, inputs_of, locked_folders, note_inputs, start_anew,
    unfinished, write_report)
from tracebench.scores import SCORES, floor, mean


def learn_in_a_row(record, model, tokenizer, tasks, bar):
    """The loop: learn all tasks with one method, and test those seen so far after each of them.

    record: what this method has done so far with one seed, kept on the disk: its adapter, which
    lessons remain, and all scores. Its args are the options, with this seed in args.seeds, as text.

    bar: the progress bar of all methods.

    The adapters of all methods have those methods of MoSE that are called here. What means nothing
    to a LoRA does nothing there: it never starts from a finished task (best_source gives None,
    1.0), and it does not recognise prompts (observe does nothing). Where one LoRA serves all tasks,
    set_task takes any name.
    """
    method, args = record.method, record.args
    adapter = record.adapter(model)  # a new one, or that of the last lesson before an interruption
    # Each lesson is a task to train on. replay adds examples of earlier tasks to it. joint has a
    # single lesson, with the examples of all tasks, each as often as its own task's epochs say.
    for t, task in record.remaining(lessons(method, args, tasks)):
        record.start_clock()
        bar.set_description(f"{method} {task.name}")
        torch.manual_seed(1000 * int(args.seeds) + t)  # for what begin_task draws

        # A finished task that answers much of this one already is a good start for it (source). The
        # new task then needs only a part of the usual number of new entries (need). best_source
        # calls the probe under the bare base and under each finished task, and compares the errors
        # with that of the best constant answer (guess).
        source, need = adapter.best_source(
            lambda: probe(model, tokenizer, task, args), guess=task.error_of_a_constant())
        adapter.begin_task(task.name, source, need)

        # The task's key, by which its prompts are recognised later, is made of all its training
        # prompts, whatever --max_train says.
        for ids, mask in padded_batches(task.train_prompt_ids, tokenizer):
            adapter.observe(ids, mask)

        num_trained = sum(p.numel() for p in adapter.trainable_parameters())
        train(model, tokenizer, adapter.trainable_parameters(), task, args,
              rate(method, args, model), bar)
        report = adapter.end_task()
        # The adapter is saved, detached, and attached again from its file. So what is tested, and
        # what goes on, is always what is on the disk. The lesson is done when its scores are added:
        # after an interruption before that, it is learned again, from the adapter before it.
        adapter = record.save_and_reopen(adapter, task, source, num_trained, report)

        tests = {}
        for other in tasks_to_test(method, args, tasks, t):  # this one, and others as --test says
            tests[other.name] = evaluate(model, tokenizer, adapter, other, args)
        row = record.add(tests)  # the mean score of each task with the task known, or None
        bar.write(f"{method:10} {t + 1} {task.name:12} {scores_in_words(row)}")
    adapter.detach()


def train(model, tokenizer, parameters, task, args, lr, bar):
    """Train on one task. Raises ValueError when the loss or a weight is not finite.

    Each task has a new optimizer: with the old one, the first steps would still follow the
    gradients of the last task. With several processes, each takes its share of every batch.
    """
    rng = random.Random(f"{args.seeds} {task.name}")
    plan = [*batches(task.train, args.batch, task.epochs, rng)]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: share_of_rate(step, len(plan)))
    # The sum over all processes, below, needs a gradient of each, even of one without examples.
    for p in parameters:
        p.grad = torch.zeros_like(p)
    model.train()
    for step, batch in enumerate(plan):
        answer_tokens = sum(label != -100 for _, labels in batch for label in labels)
        loss = torch.zeros((), device=model.device)
        # The gradients of all passes add up to those of the batch, which may not fit into one: each
        # is divided by the number of answer tokens in the whole batch, of all processes.
        for examples in passes_of_this_process(batch, args.tokens):
            logits, labels, _ = answer_logits(model, tokenizer, examples)
            loss_of_pass = F.cross_entropy(logits, labels, reduction="sum") / answer_tokens
            loss_of_pass.backward()
            loss += loss_of_pass.detach()
        processes.add_up(loss, *(p.grad for p in parameters))
        if not loss.isfinite():
            raise diverged(f"{task.name}: the loss is {loss} at step {step}", lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        schedule.step()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
    if not all(p.isfinite().all() for p in parameters):  # the last step shows in no loss
        raise diverged(f"{task.name}: some weights are not finite after the last step", lr)
    model.eval()


def diverged(what, lr):
    """The error of a training that has diverged."""
    return ValueError(f"{what}, with a learning rate of {lr:.2g}: start again with a lower one "
                      "(--lr of mose and mose_fixed, --lora_lr of the others), another --name, and "
                      "in --methods those that are not done. (--resume would diverge again.) "
                      "What was saved before is still there: for the tables of all methods that "
                      f"are done, in {ROOT}: python -m figures.report runs/NAME")


def share_of_rate(step, steps):
    """The share of the learning rate at a step: it rises for a twentieth of the steps, and then
    falls along half a cosine. It is above 0 at the first step and at the last one, so
    that every step teaches something."""
    warm_up = steps // 20
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


@torch.no_grad()
def probe(model, tokenizer, task, args):
    """The share of some training examples that the task in force does not answer exactly.

    No answer is decoded. Each token of the right answer is predicted from those before it, and if
    all are right, decoding would give this answer. Long answers are hardly ever exact, so tasks of
    long answers find no source. The loss would be a poor guide: most of it is gone once the format
    of an answer is learned.
    """
    examples = task.probe_examples()
    wrong = torch.zeros((), device=model.device)
    for some in passes_of_this_process(examples, TOKENS_FACTOR_WITHOUT_GRADIENTS * args.tokens):
        # One row of logits, one label and one index for each answer token. An answer with a single
        # wrong token is wrong.
        logits, labels, example_of_token = answer_logits(model, tokenizer, some)
        is_wrong = logits.argmax(-1) != labels
        wrong += example_of_token[is_wrong].unique().numel()
    processes.add_up(wrong)
    return wrong / len(examples)


def evaluate(model, tokenizer, adapter, task, args):
    """Test an adapter on a task. Without one (None), the bare base is tested. Returns a Tested: the
    score of each test example with the task known (TIL) and, for MoSEs, with the task inferred from
    each prompt (TaIL); and the first two answers, to be shown in the result file. In both cases an
    answer may be as long as those of the right task."""
    indices = range(len(task.test_prompt_ids))

    def scores(answers):
        score = SCORES[task.metric]  # some metrics compare an answer with the prompt as well
        # golds are the right answers as the tokenizer can write them, since some change a text.
        return [score(answers[i], task.golds[i], task.test_texts[i]["prompt"]) for i in indices]

    if adapter is not None:
        adapter.set_task(task.name)
    answers = generate(model, tokenizer, task, indices, args)  # {index: text}
    known, first_two = scores(answers), [answers[i] for i in indices[:2]]
    if not isinstance(adapter, MoSE):
        return Tested(known, answers=first_two)

    inferred = []  # for each test example, the task that its prompt seems to belong to
    for ids, mask in padded_batches(task.test_prompt_ids, tokenizer):  # in the order of indices
        inferred += adapter.infer_task(ids, mask)
    # Where the right task was inferred, the answer is the one that is there already.
    for name in sorted({*inferred} - {task.name}):
        adapter.set_task(name)
        misled = [i for i in indices if inferred[i] == name]
        answers |= generate(model, tokenizer, task, misled, args)
    right = 100 * inferred.count(task.name) / len(inferred)
    return Tested(known, inferred=scores(answers), right=right, answers=first_two)


def scores_in_words(row):
    return " ".join("     " if score is None else f"{score:5.1f}" for score in row)


def test_once(record, model, tokenizer, tasks, bar):
    """For a method that learns nothing: the floor, or the bare base."""
    args = record.args
    record.start_clock()
    if record.method == "floor":
        tests = {}
        for task in tasks:
            tests[task.name] = Tested(floor(task.metric, task.train_texts, task.test_texts))
    else:
        tests = {task.name: evaluate(model, tokenizer, None, task, args) for task in tasks}
    bar.write(f"{record.method:25} {scores_in_words(record.add(tests))}")


def main(args):
    """Every method with every seed; then tables and figures. Each seed is a run, with a folder of
    its own, and each method has a result file there."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.ask:
        return ask(args)
    device, _ = choose_device(args)
    processes.start(device)
    with locked_folders(args) as runs:  # {folder: its Args}, one for each seed
        todo = unfinished(runs, go_on=bool(args.resume))
        if todo:
            session(todo, runs, args)
        if processes.RANK == 0:
            write_report(runs)


# How this run was started, for the messages that say how to go on.
START = f"torchrun --nproc-per-node {processes.WORLD}" if processes.WORLD > 1 else "python"
SCRIPT = shlex.quote(os.path.relpath(__file__))


def to_go_on(todo, runs, more=""):
    """The commands by which what is left to do goes on: one for each run, and one for their common
    tables."""
    folders = dict.fromkeys(shlex.quote(str(folder)) for folder, _, _ in todo)
    commands = [f"{START} {SCRIPT} --resume {folder}{more}" for folder in folders]
    if len(runs) > 1:
        folders = shlex.join(str(folder.resolve()) for folder in runs)
        commands.append(f"(cd {shlex.quote(str(ROOT))} && python -m figures.report {folders})")
    return "\n".join(commands)


def check_method(method, args, model, tasks):
    """Attach a method and take it off again. Raises ValueError for a wrong option, such as a
    density that leaves no entry for the first task or the last one."""
    adapter = attach(method, args, model)
    check_targets(model, args)
    adapter.begin_task(tasks[0].name)
    if method in OURS:
        check_density(adapter, len(tasks))
    adapter.detach()


def session(todo, runs, args):
    """Run what is left to do.

    todo: [(folder, its Args, method)]. runs: {folder: its Args}, also those with nothing left.
    """
    model, tokenizer = load_model(args)
    tasks = load_tasks(args, tokenizer, model)
    # What can be wrong is checked first, as long as nothing of an earlier run is removed.
    for method in dict.fromkeys(method for _, _, method in todo):
        if method in KINDS:
            check_method(method, args, model, tasks)
    inputs = inputs_of(model, tasks)
    if processes.RANK == 0 and not args.resume:
        for folder, its_args in runs.items():
            start_anew(folder, dataclasses.asdict(its_args))
    processes.wait()
    note_inputs(runs, inputs)
    try:
        learn_and_test(todo, args, model, tokenizer, tasks)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            if processes.RANK == 0:
                print("What was learned and tested before is saved. If the error below can be "
                      f"mended, go on:\n{to_go_on(todo, runs)}", file=sys.stderr)
            raise
        fewer = max(1, args.tokens // 2)
        raise ValueError(f"{error}\nGo on with fewer tokens in a pass, half as many say (and with "
                         "--checkpointing, if one row is too long):\n"
                         + to_go_on(todo, runs, f" --tokens {fewer}")) from error
    except OSError as error:  # say, no space is left
        raise ValueError(f"{error}\nWhat was learned and tested before is saved. When this is "
                         f"mended, go on:\n{to_go_on(todo, runs)}") from error
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: what was learned and tested is saved. To go on:\n"
                 + to_go_on(todo, runs))


def learn_and_test(todo, args, model, tokenizer, tasks):
    """All that is left to do of a session."""
    # Forward transfer is a task's score before it is learned, less that of the bare base. With
    # --test ends no task is tested before it is learned.
    zero_shot = None
    if args.test == "all" and any(method in KINDS for _, _, method in todo):
        zero_shot = [mean(evaluate(model, tokenizer, None, task, args).known) for task in tasks]
    records = [Record(folder, method, tasks, its_args) for folder, its_args, method in todo]
    steps = 0
    for record in records:  # floor and base have no lessons
        for _, task in record.remaining(lessons(record.method, record.args, tasks)):
            steps += math.ceil(len(task.train) / args.batch) * task.epochs
    # One bar for everything. With smoothing=0, its estimate includes the time for tests.
    bar = tqdm(total=steps, unit="step", ncols=100, smoothing=0, disable=processes.RANK > 0)
    for record in records:
        if model.device.type == "cuda":  # for the peak memory in facts_of_run
            for gpu in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(gpu)
        if record.method in KINDS:
            learn_in_a_row(record, model, tokenizer, tasks, bar)
        elif not record.num_done():  # it may have its scores already, and no result file yet
            test_once(record, model, tokenizer, tasks, bar)
        record.finish(facts_of_run(record, model, tasks), zero_shot)
    bar.close()


def from_the_command_line():
    """Do what the command line asks for. An error that the user can mend becomes one message."""
    try:
        main(parse())
    except KeyboardInterrupt:  # before the training or after it, which has a message of its own
        sys.exit("\ninterrupted")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"train_trace.py: error: {error}\nThe base does not fit, or its experts: take a "
                 "smaller one, or one of --dtype bfloat16, --device_map auto, --shard")
    except (ValueError, OSError) as error:
        # Our own messages say what to mend, so they need no traceback.
        file = traceback.extract_tb(error.__traceback__)[-1].filename
        raised_in = Path(file).resolve().parent  # (ROOT is resolved too)
        if isinstance(error, ValueError) and raised_in not in (ROOT, ROOT / "tracebench"):
            traceback.print_exc()  # the message of another library may not say where it went wrong
        sys.exit(f"train_trace.py: error: {error}")


if __name__ == "__main__":
    from_the_command_line()
