"""Two tasks, one after the other, with MoSEs and nothing else: a script to start from.

    python examples/two_tasks.py     # half a minute on two CPU cores

The base is tiny-llm, and the tasks are two of trace-mini (synthetic). After each task, all tasks so
far are tested. The task of a test prompt is not given, but inferred from the prompt.
"""

import json
import random
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # not needed if mose.py lies beside this script
from mose import MoSE  # noqa: E402

BASE = ROOT / "assets/tiny-llm"  # or the name of a causal language model on the hub
TASKS = ["NumGLUE-cm", "FOMC"]
STEPS, WARM_UP, BATCH = 100, 5, 16


def read(task, split):
    """A list of {"prompt": text, "answer": text}."""
    file = ROOT / "assets/trace-mini" / task / f"{split}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def prompts_of(examples, tokenizer):
    """The prompts without their answers: input_ids and attention_mask (B, T), padded on the left, so
    that all answers begin at the same position."""
    texts = [example["prompt"] for example in examples]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}  # some have more


def batch_of(examples, tokenizer):
    """The prompts with their answers: input_ids, attention_mask and labels (B, T)."""
    rows, masks, labels = [], [], []
    for example in examples:
        prompt = tokenizer(example["prompt"])["input_ids"]
        answer = tokenizer(example["answer"], add_special_tokens=False)["input_ids"]
        answer.append(tokenizer.eos_token_id)  # so that the model learns where an answer ends
        rows.append(torch.tensor(prompt + answer))
        masks.append(torch.ones(len(prompt + answer), dtype=torch.long))
        labels.append(torch.tensor([-100] * len(prompt) + answer))  # no loss on the prompt
    return {"input_ids": pad_sequence(rows, True, tokenizer.pad_token_id),
            "attention_mask": pad_sequence(masks, True, 0),
            "labels": pad_sequence(labels, True, -100)}


def learn(mose, model, tokenizer, task):
    """Learn one task, from begin_task to end_task."""
    examples = read(task, "train")
    mose.begin_task(task)
    mose.observe(**prompts_of(examples, tokenizer))  # makes the key that recognises the task
    rate = 0.22 / model.config.hidden_size**0.5
    optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP, STEPS)
    for _ in range(STEPS):
        batch = batch_of(random.sample(examples, BATCH), tokenizer)
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    mose.end_task()


def accuracy(mose, model, tokenizer, task):
    """The share of test prompts that are answered exactly."""
    examples = read(task, "test")
    prompts = prompts_of(examples, tokenizer)
    mose.set_task(mose.infer_task(**prompts))  # a task for each row of the batch
    out = model.generate(**prompts, max_new_tokens=8, do_sample=False)
    answers = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1]:], skip_special_tokens=True)
    right = [answer == example["answer"] for answer, example in zip(answers, examples)]
    return sum(right) / len(right)


def main():
    random.seed(0)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    if tokenizer.pad_token is None:  # some have none; padding is masked everywhere
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(BASE)
    mose = MoSE(model)
    for task in TASKS:
        learn(mose, model, tokenizer, task)
        for known in mose.tasks:
            print(f"{task} learned: {known} {accuracy(mose, model, tokenizer, known):.0%} right")
    mose.save("two_tasks.pt")  # to load it: MoSE.load(model, "two_tasks.pt"), on the bare base


if __name__ == "__main__":
    main()
