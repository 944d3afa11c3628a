"""Vectors end to end, against loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydragen.ragged import descending, expand, offsets, ranges

COUNTS = st.lists(st.integers(0, 5), max_size=8)


@given(COUNTS, st.data())
def test_each_in_turn(numbers: list[int], data: st.DataObject) -> None:
    counts = np.array(numbers, np.int64)
    begin = data.draw(st.lists(st.integers(-3, 20), min_size=len(numbers), max_size=len(numbers)))
    assert offsets(counts).tolist() == [sum(numbers[:i]) for i in range(len(numbers) + 1)]
    owner, within = expand(counts)
    expected = [(i, j) for i, count in enumerate(numbers) for j in range(count)]
    assert list(zip(owner.tolist(), within.tolist(), strict=True)) == expected
    found = ranges(np.array(begin, np.int64), counts).tolist()
    assert found == [begin[i] + j for i, j in expected]
    assert all(x.dtype == np.int64 for x in (offsets(counts), owner, within))


@pytest.mark.parametrize("largest", [5, 2**16 - 1, 2**16, 2**16 + 1, 2**40], ids=str)
def test_the_descending_and_equals_in_turn(largest: int) -> None:
    """Also where a difference does not fit the 16 bits that are sorted."""
    rng = np.random.default_rng(0)
    values = rng.choice([0, 1, 3, largest // 2, largest - 1, largest], 200)
    order = descending(values).tolist()
    assert order == sorted(range(200), key=lambda i: -int(values[i]))
    assert descending(values[:0]).tolist() == []
