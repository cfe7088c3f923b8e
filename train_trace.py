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

Scores are TRACE's own, decoded greedily (TRACE samples at temperature 0.1). On real TRACE data they
compare with papers that use its 0.5K split, order and metrics, for the same base model only. No
score on trace-mini compares with any paper's.
"""

import argparse
import collections
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import platform
import random
import re
import resource
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import datasets
import torch
import transformers
from torch.nn import functional as F
from tqdm import tqdm

from mose import MoSE, MoSEConfig

HERE = Path(__file__).resolve().parent
TASKS = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds",
         "20Minuten")
SCHEDULES = {"trace": (5, 3, 7, 5, 3, 5, 5, 7), "short": (2, 1, 3, 2, 1, 2, 2, 3)}  # of TASKS
METHODS = ("floor", "base", "lora", "task_lora", "moe_lora", "mose")


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
    top_k: int = option(0, "active experts for a token (0: all)")
    density: float = option(MoSEConfig.density, "of the free pool, what a task of mose may take")
    scale: float = option(MoSEConfig.scale, "of the experts' sum")
    router_stop: int = option(0, "freeze the router of moe_lora after so many tasks (0: never)")
    lora_rank: int = option(8, "rank of lora, task_lora and, in all, of moe_lora")
    lora_scale: float = option(4.0, "their scale, alpha / rank")
    device: str = option("auto", "where it runs", ("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "of the base", ("auto", "bfloat16", "float16", "float32"))
    checkpointing: bool = option(False, "recompute activations in backward, to save memory")
    ask: tuple = option((), "only answer a prompt with an adapter that --methods mose has saved")


def parse(argv=None):
    """Args from the command line. Exits with a message on a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for f in dataclasses.fields(Args):
        text, choices = f.metadata["help"], f.metadata["choices"]
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action="store_true", help=text)
        elif f.type is tuple:
            parser.add_argument(f"--{f.name}", nargs=2, default=(), help=text,
                                metavar=("FILE", "PROMPT"))
        else:
            shown = f" [{str(f.default).replace(f'{HERE}/', '')}]" if f.default != "" else ""
            parser.add_argument(f"--{f.name}", type=f.type, default=f.default, choices=choices,
                                metavar="|".join(choices or [f.name.upper()]), help=text + shown)
    args = Args(**vars(parser.parse_args(argv)))
    if not all(seed.isdigit() for seed in args.seeds.split(",")):
        parser.error(f"--seeds: got {args.seeds!r}, expected whole numbers: 0 or 0,1,2")
    unknown = [method for method in args.methods.split(",") if method not in METHODS]
    if unknown:
        parser.error(f"--methods: got {unknown}, expected of {', '.join(METHODS)}")
    for name in ("batch", "eval_batch", "max_prompt", "lora_rank"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: got {getattr(args, name)}, expected at least 1")
    return args


# ------------------------------------------------------------------------------ scores


def accuracy(prediction, gold, prompt):
    """Whole strings equal, nothing stripped, as TRACE does."""
    return 100.0 * (prediction == gold)


def first_letter(prediction, gold, prompt):
    """First characters equal; TRACE's own crashes on an empty prediction."""
    return 100.0 * (prediction[:1] == gold[:1])


def common_words(x, y):
    """The set of words on a longest common subsequence of two word lists; ties as in `rouge`."""
    length = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            best = max(length[i][j + 1], length[i + 1][j])
            length[i + 1][j + 1] = length[i][j] + 1 if a == b else best
    words, i, j = set(), len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            words.add(x[i])
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def rouge_l(prediction, gold, prompt):
    """ROUGE-L F of the package `rouge` 1.0.1, which counts distinct words, called as TRACE does:
    get_scores(target, prediction). '' and '.' score 0."""
    sides = [text.split(".") for text in (gold, prediction)]
    hyps, refs = [[" ".join(s.split()).split(" ") for s in side if s] for side in sides]
    common = set().union(*(common_words(r, h) for r in refs for h in hyps))
    if not common:
        return 0.0
    recall, precision = (len(common) / len(set().union(*side)) for side in (refs, hyps))
    return 100.0 * (2 * precision * recall / (precision + recall + 1e-8))


def edit_similarity(prediction, gold, prompt):
    """2 * longest common subsequence / both lengths, in whole percent: fuzzywuzzy's ratio with
    python-Levenshtein. Literals count as their values."""
    def literals(code):
        code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
        return re.sub(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", r"\1", code, flags=re.S)

    a, b = literals(prediction), literals(gold)
    if not a or not b:
        return 0.0
    places, full = collections.defaultdict(int), (1 << len(a)) - 1
    for i, char in enumerate(a):
        places[char] |= 1 << i
    row = full  # bit-parallel LCS: a 0 where a[:i + 1] has one more character in common than a[:i]
    for char in b:
        match = row & places[char]
        row = ((row + match) | (row - match)) & full
    return float(round(100 * 2 * (len(a) - row.bit_count()) / (len(a) + len(b))))


def words_13a(text):
    """Words as sacrebleu's 13a tokenizer cuts them, in lower case."""
    text = text.lower().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, char in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, char)
    text = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", text)
    text = re.sub(r"([\.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def sari(prediction, gold, prompt):
    """SARI for n = 1 .. 4 with the whole prompt as source; gold: one reference, or a list."""
    def f1(precision, recall):
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    golds = [gold] if isinstance(gold, str) else gold
    source, guess, *refs = map(words_13a, (prompt, prediction, *golds))
    total = 0.0
    for n in range(1, 5):
        old, out, *wanted = (
            collections.Counter(zip(*(words[i:] for i in range(n))))
            for words in (source, guess, *refs))
        want = sum(wanted, collections.Counter())
        old, out = ({gram: count * len(refs) for gram, count in x.items()} for x in (old, out))
        old, out = collections.Counter(old), collections.Counter(out)
        kept, keep = old & out, old & want
        good = kept & keep
        keep_p = sum(good[g] / kept[g] for g in kept) / len(kept) if kept else 1.0
        keep_r = sum(good.values()) / sum(keep.values()) if keep else 1.0
        gone = old - out
        drop_p = sum((gone - want)[g] / gone[g] for g in gone) / len(gone) if gone else 1.0
        new, add = set(out) - set(old), set(want) - set(old)
        add_p, add_r = (len(new & add) / len(side) if side else 1.0 for side in (new, add))
        total += (f1(keep_p, keep_r) + drop_p + f1(add_p, add_r)) / 12
    return 100.0 * total


SCORES = {f.__name__: f for f in (accuracy, first_letter, rouge_l, edit_similarity, sari)}
METRICS = dict(zip(TASKS, ("accuracy", "accuracy", "rouge_l", "edit_similarity", "first_letter",
                           "accuracy", "accuracy", "sari")))


def score(task, predictions, golds, prompts, metric=None):
    """The mean score of a task's predictions by TRACE's metric, or the named one: 0 .. 100."""
    values = [*map(SCORES[metric or METRICS[task]], predictions, golds, prompts)]
    return mean(values)


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


def pad(rows, value, left=False):
    """Lists of ids as one (B, T) tensor, and its attention mask."""
    length = max(map(len, rows))
    gaps = [[value] * (length - len(row)) for row in rows]
    ids = torch.tensor([g + r if left else r + g for r, g in zip(rows, gaps)])
    mask = torch.tensor([[0] * len(g) + [1] * len(r) if left else [1] * len(r) + [0] * len(g)
                         for r, g in zip(rows, gaps)])
    return ids, mask


def batches(lengths, size, epochs, rng):
    """Indices of every random batch, by length inside: cut into micro-batches, it pads little."""
    for _ in range(epochs):
        order = rng.sample(range(len(lengths)), len(lengths))
        for start in range(0, len(order), size):
            yield sorted(order[start:start + size], key=lambda i: lengths[i])


# ------------------------------------------------------------------------------ train and test


def train(model, tokenizer, parameters, task, args, title):
    """One task, with an optimizer of its own: old momentum would move what a new task starts from.

    Returns the share of padding. Raises ValueError when the loss is not finite.
    """
    rng, device = random.Random(f"{args.seeds} {task.name}"), model.device
    bos, parts = tokenizer.bos_token_id, []
    for prompt, answer in task.train[:args.max_train or None]:
        prompt = cut(prompt, task.limit, bos)
        parts.append((prompt + answer, [-100] * len(prompt) + answer))
    plan = [*batches([len(ids) for ids, _ in parts], args.batch, task.epochs, rng)]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    seen, padded, head = 0, 0, model.get_output_embeddings()
    model.train()
    bar = tqdm(plan, desc=title, unit="step", ncols=100)
    for step, batch in enumerate(bar):
        warm = min(1.0, (step + 1) / max(1, 0.05 * len(plan)))
        cosine = 0.5 * (1 + math.cos(math.pi * step / len(plan)))
        optimizer.param_groups[0]["lr"] = args.lr * warm * (
            cosine if args.schedule == "cosine" else 1.0)
        count = sum(len(task.train[i][1]) for i in batch)  # label tokens, of all micro-batches
        total, size = 0.0, args.micro_batch or len(batch)
        for start in range(0, len(batch), size):
            rows = [parts[i] for i in batch[start:start + size]]
            ids, mask = pad([ids for ids, _ in rows], tokenizer.pad_token_id)
            labels, _ = pad([labels for _, labels in rows], -100)
            labels = labels[:, 1:].to(device)
            wanted = labels != -100
            # Logits of prompts are most of what a step holds in memory, and no loss reads them.
            with head.register_forward_pre_hook(lambda _, x: x[0][:, :-1][wanted]):
                logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            loss = F.cross_entropy(logits.float(), labels[wanted], reduction="sum") / count
            loss.backward()
            total += loss.item()
            seen, padded = seen + mask.numel(), padded + int((mask == 0).sum())
        if not math.isfinite(total):
            raise ValueError(f"{task.name}: the loss is {total} at step {step}: lower --lr; "
                             "earlier tasks are safe, each was saved when it ended")
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
    model.eval()
    return padded / max(1, seen)


@torch.no_grad()
def generate(model, tokenizer, task, rows, batch, before=None):
    """Greedy answers {row: text} to test prompts, from the prompts alone; before(batch) first."""
    prompts = {i: cut(task.test[i][0], task.limit, tokenizer.bos_token_id) for i in rows}
    order, texts = sorted(rows, key=lambda i: len(prompts[i])), {}
    for start in range(0, len(order), batch):
        some = order[start:start + batch]
        if before:
            before(some)
        ids, mask = pad([prompts[i] for i in some], tokenizer.pad_token_id, left=True)
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                             max_new_tokens=task.max_new)
        new = tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)
        texts |= dict(zip(some, new))
    return texts


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
    if not adapter or not adapter.config.isolate:
        return til, None, None
    names = []
    for ids, mask in whole_prompts(task.test, tokenizer):
        names += adapter.infer_task(ids, mask)
    wrong = [i for i in rows if names[i] != task.name]  # for the others the text is the same

    def choose(some):
        adapter.set_task([names[i] for i in some])

    texts |= generate(model, tokenizer, task, wrong, args.eval_batch, choose)
    return til, scores(texts), 100.0 * (1 - len(wrong) / len(names))


# ------------------------------------------------------------------------------ the loop


def attach(model, method, args):
    """The adapter of a method. One LoRA is one expert without protection; moe_lora has as many
    parameters, and at equal gates the same scale, in several experts."""
    targets, experts = tuple(args.targets.split(",")), args.experts
    if method == "mose":
        return MoSE(model, MoSEConfig(targets, experts, args.rank, args.top_k or None, args.density,
                                      args.scale))
    experts, width = (experts, MoSEConfig.router_dim) if method == "moe_lora" else (1, 1)
    rank = max(1, args.lora_rank // experts)
    return MoSE(model, MoSEConfig(targets, experts, rank, router_dim=width, key_dim=1,
                                  scale=experts * args.lora_scale, isolate=False))


def run(method, model, tokenizer, tasks, args, folder, zero_shot):
    """Learn all tasks with one method; returns its results.

    R[t][i] is the score of task i after task t, for i > t None; R_tail the same with the task
    inferred from the prompt.
    """
    result = {"R": [], "R_tail": [], "task_id_accuracy": [], "used": [], "bytes": [], "padding": []}
    adapter, files, before, parameters = None, [], [*zero_shot], []
    for t, task in enumerate(tasks):
        torch.manual_seed(1000 * int(args.seeds) + t)
        if adapter is None and method not in ("floor", "base"):
            adapter = attach(model, method, args)
        if adapter:
            if t and method in ("lora", "moe_lora"):  # the others start each task as the bare base
                before[t] = mean(evaluate(model, tokenizer, adapter, task, args)[0])
            adapter.begin_task(task.name)
            if adapter.config.isolate:
                for ids, mask in whole_prompts(task.train, tokenizer):
                    adapter.observe(ids, mask)
            parameters = adapter.trainable_parameters()
            title = f"{method} {t + 1}/{len(tasks)} {task.name}"
            result["padding"].append(train(model, tokenizer, parameters, task, args, title))
            result["used"].append(adapter.end_task()["share"])
            if method == "moe_lora" and t + 1 == args.router_stop:
                adapter.freeze_router()
            files = files[:t if method == "task_lora" else 0]
            files.append(folder / f"{method}{f'-{task.name}' if method == 'task_lora' else ''}.pt")
            adapter.save(files[-1])
            result["bytes"].append(sum(file.stat().st_size for file in files))
        rows = []
        for i, seen in enumerate(tqdm(tasks[:t + 1], "test", leave=False, ncols=100)):
            if method == "task_lora":
                adapter.detach()
                adapter = MoSE.load(model, files[i])
            rows.append((floor(seen), None, None) if method == "floor" else
                        evaluate(model, tokenizer, adapter, seen, args))
        til, tail, right = zip(*rows)
        empty = [None] * (len(tasks) - t - 1)
        result["R"].append([*map(mean, til)] + empty)
        if method == "mose":
            result["R_tail"].append([*map(mean, tail)] + empty)
            result["task_id_accuracy"] = [*right]
        if method == "task_lora":
            adapter.detach()
            adapter = None
    if adapter:
        adapter.detach()
    result |= summarize(result["R"], zero_shot, before)
    tails = summarize(result["R_tail"], zero_shot, before) if result["R_tail"] else {}
    return result | {
        "op_error": bootstrap(til), "op_tail": tails.get("op"), "bwt_tail": tails.get("bwt"),
        "before": before, "parameters": sum(p.numel() for p in parameters),
        "epochs": [task.epochs for task in tasks] if parameters else []}


def choose_device(args):
    """(device, dtype) as asked for, or the best that is here."""
    device = args.device
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if args.dtype != "auto":
        return device, getattr(torch, args.dtype)
    fast = device == "cuda" and torch.cuda.is_bf16_supported()
    return device, torch.bfloat16 if fast else torch.float32


def load_model(args):
    """The base and its tokenizer, with the ids that some of them lack."""
    device, dtype = choose_device(args)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
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


def table(results):
    """The comparison as text, one method a line, scores 0-100."""
    lines = [f"{'':10} {'OP':>5} {'±':>4} {'learned':>8} {'BWT':>6} {'FWT':>6} {'OP TaIL':>8} "
             f"{'task id':>8} {'parameters':>11} {'bytes':>10} {'seconds':>8}",
             f"{'zero-shot':10} {mean(results[0]['zero_shot']):5.1f}"]
    for r in results:
        tail = " " * 17
        if r["R_tail"]:
            tail = f"{r['op_tail']:8.1f} {mean(r['task_id_accuracy']):7.1f}%"
        lines.append(f"{r['method']:10} {r['op']:5.1f} {r['op_error']:4.1f} {r['learned']:8.1f} "
                     f"{r['bwt']:6.1f} {r['fwt']:6.1f} {tail} {r['parameters']:11,} "
                     f"{(r['bytes'] or [0])[-1]:10,} {r['seconds']:8.0f}")
    padding = [share for r in results for share in r["padding"]]
    return "\n".join([*lines, f"padding: {mean(padding):.1%} of the training tokens"])


def session(args):
    """Every method with one seed, each with its own result file; then one table."""
    folder, methods = Path("runs") / args.name, args.methods.split(",")
    files = {method: folder / f"{method}.json" for method in methods}
    there = [str(file) for file in files.values() if file.exists()]
    if there and not args.force:
        raise ValueError(f"{there[0]} exists: choose another --name, or --force to overwrite it")
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(args)
    tasks, results = load_tasks(args, tokenizer, model), []
    bar = tqdm(tasks, "zero-shot", leave=False, ncols=100)
    zero_shot = [mean(evaluate(model, tokenizer, None, task, args)[0]) for task in bar]
    cuda = model.device.type == "cuda"
    for method in methods:
        start = time.time()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        result = {
            "method": method, "args": dataclasses.asdict(args), "tasks": [t.name for t in tasks],
            "examples": {
                t.name: [len(t.train[:args.max_train or None]), len(t.test)] for t in tasks},
            "zero_shot": zero_shot,
            **run(method, model, tokenizer, tasks, args, folder, zero_shot),
            "seconds": time.time() - start, "peak_memory_bytes": peak_memory(model.device),
            "device": torch.cuda.get_device_name() if cuda else
            f"{model.device.type}, {torch.get_num_threads()} threads",
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, datasets)}
            | {"python": platform.python_version()},
            "date": datetime.date.today().isoformat(),
        }
        results.append(result)
        temporary = files[method].with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, files[method])
    print(table(results))
    print(f"results: {folder}/")
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
    seeds, folders = args.seeds.split(","), []
    for seed in seeds:
        name = args.name if len(seeds) == 1 else f"{args.name}-{seed}"
        folders.append(session(dataclasses.replace(args, seeds=seed, name=name)))
    if importlib.util.find_spec("matplotlib"):
        subprocess.run([sys.executable, HERE / "results/report.py", *folders], check=True)


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"train_trace.py: error: {error}")
