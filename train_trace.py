"""The continual loop of TRACE: learn eight tasks in a row, and test every seen task after each one.

    python train_trace.py                   # two CPU cores: tiny-llm on trace-mini, in 4 minutes
    python train_trace.py --model Qwen/Qwen2.5-0.5B-Instruct --data PATH/LLM-CL-Benchmark_500 \\
        --methods mose --name qwen --lr 1e-3 --batch 32     # one GPU, real TRACE: not measured
    python train_trace.py --ask runs/default/mose.pt "Dovish (A), hawkish (B) or neutral (C)? .."

The first is synthetic and offline: a real causal LM of 1M parameters and eight generated stand-ins
for the TRACE tasks, in their format, names, order and metrics. It shows the method, not TRACE.

Methods, all through the same loop, data, steps and order:

    floor      no model: the best of a constant answer and copies of the prompt, chosen on train
    base       the model as it is
    lora       one LoRA, trained in sequence: it forgets
    task_lora  one LoRA for each task, and the task is known: what MoSEs has to reach
    moe_lora   a mixture with one shared router and no masks, in sequence
    mose       MoSEs, with the task known (TIL) and inferred from the prompt (TaIL)
    mose_fixed the same, but its routers stay as they were drawn

Scores are TRACE's own, decoded greedily (TRACE samples at temperature 0.1). On real TRACE data they
compare with papers that use its 0.5K split, order and metrics, for the same base model only. No
score on trace-mini compares with any paper's.
"""

import collections
import dataclasses
import fcntl
import functools
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import datasets
import torch
import transformers
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from benchmarks.trace_scores import METRICS, SCORES, TASKS
from mose import MoSE, MoSEConfig

HERE = Path(__file__).resolve().parent
SCHEDULES = {"trace": (5, 3, 7, 5, 3, 5, 5, 7), "short": (2, 1, 3, 2, 1, 2, 2, 3)}  # of TASKS
METHODS = ("floor", "base", "lora", "task_lora", "moe_lora", "mose", "mose_fixed")
# Set by torchrun; without it there is one process, and no process group.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
progress = functools.partial(tqdm, ncols=100, disable=RANK > 0)


def option(default, text, choices=None):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclasses.dataclass
class Args:
    """The command line: every field is an option, and stands in the result file."""

    model: str = option(str(HERE / "assets/tiny-llm"), "hub id or folder of a causal LM")
    data: str = option(str(HERE / "assets/trace-mini"), "folder or URL with TASK/{train,test}.json")
    tasks: str = option(",".join(TASKS), "the tasks, in the order of learning")
    metric: str = option("", "of further tasks, as TASK=METRIC,..: " + "accuracy, first_letter, "
                         "rouge_l, edit_similarity or sari")
    methods: str = option("lora,task_lora,mose", "of " + ", ".join(METHODS))
    name: str = option("default", "results go to runs/NAME")
    force: bool = option(False, "overwrite the results of an earlier run of that name")
    seeds: str = option("0", "of start and data order; of several (0,1,2) each is a run NAME-SEED")
    epochs: str = option("4", "per task: a number, one for each task (5,3,..), trace or short")
    lr: float = option(1e-2, "learning rate of all methods")
    schedule: str = option("cosine", "of the learning rate", ("cosine", "constant"))
    batch: int = option(16, "examples for one step")
    micro_batch: int = option(0, "of these, at once in memory (0: all)")
    eval_batch: int = option(100, "prompts that generate together")
    max_prompt: int = option(1024, "tokens of a prompt that the model reads, its last ones")
    max_train: int = option(0, "train on so many examples a task (0: all); keys see all prompts")
    max_test: int = option(0, "score so many examples a task (0: all)")
    split: str = option("test", "what is scored; choose settings by eval", ("test", "eval"))
    targets: str = option("q_proj,v_proj", "linear layers that get experts")
    experts: int = option(MoSEConfig.num_experts, "experts of mose and moe_lora")
    rank: int = option(MoSEConfig.rank, "rank of each expert of mose")
    top_k: int = option(MoSEConfig.top_k, "experts that a token is sent to")
    router_std: float = option(MoSEConfig.router_std, "spread of new routers")
    density: float = option(MoSEConfig.density, "of the free pool, what a task of mose may take")
    scale: float = option(MoSEConfig.scale, "of the experts' sum")
    router_stop: int = option(0, "freeze the router of moe_lora after so many tasks (0: never)")
    lora_rank: int = option(8, "rank of lora, task_lora and, in all, of moe_lora")
    lora_scale: float = option(4.0, "their scale, alpha / rank")
    resume: str = option("", "go on with an interrupted run: its folder, such as runs/default")
    device: str = option("auto", "where it runs", ("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "of the base", ("auto", "bfloat16", "float16", "float32"))
    device_map: str = option("", "auto spreads a large base over several GPUs (needs accelerate)")
    checkpointing: bool = option(False, "recompute activations in backward, to save memory")
    ask: list[str] = dataclasses.field(default_factory=list, metadata={
        "metavar": ("FILE", "PROMPT"), "help": "only answer a prompt, with an adapter of mose"})


def parse(argv=None):
    """Args from the command line. Exits with a message on a wrong one."""
    parser = transformers.HfArgumentParser(Args, description=__doc__.split("\n")[0])
    args = Args(**vars(parser.parse_args(argv)))
    if args.resume:
        file = Path(args.resume) / "args.json"
        if not file.exists():
            parser.error(f"--resume: there is no {file}, so no run to go on with")
        began = json.loads(file.read_text()) | {"resume": args.resume}
        parser.set_defaults(**began)
        args = Args(**vars(parser.parse_args(argv)))
        other = [f"--{k} {v} (was {began[k]})" for k, v in vars(args).items() if v != began[k]]
        if other:
            parser.error(f"--resume goes on with what the run began with, not {', '.join(other)}")
    if not all(seed.isdigit() for seed in args.seeds.split(",")):
        parser.error(f"--seeds: got {args.seeds!r}, expected whole numbers: 0 or 0,1,2")
    unknown = [method for method in args.methods.split(",") if method not in METHODS]
    if unknown:
        parser.error(f"--methods: got {unknown}, expected of {', '.join(METHODS)}")
    for name in ("batch", "eval_batch", "max_prompt", "lora_rank"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: got {getattr(args, name)}, expected at least 1")
    if len(args.ask) not in (0, 2):
        parser.error(f"--ask: got {len(args.ask)} values, expected FILE and \"PROMPT\"")
    return args


# ------------------------------------------------------------------------------ scores


def mean(values):
    return sum(values) / max(1, len(values))


def backward_transfer(R):
    """Mean over all tasks but the last of R[last][i] - R[i][i], signed; R as in `run`."""
    return mean([R[-1][i] - R[i][i] for i in range(len(R) - 1)])


def summarize(R, zero_shot, before):
    """What papers report of a matrix R (see `run`); before: each task just before it is learned."""
    T, last = len(R), R[-1]
    best = [max(R[t][i] for t in range(i, T)) for i in range(T)]
    return {
        "op": mean(last), "learned": mean([R[i][i] for i in range(T)]), "bwt": backward_transfer(R),
        # As TreeLoRA and MoRAM print it: what was lost, never below 0, over all T tasks.
        "bwt_treelora": mean([max(0.0, R[i][i] - last[i]) for i in range(T)]),
        "forgetting": mean([best[i] - last[i] for i in range(T - 1)]),
        "fwt": mean([before[i] - zero_shot[i] for i in range(1, T)]),
    }


def bootstrap(rows, draws=1000):
    """The standard error of OP, from the scores of each task's test examples."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.tensor(row) for row in rows]
    picks = [torch.randint(len(v), (draws, len(v)), generator=generator) for v in values]
    return torch.stack([v[p].mean(1) for v, p in zip(values, picks)]).mean(0).std().item()


# ------------------------------------------------------------------------------ data


def read(base, task, split):
    """A task's split in TRACE's form, as a Dataset. Raises ValueError with the file and the row."""
    where = f"{base}/{task}/{split}.json"
    try:
        url = where.startswith(("http://", "https://"))
        with urllib.request.urlopen(where) if url else open(where, "rb") as file:
            rows = json.loads(file.read().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: can't be read as JSON ({error})") from error
    form = 'a list of {"prompt": text, "answer": text}'
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{where}: got {type(rows).__name__} of {len(rows)}, expected {form}")
    for i, row in enumerate(rows):
        texts = [row.get(key) for key in ("prompt", "answer")] if isinstance(row, dict) else []
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{where}: row {i} is {str(row)[:60]!r}, expected {form}, none empty")
    return datasets.Dataset.from_list(rows).select_columns(["prompt", "answer"])


@dataclasses.dataclass
class Task:
    """A task's texts as ids. train and test: lists of (whole prompt, answer with EOS)."""

    name: str
    metric: str
    epochs: int
    train: list
    test: list
    limit: int  # tokens of a prompt that the model may read
    max_new: int  # tokens of the longest training answer
    texts: tuple  # the Datasets of train and test


def load_tasks(args, tokenizer, model):
    """All tasks of the run. Raises ValueError for what is wrong with the data or its options."""
    names, metrics = args.tasks.split(","), dict(METRICS)
    metrics |= dict(pair.split("=") for pair in args.metric.split(",") if pair.count("=") == 1)
    wrong = [n for n in names if metrics.get(n) not in SCORES]
    if wrong or len({*names}) < len(names):
        raise ValueError(f"--tasks {args.tasks}: expected each once, of {', '.join(TASKS)}, or "
                         f"others with --metric TASK={'|'.join(SCORES)}; no metric have {wrong}")
    if args.epochs in SCHEDULES:
        epochs = [dict(zip(TASKS, SCHEDULES[args.epochs])).get(name) for name in names]
    else:
        epochs = [int(n) if n.isdigit() else None for n in args.epochs.split(",")]
        epochs = epochs * len(names) if len(epochs) == 1 else epochs
    if len(epochs) != len(names) or None in epochs:
        raise ValueError(f"--epochs {args.epochs}: expected a number, {len(names)} numbers, or one "
                         f"of {', '.join(SCHEDULES)} with TRACE's own tasks")
    tasks = []
    for name, count in zip(names, epochs):
        train, test = read(args.data, name, "train"), read(args.data, name, args.split)
        test = test.select(range(min(args.max_test or len(test), len(test))))
        known = {*train["prompt"]}
        shared = sum(prompt in known for prompt in test["prompt"])
        if shared:
            print(f"warning: {name}: {shared} of {len(test)} test prompts stand in train too")
        encoded = [[encode(tokenizer, row) for row in rows] for rows in (train, test)]
        max_new = max(len(answer) for _, answer in encoded[0])
        positions = getattr(model.config, "max_position_embeddings", math.inf)
        limit = min(args.max_prompt, positions - max_new)
        if limit < 2:
            raise ValueError(f"{name}: an answer of {max_new} tokens leaves no room for its prompt "
                             f"in the {positions} positions of the model")
        tasks.append(Task(name, metrics[name], count, *encoded, limit, max_new, (train, test)))
    return tasks


def floor(task):
    """Scores without a model: of a constant and some copies, what is best on (some) train."""
    train, test = task.texts[0].select(range(min(100, len(task.train)))), task.texts[1]
    common = collections.Counter(task.texts[0]["answer"]).most_common(1)[0][0]
    rules = [
        lambda prompt: common,
        lambda prompt: prompt.rstrip().split("\n")[-1],
        lambda prompt: " ".join(re.split(r"(?<=[.!?])\s+", prompt)[:3]),
        lambda prompt: prompt,
    ]

    def scores(rule, rows):
        metric = SCORES[task.metric]
        return [metric(rule(row["prompt"]), row["answer"], row["prompt"]) for row in rows]

    return scores(max(rules, key=lambda rule: mean(scores(rule, train))), test)


def encode(tokenizer, row):
    """(ids of the prompt with BOS, ids of the answer with EOS), each tokenised on its own: joined,
    "Stance:" and "C" may merge into tokens that the prompt alone does not end with."""
    prompt, answer = (tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in row)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + prompt, answer + [tokenizer.eos_token_id]


def cut(prompt, limit, bos):
    """The BOS, if there is one, and the last tokens of a prompt, `limit` in all."""
    keep = int(prompt[0] == bos)
    return prompt if len(prompt) <= limit else prompt[:keep] + prompt[len(prompt) - limit + keep:]


def pad(rows, value, side="right"):
    """Lists of ids as one (B, T) tensor, and its attention mask."""
    rows = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, True, value, side), pad_sequence(ones, True, 0, side)


def batches(lengths, size, epochs, rng):
    """Indices of every random batch, by length inside: cut into micro-batches, it pads little."""
    for _ in range(epochs):
        order = rng.sample(range(len(lengths)), len(lengths))
        for start in range(0, len(order), size):
            yield sorted(order[start:start + size], key=lambda i: lengths[i])


# ------------------------------------------------------------------------------ train and test


def examples(task, args, tokenizer):
    """Training examples as (ids, labels): labels on the answer and its EOS alone."""
    for prompt, answer in task.train[:args.max_train or None]:
        prompt = cut(prompt, task.limit, tokenizer.bos_token_id)
        yield prompt + answer, [-100] * len(prompt) + answer


def answers(model, tokenizer, rows):
    """For each answer token of some examples: logits (n, V), labels (n,), its example (n,)."""
    ids, mask = pad([ids for ids, _ in rows], tokenizer.pad_token_id)
    labels = pad([labels for _, labels in rows], -100)[0][:, 1:].to(model.device)
    wanted, head = labels != -100, model.get_output_embeddings()
    # Logits of prompts are most of what a step holds in memory, and no loss reads them.
    with head.register_forward_pre_hook(lambda _, x: x[0][:, :-1][wanted.to(x[0].device)]):
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    return logits.float(), labels[wanted], wanted.nonzero()[:, 0]


def probe(model, tokenizer, task, args):
    """The share of a task's first examples that what is in force gets wrong, token for token. The
    loss would not do: most of it goes as soon as the form of an answer is known."""
    rows, wrong = [*examples(task, args, tokenizer)][:64], torch.zeros((), device=model.device)
    size = args.micro_batch or args.batch
    for start in range(RANK * size, len(rows), WORLD * size):
        logits, labels, example = answers(model, tokenizer, rows[start:start + size])
        wrong += example[logits.argmax(-1) != labels].unique().numel()
    return sum_over_processes(wrong)[0] / len(rows)


def sum_over_processes(*tensors):
    for x in tensors if WORLD > 1 else ():
        torch.distributed.all_reduce(x)
    return tensors


def merge_over_processes(part):
    """The union of every process's dict."""
    parts = [part] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(parts, part)
    return {key: value for part in parts for key, value in part.items()}


def train(model, tokenizer, parameters, task, args, title):
    """One task, with an optimizer of its own: old momentum would move what a new task starts from.

    Every process takes its share of each batch. Returns the share of padding. Raises ValueError
    when the loss is not finite.
    """
    rng, parts = random.Random(f"{args.seeds} {task.name}"), [*examples(task, args, tokenizer)]
    plan = [*batches([len(ids) for ids, _ in parts], args.batch, task.epochs, rng)]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    for p in parameters:  # zeros for a process that has no part in a small batch
        p.grad = torch.zeros_like(p)
    name = {"constant": "constant_with_warmup"}.get(args.schedule, args.schedule)
    warm = math.ceil(0.05 * len(plan))
    rate = transformers.get_scheduler(name, optimizer, warm, len(plan))
    seen = padded = 0
    model.train()
    bar = progress(plan, desc=title, unit="step")
    for step, batch in enumerate(bar):
        count = sum(len(task.train[i][1]) for i in batch)  # label tokens, of all processes
        total, own = torch.zeros((), device=model.device), batch[RANK::WORLD]
        size = args.micro_batch or len(batch)
        for start in range(0, len(own), size):
            rows = [parts[i] for i in own[start:start + size]]
            logits, labels, _ = answers(model, tokenizer, rows)
            loss = F.cross_entropy(logits, labels, reduction="sum") / count
            loss.backward()
            total += loss.detach()
            full = len(rows) * max(len(ids) for ids, _ in rows)
            seen, padded = seen + full, padded + full - sum(len(ids) for ids, _ in rows)
        sum_over_processes(total, *(p.grad for p in parameters))
        if not total.isfinite():
            raise ValueError(f"{task.name}: the loss is {total} at step {step}: lower --lr; "
                             "earlier tasks are safe, each was saved when it ended")
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        rate.step()
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
    model.eval()
    return padded / max(1, seen)


@torch.no_grad()
def generate(model, tokenizer, task, rows, batch, before=None):
    """Greedy answers {row: text} to test prompts, from the prompts alone; before(batch) first."""
    prompts = {i: cut(task.test[i][0], task.limit, tokenizer.bos_token_id) for i in rows}
    order, texts = sorted(rows, key=lambda i: len(prompts[i])), {}
    for start in range(0, len(order), batch)[RANK::WORLD]:
        some = order[start:start + batch]
        if before:
            before(some)
        ids, mask = pad([prompts[i] for i in some], tokenizer.pad_token_id, "left")
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                             max_new_tokens=task.max_new)
        new = tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)
        texts |= dict(zip(some, new))
    return merge_over_processes(texts)


def whole_prompts(rows, tokenizer, size=32):
    """Whole prompts in batches, for the task keys: their beginning says most about the task."""
    for start in range(0, len(rows), size):
        yield pad([prompt for prompt, _ in rows[start:start + size]], tokenizer.pad_token_id)


def evaluate(model, tokenizer, adapter, task, args):
    """The score of each test example with the task known; for MoSEs also with it inferred, and how
    often that was right, in percent. A task not yet learned is tested with what is in force."""
    rows = range(len(task.test))

    def scores(texts):
        test, metric = task.texts[1], SCORES[task.metric]
        return [metric(texts[i], test[i]["answer"], test[i]["prompt"]) for i in rows]

    if adapter and task.name in adapter.tasks:
        adapter.set_task(task.name)
    texts = generate(model, tokenizer, task, rows, args.eval_batch)
    til = scores(texts)
    if not adapter or isinstance(adapter, SharedPool):
        return til, None, None
    names = []
    for ids, mask in whole_prompts(task.test, tokenizer):
        names += adapter.infer_task(ids, mask)
    wrong = [i for i in rows if names[i] != task.name]  # for the others the text is the same
    texts |= generate(model, tokenizer, task, wrong, args.eval_batch,
                      lambda some: adapter.set_task([names[i] for i in some]))
    return til, scores(texts), 100.0 * (1 - len(wrong) / len(names))


# ------------------------------------------------------------------------------ the loop


class FixedRouter(MoSE):
    """MoSEs whose routers stay as they were drawn."""

    def trainable_parameters(self):
        routers = {id(layer.router) for layer in self.layers}
        return [p for p in super().trainable_parameters() if id(p) not in routers]


class SharedPool(MoSE):
    """The baselines: one pool and one router for all tasks, with nothing masked or protected. Each
    task goes on from what the last one left, and overwrites it."""

    router_stop = 0  # its router learns during so many tasks; 0: always

    def begin_task(self, name, probe=None):
        last = self.tasks[-1] if self.tasks else None
        for layer in self.layers:
            layer.used.zero_()
        super().begin_task(name, lambda: float(last is None or self.active != last))
        for layer in self.layers:
            layer.source.fill_(True)  # the whole pool is in force, so no score is needed
            layer.num_new = 0
            layer.score.requires_grad_(False)
            layer.router.requires_grad_(not 0 < self.router_stop <= len(self.tasks))
            if last:
                layer.weight.data.copy_(layer.frozen)

    def end_task(self):
        name = self.open
        report = super().end_task()
        for layer in self.layers:
            layer.tasks = dict.fromkeys(layer.tasks, layer.tasks[name])
        return report


KINDS = {"mose": MoSE, "mose_fixed": FixedRouter}  # all other methods: SharedPool


def attach(model, method, args):
    """The adapter of a method. One LoRA is one expert that is never protected; moe_lora has as many
    parameters, in several experts."""
    targets = tuple(args.targets.split(","))
    if method in KINDS:
        return KINDS[method](model, MoSEConfig(
            targets, args.experts, args.rank, args.top_k, args.density, args.scale,
            router_std=args.router_std))
    mixture = (args.experts, args.top_k, MoSEConfig.router_dim)
    experts, top_k, router_dim = mixture if method == "moe_lora" else (1, 1, 1)
    rank = max(1, args.lora_rank // experts)
    return SharedPool(model, MoSEConfig(targets, experts, rank, top_k, 1.0, args.lora_scale,
                                        router_dim, args.router_std, key_dim=1))


def learn(adapter, model, tokenizer, task, args, title):
    """One task from begin to end; what to note of it."""
    if isinstance(adapter, SharedPool):
        adapter.router_stop = args.router_stop
    source = adapter.begin_task(task.name, lambda: probe(model, tokenizer, task, args))
    for ids, mask in whole_prompts(task.train, tokenizer):
        adapter.observe(ids, mask)
    parameters = adapter.trainable_parameters()
    padding = train(model, tokenizer, parameters, task, args, title)
    report = adapter.end_task()
    return {"padding": padding, "source": source, "used": report["share"], "new": report["new"],
            "parameters": sum(p.numel() for p in parameters)}


def run(method, model, tokenizer, tasks, args, folder, zero_shot):
    """Learn all tasks with one method; returns its results.

    R[t][i] is the score of task i after task t, for i > t None; R_tail the same with the task
    inferred from the prompt. After each task all is on disk, and every adapter comes from there,
    so that an interrupted run which goes on and an undisturbed one do the same.
    """
    lists = ("R", "R_tail", "task_id_accuracy", "bytes", "files", "padding", "source", "used",
             "new", "epochs")
    result = {key: [] for key in lists} | {"before": [*zero_shot], "parameters": 0, "seconds": 0.0}
    state = folder / f"{method}.progress.json"
    if args.resume and state.exists():
        result = json.loads(state.read_text())
    files, learns, alone = result["files"], method not in ("floor", "base"), method == "task_lora"
    kind = KINDS.get(method, SharedPool)
    adapter = None
    for t, task in [*enumerate(tasks)][len(result["R"]):]:
        start = time.time()
        torch.manual_seed(1000 * int(args.seeds) + t)
        if learns:
            if alone or not t:
                adapter = attach(model, method, args)
            elif not adapter:  # resumed; else it is the one that was tested, from the same file
                adapter = kind.load(model, folder / files[-1])
            if t and method in ("lora", "moe_lora"):  # the others start each task as the bare base
                adapter.set_task(tasks[t - 1].name)
                result["before"][t] = mean(evaluate(model, tokenizer, adapter, task, args)[0])
            title = f"{method} {t + 1}/{len(tasks)} {task.name}"
            notes = learn(adapter, model, tokenizer, task, args, title)
            result["parameters"] = notes.pop("parameters")
            for key, value in (notes | {"epochs": task.epochs}).items():
                result[key].append(value)
            last = t + 1 == len(tasks) and not alone
            name = f"{method}.pt" if last else f"{method}-{task.name}.pt"
            if RANK == 0:
                adapter.save(folder / name)
            merge_over_processes({})  # nobody reads the file before it is there
            files[:] = [*files, name] if alone else [name]
            result["bytes"].append(sum((folder / name).stat().st_size for name in files))
        rows = []
        for i, seen in enumerate(progress(tasks[:t + 1], "test", leave=False)):
            if learns and (alone or i == 0):
                adapter.detach()
                adapter = kind.load(model, folder / files[i if alone else -1])
            rows.append((floor(seen), None, None) if method == "floor" else
                        evaluate(model, tokenizer, adapter, seen, args))
        if learns and (alone or t + 1 == len(tasks)):
            adapter.detach()
        til, tail, right = zip(*rows)
        empty = [None] * (len(tasks) - t - 1)
        result["R"].append([*map(mean, til)] + empty)
        if tail[0] is not None:
            result["R_tail"].append([*map(mean, tail)] + empty)
            result["task_id_accuracy"] = [*right]
        result["op_error"] = bootstrap(til)
        result["seconds"] += time.time() - start
        write(state, result)
    for file in folder.glob(f"{method}-*.pt") if RANK == 0 else ():
        if file.name not in files:  # what the next task went on from
            file.unlink()
    tails = summarize(result["R_tail"], zero_shot, result["before"]) if result["R_tail"] else {}
    return result | summarize(result["R"], zero_shot, result["before"]) | {
        "op_tail": tails.get("op"), "bwt_tail": tails.get("bwt")}


def write(file, value):
    """A JSON file, replaced whole or not at all; by one process."""
    if RANK == 0:
        temporary = file.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as out:
            json.dump(value, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)


def choose_device(args):
    """(device, dtype) as asked for, or the best that is here."""
    best = torch.accelerator.current_accelerator() or torch.device("cpu")
    device = best.type if args.device == "auto" else args.device
    if args.dtype != "auto":
        return device, getattr(torch, args.dtype)
    fast = device == "cuda" and torch.cuda.is_bf16_supported()
    return device, torch.bfloat16 if fast else torch.float32


def load_model(args):
    """The base and its tokenizer, with the ids that some of them lack."""
    device, dtype = choose_device(args)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, device_map=args.device_map or None)
    model = model if args.device_map else model.to(device)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{args.model}: its tokenizer has no EOS, so answers would never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # it is masked everywhere
    # A checkpoint's own settings may sample or punish repetition; scores are for greedy decoding.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.eval(), tokenizer


def peak_memory(device):
    """Bytes: of the GPU's memory, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def claim(args):
    """The folder of a run, locked for this process; ValueError if it is not free."""
    folder = Path("runs") / args.name
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a dead process holds no lock
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another run: choose another --name") from None
    if shutil.disk_usage(folder).free < 2**28:
        raise ValueError(f"{folder}: less than 256 MB are free there: make room before you train")
    if not args.resume:
        done = [file for file in folder.glob("*.json") if file.name != "args.json"]
        if done and not args.force:  # nothing is lost of a run that failed before its first task
            raise ValueError(f"{folder} exists: choose another --name, --resume {folder} to go on "
                             "with it, or --force to overwrite it")
        for file in folder.glob("*.json"):
            file.unlink()
        write(folder / "args.json", dataclasses.asdict(args) | {"force": False})
    return folder, lock


def session(args):
    """Every method with one seed, each with its own result file."""
    folder, lock = claim(args) if RANK == 0 else (Path("runs") / args.name, None)
    files = {method: folder / f"{method}.json" for method in args.methods.split(",")}
    files = {method: file for method, file in files.items() if not file.exists()}
    if not files:
        return folder
    model, tokenizer = load_model(args)
    tasks, cuda = load_tasks(args, tokenizer, model), model.device.type == "cuda"
    bar = progress(tasks, "zero-shot", leave=False)
    zero_shot = [mean(evaluate(model, tokenizer, None, task, args)[0]) for task in bar]
    for method, file in files.items():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        write(file, {
            "method": method, "args": dataclasses.asdict(args), "tasks": [t.name for t in tasks],
            "examples": {
                t.name: [len(t.train[:args.max_train or None]), len(t.test)] for t in tasks},
            "zero_shot": zero_shot,
            **run(method, model, tokenizer, tasks, args, folder, zero_shot),
            "peak_memory_bytes": peak_memory(model.device), "processes": WORLD,
            "device": torch.cuda.get_device_name() if cuda else
            f"{model.device.type}, {torch.get_num_threads()} threads",
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, datasets)}
            | {"python": platform.python_version()},
            "date": time.strftime("%Y-%m-%d"),
        })
        (folder / f"{method}.progress.json").unlink(missing_ok=True)
    return folder


def ask(args, tokens=128):
    """Answer one prompt: infer its task, or leave it to the base when it is far from all tasks."""
    file, prompt = args.ask
    model, tokenizer = load_model(args)
    adapter = MoSE.load(model, file)
    whole, _ = encode(tokenizer, {"prompt": prompt, "answer": ""})
    (name,), (sure,) = adapter.infer_task(torch.tensor([whole]), return_confidence=True)
    print(f"task: {name}, confidence {sure:.2f}")
    if sure < 0.5:
        print("far from every task that was learned, so the bare base answers")
    adapter.set_task(name if sure >= 0.5 else None)
    ids = torch.tensor([cut(whole, args.max_prompt, tokenizer.bos_token_id)], device=model.device)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens)
    print(f"answer: {tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)}")


def main(args):
    """One session for each seed; then figures, and the mean over seeds."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.ask:
        return ask(args)
    if WORLD > 1:
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
        cuda = choose_device(args)[0] == "cuda"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    seeds, folders = args.seeds.split(","), []
    for seed in seeds:
        name = args.name if len(seeds) == 1 else f"{args.name}-{seed}"
        folders.append(session(dataclasses.replace(args, seeds=seed, name=name)))
    if RANK == 0:
        subprocess.run([sys.executable, HERE / "results/report.py", *folders], check=True)


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"train_trace.py: error: {error}")
