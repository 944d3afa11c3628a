"""The checked form of one call."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hydragen.host_ints import IntArray
from hydragen.kv import NodeKV
from hydragen.lengths import KVLens, check_kv_lens
from hydragen.queries import Heads
from hydragen.tree import PrefixTree
from hydragen.types import Options
from hydragen.validation.kv import check_kv
from hydragen.validation.options import check_bool, check_options
from hydragen.validation.queries import check_queries
from hydragen.validation.tensors import check_tensor


class Call(NamedTuple):
    """One attention call whose arguments have been checked.

    Attributes
    ----------
    q : tensor [batch, q_len, num_q_heads, head_dim] or packed [total_q, num_q_heads, head_dim]
    q_starts, q_lens : int64 [num_rows]
        First token (in q flattened over tokens) and number of tokens of each row; capacities if
        `cu_seqlens_q` is set.
    cu_seqlens_q : integer tensor [num_rows + 1] or None
        Set only if the query lengths live on the device.
    nodes : NodeKV
    tree : PrefixTree
    kv_lens : KVLens
    heads : Heads
    options : Options
    """

    q: Tensor
    q_starts: IntArray
    q_lens: IntArray
    cu_seqlens_q: Tensor | None
    nodes: NodeKV
    tree: PrefixTree
    kv_lens: KVLens
    heads: Heads
    options: Options


def check_attention(
    q: object,
    kv: object,
    tree: object,
    kv_lens: object,
    cu_seqlens_q: object,
    max_seqlen_q: object,
    scale: object,
    causal: bool,
    window: object,
    softcap: object,
    sinks: object,
    return_lse: bool,
    out_dtype: object,
    validate: bool,
) -> Call:
    """Check the arguments of `hydragen.attention`, explained there, and bring them into one form."""
    q = check_tensor(q, "q")
    check_bool(validate, "validate")
    rows = check_queries(q, cu_seqlens_q, max_seqlen_q, validate)
    checked_tree, nodes, heads = check_kv(kv, tree, rows.lens.size, q, validate)
    lens = check_kv_lens(kv_lens, checked_tree, nodes, q.device, validate)
    options = check_options(q, scale, causal, window, softcap, sinks, return_lse, out_dtype)
    return Call(q, rows.starts, rows.lens, rows.cu_seqlens_q, nodes, checked_tree, lens, heads, options)
