"""Batch-invariant plans: a row's bits do not depend on who is beside it, their lengths, or on its place."""

import pytest
import torch
from running_on import INTERPRETED
from steps import DIM, HEADS, KV_HEADS, normal
from torch import Tensor

import hydragen
from hydragen import PackedKV, PrefixTree

PREFIX, OWN, SPARE = 70, 9, 3
LONG = 300 if INTERPRETED else 5000
NEIGHBOURS = {"short": [0, 1, 5], "long": [LONG], "mixed": [1, LONG, 0, 40, OWN]}
BATCHES = (2, 17) if INTERPRETED else (2, 17, 256)


def row(
    lens: list[int], place: int, reserve: float, growing: bool, backend: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`out` and `lse` of the row in `place`, of OWN tokens; the others' suffixes have the other `lens`."""
    batch, room = len(lens), [PREFIX, *(n + SPARE for n in lens)]
    tree = PrefixTree.from_parents([-1] + [0] * batch)
    prefix, mine = normal(2, PREFIX, KV_HEADS, DIM, seed=1), normal(2, OWN, KV_HEADS, DIM, seed=2)
    k, v = torch.full((2, sum(room), KV_HEADS, DIM), torch.nan)
    q = normal(batch, 1, HEADS, DIM, seed=3)
    q[place] = normal(1, HEADS, DIM, seed=4)
    begin = [0, *torch.tensor(room).cumsum(0).tolist()]
    for x, p, own in zip((k, v), prefix, mine, strict=True):
        x[:PREFIX] = p
        for i, n in enumerate(lens):
            x[begin[i + 1] : begin[i + 1] + n] = own if i == place else normal(n, KV_HEADS, DIM, seed=5 + i)
    kv = PackedKV(k.to(device), v.to(device), begin)
    full = torch.tensor([PREFIX, *lens], device=device)
    if growing:
        first = torch.tensor([PREFIX, *(n // 2 for n in lens)], device=device)
        plan = hydragen.plan(
            tree, kv, num_q_heads=HEADS, kv_lens=first, backend=backend, batch_invariant=True, reserve=reserve
        )
        plan.update(full)
    else:
        plan = hydragen.plan(
            tree, kv, num_q_heads=HEADS, kv_lens=full.tolist(), backend=backend, batch_invariant=True,
            reserve=reserve,
        )  # fmt: skip
    found = plan.run(q.to(device), kv, return_lse=True, causal=True)
    assert isinstance(found, hydragen.AttentionState)
    return found.out[place], found.lse[place]


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
@pytest.mark.parametrize(("growing", "reserve"), [(False, 1.0), (True, 1.0), (True, 2.0)])
def test_neighbours_do_not_change_a_bit(
    neighbours: str, growing: bool, reserve: float, backend: str, device: torch.device
) -> None:
    alone = row([OWN], 0, reserve, growing, backend, device)
    for batch in BATCHES:
        if batch > 17 and neighbours == "long":
            continue  # a gigabyte of keys that the mixed ones stand for
        lens = [NEIGHBOURS[neighbours][i % len(NEIGHBOURS[neighbours])] for i in range(batch)]
        for place in (0, batch - 1):
            there = [OWN if i == place else n for i, n in enumerate(lens)]
            together = row(there, place, reserve, growing, backend, device)
            assert torch.equal(together[0], alone[0]), f"out in a batch of {batch}, place {place}"
            assert torch.equal(together[1], alone[1]), f"lse in a batch of {batch}, place {place}"


@pytest.mark.triton
def test_plans_have_the_bits_of_attention(device: torch.device) -> None:
    found = [row([OWN], 0, reserve, growing, "triton", device) for reserve, growing in
             ((1.0, False), (1.0, True), (2.0, True))]  # fmt: skip
    prefix, mine = normal(2, PREFIX, KV_HEADS, DIM, seed=1), normal(2, OWN, KV_HEADS, DIM, seed=2)
    levels = [tuple(x[None].to(device) for x in pair) for pair in (prefix, mine)]
    q = normal(1, HEADS, DIM, seed=4)[None].to(device)
    out, lse = hydragen.attention(
        q, levels, causal=True, return_lse=True, batch_invariant=True, backend="triton"
    )
    for one in found:
        assert torch.equal(one[0], out[0])
        assert torch.equal(one[1], lse[0])
