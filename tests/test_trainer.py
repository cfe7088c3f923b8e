"""Trainer and accelerate: what was stopped goes on, the best weights come back, no task changes.

Needs `pip install accelerate`, as transformers.Trainer does.
"""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
from mose import MoSE, SubExperts
from test_mose import attach, data, guard, learn, snapshot, step, tiny  # noqa: F401

accelerate = pytest.importorskip("accelerate")
TOKENIZER = transformers.AutoTokenizer.from_pretrained(ROOT / "assets/tiny-llm")


def base():
    return transformers.AutoModelForCausalLM.from_pretrained(ROOT / "assets/tiny-llm")


def rows(name, split):
    """16 examples. Trainer drops their column "answer" by itself: no forward() takes it."""
    examples = []
    for row in json.loads((ROOT / f"assets/trace-mini/{name}/{split}.json").read_text())[:16]:
        prompt, answer = (TOKENIZER(row[key])["input_ids"] for key in ("prompt", "answer"))
        labels = [-100] * len(prompt) + answer
        examples.append({"input_ids": prompt + answer, "labels": labels, "answer": row["answer"]})
    return examples


def trainer(mose, name, folder, **options):
    # The largest loss counts as the best here, so that the best weights are not the last ones.
    best = {"metric_for_best_model": "loss", "greater_is_better": True}
    every_2 = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    arguments = transformers.TrainingArguments(
        folder / name, max_steps=6, per_device_train_batch_size=4, learning_rate=0.01, use_cpu=True,
        disable_tqdm=True, report_to="none", **every_2, **best, **options)
    collate = transformers.DataCollatorForSeq2Seq(TOKENIZER)
    return transformers.Trainer(mose.model, arguments, collate, rows(name, "train"),
                                rows(name, "eval"))


def train(mose, name, folder, guard=True, resume=None, **options):
    """One task from begin to end; the state of its Trainer, and the loss with which it ended."""
    mose.begin_task(name)
    mose.observe(data(name))
    work = trainer(mose, name, folder, **options)
    with pytest.MonkeyPatch.context() as patch:
        # Off: checkpoints hold the base alone, as after end_task().
        guard or patch.setattr(SubExperts, "_save_to_state_dict", lambda *given: None)
        work.train(resume_from_checkpoint=resume)
        loss = work.evaluate()["eval_loss"]
    mose.end_task()
    return work.state, loss


def test_two_tasks_end_with_their_best_weights_and_the_first_stays(guard, tmp_path):
    mose, ends = MoSE(base()), []
    for name in ("FOMC", "C-STANCE"):
        state, loss = train(mose, name, tmp_path, guard, load_best_model_at_end=True)
        assert (state.best_global_step, state.global_step) == (2, 6)
        assert (loss == state.best_metric) == guard
        ends.append(snapshot(mose, "FOMC"))
    assert torch.equal(*ends) and not torch.equal(snapshot(mose, "C-STANCE"), ends[0])
    mose.model.save_pretrained(tmp_path)
    assert b"sub_experts" not in (tmp_path / "model.safetensors").read_bytes()


def test_a_task_goes_on_in_a_new_process_as_if_it_had_never_stopped(guard, tmp_path):
    mose = MoSE(base())
    train(mose, "FOMC", tmp_path, guard)
    mose.save(tmp_path / "mose.pt")
    train(mose, "C-STANCE", tmp_path, guard)
    again = MoSE.load(base(), tmp_path / "mose.pt")
    # begin_task draws other numbers here; those in the checkpoint take their place.
    train(again, "C-STANCE", tmp_path, guard, resume=str(tmp_path / "C-STANCE/checkpoint-2"))
    ends = [snapshot(one, "FOMC", "C-STANCE") for one in (mose, again)]
    assert [torch.equal(*pair) for pair in zip(*ends)] == [True, guard]


def test_the_recipe_of_the_page_learns_all_tasks_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    page = (ROOT / "docs/works-with.md").read_text(encoding="utf-8")
    recipe = page.split("**Trainer.**")[1].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    tasks = {name: (rows(name, "train"), rows(name, "eval")) for name in ("FOMC", "C-STANCE")}
    names = {
        "os": os, "transformers": transformers, "MoSE": MoSE,
        "collate": transformers.DataCollatorForSeq2Seq(TOKENIZER),
        "prompts": {name: data(name) for name in tasks},
        "options": {"max_steps": 4, "eval_strategy": "steps", "save_strategy": "steps",
                    "eval_steps": 2, "save_steps": 2, "use_cpu": True, "disable_tqdm": True,
                    "report_to": "none"}}
    ends = []
    for some in (["FOMC"], [*tasks]):  # the second time, one task is there already
        own = names | {"model": base(), "tasks": {name: tasks[name] for name in some}}
        exec(recipe, own)
        assert [*own["mose"].tasks] == some
        ends.append(snapshot(own["mose"], "FOMC"))
    assert torch.equal(*ends)
    assert not torch.equal(snapshot(own["mose"], "C-STANCE"), ends[0])  # control


def test_evaluation_in_bf16_rounds_the_base_and_not_the_pool(guard, monkeypatch, tmp_path):
    # Off: Trainer's cast reaches the pool.
    guard or monkeypatch.setattr(SubExperts, "_apply", torch.nn.Module._apply)
    mose = MoSE(base())
    train(mose, "FOMC", tmp_path)
    before = copy.deepcopy([layer.frozen for layer in mose.layers])
    trainer(mose, "FOMC", tmp_path, bf16_full_eval=True).evaluate()
    assert mose.model.dtype == torch.bfloat16
    assert all(torch.equal(layer.frozen.float(), old)
               for layer, old in zip(mose.layers, before)) == guard


def test_what_accelerate_saved_of_an_open_task_goes_on_in_a_newly_loaded_model(guard, tmp_path):
    ends, stop = [], learn(attach(), "a")
    stop.save(tmp_path / "mose.pt")
    for mose in (stop, MoSE.load(tiny(), tmp_path / "mose.pt")):
        mose.begin_task("b")
        mose.observe(data("b"))
        optimizer = torch.optim.AdamW(mose.trainable_parameters(), lr=0.03)
        work = accelerate.Accelerator(cpu=True)
        model, optimizer = work.prepare(mose.model, optimizer)
        if mose is stop:
            step(model, optimizer, data("b"))
            work.save_state(tmp_path / "state")
        elif guard:  # off: what is open goes on from its own beginning
            work.load_state(tmp_path / "state")
        step(model, optimizer, data("b"))
        mose.end_task()
        ends.append(snapshot(mose, "a", "b"))
    assert [torch.equal(*pair) for pair in zip(*ends)] == [True, guard]
