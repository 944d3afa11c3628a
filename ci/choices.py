"""Is a plan's choice, batched or per sequence, ever slower than the better of the two? On one GPU.

python3 ci/choices.py [--seconds 500]    measure what ci/results/<gpu>-choices.json does not have yet
python3 ci/choices.py --only pairs       only a group of shapes, or those whose names have this text

Each shape is planned as the library decides ("auto"); with every segment attended once for all rows that
share it ("batched"); and with every row attended on its own, its whole path in one run that reads keys and
values where they are ("per sequence"). The forced ones are planned with either of the smallest tiles; the
faster counts. Results are checked against float64, then calls are captured and replayed in turns, the L2
cache evicted before each. A row is written as soon as it is measured; the same command goes on where a run
ended. Exit status 1 if a choice is over both limits or a shape failed. Needs PYTHONPATH=src:reference.
"""

import argparse
import csv
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from results import ROOT, commit, machine, results_path, source_hash

import hydragen
from hydragen import apart

sys.path.insert(0, str(ROOT / "tests" / "bench"))

from exact import assert_exact, solve
from shapes import Inputs, Shape, build
from suites import FIFTY_TWO, MORE
from timing import GpuTimer, sample

COLUMNS = ("shape", "auto_us", "batched_us", "per_sequence_us", "chosen", "better", "loss")
# A choice is too slow if it takes longer than the better path by more than both.
MOST_LOSS, MOST_US = 0.03, 1.0
# Bytes/s of a GPU of this class: every row reading its whole path takes about so long.
STREAM = 4e12
# Estimates from which on one tile is enough for the forced paths, and few rounds for "per sequence".
ONE_TILE_SECONDS, FEW_ROUNDS_SECONDS = 1e-3, 10e-3
say = partial(print, flush=True)
GROUPS = {
    "small": MORE["small"],
    "pairs": MORE["pairs"],
    "small batches": [shape for shape in FIFTY_TWO if shape.batch <= 64],
    "uneven": MORE["uneven"],
    "large batches": [shape for shape in FIFTY_TWO if shape.batch > 64],
}


def read_seconds(shape: Shape) -> float:
    """About how long a call takes that reads every row's whole path."""
    return shape.unshared_bytes / STREAM


def plan_for(inputs: Inputs, path: str, few: bool) -> hydragen.Plan:
    """Plan a shape for a path.

    There is no public switch. Planning decides in two places, replaced while it runs: `is_small`, which also
    takes the tile for `few` keys, and `apart_nodes`, which says what is attended within the runs below it.
    Tiles, splits and tables are then planned as for users.
    """
    shape, kv = inputs.shape, inputs.levels if inputs.packed is None else inputs.packed
    make = partial(hydragen.plan, shape.tree, kv, num_q_heads=shape.num_q_heads, backend="triton")
    if path == "auto":
        return make()

    def apart_nodes(tree: Any, queries: Any, heads: Any, tile: Any, _small: bool) -> Any:
        # None: no node is attended apart; small: all are but the last of each path
        return None if path == "batched" else apart.apart_nodes(tree, queries, heads, tile, small=True)

    with mock.patch.multiple("hydragen.work", is_small=lambda *_: few, apart_nodes=apart_nodes):
        plan = make()
    if path_of(plan) not in (path, "either"):
        raise RuntimeError(f"{shape} is planned as {path_of(plan)} in place of {path}")
    return plan


def path_of(plan: hydragen.Plan) -> str:
    """Which path a plan takes, as `explain` says it; either, if no segment has several rows."""
    batched = {segment.batched for segment in plan.explain().segments if segment.num_rows > 1}
    if len(batched) == 2:
        return "mixed"
    return {True: "batched", False: "per_sequence"}[batched.pop()] if batched else "either"


def measure(shape: Shape, timer: Any, device: str) -> dict[str, Any]:
    """One row; AssertionError if a result is wrong: then nothing is timed."""
    inputs = build(shape, device)
    truth, packed = solve(inputs), inputs.packed
    kv = inputs.levels if packed is None else (packed.k, packed.v)
    tiles = (False, True) if read_seconds(shape) < ONE_TILE_SECONDS else (False,)
    ready, chosen = {}, ""
    for path, few in [
        ("auto", False),
        *((path, few) for path in ("batched", "per_sequence") for few in tiles),
    ]:
        plan = plan_for(inputs, path, few)
        chosen = chosen or path_of(plan)
        run = partial(plan.run, inputs.q, kv)
        assert_exact(truth, run(), f"{path}{' few' * few}")
        ready[path, few] = timer.ready(run)
    long = [key for key in ready if "per_sequence" in key and read_seconds(shape) > FEW_ROUNDS_SECONDS]
    samples = sample(timer, {key: ready[key] for key in ready if key not in long})
    samples |= sample(timer, {key: ready[key] for key in long}, least=1)
    medians = {key: statistics.median(times) * 1e6 for key, times in samples.items()}
    forms = {f"{path}{' few' * few}": round(us, 2) for (path, few), us in medians.items()}
    return {**judged(shape.name, medians, chosen), "forms": forms}


def judged(name: str, medians: dict[tuple[str, bool], float], chosen: str) -> dict[str, Any]:
    """The columns of a row, from the µs of each path and tile; `loss`: the part by which auto is slower."""
    best: dict[str, float] = {}
    for (path, _), us in medians.items():
        best[path] = min(us, best.get(path, us))
    better = min(("batched", "per_sequence"), key=best.__getitem__)
    times = {f"{path}_us": round(us, 2) for path, us in best.items()}
    loss = round(best["auto"] / best[better] - 1, 4)
    return {"shape": name, **times, "chosen": chosen, "better": better, "loss": loss}


def too_slow(row: dict[str, Any]) -> bool:
    """Whether the choice loses more than both limits."""
    return row["loss"] > MOST_LOSS and row["auto_us"] - row[f"{row['better']}_us"] > MOST_US


def measure_all(shapes: list[Shape], timer: Any, device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows, one after another; of a shape that fails, the reason. None begins when time is nearly over."""
    began = time.monotonic()
    for number, shape in enumerate(shapes):
        if time.monotonic() - began + 20 * read_seconds(shape) > 0.9 * seconds:
            say(f"{len(shapes) - number} shapes not begun within {seconds:.0f} s; the same command goes on")
            return
        gc.collect()
        torch.cuda.empty_cache()
        try:
            row = measure(shape, timer, device)
        except Exception as error:  # noqa: BLE001 - whatever fails is a finding; the other shapes go on
            row = {"shape": shape.name, "failed": f"{type(error).__name__}: {error}"[:400]}
        say(line(row))
        yield row


def line(row: dict[str, Any]) -> str:
    """A row to be read."""
    if "failed" in row:
        return f"{row['shape']:29} FAILED {row['failed']}"
    times = [f"{path} {row[f'{path}_us']:9.1f}" for path in ("auto", "batched", "per_sequence")]
    chosen = f"{row['chosen']:12} {row['loss']:+7.1%}{' OVER' * too_slow(row)}"
    return f"{row['shape']:29} {'  '.join(times)} us  took {chosen}"


def main(timer: Any = None, device: str = "cuda") -> None:
    """Measure what is missing, write it down, say where the choice was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=500, help="begin no shape when this is nearly over")
    parser.add_argument("--only", default="", help=f"{', '.join(GROUPS)}; or a part of a shape's name")
    parser.add_argument("--out", type=Path, help="default: ci/results/<gpu>-choices.json; a CSV is beside it")
    given = parser.parse_args()
    about: dict[str, str] = {"source": source_hash(), "commit": commit(), "command": " ".join(sys.argv)}
    if timer is None:
        if not torch.cuda.is_available():
            sys.exit("ci/choices.py: there is no GPU here")
        timer, about = GpuTimer(), about | machine()
    of_gpu = Path() if given.out else results_path(about["gpu"])
    out: Path = given.out or of_gpu.with_name(f"{of_gpu.stem}-choices.json")
    before = json.loads(out.read_text()) if out.exists() else {"about": {}, "rows": []}
    # times of another source do not stand beside those of this one; what failed is tried again
    same = before["about"].get("source") == about["source"]
    rows = [row for row in before["rows"] if same and "failed" not in row]
    shapes = [(group, shape) for group, shapes in GROUPS.items() for shape in shapes]
    shapes = [shape for group, shape in shapes if given.only == group or given.only in shape.name]
    missing = [shape for shape in shapes if shape.name not in {row["shape"] for row in rows}]
    out.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for row in measure_all(missing, timer, device, given.seconds):
            rows.append(row)
            out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    done = sorted((row for row in rows if "failed" not in row), key=lambda row: -row["loss"])
    with out.with_suffix(".csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(row for row in rows if "failed" not in row)
    say("\n".join(["", "the largest losses:", *map(line, done[:10])]))
    over, failed = sum(too_slow(row) for row in done), len(rows) - len(done)
    say(f"\n{over} of {len(done)} shapes over {MOST_LOSS:.0%} and {MOST_US} us, {failed} failed\n{out}")
    sys.exit(bool(over or failed))


if __name__ == "__main__":
    main()
