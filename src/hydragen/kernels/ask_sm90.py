"""Keys and values on their way to a warp of kernels/warp_sm90.py, in Gluon.

Nobody but the warp asks for them. What is asked for together has one number and one of two barriers in turn.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .fetch_sm90 import page_of


@gluon.jit
def ask(side, source, row, full, block, NUM_LEVELS: gl.constexpr):
    """Bring keys or values from `row` on of a head into the slot of block number `block` of their ring."""
    descs, ring, column = side
    level, levels = source
    STAGES: gl.constexpr = ring.shape[0]
    for i in gl.static_range(NUM_LEVELS):
        if NUM_LEVELS == 1 or level == levels[i]:
            tma.async_copy_global_to_shared(descs[i], [row, column], full, ring.index(block % STAGES))


@gluon.jit
def ask_for_both(k_side, v_side, source, rows, full, blocks, NUM_LEVELS: gl.constexpr):
    """Bring keys of one block and values of one, to be waited for together at one barrier."""
    k_bytes: gl.constexpr = k_side[0][0].block_type.nbytes
    v_bytes: gl.constexpr = v_side[0][0].block_type.nbytes
    mbarrier.expect(full, k_bytes + v_bytes)
    ask(k_side, source, rows[0], full, blocks[0], NUM_LEVELS)
    ask(v_side, source, rows[1], full, blocks[1], NUM_LEVELS)


@gluon.jit
def ask_for_one(side, source, row, full, block, NUM_LEVELS: gl.constexpr):
    """Bring keys or values of a block alone."""
    mbarrier.expect(full, side[0][0].block_type.nbytes)
    ask(side, source, row, full, block, NUM_LEVELS)


@gluon.jit
def block_page(block, place, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """The page that block number `block` of a segment lies in; past the last key, that key's."""
    begin, last, pages_ptr, num_pages = place
    page = 0
    if PAGE_SIZE > 0:
        page = page_of(pages_ptr, num_pages, gl.minimum(begin + block * BLOCK_N, last), PAGE_SIZE)
    return page


@gluon.jit
def block_row(block, page, first_row, place, page_rows, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """The row at which block number `block` of a segment begins; of pages past the last key, that key's."""
    begin, last, _, _ = place
    if PAGE_SIZE > 0:
        row = page * page_rows + gl.minimum(begin + block * BLOCK_N, last) % PAGE_SIZE
    else:
        row = first_row + block * BLOCK_N
    return row
