"""The README's figure: time over prefix length and over batch, beside the baselines and the roof.

python ci/figure.py [ci/results/h200.json] [docs/h200.png]
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from bench_results import cells_of

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"32/8 B(\d+) P(\d+) S128")
BATCH, PREFIX = 256, 16384
# name in the results -> label, colour, marker
BASELINES = {
    "fa2": ("FlashAttention-2, not shared", "tab:red", "s"),
    "cudnn": ("cuDNN, not shared", "tab:orange", "^"),
    "original": ("original Hydragen algorithm (FlashAttention-2)", "tab:purple", "D"),
}

Curves = dict[str, list[tuple[int, float]]]


def curves(cells: list[dict[str, Any]], *, over: str) -> Curves:
    """(prefix length or batch, µs) per line, rising, for what varies: "prefix" or "batch"."""
    found: Curves = {"hydragen": [], "roof": [], **{name: [] for name in BASELINES}}
    for cell in cells:
        if not (match := NAME.fullmatch(cell["shape"])):
            continue
        batch, prefix = map(int, match.groups())
        if (batch if over == "prefix" else prefix) != (BATCH if over == "prefix" else PREFIX):
            continue
        x = prefix if over == "prefix" else batch
        found["hydragen"].append((x, cell["us"]))
        found["roof"].append((x, cell["roof_us"]))
        for name in BASELINES:
            if "us" in (entry := cell["baselines"].get(name, {})):
                found[name].append((x, entry["us"]))
    return {name: sorted(points) for name, points in found.items()}


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the picture; ValueError if the results have nothing to draw."""
    cells = cells_of(results)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    panels = (
        ("prefix", f"batch {BATCH}, suffix 128", "tokens in the shared prefix"),
        ("batch", f"prefix {PREFIX:,}, suffix 128", "sequences that share the prefix"),
    )
    for axis, (over, title, label) in zip(axes, panels, strict=True):
        lines = curves(cells, over=over)
        if not lines["hydragen"]:
            raise ValueError(
                f"no results for 32/8 heads, {title}: run the stages bench-52 and bench-more of ci/gpu"
            )
        for name, (text, colour, marker) in BASELINES.items():
            if lines[name]:
                axis.plot(
                    *zip(*lines[name], strict=True), marker, color=colour, ls="-", ms=4, lw=1.2, label=text
                )
        axis.plot(
            *zip(*lines["hydragen"], strict=True), "o-", color="tab:blue", ms=5, lw=2.2, label="hydragen"
        )
        axis.plot(*zip(*lines["roof"], strict=True), color="black", ls=":", lw=1.4, label="roof of an H200")
        axis.set(xscale="log", yscale="log", title=title, xlabel=label)
        ticks = sorted({x for x, _ in lines["hydragen"]})
        axis.set_xticks(ticks, [f"{x // 1024}K" if x >= 1024 else str(x) for x in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("µs per attention call")
    device = next(iter(cells)).get("run", {}).get("device", "GPU")
    figure.suptitle(f"Decoding on one {device}: bf16, 32 query heads, 8 KV heads, head_dim 128", fontsize=11)
    handles = {
        label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "ci" / "results" / "h200.json"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / f"{source.stem}.png"
    draw(json.loads(source.read_text()), target)
    print(f"written to {target}")
