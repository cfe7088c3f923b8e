"""What finished adapters cost in bf16, and without the keys of MoSEs: bytes against score.

    python -m benchmarks.bf16                          # runs/frontier: tiny-llm (needs peft)
    python -m benchmarks.bf16 "runs/long mose 1e-2 0"  # some folders of train_trace.py's runs
    python -m benchmarks.bf16 report                   # results/bf16.md of results/bf16.json

Each finished adapter is tested as it is, which must give the score of its run, exactly. Then the
numbers that training made are rounded to bf16: the values of entries and the routers of MoSEs, A
and B of a LoRA for each task, or what an adapter of peft trains. The adapter is saved, loaded, and
tested again. MoSEs' masks and keys stay as they are. The rounding comes after all training. So a
task of MoSEs that reads entries of earlier tasks was trained on their fp32 values, and is tested on
those in bf16.

The files are also written without MoSEs' keys. Keys find the task of a prompt, and no score here
depends on them, since the task of each prompt is given. The other adapters have none.

Results are added to results/bf16.json.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from benchmarks import peft_tasks
from benchmarks.frontier import PEFT, groups
from figures.report import spread, standard_error
from mose import MoSE, TaskKeys
from tracebench.data import load_tasks
from tracebench.methods import KINDS
from tracebench.model import load_model
from tracebench.options import Args
from tracebench.scores import mean
from train_trace import evaluate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results/bf16.json"


def stored():
    """{name of a run: what was found}, of results/bf16.json."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def round_to_bf16(adapter):
    """Round what training made."""
    adapter.packed = {}  # what was compressed before, with its fp32 values
    if not isinstance(adapter, MoSE):
        adapter.tasks = {name: [w.bfloat16().float() for w in weights]
                         for name, weights in adapter.tasks.items()}
        return
    for layer in adapter.layers:
        layer.frozen.copy_(layer.frozen.bfloat16())
        layer.routers = {n: router.bfloat16().float() for n, router in layer.routers.items()}


def save(adapter, file):
    """Save an adapter. Returns the bytes of its file, and those of a file without MoSEs' keys."""
    adapter.save(file)
    size = file.stat().st_size
    if not isinstance(adapter, MoSE):
        return size, size
    keys = adapter.keys
    adapter.keys = TaskKeys(adapter.model.get_input_embeddings(), adapter.config.key_dim)
    without = file.with_suffix(".without")
    adapter.save(without)
    adapter.keys = keys
    return size, without.stat().st_size


def score(adapter, model, tokenizer, tasks, args):
    """OP: the mean score of all tasks, each with its own adapter in force."""
    return mean([mean(evaluate(model, tokenizer, adapter, task, args).known) for task in tasks])


def measure(folder, models):
    """The result of one finished run. models: {path: (model, tokenizer, tasks)}, made once each."""
    options = json.loads((folder / "args.json").read_text())["options"]
    here = {"data": str(ROOT / "assets/trace-mini")}
    if options["model"].endswith("tiny-llm"):
        here["model"] = str(ROOT / "assets/tiny-llm")
    # Options that an earlier version had are about training, which is over.
    known = {field.name for field in dataclasses.fields(Args)}
    args = Args(**{name: value for name, value in options.items() if name in known} | here)
    if args.model not in models:
        model, tokenizer = load_model(args)
        models[args.model] = model, tokenizer, load_tasks(args, tokenizer, model)
    model, tokenizer, tasks = models[args.model]
    file = folder / f"{args.methods}.pt"
    result = json.loads(file.with_suffix(".json").read_text())
    # The adapters of peft ran as if they were LoRAs (CHANGES of the frontier).
    of_peft = [word for word in folder.name.split() if word in PEFT]
    kind = getattr(peft_tasks, of_peft[0]) if of_peft else KINDS[args.methods]
    peft_tasks.SEED = int(args.seeds)
    adapter = kind.load(model, file)
    before = score(adapter, model, tokenizer, tasks, args)
    if before != result["op"]:
        raise ValueError(f"{folder}: got an OP of {before} from its file, and its run had "
                         f"{result['op']}: this is another base, or other data")
    with tempfile.TemporaryDirectory() as temporary:
        _, without_keys = save(adapter, Path(temporary) / "fp32.pt")
        round_to_bf16(adapter)
        rounded = Path(temporary) / "bf16.pt"
        size, size_without_keys = save(adapter, rounded)
        adapter.detach()
        adapter = kind.load(model, rounded)
    after = score(adapter, model, tokenizer, tasks, args)
    adapter.detach()
    return {"op": before, "op_bf16": after, "bytes": result["bytes"][-1], "bytes_bf16": size,
            "bytes_without_keys": without_keys, "bytes_bf16_without_keys": size_without_keys,
            "tasks": len(tasks), "base": Path(args.model).name, "device": result["device"]}


def is_measured(folder):
    """Whether results/bf16.json has what this run gave, and not an earlier run of the same name."""
    found = stored().get(folder.name)
    method = json.loads((folder / "args.json").read_text())["options"]["methods"]
    run = json.loads((folder / f"{method}.json").read_text())
    return found is not None and (found["op"], found["bytes"]) == (run["op"], run["bytes"][-1])


def report(results):
    """Markdown from the JSON alone."""
    devices = sorted({r["device"] for r in results.values()})
    lines = ["# Values in bf16\n",
             "`python -m benchmarks.bf16`, then `report`: finished adapters of "
             "[frontier](frontier.md) and [smollm2](smollm2.md), whose numbers are rounded to bf16 "
             "after training ([how](../benchmarks/bf16.py)), and tested again on the `test` split of "
             f"trace-mini (synthetic). Runs on: {'; '.join(devices)}. Difference: paired over the "
             "seeds, with its standard error. The bytes are those of a task. The keys of MoSEs find "
             "the task of a prompt, and here it is given, as LoRAs need it. So the same files were "
             "also written without keys.\n",
             "| run | base | seeds | OP, fp32 | OP, bf16 | difference | bytes, fp32 | without keys | "
             "bytes, bf16 | without keys |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for name, runs in sorted(groups(results).items()):
        some = [*runs.values()]
        gaps = [r["op_bf16"] - r["op"] for r in some]
        error = f" ± {standard_error(gaps):.2f}" if len(gaps) > 1 else ""
        sizes = [mean([r[key] / r["tasks"] for r in some]) for key in (
            "bytes", "bytes_without_keys", "bytes_bf16", "bytes_bf16_without_keys")]
        lines.append(
            f"| {name} | {some[0]['base']} | {len(some)} | {spread([r['op'] for r in some])} | "
            f"{spread([r['op_bf16'] for r in some])} | {mean(gaps):+.2f}{error} | "
            f"{' | '.join(f'{size:,.0f}' for size in sizes)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", help="of finished runs, or `report`")
    folders = parser.parse_args().folders
    if folders == ["report"]:
        text = report(stored())
        (ROOT / "results/bf16.md").write_text(text, encoding="utf-8")
        return print(text)
    if not folders:
        names = ("mose 0.", "one expert", "fixed A", "task_lora r", *PEFT)
        results = [*Path("runs/frontier").glob("*/mose.json"),
                   *Path("runs/frontier").glob("*/task_lora.json")]  # of the runs that are done
        folders = sorted(r.parent for r in results if r.parent.name.startswith(names))
    models = {}
    for folder in map(Path, folders):
        if not is_measured(folder):
            result = measure(folder, models)
            # (Read again, since another process may have added something.)
            RESULTS.write_text(json.dumps(stored() | {folder.name: result}) + "\n")
            print(folder.name, result, flush=True)


if __name__ == "__main__":
    main()
