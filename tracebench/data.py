"""TRACE's tasks, from its files to token ids: reading, encoding, batches.

Usable on its own: a task lies in FOLDER/TASK/{train,eval,test}.json, each a list of
{"prompt": text, "answer": text}; FOLDER may be a URL.
"""

import dataclasses
import json
import math
import urllib.parse
import urllib.request

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence

SCHEDULES = {"trace": (5, 3, 7, 5, 3, 5, 5, 7), "short": (2, 1, 3, 2, 1, 2, 2, 3)}  # epochs


def read(base, task, split):
    """A task's split as a Dataset. Raises ValueError with the file and the row."""
    url = base.startswith(("http://", "https://"))
    where = f"{base}/{urllib.parse.quote(task) if url else task}/{split}.json"
    try:
        with urllib.request.urlopen(where, timeout=60) if url else open(where, "rb") as file:
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
    # Of further columns nothing is read: Arrow refuses one whose values are of several types.
    return datasets.Dataset.from_list([{k: row[k] for k in ("prompt", "answer")} for row in rows])


def encode(tokenizer, row):
    """(ids of the prompt with BOS, ids of the answer with EOS), each tokenised on its own: joined,
    "Stance:" and "C" may merge into tokens that the prompt alone does not end with."""
    prompt, answer = (tokenizer(row[key], add_special_tokens=False)["input_ids"]
                      for key in ("prompt", "answer"))
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + prompt, answer + [tokenizer.eos_token_id]


def cut(prompt, limit, bos):
    """The BOS, if there is one, and the last tokens of a prompt, `limit` in all."""
    keep = int(prompt[:1] == [bos])
    return prompt if len(prompt) <= limit else prompt[:keep] + prompt[len(prompt) - limit + keep:]


@dataclasses.dataclass
class Task:
    """A task's texts as ids."""

    name: str
    metric: str
    epochs: int
    train: list  # examples (ids, labels): labels are -100 on the prompt
    prompts: list  # all training prompts, whole: their beginning says most about the task
    test: list  # test prompts, whole
    limit: int  # tokens of a prompt that the model reads, its last ones
    max_new: int  # tokens that an answer may have
    texts: tuple  # the Datasets of train and test


def load_task(base, name, metric, tokenizer, *, epochs=1, split="test", max_prompt=1024,
              positions=math.inf, max_train=None, max_test=None):
    """One task. positions: what the model can read. Raises ValueError for what can't be learned."""
    train, test = read(base, name, "train"), read(base, name, split)
    test = test.select(range(min(max_test or len(test), len(test))))
    known = {*train["prompt"]}
    shared = sum(prompt in known for prompt in test["prompt"])
    if shared:
        print(f"warning: {name}: {shared} of {len(test)} test prompts stand in train too")
    encoded = [encode(tokenizer, row) for row in train]
    longest = max(len(answer) for _, answer in encoded)
    limit = min(max_prompt, positions - longest)
    if limit < 2:
        raise ValueError(f"{name}: an answer of {longest} tokens leaves no room for its prompt "
                         f"in the {positions} positions of the model")
    examples = []
    for prompt, answer in encoded[:max_train or None]:
        prompt = cut(prompt, limit, tokenizer.bos_token_id)
        examples.append((prompt + answer, [-100] * len(prompt) + answer))
    # first_letter reads one character, which has 4 bytes at the most, so no more tokens.
    max_new = min(longest, 4) if metric == "first_letter" else longest
    return Task(name, metric, epochs, examples, [prompt for prompt, _ in encoded],
                [encode(tokenizer, row)[0] for row in test], limit, max_new, (train, test))


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
