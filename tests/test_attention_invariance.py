"""The same bits: from run to run, and with batch_invariant=True whatever else is in the batch."""

from dataclasses import replace

import pytest
import torch
from judged import attend, check
from running_on import INTERPRETED
from torch import Tensor

import hydragen
from hydragen import api
from hydragen.testing import Problem

PROBLEM = Problem(
    parents=(-1, 0, 0, 1),
    kv_lens=(300, 5, 0, 20),
    row_to_node=(3, 2, 1, 2),
    q_lens=(3, 1, 2, 1),
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    head_dim_v=16,
    sharpness="peaked",
)
SUFFIX_LENS = (9, 0, 20, 16, 1)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_two_runs_give_the_same_bits(batch_invariant: bool, backend: str, device: torch.device) -> None:
    first = attend(PROBLEM, backend, device, batch_invariant=batch_invariant)
    api._PLANS.clear()
    second = attend(PROBLEM, backend, device, batch_invariant=batch_invariant)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_batch_invariant_is_within_the_budget(backend: str, device: torch.device) -> None:
    for problem in (PROBLEM, replace(PROBLEM, causal=True, sinks=True)):
        check(problem, backend, device, batch_invariant=True)


def first_row(
    others: int, q_len: int, suffix_len: int, options: dict[str, object], backend: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`out` and `lse` of one row with so many others, which share its prefix, and some its suffix."""
    generator = torch.Generator().manual_seed(0)
    mine = [torch.randn(1, n, h, 32, generator=generator) for n, h in ((q_len, 4), (9, 2), (9, 2))]
    prefix, middle = (torch.randn(2, 1, n, 2, 32, generator=generator).to(device) for n in (30, 10))
    theirs = [torch.randn(others, n, h, 32, generator=generator) for n, h in ((q_len, 4), (20, 2), (20, 2))]
    suffixes = []
    for own, other in zip(mine[1:], theirs[1:], strict=True):
        room = torch.full((1 + others, 20, 2, 32), torch.nan)
        room[:1, :9] = own
        room[1:] = other
        suffixes.append(room.to(device))
    lens = [suffix_len, *(SUFFIX_LENS[i % len(SUFFIX_LENS)] for i in range(others))]
    row_to_node = [2, *(2 if i % 4 == 3 else 3 + i for i in range(others))]
    if options.get("sinks"):
        options = {**options, "sinks": torch.linspace(-2, 2, 4, device=device)}
    state = hydragen.attention(
        torch.cat([mine[0], theirs[0]]).to(device),
        [tuple(prefix), tuple(middle), tuple(suffixes)],
        tree=hydragen.PrefixTree.from_parents([-1, 0] + [1] * (1 + others), row_to_node=row_to_node),
        kv_lens=[None, [10 if suffix_len else 0], lens],
        return_lse=True,
        backend=backend,
        batch_invariant=True,
        **options,
    )
    return state.out[0], state.lse[0]


# Without a suffix the row alone has one partial, and no merge.
@pytest.mark.parametrize("suffix_len", [9, 0])
@pytest.mark.parametrize(
    "options", [{"sinks": True}, {"causal": True, "window": 30, "softcap": 4.0}], ids=["sinks", "masked"]
)
@pytest.mark.parametrize("q_len", [1, 3])
def test_other_rows_do_not_change_a_bit(
    q_len: int, options: dict[str, object], suffix_len: int, backend: str, device: torch.device
) -> None:
    alone = first_row(0, q_len, suffix_len, options, backend, device)
    for batch in (2, 5, 17) if INTERPRETED else (2, 5, 17, 256):
        together = first_row(batch - 1, q_len, suffix_len, options, backend, device)
        assert torch.equal(together[0], alone[0]), f"out in a batch of {batch}"
        assert torch.equal(together[1], alone[1]), f"lse in a batch of {batch}"


def test_a_row_in_any_place(backend: str, device: torch.device) -> None:
    """Rows permuted, outputs permuted, not a bit changed."""
    inputs = PROBLEM.tensors()
    out, lse = attend(PROBLEM, backend, device, inputs, batch_invariant=True)
    order = [2, 0, 3, 1]
    tokens = torch.cat([torch.arange(7).split(PROBLEM.q_lens)[row] for row in order])
    permuted = replace(
        PROBLEM,
        row_to_node=tuple(PROBLEM.row_to_node[row] for row in order),
        q_lens=tuple(PROBLEM.q_lens[row] for row in order),
    )
    offsets = torch.tensor([0, *permuted.q_lens]).cumsum(0).int()
    moved = replace(inputs, q=inputs.q[tokens], cu_seqlens_q=offsets)
    permuted_out, permuted_lse = attend(permuted, backend, device, moved, batch_invariant=True)
    assert torch.equal(permuted_out, out[tokens.to(device)])
    assert torch.equal(permuted_lse, lse[tokens.to(device)])
