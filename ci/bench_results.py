"""Cells of benchmark stages: merged run by run, and written as h200.csv and h200.md beside h200.json.

python ci/bench_results.py ci/results/h200.json     write both again
"""

import csv
import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PEERS = Path(__file__).resolve().parent.parent / "tests" / "bench" / "peers_h200.csv"
# What may be measured of noise: against a time of another run, and against one of the same run.
NOISE_PEER = 1.02
NOISE_RATIO, NOISE_US = 1.03, 1.0

Cell = dict[str, Any]


def peer_names() -> list[str]:
    """The 52 shapes, in their order."""
    lines = [line for line in PEERS.read_text().splitlines() if not line.startswith("#")]
    return [row["shape"] for row in csv.DictReader(lines)]


def merged(old: Iterable[Cell], new: Iterable[Cell]) -> list[Cell]:
    """One cell a shape, the newer one, with the shapes of peers_h200.csv first and in that file's order."""
    cells = {cell["shape"]: cell for cell in [*old, *new]}
    first = [name for name in peer_names() if name in cells]
    return [cells[name] for name in dict.fromkeys([*first, *cells])]


def cells_of(results: dict[str, Any]) -> list[Cell]:
    """Every cell of every stage."""
    found = [cell for stage in results["stages"].values() for cell in stage.get("benchmarks", [])]
    return merged([], (cell for cell in found if "shape" in cell))


def geomean(ratios: Iterable[float]) -> float:
    """Geometric mean; NaN of nothing."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def csv_text(cells: list[Cell]) -> str:
    """Columns shape, us, roof_us."""
    return "".join(
        ["shape,us,roof_us\n", *(f"{c['shape']},{c['us']:.2f},{float(c['roof_us'])}\n" for c in cells)]
    )


def slower_than_unshared(cell: Cell) -> bool:
    """Whether the best torch kernel that does not share is faster by more than the noise."""
    best = cell["best_unshared"]["us"]
    return cell["us"] > best * NOISE_RATIO and cell["us"] > best + NOISE_US


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head, the first column is text, the others are numbers."""
    head, *body = rows
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, rule, *body])


def against_peers(cells: list[Cell]) -> str:
    """The 52 shapes beside their roof and the best peer of another run."""
    known = [cell for cell in cells if "best_peer_of_another_run" in cell]
    if not known:
        return ""
    rows = [["shape", "µs", "roof µs", "× roof", "best peer", "its µs", "our time / its"]]
    behind = []
    for cell in known:
        peer = cell["best_peer_of_another_run"]
        if cell["us"] > peer["us"] * NOISE_PEER:
            behind.append(cell["shape"])
        rows.append(
            [cell["shape"], f"{cell['us']:.1f}", f"{cell['roof_us']:.1f}", f"{cell['times_roof']:.2f}"]
            + [peer["name"], f"{peer['us']:.1f}", f"{peer['time_ratio']:.2f}"]
        )
    means = [
        f"{name} {geomean(cell['times_roof'] for cell in known if cell['shape'].startswith(heads)):.3f}"
        for name, heads in (("all", ""), ("32/8 heads", "32/8"), ("32/32 heads", "32/32"))
    ]
    return (
        f"## {len(known)} of {len(peer_names())} shapes beside the best of 17 peers\n\n"
        "The peers were measured in another run, on a machine of the same type "
        "(`tests/bench/peers_h200.csv`); the roof is that file's.\n\n"
        f"Geometric mean of time / roof: {', '.join(means)}. "
        f"Slower than the best peer by more than 2 %: {len(behind)} of {len(known)}.\n\n{table(rows)}\n"
    )


def host_us(cell: Cell) -> dict[str, float]:
    """What calls cost the host; earlier runs measured `attention` only."""
    found = cell["host_us"]
    return found if isinstance(found, dict) else {"attention": found}


def against_torch(cells: list[Cell]) -> str:
    """Every shape beside what ran in the same process: without sharing, and the original algorithm."""
    rows = [["shape", "µs", "fa2", "cudnn", "original", "flex", "our time / best without sharing"]]
    rows[0] += ["batch-invariant µs", "host: attention µs", "a plan's run µs", "its launches µs"]
    slower, compared = [], 0
    for cell in cells:
        times = [
            f"{entry['us']:.1f}" if "us" in (entry := cell["baselines"].get(name, {})) else "–"
            for name in rows[0][2:6]
        ]
        verdict = (
            "does not fit"
            if any("copied keys" in str(entry) for entry in cell["baselines"].values())
            else "–"
        )
        if "best_unshared" in cell:
            compared += 1
            verdict = f"{cell['best_unshared']['time_ratio']:.3f}"
            if slower_than_unshared(cell):
                slower.append(cell["shape"])
                verdict += " **slower**"
        host = [f"{x:.0f}" if x else "–" for x in map(host_us(cell).get, ("attention", "run", "launches"))]
        invariant = f"{cell['batch_invariant_us']:.1f}" if "batch_invariant_us" in cell else "–"
        rows.append([cell["shape"], f"{cell['us']:.1f}", *times, verdict, invariant, *host])
    costs = [cost for cell in cells if "run" in (cost := host_us(cell))]
    beyond = (
        f"; a run of a ready plan takes {statistics.median(c['run'] - c['launches'] for c in costs):.0f} µs "
        "more than its launches in the median"
        if costs
        else ""
    )
    return (
        "## Never slower than not sharing\n\n"
        "All times of a line are from one process, in turns; torch's FlashAttention-2 and cuDNN read a copy "
        "of the prefix for every sequence. Host: until control is back, with Triton's own launcher in all "
        f"three{beyond}.\n\n"
        f"Slower than the best that does not share, by more than 3 % and 1 µs: {len(slower)} of {compared}"
        f"{': ' + ', '.join(slower) if slower else ''}.\n\n{table(rows)}"
    )


def markdown(results: dict[str, Any]) -> str:
    """The results for readers."""
    cells = cells_of(results)
    runs = dict.fromkeys(json.dumps(cell.get("run", {}), sort_keys=True) for cell in cells)
    lines = [
        "# Time on a GPU\n\nWritten by `ci/gpu`; medians of CUDA-graph replays with a cold L2 cache.\n\n"
    ]
    for run in map(json.loads, runs):
        ceilings = run.pop("ceilings", {})
        lines.append(
            "- " + ", ".join(f"{name} {value}" for name, value in {**run, **ceilings}.items()) + "\n"
        )
    failed = [name for name, stage in results["stages"].items() if not stage.get("ok")]
    if failed:
        lines.append(f"\n**Not green:** {', '.join(failed)}\n")
    return "".join([*lines, "\n", against_peers(cells), against_torch(cells)])


def write_tables(results: dict[str, Any], path: Path) -> None:
    """Write the tables beside the results file `path`."""
    cells = cells_of(results)
    if cells:
        path.with_suffix(".csv").write_text(csv_text(cells))
        path.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    write_tables(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]))
