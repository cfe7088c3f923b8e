"""One prompt, answered with a finished adapter: `python train_trace.py --ask FILE PROMPT`."""

import dataclasses
from pathlib import Path

import torch

from mose import FORMAT, MoSE
from tracebench.data import cut, encode, positions_of, to_text
from tracebench.model import load_model
from tracebench.options import Args
from tracebench.runs import notes_of

ANSWER = 128  # tokens of an answer at most, where no run says how long its answers are
SURE = 0.5  # confidence from which on a prompt is given to its task


def ask(args):
    """Answer one prompt: infer its task, or leave it to the base when it is far from all tasks."""
    file, prompt = args.ask
    if not Path(file).is_file():
        raise ValueError(f"--ask: got {file}, expected the file of a run, such as "
                         "runs/default/mose.pt")
    if not prompt:
        raise ValueError("--ask: the prompt is empty")
    notes = notes_of(Path(file).parent)
    with open(file, "rb") as adapter_file:
        begin = adapter_file.read(len(FORMAT))
    if begin != FORMAT:
        raise ValueError(f"--ask: {file} begins with {begin!r}, and a file of MoSEs of this version "
                         f"with {FORMAT!r}: expected mose.pt or mose_fixed.pt of a run (the other "
                         "methods can't infer the task of a prompt)")
    its_model = notes.get("options", {}).get("model", args.model)
    is_gone = Path(its_model).is_absolute() and not Path(its_model).exists()  # moved, say
    if args.model == Args.model and not is_gone:  # so no other was asked for
        args = dataclasses.replace(args, model=its_model)
    model, tokenizer = load_model(args)
    try:
        adapter = MoSE.load(model, file)
    except ValueError as error:
        hint = f". Its run had --model {its_model}" if its_model != args.model else ""
        raise ValueError(f"{error}{hint}") from error
    whole, _ = encode(tokenizer, {"prompt": prompt, "answer": ""})
    (name,), (sure,) = adapter.infer_task(torch.tensor([whole]), return_confidence=True)
    print(f"task: {name}, confidence {sure:.2f}")
    if sure < SURE:
        print("far from every task that was learned, so the bare base answers")
        name = None
    adapter.set_task(name)
    positions = positions_of(model)
    # The run noted how many tokens of a prompt the task was trained and tested with. A file that
    # was moved away from these notes takes --max_prompt.
    its_limit = notes.get("limits", {}).get(name, args.max_prompt)
    # Where a prompt leaves little room, the answer is shortened, and never the prompt.
    limit = min(its_limit, positions - 1)
    if len(whole) > limit:
        print(f"the prompt has {len(whole)} tokens, and the model reads the last {limit} of them")
    ids = torch.tensor([cut(whole, limit, tokenizer.bos_token_id)], device=model.device)
    room = int(min(notes.get("answers", {}).get(name, ANSWER), positions - ids.shape[1]))
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room)
    answer = out[0, ids.shape[1]:]
    print(f"answer: {to_text(tokenizer, answer)}")
    if tokenizer.eos_token_id not in answer:
        print(f"(it was cut after {len(answer)} tokens)")
