"""Tables of a plan on a device: uploaded in one copy, replaced in place in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydragen.host_ints import IntArray


class Uploaded:
    """Vectors of integers on a device, int32, side by side in one tensor.

    Parameters
    ----------
    arrays : integers, any shapes; they are flattened
    device : where they go

    Attributes
    ----------
    parts : int32 tensors, one per array; each begins at a multiple of 16 bytes, which makes for wider loads
    """

    def __init__(self, arrays: Sequence[IntArray | NDArray[np.int32]], device: torch.device) -> None:
        self._sizes = tuple([array.size for array in arrays])
        host = self._pinned(arrays, device)
        with torch.inference_mode(False):  # plans outlive the mode in which they are made
            self._flat = torch.empty_like(host, device=device)
        self._flat.copy_(host, non_blocking=True)
        # A captured copy reads the host's memory again at every replay.
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._host = host if capturing else None
        parts = [part for size in self._sizes for part in (size, -size % 4)]
        self.parts = tuple(self._flat.split_with_sizes(parts)[::2])

    def replace(self, arrays: Sequence[IntArray | NDArray[np.int32]]) -> None:
        """Overwrite all vectors by others of the same sizes, in the order of the current stream."""
        sizes = tuple([array.size for array in arrays])
        if sizes != self._sizes:
            raise ValueError(f"arrays must have the sizes {self._sizes}, got {sizes}; plan anew")
        host = self._pinned(arrays, self._flat.device)
        if self._host is not None:  # replays copy from there: those on their way what they were to copy
            torch.cuda.synchronize(self._flat.device)
            self._host.copy_(host)
        self._flat.copy_(host, non_blocking=True)

    def _pinned(self, arrays: Sequence[IntArray | NDArray[np.int32]], device: torch.device) -> Tensor:
        """Return all arrays in one CPU tensor, from which copies to `device` do not make the host wait."""
        flat = np.empty(sum([size + -size % 4 for size in self._sizes]), np.int32)
        begin = 0
        for array, size in zip(arrays, self._sizes, strict=True):
            end = begin + size
            flat[begin:end] = array.reshape(-1)
            begin = end + -size % 4
            flat[end:begin] = 0
        host = torch.from_numpy(flat)
        return host.pin_memory() if device.type == "cuda" else host
