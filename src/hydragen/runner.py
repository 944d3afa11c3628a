"""Runs of a plan: checked the first time, recognised afterwards."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from hydragen.backends import Backend, Ready
from hydragen.backends.tokens import needs_positions
from hydragen.lengths import KVLens
from hydragen.plan_state import PlanState
from hydragen.types import AttentionState
from hydragen.validation import Call, check_options
from hydragen.validation.planned import Planned, check_run
from hydragen.work import WorkPlan
from hydragen_reference.segment import in_transform

# Types of options; values of all of them can be looked up.
_ALLOWED = frozenset({type(None), bool, int, float, torch.dtype})

_DESCRIBED = attrgetter("shape", "dtype", "layout", "device", "requires_grad")

# A plan's layers and options come in a few kinds; where they never repeat, they must not pile up.
_MOST_KINDS = 256


class Runner:
    """What computes the runs of a plan, and remembers which kinds of call it has seen.

    A call differs from the last one in nothing but what its tensors hold, layer after layer. To check it in
    full takes longer than many of the kernels.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._ready: dict[tuple[Any, ...], Ready] = {}

    def forget(self) -> None:
        """Check everything once more: the plan has changed."""
        self._ready.clear()

    def run(
        self,
        planned: Planned,
        work: WorkPlan,
        state: PlanState,
        q: Any,
        kv: Any,
        sinks: Any,
        options: tuple[Any, ...],
    ) -> AttentionState:
        """Compute one call.

        Parameters
        ----------
        planned, work, state : the plan's
        q, kv, sinks : as given to `Plan.run`
        options : scale, causal, window, softcap, return_lse and out_dtype, as given to it

        Raises
        ------
        TypeError, ValueError
            As `Plan.run` says.
        """
        # what a transform does to a tensor does not show in its shape, nor in any other part of a key
        again = None if in_transform() else _recognise(q, kv, planned.nodes.by_level, sinks, options)
        if again is not None:
            key, k, v = again
            ready = self._ready.get(key)
            if ready is not None:
                return ready(q, k, v, sinks)
        q, nodes = check_run(planned, q, kv)
        scale, causal, window, softcap, return_lse, out_dtype = options
        checked = check_options(q, scale, causal, window, softcap, sinks, return_lse, out_dtype)
        rows = planned.rows
        call = Call(
            q, rows.starts, rows.lens, rows.cu_seqlens_q, nodes, planned.tree, KVLens(work.kv_lens),
            planned.heads, checked,
        )  # fmt: skip
        tokens = state.tokens(planned, work, needs_positions(work, call))
        if again is not None and (ready := self._backend.ready(work, call, tokens)) is not None:
            if len(self._ready) >= _MOST_KINDS:
                self._ready.clear()
            key, k, v = again
            self._ready[key] = ready
            return ready(q, k, v, sinks)
        return self._backend.run(work, call, tokens)


def _recognise(
    q: Any, kv: Any, by_level: bool, sinks: Any, options: tuple[Any, ...]
) -> tuple[tuple[Any, ...], tuple[Tensor, ...], tuple[Tensor, ...]] | None:
    """Return all that checks look at, so that equal keys mean equal outcomes, and the levels' k and v.

    None where only the checks can tell: unless keys and values are plain tensors in a pair, or in a list of
    pairs where they come by level. This runs before every launch, and is written for that.
    """
    if type(kv) is not tuple and type(kv) is not list:
        return None
    for pair in kv if by_level else (kv,):
        if type(pair) is not tuple or len(pair) != 2:
            return None
    tensors = [q, *chain.from_iterable(kv)] if by_level else [q, *kv]
    if sinks is not None:
        tensors.append(sinks)
    key: list[Any] = []
    try:
        for x in tensors:
            # a sign kept aside is not in the memory
            if type(x) is not Tensor or x.is_neg():
                return None
            key += _DESCRIBED(x)
            key.append(x.stride())
    except RuntimeError:  # nested tensors have no shape, and compressed sparse ones no strides
        return None
    # 1, 1.0 and True are equal, and not all of them are allowed
    kinds = tuple(map(type, options))
    if not _ALLOWED.issuperset(kinds):
        return None
    key += options
    last = 1 + 2 * len(kv) if by_level else 3
    return (*key, kinds, last, torch.is_grad_enabled()), tuple(tensors[1:last:2]), tuple(tensors[2:last:2])
