"""Mistakes to plant in the kernels and the work table, and the smallest problem that shows each of them.

Each is (module, a piece of its source, what to put in its place). The smallest problems were found by
`hydragen.testing.shrink`. `SHOWN_BY` says what besides a packed problem shows a bug.
"""

from hydragen.testing import Problem

ATTEND, SEGMENT, BLOCK, MERGE, PRIMITIVES, LAYOUT = (
    "hydragen.kernels.attend",
    "hydragen.kernels.segment",
    "hydragen.kernels.block",
    "hydragen.kernels.merge",
    "hydragen.kernels.primitives",
    "hydragen.layout",
)
QUERIES, LAUNCHES = "hydragen.queries", "hydragen.backends.launches"
BUGS = {
    "causal mask off by one": (BLOCK, "visible & (distance >= 0)", "visible & (distance > 0)"),
    "window of one key more": (BLOCK, "distance < window", "distance <= window"),
    "tail not masked": (
        BLOCK,
        "        visible = in_range[None, :]\n",
        "        visible = (in_range == in_range)[None, :]\n",
    ),
    "padding of head_dim read": (
        BLOCK,
        "d_ok = tl.arange(0, BLOCK_D) < HEAD_DIM",
        "d_ok = tl.arange(0, BLOCK_D) >= 0",
    ),
    "head_dim_v stored without a column mask": (
        ATTEND,
        "part_mask = (local < num_tok)[:, None] & (offs_dv < HEAD_DIM_V)[None, :]",
        "part_mask = (local < num_tok)[:, None] & (offs_dv >= 0)[None, :]",
    ),
    "running sum not rescaled": (
        BLOCK,
        "running_sum = running_sum * alpha + tl.sum(p, 1)",
        "running_sum = running_sum + tl.sum(p, 1)",
    ),
    "lse in base 2": (ATTEND, "tl.store(lse_ptr + out_rows, lse * LN_2", "tl.store(lse_ptr + out_rows, lse"),
    "GQA heads interleaved": (
        ATTEND,
        "head = kv_head * GROUP_SIZE + rows % (HEADS * GROUP_SIZE)",
        "head = kv_head + rows % (HEADS * GROUP_SIZE) * num_kv_heads",
    ),
    "slot of a node ignored": (
        SEGMENT,
        "k_head_ptr += slot.to(tl.int64) * stride_kn",
        "k_head_ptr += (slot * 0).to(tl.int64) * stride_kn",
    ),
    "fully visible block includes a hidden key": (
        SEGMENT,
        "tl.minimum(end, first_pos + 1 - kv_start)",
        "tl.minimum(end, last_pos + 1 - kv_start)",
    ),
    "finite stand-in for minus infinity": (
        PRIMITIVES,
        "LOWEST = tl.constexpr(-3.4028234663852886e38)",
        "LOWEST = tl.constexpr(-5.0e4)",
    ),
    "empty state has a finite lse": (
        PRIMITIVES,
        'tl.where(empty, float("-inf"), running_max',
        "tl.where(empty, LOWEST, running_max",
    ),
    "minus infinity minus minus infinity": (
        PRIMITIVES,
        "new_max = tl.maximum(running_max, part_lse)",
        "new_max = tl.maximum(tl.where(running_sum == 0.0, part_lse, running_max), part_lse)",
    ),
    "sink weighs in the wrong base": (PRIMITIVES, "sink_log2 = sink * LOG2_E", "sink_log2 = sink * 1.0"),
    "tanh loses its sign": (PRIMITIVES, "tl.where(x < 0, -large, large)", "large"),
    "sink counted twice": (
        MERGE,
        "= fold_sink(acc, running_max, running_sum, sink)",
        "= fold_sink(*fold_sink(acc, running_max, running_sum, sink), sink)",
    ),
    "last partial left out": (MERGE, "ok = block + i < last", "ok = block + i < last - 1"),
    "merge in natural base": (
        MERGE,
        "tl.store(lse_ptr + row, lse * LN_2",
        "tl.store(lse_ptr + row, lse * LN_2 * LN_2",
    ),
    "one prefix too many": (
        QUERIES,
        "first[tree.row_begin], first[tree.row_end]",
        "first[tree.row_begin * 0], first[tree.row_end]",
    ),
    "last key of a split dropped": (LAYOUT, "segments.kv_len[split_of])", "segments.kv_len[split_of] - 1)"),
    "partials of two splits share a place": (
        LAYOUT,
        "columns[_DEST] = partials_before[source]",
        "columns[_DEST] = partials_before[source] * 0",
    ),
    "rows in tree order": (QUERIES, "token = q_starts[row] + within", "token = np.arange(first[-1])"),
    "second block of rows is the first": (
        LAYOUT,
        "columns[_ROW_BEGIN] = np.where(alone[run], 0, block * block_m[run])",
        "columns[_ROW_BEGIN] = block * 0",
    ),
    "second segment of a run left out": (SEGMENT, "(0, num_segments,", "(0, num_segments - 1,"),
    "first segment of a run once more": (
        SEGMENT,
        "slot = tl.where(is_first, segment[2], second[2])",
        "slot = segment[2]",
    ),
    "third segment of a run is another": (
        SEGMENT,
        "tl.cast(index - 2, tl.int64)",
        "tl.cast(index - 1, tl.int64)",
    ),
    "runs begin with their last segment": (
        LAYOUT,
        "pieces.fill(first, nodes, begin[which])",
        "pieces.fill(first, nodes, (begin + count - 1)[which])",
    ),
    "page table ignored": (
        BLOCK,
        "clamp_page(tl.load(pages_ptr + start // PAGE_SIZE), num_pages)",
        "clamp_page(tl.load(pages_ptr + start // PAGE_SIZE) * 0 + start // PAGE_SIZE, num_pages)",
    ),
    "place within a page ignored": (
        BLOCK,
        "within = (offs_n % PAGE_SIZE).to(tl.int64)",
        "within = (offs_n * 0 % PAGE_SIZE).to(tl.int64)",
    ),
    "pages of the first node for everybody": (SEGMENT, "pages_ptr + slot,", "pages_ptr + slot * 0,"),
    "strides taken for contiguous": (
        LAUNCHES,
        "    expected = (heads.num_kv_heads * head_dim, head_dim, 1)\n",
        "    return head_dim > 0\n    expected = (heads.num_kv_heads * head_dim, head_dim, 1)\n",
    ),
}

# Of 17 heads, more than the smallest tile has rows: what fits it is attended in one run, without a merge.
# Two tiles of keys, two tiles of rows (17 queries of two heads), a whole tile of keys that are all visible.
CROSSES_A_TILE = {
    "running sum not rescaled",
    "second block of rows is the first",
    "fully visible block includes a hidden key",
}
SHOWN_BY = {
    "page table ignored": "pages of 16",
    "place within a page ignored": "pages of 3",
    "pages of the first node for everybody": "pages of 3",
    "strides taken for contiguous": "strides",
}
SMALLEST = {
    "causal mask off by one": Problem(
        parents=(-1,),
        kv_lens=(1,),
        row_to_node=(0,),
        q_lens=(1,),
        head_dim=1,
        head_dim_v=1,
        causal=True,
        window=1,
    ),
    "window of one key more": Problem(
        parents=(-1,), kv_lens=(2,), row_to_node=(0,), q_lens=(1,), head_dim=1, head_dim_v=1, window=1
    ),
    "tail not masked": Problem(
        parents=(-1,), kv_lens=(1,), row_to_node=(0,), q_lens=(1,), head_dim=1, head_dim_v=1
    ),
    "padding of head_dim read": Problem(
        parents=(-1,), kv_lens=(1,), row_to_node=(0,), q_lens=(1,), head_dim=1, head_dim_v=1
    ),
    "head_dim_v stored without a column mask": Problem(
        parents=(-1, 0),
        kv_lens=(1, 1),
        row_to_node=(1,),
        q_lens=(1,),
        num_q_heads=17,
        head_dim=1,
        head_dim_v=1,
    ),
    "running sum not rescaled": Problem(
        parents=(-1,),
        kv_lens=(18,),
        row_to_node=(0,),
        q_lens=(1,),
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=1,
        head_dim_v=1,
    ),
    "lse in base 2": Problem(
        parents=(-1,), kv_lens=(1,), row_to_node=(0,), q_lens=(1,), head_dim=1, head_dim_v=1
    ),
    "GQA heads interleaved": Problem(
        parents=(-1,),
        kv_lens=(1,),
        row_to_node=(0,),
        q_lens=(1,),
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=1,
        head_dim_v=1,
    ),
    "slot of a node ignored": Problem(
        parents=(-1, -1), kv_lens=(1, 1), row_to_node=(1,), q_lens=(1,), head_dim=1, head_dim_v=1
    ),
    "fully visible block includes a hidden key": Problem(
        parents=(-1,), kv_lens=(16,), row_to_node=(0,), q_lens=(2,), head_dim=1, head_dim_v=1, causal=True
    ),
    "finite stand-in for minus infinity": Problem(
        parents=(-1,),
        kv_lens=(1,),
        row_to_node=(0,),
        q_lens=(1,),
        head_dim=1,
        head_dim_v=1,
        sharpness="very_negative",
    ),
    "empty state has a finite lse": Problem(
        parents=(-1,), kv_lens=(0,), row_to_node=(0,), q_lens=(1,), head_dim=1, head_dim_v=1
    ),
    "minus infinity minus minus infinity": Problem(
        parents=(-1, 0),
        kv_lens=(1, 1),
        row_to_node=(1,),
        q_lens=(1,),
        num_q_heads=17,
        head_dim=1,
        head_dim_v=1,
        window=1,
    ),
    "sink weighs in the wrong base": Problem(
        parents=(-1,), kv_lens=(0,), row_to_node=(0,), q_lens=(1,), head_dim=1, head_dim_v=1, sinks=True
    ),
    "tanh loses its sign": Problem(
        parents=(-1,),
        kv_lens=(1,),
        row_to_node=(0,),
        q_lens=(1,),
        num_q_heads=2,
        head_dim=1,
        head_dim_v=1,
        softcap=2.0,
        sharpness="peaked",
    ),
    "sink counted twice": Problem(
        parents=(-1, 0),
        kv_lens=(1, 1),
        row_to_node=(1,),
        q_lens=(1,),
        num_q_heads=17,
        head_dim=1,
        head_dim_v=1,
        sinks=True,
    ),
    "last partial left out": Problem(
        parents=(-1, 0),
        kv_lens=(1, 1),
        row_to_node=(1,),
        q_lens=(1,),
        num_q_heads=17,
        head_dim=1,
        head_dim_v=1,
    ),
    "merge in natural base": Problem(
        parents=(-1, 0),
        kv_lens=(1, 1),
        row_to_node=(1,),
        q_lens=(1,),
        num_q_heads=17,
        head_dim=1,
        head_dim_v=1,
    ),
    "one prefix too many": Problem(
        parents=(-1, -1), kv_lens=(0, 1), row_to_node=(0,), q_lens=(1,), head_dim=1, head_dim_v=1
    ),
    "last key of a split dropped": Problem(
        parents=(-1,), kv_lens=(1,), row_to_node=(0,), q_lens=(1,), head_dim=1, head_dim_v=1
    ),
    "partials of two splits share a place": Problem(
        parents=(-1, 0),
        kv_lens=(1, 1),
        row_to_node=(1,),
        q_lens=(1,),
        num_q_heads=17,
        head_dim=1,
        head_dim_v=1,
    ),
    "rows in tree order": Problem(
        parents=(-1, -1), kv_lens=(0, 1), row_to_node=(1, 0, 1), q_lens=(1, 1, 1), head_dim=1, head_dim_v=1
    ),
    "second block of rows is the first": Problem(
        parents=(-1,), kv_lens=(1,), row_to_node=(0,), q_lens=(17,), num_q_heads=2, head_dim=1, head_dim_v=1
    ),
    "second segment of a run left out": Problem((-1, 0), (1, 1), (1,), (1,), head_dim=1, head_dim_v=1),
    "first segment of a run once more": Problem((-1, 0), (1, 1), (1,), (1,), head_dim=1, head_dim_v=1),
    "third segment of a run is another": Problem((-1, 0, 1), (1, 1, 1), (2,), (1,), head_dim=1, head_dim_v=1),
    "runs begin with their last segment": Problem((-1, 0), (1, 1), (1,), (1,), head_dim=1, head_dim_v=1),
    "page table ignored": Problem((-1,), (1,), (0,), (1,), head_dim=1, head_dim_v=1),
    "place within a page ignored": Problem((-1,), (2,), (0,), (1,), head_dim=1, head_dim_v=1),
    "pages of the first node for everybody": Problem((-1, -1), (1, 1), (1,), (1,), head_dim=1, head_dim_v=1),
    "strides taken for contiguous": Problem((-1,), (2,), (0,), (1,), head_dim=1, head_dim_v=1),
}
