"""Several processes do what one does: same masks, weights and scores; evaluation is shared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_trace
from mose import MoSE
from tracebench.baselines import LoRA
from tracebench.options import Args

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not os.environ.get("CI"), reason="it takes long to start several processes: set CI=1")

SHORT = ["--tasks", "FOMC,NumGLUE-cm", "--max_train", "40", "--max_test", "9", "--epochs", "2",
         "--methods", "lora,mose", "--lr", "1e-3", "--batch", "16", "--tokens", "120",
         "--device", "cpu"]


def two(script, folder, *options):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, script, *SHORT, *options], text=True, cwd=folder,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("results: ") == 1  # rank 0 alone prints


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the same run by one process and by two (gloo)."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_trace.main(train_trace.parse([*SHORT, "--name", "one"]))
    two(ROOT / "train_trace.py", folder, "--name", "two")
    return folder / "runs/one", folder / "runs/two"


@pytest.mark.parametrize("method", ["lora", "mose"])
def test_two_processes_get_the_scores_of_one(runs, method):
    one, two = (json.loads((run / f"{method}.json").read_text()) for run in runs)
    assert (one["processes"], two["processes"]) == (1, 2)
    for key in ("zero_shot", "R", "R_tail", "used", "source", "task_id_accuracy"):
        assert one[key] == two[key], key
    # Weights that differ in their last bits are compressed to a little more or less.
    assert one["bytes"] == pytest.approx(two["bytes"], rel=0.01)


def learned(file):
    """Masks, values and keys of a file of MoSEs."""
    model, _ = train_trace.load_model(Args(device="cpu"))
    mose = MoSE.load(model, file)
    values = torch.cat([layer.frozen for layer in mose.layers])
    masks = [layer.owner == lineage[0] for layer in mose.layers for lineage in mose.tasks.values()]
    return masks, values, [mean for _, mean, *_ in mose.keys.tasks.values()]


def lora_weights(file):
    model, _ = train_trace.load_model(Args(device="cpu"))
    return torch.cat([values.flatten() for values in LoRA.load(model, file).get_weights()])


def test_two_processes_learn_the_same_masks_and_weights_as_one(runs):
    (masks, values, keys), others = (learned(run / "mose.pt") for run in runs)
    assert all(map(torch.equal, masks, others[0])) and all(mask.any() for mask in masks)
    assert torch.allclose(values, others[1], atol=1e-5) and all(map(torch.equal, keys, others[2]))


def test_without_the_sum_of_gradients_they_would_not(runs):
    folder = runs[0].parent.parent
    (folder / "control.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_trace\n"
        "train_trace.processes.add_up = lambda *tensors: None\n"
        "train_trace.main(train_trace.parse())\n")
    two("control.py", folder, "--name", "off", "--methods", "lora")
    one, both, off = (lora_weights(run / "lora.pt") for run in (*runs, folder / "runs/off"))
    assert torch.allclose(one, both, atol=1e-3) and not torch.allclose(one, off, atol=1e-3)
