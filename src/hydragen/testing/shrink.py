"""The smallest problem that still fails, found by leaving things out.

Hypothesis shrinks what it drew; this shrinks the problem itself, so it works on any (one of 100,000 of a
batch, one from a bug report), needs tens of runs in place of hundreds, and leaves no segment behind that
nobody uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hydragen.testing.problem import Problem


def shrink(problem: Problem, fails: Callable[[Problem], bool], *, max_runs: int = 500) -> Problem:
    """Leave out, shorten and reset whatever the failure does not need.

    Parameters
    ----------
    problem
        One for which ``fails`` is true.
    fails
        Whether a problem fails; called with valid problems only.
    max_runs
        The most calls of ``fails``.

    Returns
    -------
    Problem
        A problem that fails and of which no single step of `simpler` fails, or the smallest found when the
        runs are used up.

    Raises
    ------
    ValueError
        If ``problem`` does not fail.
    """
    if not fails(problem):
        raise ValueError(f"problem must fail, but does not: {problem!r}")
    runs = 1
    tried = {problem}
    improved = True
    while improved and runs < max_runs:
        improved = False
        for candidate in simpler(problem):
            if candidate in tried or runs >= max_runs:
                continue
            tried.add(candidate)
            runs += 1
            if fails(candidate):
                problem, improved = candidate, True
                break
    return problem


def simpler(problem: Problem) -> Iterator[Problem]:
    """Problems that are one step simpler: the largest steps first."""
    yield from _valid(_structures(problem))
    yield from _valid(_sizes(problem))
    yield from _valid(_options(problem))


def _valid(steps: Iterator[Callable[[], Problem]]) -> Iterator[Problem]:
    """Steps that lead to a problem: some combinations of options are none."""
    for step in steps:
        try:
            yield step()
        except ValueError:
            continue


def _structures(problem: Problem) -> Iterator[Callable[[], Problem]]:
    """Fewer rows, fewer nodes."""
    rows, nodes = problem.num_rows, problem.num_nodes
    used = sorted({node for row in range(rows) for node in problem.path(row)})
    if len(used) < nodes:
        yield lambda: _only_nodes(problem, used)
    if rows > 1:
        yield lambda: _only_rows(problem, range(rows // 2))
        yield lambda: _only_rows(problem, range(rows // 2, rows))
        for row in range(rows):
            yield partial(_only_rows, problem, [other for other in range(rows) if other != row])
    if nodes > 1:
        for node in range(nodes):
            yield partial(_without_node, problem, node)
        for node in range(nodes):
            if problem.parents[node] >= 0:
                yield partial(_changed, problem, "parents", node, -1)
    for row in range(rows):
        if problem.row_to_node[row] > 0:
            yield partial(_changed, problem, "row_to_node", row, 0)


def _sizes(problem: Problem) -> Iterator[Callable[[], Problem]]:
    """Shorter segments, fewer queries, heads and elements."""
    if max(problem.q_lens) > 1:  # together: some mistakes need rows of equal shapes
        yield lambda: replace(problem, q_lens=(1,) * problem.num_rows)
    if max(problem.kv_lens) > 1:
        yield lambda: replace(problem, kv_lens=tuple(min(kv_len, 1) for kv_len in problem.kv_lens))
    for name, least in (("kv_lens", 0), ("q_lens", 1)):
        for index, length in enumerate(getattr(problem, name)):
            for shorter in _shorter(length, least):
                yield partial(_changed, problem, name, index, shorter)
    group = problem.group_size
    for kv_heads in _shorter(problem.num_kv_heads, 1):
        yield partial(replace, problem, num_kv_heads=kv_heads, num_q_heads=kv_heads * group)
    for size in _shorter(group, 1):
        yield partial(replace, problem, num_q_heads=problem.num_kv_heads * size)
    if problem.head_dim == problem.head_dim_v:
        for dim in _shorter(problem.head_dim, 1):
            yield partial(replace, problem, head_dim=dim, head_dim_v=dim)
    for name in ("head_dim", "head_dim_v"):
        for dim in _shorter(getattr(problem, name), 1):
            yield partial(_with, problem, {name: dim})
    if problem.window is not None:
        for window in _shorter(problem.window, 1):
            yield partial(replace, problem, window=window)


def _options(problem: Problem) -> Iterator[Callable[[], Problem]]:
    """Options and values as they are by default."""
    defaults = {
        "causal": False,
        "window": None,
        "softcap": None,
        "scale": None,
        "sinks": False,
        "sharpness": "flat",
        "dtype": torch.float32,
        "seed": 0,
    }
    for name, default in defaults.items():
        if getattr(problem, name) != default:
            yield partial(_with, problem, {name: default})


def _shorter(length: int, least: int) -> Iterator[int]:
    """Smaller numbers: the least, halves, one less."""
    candidates = [least, least + 1, length // 4, length // 2, (3 * length) // 4, length - 2, length - 1]
    yield from sorted({n for n in candidates if least <= n < length})


def _with(problem: Problem, changes: dict[str, Any]) -> Problem:
    return replace(problem, **changes)


def _changed(problem: Problem, name: str, index: int, value: int) -> Problem:
    values = list(getattr(problem, name))
    values[index] = value
    return _with(problem, {name: tuple(values)})


def _only_rows(problem: Problem, rows: range | list[int]) -> Problem:
    return replace(
        problem,
        row_to_node=tuple(problem.row_to_node[row] for row in rows),
        q_lens=tuple(problem.q_lens[row] for row in rows),
    )


def _only_nodes(problem: Problem, kept: list[int]) -> Problem:
    """Drop nodes that are on no path."""
    place = {node: index for index, node in enumerate(kept)}
    return replace(
        problem,
        parents=tuple(place.get(problem.parents[node], -1) for node in kept),
        kv_lens=tuple(problem.kv_lens[node] for node in kept),
        row_to_node=tuple(place[node] for node in problem.row_to_node),
    )


def _without_node(problem: Problem, gone: int) -> Problem:
    """Drop a node: its children and rows move up to its parent; rows of a root go to a neighbouring node."""
    above = problem.parents[gone]

    def place(node: int) -> int:
        node = above if node == gone else node
        return node - (node > gone)

    kept = [node for node in range(problem.num_nodes) if node != gone]
    return replace(
        problem,
        parents=tuple(place(problem.parents[node]) for node in kept),
        kv_lens=tuple(problem.kv_lens[node] for node in kept),
        row_to_node=tuple(max(place(node), 0) for node in problem.row_to_node),
    )
