"""The merge: each token's partials folded in a fixed order by their log-sum-exp (Hydragen, section 3.1)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .primitives import LN_2, LOWEST, finish, fold, fold_sink, round_to


@triton.jit
def merge(
    part_out_ptr, part_lse_ptr, out_ptr, lse_ptr, sinks_ptr,
    indptr_ptr, indices_ptr, q_token_ptr,
    num_q_heads,
    HEAD_DIM_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_DV: tl.constexpr, UNROLL: tl.constexpr,
    GATHER_Q: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr, PDL: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Merge the partials of query token `program_id(0)` (in tree order) for BLOCK_H query heads.

    The partial rows of token t are indices[indptr[t] : indptr[t + 1]]; none at all leaves (0, -inf).
    part_out float32 [rows, num_q_heads, HEAD_DIM_V] normalised, part_lse float32 [rows, num_q_heads] base 2.
    """
    entry = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_ok = head < num_q_heads
    offs_d = tl.arange(0, BLOCK_DV)
    mask = head_ok[:, None] & (offs_d < HEAD_DIM_V)[None, :]
    token = entry
    if GATHER_Q:
        token = tl.load(q_token_ptr + token)
    first = tl.load(indptr_ptr + entry)
    last = tl.load(indptr_ptr + entry + 1)
    acc = tl.zeros([BLOCK_H, BLOCK_DV], tl.float32)
    running_max = tl.full([BLOCK_H], LOWEST, tl.float32)
    running_sum = tl.zeros([BLOCK_H], tl.float32)
    # Where the partials are is known before they are: asked for first, it does not stand between waiting and
    # reading. Of the following block likewise.
    which = tl.arange(0, UNROLL)
    rows = tl.load(indices_ptr + first + which, mask=first + which < last, other=0)
    if PDL:
        gdc_wait()  # for the partials; what was read so far is older
    for block in range(first, last, UNROLL):
        next_rows = tl.load(indices_ptr + block + UNROLL + which, mask=block + UNROLL + which < last, other=0)
        # unrolled, so that the loads of all partials are in flight together
        for i in tl.static_range(UNROLL):
            ok = block + i < last
            row = tl.sum(tl.where(which == i, rows, 0)).to(tl.int64) * num_q_heads + head
            part_lse = tl.load(part_lse_ptr + row, mask=head_ok & ok, other=float("-inf"))
            part = tl.load(
                part_out_ptr + row[:, None] * HEAD_DIM_V + offs_d[None, :], mask=mask & ok, other=0.0
            )
            acc, running_max, running_sum = fold(acc, running_max, running_sum, part, part_lse)
        rows = next_rows
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=head_ok, other=0.0).to(tl.float32)
        acc, running_max, running_sum = fold_sink(acc, running_max, running_sum, sink)
    out, lse = finish(acc, running_max, running_sum)
    present = token >= 0
    row = token.to(tl.int64) * num_q_heads + head
    out = round_to(out, out_ptr.dtype.element_ty, INTERPRET)
    tl.store(out_ptr + row[:, None] * HEAD_DIM_V + offs_d[None, :], out, mask=mask & present)
    if HAS_LSE:
        tl.store(lse_ptr + row, lse * LN_2, mask=head_ok & present)
