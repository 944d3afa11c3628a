"""Runs of segments: rows that walk several of them in one program, whole or split, of any lengths."""

import time
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from judged import check

from hydragen import PrefixTree, api, work
from hydragen.queries import Queries
from hydragen.runs import find_runs
from hydragen.testing import Problem

HEADS = {"num_q_heads": 4, "num_kv_heads": 1}
PROBLEMS = {
    # a split that begins within the first segment and goes on with the second from its beginning
    "split across two": Problem((-1, 0), (65, 23), (1,), (1,), **HEADS, head_dim=64, head_dim_v=64),
    "one key over": Problem((-1, 0), (81, 1), (1,), (1,), **HEADS, head_dim=128, head_dim_v=128),
    "three": Problem((-1, 0, 1), (503, 6, 564), (2,), (1,), **HEADS, head_dim=64, head_dim_v=64),
    "ten, shared by all rows but for the last": Problem(
        (-1, *range(8), *[8] * 4), (*[103] * 9, 97, 30, 0, 64), (9, 10, 11, 12), (1,) * 4, 4, 2, 64, 64
    ),
    "empty ones between": Problem(
        (-1, 0, 1, 2), (70, 0, 0, 90), (3,), (1,), **HEADS, head_dim=64, head_dim_v=64
    ),
    "small, a row each": Problem((-1, 0, 0, 0), (40, 21, 0, 3), (1, 2, 3), (1,) * 3, 4, 2, 64, 64),
    "rows that end above others": Problem((-1, 0, 1), (33, 20, 40), (0, 2, 1), (1,) * 3, 4, 2, 64, 64),
}
SMALL = {"small, a row each", "rows that end above others"}  # for a device of more than four multiprocessors


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 50}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["packed", "levels"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_as_the_oracle(
    name: str, layout: str, dtype: torch.dtype, options: dict[str, object], backend: str,
    device: torch.device, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if name in SMALL:
        monkeypatch.setattr(work, "is_small", lambda *_: True)
    problem = replace(PROBLEMS[name], dtype=dtype, **options)
    api._PLANS.clear()
    check(problem, backend, device, layout=layout)
    if backend == "triton":
        (plan,) = api._PLANS.values()
        assert any(launch.has_runs for launch in plan.work.launches)


def random_runs(rng: np.random.Generator) -> tuple[PrefixTree, Queries, np.ndarray | None]:
    """A forest of up to 12 nodes, in which any may be apart, and query tokens."""
    num_nodes, num_rows = rng.integers(1, 13), rng.integers(0, 9)
    deep = rng.random() < 0.5
    parents = [int(rng.integers(max(node - 2, -1) if deep else -1, node)) for node in range(num_nodes)]
    tree = PrefixTree.from_parents(
        parents, rng.choice([0, 1, 16, 17, 40], num_nodes), row_to_node=rng.integers(0, num_nodes, num_rows)
    )
    q_lens = rng.choice([0, 1, 1, 2, 5], num_rows)
    queries = Queries.of(tree, np.cumsum(q_lens) - q_lens, q_lens)
    return tree, queries, None if rng.random() < 0.1 else rng.random(num_nodes) < rng.choice([0.2, 0.5, 0.9])


def cut(path: list[int], kv_lens: np.ndarray, apart: np.ndarray) -> list[list[int]]:
    """A path, cut below each node that is not apart; pieces without keys are left out."""
    cuts = [i + 1 for i, node in enumerate(path[:-1]) if not apart[node]]
    pieces = [path[i:j] for i, j in zip([0, *cuts], [*cuts, len(path)], strict=True)]
    return [piece for piece in pieces if kv_lens[piece].any()]


def test_every_path_is_cut_below_the_nodes_that_are_not_apart() -> None:
    rng = np.random.default_rng(0)
    with_several = 0
    for _ in range(400):
        tree, queries, given = random_runs(rng)
        assert tree.kv_lens is not None
        runs = find_runs(tree, tree.kv_lens, queries, given, 16)
        assert runs.indptr[-1] == runs.links.size
        assert runs.indptr.size == runs.node.size + 1
        of_token: dict[int, list[list[int]]] = defaultdict(list)
        for run, (begin, count) in enumerate(zip(runs.tok_begin, runs.num_tok, strict=True)):
            assert count > 0
            nodes = runs.links[runs.indptr[run] : runs.indptr[run + 1]].tolist()
            lens = tree.kv_lens[nodes].tolist()
            rounded = [-(-length // 16) * 16 for length in lens] if len(lens) > 1 else lens
            assert runs.kv_len[run] == sum(rounded)
            with_several += len(nodes) > 1
            for token in range(begin, begin + count):
                of_token[token].append(nodes)
        apart = np.zeros(tree.num_nodes, np.bool_) if given is None else given
        cuts = [cut(tree.path(row).tolist(), tree.kv_lens, apart) for row in queries.row.tolist()]
        with_keys = [[[node for node in piece if tree.kv_lens[node]] for piece in pieces] for pieces in cuts]
        assert of_token == {token: pieces for token, pieces in enumerate(with_keys) if pieces}
        # those who share a node that is not apart share its run; where paths end at one that is, each stretch
        # of tokens has a run
        shared = {piece[-1] for pieces in cuts for piece in pieces if not apart[piece[-1]]}
        last = [pieces[-1][-1] if pieces else None for pieces in cuts]
        own = [node for before, node in pairwise([None, *last]) if node not in (None, before) and apart[node]]
        assert runs.node.tolist() == sorted([*shared, *own])
    assert with_several > 100, "hardly any run has several nodes: this tests little"


def test_runs_at_one_node_follow_the_tokens() -> None:
    """Rows that end at the root, which is apart, and at each of its children in turn."""
    children = 100
    tree = PrefixTree.from_parents(
        [-1] + [0] * children,
        [9] * (children + 1),
        row_to_node=[n for i in range(children) for n in (0, i + 1)],
    )
    lens = np.ones(2 * children, np.int64)
    queries = Queries.of(tree, np.cumsum(lens) - lens, lens)
    assert tree.kv_lens is not None
    runs = find_runs(tree, tree.kv_lens, queries, np.arange(children + 1) == 0, 16)
    assert runs.node.tolist() == [0] * children + list(range(1, children + 1))
    assert runs.tok_begin.tolist() == [*range(0, 2 * children, 2), *range(1, 2 * children, 2)]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_long_chain_is_no_loop_over_its_nodes(rows: int) -> None:
    nodes = 100_000
    tree = PrefixTree.from_parents(
        np.arange(-1, nodes - 1), np.full(nodes, 3), row_to_node=[nodes - 1] * rows
    )
    assert tree.kv_lens is not None
    lens = np.ones(rows, np.int64)
    queries = Queries.of(tree, np.cumsum(lens) - lens, lens)
    begun = time.perf_counter()
    runs = find_runs(tree, tree.kv_lens, queries, np.arange(nodes) < nodes - 1, 16)
    assert time.perf_counter() - begun < 0.5  # a loop of whole-array operations would take more than a second
    assert runs.links.tolist() == list(range(nodes))
    assert (runs.node.tolist(), runs.kv_len.tolist()) == ([nodes - 1], [16 * nodes])
