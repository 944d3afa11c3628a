"""What the specialised tiles share, in Gluon: the rows of an item, what they see, where results go."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# The barrier of a partition's threads was renamed in Triton 3.7.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def query_rows(
    columns, rows, kv_head, q_token_ptr, q_len, strides, GROUP_SIZE: gl.constexpr, GATHER_Q: gl.constexpr
):  # fmt: skip
    """Offsets of stacked rows of queries, and which of them there are."""
    stride_qb, stride_qt, stride_qh = strides
    local = rows // GROUP_SIZE
    row_ok = local < gl.load(columns + 6)
    token = gl.load(columns + 5) + local
    if GATHER_Q:
        token = gl.load(q_token_ptr + token, mask=row_ok, other=-1)
        row_ok = row_ok & (token >= 0)
    q_rows = (token // q_len).to(gl.int64) * stride_qb + (token % q_len).to(gl.int64) * stride_qt
    return q_rows + (kv_head * GROUP_SIZE + rows % GROUP_SIZE).to(gl.int64) * stride_qh, row_ok


@gluon.jit
def places(
    columns, rows, kv_head, q_token_ptr, GROUP_SIZE: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
    GATHER_Q: gl.constexpr, FINAL: gl.constexpr,
):  # fmt: skip
    """Where an item's rows go, in rows of head_dim_v: of the output, or of the partials; -1 for nowhere."""
    local = rows // GROUP_SIZE
    head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    if FINAL:
        token = gl.load(columns + 5) + local
        if GATHER_Q:
            token = gl.load(q_token_ptr + token, mask=local < gl.load(columns + 6), other=-1)
    else:
        token = gl.load(columns + 8) + local
    row = token.to(gl.int64) * (NUM_KV_HEADS * GROUP_SIZE) + head
    return gl.where(token < 0, -1, row)


@gluon.jit
def keys_seen(
    columns, positions, end, WHICH: gl.constexpr, COUNT: gl.constexpr, LAYOUT: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
):  # fmt: skip
    """How many keys from the item's first on its rows WHICH * COUNT, ... see: those up to their positions."""
    q_pos_ptr, kv_start_ptr = positions
    rows = gl.load(columns + 7) + WHICH * COUNT + gl.arange(0, COUNT, layout=gl.SliceLayout(1, LAYOUT))
    local = gl.minimum(rows // GROUP_SIZE, gl.load(columns + 6) - 1)
    seen = gl.load(q_pos_ptr + gl.load(columns + 5) + local) + 1 - gl.load(kv_start_ptr + gl.load(columns))
    return gl.maximum(gl.minimum(seen, end) - gl.load(columns + 3), 0)
