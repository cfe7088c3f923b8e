"""One page that shows what happens inside a run: `python -m figures.page runs/NAME`.

Writes runs/NAME/page.html: scores, recorded answers, which task took which entry of a pool, which
experts took which token, bytes. It is one file below 500 kB, and needs no network. What the run has
not recorded is left out, and so is what would not fit; the page says both.
"""

import argparse
import base64
import dataclasses
import json
import math
import zlib
from pathlib import Path

import torch

from mose import MoSE
from figures.gates import gates_of_prompt, layer_names, owners
from tracebench.data import cut, encode, metrics_of
from tracebench.model import load_model
from tracebench.options import Args
from tracebench.runs import notes_of
from tracebench.scores import SCORES

TEMPLATE = Path(__file__).with_name("page_template.html")
LIMIT = 490_000  # bytes
METHODS = {"lora": "one LoRA in sequence", "replay": "one LoRA in sequence, with replay",
           "mose": "MoSEs", "mose_fixed": "MoSEs, routers never trained",
           "task_lora": "one LoRA for each task", "moe_lora": "one mixture in sequence",
           "joint": "one LoRA, all tasks at once", "base": "the bare base",
           "floor": "a guess without a model"}


def clip(text, size):
    return text if len(text) <= size else f"{text[:size]} … ({len(text) - size} more characters)"


def questions(results):
    """[(task, number, prompt, right answer)]: the first prompt of every task, then the second."""
    asked = next((result["asked"] for result in results.values() if result.get("asked")), {})
    rows = [(task, i, row["prompt"], row["answer"])
            for task, some in asked.items() for i, row in enumerate(some)]
    return sorted(rows, key=lambda row: row[1])


# ------------------------------------------------------------------------------ inside MoSEs


def open_adapter(folder, results):
    """(MoSE, tokenizer, Args), on the CPU: a GPU may be full. ValueError if the run has none."""
    method = next((m for m in ("mose", "mose_fixed") if m in results), None)
    if not method:
        raise ValueError("the run has no MoSEs")
    try:
        args = Args(**results[method]["args"])
        if args.shard:
            raise ValueError("its base was sharded, so it may be too large for one process")
        args = dataclasses.replace(args, device="cpu", device_map="")
        model, tokenizer = load_model(args)
        return MoSE.load(model, folder / f"{method}.pt"), tokenizer, args
    except Exception as error:  # a base that is gone, or too large, or needs a GPU; another version
        raise ValueError(f"its MoSEs can't be opened: {error}") from error


def picture(owner):
    """A matrix of owners for the page: deflated, in base64."""
    data = base64.b64encode(zlib.compress(owner.contiguous().numpy().tobytes(), 9)).decode()
    return {"rows": owner.shape[0], "columns": owner.shape[1], "data": data}


def pools(mose, room):
    """Owners in a few layers, evenly spread, of about `room` entries in all.

    Where one layer alone has more, pictures show every step-th input and output; counts are whole.
    """
    size, many = max(len(layer.owner) for layer in mose.layers), len(mose.layers)
    count = max(1, min(many, 8, int(room / size)))
    step, layers, names = math.ceil(size / room), [], layer_names(mose)
    for number in sorted({i * (many - 1) // max(1, count - 1) for i in range(count)}):
        experts = mose.layers[number]
        A, B = experts.split(owners(mose, experts))
        own = [rows.flatten() for rows in torch.cat([A.T, B], 1).chunk(mose.config.num_experts)]
        counts = torch.stack([rows.bincount(minlength=len(mose.tasks) + 1) for rows in own], 1)
        layers.append({"number": number, "name": names[number], "counts": counts.tolist(),
                       "A": picture(A.T[:, ::step]), "B": picture(B[:, ::step])})
    return {"experts": mose.config.num_experts, "layers": layers, "many": many, "step": step,
            "top_k": mose.config.top_k}


def route(mose, tokenizer, args, asked, limits):
    """For the first prompt of each task: its tokens, the task that its key finds, and the gates
    [layer][token][expert] under its own task, in percent.

    limits: {task: how many tokens of a prompt the run has read}.
    """
    routed = []
    for task, _, prompt, _ in (row for row in asked if row[1] == 0):
        ids, _ = encode(tokenizer, {"prompt": prompt, "answer": ""})
        (found,), (sure,) = mose.infer_task(torch.tensor([ids]), return_confidence=True)
        ids = cut(ids, limits.get(task, args.max_prompt), tokenizer.bos_token_id)
        tokens, gates = gates_of_prompt(mose, tokenizer, task, ids)
        routed.append({"task": task, "found": found, "sure": sure, "tokens": tokens,
                       "gates": [(100 * layer).round().int().tolist() for layer in gates]})
    return routed


# ------------------------------------------------------------------------------ the page


def gather(results, mose, routed, why, share):
    """All that the page shows; share: how much of the usual room there is for what can be cut."""
    args, tasks, examples = (next(iter(results.values()))[k] for k in ("args", "tasks", "examples"))
    metrics = metrics_of(args["metric"], tasks)
    asked, size, last = questions(results), int(600 * share), int(96 * share)

    def by_task(rows):
        """A method that learns all at once, or nothing, has one row: that of the end."""
        return [None] * (len(tasks) - len(rows)) + rows

    def card(task, i, prompt, right):
        """A prompt, and which of the different texts each method answered after each task."""
        texts, answers, mark = {}, {}, SCORES[metrics[task]]
        for method, result in results.items():
            steps = by_task(result.get("samples", []))
            given = [((step or {}).get(task) or [])[i:i + 1] for step in steps]
            answers[method] = [texts.setdefault(*text, len(texts)) if text else None
                               for text in given]
        return {"task": task, "number": i + 1, "prompt": clip(prompt, 2 * size),
                "right": clip(right, size), "answers": answers,
                "texts": [[clip(text, size), mark(text, right, prompt)] for text in texts]}

    cards = [card(*row) for row in asked[:math.ceil(100 * share)]]
    cards = [card for card in cards if card["texts"]]
    pool = pools(mose, 800_000 * share) if mose else None
    tokens = [row | {"skipped": max(0, len(row["tokens"]) - last), "tokens": row["tokens"][-last:],
                     "gates": [row["gates"][layer["number"]][-last:] for layer in pool["layers"]]}
              for row in routed[:math.ceil(50 * share)]]
    return {
        "base": Path(args["model"]).name, "data": Path(args["data"]).name, "seed": args["seeds"],
        "examples": ["-".join(map(str, sorted({min(n), max(n)}))) for n in zip(*examples.values())],
        "tasks": tasks, "cards": cards, "questions": len(asked), "pool": pool, "tokens": tokens,
        "routed": len(routed), "why": why,
        "methods": {m: {"about": METHODS[m], "R": by_task(r["R"]), "bytes": by_task(r["bytes"]),
                        "source": r.get("source", [])} for m, r in results.items()}}


def write_page(folder):
    """Write page.html into the folder of a run; returns its path. ValueError if there is no run."""
    folder, mose, routed, why = Path(folder), None, [], ""
    files = {m: folder / f"{m}.json" for m in METHODS}
    results = {m: json.loads(file.read_text()) for m, file in files.items() if file.exists()}
    if not results:
        raise ValueError(f"{folder}: no result files (*.json); run train_trace.py first")
    try:
        mose, tokenizer, args = open_adapter(folder, results)
        limits = notes_of(folder).get("limits", {})
        routed = route(mose, tokenizer, args, questions(results), limits)
    except ValueError as error:
        why = str(error)
    for halvings in range(10):
        data = gather(results, mose, routed, why, 0.5 ** halvings)
        # Of the run's text nothing can end the script that holds it.
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        page = TEMPLATE.read_text(encoding="utf-8").replace("DATA_OF_THE_RUN", text, 1)
        if len(page.encode()) < LIMIT:
            break
    (folder / "page.html").write_text(page, encoding="utf-8")
    return folder / "page.html"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="runs/NAME", help="folder of a run of train_trace.py")
    try:
        print(write_page(parser.parse_args().run))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
