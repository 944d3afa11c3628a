"""Who is timed beside hydragen on the same inputs: torch's kernels without sharing, the original algorithm.

A contender has one or more forms, of which the fastest counts: grouped heads passed as they are, or a KV
head's query heads stacked as query rows, which spares a decoding step most of its padding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from shapes import Inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch_kernels import flash, flash_varlen, merge, ragged

import hydragen

Form = Callable[[], Tensor]


class UnavailableError(Exception):
    """A contender cannot take part; the message says why."""


@dataclass(frozen=True, eq=False)
class Contender:
    """`forms()` makes the functions to time, by name; each returns out, shaped like q."""

    name: str
    shares: bool
    forms: Callable[[], dict[str, Form]] = field(repr=False)


def ours(inputs: Inputs) -> Form:
    """hydragen, as a user calls it."""
    shape = inputs.shape
    if inputs.paged is not None:
        lens = shape.tree.kv_lens.tolist()
        return lambda: hydragen.attention(
            inputs.q, inputs.paged, tree=shape.tree, kv_lens=lens, causal=shape.causal
        )
    return lambda: hydragen.attention(inputs.q, inputs.kv, tree=inputs.tree, causal=shape.causal)


class Unshared:
    """Every row with a copy of all its keys and values: what has to be stored where nothing is shared."""

    def __init__(self, inputs: Inputs, limit: float) -> None:
        self.inputs, self.limit = inputs, limit

    def _check_room(self) -> None:
        needed = self.inputs.shape.unshared_bytes
        if needed > self.limit:
            raise UnavailableError(
                f"copied keys and values take {needed / 1e9:.0f} GB, more than {self.limit / 1e9:.0f} GB"
            )

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """k and v [batch, num_kv_heads, path_len, head_dim], for rows of equal length."""
        self._check_room()
        shape, levels = self.inputs.shape, self.inputs.levels
        if not levels:
            raise UnavailableError("rows differ in length")
        size = shape.batch, shape.num_kv_heads, sum(length for _, length in shape.levels), shape.head_dim
        copies = tuple(self.inputs.q.new_empty(size) for _ in range(2))
        begin = 0
        for level in levels:
            nodes, length = level[0].shape[:2]
            for copy, kv in zip(copies, level, strict=True):
                # [nodes, rows of a node, num_kv_heads, tokens, head_dim]
                part = copy.unflatten(0, (nodes, -1))[:, :, :, begin : begin + length]
                part.copy_(kv.transpose(1, 2)[:, None].expand_as(part))
            begin += length
        return copies

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor]:
        """k and v [all rows' tokens, num_kv_heads, head_dim], row after row."""
        self._check_room()
        paths = [list(self.inputs.path(row)) for row in range(self.inputs.shape.batch)]
        return tuple(torch.cat([node[side] for path in paths for node in path]) for side in (0, 1))


def stacked(q: Tensor, num_kv_heads: int) -> Tensor:
    """One query [batch, 1, num_q_heads, head_dim] as rows [batch, num_kv_heads, group, head_dim]."""
    return q.view(q.shape[0], num_kv_heads, -1, q.shape[-1])


def unstacked(out: Tensor) -> Tensor:
    """The inverse of `stacked`."""
    return out.flatten(1, 2)[:, None]


def fa2(inputs: Inputs, unshared: Unshared) -> dict[str, Form]:
    """torch's FlashAttention-2 over every row's own copy."""
    shape, q = inputs.shape, inputs.q
    if shape.levels is None:
        k, v = unshared.packed
        rows, keys = ragged([1] * shape.batch, q.device), ragged(shape.tree.path_lens.tolist(), q.device)
        return {"varlen": lambda: flash_varlen(q[:, 0], k, v, rows, keys)[0][:, None]}
    k, v = unshared.padded
    heads_first = q.transpose(1, 2)
    forms = {"grouped": lambda: flash(heads_first, k, v, shape.causal)[0].transpose(1, 2)}
    if shape.q_len == 1 and shape.group_size > 1:
        rows = stacked(q, shape.num_kv_heads)
        forms["stacked"] = lambda: unstacked(flash(rows, k, v)[0])
    return forms


def cudnn(inputs: Inputs, unshared: Unshared) -> dict[str, Form]:
    """cuDNN's attention, as torch calls it, over every row's own copy."""
    shape, q = inputs.shape, inputs.q
    if q.device.type != "cuda":
        raise UnavailableError("cuDNN needs a GPU")
    if shape.levels is None:
        raise UnavailableError("scaled_dot_product_attention takes no rows of different length")
    if shape.causal:
        raise UnavailableError("torch aligns cuDNN's causal mask with the first key, not with the last")
    k, v = unshared.padded

    def run(queries: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(queries, k, v, enable_gqa=queries.shape[1] != k.shape[1])

    heads_first = q.transpose(1, 2)
    forms = {"grouped": lambda: run(heads_first).transpose(1, 2)}
    if shape.q_len == 1 and shape.group_size > 1:
        rows = stacked(q, shape.num_kv_heads)
        forms["stacked"] = lambda: unstacked(run(rows))
    return forms


def original(inputs: Inputs) -> dict[str, Form]:
    """Hydragen as published: FlashAttention-2 per level, a node's rows side by side, then a merge."""
    if inputs.packed is not None:
        return {"per level": original_of_uneven(inputs)}
    shape, q = inputs.shape, inputs.q
    tokens = shape.batch * shape.q_len

    def level(k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        queries = q.reshape(k.shape[0], -1, shape.num_q_heads, shape.head_dim).transpose(1, 2)
        out, lse = flash(queries, k.transpose(1, 2), v.transpose(1, 2), causal)
        return out.transpose(1, 2).reshape(tokens, shape.num_q_heads, shape.head_dim), lse

    def run() -> Tensor:
        last = len(inputs.levels) - 1
        states = [level(k, v, shape.causal and i == last) for i, (k, v) in enumerate(inputs.levels)]
        return (merge(states) if len(states) > 1 else states[0][0]).view_as(q)

    return {"per level": run}


def original_of_uneven(inputs: Inputs) -> Form:
    """The same for levels of nodes that differ in length and number of rows; rows must be in tree order."""
    tree, q, packed = inputs.shape.tree, inputs.q, inputs.packed
    levels = []
    for nodes in tree.level_nodes:
        span = slice(int(tree.kv_offsets[nodes[0]]), int(tree.kv_offsets[nodes[-1] + 1]))
        rows = ragged((tree.row_end - tree.row_begin)[nodes].tolist(), q.device)
        levels.append((packed.k[span], packed.v[span], rows, ragged(tree.kv_lens[nodes].tolist(), q.device)))

    def run() -> Tensor:
        found = [flash_varlen(q[:, 0], *level) for level in levels]
        return merge([(out, lse[None]) for out, lse in found]).view_as(q)

    return run


def flex(inputs: Inputs, compiled: bool = True) -> dict[str, Form]:
    """FlexAttention over one sequence of the prefix and all suffixes, each query masked to its own."""
    shape, q = inputs.shape, inputs.q
    (prefix_k, prefix_v), (suffix_k, suffix_v) = inputs.levels
    prefix, suffix = prefix_k.shape[1], suffix_k.shape[1]

    def one_sequence(first: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([first.flatten(0, 1), rest.flatten(0, 1)]).transpose(0, 1)[None].contiguous()

    k, v = one_sequence(prefix_k, suffix_k), one_sequence(prefix_v, suffix_v)

    def own(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < prefix) | ((key - prefix) // suffix == query)

    mask = create_block_mask(own, None, None, shape.batch, k.shape[2], device=str(q.device))
    attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    queries = q.transpose(0, 1).transpose(1, 2).contiguous()  # [1, num_q_heads, batch, head_dim]
    grouped = shape.group_size > 1
    return {
        "one sequence": lambda: attend(queries, k, v, block_mask=mask, enable_gqa=grouped)[0].transpose(0, 1)[
            :, None
        ]
    }


def contenders(inputs: Inputs, limit: float, with_flex: bool) -> list[Contender]:
    """Everybody who is timed beside hydragen; `limit` in bytes for copied keys and values."""
    unshared = Unshared(inputs, limit)
    found = [
        Contender("fa2", False, lambda: fa2(inputs, unshared)),
        Contender("cudnn", False, lambda: cudnn(inputs, unshared)),
        Contender("original", True, lambda: original(inputs)),
    ]
    if with_flex:
        found.append(Contender("flex", True, lambda: flex(inputs)))
    return found
