"""What people see of a tree."""

import pytest

from hydragen.tree import PrefixTree


def test_every_kind_of_node() -> None:
    tree = PrefixTree.from_parents(
        [-1, -1, 0, 0, 0], [5, 1, 3, 0, 1234], row_to_node=[2, 2, 3, 0, 2, 0, 2, 2]
    )
    assert str(tree) == (
        "PrefixTree: 5 nodes, 2 roots, 8 rows\n"
        "├─ node 0: 5 tokens, 8 rows (3, 5 end here)\n"
        "│  ├─ node 2: 3 tokens, 5 rows (0-1, 4, 6-7 end here)\n"
        "│  ├─ node 3: 0 tokens, 1 row (2 ends here)\n"
        "│  └─ node 4: 1,234 tokens, 0 rows\n"
        "└─ node 1: 1 token, 0 rows\n"
        "tokens: 1,243 stored once, 55 if copied per row (0.0x)"
    )


def test_unknown_lengths() -> None:
    assert str(PrefixTree.from_parents([-1, 0])) == (
        "PrefixTree: 2 nodes, 1 root, 1 row\n"
        "└─ node 0: 1 row\n"
        "   └─ node 1: 1 row (0 ends here)\n"
        "tokens: the lengths come with the KV"
    )


def test_empty_tree() -> None:
    assert str(PrefixTree.from_token_ids([])) == (
        "PrefixTree: 0 nodes, 0 roots, 0 rows\ntokens: 0 stored once, 0 if copied per row"
    )


def test_wide_trees_show_the_first_of_every_family() -> None:
    tree = PrefixTree.from_levels([[4096, 100], [16] * 128])
    assert tree.describe(8) == (
        "PrefixTree: 130 nodes, 2 roots, 128 rows\n"
        "├─ node 0: 4,096 tokens, 64 rows\n"
        "│  ├─ node 2: 16 tokens, 1 row (0 ends here)\n"
        "│  ├─ node 3: 16 tokens, 1 row (1 ends here)\n"
        "│  └─ … 62 more, 62 rows\n"
        "└─ node 1: 100 tokens, 64 rows\n"
        "   ├─ node 66: 16 tokens, 1 row (64 ends here)\n"
        "   ├─ node 67: 16 tokens, 1 row (65 ends here)\n"
        "   └─ … 62 more, 62 rows\n"
        "tokens: 6,244 stored once, 270,592 if copied per row (43.3x)"
    )


def test_a_single_one_is_never_left_out_of_its_family() -> None:
    assert "more" not in PrefixTree.from_levels([[1] * 5]).describe(5)
    assert "… 2 more, 2 rows" in PrefixTree.from_levels([[1] * 5]).describe(4)


def test_deep_trees_show_their_top() -> None:
    chain = PrefixTree.from_parents(range(-1, 4999))
    assert chain.describe(3) == (
        "PrefixTree: 5,000 nodes, 1 root, 1 row\n"
        "└─ node 0: 1 row\n"
        "   └─ node 1: 1 row\n"
        "… 2 of 5,000 nodes shown\n"
        "tokens: the lengths come with the KV"
    )
    assert chain.describe(1).splitlines()[1] == "… 0 of 5,000 nodes shown"


@pytest.mark.parametrize("max_lines", [1, 2, 3, 10, 40, 10**9])
def test_max_lines_is_kept(max_lines: int) -> None:
    tree = PrefixTree.from_parents([i // 3 - 1 if i else -1 for i in range(300)])
    assert len(tree.describe(max_lines).splitlines()) <= max_lines + 2
    whole = tree.describe(300).splitlines()
    assert len(whole) == 302
    assert tree.describe(10**9).splitlines() == whole


def test_scattered_rows_are_abbreviated() -> None:
    tree = PrefixTree.from_parents([-1, -1], row_to_node=[0, 1] * 10)
    assert "node 0: 10 rows (0, 2, 4, 6, … 6 more end here)" in str(tree)


def test_max_lines_must_be_positive() -> None:
    with pytest.raises(
        ValueError, match=r"^max_lines must be an integer of at least 1, got 0; choose a larger"
    ):
        PrefixTree.from_parents([-1]).describe(0)
