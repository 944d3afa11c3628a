"""Runs of a plan: checked the first time, recognised afterwards."""

from __future__ import annotations

from typing import Any, NamedTuple

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

# A plan's layers and options come in a few kinds; where they never repeat, they must not pile up.
_MOST_KINDS = 256


class Options(NamedTuple):
    """Of one run, as given."""

    scale: Any
    causal: Any
    window: Any
    softcap: Any
    return_lse: Any
    out_dtype: Any


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
        self, planned: Planned, work: WorkPlan, state: PlanState, q: Any, kv: Any, sinks: Any, given: Options
    ) -> AttentionState:
        """Compute one call.

        Parameters
        ----------
        planned, work, state : the plan's
        q, kv, sinks, given : as given to `Plan.run`

        Raises
        ------
        TypeError, ValueError
            As `Plan.run` says.
        """
        # what a transform does to a tensor does not show in its shape, nor in any other part of a key
        again = None if in_transform() else _recognise(q, kv, planned.nodes.by_level, sinks, given)
        if again is not None and (ready := self._ready.get(again.key)) is not None:
            return ready(q, again.k, again.v, sinks)
        q, nodes = check_run(planned, q, kv)
        options = check_options(
            q,
            given.scale,
            given.causal,
            given.window,
            given.softcap,
            sinks,
            given.return_lse,
            given.out_dtype,
        )
        rows = planned.rows
        call = Call(
            q, rows.starts, rows.lens, rows.cu_seqlens_q, nodes, planned.tree, KVLens(work.kv_lens),
            planned.heads, options,
        )  # fmt: skip
        tokens = state.tokens(planned, work, needs_positions(work, call))
        if again is not None and (ready := self._backend.ready(work, call, tokens)) is not None:
            if len(self._ready) >= _MOST_KINDS:
                self._ready.clear()
            self._ready[again.key] = ready
            return ready(q, again.k, again.v, sinks)
        return self._backend.run(work, call, tokens)


class _Recognised(NamedTuple):
    """A call in a form to be looked up.

    Attributes
    ----------
    key : tuple
        All that checks look at: equal keys, equal outcome.
    k, v : tuples of tensors
        Keys and values of each level, or of all nodes.
    """

    key: tuple[Any, ...]
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]


def _recognise(q: Any, kv: Any, by_level: bool, sinks: Any, given: Options) -> _Recognised | None:
    """Return a call in a form to be looked up; None: only the checks can tell.

    So it is unless keys and values are plain tensors in a pair, or in a list of pairs where they come by
    level.
    """
    if type(kv) not in (list, tuple):
        return None
    pairs = kv if by_level else [kv]
    for pair in pairs:
        if type(pair) is not tuple or len(pair) != 2:
            return None
    k = tuple([pair[0] for pair in pairs])
    v = tuple([pair[1] for pair in pairs])
    described: list[Any] = []
    for x in (q, *k, *v) if sinks is None else (q, *k, *v, sinks):
        # nested ones have no shape, sparse ones no strides, and a sign kept aside is not in the memory
        if type(x) is not Tensor or x.layout is not torch.strided or x.is_nested or x.is_neg():
            return None
        described += (x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
    # 1, 1.0 and True are equal, and not all of them are allowed
    kinds = [option.__class__ for option in given]
    if not _ALLOWED.issuperset(kinds):
        return None
    return _Recognised((*described, *given, *kinds, len(k), torch.is_grad_enabled()), k, v)
