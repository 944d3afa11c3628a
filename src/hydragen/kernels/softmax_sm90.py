"""The running softmax of kernels/prefix_sm90.py, in Gluon: a block's weights, and sums rescaled for them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .primitives import RESCALE


@gluon.constexpr_function
def multiply_where_needed(count):
    """PTX that multiplies `count` sums, two of one row and two of another in turn, if a factor is not 1."""
    lines = [
        f"setp.neu.f32 p, ${2 * count}, 0f3F800000;",
        f"setp.neu.or.f32 p, ${2 * count + 2}, 0f3F800000, p;",
    ]
    lines += ["vote.sync.any.pred p, p, 0xffffffff;", "@!p bra done;"]
    lines += [f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)]
    return "\n".join(["{", ".reg .pred p;", *lines, "done:", "}"])


@gluon.constexpr_function
def in_place(count):
    """Constraints of as many results, each in the register of its sum, and factors."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


@gluon.jit
def rescale(acc, alpha, LAZY: gl.constexpr):
    """Sums [rows, head_dim_v] times a factor a row; LAZY: a warp whose factors are all 1 does nothing."""
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    if LAZY:
        alpha, acc = gl.broadcast(alpha, acc)
        TEXT: gl.constexpr = multiply_where_needed(32)
        PLACES: gl.constexpr = in_place(32)
        acc = gl.inline_asm_elementwise(TEXT, PLACES, [acc, alpha], acc.dtype, is_pure=True, pack=32)
    else:
        acc = acc * alpha
    return acc


@gluon.jit
def softmax_step(scores, running_max, scale_log2, LAZY: gl.constexpr):
    """Fold one block of raw scores into the maximum: (weights, what earlier sums are worth, new maximum).

    With LAZY the maximum stays until one lies 2**RESCALE above it.
    """
    new_max = gl.max(scores, 1) * scale_log2
    if LAZY:
        new_max = gl.where(new_max > running_max + RESCALE, new_max, running_max)
    else:
        new_max = gl.maximum(running_max, new_max)
    p = gl.exp2(scores * scale_log2 - new_max[:, None])
    return p, gl.exp2(running_max - new_max), new_max
