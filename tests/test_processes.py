"""Several processes do what one does: same masks, weights and scores; evaluation is shared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_trace  # noqa: E402
from mose import MoSE, decode  # noqa: E402

SHORT = ["--tasks", "FOMC,NumGLUE-cm", "--max_train", "40", "--max_test", "9", "--epochs", "2",
         "--methods", "lora,task_lora,mose", "--lr", "1e-3", "--batch", "16", "--eval_batch", "4",
         "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the same run by one process and by two (gloo)."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_trace.main(train_trace.parse([*SHORT, "--name", "one"]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, ROOT / "train_trace.py", *SHORT, "--name", "two"], text=True,
                          cwd=folder, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("zero-shot") == 1  # rank 0 alone prints
    return folder / "runs/one", folder / "runs/two"


@pytest.mark.parametrize("method", ["lora", "task_lora", "mose"])
def test_two_processes_get_the_scores_of_one(runs, method):
    one, two = (json.loads((run / f"{method}.json").read_text()) for run in runs)
    assert (one["processes"], two["processes"]) == (1, 2)
    for key in ("zero_shot", "R", "R_tail", "bytes", "used", "source", "task_id_accuracy"):
        assert one[key] == two[key], key


def test_two_processes_learn_the_same_masks_and_weights_as_one(runs):
    states = []
    for run in runs:
        model, _ = train_trace.load_model(train_trace.Args(device="cpu"))
        mose = MoSE.load(model, run / "mose.pt")
        values = torch.cat([layer.frozen for layer in mose.layers])
        states.append(([decode(code) for code, _ in mose.tasks.values()], values, mose.keys))
    for mask, other in zip(states[0][0], states[1][0]):
        assert torch.equal(mask, other) and mask.any()
    assert torch.allclose(states[0][1], states[1][1], atol=1e-5)
    assert all(torch.equal(states[0][2].total[n], states[1][2].total[n]) for n in mose.tasks)


def test_a_process_takes_its_share_of_every_batch():
    """Control for the above: without the sum over processes, each would learn from half."""
    batch = [*range(7)]
    assert sorted(batch[0::2] + batch[1::2]) == batch and batch[0::2] != batch
    starts = range(0, 9, 4)
    assert sorted([*starts[0::2], *starts[1::2]]) == [*starts]
