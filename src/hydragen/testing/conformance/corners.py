"""Problems that are always tried: each with one size that is not small, or an option that is not round.

Drawn problems are small, and kernels are wrong where a tile, a warp, a block of pages or a counter ends. So
each such size is here once, not left to luck: with a dtype, a head size and options that change from problem
to problem by a fixed sequence of random numbers, since whatever takes turns falls into step with something
else. What is a whole number of tiles is tried in every dtype.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.problem import Problem, Sharpness

# Few: a kernel is usually compiled anew for each. Groups of one KV head are drawn often enough.
KV_HEADS = (3, 4, 5, 6, 7, 8, 9, 12, 16, 32)
# With 8 KV heads: 96 query heads and more have launch limits of their own.
GROUPS = (1, 4, 8, 12, 16)
LENGTHS = (
    63, 64, 65, 96, 127, 128, 129, 160, 176, 192, 255, 256, 257, 320, 384, 511, 512, 513, 1023, 1024, 1025,
    2047, 2048, 2049, 4097, 8200,
)  # fmt: skip
Q_LENS = (8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 192, 256, 300)
ROWS = (16, 17, 31, 32, 33, 63, 64, 65, 129, 300)
DEPTHS = (9, 16, 17, 33)
# None is a power of two or a multiple of a tile but the windows that models have.
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"window": 100},
    {"causal": True, "window": 128},
    {"softcap": 2.5},
    {"sinks": True},
    {"scale": 0.1147},
    {"causal": True, "softcap": 30.0, "sinks": True},
)
VALUES: tuple[dict[str, Any], ...] = (
    *({"softcap": cap} for cap in (0.5, 0.7, 2.5, 7.3, 12.34, 30.0)),
    *({"scale": scale} for scale in (0.0078125, 0.0883883, 0.1147, 0.25, 1.7, -0.3)),
    *({"causal": True, "window": window} for window in (1, 2, 31, 64, 100, 127, 128, 129, 160, 256)),
    *({"window": window} for window in (33, 64, 128, 151)),
)
FAMILIES = ("long_segments", "many_queries", "many_rows", "many_heads", "deep_trees", "options")
# Of options that every call has
_ALWAYS: dict[str, Any] = {"causal": True, "window": 33, "softcap": 5.0, "scale": 1.0, "sinks": True}
_LONG_HEADS = (64, 128, 96, 192, 256)
# Problems of a part: processes of pytest-xdist share them, and their kernels must be compiled
_PART = 20


def corners(can: Capabilities, family: str) -> list[Problem]:
    """Problems of one of `FAMILIES` that an implementation can do."""
    rng = random.Random(family)  # the same numbers in every run
    found = []
    for number, changes in enumerate(_changes(can, family, rng)):
        problem = _problem(can, rng, number, changes)
        if problem is not None and can.allows(problem):
            found.append(problem)
    return found


def parts(can: Capabilities, step: int = 1) -> dict[str, list[Problem]]:
    """Every `step`-th problem of all families, in parts that take about as long, by name."""
    found = {}
    for family in FAMILIES:
        chosen = corners(can, family)[::step]
        for part in range(0, len(chosen), _PART):
            found[f"{family}-{part // _PART}"] = chosen[part : part + _PART]
    return found


def _problem(can: Capabilities, rng: random.Random, number: int, changes: dict[str, Any]) -> Problem | None:
    """Two rows, each with a segment of its own, below one that they share where that can be; changed."""
    alone = can.trees == "none"
    heads = [size for size in can.head_dims if size in changes.pop("heads_like", can.head_dims)]
    head_dim = rng.choice(heads or can.head_dims)
    other = can.same_head_dim_v or rng.random() < 0.75
    group = rng.choice([size for size in can.group_sizes if size <= 8] or can.group_sizes) if can.gqa else 1
    modes: list[Sharpness] = [mode for mode in can.sharpness if mode in ("peaked", "flat")] or list(
        can.sharpness
    )
    wanted = changes.pop("options", None)
    if wanted is None:
        wanted = rng.choice(OPTIONS)
    fields: dict[str, Any] = {
        "parents": (-1, -1) if alone else (-1, 0, 0),
        "kv_lens": (5, 3) if alone else (5, 3, 2),
        "row_to_node": (0, 1) if alone else (1, 2),
        "q_lens": (1, 1),
        "num_q_heads": group,
        "head_dim": head_dim,
        "head_dim_v": head_dim if other else rng.choice(can.head_dims),
        "dtype": rng.choice(can.dtypes),
        "sharpness": rng.choice(modes),
        "seed": number,
        **_allowed(can, wanted),
    }
    try:
        return replace(Problem((-1,), (1,), (0,), (1,)), **{**fields, **changes})
    except ValueError:  # options that do not go together
        return None


def _allowed(can: Capabilities, options: dict[str, Any]) -> dict[str, Any]:
    """Those that the implementation knows, and those that it never goes without."""
    known = {name: value for name, value in options.items() if getattr(can, name) != "no"}
    return {name: value for name, value in _ALWAYS.items() if getattr(can, name) == "always"} | known


def _changes(can: Capabilities, family: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    sizes = _Sizes(can)
    if family == "long_segments":
        yield from _long_segments(can, sizes("max_kv", LENGTHS))
    elif family == "many_queries":
        yield from _many_queries(can, sizes("max_q_len", Q_LENS), rng)
    elif family == "many_rows":
        yield from _many_rows(can, sizes("max_rows", ROWS), sizes("max_nodes", ROWS))
    elif family == "many_heads":
        group = min(can.group_sizes, key=lambda size: abs(size - 2)) if can.gqa else 1
        for heads in sizes("max_kv_heads", KV_HEADS):
            yield {"num_kv_heads": heads, "num_q_heads": heads * group}
        for heads in sizes("max_kv_heads", (8,)) if can.gqa else ():
            for group in sorted({*can.group_sizes} & {*GROUPS, max(can.group_sizes)}):
                for options in ({}, {"sinks": True}):
                    yield {"num_kv_heads": heads, "num_q_heads": heads * group, "options": options}
    elif family == "deep_trees":
        for depth in sizes("max_nodes", DEPTHS) if can.trees == "any" else ():
            for options in OPTIONS[:5]:
                # one row at the end of a chain, one in the middle
                yield {
                    "parents": tuple(range(-1, depth - 1)),
                    "kv_lens": tuple(1 + node % 3 for node in range(depth)),
                    "row_to_node": (depth - 1, depth // 2),
                    "options": options,
                }
    else:
        longest = 210 if can.max_kv == Capabilities.max_kv else can.max_kv
        q_len = min(5, can.max_q_len)
        for options in VALUES:
            lens = (longest, 7) if can.trees == "none" else (longest, 3, min(9, longest))
            yield {"kv_lens": lens, "q_lens": (q_len, q_len), "options": options}


class _Sizes:
    """What is wanted, or no more than a limit that the implementation has."""

    def __init__(self, can: Capabilities) -> None:
        self.can = can

    def __call__(self, name: str, wanted: Sequence[int]) -> list[int]:
        most = getattr(self.can, name)
        return [x for x in wanted if most == getattr(Capabilities, name) or x <= most]


def _in_every_dtype(can: Capabilities, size: int, whole: int) -> list[torch.dtype | None]:
    """All dtypes for a whole number of tiles, any one for other sizes."""
    return [*can.dtypes] if size % whole == 0 else [None]


def _long_segments(can: Capabilities, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    base = (5, 3) if can.trees == "none" else (5, 3, 2)
    for length in lengths:
        # the longest once: the oracle takes its time
        for node in (0, len(base) - 1)[: 2 if length < 8000 else 1]:
            for dtype in _in_every_dtype(can, length, 64):
                kv_lens = (*base[:node], length, *base[node + 1 :])
                changes: dict[str, Any] = {"kv_lens": kv_lens} | ({} if dtype is None else {"dtype": dtype})
                changes |= {"heads_like": _LONG_HEADS} if length >= 256 else {}
                if length > 1000 and node:  # positions count here
                    q_len = min(5, can.max_q_len)
                    changes |= {"options": OPTIONS[1 + 2 * (length % 2)], "q_lens": (q_len, q_len)}
                yield changes


def _many_queries(can: Capabilities, q_lens: Sequence[int], rng: random.Random) -> Iterator[dict[str, Any]]:
    default = can.max_kv == Capabilities.max_kv
    for q_len in q_lens:
        # more queries than keys, and as many keys before them as leave positions to tell apart
        for keys in (5, q_len + 40 if default else min(can.max_kv, q_len + 40)):
            for dtype in _in_every_dtype(can, q_len, 16) if keys > 5 else [None]:
                for options in rng.sample(OPTIONS[:4], 2 if keys > 5 else 1):
                    lens = (keys, 3) if can.trees == "none" else (keys, 3, 2)
                    changes: dict[str, Any] = {"q_lens": (q_len, q_len), "kv_lens": lens, "options": options}
                    yield changes | ({} if dtype is None else {"dtype": dtype})
    for group in can.group_sizes if can.gqa else ():
        for q_len in [n for n in q_lens if n in (17, 65)] if group > 8 else ():
            yield {"q_lens": (q_len, q_len), "num_q_heads": group}


def _many_rows(can: Capabilities, rows: Sequence[int], nodes: Sequence[int]) -> Iterator[dict[str, Any]]:
    shared = can.trees != "none"
    for count in rows:
        if can.trees != "any" or count in nodes:
            yield {
                "parents": (*[-1] * shared, *[0 if shared else -1] * count),
                "kv_lens": (*[5] * shared, *[1 + row % 5 for row in range(count)]),
                "row_to_node": tuple(range(shared, shared + count)),
                "q_lens": (1,) * count,
            }
        if can.trees == "any":  # all at one node, and each at a root of its own
            yield {"parents": (-1,), "kv_lens": (37,), "row_to_node": (0,) * count, "q_lens": (1,) * count}
            if count in nodes:
                yield {
                    "parents": (-1,) * count,
                    "kv_lens": tuple(1 + row % 4 for row in range(count)),
                    "row_to_node": tuple(reversed(range(count))),
                    "q_lens": (1,) * count,
                }
