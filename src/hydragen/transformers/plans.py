"""Plans of a decode step: laid out once for all layers, updated once per step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hydragen.api import plan
from hydragen.kv import PackedKV
from hydragen.planned import Plan
from hydragen.tree import PrefixTree


class Plans:
    """The plans that a decode step's layers run: one, unless layers differ in shape.

    They hold lengths, not whoever has these: what holds the plans is freed with the last reference to it.
    """

    def __init__(self) -> None:
        self._made: dict[object, tuple[Plan, Sequence[object]]] = {}

    def get(
        self,
        tree: PrefixTree,
        kv: Sequence[tuple[Tensor, Tensor] | PackedKV],
        num_q_heads: int,
        kv_lens: Sequence[object],
    ) -> Plan:
        """Return the plan for a layer's levels, made when its shape is first seen.

        `kv_lens`, level by level, are read again at every step: what changes is a tensor, in place.
        """
        shapes = tuple(
            (x.k.shape, x.v.shape) if isinstance(x, PackedKV) else x[0].shape + x[1].shape for x in kv
        )
        key = tree, num_q_heads, shapes
        if key not in self._made:
            tail = kv[-1].k if isinstance(kv[-1], PackedKV) else kv[-1][0]
            if tail.is_cuda:
                made = plan(tree, kv, num_q_heads=num_q_heads, kv_lens=kv_lens)
            else:
                # Lengths on the host may only shrink below what was planned for: plan for what fits.
                made = plan(tree, kv, num_q_heads=num_q_heads, reserve=1.01)
                made.update(kv_lens=kv_lens)
            self._made[key] = made, kv_lens
        return self._made[key][0]

    def update(self) -> None:
        """Take over the lengths as they are now; on a device, without waiting for it."""
        for made, kv_lens in self._made.values():
            made.update(kv_lens=kv_lens)
