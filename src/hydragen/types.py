"""The result of an attention call and the options that belong to a run, not to its structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionState(NamedTuple):
    """Attention over a set of keys, with what it takes to merge it with attention over another set.

    This is the contract of every function in the library that takes or gives a log-sum-exp.

    Attributes
    ----------
    out : tensor [..., num_q_heads, head_dim_v]
        Attention output over these keys alone.
    lse : tensor [..., num_q_heads], float32 (float64 where the input is float64)
        Natural log of the sum of exp(logit), logits scaled, soft-capped and masked. Shaped like `out` without
        its last dimension. Where there is nothing to attend: `out = 0` and `lse = -inf`, never NaN and never
        a finite stand-in. With sinks, `lse` includes the sink once. A logit of -inf has weight 0.
    """

    out: Tensor
    lse: Tensor


@dataclass(frozen=True, eq=False)
class Options:
    """What a run is asked for, checked and with defaults filled in.

    Attributes
    ----------
    scale : float
        Factor of the dot products.
    causal : bool
        Query position p sees keys at positions up to p.
    window : int or None
        Query position p sees keys at positions above p - window.
    softcap : float or None
        Logits become softcap * tanh(logit / softcap) before masking.
    sinks : tensor [num_q_heads] or None
        One more logit per head, whose value is zero.
    return_lse : bool
    out_dtype : torch.dtype
        Dtype of `out`.
    """

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    return_lse: bool
    out_dtype: torch.dtype

    @property
    def key(self) -> tuple[object, ...]:
        """Everything but the sinks' values."""
        sinks = None if self.sinks is None else self.sinks.dtype
        return (self.scale, self.causal, self.window, self.softcap, sinks, self.return_lse, self.out_dtype)
