"""Hypothesis strategies for problems that break attention kernels.

Hard cases are drawn often, not by luck: `tests/test_testing_quality.py` holds each one to a share of the
examples. Problems are built from lists (nodes as parent and length, rows as end and q_len), so that
Hypothesis shrinks them by deleting nodes and rows and by making numbers smaller.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Collection, Sequence
from typing import Literal, TypeVar, get_args

import torch
from hypothesis import strategies as st

from hydragen.testing.arguments import flag, integer
from hydragen.testing.problem import DTYPES, MAX_HEAD_DIM, SHARPNESS, Problem, Sharpness
from hydragen.testing.shapes import STYLES, hollow_out, leaves, row_ends, tree_parents

_T = TypeVar("_T")

Trees = Literal["any", "prefix", "none"]
"""Any forest; one prefix under which each row has a segment of its own; rows that share nothing."""

GROUP_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32)
HEAD_DIMS = (1, 2, 3, 5, 8, 16, 31, 32, 33, 64, 80, 96, 128, 129, 192, 256)
TILE_SIZES = (16, 32, 64, 128)
WINDOWS = (1, 2, 3, 15, 16, 17, 33, 63, 64, 65, 100, 128)
SOFTCAPS = (1.0, 0.7, 2.5, 30.0, 50.0)
SCALES = (1.0, 0.1147, -0.5, 0.0)
# Reduced modulo the number of choices: lists lose items and numbers shrink without regard to one another.
_codes = st.integers(0, 10**6)


def problems(
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16),
    sharpness: Sequence[Sharpness] = SHARPNESS,
    head_dims: Sequence[int] = HEAD_DIMS,
    same_head_dim_v: bool = False,
    group_sizes: Sequence[int] = GROUP_SIZES,
    max_kv_heads: int = 2,
    max_nodes: int = 8,
    max_rows: int = 8,
    max_q_len: int = 6,
    max_kv: int = 150,
    trees: Trees = "any",
    same_q_len: bool = False,
    empty: bool = True,
    causal: bool | None = None,
    window: bool | None = None,
    softcap: bool | None = None,
    scale: bool | None = None,
    sinks: bool | None = None,
) -> st.SearchStrategy[Problem]:
    """Problems within the limits of an implementation.

    Parameters
    ----------
    dtypes, sharpness, head_dims, group_sizes
        What to choose from; the first shrinks best. ``group_sizes`` are query heads per KV head.
    same_head_dim_v
        Only problems with ``head_dim_v == head_dim``.
    max_kv_heads, max_nodes, max_rows, max_q_len, max_kv
        The most KV heads, segments, rows, queries of a row and KV tokens of a segment. ``max_nodes`` holds
        for ``trees="any"`` only: otherwise each row has a segment.
    trees
        ``"any"`` forest; ``"prefix"``: one segment that all rows share and one for each row; ``"none"``: row
        i attends to node i alone.
    same_q_len
        Only problems whose rows have equally many queries.
    empty
        Whether segments may be empty.
    causal, window, softcap, scale, sinks
        Whether the option is given: None for either, True for always, False for never.

    Returns
    -------
    SearchStrategy[Problem]

    Raises
    ------
    TypeError, ValueError
        If no problem lies within the limits, or a limit is out of range or none.
    """
    _check_choices("dtypes", dtypes, DTYPES)
    _check_choices("sharpness", sharpness, SHARPNESS)
    _check_choices("head_dims", head_dims, range(1, MAX_HEAD_DIM + 1))
    _check_choices("group_sizes", group_sizes, range(1, 1025))
    _check_choices("trees", (trees,), get_args(Trees))
    for name, flagged in (("same_head_dim_v", same_head_dim_v), ("same_q_len", same_q_len), ("empty", empty)):
        flag(name, flagged)
    for name, given in (
        ("causal", causal),
        ("window", window),
        ("softcap", softcap),
        ("scale", scale),
        ("sinks", sinks),
    ):
        if given is not None and not isinstance(given, bool):
            raise TypeError(
                f"{name} must be True, False or None, got {given!r} of type {type(given).__name__}; "
                "None draws problems with it and without"
            )
    for name, limit, low in (
        ("max_kv_heads", max_kv_heads, 1),
        ("max_nodes", max_nodes, 1),
        ("max_rows", max_rows, 1),
        ("max_q_len", max_q_len, 1),
        ("max_kv", max_kv, 0 if empty else 1),
    ):
        integer(name, limit, low)
    capped = [mode for mode in sharpness if "very_negative" not in mode]
    if softcap is True and not capped:
        raise ValueError(f"softcap=True needs a sharpness whose logits can be capped, got {tuple(sharpness)}")
    windows = sorted({*WINDOWS, max(1, max_kv - 1), max(1, max_kv)})
    return _problems(
        nodes=_some(st.tuples(_codes, lengths(max_kv)), max_nodes),
        rows=_some(st.tuples(_codes, st.integers(1, max_q_len)), max_rows),
        max_rows=max_rows,
        max_q_len=max_q_len,
        trees=trees,
        same_q_len=same_q_len,
        least=0 if empty else 1,
        dtypes=dtypes,
        sharpness=sharpness,
        head_dims=head_dims,
        same_head_dim_v=same_head_dim_v,
        group_sizes=group_sizes,
        max_kv_heads=max_kv_heads,
        # twice in three: only then do positions matter, and many of the mistakes
        causal=[None, True, True] if causal is None else _optional([True], causal),
        window=_optional(windows, window),
        softcap=_optional(SOFTCAPS, softcap),
        scale=_optional(SCALES, scale),
        sinks=_optional([True], sinks),
    )


def lengths(max_kv: int) -> st.SearchStrategy[int]:
    """KV tokens of a segment: none, one, few, around the border of a tile, any number up to ``max_kv``."""
    borders = [n for tile in TILE_SIZES for n in (tile - 1, tile, tile + 1) if n <= max_kv]
    few = st.integers(0, min(8, max_kv))
    return st.one_of(
        st.sampled_from([n for n in (0, 1) if n <= max_kv]),
        few,
        st.sampled_from(borders) if borders else few,
        st.integers(0, max_kv) if max_kv > 8 else few,
    )


def _some(items: st.SearchStrategy[_T], most: int) -> st.SearchStrategy[list[_T]]:
    """Lists of 1 to ``most`` items: two lists, both of them rarely short, each of which shrinks well."""
    first = st.lists(items, min_size=1, max_size=most - most // 2)
    return st.builds(operator.add, first, st.lists(items, max_size=most // 2))


def _optional(values: Sequence[_T], given: bool | None) -> list[_T | None]:
    """Choices of an option: None as often as all values together."""
    if given is None:
        return [*[None] * len(values), *values]
    return [*values] if given else [None]


@st.composite
def _problems(
    draw: st.DrawFn,
    *,
    nodes: st.SearchStrategy[list[tuple[int, int]]],
    rows: st.SearchStrategy[list[tuple[int, int]]],
    max_rows: int,
    max_q_len: int,
    trees: Trees,
    same_q_len: bool,
    least: int,
    dtypes: Sequence[torch.dtype],
    sharpness: Sequence[Sharpness],
    head_dims: Sequence[int],
    same_head_dim_v: bool,
    group_sizes: Sequence[int],
    max_kv_heads: int,
    causal: Sequence[bool | None],
    window: Sequence[int | None],
    softcap: Sequence[float | None],
    scale: Sequence[float | None],
    sinks: Sequence[bool | None],
) -> Problem:
    def choose(choices: Sequence[_T]) -> _T:
        return draw(st.sampled_from(choices))

    drawn_nodes, drawn_rows = draw(nodes), draw(rows)
    topology, ends, hollow, queries = draw(st.integers(0, len(STYLES) - 1).map(STYLES.__getitem__))
    if topology == "roots" and ends == "leaves":
        ends = "each"  # sequences that share nothing, as often as those that share everything
    if trees != "any":
        # a segment for each row, and one above them: lengths are used again where too few were drawn
        wanted = len(drawn_rows) + (trees == "prefix")
        drawn_nodes = (drawn_nodes * wanted)[:wanted]
        topology, ends = ("star" if trees == "prefix" else "roots"), "each"
    parents = tree_parents([code for code, _ in drawn_nodes], topology)
    if ends == "each":
        drawn_rows = drawn_rows[: len(leaves(parents))]
    if ends == "crowd":
        drawn_rows = (drawn_rows * 2)[:max_rows]
    row_to_node = row_ends([code for code, _ in drawn_rows], parents, ends)
    kv_lens = [kv_len for _, kv_len in drawn_nodes]
    hollow_out(kv_lens, parents, row_to_node[0], hollow)
    kv_lens = [max(kv_len, least) for kv_len in kv_lens]

    num_kv_heads = draw(st.integers(1, max_kv_heads))
    q_lens = [q_len for _, q_len in drawn_rows]
    if queries == "heads":
        # A transposed [q_len, num_heads] passes every check of shapes if the two are equal.
        group_sizes = [size for size in group_sizes if size * num_kv_heads <= max_q_len] or group_sizes
    num_q_heads = num_kv_heads * choose(group_sizes)
    if queries == "heads" and num_q_heads <= max_q_len:
        q_lens = [num_q_heads] * len(q_lens)
    elif queries == "one":
        q_lens = [1] * len(q_lens)
    elif queries == "uniform" or same_q_len:
        q_lens = q_lens[:1] * len(q_lens)

    head_dim = choose(head_dims)
    head_dim_v = head_dim if same_head_dim_v else draw(st.just(head_dim) | st.sampled_from(head_dims))
    cap, factor, mode = choose(softcap), choose(scale), choose(sharpness)
    if "very_negative" in mode:
        # Neither capped logits nor logits of 0 are below -5e4: the option goes, or the mode.
        cap = None if None in softcap else cap
        factor = SCALES[0] if factor == 0 else factor
        if cap is not None:
            mode = choose([other for other in sharpness if "very_negative" not in other])
    return Problem(
        parents=tuple(parents),
        kv_lens=tuple(kv_lens),
        row_to_node=tuple(row_to_node),
        q_lens=tuple(q_lens),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=choose(dtypes),
        causal=choose(causal) is True,
        window=choose(window),
        softcap=cap,
        scale=factor,
        sinks=choose(sinks) is True,
        sharpness=mode,
        seed=draw(st.integers(0, 2**16)),
    )


def _check_choices(name: str, given: Sequence[object], allowed: Collection[object]) -> None:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{name} must be a sequence of choices, got {given!r}")
    if not given:
        raise ValueError(f"{name} must offer at least one choice, got {given!r}")
    # their kind first: True is in range(1, 2), and a tensor without data cannot be compared
    kind = numbers.Integral if isinstance(allowed, range) else type(next(iter(allowed)))
    unknown = [x for x in given if isinstance(x, bool) or not isinstance(x, kind) or x not in allowed]
    if unknown:
        known = (
            f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else ", ".join(map(str, allowed))
        )
        raise ValueError(f"{name} must be chosen from {known}, got {', '.join(map(str, unknown))}")
