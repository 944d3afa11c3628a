"""What is held to the laws: hydragen with each backend that runs here, or what a user names.

TRITON_INTERPRET must be set before Triton is imported, so one run of pytest has the Triton backend either in
the interpreter, on a GPU, or not at all.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import reject
from hypothesis import strategies as st

import hydragen
from hydragen.testing import Implementation, Inputs, Problem, View, strategies

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED

# The interpreter is slow; on a GPU every head_dim, dtype and option is another kernel to compile.
INTERPRETER_LIMITS: dict[str, Any] = {
    "head_dims": (16, 5, 33, 64),
    "group_sizes": (1, 3, 4, 8),
    "max_nodes": 5,
    "max_rows": 6,
    "max_q_len": 4,
    "max_kv": 70,
}
GPU_LIMITS: dict[str, Any] = {"head_dims": (64, 128, 33, 1, 256), "max_kv": 600}


@dataclass(frozen=True)
class Subject:
    """An implementation under test, and the limits within which it is tested (arguments of ``problems``)."""

    name: str
    implementation: Implementation
    limits: dict[str, Any] = field(default_factory=dict)
    marks: tuple[pytest.MarkDecorator, ...] = ()


def attend(problem: Problem, inputs: Inputs, view: View, backend: str, **options: bool) -> Any:
    """``hydragen.attention`` on a view of a problem; ``out`` and ``lse`` as ``[total_q, ...]``."""
    state = hydragen.attention(
        view.q,
        view.kv,
        tree=view.tree,
        kv_lens=view.kv_lens,
        cu_seqlens_q=view.cu_seqlens_q,
        scale=problem.scale,
        causal=problem.causal,
        window=problem.window,
        softcap=problem.softcap,
        sinks=inputs.sinks,
        return_lse=True,
        backend=backend,
        **options,
    )
    return view.packed(state.out), view.packed(state.lse)


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and CUDA else "cpu"


def hydragen_with(backend: str, **options: bool) -> Implementation:
    """``hydragen.attention`` on packed keys and values."""

    def implementation(problem: Problem, inputs: Inputs) -> Any:
        there = inputs.to(device_of(backend))
        return attend(problem, there, problem.as_packed(there), backend, **options)

    return implementation


def backends() -> list[Any]:
    """Names of the backends that run here, as parameters of a test."""
    names: list[Any] = ["reference"]
    if INTERPRETED or CUDA:
        names.append(pytest.param("triton", marks=pytest.mark.triton))
    return names


def named(path: str) -> Subject:
    """The subject for ``module:function``, which may carry ``limits``, a dict of arguments of ``problems``.

    What the function raises as NotImplementedError is out of its scope: such examples are left out.
    """
    module, separator, name = path.partition(":")
    if not separator or not module or not name:
        raise pytest.UsageError(f"--implementation must be module:function, got {path!r}")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise pytest.UsageError(f"--implementation {path}: {error}") from error

    def implementation(problem: Problem, inputs: Inputs) -> Any:
        try:
            return function(problem, inputs)
        except NotImplementedError:
            reject()

    return Subject(path, implementation, dict(getattr(function, "limits", {})))


def limits() -> dict[str, Any]:
    """Arguments of ``problems`` that every chosen subject can do."""
    if INTERPRETED:
        return INTERPRETER_LIMITS
    return GPU_LIMITS if CUDA else {}


_chosen: list[Subject] = []


def choose(path: str | None) -> None:
    """Settle what is tested, before the tests are imported."""
    if path is not None:
        _chosen[:] = [named(path)]
        return
    _chosen[:] = [Subject("reference", hydragen_with("reference"), limits())]
    if INTERPRETED or CUDA:
        _chosen.append(Subject("triton", hydragen_with("triton"), limits(), (pytest.mark.triton,)))


def chosen() -> list[Subject]:
    return list(_chosen)


def problems(**restrictions: Any) -> st.SearchStrategy[Problem]:
    """Problems that the subjects can do, restricted further."""
    return strategies.problems(**{**_chosen[0].limits, **restrictions})
