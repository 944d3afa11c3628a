"""A tile for at most 8 stacked query rows, in Gluon: keys are the rows of its matrix products.

Tried, not chosen: docs/experiments.md, section 35. It serves the work table of kernels/attend.py, with the
same rows, partials and outputs, where a segment has few rows: a sequence's own keys. There a program of the
plain tile is bound neither by memory nor by the tensor cores but by how long its own instructions take, and
beside a launch for a shared prefix it finds room for few warps. So this one is a single warp that needs few
of them: scores are K Q^T and results V^T P^T, with 8 columns of queries instead of 16 rows; keys and values
go from memory into the registers where the products want them; there is nothing to wait for but memory.

What the products' layouts ask for and memory does not have is a matter of names: the sum over head_dim has no
order, and the rows of V^T are numbered so that a thread's are neighbours in memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hydragen.kernels.attend import ITEM_COLUMNS
from hydragen.kernels.primitives import LN_2, LOWEST, finish, fold_sink, select

# Query rows: the columns of one mma.
ROWS = gl.constexpr(8)


@gluon.constexpr_function
def key_layout(block_n, head_dim):
    """Of keys by pairs of elements: a thread has runs of 4 pairs of keys r, r + 8, ..., r = lane // 4."""
    registers = [[0, 1], [0, 2]] + [[0, 1 << i] for i in range(4, (head_dim // 2).bit_length() - 1)]
    registers += [[1 << i, 0] for i in range(3, block_n.bit_length() - 1)]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [block_n, head_dim // 2])


@gluon.constexpr_function
def value_layout(block_n, head_dim_v):
    """Of keys by pairs of values: a thread has an eighth of keys 2 c, 2 c + 1 of every 8, c = lane % 4."""
    registers = [[0, 1], [0, 2]] + [[0, 1 << i] for i in range(5, (head_dim_v // 2).bit_length() - 1)]
    registers += [[1, 0]]
    registers += [[1 << i, 0] for i in range(3, block_n.bit_length() - 1)]
    lanes = [[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [block_n, head_dim_v // 2])


@gluon.constexpr_function
def out_layout(head_dim_v):
    """Of the results, queries by values: the same runs, of queries 2 c and 2 c + 1."""
    registers = [[0, 1], [0, 2], [0, 4]] + [[0, 1 << i] for i in range(6, head_dim_v.bit_length() - 1)]
    registers += [[1, 0]]
    lanes = [[2, 0], [4, 0], [0, 8], [0, 16], [0, 32]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [8, head_dim_v])


@gluon.jit
def load_block(
    words, start, end, begin, stride, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, NUM_WORDS: gl.constexpr,
    LANE_KEYS: gl.constexpr,
):  # fmt: skip
    """Keys [start, start + BLOCK_N) of a head, in words; past the end the last one again.

    So there is no mask, which would need every register set to 0 before; and a whole block has one address
    for all of a thread's rows. LANE_KEYS: the bits of a key's number that are the thread's and not the
    register's, without which the compiler does not see that the rest is a constant.
    """
    keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    offs = gl.arange(0, NUM_WORDS, layout=gl.SliceLayout(0, LAYOUT))
    if start + BLOCK_N <= end:
        block = words + start.to(gl.int64) * stride
        lane = (keys & LANE_KEYS).to(gl.int64) * stride
        own = (keys & ~LANE_KEYS).to(gl.int64) * stride
        loaded = gl.load(block + lane[:, None] + own[:, None] + offs[None, :])
    else:
        rows = gl.maximum(gl.minimum(start + keys, end - 1), begin)
        loaded = gl.load(words + (rows.to(gl.int64) * stride)[:, None] + offs[None, :])
    return loaded


@gluon.jit
def unpacked(pairs, DTYPE: gl.constexpr):
    """[keys, n] words as [keys, 2 n] elements.

    What is carried from step to step is words: of elements the compiler keeps each in a register of its own.
    """
    low = gl.inline_asm_elementwise("mov.b32 {$0, _}, $1;", "=h,r", [pairs], gl.int16, is_pure=True, pack=1)
    high = gl.inline_asm_elementwise("mov.b32 {_, $0}, $1;", "=h,r", [pairs], gl.int16, is_pure=True, pack=1)
    both = gl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True))
    return both.reshape([pairs.shape[0], pairs.shape[1] * 2])


@gluon.jit
def transposed(p):
    """Tiles of 8 x 8, each transposed within its warp: how one product leaves them, the next wants them."""
    return gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [p], p.dtype, is_pure=True, pack=2
    )


@gluon.jit
def weights_of(p, DTYPE: gl.constexpr, OPERAND: gl.constexpr):
    """Weights [keys, rows], as the product with the values wants them."""
    BLOCK_N: gl.constexpr = p.shape[0]
    p = transposed(p.to(DTYPE)).reshape([BLOCK_N // 8, 8, 8]).permute((0, 2, 1)).reshape([BLOCK_N, ROWS])
    return gl.convert_layout(p, OPERAND, assert_trivial=True)


@gluon.jit
def fold_values(
    acc, running_max, running_sum, scores, v, scale_log2, DTYPE: gl.constexpr, V_OPERAND: gl.constexpr,
    P_OPERAND: gl.constexpr,
):  # fmt: skip
    """One block of raw scores [keys, rows] and values [keys, head_dim_v] into the running softmax."""
    BLOCK_N: gl.constexpr = v.shape[0]
    HEAD_DIM_V: gl.constexpr = v.shape[1] * 2
    new_max = gl.maximum(running_max, gl.max(scores, 0) * scale_log2)
    p = gl.exp2(scores * scale_log2 - new_max[None, :])
    alpha = gl.exp2(running_max - new_max)
    running_sum = running_sum * alpha[None, :] + p
    weights = weights_of(p, DTYPE, P_OPERAND)
    values = unpacked(v, DTYPE).reshape([BLOCK_N, HEAD_DIM_V // 64, 8, 8]).permute((1, 3, 2, 0))
    values = values.reshape([HEAD_DIM_V, BLOCK_N])
    values = gl.convert_layout(values, V_OPERAND, assert_trivial=True)
    return mma_v2(values, weights, acc * alpha[None, :]), new_max, running_sum


@gluon.jit
def load_queries(
    q_ptr, place, q_len, stride_qb, stride_qt, stride_qh, HEAD_DIM: gl.constexpr, GROUP_SIZE: gl.constexpr,
    GATHER_Q: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """An item's rows for one KV head, [head_dim, ROWS]; 0 where there is none."""
    tok_begin, num_tok, q_token_ptr, kv_head = place
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(0, OPERAND))
    local = rows // GROUP_SIZE
    row_ok = local < num_tok
    token = tok_begin + local
    if GATHER_Q:
        token = gl.load(q_token_ptr + token, mask=row_ok, other=-1)
        row_ok = row_ok & (token >= 0)
    q_rows = (token // q_len).to(gl.int64) * stride_qb + (token % q_len).to(gl.int64) * stride_qt
    q_rows += (kv_head * GROUP_SIZE + rows % GROUP_SIZE).to(gl.int64) * stride_qh
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(1, OPERAND))
    return gl.load(q_ptr + q_rows[None, :] + dims[:, None], mask=row_ok[None, :], other=0.0)


@gluon.jit
def store_rows(
    acc, running_max, running_sum, tensors, place, dest, num_q_heads, GROUP_SIZE: gl.constexpr,
    FLAGS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Write an item's rows [ROWS, head_dim_v] as kernels/attend.py does: outputs, or partials at `dest`."""
    out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr = tensors
    tok_begin, num_tok, q_token_ptr, kv_head = place
    GATHER_Q: gl.constexpr = FLAGS[0]
    FINAL: gl.constexpr = FLAGS[1]
    HAS_SINKS: gl.constexpr = FLAGS[2]
    HAS_LSE: gl.constexpr = FLAGS[3]
    HEAD_DIM_V: gl.constexpr = acc.shape[1]
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    local = rows // GROUP_SIZE
    row_ok = local < num_tok
    head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    dims = gl.arange(0, HEAD_DIM_V, layout=gl.SliceLayout(0, LAYOUT))
    if FINAL:
        token = tok_begin + local
        if GATHER_Q:
            token = gl.load(q_token_ptr + token, mask=row_ok, other=-1)
            row_ok = row_ok & (token >= 0)
        if HAS_SINKS:
            sink = gl.load(sinks_ptr + head, mask=row_ok, other=0.0).to(gl.float32)
            acc, running_max, running_sum = fold_sink(acc, running_max, running_sum, sink)
        out, lse = finish(acc, running_max, running_sum)
        out_rows = token.to(gl.int64) * num_q_heads + head
        out_ptrs = out_ptr + out_rows[:, None] * HEAD_DIM_V + dims[None, :]
        gl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=row_ok[:, None])
        if HAS_LSE:
            gl.store(lse_ptr + out_rows, lse * LN_2, mask=row_ok)
    else:
        out, lse = finish(acc, running_max, running_sum)
        part_rows = (dest + local).to(gl.int64) * num_q_heads + head
        gl.store(part_out_ptr + part_rows[:, None] * HEAD_DIM_V + dims[None, :], out, mask=row_ok[:, None])
        gl.store(part_lse_ptr + part_rows, lse, mask=row_ok)


@gluon.jit
def attend_few(
    q_ptr, k_ptrs, v_ptrs, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr,
    items_ptr, q_token_ptr, kv_lens_ptr, num_kv_heads, q_len, scale_log2,
    stride_qb, stride_qt, stride_qh,
    strides_kn, strides_kt, strides_kh, strides_vn, strides_vt, strides_vh,
    GROUP_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, BLOCK_N: gl.constexpr,
    CONTIGUOUS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, GATHER_Q: gl.constexpr, HAS_LENS: gl.constexpr,
    HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr, FINAL: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Attend one item of the work table, of at most ROWS rows, for one KV head; as kernels/attend.py."""
    if PDL:
        # The next launch may take what room this one leaves, as soon as all of this one is placed.
        gdc_launch_dependents()
    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    # a thread's part of the sum over head_dim are runs of 8 elements, 16 bytes
    K_OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=8)
    Q_OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=MMA, k_width=8)
    V_OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    P_OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=MMA, k_width=2)
    K_LAYOUT: gl.constexpr = key_layout(BLOCK_N, HEAD_DIM)
    V_LAYOUT: gl.constexpr = value_layout(BLOCK_N, HEAD_DIM_V)
    OUT: gl.constexpr = out_layout(HEAD_DIM_V)

    item = gl.program_id(0) // num_kv_heads
    kv_head = gl.program_id(0) % num_kv_heads
    columns = items_ptr + item.to(gl.int64) * ITEM_COLUMNS
    node = gl.load(columns)
    level = gl.load(columns + 1)
    slot = gl.load(columns + 2)
    begin = gl.load(columns + 3)
    end = gl.load(columns + 4)
    tok_begin = gl.load(columns + 5)
    num_tok = gl.load(columns + 6)
    dest = gl.load(columns + 8)
    num_q_heads = num_kv_heads * GROUP_SIZE
    if HAS_LENS:  # lengths on the device: clamped to the capacity the plan was made for
        end = gl.minimum(end, gl.load(kv_lens_ptr + node))
    if CONTIGUOUS:
        stride_kt = NUM_KV_HEADS * HEAD_DIM
        stride_kh = HEAD_DIM
        stride_vt = NUM_KV_HEADS * HEAD_DIM_V
        stride_vh = HEAD_DIM_V
    else:
        stride_kt = select(strides_kt, level)
        stride_kh = select(strides_kh, level)
        stride_vt = select(strides_vt, level)
        stride_vh = select(strides_vh, level)
    k_head = select(k_ptrs, level) + kv_head.to(gl.int64) * stride_kh
    v_head = select(v_ptrs, level) + kv_head.to(gl.int64) * stride_vh
    k_head += slot.to(gl.int64) * select(strides_kn, level)
    v_head += slot.to(gl.int64) * select(strides_vn, level)

    WORD: gl.constexpr = gl.pointer_type(gl.int32)
    k_words = k_head.to(WORD, bitcast=True)
    v_words = v_head.to(WORD, bitcast=True)
    k = load_block(k_words, begin, end, begin, stride_kt // 2, K_LAYOUT, BLOCK_N, HEAD_DIM // 2, 7)
    v = load_block(v_words, begin, end, begin, stride_vt // 2, V_LAYOUT, BLOCK_N, HEAD_DIM_V // 2, 6)

    place = (tok_begin, num_tok, q_token_ptr, kv_head)
    q = load_queries(
        q_ptr, place, q_len, stride_qb, stride_qt, stride_qh, HEAD_DIM, GROUP_SIZE, GATHER_Q, Q_OPERAND
    )

    acc = gl.zeros([HEAD_DIM_V, ROWS], gl.float32, layout=MMA)
    running_max = gl.full([ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(0, MMA))
    # of each of a thread's keys apart: their sum is taken once, at the end
    running_sum = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=MMA)
    nothing = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=MMA)
    whole = begin + gl.maximum(end - begin - 1, 0) // BLOCK_N * BLOCK_N  # here the last block begins
    for start in range(begin, whole, BLOCK_N):
        keys = gl.convert_layout(unpacked(k, DTYPE), K_OPERAND, assert_trivial=True)
        scores = mma_v2(keys, q, nothing)
        after = start + BLOCK_N
        k = load_block(k_words, after, end, begin, stride_kt // 2, K_LAYOUT, BLOCK_N, HEAD_DIM // 2, 7)
        acc, running_max, running_sum = fold_values(
            acc, running_max, running_sum, scores, v, scale_log2, DTYPE, V_OPERAND, P_OPERAND
        )
        v = load_block(v_words, after, end, begin, stride_vt // 2, V_LAYOUT, BLOCK_N, HEAD_DIM_V // 2, 6)
    keys = gl.convert_layout(unpacked(k, DTYPE), K_OPERAND, assert_trivial=True)
    scores = mma_v2(keys, q, nothing)
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
    scores = gl.where((whole + n < end)[:, None], scores, float("-inf"))
    v_keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, V_LAYOUT))
    v = gl.where((whole + v_keys < end)[:, None], v, 0)  # 0 * NaN is NaN
    acc, running_max, running_sum = fold_values(
        acc, running_max, running_sum, scores, v, scale_log2, DTYPE, V_OPERAND, P_OPERAND
    )

    out = acc.reshape([HEAD_DIM_V // 64, 8, 8, ROWS]).permute((3, 0, 2, 1)).reshape([ROWS, HEAD_DIM_V])
    out = gl.convert_layout(out, OUT, assert_trivial=True)
    running_max = gl.convert_layout(running_max, gl.SliceLayout(1, OUT), assert_trivial=True)
    total = gl.convert_layout(gl.sum(running_sum, 0), gl.SliceLayout(1, OUT), assert_trivial=True)
    tensors = (out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr)
    FLAGS: gl.constexpr = (GATHER_Q, FINAL, HAS_SINKS, HAS_LSE)
    store_rows(out, running_max, total, tensors, place, dest, num_q_heads, GROUP_SIZE, FLAGS, OUT)
    if PDL:  # noqa: SIM102 - two ifs: this one is decided when the kernel is compiled
        # The merge waits for the launch before it only: so no launch may end before the one before it has.
        if gl.program_id(0) == gl.num_programs(0) - 1:
            gdc_wait()
