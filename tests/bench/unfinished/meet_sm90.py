"""The merge of rows by whichever program has come last to them, in Gluon (section 3.1)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .primitives import LN_2, LOWEST, fold, fold_sink, total_and_lse
from .rows_sm90 import barrier

# Partials in flight at a time.
UNROLL = gl.constexpr(2)
FEW = gl.constexpr(4)


@gluon.jit
def arrive(entry, head, ok, indptr_ptr, counters_ptr, NUM_Q_HEADS: gl.constexpr):
    """Say that this program's partials of these rows lie in memory; how many each has if it was the last, else 0.

    Whoever was the last sees all of them, and has set the count back. Each row must be in one thread only.
    """
    first = gl.load(indptr_ptr + entry, mask=ok, other=0)
    last = gl.load(indptr_ptr + entry + 1, mask=ok, other=0)
    counters = counters_ptr + entry.to(gl.int64) * NUM_Q_HEADS + head
    barrier()  # all of this program's threads have written theirs
    before = gl.atomic_add(counters, entry * 0 + 1, mask=ok, sem="acq_rel", scope="gpu")
    mine = ok & (before == last - first - 1)
    gl.store(counters, 0, mask=mine)
    return gl.where(mine, last - first, 0)


@gluon.jit
def merge_rows(
    entry, head, count, tables, ptrs, OUT: gl.constexpr, NUM_Q_HEADS: gl.constexpr,
    HEAD_DIM_V: gl.constexpr, GATHER_Q: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    """Merge the `count` partials of rows, each a token's root to leaf; nothing where `count` is 0."""
    indptr_ptr, indices_ptr, q_token_ptr = tables
    part_out_ptr, part_lse_ptr, out_ptr, lse_ptr, sinks_ptr = ptrs
    SIZE: gl.constexpr = entry.shape[0]
    dims = gl.arange(0, HEAD_DIM_V, layout=gl.SliceLayout(0, OUT))
    ok = count > 0
    first = gl.load(indptr_ptr + entry, mask=ok, other=0)
    acc = gl.zeros([SIZE, HEAD_DIM_V], gl.float32, layout=OUT)
    running_max = gl.full([SIZE], LOWEST, gl.float32, layout=gl.SliceLayout(1, OUT))
    running_sum = gl.zeros([SIZE], gl.float32, layout=gl.SliceLayout(1, OUT))
    for block in range(0, gl.max(count, 0), UNROLL):
        for i in gl.static_range(UNROLL):
            there = block + i < count
            row = gl.load(indices_ptr + first + block + i, mask=there, other=0).to(gl.int64) * NUM_Q_HEADS + head
            part_lse = gl.load(part_lse_ptr + row, mask=there, other=float("-inf"))
            part_ptrs = part_out_ptr + row[:, None] * HEAD_DIM_V + dims[None, :]
            part = gl.load(part_ptrs, mask=there[:, None], other=0.0)
            acc, running_max, running_sum = fold(acc, running_max, running_sum, part, part_lse)
    if HAS_SINKS:
        sink = gl.load(sinks_ptr + head, mask=ok, other=0.0).to(gl.float32)
        acc, running_max, running_sum = fold_sink(acc, running_max, running_sum, sink)
    total, lse = total_and_lse(running_max, running_sum)
    out = acc * (1.0 / total)[:, None]
    token = entry
    if GATHER_Q:
        token = gl.load(q_token_ptr + entry, mask=ok, other=-1)
        ok = ok & (token >= 0)
    row = token.to(gl.int64) * NUM_Q_HEADS + head
    out_ptrs = out_ptr + row[:, None] * HEAD_DIM_V + dims[None, :]
    gl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=ok[:, None])
    if HAS_LSE:
        gl.store(lse_ptr + row, lse * LN_2, mask=ok)


@gluon.jit
def meet_few(
    columns, kv_head, tables, counters_ptr, ptrs, ROWS: gl.constexpr, GROUP_SIZE: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr, HEAD_DIM_V: gl.constexpr, GATHER_Q: gl.constexpr, HAS_SINKS: gl.constexpr,
    HAS_LSE: gl.constexpr,
):  # fmt: skip
    """Merge which of an item's ROWS rows this program, a single warp, was the last to come to."""
    NUM_Q_HEADS: gl.constexpr = NUM_KV_HEADS * GROUP_SIZE
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    WIDE: gl.constexpr = HEAD_DIM_V // 8
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDE, WIDE], [1, 1], [1, 0])
    lane = gl.arange(0, 32, layout=LANES)
    tok_begin = gl.load(columns + 5)
    num_tok = gl.load(columns + 6)
    local = lane // GROUP_SIZE
    ok = (lane < ROWS) & (local < num_tok)
    count = arrive(
        tok_begin + local, kv_head * GROUP_SIZE + lane % GROUP_SIZE, ok, tables[0], counters_ptr, NUM_Q_HEADS
    )
    if gl.max(count, 0) > 0:
        shared = gl.allocate_shared_memory(gl.int32, [32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        shared.store(count)
        barrier()
        for i in gl.static_range(ROWS // FEW):
            counts = shared.slice(i * FEW, FEW).load(gl.SliceLayout(1, OUT))
            if gl.max(counts, 0) > 0:
                rows = i * FEW + gl.arange(0, FEW, layout=gl.SliceLayout(1, OUT))
                merge_rows(
                    tok_begin + rows // GROUP_SIZE, kv_head * GROUP_SIZE + rows % GROUP_SIZE, counts, tables, ptrs, OUT,
                    NUM_Q_HEADS, HEAD_DIM_V, GATHER_Q, HAS_SINKS, HAS_LSE,
                )  # fmt: skip


@gluon.jit
def meet_many(
    columns, kv_head, tables, counters_ptr, ptrs, counts, WHICH: gl.constexpr, ROWS: gl.constexpr,
    GROUP_SIZE: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEAD_DIM_V: gl.constexpr, GATHER_Q: gl.constexpr,
    HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    """The same for a consumer's rows, `counts` [4, 32] in shared memory being its own."""
    NUM_Q_HEADS: gl.constexpr = NUM_KV_HEADS * GROUP_SIZE
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    WIDE: gl.constexpr = HEAD_DIM_V // 8
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDE, WIDE], [4, 1], [1, 0])
    PASS: gl.constexpr = 32
    tok_begin = gl.load(columns + 5)
    num_tok = gl.load(columns + 6)
    row_begin = gl.load(columns + 7) + WHICH * ROWS
    row = gl.arange(0, 2 * ROWS, layout=LANES)
    local = (row_begin + row) // GROUP_SIZE
    head = kv_head * GROUP_SIZE + (row_begin + row) % GROUP_SIZE
    ok = (row < ROWS) & (local < num_tok)
    counts.index(WHICH).store(arrive(tok_begin + local, head, ok, tables[0], counters_ptr, NUM_Q_HEADS))
    barrier()
    for i in gl.static_range(ROWS // PASS):
        count = counts.index(WHICH).slice(i * PASS, PASS).load(gl.SliceLayout(1, OUT))
        if gl.max(count, 0) > 0:
            rows = row_begin + i * PASS + gl.arange(0, PASS, layout=gl.SliceLayout(1, OUT))
            merge_rows(
                tok_begin + rows // GROUP_SIZE, kv_head * GROUP_SIZE + rows % GROUP_SIZE, count, tables, ptrs, OUT,
                NUM_Q_HEADS, HEAD_DIM_V, GATHER_Q, HAS_SINKS, HAS_LSE,
            )  # fmt: skip
    barrier()  # before these counts are overwritten
