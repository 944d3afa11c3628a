"""The launch that appends, against plain PyTorch: strides, sizes of heads, and what is not written."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hydragen.backends.append_launch import append as launch
from hydragen.backends.appends import Slots, write

pytestmark = pytest.mark.triton
ROWS, Q_LEN = 5, 2


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device) -> Tensor:
    """Any bits, NaN among them: they are copied, not computed with."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).to(device)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def layouts(name: str, heads: int, dim: int, dtype: torch.dtype, seed: int, device: torch.device) -> Tensor:
    """A cache of 24 places [6, 4] or [24], whatever lies between."""
    if name == "packed":
        return bits((24, heads, dim), dtype, seed, device)
    if name == "pages":
        return bits((6, 4, heads, dim), dtype, seed, device)
    if name == "heads first":
        return bits((6, heads, 4, dim), dtype, seed, device).transpose(1, 2)
    if name == "elements apart":
        return bits((6, 4, heads, 3 * dim), dtype, seed, device)[..., ::3]
    return bits((6, 4, 2 * heads + 1, dim), dtype, seed, device)[:, :, 1::2]  # every other head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "dim", "dim_v"), [(1, 64, 64), (8, 128, 128), (11, 40, 24)])
@pytest.mark.parametrize("layout", ["packed", "pages", "heads first", "elements apart", "every other head"])
def test_it_copies_bits(
    layout: str, heads: int, dim: int, dim_v: int, dtype: torch.dtype, device: torch.device
) -> None:
    new = [bits((ROWS, Q_LEN, heads, 2 * d), dtype, seed, device) for seed, d in enumerate((dim, dim_v))]
    new = [x[..., ::2] if layout == "elements apart" else x[..., : x.shape[-1] // 2] for x in new]
    at = torch.randperm(24, generator=torch.Generator().manual_seed(3))[: ROWS * Q_LEN]
    at = at.view(ROWS, Q_LEN).to(device)
    place = (at,) if layout == "packed" else (at // 4, at % 4)
    source = torch.arange(ROWS * Q_LEN, device=device).flip(0).view(ROWS, Q_LEN)
    fresh = torch.tensor([[True, False], [True, True], [False, False], [True, True], [False, True]]).to(
        device
    )
    for more in ({}, {"source": source}, {"source": source, "fresh": fresh}):
        caches = [
            [layouts(layout, heads, d, dtype, 10 + i, device) for i, d in enumerate((dim, dim_v))]
            for _ in range(2)
        ]
        write(tuple(caches[0]), tuple(new), Slots(place, **more))
        launch(tuple(caches[1]), tuple(new), Slots(place, **more))
        for expected, found in zip(*caches, strict=True):
            assert same(expected, found)


def test_rows_of_a_transposed_tensor_and_one_place_each(device: torch.device) -> None:
    """As models give them: heads before tokens, and one index for each token."""
    new = [bits((ROWS, 3, Q_LEN, 64), torch.bfloat16, seed, device).transpose(1, 2) for seed in (0, 1)]
    at = torch.arange(ROWS * Q_LEN, device=device) * 2 + 1
    caches = [[bits((24, 3, 64), torch.bfloat16, 5 + i, device) for i in range(2)] for _ in range(2)]
    for some in (slice(None), slice(1, 6)):
        chosen: dict[str, Any] = {"source": torch.arange(ROWS * Q_LEN, device=device)[some]}
        write(tuple(caches[0]), tuple(new), Slots((at[some],), **chosen))
        launch(tuple(caches[1]), tuple(new), Slots((at[some],), **chosen))
        assert all(same(a, b) for a, b in zip(*caches, strict=True))


def test_nothing_to_write(device: torch.device) -> None:
    cache = bits((24, 2, 64), torch.bfloat16, 0, device)
    before = cache.clone()
    nowhere = torch.zeros(0, Q_LEN, dtype=torch.int64, device=device)
    new = bits((0, Q_LEN, 2, 64), torch.bfloat16, 1, device)
    launch((cache, cache), (new, new), Slots((nowhere,)))
    assert same(cache, before)


def test_elements_further_apart_than_2_to_the_31(device: torch.device) -> None:
    """head_dim first in memory: 4 GiB, of which a few elements are touched."""
    cache = torch.empty(129, 2**24 + 1, 1, dtype=torch.float16, device=device).permute(1, 2, 0)
    new = torch.arange(129.0, device=device).half().view(1, 1, 1, 129)
    small = torch.zeros(4, 1, 8, dtype=torch.float16, device=device)
    where = torch.ones(1, 1, dtype=torch.int64, device=device)
    launch((cache, small), (new, new[..., :8].contiguous()), Slots((where,)))
    assert torch.equal(cache[1, 0], new.flatten())
    assert torch.equal(small[1, 0], new.flatten()[:8])


def test_values_of_another_dtype_are_another_kernel(device: torch.device) -> None:
    where = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for dtype in (torch.bfloat16, torch.float32):
        new = [
            torch.full((1, 1, 2, 64), x, dtype=d, device=device) for x, d in ((1, torch.float32), (2, dtype))
        ]
        caches = [torch.zeros(3, 2, 64, dtype=x.dtype, device=device) for x in new]
        launch((caches[0], caches[1]), (new[0], new[1]), Slots((where,)))
        assert [x[0].unique().tolist() for x in caches] == [[1.0], [2.0]]


def test_beyond_2_to_the_31_elements(device: torch.device) -> None:
    """4 GiB, of which three rows are touched."""
    cache = torch.empty(2**21 + 2, 8, 128, dtype=torch.float16, device=device)
    cache[1] = 0
    new = torch.ones(2, 1, 8, 128, dtype=torch.float16, device=device)
    launch((cache, cache), (new, new), Slots((torch.tensor([[0], [2**21 + 1]], device=device),)))
    assert (cache[0] == 1).all()
    assert (cache[-1] == 1).all()
    assert not cache[1].any()


def test_autograd_sees_that_it_has_written(device: torch.device) -> None:
    cache = torch.zeros(4, 2, 64, device=device)
    new = torch.ones(1, 1, 2, 64, device=device)
    before = cache._version
    where = torch.zeros(1, 1, dtype=torch.int64, device=device)
    launch((cache, cache.clone()), (new, new), Slots((where,)))
    assert cache._version > before
