"""The figure that explains the method, from a run's own adapter and results.

    python results/method.py runs/trace-mini-0        # writes results/method.png

Top: the A of q_proj in the first layer, each entry of the pool in the colour of the task that took
it, and the gates of each token of one prompt in the last layer, from 0 to 1. Bottom: what every
task scores after every other, for one LoRA trained in sequence and for MoSEs.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import report  # noqa: E402
import train_trace  # noqa: E402
from benchmarks.routing import noted_gates  # noqa: E402
from mose import MoSE  # noqa: E402


# Okabe and Ito's palette, which readers with any colour vision can tell apart.
COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")


def owners(mose, layer=0):
    """(D, E*R): for each entry of the first target's A the number of the task that took it."""
    experts = mose.layers[layer]
    owner = torch.zeros(len(experts.used), dtype=torch.long)
    for i, (mask, _) in enumerate(experts.tasks.values(), 1):
        owner[mask & (owner == 0)] = i
    d, width = experts.shapes[0]
    return owner[:d * width].view(d, width)


@torch.no_grad()
def gates(mose, tokenizer, task, prompt, layer=-1):
    """The tokens of a prompt and their gates (T, E) in one layer."""
    ids, _ = train_trace.encode(tokenizer, {"prompt": prompt, "answer": ""})
    with mose.task(task), noted_gates() as seen:
        mose.model(torch.tensor([ids]))
    return [tokenizer.decode(i).replace("\n", "\\n") for i in ids], seen[layer][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of lora and mose")
    parser.add_argument("--out", type=Path, default=ROOT / "results/method.png")
    args = parser.parse_args()
    results = {m: json.loads((args.run / f"{m}.json").read_text()) for m in ("lora", "mose")}
    options = train_trace.Args(**results["mose"]["args"])
    model, tokenizer = train_trace.load_model(options)
    mose, tasks = MoSE.load(model, args.run / "mose.pt"), results["mose"]["tasks"]
    plt.rcParams["font.size"] = 11
    figure, axes = plt.subplots(2, 2, figsize=(11, 9.5), layout="constrained")
    (pool, router), matrices = axes
    colours = matplotlib.colors.ListedColormap(COLOURS[:len(tasks)])
    colours.set_under("white")
    image = pool.imshow(owners(mose), cmap=colours, vmin=0.5, vmax=len(tasks) + 0.5, aspect="auto",
                        interpolation="nearest")
    width = mose.config.rank
    for e in range(1, mose.config.num_experts):
        pool.axvline(e * width - 0.5, color="black", linewidth=0.6)
    pool.set_xticks([e * width + width / 2 for e in range(mose.config.num_experts)],
                    [f"expert {e}" for e in range(mose.config.num_experts)])
    pool.set(title="who took which entry of A (q_proj, first layer)", ylabel="input dimension")
    bar = figure.colorbar(image, ax=pool, ticks=range(1, len(tasks) + 1))
    bar.ax.set_yticklabels(tasks, fontsize=9)
    bar.ax.invert_yaxis()  # in the order of learning, as the matrices below
    task = "FOMC"
    prompt = train_trace.read(options.data, task, "test")[0]["prompt"]
    tokens, values = gates(mose, tokenizer, task, prompt)
    image = router.imshow(values, cmap="Greys", aspect="auto", vmin=0, vmax=1)
    router.set_yticks(range(len(tokens)), tokens, fontsize=8)
    router.set_xticks(range(values.shape[1]), [f"expert {e}" for e in range(values.shape[1])])
    router.set(title=f"gates of a prompt of {task} (last layer)", ylabel="token")
    figure.colorbar(image, ax=router)
    for axis, (method, result) in zip(matrices, results.items()):
        title = {"lora": "one LoRA in sequence: scores", "mose": "MoSEs: scores"}[method]
        report.draw_matrix(axis, result["R"], tasks, title, size=9)
    figure.suptitle(f"tiny-llm on trace-mini (synthetic), seed {options.seeds}, n = "
                    f"{result['examples'][task][1]} test examples a task", fontsize=11)
    figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()
