"""Forests of many small trees as one problem: one call and one set of kernels for hundreds of cases."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.problem import Problem
from hydragen.testing.shapes import STYLES, hollow_out, row_ends, tree_parents
from hydragen.testing.strategies import SCALES, SOFTCAPS, TILE_SIZES, WINDOWS


@dataclass(frozen=True)
class Forest:
    """A problem of many cases, and the case of each row."""

    problem: Problem
    case_of_row: tuple[int, ...]
    roots: tuple[int, ...]

    def case(self, number: int) -> Problem:
        """One case as a problem of its own, with other values."""
        first = self.roots[number]
        last = [*self.roots, self.problem.num_nodes][number + 1]
        rows = [row for row, case in enumerate(self.case_of_row) if case == number]
        return dataclasses.replace(
            self.problem,
            parents=tuple(max(parent - first, -1) for parent in self.problem.parents[first:last]),
            kv_lens=self.problem.kv_lens[first:last],
            row_to_node=tuple(self.problem.row_to_node[row] - first for row in rows),
            q_lens=tuple(self.problem.q_lens[row] for row in rows),
        )


def configurations(can: Capabilities, number: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Fields of `Problem` that choose kernels, as varied as the capabilities allow; every dtype in turn."""

    def option(name: str, values: tuple[Any, ...]) -> Any:
        kind = getattr(can, name)
        given = kind == "always" or (kind == "yes" and rng.random() < 0.5)
        return values[rng.integers(len(values))] if given else (False if values == (True,) else None)

    found = []
    for index in range(number):
        kv_heads = int(rng.integers(1, can.max_kv_heads + 1))
        group = int(rng.choice(can.group_sizes if can.gqa else (1,)))
        head_dim = can.head_dims[index // len(can.dtypes) % len(can.head_dims)]
        alike = can.same_head_dim_v or rng.random() < 0.7
        found.append(
            {
                "num_q_heads": kv_heads * group,
                "num_kv_heads": kv_heads,
                "head_dim": head_dim,
                "head_dim_v": head_dim if alike else int(rng.choice(can.head_dims)),
                "dtype": can.dtypes[index % len(can.dtypes)],
                "causal": option("causal", (True,)),
                "window": option("window", WINDOWS),
                "softcap": option("softcap", SOFTCAPS),
                "scale": option("scale", SCALES),
                "sinks": option("sinks", (True,)),
            }
        )
    return found


def draw_forest(
    can: Capabilities, configuration: dict[str, Any], cases: int, rng: np.random.Generator
) -> Forest:
    """Cases with one root each, hard ones as often as `problems` draws them."""
    borders = [n for tile in TILE_SIZES for n in (tile - 1, tile, tile + 1) if n <= can.max_kv]
    least = 0 if can.empty else 1
    parents: list[int] = []
    kv_lens: list[int] = []
    row_to_node: list[int] = []
    q_lens: list[int] = []
    case_of_row: list[int] = []
    roots: list[int] = []
    for case in range(cases):
        topology, ends, hollow, queries = STYLES[rng.integers(len(STYLES))]
        nodes, rows = int(rng.integers(1, can.max_nodes + 1)), int(rng.integers(1, can.max_rows + 1))
        node_codes, row_codes = (rng.integers(0, 10**6, size).tolist() for size in (nodes, rows))
        tree = [
            max(parent, min(node, 1) - 1) for node, parent in enumerate(tree_parents(node_codes, topology))
        ]
        lens = [
            int(
                (
                    rng.integers(0, 2),
                    rng.integers(0, 9),
                    rng.choice(borders),
                    rng.integers(0, can.max_kv + 1),
                )[rng.integers(4)]
            )
            for _ in range(nodes)
        ]
        at = row_ends(row_codes, tree, ends)
        hollow_out(lens, tree, at[0], hollow)
        length = int(rng.integers(1, can.max_q_len + 1))
        base = len(parents)
        roots.append(base)
        parents += [parent + base if parent >= 0 else -1 for parent in tree]
        kv_lens += [max(min(kv_len, can.max_kv), least) for kv_len in lens]
        row_to_node += [node + base for node in at]
        q_lens += [
            1
            if queries in ("one", "heads")
            else length
            if queries == "uniform"
            else int(rng.integers(1, length + 1))
            for _ in at
        ]
        case_of_row += [case] * len(at)
    modes = [
        mode
        for mode in can.sharpness
        if "very_negative" not in mode or (configuration["softcap"] is None and configuration["scale"] != 0)
    ]
    if can.same_q_len:
        q_lens = [q_lens[0]] * len(q_lens)
    problem = Problem(
        tuple(parents),
        tuple(kv_lens),
        tuple(row_to_node),
        tuple(q_lens),
        **configuration,
        sharpness=modes[rng.integers(len(modes))],
        seed=int(rng.integers(2**31)),
    )
    return Forest(problem, tuple(case_of_row), tuple(roots))
