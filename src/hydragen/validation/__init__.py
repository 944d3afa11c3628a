"""Every argument error of the public ops, whatever the backend: argument, expectation, value, remedy."""

from hydragen.validation.call import Call, check_attention
from hydragen.validation.options import check_backend, check_bool, check_options, check_scale
from hydragen.validation.queries import check_cu_seqlens
from hydragen.validation.tensors import check_tensor

__all__ = [
    "Call",
    "check_attention",
    "check_backend",
    "check_bool",
    "check_cu_seqlens",
    "check_options",
    "check_scale",
    "check_tensor",
]
