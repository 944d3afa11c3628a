"""Attention over part of the keys, and how parts are put together: one algebra for prefixes, levels, splits.

The softmax attention of a query over keys A and B together follows from its attention over A and over B, if
each also returns the log of its sum of exponentials:

    lse = log(exp(lse_A) + exp(lse_B))
    out = exp(lse_A - lse) * out_A + exp(lse_B - lse) * out_B
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """Attention over some of the keys, ready to be merged with attention over others.

    Attributes
    ----------
    out : tensor [..., num_q_heads, head_dim_v]
        Attention output over these keys alone.
    lse : tensor [..., num_q_heads], float32 or float64
        Natural log of the sum of exp(logit) over these keys. Without any key: `lse = -inf` and `out = 0`.
    """

    out: Tensor
    lse: Tensor


def merge_states(states: Sequence[State]) -> State:
    """Attention over the union of disjoint key sets, from the attention over each.

    Associative and commutative up to rounding; the empty state (0, -inf) is its identity, and empty states
    merge to the empty state. NaN propagates. States with `lse = +inf` outweigh all others and share equally.

    Parameters
    ----------
    states : sequence of State
        At least one, all of the same shapes.

    Returns
    -------
    State
        In the dtypes of the first state; the arithmetic is in the dtype of `lse`.

    Raises
    ------
    ValueError
        If `states` is empty.
    """
    if not states:
        raise ValueError("states must hold at least one state, got none")
    lse = torch.stack([state.lse for state in states])  # [num_states, ..., num_q_heads]
    # Only differences to the largest count. Bounded numbers have one where infinities give inf - inf = NaN,
    # and the clamp also ends the gradient there.
    finite = torch.finfo(lse.dtype)
    bounded = lse.clamp(finite.min, finite.max)
    weights = (bounded - bounded.detach().amax(0)).exp()
    total = weights.sum(0)  # at least 1, the weight of the largest
    weights = (weights / total)[..., None]

    out = weights[0] * states[0].out
    for weight, state in zip(weights[1:], states[1:], strict=True):
        out = out + weight * state.out
    # The largest lse keeps its infinity here: -inf where all states are empty.
    return State(out.to(states[0].out.dtype), lse.detach().amax(0) + total.log())
