"""Keys and values on their way into shared memory: the producer warp of kernels/prefix_sm90.py.

Blocks travel by TMA into two rings of STAGES slots, one of keys and one of values. A block's number counts
all blocks that a program has had in its ring, over all its tasks: it gives the slot, and the parity of the
two barriers that say whether the slot is full, or empty again.

Of a pool of pages a block is brought in boxes of at most a page's keys and 64 of a row's elements, which is
how shared memory is laid out: the first 64 of all rows, then the next.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .attend import ITEM_COLUMNS


@gluon.jit
def locate(items_ptr, kv_lens_ptr, task, num_items, HAS_LENS: gl.constexpr):
    """What task `task` of the launch attends to: its row of the work table, its KV head and last key."""
    kv_head = task // num_items
    columns = items_ptr + (task % num_items).to(gl.int64) * ITEM_COLUMNS
    end = gl.load(columns + 4)
    if HAS_LENS:  # lengths on the device: clamped to the capacity the plan was made for
        end = gl.minimum(end, gl.load(kv_lens_ptr + gl.load(columns)))
    return columns, kv_head, end


@gluon.jit
def num_blocks(begin, end, BLOCK_N: gl.constexpr):
    """At least one, so that a segment that is empty on the device needs no path of its own."""
    return gl.maximum((end - begin + BLOCK_N - 1) // BLOCK_N, 1)


@gluon.jit
def wait_for(ready, block, parity, STAGES: gl.constexpr):
    """Wait for a slot of a ring; `parity` 0 to read the block, 1 to have the room free for it."""
    mbarrier.wait(ready.index(block % STAGES), ((block // STAGES) & 1) ^ parity)


@gluon.jit
def fetch(desc, row, column, ring, full, empty, block, STAGES: gl.constexpr):
    """Bring block number `block` into its slot of the ring once that is free."""
    wait_for(empty, block, 1, STAGES)
    slot = block % STAGES
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, column], full.index(slot), ring.index(slot))


@gluon.jit
def page_of(pages_ptr, num_pages, position, PAGE_SIZE: gl.constexpr):
    """The page that holds the key at `position`, clamped as in kernels/block.py."""
    return gl.minimum(gl.maximum(gl.load(pages_ptr + position // PAGE_SIZE), 0), num_pages - 1)


@gluon.jit
def page_row(pages, position, last, page_rows, PAGE_SIZE: gl.constexpr):
    """The row of a pool that holds the key at `position`, or a segment's `last` key if that is before it."""
    pages_ptr, num_pages = pages
    position = gl.minimum(position, last)
    return page_of(pages_ptr, num_pages, position, PAGE_SIZE) * page_rows + position % PAGE_SIZE


@gluon.jit
def fetch_pages(
    desc, pages, position, last, page_rows, column, ring, full, empty, block, STAGES: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """As `fetch`, keys from `position` on; behind the segment's `last` key rows of its page again."""
    BLOCK_N: gl.constexpr = ring.shape[1]
    SIZE: gl.constexpr = ring.shape[2]
    KEYS: gl.constexpr = desc.block_type.shape[0]
    COLUMNS: gl.constexpr = desc.block_type.shape[1]
    BOXES: gl.constexpr = BLOCK_N // KEYS
    # known before the slot is free, as many as there are registers for
    first = (
        page_row(pages, position, last, page_rows, PAGE_SIZE),
        page_row(pages, position + 1 % BOXES * KEYS, last, page_rows, PAGE_SIZE),
        page_row(pages, position + 2 % BOXES * KEYS, last, page_rows, PAGE_SIZE),
        page_row(pages, position + 3 % BOXES * KEYS, last, page_rows, PAGE_SIZE),
    )
    wait_for(empty, block, 1, STAGES)
    slot = block % STAGES
    mbarrier.expect(full.index(slot), desc.block_type.nbytes * BOXES * (SIZE // COLUMNS))
    # as it lies in shared memory; Gluon has no public name for this
    parts = ring.index(slot)._reinterpret(  # noqa: SLF001
        desc.dtype, [SIZE // COLUMNS, BLOCK_N, COLUMNS], desc.layout
    )
    for i in gl.static_range(BOXES):
        if i < 4:
            row = first[i]
        else:
            row = page_row(pages, position + i * KEYS, last, page_rows, PAGE_SIZE)
        for j in gl.static_range(SIZE // COLUMNS):
            box = parts.index(j).slice(i * KEYS, KEYS, dim=0)
            tma.async_copy_global_to_shared(desc, [row, column + j * COLUMNS], full.index(slot), box)


@gluon.jit
def fetch_paged_segment(
    k_desc, v_desc, pages, begin, end, k_page_rows, v_page_rows, kv_head, blocks, done, rings,
    SIZES: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """As `fetch_segment`, of a segment whose pages are numbered from pages[0] on."""
    k_ring, v_ring, k_full, k_empty, v_full, v_empty = rings
    BLOCK_N: gl.constexpr = SIZES[4]
    STAGES: gl.constexpr = SIZES[5]
    k_column = kv_head * SIZES[2]
    v_column = kv_head * SIZES[3]
    last = gl.maximum(end - 1, begin)
    position = begin + (blocks - 1) * BLOCK_N
    fetch_pages(
        k_desc, pages, position, last, k_page_rows, k_column, k_ring, k_full, k_empty, done, STAGES, PAGE_SIZE
    )
    for i in range(1, blocks):
        fetch_pages(
            k_desc, pages, position - BLOCK_N, last, k_page_rows, k_column, k_ring, k_full, k_empty, done + i,
            STAGES, PAGE_SIZE,
        )  # fmt: skip
        fetch_pages(
            v_desc, pages, position, last, v_page_rows, v_column, v_ring, v_full, v_empty, done + i - 1,
            STAGES, PAGE_SIZE,
        )  # fmt: skip
        position -= BLOCK_N
    fetch_pages(
        v_desc, pages, position, last, v_page_rows, v_column, v_ring, v_full, v_empty, done + blocks - 1,
        STAGES, PAGE_SIZE,
    )  # fmt: skip


@gluon.jit
def fetch_segment(
    k_desc, v_desc, k_row, v_row, kv_head, blocks, done, rings, SIZES: gl.constexpr
):  # fmt: skip
    """Bring a segment's blocks in the order of their use; the last begins at rows k_row and v_row."""
    k_ring, v_ring, k_full, k_empty, v_full, v_empty = rings
    HEAD_DIM: gl.constexpr = SIZES[2]
    HEAD_DIM_V: gl.constexpr = SIZES[3]
    BLOCK_N: gl.constexpr = SIZES[4]
    STAGES: gl.constexpr = SIZES[5]
    k_column = kv_head * HEAD_DIM
    v_column = kv_head * HEAD_DIM_V
    fetch(k_desc, k_row, k_column, k_ring, k_full, k_empty, done, STAGES)
    for i in range(1, blocks):
        fetch(k_desc, k_row - i * BLOCK_N, k_column, k_ring, k_full, k_empty, done + i, STAGES)
        v_before = v_row - (i - 1) * BLOCK_N
        fetch(v_desc, v_before, v_column, v_ring, v_full, v_empty, done + i - 1, STAGES)
    v_row -= (blocks - 1) * BLOCK_N
    fetch(v_desc, v_row, v_column, v_ring, v_full, v_empty, done + blocks - 1, STAGES)


@gluon.jit
def produce(
    descs, rings, work, SIZES: gl.constexpr, NUM_LEVELS: gl.constexpr, HAS_LENS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """Fetch the keys and values of the program's tasks in the order in which the consumers need them.

    A descriptor is of one tensor and cannot be chosen at run time: there is code for each level.
    """
    k_descs, v_descs, levels, k_slot_rows, v_slot_rows, pages = descs
    items_ptr, _, kv_lens_ptr, num_tasks, num_items, _, _, _ = work
    BLOCK_N: gl.constexpr = SIZES[4]
    done = 0  # blocks of earlier tasks
    for task in range(gl.program_id(0), num_tasks, gl.num_programs(0)):
        columns, kv_head, end = locate(items_ptr, kv_lens_ptr, task, num_items, HAS_LENS)
        level = gl.load(columns + 1)
        node_slot = gl.load(columns + 2)
        begin = gl.load(columns + 3)
        blocks = num_blocks(begin, end, BLOCK_N)
        last = begin + (blocks - 1) * BLOCK_N
        if PAGE_SIZE > 0:
            own = (pages[0] + node_slot, pages[1])
            fetch_paged_segment(
                k_descs[0], v_descs[0], own, begin, end, k_slot_rows[0], v_slot_rows[0], kv_head, blocks,
                done, rings, SIZES, PAGE_SIZE,
            )  # fmt: skip
        else:
            for i in gl.static_range(NUM_LEVELS):
                k_row = node_slot * k_slot_rows[i] + last
                v_row = node_slot * v_slot_rows[i] + last
                if level == levels[i]:
                    fetch_segment(k_descs[i], v_descs[i], k_row, v_row, kv_head, blocks, done, rings, SIZES)
        done += blocks
