"""The merge of an item's tokens by the warp that attended to their last keys, in Gluon (section 3.1)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from .primitives import LN_2, LOWEST, fold, fold_sink, total_and_lse
from .rows_sm90 import barrier

# Partials in flight at a time.
UNROLL = gl.constexpr(3)


@gluon.jit
def places_of(indices_ptr, first, last):
    """The rows of UNROLL partials from `first` on; of those after the last, the last one's."""
    end = last - 1
    return (
        gl.load(indices_ptr + gl.minimum(first, end)),
        gl.load(indices_ptr + gl.minimum(first + 1, end)),
        gl.load(indices_ptr + gl.minimum(first + 2, end)),
    )


@gluon.jit
def merge_item(
    columns, kv_head, tables, ptrs, GROUP_SIZE: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM_V: gl.constexpr, GATHER_Q: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Merge the partials of an item's tokens for one KV head, each token's root to leaf, its own included.

    Every token has one at least: the one that this program has just written.
    """
    indptr_ptr, indices_ptr, q_token_ptr = tables
    part_out_ptr, part_lse_ptr, out_ptr, lse_ptr, sinks_ptr = ptrs
    LANES: gl.constexpr = HEAD_DIM_V // 8
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [1, 1], [1, 0])
    HEADS: gl.constexpr = max(32 // LANES, 1 << (GROUP_SIZE - 1).bit_length())
    rows = gl.arange(0, HEADS, layout=gl.SliceLayout(1, OUT))
    dims = gl.arange(0, HEAD_DIM_V, layout=gl.SliceLayout(0, OUT))
    head = kv_head * GROUP_SIZE + rows
    head_ok = rows < GROUP_SIZE
    NUM_Q_HEADS: gl.constexpr = NUM_KV_HEADS * GROUP_SIZE
    tok_begin = gl.load(columns + 5)
    tok_end = tok_begin + gl.load(columns + 6)
    # where the partials are is known before they are
    first = gl.load(indptr_ptr + tok_begin)
    last = gl.load(indptr_ptr + tok_begin + 1)
    ahead = places_of(indices_ptr, first, last)
    barrier()  # this warp's partial is seen by all of it
    if PDL:
        gdc_wait()  # for the others'; what was read so far is older
    for entry in range(tok_begin, tok_end):
        acc = gl.zeros([HEADS, HEAD_DIM_V], gl.float32, layout=OUT)
        running_max = gl.full([HEADS], LOWEST, gl.float32, layout=gl.SliceLayout(1, OUT))
        running_sum = gl.zeros([HEADS], gl.float32, layout=gl.SliceLayout(1, OUT))
        for block in range(first, last, UNROLL):
            for i in gl.static_range(UNROLL):
                ok = head_ok & (block + i < last)
                row = ahead[i].to(gl.int64) * NUM_Q_HEADS + head
                part_lse = gl.load(part_lse_ptr + row, mask=ok, other=float("-inf"))
                part_ptrs = part_out_ptr + row[:, None] * HEAD_DIM_V + dims[None, :]
                part = gl.load(part_ptrs, mask=ok[:, None], other=0.0)
                acc, running_max, running_sum = fold(acc, running_max, running_sum, part, part_lse)
            ahead = places_of(indices_ptr, block + UNROLL, last)
        if HAS_SINKS:
            sink = gl.load(sinks_ptr + head, mask=head_ok, other=0.0).to(gl.float32)
            acc, running_max, running_sum = fold_sink(acc, running_max, running_sum, sink)
        total, lse = total_and_lse(running_max, running_sum)
        out = acc * (1.0 / total)[:, None]
        row = head.to(gl.int64)
        ok = head_ok
        if GATHER_Q:
            token = gl.load(q_token_ptr + entry)
            ok = ok & (token >= 0)
            row += token.to(gl.int64) * NUM_Q_HEADS
        else:
            row += entry * NUM_Q_HEADS
        out_ptrs = out_ptr + row[:, None] * HEAD_DIM_V + dims[None, :]
        gl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=ok[:, None])
        if HAS_LSE:
            gl.store(lse_ptr + row, lse * LN_2, mask=ok)
        # of the next token, or of the last one again
        first = last
        last = gl.load(indptr_ptr + gl.minimum(entry + 2, tok_end))
        ahead = places_of(indices_ptr, first, last)
