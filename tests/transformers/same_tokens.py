"""Comparison of generated tokens with the ordinary path, which counts near-ties instead of hiding them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

PAD = 0


def left_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask [rows, longest]."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def oracle_of(reference: PreTrainedModel) -> PreTrainedModel:
    """The same model in float64."""
    exact = copy.deepcopy(reference).double()
    exact.set_experts_implementation("eager")  # the grouped product of experts has no float64
    return exact


def assert_logits_within_budget(ours: Tensor, reference: Tensor, exact: Tensor) -> None:
    """At most twice the ordinary path's own error, and the rounding of the result itself."""
    __tracebackhide__ = True
    error = (ours.double() - exact).abs().max().item()
    budget = 2 * (reference.double() - exact).abs().max().item()
    budget += torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error <= budget, f"logits are off by {error:.3g}; the budget is {budget:.3g}"


def assert_same_tokens(ours: Tensor, reference: Tensor, margins: Tensor, threshold: float) -> int:
    """Tokens [rows, new] agree up to each row's first near-tie; returns the number of rows that have one.

    margins [rows, new] is how far the reference's choice was ahead of the next.
    """
    __tracebackhide__ = True
    assert ours.shape == reference.shape, f"{list(ours.shape)} tokens, expected {list(reference.shape)}"
    tied = 0
    for row in range(len(ours)):
        near = (margins[row] < threshold).nonzero()
        end = int(near[0]) if len(near) else ours.shape[1]
        tied += len(near) > 0
        assert ours[row, :end].tolist() == reference[row, :end].tolist(), f"row {row} differs"
        assert end > 0 or ours.shape[1] == 0, f"row {row} is a near-tie from the start: nothing is tested"
    return tied
