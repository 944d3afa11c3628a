"""What explain() says of each segment: read once for all of its sequences, or by each on its own."""

from typing import Any

import numpy as np
import pytest
import torch

import hydragen
from hydragen import PackedKV, PrefixTree

BYTES_PER_KEY = 8 * (128 + 128) * 2


def explained(tree: PrefixTree) -> hydragen.Explanation:
    return hydragen.explain(tree, num_q_heads=32, num_kv_heads=8, head_dim=128)


def test_a_long_prefix_is_read_once() -> None:
    prefix, suffix = explained(PrefixTree.from_levels([[4096], [128] * 64])).segments
    assert (prefix.count, prefix.num_rows, prefix.reads, prefix.batched) == (1, 64, 1, True)
    assert (suffix.count, suffix.num_rows, suffix.reads, suffix.batched) == (64, 1, 1, False)
    assert prefix.bytes == 4096 * BYTES_PER_KEY
    assert prefix.bytes_unshared == 64 * prefix.bytes


def test_small_work_is_left_per_sequence() -> None:
    """One program walks the path of each sequence: the prefix is read, and said to be read, by each."""
    explanation = explained(PrefixTree.from_levels([[64], [32] * 4, [16] * 16]))
    assert [(s.count, s.num_rows, s.reads, s.batched) for s in explanation.segments] == [
        (1, 16, 16, False), (4, 4, 4, False), (16, 1, 1, False),
    ]  # fmt: skip
    assert explanation.bytes == explanation.bytes_unshared == 16 * (64 + 32 + 16) * BYTES_PER_KEY
    assert str(explanation).count("per row") == 3


def test_rows_of_one_node_walk_its_path_together() -> None:
    """Batched: nothing is read twice, whatever is left to the runs below."""
    tree = PrefixTree.from_parents([-1, 0, 1], [4000, 5, 6], row_to_node=[2, 2])
    assert [(s.reads, s.batched) for s in explained(tree).segments] == [(1, True)] * 3


@pytest.mark.parametrize("lens", [[64, 3, 2], [40_000, 300, 200]])
def test_a_plan_says_the_same(lens: list[int]) -> None:
    tree = PrefixTree.from_levels([lens[:1], lens[1:2] * 2, lens[2:] * 6])
    kv = torch.zeros(1, 8, 128, dtype=torch.bfloat16).expand(int(tree.kv_lens.sum()), -1, -1)
    explanation = hydragen.plan(tree, PackedKV(kv, kv, tree.kv_offsets), num_q_heads=32).explain()
    keys = sum(s.count * s.kv_len for s in explanation.segments)
    assert keys == tree.kv_lens.sum()
    assert sum(s.count * s.num_rows * s.kv_len for s in explanation.segments) == tree.path_lens.sum()
    assert (
        explanation.bytes == sum(s.count * s.reads * s.kv_len for s in explanation.segments) * BYTES_PER_KEY
    )
    assert explanation.bytes_unshared == int(tree.path_lens.sum()) * BYTES_PER_KEY


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.int16, np.uint8])
def test_numbers_of_numpy_are_counted_as_pythons(kind: Any) -> None:
    tree = PrefixTree.from_levels([[4096], [64] * 256])
    expected = hydragen.explain(tree, num_q_heads=32, num_kv_heads=8, head_dim=128, q_len=2)
    sizes = {"num_q_heads": kind(32), "num_kv_heads": kind(8), "head_dim": kind(128), "q_len": kind(2)}
    found = hydragen.explain(tree, **sizes)
    assert (found.bytes, found.bytes_unshared, found.flops) == (
        expected.bytes, expected.bytes_unshared, expected.flops,
    )  # fmt: skip
    with pytest.raises(TypeError, match="q_len must be an integer"):
        hydragen.explain(tree, **(sizes | {"q_len": torch.tensor(2)}))


def test_a_plan_on_a_cpu_is_explained_as_on_an_h200() -> None:
    tree = PrefixTree.from_levels([[4096], [64] * 256])
    k = torch.zeros(int(tree.kv_lens.sum()), 8, 128, dtype=torch.bfloat16)
    plan = hydragen.plan(tree, hydragen.PackedKV(k, k, tree.kv_offsets), num_q_heads=32)
    expected = hydragen.explain(tree, num_q_heads=32, num_kv_heads=8, head_dim=128)
    assert plan.explain() == expected
    assert expected.device == "H200"
    assert "\nH200: predicted " in str(expected)


def test_nothing_is_predicted_below_its_lower_bound() -> None:
    for batch in (1, 64, 1024):
        tree = PrefixTree.from_levels([[8192], [512] * batch])
        for of in (tree, tree.unshared()):
            found = hydragen.explain(of, num_q_heads=32, num_kv_heads=8, head_dim=128)
            assert found.predicted_seconds >= found.seconds
