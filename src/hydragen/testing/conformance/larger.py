"""Problems beyond the sizes that are usually drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hydragen.testing.problem import Problem


def larger(
    problem: Problem, name: str, code: int, *, borders: Mapping[str, int], same_q_len: bool
) -> Problem:
    """One size of a problem, that of a limit's name, changed to what is beyond its border."""
    code *= 7919  # Hypothesis likes small numbers
    border = borders[name]
    if name == "max_kv":
        kv_lens = list(problem.kv_lens)
        path = problem.path(code % problem.num_rows)  # of somebody: not a segment that nobody attends to
        kv_lens[path[code % len(path)]] = border + 1 + code % 1000
        return replace(problem, kv_lens=tuple(kv_lens))
    if name == "max_q_len":
        q_lens = list(problem.q_lens)
        rows = range(len(q_lens)) if same_q_len else [code % len(q_lens)]
        for row in rows:
            q_lens[row] = border + 1 + code % 70
        return replace(problem, q_lens=tuple(q_lens))
    heads = border + 1 + code % 7
    return replace(problem, num_kv_heads=heads, num_q_heads=heads * problem.group_size)
