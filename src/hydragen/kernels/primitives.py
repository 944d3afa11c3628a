"""Small pieces that the kernels share: selection, dots, tanh, rounding and the running softmax."""

import triton
import triton.language as tl

# The lowest finite float32. A running maximum starts here and not at -inf, so that no subtraction of two
# infinities can occur; no finite logit lies below it, so it is no sentinel that real data could pass.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Where a maximum is raised lazily, weights reach 2**RESCALE before it is; their relative precision stays.
RESCALE = tl.constexpr(8.0)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def select(values, index):
    """values[index] for a tuple of kernel arguments and a run-time index."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a @ b in float32; float32 operands by IEEE products, never TF32."""
    if INTERPRET:  # the interpreter's bfloat16 dot is wrong (triton#11584)
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """x float32 rounded to nearest even in `dtype`."""
    if (
        INTERPRET and dtype == tl.bfloat16
    ):  # the interpreter's cast truncates: add half of the last place first
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        finite = tl.abs(x) < float("inf")
        return tl.where(finite, rounded, x).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def tanh(x):
    """tanh with a relative error of a few units in the last place: 1 - 2 / (exp(2x) + 1) cancels near 0."""
    x2 = x * x
    series = 21844.0 / 6081075.0
    series = series * x2 - 1382.0 / 155925.0
    series = series * x2 + 62.0 / 2835.0
    series = series * x2 - 17.0 / 315.0
    series = series * x2 + 2.0 / 15.0
    series = series * x2 - 1.0 / 3.0
    small = x + x * x2 * series
    size = tl.minimum(tl.abs(x), 20.0, propagate_nan=tl.PropagateNan.ALL)  # or exp overflows
    large = 1.0 - 2.0 / (tl.math.exp2(size * (2.0 * LOG2_E)) + 1.0)
    return tl.where(x2 < 0.16, small, tl.where(x < 0, -large, large))


@triton.jit
def fold(acc, running_max, running_sum, part, part_lse):
    """Fold a normalised partial `part` [.., D] with base-2 log-sum-exp `part_lse` [..] into a running
    softmax.

    An empty partial (-inf) has weight 0; the maximum stays at or above LOWEST, so -inf - -inf cannot occur.
    """
    new_max = tl.maximum(running_max, part_lse)
    weight = tl.math.exp2(part_lse - new_max)
    alpha = tl.math.exp2(running_max - new_max)
    acc = acc * alpha[:, None] + weight[:, None] * part
    return acc, new_max, running_sum * alpha + weight


@triton.jit
def total_and_lse(running_max, running_sum):
    """What to divide by, and the base-2 log-sum-exp; nothing attended gives (1, -inf)."""
    empty = running_sum == 0.0
    total = tl.where(empty, 1.0, running_sum)
    lse = tl.where(empty, float("-inf"), running_max + tl.math.log2(total))
    lse = tl.where(running_max == float("inf"), running_max, lse)  # and not NaN, as `out` is
    return total, lse


@triton.jit
def finish(acc, running_max, running_sum):
    """Normalise: (out, base-2 lse); nothing attended gives (0, -inf)."""
    total, lse = total_and_lse(running_max, running_sum)
    return acc / total[:, None], lse


@triton.jit
def fold_sink(acc, running_max, running_sum, sink):
    """Add one logit per row (natural units) whose value is zero: it takes weight and gives nothing."""
    sink_log2 = sink * LOG2_E
    new_max = tl.maximum(running_max, sink_log2)
    alpha = tl.math.exp2(running_max - new_max)
    return acc * alpha[:, None], new_max, running_sum * alpha + tl.math.exp2(sink_log2 - new_max)
