"""TRACE's tasks, from its files to token ids: reading, encoding, sampling, batches.

Usable on its own: a task lies in FOLDER/TASK/{train,eval,test}.json, each a list of
{"prompt": text, "answer": text}; FOLDER may be a URL.
"""

import collections
import dataclasses
import hashlib
import http.client
import json
import math
import random
import urllib.parse
import urllib.request

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence

from tracebench.scores import METRICS, SCORES, TASKS

SCHEDULES = {"trace": (5, 3, 7, 5, 3, 5, 5, 7), "short": (2, 1, 3, 2, 1, 2, 2, 3)}  # epochs
PROBE_EXAMPLES = 64  # of a new task, on which finished tasks are tried


# ------------------------------------------------------------------------------ reading


def fetch(base, task, split):
    """(address, bytes) of the file of a task's split."""
    url = base.startswith(("http://", "https://"))
    where = f"{base.rstrip('/')}/{urllib.parse.quote(task) if url else task}/{split}.json"
    try:
        with urllib.request.urlopen(where, timeout=60) if url else open(where, "rb") as file:
            return where, file.read()
    except (OSError, http.client.HTTPException, ValueError) as error:  # (a URL that is none)
        advice = "expected a file of this name for each of --tasks"
        if split == "eval":
            advice += ", since --split eval asks for it"
        if url:
            advice += ("; if the address can't be reached, download the data and give its folder as "
                       "--data")
        raise ValueError(f"{where}: can't be read ({error}): {advice}") from error


def rows_of(where, content):
    """The content of a file as a Dataset. Raises ValueError with the file and the row."""
    form = 'a list of {"prompt": text, "answer": text}'
    try:
        rows = json.loads(content.decode("utf-8-sig"))  # editors of Windows begin a file with a mark
    except ValueError as error:
        raise ValueError(f"{where}: can't be read as JSON ({error}): expected {form}. (A file with a "
                         "row of JSON in each line needs commas between them, and [ ] around all)"
                         ) from error
    if not isinstance(rows, list):
        raise ValueError(f"{where}: got {type(rows).__name__} {str(rows)[:60]!r}, expected {form}")
    if not rows:
        raise ValueError(f"{where}: got an empty list, expected {form}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: row {i} is {str(row)[:60]!r}, expected {form}")
        for key in ("prompt", "answer"):
            text = row.get(key)
            if not isinstance(text, str) or not text:
                got = repr(text)[:60] if key in row else "missing"
                raise ValueError(f"{where}: row {i}: its {key!r} is {got}, expected a text that is "
                                 f"not empty, in {form}")
            # JSON can spell one half of a character that needs two ("\ud83d"). It stands for
            # nothing.
            if any("\ud800" <= char <= "\udfff" for char in text):
                raise ValueError(f"{where}: row {i} has a lone surrogate in its {key!r}, which is "
                                 f"no character: {ascii(text)[:60]}")
    # Of further columns nothing is read: Arrow refuses one whose values are of several types.
    return datasets.Dataset.from_list([{k: row[k] for k in ("prompt", "answer")} for row in rows])


def read(base, task, split):
    """A task's split as a Dataset."""
    return rows_of(*fetch(base, task, split))


def sample(rows, count, what):
    """A random sample of `count` rows in their order, always the same one; all rows for 0.

    The first rows would not do: a file that is sorted by answer begins with one answer only. The
    sample does not depend on the seed of a run, so that all methods and seeds are compared on it.
    what: words such as "FOMC, --max_train". They stand in a warning, and are the seed, so with other
    words all samples would change.
    """
    if count > len(rows):
        print(f"warning: {what}: {count} were asked for, but there are {len(rows)}: all are taken")
    if count == 0 or count >= len(rows):
        return [*rows]
    chosen = random.Random(what).sample(range(len(rows)), count)
    return [rows[i] for i in sorted(chosen)]


# ------------------------------------------------------------------------------ token ids


def encode(tokenizer, row):
    """(ids of the prompt with BOS, ids of the answer with EOS).

    Each is tokenised on its own: joined, "Stance:" and "C" may merge into tokens that the prompt
    alone does not end with. If the tokenizer has a BOS, it is added even where the tokenizer itself
    would add none: many models read the first token badly, and it should not be one of the prompt.
    It is not added to a prompt that begins with it, as those of some chat templates do.
    """
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    # A prompt may hold special tokens, as those of a chat template. In an answer, "</s>" is only text:
    # as a token it would end the answer.
    answer = tokenizer(row["answer"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if prompt[:1] == bos:
        bos = []
    return bos + prompt, answer + [tokenizer.eos_token_id]


def to_text(tokenizer, ids):
    """The text of an answer. Nothing is cleaned up: a space before a full stop is part of it."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut(prompt, limit, bos):
    """The BOS, if there is one, and the last tokens of a prompt, `limit` in all."""
    keep = int(prompt[:1] == [bos])
    if len(prompt) <= limit:
        return prompt
    first_kept = len(prompt) - (limit - keep)
    return prompt[:keep] + prompt[first_kept:]


@dataclasses.dataclass
class Task:
    """One task: its examples as ids and as texts, and how it is learned and scored."""

    name: str
    metric: str
    epochs: int
    train: list  # examples (ids, labels): labels are -100 on the prompt
    # The ids of all training prompts are not cut: a key is made of them, and the beginning of a
    # prompt says most about its task.
    train_prompt_ids: list
    test_prompt_ids: list  # ids of the test prompts, not cut either
    golds: list  # texts of the right answers to test_prompt_ids, as the tokenizer can write them
    limit: int  # tokens of a prompt that the model reads, its last ones
    longest: int  # tokens of the longest answer in train.json
    max_new: int  # tokens that a tested answer may have
    train_texts: list  # all rows {"prompt", "answer"} of train.json
    test_texts: list  # those of the test examples
    digests: dict  # {split: SHA-256 of its file}

    def probe_examples(self):
        """Some examples of train, on which finished tasks are tried before this one is learned."""
        return sample(self.train, min(PROBE_EXAMPLES, len(self.train)), f"{self.name}, probe")

    def error_of_a_constant(self):
        """The share of the probe's examples that the best constant answer gets wrong."""
        answers = [tuple(label for label in labels if label != -100)
                   for _, labels in self.probe_examples()]
        (_, most), = collections.Counter(answers).most_common(1)
        return 1 - most / len(answers)


def load_task(base, name, metric, tokenizer, *, epochs=1, split="test", max_prompt=1024,
              positions=math.inf, max_train=0, max_test=0):
    """One task. positions: how many tokens the model can read, with what it writes. Raises
    ValueError for what can't be learned."""
    files = {part: fetch(base, name, part) for part in ("train", split)}
    train = rows_of(*files["train"]).to_list()
    test = sample(rows_of(*files[split]).to_list(), max_test, f"{name}, --max_test")
    known = {row["prompt"] for row in train}
    shared = sum(row["prompt"] in known for row in test)
    if shared:
        print(f"warning: {name}: {shared} of {len(test)} test prompts stand in train too")
    encoded = [encode(tokenizer, row) for row in train]
    lengths = [len(answer) for _, answer in encoded]
    longest = max(lengths)
    limit = min(max_prompt, positions - longest)
    if limit < 2:
        raise ValueError(f"{name}: row {lengths.index(longest)} of train has an answer of {longest} "
                         f"tokens, which leaves no room for its prompt in the {positions} positions "
                         "of the model: shorten that answer, or remove the row")
    examples = []
    chosen = sample(encoded, max_train, f"{name}, --max_train")
    for prompt, answer in chosen:
        prompt = cut(prompt, limit, tokenizer.bos_token_id)
        examples.append((prompt + answer, [-100] * len(prompt) + answer))
    # first_letter reads one character, which has 4 bytes at the most, so no more tokens.
    max_new = min(longest, 4) if metric == "first_letter" else longest
    encoded_test = [encode(tokenizer, row) for row in test]
    too_long = sum(len(answer) > longest for _, answer in encoded_test)
    if too_long and metric != "first_letter":
        print(f"warning: {name}: {too_long} of {len(test)} test answers are longer than the longest "
              f"answer in train ({longest} tokens), where generating stops")
    prompts = [prompt for prompt, _ in [*chosen, *encoded_test]]
    num_cut = sum(len(prompt) > limit for prompt in prompts)
    if num_cut:
        why = "--max_prompt"
        if limit < max_prompt:
            why = (f"the model has {positions} positions, and the longest answer in train, row "
                   f"{lengths.index(longest)}, takes {longest} of them")
        print(f"{name}: {num_cut} of {len(prompts)} prompts have more than {limit} tokens, of which the "
              f"model reads the last ones ({why})")
    return Task(
        name=name, metric=metric, epochs=epochs, train=examples,
        train_prompt_ids=[prompt for prompt, _ in encoded],
        test_prompt_ids=[prompt for prompt, _ in encoded_test],
        golds=writable_golds(tokenizer, name, test, [answer for _, answer in encoded_test]),
        limit=limit, longest=longest, max_new=max_new,
        train_texts=train, test_texts=test,
        digests={part: hashlib.sha256(content).hexdigest()
                 for part, (_, content) in files.items()})


def writable_golds(tokenizer, name, test, answers):
    """The right answers as they come back from the tokenizer. answers: their ids.

    Some tokenizers normalise text (NFC, say). A model that says exactly the right tokens can't
    score 100 against a text that no tokens give.
    """
    golds = [to_text(tokenizer, ids) for ids in answers]
    if "" in golds:
        raise ValueError(f"{name}: the answer {test[golds.index('')]['answer']!r} of a test example "
                         "comes back from the tokenizer as an empty text: change or remove it")
    changed = sum(gold != row["answer"] for gold, row in zip(golds, test))
    if changed:
        print(f"warning: {name}: {changed} of {len(test)} right answers come back from the "
              "tokenizer as another text: predictions are compared with that")
    return golds


def listed(text):
    """The parts of "a, b,c", without spaces around them."""
    return [part.strip() for part in text.split(",")]


def metrics_of(text, names):
    """{task: metric} of the tasks of these names.

    text: --metric. Raises ValueError if it does not say the metric of each task that is not TRACE's,
    and of no others, or if a task stands twice in names.
    """
    if len({*names}) < len(names):
        raise ValueError(f"--tasks {','.join(names)}: expected each once")
    own = [name for name in names if name not in METRICS]
    given = {}
    for pair in listed(text) if text else []:
        name, _, metric = (part.strip() for part in pair.rpartition("="))
        if name not in own or name in given:
            raise ValueError(f"--metric: got {pair!r}, expected TASK=METRIC, once for each of --tasks "
                             f"that is not TRACE's: {', '.join(own) or 'there is none'}")
        if metric not in SCORES:
            raise ValueError(f"--metric: got {pair!r}, expected one of {', '.join(SCORES)}")
        given[name] = metric
    missing = [name for name in own if name not in given]
    if missing:
        raise ValueError(f"--tasks: TRACE has no {', '.join(map(repr, missing))}, only "
                         f"{', '.join(TASKS)}. Correct the name, or give its metric, --metric "
                         f"TASK=METRIC with one of {', '.join(SCORES)}")
    return {name: given.get(name) or METRICS[name] for name in names}


def epochs_of(text, names):
    """The number of epochs of each task. Raises ValueError if the text does not say it."""
    if text in SCHEDULES:
        epochs = [dict(zip(TASKS, SCHEDULES[text])).get(name, 0) for name in names]
    else:
        epochs = [int(part) if part.isdecimal() else 0 for part in listed(text)]
        epochs = epochs * len(names) if len(epochs) == 1 else epochs
    if len(epochs) != len(names) or 0 in epochs:
        raise ValueError(f"--epochs {text}: expected a number from 1 on, or one for each of "
                         f"{', '.join(names)}, or, if all of these are TRACE's, one of "
                         f"{', '.join(SCHEDULES)}")
    return epochs


def positions_of(model):
    """How many tokens a model can read and write together; infinite if it does not say."""
    # (A model of text and images has these numbers in a part of its config.)
    return getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)


def load_tasks(args, tokenizer, model):
    """All tasks of a run. Raises ValueError for what is wrong with the data or its options."""
    names = listed(args.tasks)
    metrics = metrics_of(args.metric, names)
    positions = positions_of(model)
    tasks = []
    for name, epochs in zip(names, epochs_of(args.epochs, names)):
        task = load_task(
            args.data, name, metrics[name], tokenizer, epochs=epochs, split=args.split,
            max_prompt=args.max_prompt, positions=positions, max_train=args.max_train,
            max_test=args.max_test)
        longest_example = max(len(ids) for ids, _ in task.train)
        if longest_example > args.tokens:
            print(f"warning: {name}: its longest example has {longest_example} tokens, more than --tokens "
                  f"{args.tokens}, so it makes a pass of its own, which takes more memory")
        tasks.append(task)
    return tasks


# ------------------------------------------------------------------------------ batches


def pad(rows, value, side="right"):
    """Lists of ids as one (B, T) tensor, and its attention mask."""
    rows = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, True, value, side), pad_sequence(ones, True, 0, side)


def batches(rows, size, epochs, rng):
    """Random batches: every epoch takes each row once."""
    for _ in range(epochs):
        order = rng.sample(rows, len(rows))
        for start in range(0, len(order), size):
            yield order[start:start + size]


def passes(rows, tokens, length=lambda row: len(row[0])):
    """Rows in groups for one pass each: by length, and with padding at most `tokens` tokens, so
    that memory has a bound. A row that is longer alone goes alone."""
    group = []
    for row in sorted(rows, key=length):
        if group and (len(group) + 1) * length(row) > tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def padded_batches(prompts, tokenizer, size=32):
    """Prompts as padded batches: ids (B, T), attention mask (B, T)."""
    for start in range(0, len(prompts), size):
        yield pad(prompts[start:start + size], tokenizer.pad_token_id)
