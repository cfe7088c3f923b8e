"""Tables and figures from the result files of train_trace.py alone.

    python results/report.py runs/A            # one run: into its folder
    python results/report.py runs/A runs/B     # the same with other seeds: mean and deviation
    python results/report.py runs/A runs/B --out results/name      # results/name-table.md, ..

Makes table.md; matrices.png, the score on every task after every task, with the task known (TIL)
and inferred (TaIL); growth.png, average score, used capacity and bytes. With --out also name.json,
all results in one file, which can stand in for the folders.
"""

import argparse
import json
import statistics
from pathlib import Path

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:  # then there are tables, and no figures
    plt = None

# Told apart without colour: each method has a line style and a marker of its own.
STYLES = {"lora": ("#999999", ":", "v"), "task_lora": ("#0072b2", "--", "s"),
          "moe_lora": ("#cc79a7", "-.", "^"), "mose": ("#000000", "-", "o"),
          "mose_fixed": ("#d55e00", "-", "D"),
          "floor": ("#bbbbbb", ":", "x"), "base": ("#777777", ":", "+")}


def load(places):
    """{method: [result of each place]}. Raises ValueError if one has none."""
    results = {}
    for place in map(Path, places):
        files = [place / f"{method}.json" for method in STYLES]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        if place.is_file():
            found = json.loads(place.read_text())
        if not found:
            raise ValueError(f"{place}: no result files (*.json); run train_trace.py first")
        for result in found:
            right = result["task_id_accuracy"]
            result["task_id"] = statistics.mean(right) if right else None
            results.setdefault(result["method"], []).append(result)
    return {method: results[method] for method in STYLES if method in results}


def spread(values, digits=1):
    """Mean, and deviation over seeds if there are several, as text."""
    if None in values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def table(results):
    """The comparison as a Markdown table, one method a line; deviations are over seeds."""
    names = ("OP", "s.e.", "OP TaIL", "task id, %", "learned", "BWT", "BWT as TreeLoRA",
             "forgetting", "FWT", "epochs", "parameters", "bytes", "seconds")
    keys = ("op", "op_error", "op_tail", "task_id", "learned", "bwt", "bwt_treelora", "forgetting",
            "fwt")
    lines = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    zero = [statistics.mean(r["zero_shot"]) for r in next(iter(results.values()))]
    lines.append(f"| zero-shot | {spread(zero)} |" + " |" * (len(names) - 1))
    for method, runs in results.items():
        epochs = sorted({*runs[0]["epochs"]})
        cells = [spread([r[key] for r in runs]) for key in keys]
        cells += ["-".join(map(str, {epochs[0], epochs[-1]})) if epochs else ""]
        cells += [f"{runs[0]['parameters']:,}", f"{runs[0]['bytes'][-1]:,}" if epochs else ""]
        cells.append(spread([r["seconds"] for r in runs], 0))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def aligned(rows):
    """Rows of text as lines of equal columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{c:{'>' if i else '<'}{w}}" for i, (c, w) in enumerate(zip(row, widths)))
            for row in rows]


def text(results):
    """The same in short, for a terminal of 100 columns; mean over seeds, scores 0-100."""
    columns = ("OP", "s.e.", "learned", "BWT", "FWT", "OP TaIL", "task id", "parameters", "bytes",
               "seconds")
    runs = next(iter(results.values()))
    zero = statistics.mean(statistics.mean(r["zero_shot"]) for r in runs)
    rows = [("", *columns), ("zero-shot", f"{zero:.1f}", *[""] * (len(columns) - 1))]
    for method, runs in results.items():
        keys = ("op", "op_error", "learned", "bwt", "fwt", "op_tail", "task_id")
        values = [[r[key] for r in runs] for key in keys]
        cells = ["" if None in v else f"{statistics.mean(v):.1f}" for v in values]
        size = f"{runs[0]['bytes'][-1]:,}" if runs[0]["bytes"] else "0"
        seconds = statistics.mean(r["seconds"] for r in runs)
        rows.append((method, *cells, f"{runs[0]['parameters']:,}", size, f"{seconds:.0f}"))
    lines = aligned(rows)
    padding = [share for runs in results.values() for r in runs for share in r["padding"]]
    if padding:
        lines.append(f"padding: {statistics.mean(padding):.1%} of the training tokens")
    return "\n".join(lines)


def mean_matrix(matrices):
    """Cell by cell over seeds; None stays None."""
    return [[None if None in cells else statistics.mean(cells) for cells in zip(*rows)]
            for rows in zip(*matrices)]


def title_of(results):
    """What was run, for every figure: model, data, seeds and numbers of examples."""
    runs = next(iter(results.values()))
    args, sizes = runs[0]["args"], [n for n, _ in runs[0]["examples"].values()]
    tests = [n for _, n in runs[0]["examples"].values()]
    seeds = ",".join(r["args"]["seeds"] for r in runs)

    def span(counts):
        return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"

    data = Path(args["data"]).name.replace("trace-mini", "trace-mini (synthetic)")
    return (f"{Path(args['model']).name} on {data}, mean of seed {seeds}, "
            f"{span(sizes)} training and {span(tests)} test examples a task")


def draw_matrix(axis, matrix, tasks, title, size=8):
    """Scores in grey, 0 to 100, with the number in each cell; returns the image."""
    numbers = [[float("nan") if v is None else v for v in row] for row in matrix]
    image = axis.imshow(numbers, vmin=0, vmax=100, cmap="Greys")
    for t, row in enumerate(matrix):
        for i, value in enumerate(row):
            if value is not None:
                axis.text(i, t, f"{value:.0f}", ha="center", va="center", fontsize=size,
                          color="white" if value > 55 else "black")
    axis.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", fontsize=size)
    axis.set_yticks(range(len(tasks)), tasks, fontsize=size)
    axis.set(title=title, xlabel="tested task", ylabel="after learning")
    return image


def draw_matrices(results, file):
    """Rows: after which task; columns: which task is tested; cells: the score, 0-100."""
    panels = [(f"{method}, task known", mean_matrix([r["R"] for r in runs]))
              for method, runs in results.items() if method not in ("floor", "base")]
    panels += [(f"{method}, task inferred", mean_matrix([r["R_tail"] for r in runs]))
               for method, runs in results.items() if runs[0]["R_tail"]]
    tasks = next(iter(results.values()))[0]["tasks"]
    columns = min(2 if len(panels) < 5 else 3, len(panels))
    rows = -(-len(panels) // columns)
    side = 1.6 + 0.48 * len(tasks)
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                figsize=(side * columns + 1, side * rows))
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for axis, (name, matrix) in zip(axes.flat, panels):
        image = draw_matrix(axis, matrix, tasks, name)
    figure.colorbar(image, ax=axes, shrink=0.6, label="score, 0-100")
    figure.suptitle(title_of(results), fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_growth(results, file):
    """Average score over seen tasks, share of the pool in use and bytes, after each task."""
    results = {method: runs for method, runs in results.items() if method not in ("floor", "base")}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    tasks = next(iter(results.values()))[0]["tasks"]
    x = range(1, len(tasks) + 1)
    for method, runs in results.items():
        color, line, marker = STYLES[method]
        look = {"color": color, "linestyle": line, "marker": marker, "label": method}
        matrix = mean_matrix([r["R"] for r in runs])
        axes[0].plot(x, [statistics.mean(row[:t + 1]) for t, row in enumerate(matrix)], **look)
        if runs[0]["R_tail"]:
            matrix = mean_matrix([r["R_tail"] for r in runs])
            tail = [statistics.mean(row[:t + 1]) for t, row in enumerate(matrix)]
            axes[0].plot(x, tail, color=color, linestyle=(0, (1, 3)), marker="D", fillstyle="none",
                         label=f"{method}, task inferred")
            used = [100 * statistics.mean(step) for step in zip(*(r["used"] for r in runs))]
            axes[1].plot(x, used, **look)
            if method == "mose":
                axes[1].plot(x, [used[0] * t for t in x], color="#999999", linestyle=":",
                             label="as much for every task")
        axes[2].plot(x, [b / 1e3 for b in runs[0]["bytes"]], **look)
    axes[0].set(ylabel="average score on seen tasks, 0-100", ylim=(0, 100))
    axes[1].set(ylabel="used share of the pool, %", ylim=(0, None))
    axes[2].set(ylabel="saved adapters, kB (fp32)", ylim=(0, None))
    for axis in axes:
        axis.set_xticks(x, tasks, rotation=45, ha="right", fontsize=8)
        axis.set_xlabel("after learning")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(title_of(results), fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("places", nargs="+", metavar="runs/NAME", help="or a file made by --out")
    parser.add_argument("--out", help="where to, with the beginning of the names")
    args = parser.parse_args()
    try:
        results = load(args.places)
    except ValueError as error:
        parser.error(str(error))
    start = f"{args.out}-" if args.out else f"{args.places[0]}/"
    page = f"{title_of(results)}\n\n{table(results)}\n"
    Path(f"{start}table.md").write_text(page, encoding="utf-8")
    if plt and {*results} - {"floor", "base"}:
        draw_matrices(results, f"{start}matrices.png")
        draw_growth(results, f"{start}growth.png")
    if args.out:
        every = [result for runs in results.values() for result in runs]
        Path(f"{args.out}.json").write_text(json.dumps(every) + "\n")
    print(f"{text(results)}\nresults: {start}table.md" + (", .png" if plt else ""))


if __name__ == "__main__":
    main()
