"""The adapters that ship: what they get right, and what docs/conformance.md says that they get wrong."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from hydragen.testing import Problem, assert_within_budget, laws, run
from hydragen.testing.adapters import flashinfer_cascade, flex_attention, original, ours, sdpa
from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.conformance.subject import adapt

some = settings(
    max_examples=20,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
TWO = Problem((-1, 0, 0), (20, 3, 5), (1, 2), (1, 1), 4, 2, 64, 64, dtype=torch.float16)


def holds(function, **changes) -> None:
    can = Capabilities().changed({**function.capabilities, **changes}, "test")
    implementation = adapt(function, can)

    @some
    @given(can.problems(max_kv=70, max_rows=4))
    def law(problem: Problem) -> None:
        laws.matches_oracle(implementation, problem)

    law()


def test_attention_without_sharing() -> None:
    holds(sdpa.attention, dtypes=(torch.float32, torch.bfloat16))


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="inductor of torch 2.11 fails on the GPU's kernel for generated shapes"
)
def test_flex_attention() -> None:
    holds(flex_attention.attention)


def test_the_original_where_no_segment_is_empty() -> None:
    holds(original.attention, empty=False, lse=False)


@pytest.mark.parametrize("function", [ours.attention, ours.reference])
def test_ours(function) -> None:
    holds(function)


@pytest.mark.gpu
def test_flashinfers_cascade() -> None:
    pytest.importorskip("flashinfer")
    holds(flashinfer_cascade.attention, empty=False)


def test_flashinfer_missing_is_said() -> None:
    try:
        import flashinfer  # noqa: F401, PLC0415 - whether it is there
    except ImportError:
        with pytest.raises(ModuleNotFoundError, match="needs the package flashinfer-python"):
            flashinfer_cascade.attention(TWO, TWO.tensors())


@pytest.mark.parametrize("kv_lens", [(0, 0, 0), (20, 0, 5), (0, 3, 5)])
def test_the_original_merges_empty_segments_to_nan(kv_lens) -> None:
    """As on a GPU, where flash attention over no keys returns +inf for the log-sum-exp."""
    problem = replace(TWO, kv_lens=kv_lens)
    out, lse = run(original.attention, problem)
    assert out.isnan().any()
    with pytest.raises(AssertionError, match="outside of the error budget"):
        assert_within_budget(problem, out, lse)
