"""Which code computes: chosen by name, imported when needed, never replaced silently."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor


def choose_backend(backend: str, q: Tensor) -> ModuleType:
    """Return the backend's module; "auto" is Triton for CUDA tensors and the reference elsewhere."""
    if backend == "triton" or (backend == "auto" and q.device.type == "cuda"):
        try:
            from hydragen.backends import triton
        except ImportError as error:
            raise ValueError(
                f'backend {backend!r} needs the package triton, which cannot be imported here ({error}); '
                'install triton or pass backend="reference"'
            ) from error
        return triton
    from hydragen.backends import reference

    return reference
