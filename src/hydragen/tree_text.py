"""A prefix tree as text for people: one line per node, large trees abbreviated, totals at the end."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from hydragen.host_ints import IntArray

_MAX_RUNS = 4  # runs of row numbers spelled out per node


def tree_text(
    parents: IntArray, kv_lens: IntArray | None, row_to_node: IntArray, row_counts: IntArray, max_lines: int
) -> str:
    """Return a readable picture of a tree.

    Parameters
    ----------
    parents, row_counts : int64 [num_nodes]
        Parent (-1: root) and number of rows whose path contains the node.
    kv_lens : int64 [num_nodes] or None
        Tokens per node, if known.
    row_to_node : int64 [num_rows]
    max_lines : int
        At most this many lines show nodes; a heading and the totals come on top.
    """
    roots = _count(int((parents < 0).sum()), "root")
    heading = f"PrefixTree: {_count(parents.size, 'node')}, {roots}, {_count(row_to_node.size, 'row')}"
    body = _Picture(parents, kv_lens, row_to_node, row_counts).lines(max_lines)
    return "\n".join([heading, *body, _totals(kv_lens, row_counts)])


def _totals(kv_lens: IntArray | None, row_counts: IntArray) -> str:
    if kv_lens is None:
        return "tokens: the lengths come with the KV"
    stored, copied = int(kv_lens.sum()), int((kv_lens * row_counts).sum())
    ratio = f" ({copied / stored:.1f}x)" if stored else ""
    return f"tokens: {stored:,} stored once, {copied:,} if copied per row{ratio}"


class _Picture:
    """The lines of the nodes, with as many siblings as the space allows."""

    def __init__(
        self, parents: IntArray, kv_lens: IntArray | None, row_to_node: IntArray, row_counts: IntArray
    ) -> None:
        self._children: list[list[int]] = [[] for _ in range(parents.size + 1)]  # the last: roots
        for node, parent in enumerate(parents.tolist()):
            self._children[parent].append(node)
        self._kv_lens = kv_lens
        self._row_counts = row_counts
        self._rows_by_node = np.argsort(row_to_node, kind="stable")
        self._row_ends = np.cumsum(np.bincount(row_to_node, minlength=parents.size))

    def lines(self, max_lines: int) -> list[str]:
        """Return at most `max_lines` lines: the widest picture that fits, else the top of the narrowest."""
        num_nodes = len(self._children) - 1
        widths = range(1, max_lines + 1)
        width = bisect_right(widths, max_lines, key=lambda width: len(self._draw(width, max_lines + 1)[0]))
        if width > 0:
            return self._draw(width, max_lines)[0]
        lines, shown = self._draw(1, max_lines - 1)
        return [*lines, f"… {shown:,} of {_count(num_nodes, 'node')} shown"]

    def _draw(self, width: int, max_lines: int) -> tuple[list[str], int]:
        """Return the first `max_lines` lines with at most `width` + 1 per family, and the nodes shown."""
        lines: list[str] = []
        shown = 0
        pending = self._family(-1, "", width)
        while pending and len(lines) < max_lines:
            indent, is_last, members = pending.pop()
            lines.append(f"{indent}{'└─ ' if is_last else '├─ '}{self._label(members)}")
            if len(members) == 1:
                shown += 1
                pending += self._family(members[0], indent + ("   " if is_last else "│  "), width)
        return lines, shown

    def _family(self, parent: int, indent: str, width: int) -> list[tuple[str, bool, list[int]]]:
        """Return the lines to come for the children of `parent`, last first; those left out share one."""
        children = self._children[parent]
        members = [[child] for child in children[: width + 1]]
        if len(children) > width + 1:
            members[-1] = children[width:]
        return [(indent, i == len(members) - 1, m) for i, m in enumerate(members)][::-1]

    def _label(self, members: list[int]) -> str:
        num_rows = _count(int(self._row_counts[members].sum()), "row")
        if len(members) > 1:
            return f"… {len(members):,} more, {num_rows}"
        node = members[0]
        length = "" if self._kv_lens is None else f"{_count(int(self._kv_lens[node]), 'token')}, "
        begin = self._row_ends[node - 1] if node > 0 else 0
        ending = self._rows_by_node[begin : self._row_ends[node]]
        verb = "ends" if ending.size == 1 else "end"
        here = f" ({_runs(ending)} {verb} here)" if ending.size else ""
        return f"node {node}: {length}{num_rows}{here}"


def _runs(rows: IntArray) -> str:
    """Return ascending row numbers as runs: "0-3, 7, 9-12"."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    runs = np.split(rows, breaks)
    texts = [f"{run[0]}-{run[-1]}" if run.size > 1 else f"{run[0]}" for run in runs[:_MAX_RUNS]]
    left_out = sum(run.size for run in runs[_MAX_RUNS:])
    return ", ".join(texts) + (f", … {left_out:,} more" if left_out else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
