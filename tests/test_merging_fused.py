"""The kernel that merges whole states: held against PyTorch's operations in float64."""

import math

import pytest
import torch
from torch import Tensor

import hydragen
from hydragen import AttentionState
from hydragen_reference import decomposed

pytestmark = pytest.mark.triton
HALF = (torch.float16, torch.bfloat16)


def states(
    shape: tuple[int, ...], count: int, dtype: torch.dtype, device: torch.device
) -> list[AttentionState]:
    generator = torch.Generator().manual_seed(count)
    return [
        AttentionState(
            torch.randn(shape, generator=generator).to(dtype).to(device),
            (3 * torch.randn(shape[:-1], generator=generator)).to(device),
        )
        for _ in range(count)
    ]


def check(given: list[tuple[Tensor, Tensor]], out_dtype: torch.dtype | None = None) -> None:
    """By the kernel, wherever it runs: `hydragen.merge_states` takes it on a GPU only."""
    from hydragen.backends.states import merge  # noqa: PLC0415 (needs triton)

    out_dtype = given[0][0].dtype if out_dtype is None else out_dtype
    before = [x.clone() for state in given for x in state]
    found = merge(given, out_dtype)
    exact = decomposed.merge_states([decomposed.State(out.double(), lse.double()) for out, lse in given])
    assert found.out.dtype == out_dtype
    assert found.lse.dtype == torch.float32
    eps = torch.finfo(out_dtype).eps
    torch.testing.assert_close(
        found.out.double(), exact.out, rtol=max(eps, 2e-6), atol=1e-6 if out_dtype not in HALF else eps / 2,
        equal_nan=True,
    )  # fmt: skip
    torch.testing.assert_close(found.lse.double(), exact.lse, rtol=1e-6, atol=1e-6, equal_nan=True)
    for x, copy in zip([x for state in given for x in state], before, strict=True):
        assert torch.equal(x.nan_to_num(), copy.nan_to_num())


@pytest.mark.parametrize("count", [1, 2, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_any_number_of_states(count: int, dtype: torch.dtype, device: torch.device) -> None:
    given = states((3, 5, 8), count, dtype, device)
    check(given)
    check(given, torch.float32)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (7, 300), (2, 3, 4, 33), (4, 3, 0), (0, 3, 4)], ids=str)
def test_any_shape(shape: tuple[int, ...], device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(states(shape, 3, dtype, device))


def test_infinities_and_nan(device: torch.device) -> None:
    inf = math.inf
    a = [-inf, -inf, inf, inf, math.nan, -1e30, 3e38, -6e4, 0.0]
    b = [-inf, 1.0, inf, -inf, 2.0, -1e30, -3e38, -6e4, math.nan]
    out = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    out[:, 0] = 0  # nothing attended
    given = [
        (out.to(device), torch.tensor([a, a], device=device)),
        (out.flip(2).to(device), torch.tensor([b, b], device=device)),
    ]
    check(given)
    check(given[::-1])
    empty = (torch.zeros_like(given[0][0]), torch.full_like(given[0][1], -inf))
    check([given[0], empty, empty])


def test_the_largest_numbers_do_not_overflow(device: torch.device) -> None:
    for dtype, large in ((torch.float32, 3e38), (torch.bfloat16, 3.3e38), (torch.float16, 65504.0)):
        out, lse = torch.full((1, 2), large, device=device).to(dtype), torch.zeros(1, device=device)
        check([(out, lse)] * 3)


def test_strides_and_overlapping_views(device: torch.device) -> None:
    x = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0)).to(device)
    lse = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).to(device).t()
    check([(x[..., :8], lse), (x[..., 2:], 2 * lse)])
    check([(x[:, :, ::2], lse), (x[:, :, 1::2], lse)])
    check([(x.transpose(0, 1)[..., 1:], lse.t()), (x[:1].expand(6, 6, 10)[:, :3, 1:], lse.t())])
    check([(x, lse[:, :1].expand(3, 6)), (x, lse)])


@pytest.mark.gpu
def test_merge_states_takes_the_kernel_on_a_gpu(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydragen.backends import states as fused  # noqa: PLC0415 (needs triton)

    calls = []
    usual = fused.merge
    monkeypatch.setattr(fused, "merge", lambda *given: calls.append(given) or usual(*given))
    given = states((64, 8, 128), 2, torch.float32, device)
    merged = hydragen.merge_states(given)
    assert len(calls) == 1
    wanted = hydragen.merge_states([AttentionState(out.double(), lse.double()) for out, lse in given])
    # what rounding of a logit, and of the exponent, may move
    largest = max(float(x.abs().max()) for state in given for x in state)
    tolerance = 4 * torch.finfo(torch.float32).eps * largest**2
    assert float((merged.out - wanted.out).abs().max()) <= tolerance
    assert float((merged.lse - wanted.lse).abs().max()) <= tolerance
    hydragen.merge_states([(out.half(), lse) for out, lse in given])
    assert len(calls) == 2, "float64 has no kernel, half precision has"
    hydragen.merge_states(given * 9)
    assert len(calls) == 2, "more than a launch reads"


@pytest.mark.gpu
def test_gradients_on_a_gpu_do_without_the_kernel(device: torch.device) -> None:
    given = states((4, 2, 16), 2, torch.float32, device)
    leaf = given[0].out.clone().requires_grad_()
    hydragen.merge_states([(leaf, given[0].lse), given[1]]).out.sum().backward()
    assert leaf.grad is not None
    with torch.no_grad():
        found = hydragen.merge_states([(leaf, given[0].lse), given[1]])
    assert torch.equal(found.out, hydragen.merge_states(given).out)


@pytest.mark.gpu
def test_more_rows_than_32_bits_can_place(device: torch.device) -> None:
    rows = 2**31 // 64 + 3
    a = torch.ones(1, 64, dtype=torch.float16, device=device).expand(rows, 64)
    b = torch.full((rows, 64), 3.0, dtype=torch.float16, device=device)
    lse = torch.zeros(1, device=device).expand(rows)
    found = hydragen.merge_states([(a, lse), (b, lse)])
    assert bool((found.out[-5:] == 2).all())
    assert bool((found.out[:5] == 2).all())
    assert float(found.lse[-1]) == pytest.approx(math.log(2))
