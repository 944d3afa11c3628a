"""Launch choices that have no measurement yet: checked, then timed against what the library does now.

    PYTHONPATH=src:reference python tests/bench/try_prefix_tiles.py              # everything, under 8 minutes
    PYTHONPATH=src:reference python tests/bench/try_prefix_tiles.py "B256 P2048"   # shapes that match

A variant changes what tuning decides, for this process only. For each shape and variant: at least eight rows
against float64, then 30 replays of a captured graph whose partial results and output are filled with NaN
before each: all must give the same bits. Only then it is timed, in turns with the others (`timing.py`).
Shapes of S0 are the prefix alone. What each variant was expected to give stands in docs/experiments.md.
"""

import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from exact import Truth, assert_exact, solve
from facts import machine
from shapes import Inputs, Shape, build, shape
from timing import GpuTimer, sample

import hydragen
from hydragen import prefix_tiles, tuning, work
from hydragen.backends.tma import WHY_NOT

SPARE = 100  # tokens of NaN behind the prefix: a block that ends past the segment must not see them
REPLAYS = 30
SECONDS = 450.0


@dataclass(frozen=True)
class Variant:
    """What is decided otherwise; None: as the library decides.

    `tile`: a name of ALL_TILES, or "plain"; `prefix_splits`: programs that share a prefix; `suffix_keys`:
    keys of a suffix program; `suffix_heads`: its KV heads; `min_rows`: rows from which on a segment has
    the specialised tile.
    """

    name: str
    tile: str | None = None
    persistent: bool = False
    prefix_splits: int | None = None
    suffix_keys: int | None = None
    suffix_heads: int | None = None
    min_rows: int | None = None


# Compile without spills as well, and are not chosen.
MORE_TILES = {
    "narrow+1": prefix_tiles.PrefixTile(64, 3, 2, 128, 176, beside=1),
}
LAZY = {f"{name} lazy": replace(tile, lazy=True) for name, tile in prefix_tiles.PREFIX_TILES.items()}
ALL_TILES = prefix_tiles.PREFIX_TILES | MORE_TILES | LAZY
PLAIN = Variant("as it is")

# Maxima that are raised lazily: docs/experiments.md, 40.
LAZILY = [PLAIN, Variant("as it is, again"), Variant("lazy", "single lazy")]
# Several queries a row, causal among themselves: docs/experiments.md, 43.
CAUSAL = [Variant("plain", "plain"), PLAIN]
SHAPES: dict[str, list[Variant]] = {
    "32/8 B64 P4096 S128": LAZILY,
    **dict.fromkeys(
        (
            "32/8 B64 P4096 S128 q4",
            "32/8 B256 P4096 S128 q4",
            "32/8 B256 P4096 S128 q2",
            "32/8 B16 P16384 S128 q64",
            "32/8 B64 P4096 S128 q64",
            "32/32 B64 P4096 S128 q4",
            "32/8 B8 P2048 S512 q512",
            "32/8 B256 P4096 S128 q4 d64",
            "32/8 B64 P4096 S128 q4 d256",
            "8/1 B16 P8192 S128 q8",
            "32/8 B32 P8192 S128 q8",
        ),
        CAUSAL,
    ),
}


@contextmanager
def deciding(variant: Variant) -> Iterator[None]:
    """Decide as `variant` says; the library's choices are functions that work.py calls by name."""
    split_size, heads_per_program = work.split_size, work.heads_per_program

    def chosen_splits(kv_lens: Any, programs: Any, tile: Any, *rest: Any, **named: Any) -> int:
        if tile.block_m > 16 and variant.prefix_splits is not None:
            return math.ceil(int(kv_lens.max()) / variant.prefix_splits / tile.step) * tile.step
        if tile.block_m <= 16 and variant.suffix_keys is not None:
            return variant.suffix_keys
        return split_size(kv_lens, programs, tile, *rest, **named)

    def heads(*given: Any) -> int:
        small = given[5].block_m <= 16 and variant.suffix_heads is not None
        return variant.suffix_heads if small else heads_per_program(*given)

    tile: prefix_tiles.PrefixTile | None = None
    if variant.tile is not None and variant.tile != "plain":
        if WHY_NOT is not None:
            raise ImportError(f"this Triton has no Gluon as the kernel needs it: {WHY_NOT}")
        tile = replace(ALL_TILES[variant.tile], persistent=variant.persistent)

    with ExitStack() as stack:
        instead = {"split_size": chosen_splits, "heads_per_program": heads}
        for name, function in instead.items():
            stack.enter_context(set_to(work, name, function))
        if variant.tile is not None:
            stack.enter_context(set_to(tuning, "prefix_tile_for", lambda *_, **__: tile))
        if variant.min_rows is not None:
            stack.enter_context(set_to(tuning, "min_rows", lambda _: variant.min_rows))
        yield


@contextmanager
def set_to(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute that is there."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@dataclass(frozen=True, eq=False)
class Problem:
    """A shape's tensors, the prefix with unused capacity behind it that holds NaN, and the truth."""

    case: Shape
    inputs: Inputs
    levels: list[tuple[torch.Tensor, torch.Tensor]] | hydragen.PagedKV
    truth: Truth

    @classmethod
    def of(cls, case: Shape) -> "Problem":
        inputs = build(case, "cuda")
        if inputs.paged is not None:
            return cls(case, inputs, inputs.paged, solve(inputs))
        prefix = []
        for x in inputs.levels[0]:
            prefix.append(x.new_full((x.shape[0], x.shape[1] + SPARE, *x.shape[2:]), torch.nan))
            prefix[-1][:, : x.shape[1]] = x
        return cls(case, inputs, [tuple(prefix), *inputs.levels[1:]], solve(inputs))

    def plan(self, reserve: float = 1.0) -> hydragen.Plan:
        """The library's plan, as it decides now."""
        lens: Any = [[tokens] * nodes for nodes, tokens in self.case.levels]
        if self.inputs.paged is not None:
            lens = self.case.tree.kv_lens.tolist()
        sizes = {"num_q_heads": self.case.num_q_heads, "q_len": self.case.q_len}
        return hydragen.plan(self.case.tree, self.levels, kv_lens=lens, reserve=reserve, **sizes)


def checked(timer: GpuTimer, problem: Problem, plan: hydragen.Plan, name: str) -> tuple[Any, torch.Tensor]:
    """Capture a run of the plan and replay it over poison; return the graph and its output."""
    outs: list[torch.Tensor] = []
    graph = timer.ready(
        lambda: outs.append(plan.run(problem.inputs.q, problem.levels, causal=problem.case.causal))
    )
    out, first = outs[-1], None
    partials = plan._work.uploads["workspace", out.device]
    for _ in range(REPLAYS):
        for buffer in (*partials, out):
            buffer.fill_(torch.nan)
        graph.replay()
        if first is None:
            first = out.clone()
            assert_exact(problem.truth, first, name)
        elif not torch.equal(first, out):
            raise AssertionError(f"{name}: replays differ")
    return graph, out


def describe(plan: Any) -> str:
    """Each launch: rows x keys of its tile, programs."""
    parts = []
    for launch in plan.work.launches:
        tile = launch.tile
        step = tile.block_n if tile.prefix is None else tile.prefix.block_n
        parts.append(f"{tile.block_m}x{step}:{len(launch.items) * (plan.heads.num_kv_heads // launch.heads)}")
    return " ".join(parts)


def say(text: str) -> None:
    """Write a line at once: a run takes minutes."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def try_shape(timer: GpuTimer, name: str, variants: list[Variant]) -> list[dict[str, Any]]:
    """Check and time every variant on one shape; a wrong one is named and gets no time."""
    torch.cuda.empty_cache()
    case = shape(name)
    problem = Problem.of(case)
    graphs, held, found = {}, [], []
    for variant in variants:
        entry: dict[str, Any] = {"shape": name, "variant": variant.name, "roof_us": case.roof_us}
        found.append(entry)
        sys.stderr.write(f"{name}: {variant.name}\n")  # so that a kernel that hangs can be told
        try:
            with deciding(variant):
                plan = problem.plan()
                graphs[variant.name], out = checked(timer, problem, plan, variant.name)
        except Exception as error:  # noqa: BLE001 - a variant that fails is a finding, the others go on
            entry["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"
            graphs.pop(variant.name, None)
            continue
        held.append((plan, out))  # a graph's tables and buffers live as long as it is replayed
        entry["launches"] = describe(plan._work)
    times = sample(timer, graphs)
    for entry in found:
        if entry["variant"] in times:
            seconds = statistics.median(times[entry["variant"]])
            entry |= {"us": round(seconds * 1e6, 1), "tflops": round(case.flops / seconds / 1e12)}
            entry["times_roof"] = round(seconds * 1e6 / case.roof_us, 2)
    return found


def main() -> int:
    """Try all shapes whose name matches, print a table, write try_prefix_tiles.json."""
    began, pattern = time.monotonic(), sys.argv[1] if len(sys.argv) > 1 else ""
    timer, everything = GpuTimer(), []
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {WHY_NOT or 'Gluon found'}")
    for name, variants in SHAPES.items():
        if not re.search(pattern, name):
            continue
        if time.monotonic() - began > SECONDS:
            say(f"{name}: not started within {SECONDS:.0f} s")
            continue
        found = try_shape(timer, name, variants)
        everything += found
        say(f"{name}  roof {found[0]['roof_us']:.1f}  [{time.monotonic() - began:.0f} s]")
        for entry in found:
            if "us" in entry:
                text = (
                    f"{entry['us']:9.1f} us {entry['times_roof']:5.2f} x roof {entry['tflops']:4d} TFLOP/s  "
                )
                say(f"  {entry['variant']:34}{text}{entry['launches']}")
            else:
                say(f"  {entry['variant']:34}FAILED {entry['failed']}")
    out = Path("out")
    out.mkdir(exist_ok=True)
    found = {"machine": machine(torch.device("cuda")), "found": everything}
    (out / "try_prefix_tiles.json").write_text(json.dumps(found, indent=1))
    return any("failed" in entry for entry in everything)


if __name__ == "__main__":
    with torch.no_grad():
        raise SystemExit(main())
