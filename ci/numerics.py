"""Errors of hydragen, of FlashAttention-2 without sharing, and of the original merge, against float64.

    ci/gpu numerics                                     the stage: every cell, on a GPU
    PYTHONPATH=src:reference python ci/numerics.py --small    a few short cells, anywhere
    python ci/numerics.py --draw ci/results/h200-numerics.json    only the figure, from what was measured

A cell is a dtype, a number of keys along each row's path, a number of levels they are cut into, a magnitude
of the values, and flat or sharp weights. In every cell the RMS error of hydragen, over all seeds together,
must be at most 1.05 times that of FlashAttention-2 as torch carries it (of SDPA's math path for float32).
Writes a table, a figure and JSON beside the results of the other stages.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import operator
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from results import ROOT, commit, machine, results_path, source_hash
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import hydragen
from hydragen.testing.adapters.original import flash, merge
from hydragen.testing.conformance.report import device_name, versions

BATCH, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 8, 2, 128
GROUP = NUM_Q_HEADS // NUM_KV_HEADS
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LENGTHS = (1, 16, 128, 1024, 8192, 32_768, 131_072)
LEVELS = (1, 2, 3, 5, 10)
MAGNITUDES = (1e-3, 1.0, 1e3)
SHARPNESS = {"flat": 1.0, "sharp": 5.0}  # standard deviation of the logits
LIMIT = 1.05
CONTENDERS = ("ours", "fa2", "original")


class Cell(NamedTuple):
    """What one line of the table is about."""

    dtype: str
    length: int
    levels: int
    magnitude: float
    sharpness: str


class Inputs(NamedTuple):
    """Queries [batch, 1, heads, dim]; per level keys and values [nodes, len, kv heads, dim]."""

    q: Tensor
    levels: list[tuple[Tensor, Tensor]]

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values along each row's path, [batch, length, kv heads, dim]."""
        parts = [[x.expand(BATCH, *x.shape[1:]) for x in pair] for pair in self.levels]
        return torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)


def cells(small: bool) -> Iterator[Cell]:
    """All cells that exist: a level has at least one key."""
    lengths = LENGTHS[:4] if small else LENGTHS
    magnitudes = MAGNITUDES[1:] if small else MAGNITUDES
    for dtype, length, levels, magnitude, sharpness in itertools.product(
        DTYPES, lengths, LEVELS[::2] if small else LEVELS, magnitudes, SHARPNESS
    ):
        if levels <= length:
            yield Cell(dtype, length, levels, magnitude, sharpness)


def draw(cell: Cell, seed: int, device: str) -> Inputs:
    """Shared levels of about equal length, and a last one that each row has for itself."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[cell.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q = normal(BATCH, 1, NUM_Q_HEADS, HEAD_DIM).to(dtype)
    levels = []
    for level in range(cell.levels):
        length = cell.length * (level + 1) // cell.levels - cell.length * level // cell.levels
        nodes = BATCH if level + 1 == cell.levels else 1
        k = normal(nodes, length, NUM_KV_HEADS, HEAD_DIM) * SHARPNESS[cell.sharpness]
        v = normal(nodes, length, NUM_KV_HEADS, HEAD_DIM) * cell.magnitude
        levels.append((k.to(dtype), v.to(dtype)))
    return Inputs(q, levels)


def exact(inputs: Inputs) -> Tensor:
    """Softmax attention in float64, [batch, heads, dim]."""
    k, v = (x.double().transpose(1, 2) for x in inputs.dense())
    q = inputs.q.double().unflatten(2, (NUM_KV_HEADS, GROUP))[:, 0]
    weights = torch.softmax(q @ k.transpose(2, 3) * HEAD_DIM**-0.5, -1)
    return (weights @ v).flatten(1, 2)


def ours(inputs: Inputs) -> Tensor:
    """hydragen with the backend that it chooses."""
    return hydragen.attention(inputs.q, inputs.levels)[:, 0]


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (x.repeat_interleave(GROUP, 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return q, k, v


def fa2(inputs: Inputs) -> Tensor:
    """The unshared problem: FlashAttention-2, or for float32, which it does not take, SDPA's math path."""
    q, k, v = _heads_first(inputs.q, *inputs.dense())
    if inputs.q.dtype != torch.float32:
        return flash(q, k, v, None)[0][:, :, 0]
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v)[:, :, 0]


def original(inputs: Inputs) -> Tensor:
    """One pass per level, partial outputs in the inputs' dtype, merged level by level in that dtype."""
    states = []
    for k, v in inputs.levels:
        q, k, v = _heads_first(inputs.q, k.expand(BATCH, -1, -1, -1), v.expand(BATCH, -1, -1, -1))
        if q.dtype == torch.float32 and q.device.type == "cuda":  # flash attention takes half types only
            logits = q @ k.transpose(2, 3) * HEAD_DIM**-0.5
            out, lse = torch.softmax(logits, -1) @ v, torch.logsumexp(logits, -1)
        else:
            out, lse = flash(q, k, v, None)
        states.append((out[:, :, 0], lse[:, :, 0]))
    result = states[0]
    for state in states[1:]:
        result = merge(result, state)
    return result[0]


def measure(cell: Cell, seeds: int, device: str) -> dict[str, float]:
    """RMS error of each contender over all seeds, relative to the RMS of the exact result."""
    run: dict[str, Callable[[Inputs], Tensor]] = {"ours": ours, "fa2": fa2, "original": original}
    squares, norm = dict.fromkeys(CONTENDERS, 0.0), 0.0
    for seed in range(seeds):
        inputs = draw(cell, seed, device)
        expected = exact(inputs)
        norm += float(expected.square().sum())
        for name, attention in run.items():
            squares[name] += float((attention(inputs).double() - expected).square().sum())
    return {name: math.sqrt(total / norm) for name, total in squares.items()}


def measure_all(chosen: list[Cell], seeds: int, device: str, processes: int) -> list[dict[str, float]]:
    """Errors of every cell, in order; several processes share the device while others compile kernels."""
    # one dtype and number of levels is one set of kernels: they stay together
    key = operator.attrgetter("dtype", "levels")
    shares = [list(share) for _, share in itertools.groupby(sorted(chosen, key=key), key)]
    run = functools.partial(_measure_share, seeds=seeds, device=device)
    if processes == 1:
        found = [run(share) for share in shares]
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
            # those with most levels have most to do
            order = sorted(range(len(shares)), key=lambda index: -shares[index][0].levels)
            futures = {index: pool.submit(run, shares[index]) for index in order}
            found = [futures[index].result() for index in range(len(shares))]
    by_cell = {
        cell: errors
        for share, of in zip(shares, found, strict=True)
        for cell, errors in zip(share, of, strict=True)
    }
    return [by_cell[cell] for cell in chosen]


def _measure_share(share: list[Cell], seeds: int, device: str) -> list[dict[str, float]]:
    return [measure(cell, seeds, device) for cell in share]


def ratio(errors: dict[str, float], of: str) -> float:
    """Error of a contender in units of FlashAttention-2's; 1 where both are exact."""
    if errors["fa2"] == 0:
        return 1.0 if errors[of] == 0 else math.inf
    return errors[of] / errors["fa2"]


def table(rows: list[dict[str, Any]]) -> str:
    """Per dtype, length and number of levels the largest ratio over magnitudes and sharpness."""
    lines = [
        "| dtype | keys | levels | our RMS error | FA2's there | ours / FA2, worst | original / FA2, worst |",
        "|---|---|---|---|---|---|---|",
    ]
    keyed = itertools.groupby(rows, key=lambda row: (row["dtype"], row["length"], row["levels"]))
    for (dtype, length, levels), group in keyed:
        members = list(group)
        worst = max(members, key=lambda row: row["ours_over_fa2"])
        lines.append(
            f"| {dtype} | {length:,} | {levels} | {worst['ours']:.2e} | {worst['fa2']:.2e} | "
            f"{worst['ours_over_fa2']:.3f} | {max(row['original_over_fa2'] for row in members):.3f} |"
        )
    return "\n".join(lines) + "\n"


def draw_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Error over length for each dtype: a line per contender, at most levels, the band over all others."""
    import matplotlib as mpl  # noqa: PLC0415 - the numbers are written where it is not installed, too

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415 - the backend must be chosen before

    names = {"ours": "hydragen", "fa2": "FlashAttention-2 (float32: SDPA math)", "original": "original merge"}
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype and row["ours"] > 0 for row in rows)]
    figure, (axes,) = plt.subplots(
        1, len(dtypes), figsize=(1 + 4 * len(dtypes), 4), sharex=True, squeeze=False
    )
    for axis, dtype in zip(axes, dtypes, strict=True):
        for number, (name, label) in enumerate(names.items()):
            of_length: dict[int, list[float]] = {}
            for row in rows:
                if row["dtype"] == dtype and row[name] > 0:
                    of_length.setdefault(row["length"], []).append(row[name])
            lengths = sorted(of_length)
            low, high = ([end(of_length[length]) for length in lengths] for end in (min, max))
            axis.plot(lengths, high, marker="o", markersize=3, color=f"C{number}", label=label)
            axis.fill_between(lengths, low, high, alpha=0.15, color=f"C{number}", linewidth=0)
        axis.set(xscale="log", yscale="log", title=dtype, xlabel="keys along the path")
    axes[0].set_ylabel("relative RMS error against float64")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure every cell, write it down, fail where hydragen is worse than it may be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="short cells only")
    parser.add_argument(
        "--processes", type=int, default=4, help="that share the device; 1: none besides this"
    )
    parser.add_argument("--draw", type=Path, metavar="JSON", help="no run: draw the figure beside this file")
    parser.add_argument("--out", type=Path, help="folder for table, figure and JSON")
    given = parser.parse_args()
    if given.draw:
        draw_figure(json.loads(given.draw.read_text())["cells"], given.draw.with_suffix(".png"))
        return
    began = time.monotonic()
    chosen = list(cells(given.small))
    rows = []
    all_errors = measure_all(chosen, given.seeds, given.device, given.processes)
    for cell, errors in zip(chosen, all_errors, strict=True):
        ratios = {f"{name}_over_fa2": ratio(errors, name) for name in ("ours", "original")}
        rows.append({**cell._asdict(), **errors, **ratios})
    on_gpu = given.device != "cpu"
    target = results_path(machine()["gpu"]) if on_gpu else ROOT / "out" / "numerics" / "cpu.json"
    folder, stem = given.out or target.parent, target.stem
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "worst_ours_over_fa2": max(row["ours_over_fa2"] for row in rows),
        "limit": LIMIT,
        "cells": rows,
        "seeds": given.seeds,
        "seconds": round(time.monotonic() - began, 1),
        "shape": {"batch": BATCH, "heads": [NUM_Q_HEADS, NUM_KV_HEADS], "head_dim": HEAD_DIM},
        "device": device_name(),
        "versions": versions(),
        "commit": commit(),
        "source": source_hash(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (folder / f"{stem}-numerics.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{stem}-numerics.md").write_text(table(rows))
    try:
        draw_figure(rows, folder / f"{stem}-numerics.png")
    except ImportError:
        print(f"no figure without matplotlib: python ci/numerics.py --draw {folder}/{stem}-numerics.json")
    # On a CPU float32 is left to the BLAS, whose order of sums, and so whose error, depends on the number of
    # rows of a product: stacked queries are not what dense attention multiplies.
    judged = [row for row in rows if on_gpu or row["dtype"] != "float32"]
    outside = [row for row in judged if row["ours_over_fa2"] > LIMIT]
    for row in outside:
        print({name: row[name] for name in (*Cell._fields, *CONTENDERS, "ours_over_fa2")})
    highest = max(row["ours_over_fa2"] for row in judged)
    print(
        f"{len(judged)} of {len(rows)} cells judged, {len(outside)} above {LIMIT}: up to {highest:.3f} x FA2"
    )
    sys.exit(bool(outside))


if __name__ == "__main__":
    main()
