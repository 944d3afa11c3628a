"""Arguments that are unusual but right, and lengths on a GPU, which are checked only on demand."""

import fractions
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from right_arguments import (
    BATCH,
    HEAD_DIM,
    NUM_Q_HEADS,
    Q_LEN,
    keys,
    packed,
    packed_kv,
    star,
    two_levels,
    zeros,
)

import hydragen
from hydragen import PackedKV


def conjugate_part(x: torch.Tensor) -> torch.Tensor:
    """-x as a view whose sign is kept aside."""
    return torch.complex(x, x).conj().imag


NO_ROWS = zeros(0, Q_LEN, NUM_Q_HEADS, HEAD_DIM)
RIGHT = {
    "numpy scale": two_levels(scale=np.float32(0.5)),
    "integer scale": two_levels(scale=0),
    "fraction": two_levels(scale=fractions.Fraction(1, 3), softcap=np.float64(2)),
    "numpy window": two_levels(window=np.int32(3)),
    "huge window": two_levels(window=10**30),
    "tuples": two_levels(kv=tuple(two_levels()["kv"]), kv_lens=(None, (0, 1, 2, 3))),
    "level lists": two_levels(kv=[list(level) for level in two_levels()["kv"]]),
    "numpy lens": two_levels(kv_lens=[np.array([5]), np.array([3, 2, 1, 0], np.uint8)]),
    "tensor lens": two_levels(kv_lens=[None, torch.tensor([3, 2, 1, 0], dtype=torch.int32)]),
    "packed lens": packed(kv_lens=(5, 0, 0, 1, 2)),
    "tensor offsets": packed(kv=packed_kv(cu_seqlens_k=torch.tensor([0, 5, 8, 11, 14, 17]).int())),
    "numpy max": packed(max_seqlen_q=np.int64(4)),
    "parameter": two_levels(q=torch.nn.Parameter(zeros(BATCH, Q_LEN, NUM_Q_HEADS, HEAD_DIM))),
    "no rows": two_levels(q=NO_ROWS, kv=[(keys(1), keys(1)), (keys(0), keys(0))]),
    "no rows, lens": two_levels(q=NO_ROWS, kv=[(keys(1), keys(1)), (keys(0), keys(0))], kv_lens=[[2], []]),
    "no nodes": two_levels(q=NO_ROWS, kv=[(keys(0), keys(0))]),
    "no queries": packed(q=zeros(0, NUM_Q_HEADS, HEAD_DIM), cu_seqlens_q=[0] * 5, max_seqlen_q=0),
    "no packed rows": packed(
        q=zeros(0, 4, 8), cu_seqlens_q=[0], tree=None, kv=packed_kv(zeros(0, 2, 8), zeros(0, 2, 8), [0])
    ),
    "levels of no tokens": two_levels(kv=[(keys(1, 0), keys(1, 0)), (keys(4, 0), keys(4, 0))]),
    "wider values": two_levels(kv=[(keys(), keys(dim=256))]),
    "expanded": two_levels(kv=[(keys(1).expand(4, -1, -1, -1), keys(1).expand(4, -1, -1, -1))]),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_unusual_but_right(name: str, backend: str, device: torch.device) -> None:
    def there(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x if x.dtype in (torch.int32, torch.int64) else x.to(device)
        if isinstance(x, PackedKV):
            return PackedKV(there(x.k), there(x.v), x.cu_seqlens_k)
        return type(x)(map(there, x)) if isinstance(x, (list, tuple)) else x

    arguments = {key: there(value) for key, value in RIGHT[name].items()}
    with torch.no_grad():
        out = hydragen.attention(**arguments, backend=backend)
    kv = arguments["kv"]
    head_dim_v = (kv.v if isinstance(kv, PackedKV) else kv[0][1]).shape[-1]
    assert out.shape == (*arguments["q"].shape[:-1], head_dim_v)
    assert not out.any()


def test_a_sign_kept_aside_is_seen(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 2, 8, generator=generator).to(device) for _ in range(3))
    seen = [conjugate_part(x) for x in (q, k, v)]
    assert all(x.is_neg() for x in seen)
    got = hydragen.attention(seen[0], [(seen[1], seen[2])], backend=backend)
    expected = hydragen.attention(-q, [(-k, -v)], backend=backend)
    assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda lens: lens.float(),
            TypeError,
            r"kv_lens\[1\] must be int32 or int64, got torch.float32; .*\.int",
        ),
        (lambda lens: lens[:3], ValueError, r"kv_lens\[1\] must have shape \[4\].*got \[3\]; "),
        (
            lambda lens: lens + 1,
            ValueError,
            r"kv_lens\[1\] must not exceed .*got 4 at index 0 where kv has 3; ",
        ),
        (lambda lens: lens - 1, ValueError, r"kv_lens\[1\] must not be negative, got -1 at index 3; "),
    ],
)
def test_lengths_on_the_device(
    backend: str, change: Callable[[torch.Tensor], torch.Tensor], error: type[Exception], message: str
) -> None:
    right = two_levels()
    q, kv = right["q"].cuda(), [(k.cuda(), v.cuda()) for k, v in right["kv"]]
    lens = change(torch.tensor([3, 2, 1, 0], dtype=torch.int32, device="cuda"))
    with pytest.raises(error, match=message):
        hydragen.attention(q, kv, kv_lens=[None, lens], backend=backend, validate=True)


@pytest.mark.gpu
def test_validate_reads_offsets_on_the_device() -> None:
    right = packed()
    q, kv = right["q"].cuda(), PackedKV(right["kv"].k.cuda(), right["kv"].v.cuda(), right["kv"].cu_seqlens_k)
    cu = torch.tensor([0, 1, 3, 3, 9], device="cuda")
    with pytest.raises(ValueError, match=r"cu_seqlens_q must end with the number of tokens in q, 7, got 9; "):
        hydragen.attention(q, kv, tree=star(), cu_seqlens_q=cu, max_seqlen_q=6, validate=True)
    with pytest.raises(
        ValueError, match=r"max_seqlen_q must be given when cu_seqlens_q lives on a device.*None; "
    ):
        hydragen.attention(q, kv, tree=star(), cu_seqlens_q=cu)


@pytest.mark.gpu
def test_tensors_on_two_devices() -> None:
    right = two_levels()
    q, kv = right["q"].cuda(), [(k.cuda(), v.cuda()) for k, v in right["kv"]]
    with pytest.raises(ValueError, match=r"kv\[1\] v must be on the device of q, cuda:0, got cpu; "):
        hydragen.attention(q, [kv[0], (kv[1][0], right["kv"][1][1])])
    with pytest.raises(ValueError, match=r"sinks must be on the device of q, cuda:0, got cpu; "):
        hydragen.attention(q, kv, sinks=zeros(NUM_Q_HEADS))
