"""The end-to-end table on one GPU, and its goals: CodeLlama-13b and Llama-3.1-8B, random weights, bf16.

python3 ci/generation.py [--seconds 270]    measure what ci/results/<gpu>-generation.csv does not have yet
python3 ci/generation.py --goals            only print the goals, from the results that are there

Rows are written as they are measured, the most important first; the same command goes on where a run ended.
Needs torch, transformers and accelerate, and PYTHONPATH=src:reference or an installed hydragen.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import commit, machine, results_path, source_hash

from hydragen.transformers.bench import run
from hydragen.transformers.bench_cases import Case, random_model
from hydragen.transformers.bench_files import Results

CONFIGS = Path(__file__).resolve().parent.parent / "examples" / "configs"
LARGE, SMALL = "codellama-13b", "llama-3.1-8b"
MEMORY_TB_S = 4.31  # of an H200, as measured (tests/bench/peers_h200.csv)
LONGEST = 16256  # with 128 new tokens, all of the 16,384 positions
CASES = [
    Case(LARGE, 512, LONGEST),
    Case(LARGE, 256, 1024),
    Case(LARGE, 256, 2048, whole=True),
    Case(LARGE, 256, LONGEST),
    Case(LARGE, 32, 2048, hf=True, whole=True),
    Case(SMALL, 256, 2048, hf=True),
    Case(SMALL, 256, LONGEST),
    Case(SMALL, 512, 2048, branches=8, branch=2048),
    Case(SMALL, 256, 65536),
    Case(SMALL, 32, 2048, hf=True),
    Case(SMALL, 32, LONGEST, hf=True),
    Case(SMALL, 1024, 2048),
    Case(SMALL, 1024, LONGEST),
    Case(LARGE, 32, 1024, hf=True),
    Case(LARGE, 32, LONGEST),
    *(Case(LARGE, batch, prefix) for batch in (64, 128) for prefix in (1024, 2048, LONGEST)),
    Case(LARGE, 512, 1024),
    Case(LARGE, 512, 2048),
]


def goals(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, bool | None]]:
    """Each goal, what was measured, and whether it is met: None without rows, or where nothing is asked."""

    def get(model: str, batch: int, prefix: int, branches: int = 0) -> dict[str, Any] | None:
        found = [
            row
            for row in rows
            if (row["model"], row["batch"], row["prefix"], row["branches"])
            == (model, batch, prefix, branches)
        ]
        return found[-1] if found else None

    def ratio(row: dict[str, Any] | None, above: str, below: str) -> float | None:
        return row[above] / row[below] if row and row[above] and row[below] else None

    def goal(text: str, value: float | None, style: str, met: bool | None) -> tuple[str, str, bool | None]:
        return text, "not measured" if value is None else format(value, style), met if value else None

    x = ratio(get(LARGE, 512, LONGEST), "ours", "per_sequence_read")
    yield goal("13b, batch 512, prefix 16K: at least 32 x the per-sequence read", x, ".1f", (x or 0) >= 32)
    x = _from_memory(get(LARGE, 512, LONGEST))
    yield goal(
        f"the same, if that read went at the memory's {MEMORY_TB_S} TB/s, without caches", x, ".1f", None
    )
    for model in (LARGE, SMALL):
        for prefix in (2048, LONGEST):
            row = get(model, 256, prefix)
            x = None
            if row and row["ours"] and row["attention_off"] and row["details"].get("roof_s"):
                attention = row["batch"] / row["ours"] - row["batch"] / row["attention_off"]
                x = attention / row["details"]["roof_s"]
            text = f"{model}, batch 256, prefix {prefix:,}: attention takes at most 1.5 x its joint roof"
            yield goal(text, x, ".2f", (x or 9) <= 1.5)
    row = get(LARGE, 32, 2048)
    x = ratio(row, "ours", "attention_off")
    yield goal("13b, batch 32, prefix 2K: at least 0.85 of attention off", x, ".3f", (x or 0) >= 0.85)
    short, long = get(LARGE, 256, 1024), get(LARGE, 256, LONGEST)
    for name, text in (
        ("ours", "13b, batch 256, prefix 1K to 16K: ours falls by at most 25 %"),
        ("per_sequence_read", "the same: the per-sequence read falls by over 90 %"),
    ):
        x = 1 - long[name] / short[name] if short and long and short[name] and long[name] else None
        yield goal(text, x, ".1%", x is not None and (x <= 0.25 if name == "ours" else x > 0.9))
    x = ratio(get(SMALL, 512, 2048, 8), "first_level_only", "ours")
    text = "8b, tree 2,048 > 8 x 2,048 > 64 each: at most 45 % of the time of sharing the first level only"
    yield goal(text, x, ".1%", (x or 9) <= 0.45)
    x = ratio(get(SMALL, 256, 65536), "ours", "per_sequence_read")
    yield goal("8b, 64K tokens, 256 questions: times the per-sequence read", x, ".1f", None)
    if row:
        step = row["details"]["step"]["ours"]
        x = step["host_seconds"] / step["seconds"]
        yield goal("13b, batch 32: the host's share of a step is below 1", x, ".3f", x < 1 and step["graph"])


def _from_memory(row: dict[str, Any] | None) -> float | None:
    """How many times the per-sequence read, if caches did not serve what all sequences read at once."""
    if not row or not all(row[name] for name in ("ours", "attention_off", "per_sequence_read", "read_tb_s")):
        return None
    off, read = (row["batch"] / row[name] for name in ("attention_off", "per_sequence_read"))
    return (off + (read - off) * row["read_tb_s"] / MEMORY_TB_S) * row["ours"] / row["batch"]


def main() -> None:
    """Measure, and say which goals are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=270, help="begin no row when this is nearly over")
    parser.add_argument("--out", type=Path, help="default: ci/results/<gpu>-generation.csv")
    parser.add_argument("--goals", action="store_true", help="measure nothing")
    given = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and given.out is None:
        sys.exit("ci/generation.py: there is no GPU here; with --goals --out FILE.csv it reads results")
    out = given.out
    if out is None:
        of_gpu = results_path(machine()["gpu"])
        out = of_gpu.with_name(f"{of_gpu.stem}-generation.csv")
    about = {"command": " ".join(sys.argv), "source": source_hash(), "commit": commit()}
    if gpu:
        about |= machine()
    results = Results(out, about)
    if not given.goals:
        if not gpu:
            sys.exit("ci/generation.py: there is no GPU here")
        run(
            CASES,
            lambda name: random_model(CONFIGS / f"{name}.json", None, "cuda"),
            results,
            seconds=given.seconds,
            say=partial(print, flush=True),
        )
    print()
    for text, value, met in goals(results.rows):
        print(f"{'    -' if met is None else '  met' if met else 'MISSED'}".rjust(6), f"{value:>12}  {text}")
    print(f"\n{out}\n{out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
