"""Mixtures of experts in a decode step: a product that a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from hydragen.transformers.support import text_config

_GROUPED, _BATCHED = "grouped_mm", "batched_mm"


def batched_pays(model: PreTrainedModel, rows: int) -> bool:
    """Whether decode steps of `rows` tokens should copy each token's experts ("batched_mm").

    The usual product ("grouped_mm") reads its offsets on the host, which no CUDA graph can hold, unless
    weights are bfloat16 and the device is of sm_90 or later (pytorch issue 169970). Copies are for those who
    have the memory: a quarter of what is free is the most.
    """
    if model.device.type != "cuda" or _GROUPED not in model.get_experts_implementation().values():
        return False
    if model.dtype == torch.bfloat16 and torch.cuda.get_device_capability(model.device) >= (9, 0):
        return False
    return batched_bytes(model, rows) <= torch.cuda.mem_get_info(model.device)[0] / 4


def batched_bytes(model: PreTrainedModel, rows: int) -> int:
    """Return what the copies of one layer's chosen experts take at most, two products' at a time."""
    chosen = getattr(text_config(model), "num_experts_per_tok", None) or 1
    sizes = [x[0].numel() * x.element_size() for x in model.parameters() if x.dim() == 3]
    return 2 * rows * chosen * max(sizes, default=0)


@contextmanager
def batched_experts(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Let the model copy its experts, if `wanted`, as transformers' own generate does in its decode steps."""
    before = model.get_experts_implementation() if wanted else {}
    if wanted:
        model.set_experts_implementation(
            {name: _BATCHED if kind == _GROUPED else kind for name, kind in before.items()}
        )
    try:
        yield
    finally:
        if wanted:
            model.set_experts_implementation(before)
