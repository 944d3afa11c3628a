"""Whole states merged in one pass: attention over several sets of keys, each of all rows (section 3.1)."""

import triton
import triton.language as tl

from .primitives import LOG2_E, LOWEST, round_to


@triton.jit
def _higher(a, b):
    """The larger of two, NaN if one is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _bounded(lse):
    """lse as a finite number, so that no difference is inf - inf; NaN stays."""
    return tl.minimum(_higher(lse, LOWEST), -LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def merge_states(
    outs, lses, out_ptr, lse_ptr,
    num_rows, out_strides, lse_strides,
    HEAD_DIM_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_DV: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Merge BLOCK_R rows and BLOCK_DV columns of all states: outs[i] [rows, HEAD_DIM_V], lses[i] [rows].

    Rows are `out_strides[i]` and `lse_strides[i]` elements apart, those of the results lie side by side.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = row < num_rows
    column = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    mask = row_ok[:, None] & (column < HEAD_DIM_V)[None, :]
    # [BLOCK_R]; asked for three times, then from a cache
    largest = tl.load(lses[0] + row * lse_strides[0], mask=row_ok, other=0.0)
    for i in tl.static_range(1, len(lses)):
        largest = _higher(largest, tl.load(lses[i] + row * lse_strides[i], mask=row_ok, other=0.0))
    pivot = _bounded(largest)
    total = tl.zeros([BLOCK_R], tl.float32)
    for i in tl.static_range(len(lses)):
        lse = tl.load(lses[i] + row * lse_strides[i], mask=row_ok, other=0.0)
        total += tl.math.exp2((_bounded(lse) - pivot) * LOG2_E)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    for i in tl.static_range(len(lses)):
        lse = tl.load(lses[i] + row * lse_strides[i], mask=row_ok, other=0.0)
        # at most 1, so that nothing overflows which is not too large itself
        weight = tl.math.exp2((_bounded(lse) - pivot) * LOG2_E) / total
        part = tl.load(outs[i] + row[:, None] * out_strides[i] + column[None, :], mask=mask, other=0.0)
        acc += weight[:, None] * part.to(tl.float32)
    out = round_to(acc, out_ptr.dtype.element_ty, INTERPRET)
    tl.store(out_ptr + row[:, None] * HEAD_DIM_V + column[None, :], out, mask=mask)
    # the largest keeps its infinity here: -inf where all states are empty
    tl.store(lse_ptr + row, largest + tl.log(total), mask=row_ok & (tl.program_id(1) == 0))
