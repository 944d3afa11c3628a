"""What PrefixTree refuses, and in which words: the argument, expectation, value, remedy."""

from collections.abc import Callable

import numpy as np
import pytest

from hydragen.tree import PrefixTree

from_parents = PrefixTree.from_parents
from_levels = PrefixTree.from_levels
from_token_ids = PrefixTree.from_token_ids


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: from_parents([-1, 1]),
            ValueError,
            "parents[1] must be -1 (a root) or the index of an earlier node, got 1; number the nodes so"
            " that parents come before their children",
        ),
        (
            lambda: from_parents([1, 0]),
            ValueError,
            "parents[0] must be -1 (a root) or the index of an earlier node, got 1; number",
        ),
        (
            lambda: from_parents([-1, -2]),
            ValueError,
            "parents[1] must be -1 (a root) or the index of an earlier node, got -2; number",
        ),
        (
            lambda: from_parents([-1.0]),
            TypeError,
            "parents must hold integers",
        ),
        (
            lambda: from_parents([[-1]]),
            ValueError,
            "parents must be 1-D, got shape (1, 1)",
        ),
        (
            lambda: PrefixTree(None, None, None),
            TypeError,
            "parents must hold integers",
        ),
        (
            lambda: PrefixTree([-1], [1], None),
            TypeError,
            "row_to_node must hold integers",
        ),
        (
            lambda: from_parents([-1], [1.5]),
            TypeError,
            "kv_lens must hold integers",
        ),
        (
            lambda: from_parents([-1], [1, 2]),
            ValueError,
            "kv_lens must hold one length per node, 1 as parents has, got 2; give the number of tokens "
            "of every node",
        ),
        (
            lambda: from_parents([-1, 0], [1, -2]),
            ValueError,
            "kv_lens[1] must be at least 0, got -2; give the number of tokens of the node",
        ),
        (
            lambda: from_parents([-1], row_to_node=[True]),
            TypeError,
            "row_to_node must hold integers",
        ),
        (
            lambda: from_parents([-1], row_to_node=[0, 1]),
            ValueError,
            "row_to_node[1] must be the index of one of the 1 nodes, counted from 0, got 1; name the "
            "node at which the row ends",
        ),
        (
            lambda: from_parents([], row_to_node=[-1]),
            ValueError,
            "row_to_node[0] must be the index of one of the 0 nodes, counted from 0, got -1; name",
        ),
        (
            lambda: PrefixTree([-1], None, [0], [1]),
            ValueError,
            "token_ids needs the lengths of the nodes, got a tree with kv_lens=None; give kv_lens when "
            "making the tree",
        ),
        (
            lambda: PrefixTree([-1], [2], [0], [1]),
            ValueError,
            "token_ids must hold sum(kv_lens) = 2 tokens, got 1; give the tokens of all nodes end to end",
        ),
        (
            lambda: from_levels(5),
            TypeError,
            "kv_lens must be a list of vectors of integers, one per level, got int; wrap a single one "
            "in a list",
        ),
        (
            lambda: from_levels([5, 6]),
            ValueError,
            "kv_lens[0] must be 1-D, got shape ()",
        ),
        (
            lambda: from_levels([[5], [1.0]]),
            TypeError,
            "kv_lens[1] must hold integers",
        ),
        (
            lambda: from_levels([[5], [1, -1]]),
            ValueError,
            "kv_lens[1][1] must be at least 0, got -1; give the number of tokens of the node",
        ),
        (
            lambda: from_levels([[5, 5], [1] * 3]),
            ValueError,
            "kv_lens[1] must hold a multiple of the 2 nodes of the level above, got 3; give parents[1],"
            " the position of each node's parent within the level",
        ),
        (
            lambda: from_levels([[], [1]]),
            ValueError,
            "kv_lens[1] must hold a multiple of the 0 nodes",
        ),
        (
            lambda: from_levels([[5], [1]], parents=[None]),
            ValueError,
            "parents must hold one entry per level, 2 as kv_lens has, got 1; give None for level 0 and "
            "for levels of equal groups",
        ),
        (
            lambda: from_levels([[5]], parents=3),
            TypeError,
            "parents must be a list of vectors",
        ),
        (
            lambda: from_levels([[5]], parents=[[-1]]),
            ValueError,
            "parents[0] must be None because the nodes of level 0 are roots, got [-1]; give the parents"
            " of level 1 as parents[1]",
        ),
        (
            lambda: from_levels([[5], [1]], parents=[None, ["a"]]),
            TypeError,
            "parents[1] must hold",
        ),
        (
            lambda: from_levels([[5], [1]], parents=[None, [0, 0]]),
            ValueError,
            "parents[1] must hold one parent per node, 1 as kv_lens[1] has, got 2; give the position of"
            " each node's parent within the level",
        ),
        (
            lambda: from_levels([[5], [1]], parents=[None, [1]]),
            ValueError,
            "parents[1][0] must be the position of one of the 1 nodes of level 0, counted from 0, got "
            "1; positions start anew in every level",
        ),
        (
            lambda: from_token_ids(5),
            TypeError,
            "sequences must be a list of token id lists, one per row, got int; wrap a single one in a list",
        ),
        (
            lambda: from_token_ids("ab"),
            TypeError,
            "sequences must be a list of token id lists, one per row, got str; wrap",
        ),
        (
            lambda: from_token_ids({"input_ids": [1]}),
            TypeError,
            "sequences must be a list of token id lists, one per row, got dict; wrap",
        ),
        (
            lambda: from_token_ids(np.array(3)),
            TypeError,
            "sequences must be a list of token id lists, one per row, got ndarray; wrap",
        ),
        (
            lambda: from_token_ids([1, 2]),
            ValueError,
            "sequences[0] must be 1-D, got shape ()",
        ),
        (
            lambda: from_token_ids([[1], ["a"]]),
            TypeError,
            "sequences[1] must hold integers",
        ),
        (
            lambda: from_token_ids([[1], [1, [2]]]),
            ValueError,
            "sequences[1] must be a 1-D list of",
        ),
        (
            lambda: from_token_ids([], min_shared=0),
            ValueError,
            "min_shared must be an integer of at least 1, got 0",
        ),
        (
            lambda: from_parents([-1]).path(1),
            ValueError,
            "row must be the index of one of the 1 rows, counted from 0, got 1",
        ),
        (
            lambda: from_token_ids([[1]]).node_tokens(-1),
            ValueError,
            "node must be the index of one of the 1 nodes, counted from 0, got -1",
        ),
        (
            lambda: from_parents([-1], [1]).node_tokens(0),
            ValueError,
            "node_tokens needs a tree with token_ids, got one that knows only the structure; make the "
            "tree with PrefixTree.from_token_ids",
        ),
    ],
)
def test_errors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", ["node_start", "path_lens", "kv_offsets"])
def test_unknown_lengths(name: str) -> None:
    with pytest.raises(ValueError, match="kv_lens") as caught:
        getattr(from_parents([-1]), name)
    assert str(caught.value) == (
        f"{name} needs the lengths of the nodes, got a tree with kv_lens=None; "
        "give kv_lens when making the tree"
    )
