import numpy as np
import pytest
import torch

from hydragen.host_ints import as_index, as_int_vector, as_positive_int


@pytest.mark.parametrize(
    "value",
    [
        [3, 0, -1],
        (3, 0, -1),
        np.array([3, 0, -1], dtype=np.int8),
        np.array([3, 9, 0, 9, -1])[::2],
        torch.tensor([3, 0, -1]),
        torch.tensor([3, 0, -1], dtype=torch.int16),
        [np.int32(3), 0, np.int64(-1)],
        [torch.tensor(3), torch.tensor(0), torch.tensor(-1)],
    ],
)
def test_every_kind_of_vector_is_accepted(value: object) -> None:
    array = as_int_vector(value, "x")
    assert array.dtype == np.int64
    assert array.tolist() == [3, 0, -1]


@pytest.mark.parametrize("value", [[], (), np.array([], dtype=np.int32), torch.zeros(0, dtype=torch.int64)])
def test_empty_vectors_are_vectors(value: object) -> None:
    assert as_int_vector(value, "x").shape == (0,)
    assert as_int_vector(value, "x").dtype == np.int64


DTYPE = "x must hold integers that fit in int64, got dtype {} from {}"
CAST = "; convert it with .astype(numpy.int64), or .long() for a tensor"


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0, 2.0], TypeError, DTYPE.format("float64", "list [1.0, 2.0]") + CAST),
        ([1, float("nan")], TypeError, DTYPE.format("float64", "list [1, nan]") + CAST),
        ([1j], TypeError, DTYPE.format("complex128", "list [1j]") + CAST),
        ([True], TypeError, DTYPE.format("bool", "list [True]") + CAST),
        (
            torch.ones(1),
            TypeError,
            DTYPE.format("float32", "Tensor of dtype torch.float32 and shape (1,)") + CAST,
        ),
        (np.zeros(0), TypeError, DTYPE.format("float64", "ndarray of dtype float64 and shape (0,)") + CAST),
        (["a"], TypeError, DTYPE.format("<U1", "list ['a']") + CAST),
        ("ab", TypeError, DTYPE.format("<U2", "str 'ab'") + CAST),
        ([1, None], TypeError, DTYPE.format("object", "list [1, None]") + CAST),
        (None, TypeError, DTYPE.format("object", "NoneType None") + CAST),
        ([2**64], TypeError, DTYPE.format("object", f"list [{2**64}]") + CAST),
        (
            torch.ones(1, dtype=torch.bfloat16),
            TypeError,
            "x must be a list, array or CPU tensor of integers, got Tensor of dtype torch.bfloat16 "
            "and shape (1,); copy a device tensor to the host with .cpu()",
        ),
        (
            torch.ones(2, dtype=torch.int64, device="meta"),
            TypeError,
            "x must be a list, array or CPU tensor of integers, got Tensor of dtype torch.int64 "
            "and shape (2,); copy a device tensor to the host with .cpu()",
        ),
        (
            [[1, 2], [3]],
            ValueError,
            "x must be a 1-D list of integers, got lists of unequal lengths: list [[1, 2], [3]]; "
            "give one integer per entry",
        ),
        (
            [[1, 2]],
            ValueError,
            "x must be 1-D, got shape (1, 2) from list [[1, 2]]; "
            "give one integer per entry, in a list or a 1-D array",
        ),
        (
            7,
            ValueError,
            "x must be 1-D, got shape () from int 7; give one integer per entry, in a list or a 1-D array",
        ),
        (
            [2**63],
            ValueError,
            f"x must hold integers that fit in int64, got {2**63}; give integers of at most 2**63 - 1",
        ),
    ],
)
def test_what_is_no_vector_of_integers(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        as_int_vector(value, "x")
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [2, np.int32(2), np.array(2), torch.tensor(2)])
def test_single_integers(value: object) -> None:
    assert as_positive_int(value, "n") == as_index(value, "i", 3, "rows") == 2


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), 1.0, "1", None, [1, 2], np.array([1, 2]), np.ones(())]
)
def test_what_is_no_single_integer(value: object) -> None:
    with pytest.raises(
        TypeError, match=r"^n must be an integer of at least 1, got .*; give a single integer$"
    ):
        as_positive_int(value, "n")
    with pytest.raises(TypeError, match=r"^i must be the index of one of the 3 rows, counted from 0, got .*"):
        as_index(value, "i", 3, "rows")


def test_single_integers_out_of_range() -> None:
    with pytest.raises(
        ValueError, match=r"^n must be an integer of at least 1, got 0; choose a larger value$"
    ):
        as_positive_int(0, "n")
    for value, size in [(-1, 3), (3, 3), (0, 0)]:
        message = (
            f"^i must be the index of one of the {size} rows, counted from 0, got {value}; choose a value"
        )
        with pytest.raises(ValueError, match=message):
            as_index(value, "i", size, "rows")
