"""The continual loop of TRACE: learn eight tasks in a row, and test every seen task after each one.

    python train_trace.py                   # two CPU cores: tiny-llm on trace-mini, in 4 minutes
    python train_trace.py --preset gpu      # one GPU: SmolLM2-135M on TRACE-0.5K, TRACE's epochs
    python train_trace.py --ask runs/default/mose.pt "Dovish (A), hawkish (B) or neutral (C)? .."

The first is synthetic and offline: a real causal LM of 1M parameters and eight generated stand-ins
for the TRACE tasks, in their format, names, order and metrics. It shows the method, not TRACE.

Methods, all through the same loop and data, in the same order (replay takes some more steps):

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
# dependencies = ["torch>=2.13", "transformers>=4.56", "datasets>=3.0", "tqdm>=4.66.3"]
# ///

import dataclasses
import itertools
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path

import datasets
import torch
import transformers
from torch.nn import functional as F
from tqdm import tqdm

from mose import MoSE, MoSEConfig
from tracebench import processes
from tracebench.data import SCHEDULES, batches, cut, encode, load_task, pad, passes
from tracebench.runs import Record, Tested, claim, peak_memory
from tracebench.scores import METRICS, SCORES, TASKS, floor, mean

HERE = Path(__file__).resolve().parent
METHODS = ("floor", "base", "lora", "replay", "joint", "task_lora", "moe_lora", "mose",
           "mose_fixed")
# The data is a public copy of TRACE-0.5K, which belongs to zjwang21, and is not ours.
PRESETS = {"": {}, "gpu": {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "epochs": "trace", "test": "ends",
    "lora_lr": 3e-3, "tokens": 16384, "dtype": "bfloat16",
    "data": "https://raw.githubusercontent.com/zjwang21/TRACE/"
    "cb1bfea893e6181801b1e663ec659316533c1e21/TRACE-Benchmark/LLM-CL-Benchmark_500"}}


def option(default, text, choices=None):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclasses.dataclass
class Args:
    """The command line: every field is an option, and stands in the result file."""

    preset: str = option("", "gpu: other defaults, for TRACE-0.5K on a GPU", tuple(PRESETS))
    model: str = option(str(HERE / "assets/tiny-llm"), "hub id or folder of a causal LM")
    data: str = option(str(HERE / "assets/trace-mini"), "folder or URL with TASK/{train,test}.json")
    tasks: str = option(",".join(TASKS), "the tasks, in the order of learning")
    metric: str = option("", "of further tasks, as TASK=METRIC,..: " + ", ".join(SCORES))
    methods: str = option("lora,replay,task_lora,mose", "of " + ", ".join(METHODS))
    name: str = option("default", "results go to runs/NAME")
    force: bool = option(False, "overwrite the results of an earlier run of that name")
    seeds: str = option("0", "of start and data order; 0,1,2 makes the runs NAME-0 to NAME-2")
    epochs: str = option("4", "a number, one for each task (5,3,..), or: trace, short")
    lr: float = option(1e-2, "learning rate")
    lora_lr: float = option(0.0, "learning rate of all methods but mose and mose_fixed (0: lr)")
    schedule: str = option("cosine", "of the learning rate", ("cosine", "constant"))
    batch: int = option(16, "examples for one step")
    tokens: int = option(1536, "tokens of one pass, with padding; a probe has 4 times, answers 8")
    max_prompt: int = option(1024, "the last tokens of a prompt, which the model reads")
    max_train: int = option(0, "train on so many examples a task (0: all); keys see all prompts")
    max_test: int = option(0, "score so many examples a task (0: all)")
    test: str = option("all", "ends: each task when it is learned, and all at the end; all: every "
                       "seen task after each task", ("all", "ends"))
    split: str = option("test", "what is scored; choose settings by eval", ("test", "eval"))
    targets: str = option("q_proj,v_proj", "linear layers that get experts")
    experts: int = option(MoSEConfig.num_experts, "experts of mose and moe_lora")
    rank: int = option(MoSEConfig.rank, "rank of each expert of mose")
    top_k: int = option(MoSEConfig.top_k, "experts that a token is sent to")
    router_std: float = option(MoSEConfig.router_std, "spread of new routers")
    density: float = option(MoSEConfig.density, "share of the free entries that a task takes")
    scale: float = option(MoSEConfig.scale, "factor of the experts' sum")
    router_stop: int = option(0, "freeze the router of moe_lora after so many tasks (0: never)")
    lora_rank: int = option(8, "rank of a LoRA and, in all, of moe_lora")
    lora_scale: float = option(4.0, "their scale, alpha / rank")
    replay: float = option(0.05, "share of each earlier task's examples, mixed into a task")
    resume: str = option("", "go on with an interrupted run: its folder, and no other option")
    device: str = option("auto", "where it runs", ("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "of the base", ("auto", "bfloat16", "float16", "float32"))
    device_map: str = option("", "auto spreads a large base over several GPUs (needs accelerate)")
    checkpointing: bool = option(False, "recompute activations in backward, to save memory")
    ask: list[str] = dataclasses.field(default_factory=list, metadata={
        "metavar": ("FILE", "PROMPT"), "help": "only answer a prompt, with an adapter of mose"})


def listed(text):
    """The parts of "a, b,c", without spaces around them."""
    return [part.strip() for part in text.split(",")]


def parse(argv=None):
    """Args from the command line. Exits with a message on a wrong one."""
    parser = transformers.HfArgumentParser(Args, description=__doc__.split("\n")[0])
    # A preset is nothing but other defaults, so any other option goes before it.
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    args = Args(**vars(parser.parse_args(argv)))
    if args.resume:
        file = Path(args.resume) / "args.json"
        if args != Args(resume=args.resume):
            parser.error("--resume goes alone: the run goes on with the options that it began with")
        if not file.exists():
            parser.error(f"--resume: there is no {file}, so no run to go on with (each of several "
                         "seeds is a run of its own: NAME-0, NAME-1, ..)")
        began = json.loads(file.read_text())
        if began.keys() != vars(args).keys():
            parser.error(f"--resume: {file} is of another version of this script: start again")
        return Args(**began | {"resume": args.resume})
    seeds, methods = listed(args.seeds), listed(args.methods)
    if not all(seed.isdecimal() for seed in seeds) or len({*seeds}) < len(seeds):
        parser.error(f"--seeds: got {args.seeds!r}, expected whole numbers, each once: 0 or 0,1,2")
    if not {*methods} <= {*METHODS} or len({*methods}) < len(methods):
        parser.error(f"--methods: got {args.methods!r}, expected each once, of "
                     f"{', '.join(METHODS)}")
    lowest = {"batch": 1, "tokens": 1, "max_prompt": 2, "lora_rank": 1, "max_train": 0,
              "max_test": 0, "router_stop": 0}
    for name, least in lowest.items():
        if getattr(args, name) < least:
            parser.error(f"--{name}: got {getattr(args, name)}, expected at least {least}")
    if not 0 <= args.replay <= 1:
        parser.error(f"--replay: got {args.replay}, expected a share of 0 .. 1")
    if len(args.ask) not in (0, 2):
        parser.error(f"--ask: got {len(args.ask)} values, expected FILE and \"PROMPT\"")
    for name in ("model", "data"):  # --resume may be called from another folder
        if Path(getattr(args, name)).exists():
            setattr(args, name, str(Path(getattr(args, name)).resolve()))
    return args


def metrics_of(text):
    """{task: metric} of TRACE's tasks, and of those that --metric names."""
    pairs = (pair.rpartition("=") for pair in listed(text))
    return METRICS | {name.strip(): metric.strip() for name, _, metric in pairs}


def load_tasks(args, tokenizer, model):
    """All tasks of the run. Raises ValueError for what is wrong with the data or its options."""
    names, metrics = listed(args.tasks), metrics_of(args.metric)
    wrong = [name for name in names if metrics.get(name) not in SCORES]
    if wrong:
        raise ValueError(f"--tasks: {wrong} have no metric: expected of {', '.join(TASKS)}, or "
                         f"others with --metric TASK={'|'.join(SCORES)}")
    if len({*names}) < len(names):
        raise ValueError(f"--tasks {args.tasks}: expected each once")
    if args.epochs in SCHEDULES:
        epochs = [dict(zip(TASKS, SCHEDULES[args.epochs])).get(name) for name in names]
    else:
        epochs = [int(n) if n.isdigit() else None for n in listed(args.epochs)]
        epochs = epochs * len(names) if len(epochs) == 1 else epochs
    if len(epochs) != len(names) or None in epochs:
        raise ValueError(f"--epochs {args.epochs}: expected a number, {len(names)} numbers, or one "
                         f"of {', '.join(SCHEDULES)} with TRACE's own tasks")
    positions = getattr(model.config, "max_position_embeddings", math.inf)
    tasks = []
    for name, count in zip(names, epochs):
        task = load_task(
            args.data, name, metrics[name], tokenizer, epochs=count, split=args.split,
            max_prompt=args.max_prompt, positions=positions, max_train=args.max_train,
            max_test=args.max_test)
        longest = max(len(ids) for ids, _ in task.train)
        if longest > args.tokens:
            print(f"warning: {name}: its longest example has {longest} tokens, more than --tokens "
                  f"{args.tokens}, so it makes a pass of its own, which takes more memory")
        tasks.append(task)
    return tasks


# ------------------------------------------------------------------------------ train and test


def answer_logits(model, tokenizer, rows):
    """For each answer token of some examples: logits (n, V), labels (n,), its example (n,)."""
    ids, mask = pad([ids for ids, _ in rows], tokenizer.pad_token_id)
    labels = pad([labels for _, labels in rows], -100)[0][:, 1:].to(model.device)
    wanted, head = labels != -100, model.get_output_embeddings()

    def only_wanted(head, inputs):
        """Of the hidden states (B, T, D), those (n, D) which are followed by a label. The logits of
        all others would be most of what a step holds in memory, and no loss reads them. A hook, so
        that what some models do after their head (scale, soft-cap) stays as it is."""
        return inputs[0][:, :-1][wanted.to(inputs[0].device)]

    with head.register_forward_pre_hook(only_wanted):
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    return logits.float(), labels[wanted], wanted.nonzero()[:, 0]


@torch.no_grad()
def probe(model, tokenizer, task, args):
    """The share of a task's first examples that what is in force gets wrong, token for token. The
    loss would not do: most of it goes as soon as the form of an answer is known."""
    first, wrong = task.train[:64], torch.zeros((), device=model.device)
    for rows in processes.share(passes(first, 4 * args.tokens)):
        logits, labels, example = answer_logits(model, tokenizer, rows)
        wrong += example[logits.argmax(-1) != labels].unique().numel()
    processes.total(wrong)
    return wrong / len(first)


def train(model, tokenizer, parameters, task, args, lr, bar):
    """One task, with an optimizer of its own: old momentum would move what a new task starts from.

    Every process takes its share of each batch. Raises ValueError when the loss is not finite.
    """
    rng = random.Random(f"{args.seeds} {task.name}")
    plan = [*batches(task.train, args.batch, task.epochs, rng)]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for p in parameters:  # zeros for a process that has no part in a small batch
        p.grad = torch.zeros_like(p)
    name = {"constant": "constant_with_warmup"}.get(args.schedule, args.schedule)
    rate = transformers.get_scheduler(name, optimizer, math.ceil(0.05 * len(plan)), len(plan))
    model.train()
    for step, batch in enumerate(plan):
        count = sum(label != -100 for _, labels in batch for label in labels)
        loss = torch.zeros((), device=model.device)
        for rows in passes(processes.share(batch), args.tokens):
            logits, labels, _ = answer_logits(model, tokenizer, rows)
            part = F.cross_entropy(logits, labels, reduction="sum") / count
            part.backward()
            loss += part.detach()
        processes.total(loss, *(p.grad for p in parameters))
        if not loss.isfinite():
            raise ValueError(f"{task.name}: the loss is {loss} at step {step}: start again with a "
                             "lower --lr and another --name; adapters of earlier tasks are safe")
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        rate.step()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
    model.eval()


@torch.no_grad()
def generate(model, tokenizer, task, rows, args, before=None):
    """Greedy answers {row: text} to test prompts, from the prompts alone; before(batch) first."""
    prompts = {i: cut(task.test[i], task.limit, tokenizer.bos_token_id) for i in rows}
    texts = {}
    # A token in a cache takes far less memory than in a step, and larger passes decode faster.
    groups = passes(rows, 8 * args.tokens, lambda i: len(prompts[i]) + task.max_new)
    for some in processes.share(groups):
        if before:
            before(some)
        ids, mask = pad([prompts[i] for i in some], tokenizer.pad_token_id, "left")
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                             max_new_tokens=task.max_new)
        new = tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)
        texts |= dict(zip(some, new))
    return processes.union(texts)


def whole_prompts(prompts, tokenizer, size=32):
    """Whole prompts in batches, for the task keys."""
    for start in range(0, len(prompts), size):
        yield pad(prompts[start:start + size], tokenizer.pad_token_id)


def evaluate(model, tokenizer, adapter, task, args):
    """Tested: the task known, and for MoSEs also inferred from the prompt."""
    rows = range(len(task.test))

    def scores(texts):
        test, metric = task.texts[1], SCORES[task.metric]
        return [metric(texts[i], test[i]["answer"], test[i]["prompt"]) for i in rows]

    if adapter:  # one that does not know the task is tested with what it has learned last
        adapter.set_task(task.name if task.name in adapter.tasks else adapter.tasks[-1])
    texts = generate(model, tokenizer, task, rows, args)
    known, first = scores(texts), [texts[i] for i in rows[:2]]
    if not adapter or isinstance(adapter, SharedPool):
        return Tested(known, answers=first)
    names = []
    for ids, mask in whole_prompts(task.test, tokenizer):
        names += adapter.infer_task(ids, mask)
    wrong = [i for i in rows if names[i] != task.name]  # for the others the text is the same
    texts |= generate(model, tokenizer, task, wrong, args,
                      lambda some: adapter.set_task([names[i] for i in some]))
    return Tested(known, scores(texts), 100.0 * (1 - len(wrong) / len(names)), first)


# ------------------------------------------------------------------------------ the methods


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
        # 0 is left to learn under the last task, and all elsewhere: so it starts from the last one.
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


GOES_ON = ("lora", "replay", "moe_lora")  # the others start each task from the bare base
KINDS = {"mose": MoSE, "mose_fixed": FixedRouter}  # all other methods: SharedPool


def attach(model, method, args):
    """A new adapter. One LoRA is one expert that is never protected; moe_lora has several, with as
    many parameters in all."""
    targets = tuple(listed(args.targets))
    if method in KINDS:
        return KINDS[method](model, MoSEConfig(
            targets, num_experts=args.experts, rank=args.rank, top_k=args.top_k,
            density=args.density, scale=args.scale, router_std=args.router_std))
    whole = {"density": 1.0, "scale": args.lora_scale, "key_dim": 1}
    if method == "moe_lora":
        return SharedPool(model, MoSEConfig(
            targets, num_experts=args.experts, rank=max(1, args.lora_rank // args.experts),
            top_k=args.top_k, router_std=args.router_std, **whole))
    return SharedPool(model, MoSEConfig(
        targets, num_experts=1, rank=args.lora_rank, top_k=1, router_dim=1, **whole))


def lessons(method, tasks, args):
    """What a method learns, and what is tested then: a list of (Task or None, numbers of tasks)."""
    every = range(len(tasks))
    if method in ("floor", "base"):
        return [(None, every)]
    if method == "joint":  # each example as often as in its own task's epochs
        rows = [row for task in tasks for row in task.train * task.epochs]
        return [(dataclasses.replace(tasks[0], name="joint", train=rows, epochs=1), every)]
    plan, rng = [], random.Random(args.seeds)
    for t, task in enumerate(tasks):
        if method == "replay":
            earlier = [rng.sample(old.train, math.ceil(args.replay * len(old.train)))
                       for old in tasks[:t]]
            task = dataclasses.replace(task, train=sum(earlier, task.train))
        tests = every[:t + 1] if args.test == "all" else every[t:t + 1]
        if args.test == "all" and method in GOES_ON:
            tests = every[:t + 2]  # the next task too: its score before it is learned gives FWT
        plan.append((task, every if t == every[-1] else tests))
    return plan


# ------------------------------------------------------------------------------ the loop


def learn(adapter, model, tokenizer, task, args, bar):
    """One task from begin to end; what to note of it."""
    source = adapter.begin_task(task.name, lambda: probe(model, tokenizer, task, args))
    for ids, mask in whole_prompts(task.prompts, tokenizer):
        adapter.observe(ids, mask)
    parameters = adapter.trainable_parameters()
    lr = args.lora_lr if args.lora_lr and isinstance(adapter, SharedPool) else args.lr
    train(model, tokenizer, parameters, task, args, lr, bar)
    report = adapter.end_task()
    return {"source": source, "new": report["new"], "used": report["share"], "epochs": task.epochs,
            "parameters": sum(p.numel() for p in parameters),
            "tokens": task.epochs * sum(len(ids) for ids, _ in task.train)}


def open_record(method, tasks, args, folder):
    """What a method has done so far in a folder: nothing, or what is on disk."""
    return Record(folder, method, tasks, lessons(method, tasks, args), method == "task_lora")


def open_adapter(record, model, args):
    """The adapter as the last lesson left it, or a new one."""
    if not record.last():
        return attach(model, record.method, args)
    adapter = KINDS.get(record.method, SharedPool).load(model, record.last())
    adapter.router_stop = args.router_stop
    return adapter


def test(record, seen, model, tokenizer, tasks, args):
    """{number of a task: Tested}, each with the adapter that is on disk for it."""
    if record.method == "floor":
        return {i: Tested(floor(tasks[i].metric, *(rows.to_list() for rows in tasks[i].texts)))
                for i in seen}
    tested = {}
    for file, some in itertools.groupby(seen, record.file):  # one for all, but for task_lora
        kind = KINDS.get(record.method, SharedPool)
        adapter = kind.load(model, file) if file else None  # None: the bare base
        for i in some:
            tested[i] = evaluate(model, tokenizer, adapter, tasks[i], args)
        if adapter:
            adapter.detach()
    return tested


def run(record, model, tokenizer, tasks, args, bar):
    """Learn all tasks in a row with one method: learn one, save it, test those seen so far."""
    for t, (task, seen) in record.rest():  # all, or after a kill what is left
        torch.manual_seed(1000 * int(args.seeds) + t)
        title = f"{record.method} {t + 1}/{len(record.lessons)} {task.name if task else ''}"
        bar.set_description(title)
        if task:  # floor and base learn nothing
            adapter = open_adapter(record, model, args)
            notes = learn(adapter, model, tokenizer, task, args, bar)
            record.save(adapter, t, notes)
            adapter.detach()
        row = record.tested(test(record, seen, model, tokenizer, tasks, args))
        bar.write(f"{title:30} " + " ".join("     " if x is None else f"{x:5.1f}" for x in row))


# ------------------------------------------------------------------------------ the session


def choose_device(args):
    """(device, dtype) as asked for, or the best that is here."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
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


def session(todo, args):
    """Run what is left to do: a list of (method, its Args, its folder)."""
    model, tokenizer = load_model(args)
    tasks, cuda = load_tasks(args, tokenizer, model), model.device.type == "cuda"
    for method in {method for method, _, _ in todo}:  # wrong options are said before any trains
        attach(model, method, args).detach()
    zero_shot = None  # forward transfer alone needs it, and that only where all is tested
    if args.test == "all":
        zero_shot = [mean(evaluate(model, tokenizer, None, task, args).known) for task in tasks]
    records = [open_record(method, tasks, own, folder) for method, own, folder in todo]
    steps = sum(math.ceil(len(task.train) / args.batch) * task.epochs
                for record in records for _, (task, _) in record.rest() if task)
    # One bar for all that is left; without smoothing, its estimate knows the pauses for tests.
    bar = tqdm(total=steps, unit="step", ncols=100, smoothing=0, disable=processes.RANK > 0)
    for record, (method, own, _) in zip(records, todo):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        run(record, model, tokenizer, tasks, own, bar)
        record.finish({
            "method": method, "args": dataclasses.asdict(own), "tasks": [t.name for t in tasks],
            "examples": {t.name: [len(t.train), len(t.test)] for t in tasks},
            "asked": {t.name: t.texts[1].to_list()[:2] for t in tasks},
            "zero_shot": zero_shot, "peak_memory_bytes": peak_memory(model.device),
            "processes": processes.WORLD,
            "device": torch.cuda.get_device_name() if cuda else
            f"{model.device.type}, {torch.get_num_threads()} threads",
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, datasets)}
            | {"python": platform.python_version()},
            "date": time.strftime("%Y-%m-%d"),
        }, zero_shot)
    bar.close()


def ask(args, tokens=128):
    """Answer one prompt: infer its task, or leave it to the base when it is far from all tasks."""
    file, prompt = args.ask
    model, tokenizer = load_model(args)
    try:
        adapter = MoSE.load(model, file)
    except ValueError as error:
        raise ValueError(f"{error}; was it trained on --model {args.model}?") from error
    whole, _ = encode(tokenizer, {"prompt": prompt, "answer": ""})
    (name,), (sure,) = adapter.infer_task(torch.tensor([whole]), return_confidence=True)
    print(f"task: {name}, confidence {sure:.2f}")
    if sure < 0.5:
        print("far from every task that was learned, so the bare base answers")
    adapter.set_task(name if sure >= 0.5 else None)
    room = getattr(model.config, "max_position_embeddings", math.inf) - tokens
    prompt = cut(whole, min(args.max_prompt, room), tokenizer.bos_token_id)
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens)
    print(f"answer: {tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)}")


def main(args):
    """Every method with every seed, each with its own result file; then tables and figures."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.ask:
        return ask(args)
    processes.start(choose_device(args)[0])
    seeds, locks, runs = listed(args.seeds), [], {}
    for seed in seeds:
        name = args.name if len(seeds) == 1 else f"{args.name}-{seed}"
        runs[Path(args.resume or f"runs/{name}")] = dataclasses.replace(
            args, seeds=seed, name=name, force=False, resume="")
    if processes.RANK == 0:
        locks = [claim(folder, dataclasses.asdict(own), bool(args.resume), args.force)
                 for folder, own in runs.items()]
    processes.wait()
    todo = [(method, own, folder) for folder, own in runs.items() for method in
            listed(args.methods) if not (folder / f"{method}.json").exists()]
    if todo:
        session(todo, args)
    if processes.RANK == 0:
        report = [sys.executable, "-m", "figures.report", *map(str, runs)]
        if subprocess.run(report, env={**os.environ, "PYTHONPATH": str(HERE)}).returncode:
            print(f"the results are safe; for their tables, in {HERE}: {' '.join(report)}")
    for lock in locks:
        lock.close()


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"train_trace.py: error: {error}")
