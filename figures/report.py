"""Tables and figures from the result files of train_trace.py.

    python -m figures.report runs/A            # one run: into its folder
    python -m figures.report runs/A runs/B     # the same with other seeds: mean and deviation
    python -m figures.report runs/A runs/B --out results/name      # results/name-table.md, ..

Makes table.md; matrices.png, the score on every task after every task, with the task known (TIL)
and inferred (TaIL); growth.png, average score, used capacity and bytes; page.html, to look inside
(figures/page.py). With --out no page, but name.json: all results in one file, which can stand in
for the folders; without texts of the data.
"""

import argparse
import json
import statistics
from pathlib import Path

from figures.page import write_page

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:  # then there are tables, and no figures
    plt = None

# Told apart without colour: each method has a line style and a marker of its own.
STYLES = {"floor": ("#bbbbbb", ":", "x"), "base": ("#777777", ":", "+"),
          "lora": ("#999999", ":", "v"), "replay": ("#e69f00", ":", "<"),
          "joint": ("#009e73", "--", "*"), "task_lora": ("#0072b2", "--", "s"),
          "moe_lora": ("#cc79a7", "-.", "^"), "mose": ("#000000", "-", "o"),
          "mose_fixed": ("#d55e00", "-", "D")}
# Options in which runs of one mean may differ: the seed, and what does not change a result.
FREE = {"seeds", "name", "methods", "tokens", "checkpointing", "device", "device_map", "shard", "force"}


def load(places):
    """{method: [result of each place]}. Raises ValueError if one has none, or if runs of a method
    differ in more than the seed."""
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
            result["tokens_a_second"] = result["tokens"] / max(result["seconds_training"], 1e-9)
            result["adapter_bytes"] = result["bytes"][-1] if result["bytes"] else 0
            results.setdefault(result["method"], []).append(result)
    for method, runs in results.items():
        expect_same_options(method, [run["args"] for run in runs])
    return {method: results[method] for method in STYLES if method in results}


def expect_same_options(method, options):
    """Raise ValueError if runs of one method have other differences than those between seeds."""
    for name in sorted(options[0].keys() - FREE):
        values = {str(args.get(name)) for args in options}
        if name in ("model", "data"):  # a folder may have been moved
            values = {Path(value).name for value in values}
        if len(values) > 1:
            raise ValueError(f"{method}: the runs have --{name} {' and '.join(sorted(values))}: "
                             "expected runs that differ in the seed alone, since a mean is over seeds")


def spread(values, digits=1):
    """Mean, and deviation over seeds if there are several, as text."""
    if None in values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def standard_error(values):
    """Of the mean of two values or more."""
    return statistics.stdev(values) / len(values) ** 0.5


# Column of a table: key of a result, and digits.
COLUMNS = {"OP": ("op", 1), "s.e.": ("op_error", 1), "learned": ("learned", 1), "BWT": ("bwt", 1),
           "TaIL": ("op_tail", 1), "task id": ("task_id", 1),
           "BWT as TreeLoRA": ("bwt_treelora", 1), "forgetting": ("forgetting", 1),
           "FWT": ("fwt", 1), "parameters": ("parameters", 0), "bytes": ("adapter_bytes", 0),
           "train, s": ("seconds_training", 0), "test, s": ("seconds_testing", 0)}


def table(results):
    """The comparison as a Markdown table, one method a line; deviations are over seeds."""
    rows = ["| method | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method, runs in results.items():
        values = [([r[key] for r in runs], digits) for key, digits in COLUMNS.values()]
        cells = [spread(v) if digits else f"{statistics.mean(v):,.0f}" for v, digits in values]
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def aligned(rows):
    """Rows of text as lines of equal columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{c:{'>' if i else '<'}{w}}" for i, (c, w) in enumerate(zip(row, widths)))
            for row in rows]


def text(results):
    """The same in short, for a terminal of 100 columns: mean over seeds, scores 0-100."""
    columns = [name for name in COLUMNS if name not in ("BWT as TreeLoRA", "forgetting")]
    rows = [("", *columns)]
    for method, runs in results.items():
        values = [([r[key] for r in runs], digits) for key, digits in map(COLUMNS.get, columns)]
        rows.append((method, *("" if None in v else f"{statistics.mean(v):,.{digits}f}"
                               for v, digits in values)))
    return "\n".join(aligned(rows))


def lines(results):
    """The same for programs: `method.key: value`."""
    keys = ("op", "bwt", "learned", "op_tail", "adapter_bytes", "seconds_training",
            "seconds_testing", "tokens_a_second", "peak_memory_bytes")
    return "\n".join(f"{method}.{key}: {statistics.mean(r[key] for r in runs):.6g}"
                     for method, runs in results.items() for key in keys
                     if None not in [r[key] for r in runs])


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
    over = "seed" if len(runs) == 1 else "mean of seeds"
    return (f"{Path(args['model']).name} on {data}, {over} {seeds}, "
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
    axis.set(title=title, xlabel="tested task (above the diagonal: not learned yet)",
             ylabel="after learning")
    return image


def draw_matrices(results, file):
    """Rows: after which task; columns: which task is tested; cells: the score, 0-100."""
    panels = [(f"{method}, task known", mean_matrix([r["R"] for r in runs]))
              for method, runs in results.items()]
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


def averages(matrices):
    """The mean score of all tasks so far, after each task; None where some were not tested."""
    seen = [row[:t + 1] for t, row in enumerate(mean_matrix(matrices))]
    return [None if None in row else statistics.mean(row) for row in seen]


def draw_growth(results, file):
    """Average score over seen tasks, share of the pool in use and bytes, after each task."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    tasks = next(iter(results.values()))[0]["tasks"]
    x = range(1, len(tasks) + 1)
    for method, runs in results.items():
        color, line, marker = STYLES[method]
        look = {"color": color, "linestyle": line, "marker": marker, "label": method}
        axes[0].plot(x, averages([r["R"] for r in runs]), **look)
        if runs[0]["R_tail"]:
            axes[0].plot(x, averages([r["R_tail"] for r in runs]), color=color, marker="D",
                         linestyle=(0, (1, 3)), fillstyle="none", label=f"{method}, task inferred")
            used = [100 * statistics.mean(step) for step in zip(*(r["used"] for r in runs))]
            axes[1].plot(x, used, **look)
            if method == "mose":
                axes[1].plot(x, [used[0] * t for t in x], color="#999999", linestyle=":",
                             label="as much for every task")
        axes[2].plot(x, [statistics.mean(b) / 1e3 for b in zip(*(r["bytes"] for r in runs))], **look)
    axes[0].set(ylabel="average score on seen tasks, 0-100", ylim=(0, 100))
    axes[1].set(ylabel="used share of the pool, %", ylim=(0, None))
    axes[2].set(ylabel="saved adapters, kB (fp32)", ylim=(0, None))
    for axis in axes:
        axis.set_xticks(x, tasks, rotation=45, ha="right", fontsize=8)
        axis.set_xlabel("after learning")
        axis.grid(alpha=0.3)
    once = {line.get_label(): line for axis in axes for line in axis.lines}
    figure.legend(once.values(), once, loc="outside lower center", ncols=9, fontsize=8)
    figure.suptitle(title_of(results), fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def public(result):
    """Without texts of the data, which have licences of their own, and without anyone's folders."""
    kept = {key: value for key, value in result.items() if key not in ("samples", "asked")}
    places = {key: Path(result["args"][key]).name for key in ("model", "data")}
    return kept | {"args": result["args"] | places}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("places", nargs="+", metavar="runs/NAME", help="or a file made by --out")
    parser.add_argument("--out", help="where to, with the beginning of the names")
    args = parser.parse_args()
    if not args.out and any(Path(place).is_file() for place in args.places):
        parser.error("a file has no folder for the figures: say --out where they go")
    try:
        results = load(args.places)
    except ValueError as error:
        parser.error(str(error))
    start = f"{args.out}-" if args.out else f"{args.places[0]}/"
    page = f"{title_of(results)}\n\n{table(results)}\n"
    Path(f"{start}table.md").write_text(page, encoding="utf-8")
    in_a_row = {method: runs for method, runs in results.items() if len(runs[0]["R"]) > 1}
    if plt and in_a_row:
        draw_matrices(in_a_row, f"{start}matrices.png")
        draw_growth(in_a_row, f"{start}growth.png")
    if args.out:
        every = [public(result) for runs in results.values() for result in runs]
        Path(f"{args.out}.json").write_text(json.dumps(every) + "\n")
    print(f"{text(results)}\n\n{lines(results)}\n\nresults: {start}table.md"
          + (", .png" if plt and in_a_row else ""))
    for place in () if args.out else args.places:
        print(f"to look inside: {write_page(place)}")


if __name__ == "__main__":
    main()
