"""The figure that explains the method, from a run's own adapter and results.

    python -m figures.method runs/default             # writes results/method.png

Top: the A of the first layer with experts, each entry of the pool in the colour of the task that
owns it, and the gates of each token of one prompt in the last one, from 0 to 1. Bottom: what each
task scores after it and after all later ones, for one LoRA trained in sequence and for MoSEs.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from mose import MoSE
from figures import report
from figures.gates import gates_of_prompt, layer_names, owners
from tracebench.data import encode, read
from tracebench.model import load_model
from tracebench.options import Args

ROOT = Path(__file__).resolve().parent.parent
# Okabe and Ito's palette, which readers with any colour vision can tell apart.
COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of lora and mose")
    parser.add_argument("--out", type=Path, default=ROOT / "results/method.png")
    args = parser.parse_args()
    results = {m: json.loads((args.run / f"{m}.json").read_text()) for m in ("lora", "mose")}
    tasks = results["mose"]["tasks"]
    if len(tasks) > len(COLOURS):
        parser.error(f"{args.run}: got {len(tasks)} tasks, expected at most {len(COLOURS)}, since "
                     "each needs a colour that can be told apart")
    options = Args(**results["mose"]["args"] | {"device": "cpu", "device_map": ""})
    model, tokenizer = load_model(options)
    mose = MoSE.load(model, args.run / "mose.pt")
    if mose.config.fixed_A:
        parser.error(f"{args.run}: with --fixed_A, tasks own no entries of A, which the picture shows: "
                     "expected a run without it")
    plt.rcParams["font.size"] = 11
    figure, axes = plt.subplots(2, 2, figsize=(11, 9.5), layout="constrained")
    (pool, router), matrices = axes
    colours = matplotlib.colors.ListedColormap(COLOURS[:len(tasks)])
    colours.set_under("white")
    first, names = mose.layers[0], layer_names(mose)
    A, _ = first.split(owners(mose, first))  # (D, E*R)
    image = pool.imshow(A, cmap=colours, vmin=0.5, vmax=len(tasks) + 0.5, aspect="auto",
                        interpolation="nearest")
    width = mose.config.rank
    for e in range(1, mose.config.num_experts):
        pool.axvline(e * width - 0.5, color="grey", linewidth=0.8)  # (black is a task)
    pool.set_xticks([e * width + width / 2 for e in range(mose.config.num_experts)],
                    [f"expert {e}" for e in range(mose.config.num_experts)])
    pool.set(title=f"which task owns which entry of A ({names[0]})", ylabel="input dimension")
    bar = figure.colorbar(image, ax=pool, ticks=range(1, len(tasks) + 1))
    bar.ax.set_yticklabels(tasks, fontsize=9)
    bar.ax.invert_yaxis()  # in the order of learning, as the matrices below
    task = tasks[min(1, len(tasks) - 1)]
    prompt = read(options.data, task, "test")[0]["prompt"]
    ids, _ = encode(tokenizer, {"prompt": prompt, "answer": ""})
    tokens, gates = gates_of_prompt(mose, tokenizer, task, ids)
    tokens, values = [token.replace("\n", "\\n") for token in tokens], gates[-1]
    image = router.imshow(values, cmap="Greys", aspect="auto", vmin=0, vmax=1)
    router.set_yticks(range(len(tokens)), tokens, fontsize=8)
    router.set_xticks(range(values.shape[1]), [f"expert {e}" for e in range(values.shape[1])])
    router.set(title=f"gates of a prompt of {task} ({names[-1]})", ylabel="token")
    figure.colorbar(image, ax=router)
    for axis, (method, result) in zip(matrices, results.items()):
        title = {"lora": "one LoRA in sequence: scores", "mose": "MoSEs: scores"}[method]
        # Of a LoRA there are also scores of tasks that it has not learned yet, and of MoSEs not.
        learned = [[score if i <= t else None for i, score in enumerate(row)]
                   for t, row in enumerate(result["R"])]
        report.draw_matrix(axis, learned, tasks, title, size=9)
        axis.set_xlabel("tested task")
    figure.suptitle(report.title_of({"mose": [results["mose"]]}), fontsize=11)
    figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()
