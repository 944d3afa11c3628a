"""Which code computes: chosen by name, imported when needed, never replaced silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hydragen.backends.appends import Slots
from hydragen.backends.tokens import Tokens
from hydragen.types import AttentionState
from hydragen.validation import Call
from hydragen.work import WorkPlan

# q, keys of all levels, values of all levels, sinks
Ready = Callable[[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None], AttentionState]


class Backend(Protocol):
    """What every backend can do.

    RUNS_TILES : whether it computes in the tiles of the plan.
    """

    RUNS_TILES: bool

    def run(self, plan: WorkPlan, call: Call, tokens: Tokens | None = None) -> AttentionState:
        """Compute one planned call; `lse` may be empty unless `call.options.return_lse`.

        `tokens` is what `tokens.locate` returns, if it is known already.
        """
        ...

    def ready(self, plan: WorkPlan, call: Call, tokens: Tokens) -> Ready | None:
        """Return what computes calls like this one with other tensors; None: `run` has nothing to spare."""
        ...

    def prepare(self, plan: WorkPlan, device: torch.device) -> None:
        """Bring to `device` what `plan` needs there, memory for partial results included."""
        ...

    def replace_tables(self, plan: WorkPlan, device: torch.device) -> None:
        """Overwrite, on `device`, the tables of the plan before, whose `uploads` this one has."""
        ...

    def append(self, caches: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], slots: Slots) -> None:
        """Write new tokens into caches, as `appends.write` says."""
        ...


def choose_backend(backend: str, q: Tensor) -> Backend:
    """Return the backend, a module; "auto" is Triton for CUDA tensors and the reference elsewhere."""
    if backend == "triton" or (backend == "auto" and q.device.type == "cuda"):
        try:
            from hydragen.backends import triton  # noqa: PLC0415 (the library works without triton)
        except ImportError as error:
            raise ValueError(
                f"backend {backend!r} needs the package triton, which cannot be imported here ({error}); "
                'install triton or pass backend="reference"'
            ) from error
        return triton
    from hydragen.backends import reference  # noqa: PLC0415 (only the backend that is needed)

    return reference
