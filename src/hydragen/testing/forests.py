"""Forests of many small trees as one problem: one call and one set of kernels for hundreds of cases."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.inputs import Inputs
from hydragen.testing.pages import PAGE_SIZES, in_pages
from hydragen.testing.problem import Problem
from hydragen.testing.shapes import STYLES, hollow_out, row_ends, tree_parents
from hydragen.testing.strategies import SCALES, SOFTCAPS, TILE_SIZES, WINDOWS


@dataclass(frozen=True)
class Forest:
    """A problem of many cases, the case of each row, the first node of each case, and a page's size or 0."""

    problem: Problem
    case_of_row: tuple[int, ...]
    roots: tuple[int, ...]
    page_size: int = 0

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


def inputs_for(forest: Forest, inputs: Inputs) -> Inputs:
    """What an implementation is lent: a copy of the forest's tensors, in pages if it has any."""
    if forest.page_size:
        return in_pages(forest.problem, inputs, forest.page_size, forest.problem.seed)
    return inputs


def configurations(can: Capabilities, number: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """What chooses kernels: fields of `Problem` and ``page_size``, as varied as the capabilities allow.

    Every dtype in turn; where pages are a capability, every fourth configuration of each dtype has some.

    Raises
    ------
    ValueError
        If the implementation takes no forests.
    """
    if can.trees != "any":
        raise ValueError(
            f"trees must be any, got {can.trees}: hundreds of trees are one call; the laws need no such call"
        )

    def option(name: str, values: tuple[Any, ...]) -> Any:
        kind = getattr(can, name)
        given = kind == "always" or (kind == "yes" and rng.random() < 0.5)
        return values[rng.integers(len(values))] if given else (False if values == (True,) else None)

    pages = [size for size in PAGE_SIZES if size > 2]  # of 1 and 2 tokens: the laws have them
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
                "page_size": pages[index // len(can.dtypes) // 4 % len(pages)]
                if can.paged and index // len(can.dtypes) % 4 == 3
                else 0,
            }
        )
    return found


def draw_forest(
    can: Capabilities, configuration: dict[str, Any], cases: int, rng: np.random.Generator
) -> Forest:
    """Cases with one root each, hard ones as often as `problems` draws them."""
    configuration = dict(configuration)
    page_size = configuration.pop("page_size", 0)

    def integers(low: int, high: int, *shape: int) -> list[Any]:
        """For all cases at once: one by one they would take longer than a GPU needs to attend to them."""
        drawn: list[Any] = rng.integers(low, high + 1, (cases, *shape)).tolist()
        return drawn

    parents: list[int] = []
    row_to_node: list[int] = []
    kv_lens: list[int] = []
    q_lens: list[int] = []
    case_of_row: list[int] = []
    roots: list[int] = []
    drawn = zip(
        integers(0, len(STYLES) - 1),
        integers(1, can.max_nodes),
        integers(1, can.max_rows),
        integers(0, 10**6, can.max_nodes),
        integers(0, 10**6, can.max_rows),
        _lengths(can, cases, rng),
        integers(1, can.max_q_len),
        integers(0, 10**6, max(can.max_rows, can.max_nodes)),
        strict=True,
    )
    for case, (style, nodes, rows, node_codes, row_codes, drawn_lens, longest, query_codes) in enumerate(
        drawn
    ):
        topology, ends, hollow, queries = STYLES[style]
        tree = [
            max(parent, min(node, 1) - 1)
            for node, parent in enumerate(tree_parents(node_codes[:nodes], topology))
        ]
        lens = drawn_lens[:nodes]
        at = row_ends(row_codes[:rows], tree, ends)
        hollow_out(lens, tree, at[0], hollow)
        base = len(parents)
        roots.append(base)
        parents += [parent + base if parent >= 0 else -1 for parent in tree]
        kv_lens += lens
        row_to_node += [node + base for node in at]
        case_of_row += [case] * len(at)
        if queries == "as drawn":
            q_lens += [1 + code % longest for code in query_codes[: len(at)]]
        elif queries == "uniform":
            q_lens += [longest] * len(at)
        else:  # a transposed [q_len, num_heads] passes every check of shapes if the two are equal
            heads = configuration["num_q_heads"]
            q_lens += [heads if queries == "heads" and heads <= can.max_q_len else 1] * len(at)
    if not can.empty:
        kv_lens = [max(length, 1) for length in kv_lens]
    # a batch of equal rows, of which decoding is one, may take another way through an implementation
    equal = rng.integers(4)
    if can.same_q_len or equal < 2:
        q_lens = [q_lens[0] if equal else 1] * len(q_lens)
    # rows of one case need not be neighbours
    order = rng.permutation(len(q_lens)) if rng.integers(2) else range(len(q_lens))
    row_to_node, q_lens, case_of_row = ([x[row] for row in order] for x in (row_to_node, q_lens, case_of_row))
    modes = [
        mode
        for mode in can.sharpness
        if "very_negative" not in mode or (configuration["softcap"] is None and configuration["scale"] != 0)
    ]
    problem = Problem(
        tuple(parents),
        tuple(kv_lens),
        tuple(row_to_node),
        tuple(q_lens),
        **configuration,
        sharpness=modes[rng.integers(len(modes))],
        seed=int(rng.integers(2**31)),
    )
    return Forest(problem, tuple(case_of_row), tuple(roots), page_size)


def _lengths(can: Capabilities, cases: int, rng: np.random.Generator) -> list[list[int]]:
    """KV tokens of ``max_nodes`` segments a case: at most one, few, around a tile's border, any number."""
    shape = (cases, can.max_nodes)
    borders = [n for tile in TILE_SIZES for n in (tile - 1, tile, tile + 1) if n <= can.max_kv]
    kinds = [rng.integers(0, high, shape) for high in (2, 9, can.max_kv + 1)]
    kinds.append(rng.choice(borders, shape) if borders else kinds[0])
    lengths = np.choose(rng.integers(0, len(kinds), shape), kinds)
    drawn: list[list[int]] = np.minimum(lengths, can.max_kv).tolist()
    return drawn
