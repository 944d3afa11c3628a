"""PrefixTree.from_token_ids against a naive construction that compares all pairs of sequences."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hydragen.tree import PrefixTree

Tokens = tuple[int, ...]
token_lists = st.lists(st.integers(0, 2), max_size=6).map(tuple)
sequence_lists = st.lists(token_lists, max_size=8)


def common_beginning(a: Tokens, b: Tokens) -> Tokens:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return a[:length]


def naive_tree(sequences: list[Tokens], min_shared: int = 1) -> dict[Tokens, Tokens | None]:
    """Map what is read up to the end of each node to the same of its parent; None for roots.

    A node ends where a sequence ends and where two sequences part.
    """
    ends = set(sequences) | {common_beginning(a, b) for a in sequences for b in sequences} - {()}
    tree: dict[Tokens, Tokens | None] = {}
    for end in sorted(ends, key=len):
        # Above it stands the longest beginning that kept its children.
        above = [
            other
            for other, parent in tree.items()
            if other and other == end[: len(other)] and len(other) - len(parent or ()) >= min_shared
        ]
        tree[end] = max(above, key=len, default=None)
    with_children = set(tree.values())
    return {end: parent for end, parent in tree.items() if end in set(sequences) or end in with_children}


def read_up_to(tree: PrefixTree) -> list[Tokens]:
    """What is read along the path to each node's end."""
    read: list[Tokens] = []
    for node, parent in enumerate(tree.parents.tolist()):
        above = read[parent] if parent >= 0 else ()
        read.append(above + tuple(tree.node_tokens(node).tolist()))
    return read


def as_links(tree: PrefixTree) -> dict[Tokens, Tokens | None]:
    """The tree in the form of `naive_tree`."""
    read = read_up_to(tree)
    assert len(set(read)) == len(read), "two nodes end at the same place"
    return {read[i]: None if p < 0 else read[p] for i, p in enumerate(tree.parents.tolist())}


@given(sequence_lists)
@example([])
@example([()])
@example([(), (0,), ()])
@example([(0, 1), (0,)])
def test_same_tree_as_the_naive_construction(sequences: list[Tokens]) -> None:
    tree = PrefixTree.from_token_ids(sequences)
    assert as_links(tree) == naive_tree(sequences)
    # shared beginnings are stored exactly once: as many tokens as there are different non-empty beginnings
    beginnings = {s[:n] for s in sequences for n in range(1, len(s) + 1)}
    assert tree.kv_lens is not None
    assert tree.kv_lens.sum() == len(beginnings)


@given(sequence_lists, st.integers(1, 4))
@example([(0, 1, 2), (0, 1, 1), (0,), (0, 2)], 2)
def test_same_tree_with_min_shared(sequences: list[Tokens], min_shared: int) -> None:
    tree = PrefixTree.from_token_ids(sequences, min_shared=min_shared)
    assert as_links(tree) == naive_tree(sequences, min_shared)
    assert tree.kv_lens is not None
    assert (tree.kv_lens[tree.children_count > 0] >= min_shared).all()


@given(sequence_lists, st.integers(1, 4))
def test_paths_read_as_the_sequences(sequences: list[Tokens], min_shared: int) -> None:
    tree = PrefixTree.from_token_ids(sequences, min_shared=min_shared)
    assert tree.kv_lens is not None
    for row, sequence in enumerate(sequences):
        read: list[int] = []
        for node in tree.path(row):
            assert tree.node_start[node] == len(read)
            assert tree.kv_lens[node] == tree.node_tokens(node).size
            read += tree.node_tokens(node).tolist()
        assert tuple(read) == sequence
        assert tree.path_lens[row] == len(sequence)
        assert tree.row_order[tree.row_begin[node] : tree.row_end[node]].tolist().count(row) == 1
    # the tree holds nothing without need
    assert (tree.row_end > tree.row_begin).all()
    assert (tree.children_count[tree.kv_lens == 0] == 0).all()
    assert (tree.kv_lens == 0).sum() <= 1


@given(sequence_lists, st.integers(1, 3))
def test_nodes_are_numbered_depth_first_by_first_appearance(sequences: list[Tokens], min_shared: int) -> None:
    tree = PrefixTree.from_token_ids(sequences, min_shared=min_shared)
    parents = tree.parents.tolist()
    first_rows = [
        min(row for row in range(tree.num_rows) if node in tree.path(row)) for node in range(tree.num_nodes)
    ]
    numbered = []
    pending = [-1]
    while pending:
        node = pending.pop()
        numbered += [node] if node >= 0 else []
        children = [child for child, parent in enumerate(parents) if parent == node]
        pending += sorted(children, key=lambda child: first_rows[child], reverse=True)
    assert numbered == list(range(tree.num_nodes))


@given(sequence_lists, st.integers(1, 3), st.data())
def test_permuting_the_sequences_only_permutes(
    sequences: list[Tokens], min_shared: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(sequences))))
    tree = PrefixTree.from_token_ids(sequences, min_shared=min_shared)
    permuted = PrefixTree.from_token_ids([sequences[i] for i in order], min_shared=min_shared)
    assert as_links(tree) == as_links(permuted)
    ends, permuted_ends = read_up_to(tree), read_up_to(permuted)
    assert [permuted_ends[node] for node in permuted.row_to_node] == [
        ends[tree.row_to_node[i]] for i in order
    ]


@given(sequence_lists)
def test_sorted_sequences_keep_their_order(sequences: list[Tokens]) -> None:
    tree = PrefixTree.from_token_ids(sorted(sequences))
    assert tree.row_order.tolist() == list(range(len(sequences)))


@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3).map(tuple), max_size=4))
def test_any_int64_is_a_token(sequences: list[Tokens]) -> None:
    assert as_links(PrefixTree.from_token_ids(sequences)) == naive_tree(sequences)


def test_system_prompt_with_two_questions() -> None:
    system, question, other = [1, 2, 3, 4], [5, 6], [7]
    tree = PrefixTree.from_token_ids([system + question, system + other, system + question, system, [9]])
    assert tree.parents.tolist() == [-1, 0, 0, -1]
    assert tree.row_to_node.tolist() == [1, 2, 1, 0, 3]
    assert [tree.node_tokens(i).tolist() for i in range(4)] == [system, question, other, [9]]
    assert tree.token_ids is not None
    assert tree.token_ids.tolist() == [*system, *question, *other, 9]


def test_empty_sequences_share_a_root_of_their_own() -> None:
    tree = PrefixTree.from_token_ids([[4, 5], [], [4], []])
    assert tree.parents.tolist() == [-1, 0, -1]
    assert tree.kv_lens is not None
    assert tree.kv_lens.tolist() == [1, 1, 0]
    assert tree.row_to_node.tolist() == [1, 2, 0, 2]


def test_min_shared_leaves_short_runs_with_their_sequences() -> None:
    sequences = [[1, 2, 8, 8], [1, 2, 9, 9], [1, 2]]  # two shared tokens: the start of a chat template, say
    assert PrefixTree.from_token_ids(sequences, min_shared=2).parents.tolist() == [-1, 0, 0]
    tree = PrefixTree.from_token_ids(sequences, min_shared=3)
    assert tree.parents.tolist() == [-1, -1, -1]
    assert [tree.node_tokens(i).tolist() for i in range(3)] == sequences


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda s: np.array(s, dtype=np.uint16),
        lambda s: torch.tensor(s).int(),
    ],
)
def test_kinds_of_sequences(convert: Callable[[list[int]], object]) -> None:
    sequences = [[1, 2, 3], [1, 2, 4]]
    expected = PrefixTree.from_token_ids(sequences)
    assert PrefixTree.from_token_ids([convert(s) for s in sequences]) == expected
    assert PrefixTree.from_token_ids(convert(s) for s in sequences) == expected
    assert PrefixTree.from_token_ids(np.array(sequences)) == expected
    assert PrefixTree.from_token_ids(torch.tensor(sequences)) == expected


def seconds(sequences: Sequence[object]) -> float:
    """Best of three."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        PrefixTree.from_token_ids(sequences)
        times.append(time.perf_counter() - begun)
    return min(times)


@pytest.mark.parametrize("num_shared", [0, 1500, 2000])
def test_a_thousand_prompts_of_two_thousand_tokens_take_less_than_a_second(num_shared: int) -> None:
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 50_000, num_shared)
    arrays = [np.concatenate([shared, rng.integers(0, 50_000, 2000 - num_shared)]) for _ in range(1000)]
    assert seconds(arrays) < 1
    assert seconds([array.tolist() for array in arrays]) < 1


def test_a_chain_of_two_thousand_prefixes_takes_less_than_a_second() -> None:
    # every sequence begins with all shorter ones: two million tokens in a tree two thousand levels deep
    numbers = np.arange(2000)
    assert seconds([numbers[:length] for length in range(2001)]) < 1
