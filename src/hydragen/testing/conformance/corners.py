"""Sizes that are always tried, one at a time: the usual ones of models, and those around borders of tiles.

Drawn sizes are many and small, and no number of examples makes sure that 8 KV heads or 256 keys are among
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.problem import Problem

# Few: a kernel is usually compiled anew for each. Groups of one KV head are drawn often enough.
KV_HEADS = (3, 4, 5, 6, 7, 8, 9, 12, 16, 32)
GROUPS = (1, 4, 8)
LENGTHS = (63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4097)
Q_LENS = (8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
ROWS = (16, 17, 31, 32, 33, 63, 64, 65, 129)
DEPTHS = (9, 16, 17, 33)
# Of options that every call has
_ALWAYS: dict[str, Any] = {"causal": True, "window": 33, "softcap": 5.0, "scale": 1.0, "sinks": True}


def corners(can: Capabilities) -> list[Problem]:
    """Problems of an implementation's, each with one size that is not small; dtypes take turns."""
    base = _base(can)
    dtypes, modes = can.dtypes, [mode for mode in ("peaked", "flat") if mode in can.sharpness]
    found = []
    for i, changes in enumerate(_changes(can, base)):
        problem = replace(base, dtype=dtypes[i % len(dtypes)], seed=i, **changes)
        if modes:
            problem = replace(problem, sharpness=modes[i % len(modes)])
        if can.allows(problem):
            found.append(problem)
    return found


def _base(can: Capabilities) -> Problem:
    """Two rows, each with a segment of its own, below one that they share where the implementation can."""
    group = min(can.group_sizes, key=lambda size: abs(size - 2)) if can.gqa else 1
    head_dim = min(can.head_dims, key=lambda size: abs(size - 32))
    options = {name: value for name, value in _ALWAYS.items() if getattr(can, name) == "always"}
    return Problem(
        parents=(-1, -1) if can.trees == "none" else (-1, 0, 0),
        kv_lens=(5, 3) if can.trees == "none" else (5, 3, 2),
        row_to_node=(0, 1) if can.trees == "none" else (1, 2),
        q_lens=(1, 1),
        num_q_heads=group,
        head_dim=head_dim,
        head_dim_v=head_dim,
        sharpness=can.sharpness[0],
        **options,
    )


def _changes(can: Capabilities, base: Problem) -> Iterator[dict[str, Any]]:
    def sizes(name: str, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """What is wanted, or no more than a limit that the implementation has."""
        most = getattr(can, name)
        return wanted if most == getattr(Capabilities, name) else tuple(x for x in wanted if x <= most)

    for heads in sizes("max_kv_heads", KV_HEADS):
        yield {"num_kv_heads": heads, "num_q_heads": heads * base.group_size}
    for heads in sizes("max_kv_heads", (8,)) if can.gqa else ():
        for group in sorted({*can.group_sizes} & {*GROUPS, max(can.group_sizes)}):
            yield {"num_kv_heads": heads, "num_q_heads": heads * group}
    for node in (0, base.num_nodes - 1):
        for length in sizes("max_kv", LENGTHS):
            yield {"kv_lens": (*base.kv_lens[:node], length, *base.kv_lens[node + 1 :])}
    for q_len in sizes("max_q_len", Q_LENS):
        yield {"q_lens": (q_len, q_len)}
    shared = base.num_nodes - base.num_rows
    for rows in sizes("max_rows", ROWS):
        yield {
            "parents": (*base.parents[:shared], *[base.parents[-1]] * rows),
            "kv_lens": (*base.kv_lens[:shared], *[1 + row % 5 for row in range(rows)]),
            "row_to_node": tuple(range(shared, shared + rows)),
            "q_lens": (1,) * rows,
        }
    for depth in sizes("max_nodes", DEPTHS) if can.trees == "any" else ():
        # one row at the end of a chain, one in the middle
        yield {
            "parents": tuple(range(-1, depth - 1)),
            "kv_lens": tuple(1 + node % 3 for node in range(depth)),
            "row_to_node": (depth - 1, depth // 2),
        }
