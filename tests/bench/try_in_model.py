"""Prefix tiles within the decode step of a whole model, where the device is at its limit of power.

    PYTHONPATH=src:reference python tests/bench/try_in_model.py codellama-13b 256 16256 wide narrow+2

A model of examples/configs with random weights, the rows' own tokens as ci/generation.py has them. Each tile,
"wide/2" with two splits, is timed in turns, twice, beside attention switched off; what attention takes is
given as a multiple of its joint roof. "chosen" is what the library chooses. What each was expected to give
stands in docs/experiments.md.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from try_prefix_tiles import Variant, deciding, say

from hydragen.transformers.arms import attention_replaced, switched_off
from hydragen.transformers.bench_cases import Case, Prefixes, random_model
from hydragen.transformers.cache import PrefixCache
from hydragen.transformers.timing import StepTime, roof_seconds, time_step

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "configs"
SECONDS = 0.7


def step(cache: PrefixCache, completion: int, name: str) -> tuple[StepTime, float]:
    """Time a decode step with one tile, or without attention; and the roof of its attention."""
    tile, _, splits = name.partition("/")
    persistent = tile.startswith(("wide", "narrow"))
    variant = Variant(name, tile, persistent=persistent, prefix_splits=int(splits) if splits else None)
    chosen = nullcontext() if name in ("chosen", "off") else deciding(variant)
    way = attention_replaced(switched_off) if name == "off" else nullcontext()
    with chosen, way:
        found = time_step(cache, completion, SECONDS)
    roof = roof_seconds(cache, found.lengths)
    cache.reset()
    return found, float("nan") if roof is None else roof


def main() -> None:
    """Time every tile that is named."""
    model, batch, prefix, *names = sys.argv[1:]
    case = Case(model, int(batch), int(prefix))
    prefixes = Prefixes(model, random_model(CONFIGS / f"{model}.json", None, "cuda"))
    cache = prefixes.of(case)[1].fork(case.batch)
    for _ in range(2):
        off, _ = step(cache, case.completion, "off")
        say(f"{model} B{batch} P{prefix}: off {off.seconds * 1e3:.3f} ms")
        for name in ("chosen", *names):
            found, roof = step(cache, case.completion, name)
            attention = found.seconds - off.seconds
            taken = f"{found.seconds * 1e3:8.3f} ms, attention {attention * 1e3:7.3f} ms"
            say(f"  {name:24}{taken}, {attention / roof:.3f} x roof")


if __name__ == "__main__":
    with torch.no_grad():
        main()
