"""One prompt, answered with a finished adapter: `python train_trace.py --ask FILE PROMPT`."""

import json
import math
from pathlib import Path

import torch

from mose import MoSE
from tracebench.data import cut, encode, to_text
from tracebench.model import load_model

ANSWER = 128  # tokens of an answer at most
SURE = 0.5  # confidence from which on a prompt is given to its task


def notes_of_run(file):
    """What the run of an adapter noted in its folder: {} if there is nothing."""
    notes = Path(file).with_name("args.json")
    return json.loads(notes.read_text()) if notes.exists() else {}


def ask(args):
    """Answer one prompt: infer its task, or leave it to the base when it is far from all tasks."""
    file, prompt = args.ask
    notes = notes_of_run(file)
    model, tokenizer = load_model(args)
    try:
        adapter = MoSE.load(model, file)
    except ValueError as error:
        its_model = notes.get("options", {}).get("model", "not known")
        raise ValueError(f"{error}. Its run had --model {its_model}") from error
    whole, _ = encode(tokenizer, {"prompt": prompt, "answer": ""})
    (name,), (sure,) = adapter.infer_task(torch.tensor([whole]), return_confidence=True)
    print(f"task: {name}, confidence {sure:.2f}")
    if sure < SURE:
        print("far from every task that was learned, so the bare base answers")
        name = None
    adapter.set_task(name)
    positions = getattr(model.config, "max_position_embeddings", math.inf)
    # The run noted how many tokens of a prompt the task was trained and tested with. A file that
    # was moved away from these notes takes --max_prompt.
    its_limit = notes.get("limits", {}).get(name, args.max_prompt)
    # Where a prompt leaves little room, the answer is shortened, and never the prompt.
    limit = min(its_limit, positions - 1)
    if len(whole) > limit:
        print(f"the prompt has {len(whole)} tokens, and the model reads the last {limit} of them")
    ids = torch.tensor([cut(whole, limit, tokenizer.bos_token_id)], device=model.device)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                         max_new_tokens=int(min(ANSWER, positions - ids.shape[1])))
    print(f"answer: {to_text(tokenizer, out[0, ids.shape[1]:])}")
