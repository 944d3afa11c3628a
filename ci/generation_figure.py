"""The figure of ci/results/h200-generation.csv: decode throughput over prefix length, and over batch.

python ci/generation_figure.py [ci/results/h200-generation.csv] [docs/h200-generation.png]
"""

import csv
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
# column -> label, colour, marker
WAYS = {
    "ours": ("hydragen", "tab:blue", "o"),
    "attention_off": ("attention switched off", "tab:gray", "x"),
    "bound": ("bound: attention off + roof", "black", "_"),
    "per_sequence_read": ("prefix stored once, read per sequence", "tab:red", "s"),
    "hf_generate": ("transformers, prefix copied", "tab:orange", "^"),
}
BATCH, PREFIX = 256, 2048


def main() -> None:
    """Draw a row of two panels per model."""
    source = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "ci/results/h200-generation.csv")
    target = Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "docs/h200-generation.png")
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(
        len(models), 2, figsize=(10, 3.6 * len(models)), squeeze=False, layout="constrained"
    )
    for model, line in zip(models, panels, strict=True):
        for axes, over, fixed, value in (
            (line[0], "prefix", "batch", BATCH),
            (line[1], "batch", "prefix", PREFIX),
        ):
            points = [row for row in rows if row["model"] == model and int(row[fixed]) == value]
            points.sort(key=lambda row: int(row[over]))
            for column, (label, colour, marker) in WAYS.items():
                xy = [(int(row[over]), float(row[column])) for row in points if row[column]]
                if xy:
                    axes.plot(*zip(*xy, strict=True), marker=marker, color=colour, label=label)
            axes.set(xlabel=over, ylabel="decode tokens/s", xscale="log", yscale="log")
            axes.set_title(f"{model}, {fixed} {value:,}", fontsize=10)
            axes.grid(alpha=0.3)
            measured = sorted({int(row[over]) for row in points})
            axes.set_xticks(measured, [f"{x:,}" for x in measured])
            axes.set_xticks([], minor=True)
    # each way once, whichever panel has it
    shown = {
        label: line
        for axes in panels.flat
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        shown.values(), shown.keys(), frameon=False, fontsize=8, ncols=3, loc="outside lower center"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    print(target)


if __name__ == "__main__":
    main()
