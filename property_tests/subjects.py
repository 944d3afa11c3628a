"""hydragen with each backend that runs here, and the limits within which it is tested.

TRITON_INTERPRET must be set before Triton is imported, so one run of pytest has the Triton backend either in
the interpreter, on a GPU, or not at all.
"""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from hydragen.testing import Implementation, Inputs, Problem
from hydragen.testing.adapters.ours import attend
from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.conformance.subject import Subject

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED


def capabilities() -> Capabilities:
    """Everything, as far as there is time for it."""
    if INTERPRETED:  # slow
        return Capabilities(
            paged=True,
            head_dims=(16, 5, 33, 64),
            group_sizes=(1, 3, 4, 8),
            max_nodes=5,
            max_rows=6,
            max_q_len=4,
            max_kv=70,
        )
    if CUDA:  # every head_dim, dtype and option is another kernel to compile
        return Capabilities(paged=True, head_dims=(64, 128, 33, 1, 256), max_kv=600)
    return Capabilities(paged=True)


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and CUDA else "cpu"


def hydragen_with(backend: str, **options: bool) -> Implementation:
    """``hydragen.attention`` on packed keys and values."""
    return functools.partial(_implementation, backend=backend, options=options)


def _implementation(problem: Problem, inputs: Inputs, backend: str, options: dict[str, bool]) -> Any:
    # Small problems go in one launch without sharing. Half of them do not, or little else would be tested.
    shared = (problem.total_kv + problem.total_q) % 2 == 0
    with mock.patch("hydragen.work.is_small", return_value=False) if shared else nullcontext():
        return attend(problem, inputs.to(device_of(backend)), backend=backend, **options)


def backends() -> list[Any]:
    """Names of the backends that run here, as parameters of a test."""
    names: list[Any] = ["reference"]
    if INTERPRETED or CUDA:
        names.append(pytest.param("triton", marks=pytest.mark.triton))
    return names


def ours() -> list[Subject]:
    """A subject for each of them."""
    can = capabilities()
    found = [Subject("reference", hydragen_with("reference"), can)]
    if INTERPRETED or CUDA:
        found.append(Subject("triton", hydragen_with("triton"), can, (pytest.mark.triton,)))
    return found
