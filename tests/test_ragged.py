"""Vectors end to end, against loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydragen.ragged import changes, descending, expand, offsets, ranges

COUNTS = st.lists(st.integers(0, 5), max_size=8)


@given(COUNTS, st.data())
def test_each_in_turn(numbers: list[int], data: st.DataObject) -> None:
    counts = np.array(numbers, np.int64)
    begin = data.draw(st.lists(st.integers(-3, 20), min_size=len(numbers), max_size=len(numbers)))
    assert offsets(counts).tolist() == [sum(numbers[:i]) for i in range(len(numbers) + 1)]
    owner, within = expand(counts)
    expected = [(i, j) for i, count in enumerate(numbers) for j in range(count)]
    assert list(zip(owner.tolist(), within.tolist(), strict=True)) == expected
    found = ranges(np.array(begin, np.int64), counts, offsets(counts)).tolist()
    assert found == [begin[i] + j for i, j in expected]
    assert all(x.dtype == np.int64 for x in (offsets(counts), owner, within))


@pytest.mark.parametrize("largest", [5, 2**14 - 1, 2**14, 2**16 - 1, 2**16, 2**16 + 1, 2**40], ids=str)
def test_the_descending_and_equals_in_turn(largest: int) -> None:
    """By two numbers, also where they do not fit the 16 bits that are sorted."""
    rng = np.random.default_rng(0)
    minor = rng.choice([0, 1, 3, largest // 2, largest - 1, largest], 200)
    for majors in ([0], [0, 1, 3], [2, 2**17]):
        major = rng.choice(majors, 200)
        for first, second in ((major, minor), (minor, major)):
            largest_first = sorted(zip((-first).tolist(), (-second).tolist(), range(200), strict=True))
            assert descending(first, second).tolist() == [place for _, _, place in largest_first]
    assert descending(minor[:0], minor[:0]).tolist() == []


@given(st.lists(st.integers(0, 2), max_size=8))
def test_where_stretches_begin(values: list[int]) -> None:
    expected = [i for i, x in enumerate(values) if i == 0 or x != values[i - 1]]
    assert changes(np.array(values, np.int64)).tolist() == expected
