"""The figure that explains the method, from a run's own adapter and results.

    python results/method.py runs/trace-mini-0        # writes results/method.png

Left: the pool of the first layer's A of q_proj, each entry in the shade of the task that took it.
Middle: the router at work, the gates of each token of one prompt. Right: what every task scores
after every other, for MoSEs and for one LoRA trained in sequence.
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
from mose import MoSE, decode  # noqa: E402


def owners(mose, layer=0):
    """(D, E*R): for each entry of the first target's A the number of the task that took it."""
    owner = torch.zeros(sum(mose.sizes), dtype=torch.long)
    for i, (code, _) in enumerate(mose.tasks.values(), 1):
        mask = decode(code)
        owner[mask & (owner == 0)] = i
    rows = owner.split(mose.sizes)[layer].view(-1, mose.config.num_experts * mose.config.rank)
    return rows[:mose.layers[layer].rows[0]]


@torch.no_grad()
def gates(mose, tokenizer, task, prompt, layer=-1):
    """The tokens of a prompt and their gates (T, E) in one layer."""
    ids, _ = train_trace.encode(tokenizer, {"prompt": prompt, "answer": ""})
    with mose.task(task):
        mose.model(torch.tensor([ids]))
        return [tokenizer.decode(i).replace("\n", "\\n") for i in ids], mose.layers[layer].gates[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of lora and mose")
    parser.add_argument("--out", type=Path, default=ROOT / "results/method.png")
    args = parser.parse_args()
    results = {m: json.loads((args.run / f"{m}.json").read_text()) for m in ("lora", "mose")}
    options = train_trace.Args(**results["mose"]["args"])
    model, tokenizer = train_trace.load_model(options)
    mose, tasks = MoSE.load(model, args.run / "mose.pt"), results["mose"]["tasks"]
    figure, axes = plt.subplots(1, 4, figsize=(16, 4.4), layout="constrained",
                                width_ratios=(1.1, 1.1, 1, 1))
    shades = plt.get_cmap("viridis", len(tasks) + 1)
    shades.set_under("white")
    image = axes[0].imshow(owners(mose), cmap=shades, vmin=0.5, vmax=len(tasks) + 0.5,
                           aspect="auto", interpolation="nearest")
    for e in range(1, mose.config.num_experts):
        axes[0].axvline(e * mose.config.rank - 0.5, color="black", linewidth=0.6)
    axes[0].set(title="the pool: A of one layer, all experts",
                xlabel=f"{mose.config.num_experts} experts of rank {mose.config.rank}",
                ylabel="input")
    bar = figure.colorbar(image, ax=axes[0], ticks=range(1, len(tasks) + 1))
    bar.ax.set_yticklabels(tasks, fontsize=7)
    task = "FOMC"
    prompt = train_trace.read(options.data, task, "test")[0]["prompt"]
    tokens, values = gates(mose, tokenizer, task, prompt)
    image = axes[1].imshow(values, cmap="Greys", aspect="auto", vmin=0)
    axes[1].set_yticks(range(len(tokens)), tokens, fontsize=6)
    axes[1].set_xticks(range(values.shape[1]))
    axes[1].set(title=f"the router of {task}: gates", xlabel="expert", ylabel="tokens of a prompt")
    figure.colorbar(image, ax=axes[1])
    for axis, (method, result) in zip(axes[2:], results.items()):
        title = {"lora": "one LoRA in sequence: score", "mose": "MoSEs: score"}[method]
        report.draw_matrix(axis, result["R"], tasks, title, size=7)
    figure.suptitle(f"tiny-llm on trace-mini (synthetic), seed {options.seeds}, n = "
                    f"{result['examples'][task][1]} test examples a task", fontsize=9)
    figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()
