"""A kernel that reads past the end of a tensor: ci/sanitize must hear of it, or it hears of nothing."""

import torch
import triton
import triton.language as tl


@triton.jit
def attend_out_of_bounds(x_ptr, out_ptr, SIZE: tl.constexpr):
    """Copy SIZE elements, however many there are. Named so that what watches our kernels watches it."""
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets))


if __name__ == "__main__":
    x, out = torch.zeros(1000, device="cuda"), torch.empty(1024, device="cuda")
    attend_out_of_bounds[(1,)](x, out, 1024)
    torch.cuda.synchronize()
