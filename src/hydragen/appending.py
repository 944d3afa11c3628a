"""New tokens into a cache, by whichever code suits where they are."""

from __future__ import annotations

import torch
from torch import Tensor

from hydragen.backends import Backend, choose_backend
from hydragen.backends.appends import Slots, write

__all__ = ["Slots", "append_tokens"]


def append_tokens(
    caches: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    slots: Slots,
    backend: Backend | None = None,
) -> None:
    """Write new tokens into caches as `backends.appends.write` says.

    What torch.compile traces is plain PyTorch, to be fused with what is around it; `backend`: that of a plan.
    """
    if torch.compiler.is_compiling():
        write(caches, new, slots)
    else:
        backend = choose_backend("auto", new[0]) if backend is None else backend
        backend.append(caches, new, slots)
