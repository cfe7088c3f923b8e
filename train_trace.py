"""The continual loop of TRACE: learn eight tasks in a row, and test every seen task after each one.

    python train_trace.py                   # two CPU cores: tiny-llm on trace-mini, in 4 minutes
    python train_trace.py --preset gpu      # one GPU: SmolLM2-135M on TRACE-0.5K, TRACE's epochs
    python train_trace.py --ask runs/default/mose.pt "Dovish (A), hawkish (B) or neutral (C)? .."

The first command needs no network and uses synthetic data: a real causal LM of 1M parameters, and
eight generated stand-ins for the TRACE tasks, in their format, names, order and metrics. It shows
the method, not TRACE.

All methods go through the same loop, data and order (replay takes some more steps):

    floor      no model: the best of a constant answer and copies of the prompt, chosen on train
    base       the model as it is
    lora       one LoRA, trained in sequence: it forgets
    replay     the same, with a share of the earlier tasks' examples in each task
    joint      one LoRA, trained on all tasks at the same time: the usual upper bound
    task_lora  one LoRA for each task, and the task is known: what MoSEs has to reach
    moe_lora   a mixture with one shared router and no masks, in sequence
    mose       MoSEs, with the task known (TIL) and inferred from the prompt (TaIL)
    mose_fixed the same, but its routers stay as they were drawn

Scores are TRACE's own, decoded greedily (TRACE samples at temperature 0.1). On real TRACE data they
compare with papers that use its 0.5K split, order and metrics, for the same base model only. No
score on trace-mini compares with any paper's.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.13", "transformers>=4.56", "datasets>=3.0", "tqdm>=4.66.3", "matplotlib>=3.8",
# ]
# ///

import math
import random
import sys

import datasets
import torch
import transformers
from torch.nn import functional as F
from tqdm import tqdm

from mose import MoSE
from tracebench import processes
from tracebench.ask import ask
from tracebench.data import batches, load_tasks, passes, whole_prompts
from tracebench.methods import attach, lessons, rate, tasks_to_test
from tracebench.model import (
    IDLE, TOKENS_WITHOUT_GRADIENTS, answer_logits, choose_device, generate, load_model)
from tracebench.options import Args, parse
from tracebench.runs import Record, Tested, about, claimed, draw, note_data, unfinished
from tracebench.scores import SCORES, floor, mean


def learn_in_a_row(record, model, tokenizer, tasks, args, bar):
    """The loop: learn all tasks with one method, and test those seen so far after each of them."""
    method = record.method
    adapter = record.adapter(model)  # a new one, or that of an interrupted run
    for t, task in record.remaining(lessons(method, tasks, args)):
        bar.set_description(f"{method} {task.name}")
        torch.manual_seed(1000 * int(args.seeds) + t)

        # A finished task that answers much of this one already is a good start for it (source). The
        # new task then needs only a part of the usual number of new entries (need). best_source
        # sets each finished task in turn and calls the probe.
        source, need = adapter.best_source(
            lambda: probe(model, tokenizer, task, args), task.wrong_by_guessing())
        adapter.begin_task(task.name, source, need)

        # The task's key, by which its prompts are recognised later, is made of all its prompts.
        for ids, mask in whole_prompts(task.prompts, tokenizer):
            adapter.observe(ids, mask)

        parameters = adapter.trainable_parameters()
        train(model, tokenizer, parameters, task, args, rate(method, args, model), bar)
        report = adapter.end_task()
        # The adapter is saved, detached, and attached again from its file. So what is tested, and
        # what goes on, is always what is on the disk.
        adapter = record.save(adapter, task, source, parameters, report)

        row = record.add({seen.name: evaluate(model, tokenizer, adapter, seen, args)
                          for seen in tasks_to_test(t, method, tasks, args)})
        bar.write(f"{method:10} {t + 1} {task.name:12} {scores_in_words(row)}")
    adapter.detach()


def train(model, tokenizer, parameters, task, args, lr, bar):
    """Train on one task. Raises ValueError when the loss is not finite.

    Each task has a new optimizer: momentum from the last task would change the new one. With
    several processes, every process takes its share of each batch.
    """
    rng = random.Random(f"{args.seeds} {task.name}")
    plan = [*batches(task.train, args.batch, task.epochs, rng)]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: share_of_rate(step, len(plan), args.schedule))
    for p in parameters:  # so each process has gradients to add up, even without a share of a batch
        p.grad = torch.zeros_like(p)
    model.train()
    for step, batch in enumerate(plan):
        answer_tokens = sum(label != -100 for _, labels in batch for label in labels)
        loss = torch.zeros((), device=model.device)
        # The gradients of all passes add up to those of the batch, which may not fit into one.
        for rows in processes.share_in_passes(
                batch, lambda part: passes(part, args.tokens), idle=IDLE):
            logits, labels, _ = answer_logits(model, tokenizer, rows)
            part = F.cross_entropy(logits, labels, reduction="sum") / answer_tokens
            part.backward()
            loss += part.detach()
        processes.total(loss, *(p.grad for p in parameters))
        if not loss.isfinite():
            raise ValueError(f"{task.name}: the loss is {loss} at step {step}: start again with a "
                             "lower rate (--lr of MoSEs, --lora_lr of the others) and another "
                             "--name. Adapters of earlier tasks are safe")
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        schedule.step()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
    model.eval()


def share_of_rate(step, steps, schedule):
    """The share of the learning rate at a step: it rises for a twentieth of the steps, and then
    falls along half a cosine, or stays. It is above 0 at the first step and at the last one, so
    that every step teaches something."""
    warm_up = steps // 20
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


@torch.no_grad()
def probe(model, tokenizer, task, args):
    """The share of a task's probe examples that the adapter, as it is set, does not answer exactly.
    The loss would be a poor guide: most of it is gone once the format of an answer is learned."""
    examples, wrong = task.probe_examples(), torch.zeros((), device=model.device)
    groups = passes(examples, TOKENS_WITHOUT_GRADIENTS * args.tokens)
    for rows in processes.share(groups, idle=IDLE):
        logits, labels, example = answer_logits(model, tokenizer, rows)
        wrong += example[logits.argmax(-1) != labels].unique().numel()
    processes.total(wrong)
    return wrong / len(examples)


def evaluate(model, tokenizer, adapter, task, args):
    """Tested: the scores of a task's test examples with the task known (TIL) and, for MoSEs, with
    the task inferred from each prompt (TaIL). Without an adapter, those of the bare base."""
    rows = range(len(task.test))

    def scores(answers):
        return [SCORES[task.metric](answers[i], task.golds[i], task.texts[1][i]["prompt"])
                for i in rows]

    if adapter:
        adapter.set_task(task.name)
    answers = generate(model, tokenizer, task, rows, args)
    known, first = scores(answers), [answers[i] for i in rows[:2]]
    if not isinstance(adapter, MoSE):
        return Tested(known, answers=first)

    names = []
    for ids, mask in whole_prompts(task.test, tokenizer):
        names += adapter.infer_task(ids, mask)
    wrong = [i for i in rows if names[i] != task.name]
    for name in dict.fromkeys(names[i] for i in wrong):  # where it is right, the answer is the same
        adapter.set_task(name)
        answers |= generate(model, tokenizer, task, [i for i in wrong if names[i] == name], args)
    return Tested(known, scores(answers), 100.0 * (1 - len(wrong) / len(names)), first)


def scores_in_words(row):
    return " ".join("     " if score is None else f"{score:5.1f}" for score in row)


def test_once(record, model, tokenizer, tasks, args, bar):
    """For a method that learns nothing: the floor, or the bare base."""
    if record.method == "floor":
        tests = {task.name: Tested(floor(task.metric, *task.texts)) for task in tasks}
    else:
        tests = {task.name: evaluate(model, tokenizer, None, task, args) for task in tasks}
    bar.write(f"{record.method:25} {scores_in_words(record.add(tests))}")


def main(args):
    """Every method with every seed, each with its own result file; then tables and figures."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.ask:
        return ask(args)
    processes.start(choose_device(args)[0])
    with claimed(args) as runs:
        todo = unfinished(runs)
        if todo:
            session(todo, runs, args)
        if processes.RANK == 0:
            draw(runs)


def session(todo, runs, args):
    """Run what is left to do: a list of (folder, its Args, method)."""
    model, tokenizer = load_model(args)
    tasks = load_tasks(args, tokenizer, model)
    for folder in runs:
        note_data(folder, tasks)
    for method in {method for _, _, method in todo} - {"floor", "base"}:
        attach(model, method, args).detach()  # a wrong option fails here, before any training
    zero_shot = None  # scores before any training: forward transfer, only with --test all
    if args.test == "all":
        zero_shot = [mean(evaluate(model, tokenizer, None, task, args).known) for task in tasks]
    records = [Record(folder, method, tasks, own) for folder, own, method in todo]
    steps = sum(math.ceil(len(task.train) / args.batch) * task.epochs for record in records
                for _, task in record.remaining(lessons(record.method, tasks, record.args)))
    # One bar for everything. With smoothing=0, its estimate includes the time for tests.
    bar = tqdm(total=steps, unit="step", ncols=100, smoothing=0, disable=processes.RANK > 0)
    for record in records:
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if record.method not in ("floor", "base"):
            learn_in_a_row(record, model, tokenizer, tasks, record.args, bar)
        elif not record.done():
            test_once(record, model, tokenizer, tasks, record.args, bar)
        record.finish(about(record, model, tasks), zero_shot)
    bar.close()


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"train_trace.py: error: {error}")
