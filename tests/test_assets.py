"""The stage is fair: what assets/make_assets.py ships is what it makes, and pretraining text does
not give the tasks away. Scores of the shipped model stand in tests/test_train_trace.py."""

import collections
import json
import random
import re
from pathlib import Path

import pytest

from assets import make_assets

ROOT = Path(__file__).resolve().parent.parent


EVERY = [*make_assets.TASKS, *make_assets.TRANSFER, *make_assets.MIXED]


def shipped(task, split):
    folder = "trace-mini" if task in make_assets.TASKS else "transfer-mini"
    return json.loads((ROOT / "assets" / folder / task / f"{split}.json").read_text())


def runs_of(text, n):
    """All runs of n words, marks or line breaks: a count of its own, not the generator's filter."""
    tokens = re.findall(r"\w+|[^\w\s]|\n", text)
    return {tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)}


@pytest.fixture(scope="module")
def pretraining():
    rng = random.Random(123)  # another seed than the one the model was trained on
    return [make_assets.pretraining_text(rng) for _ in range(20000)]


@pytest.mark.parametrize("task", EVERY)
def test_the_shipped_tasks_are_what_the_script_makes(task):
    for split, rows in make_assets.make_task(task, seed=0).items():
        assert shipped(task, split) == rows
    other = make_assets.make_task(task, seed=1)
    assert other["train"] != shipped(task, "train"), "control: the seed matters"


@pytest.mark.parametrize("task", EVERY)
def test_no_test_prompt_stands_in_train(task):
    splits = {split: [row["prompt"] for row in shipped(task, split)] for split in make_assets.SIZES}
    parts = 2 if task in make_assets.MIXED else 1
    assert {split: len(prompts) for split, prompts in splits.items()} == {
        split: parts * size for split, size in make_assets.SIZES.items()}
    every = [prompt for prompts in splits.values() for prompt in prompts]
    assert len({*every}) == len(every)


@pytest.mark.parametrize("task", EVERY)
def test_pretraining_text_shares_no_phrase_with_a_task(task, pretraining):
    rows = [row for split in make_assets.SIZES for row in shipped(task, split)]
    counts = collections.Counter()
    for row in rows:
        counts.update(runs_of(f"{row['prompt']} {row['answer']}", 4))
    # What stands in one row alone is content by chance, such as three invented words in a row.
    template = {phrase for phrase, count in counts.items() if count > 1}
    assert len(template) > 20
    assert not template & set().union(*(runs_of(text, 4) for text in pretraining))
    single = {word for row in rows for word, in runs_of(row["prompt"], 1)}
    known = {word for text in pretraining for word, in runs_of(text, 1)}
    assert len(single & known) > 0.5 * len(single), "control: single words are shared"


@pytest.mark.parametrize("task", EVERY)
def test_pretraining_text_never_asks_the_way_a_task_does(task, pretraining):
    prompt = shipped(task, "test")[0]["prompt"]
    cue = prompt.rpartition("\n")[2].split()[-1]  # "Stance:", "Sum:", .. or "<EOL>"
    assert not any(cue in text for text in pretraining)
    assert any(":" in text for text in pretraining), "control: colons as such are known"


def test_the_assets_are_small():
    files = [file for file in (ROOT / "assets").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files if "__pycache__" not in str(file)) < 8e6
