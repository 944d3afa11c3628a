"""What the processes of a tensor-parallel model must agree on: they run the same steps on the same tokens."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hydragen.host_ints import IntArray


def processes(model: PreTrainedModel) -> int:
    """Return how many processes hold parts of the model, each the same number of heads."""
    return (getattr(model, "tp_size", None) or 1) if torch.distributed.is_initialized() else 1


def is_parallel(model: PreTrainedModel) -> bool:
    """Whether other processes hold parts of the model."""
    return processes(model) > 1


def smallest(model: PreTrainedModel, value: int) -> int:
    """Return the smallest `value` of all processes."""
    if not is_parallel(model):
        return value
    agreed = torch.tensor(value, device=model.device)
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN)
    return int(agreed)


def of_the_first(model: PreTrainedModel, values: IntArray) -> IntArray:
    """Return the first process's `values`."""
    if not is_parallel(model):
        return values
    agreed = torch.from_numpy(values).to(model.device)
    torch.distributed.broadcast(agreed, src=0)
    first: IntArray = agreed.cpu().numpy()
    return first
