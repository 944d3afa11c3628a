"""The facts about a device that launch choices depend on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Target:
    """A device as `tuning` sees it.

    Attributes
    ----------
    arch : int
        Compute capability times ten (80, 90, 100, ...); 0 is Triton's interpreter on a CPU.
    num_sms : int
        Streaming multiprocessors.
    flops : float
        Half-precision matrix products, FLOP/s, as measured; an estimate where nobody has.
    bandwidth : float
        Device memory, bytes/s read and written, as measured; an estimate where nobody has.
    name : str
        For people.
    """

    arch: int
    num_sms: int
    flops: float
    bandwidth: float
    name: str = field(default="", compare=False)


# The interpreter runs programs one after another: few of them make small tests quick and still cross
# every border (several tiles, splits, merges).
INTERPRETER = Target(arch=0, num_sms=4, flops=1e9, bandwidth=1e9)
H200 = Target(arch=90, num_sms=132, flops=790e12, bandwidth=4.31e12, name="H200")
H100 = Target(arch=90, num_sms=132, flops=790e12, bandwidth=3.0e12, name="H100")


def target_of(device: torch.device) -> Target:
    """Return what `tuning` must know of `device`; a CPU means the interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    for name, known in (("H200", H200), ("H100", H100)):
        if name in properties.name and properties.multi_processor_count == known.num_sms:
            return known
    arch = properties.major * 10 + properties.minor
    return Target(
        arch, properties.multi_processor_count, flops=300e12, bandwidth=2.0e12, name=properties.name
    )
