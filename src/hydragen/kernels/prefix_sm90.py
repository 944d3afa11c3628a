"""The attention tile for long shared segments on sm_90, in Gluon: a producer warp and independent consumers.

It serves the work table of kernels/attend.py, with the same rows, partials and outputs, where a plain tile is
bound by the tensor cores: 64 * CONSUMERS query rows a program, keys and values contiguous per token, no mask
but the segment's end and causality, no soft cap. One warp brings blocks of keys and values into rings of
shared memory by TMA (kernels/fetch_sm90.py). Each consumer (kernels/consume_sm90.py) is a warpgroup with 64
rows of its own; but for the end of a segment within a block they do not wait for one another, so that the
softmax of one runs beside the products of the other. Within a consumer the product with the values of one
block is queued behind the scores of the next and runs during their softmax. Blocks are walked from the
segment's end: only the first can be short, those with keys that come after a query follow, if any, and the
main loop carries no mask.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .consume_sm90 import ROWS, consume
from .fetch_sm90 import produce

# Of each thread of the producer's warps: addresses and counters only.
PRODUCER_REGISTERS = gl.constexpr(24)
# How a block of keys or values lies in shared memory, as wgmma reads it.
BLOCK_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)

__all__ = ["BLOCK_LAYOUT", "TensorDescriptor", "attend_prefix"]


@gluon.jit
def attend_prefix(
    q_ptr, k_desc, k_desc_1, k_desc_2, k_desc_3, v_desc, v_desc_1, v_desc_2, v_desc_3,
    out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr,
    items_ptr, num_items_ptr, q_token_ptr, q_pos_ptr, kv_start_ptr, kv_lens_ptr, pages_ptr,
    num_tasks, num_items, num_pages, q_len, levels, k_slot_rows, v_slot_rows, scale_log2,
    stride_qb, stride_qt, stride_qh,
    GROUP_SIZE: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    Q_SHARED: gl.constexpr, LAZY: gl.constexpr, GATHER_Q: gl.constexpr, HAS_LENS: gl.constexpr,
    FINAL: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr, PDL: gl.constexpr,
    NUM_LEVELS: gl.constexpr, PAGE_SIZE: gl.constexpr, RESERVED: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Attend items: task t is item t % num_items for KV head t // num_items.

    Program i takes tasks i, i + num_programs, ... RESERVED: there are num_items_ptr[0] items, and tasks of
    these alone. The items lie in NUM_LEVELS levels of KV, whose numbers are
    `levels`. The descriptors describe each level's tensors, in the same order, as [keys of all slots,
    num_kv_heads * head_dim] in blocks of [BLOCK_N, head_dim]; those after the last are None. Slot s begins at
    key s * k_slot_rows, v_slot_rows of its level. With PAGE_SIZE there is one level, a pool: a node's pages
    are listed from its slot of `pages_ptr` on, page p begins at key p * k_slot_rows, v_slot_rows, and blocks
    are [min(BLOCK_N, PAGE_SIZE), 64]; PAGE_SIZE divides BLOCK_N, or BLOCK_N it. A TMA block never reads
    outside the tensor, but it may read past the segment's end. `scale_log2` must be positive. Everything else
    is as in kernels/attend.py.
    """
    if PDL:
        # The next launch may take what room this one leaves, as soon as all of this one is placed.
        gdc_launch_dependents()
    if RESERVED:
        num_items = gl.load(num_items_ptr)
        num_tasks = num_items * NUM_KV_HEADS
    DTYPE: gl.constexpr = k_desc.dtype
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_DIM_V], v_desc.layout)
    if Q_SHARED:
        q_ring = gl.allocate_shared_memory(DTYPE, [CONSUMERS, ROWS, HEAD_DIM], k_desc.layout)
    else:
        q_ring = k_ring
    BARRIERS: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    cleared = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIERS)
    seen = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIERS)
    mbarrier.init(cleared.index(0), count=1)
    mbarrier.init(seen.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    rings = (k_ring, v_ring, k_full, k_empty, v_full, v_empty)
    tensors = (q_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr, q_ring)
    handover = (cleared, seen)
    positions = (q_pos_ptr, kv_start_ptr) if CAUSAL else ()
    work = (items_ptr, q_token_ptr, kv_lens_ptr, num_tasks, num_items, q_len, scale_log2, positions)
    strides = (stride_qb, stride_qt, stride_qh)
    k_descs = (k_desc, k_desc_1, k_desc_2, k_desc_3)
    v_descs = (v_desc, v_desc_1, v_desc_2, v_desc_3)
    pages = (pages_ptr, num_pages) if PAGE_SIZE > 0 else ()
    descs = (k_descs, v_descs, levels, k_slot_rows, v_slot_rows, pages)
    SIZES: gl.constexpr = (GROUP_SIZE, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM_V, BLOCK_N, STAGES, CONSUMERS)
    FLAGS: gl.constexpr = (Q_SHARED, GATHER_Q, HAS_LENS, FINAL, HAS_SINKS, HAS_LSE, LAZY, CAUSAL)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (tensors, rings, handover, work, strides, 0, SIZES, FLAGS)),
                (consume, (tensors, rings, handover, work, strides, 1, SIZES, FLAGS)),
                (produce, (descs, rings, work, SIZES, NUM_LEVELS, HAS_LENS, PAGE_SIZE)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (tensors, rings, handover, work, strides, 0, SIZES, FLAGS)),
                (produce, (descs, rings, work, SIZES, NUM_LEVELS, HAS_LENS, PAGE_SIZE)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )
    if PDL:
        # The merge waits for the launch before it only: so no launch may end before the one before it has.
        if gl.program_id(0) == gl.num_programs(0) - 1:
            gdc_wait()
