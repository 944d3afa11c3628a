"""Implementations that are wrong only beyond the usual sizes, or cheat, are caught too."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from faulty_attention import attention
from hypothesis import HealthCheck, Phase, given, settings

from hydragen.testing import Inputs, Problem, laws, transforms
from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.conformance.subject import adapt

PROBLEM = Problem((-1, 0, 0), (20, 3, 5), (1, 2, 2), (1, 3, 2), 4, 2, causal=True, sharpness="peaked")
State = tuple[torch.Tensor, torch.Tensor]


def wrong_if(condition: Callable[[Problem], bool]) -> Callable[[Problem, Inputs], State]:
    def implementation(problem: Problem, inputs: Inputs) -> State:
        out, lse = attention(problem, inputs)
        if condition(problem):
            out[-1, -1] += 0.5
        return out, lse

    return implementation


@pytest.mark.parametrize("shared", [False, True])
def test_copies(shared: bool) -> None:
    problem, inputs = transforms.repeat(PROBLEM, PROBLEM.tensors(), 3, shared=shared)
    assert (problem.num_rows, problem.num_nodes) == (9, 3 if shared else 9)
    assert (problem.total_q, problem.total_kv) == (len(inputs.q), len(inputs.k))
    laws.matches_oracle(attention, problem)
    laws.copies_change_nothing(attention, PROBLEM, 7, shared=shared)
    with pytest.raises(ValueError, match="copies must be at least 1, got 0"):
        transforms.repeat(PROBLEM, PROBLEM.tensors(), 0, shared=shared)


@pytest.mark.parametrize("shared", [False, True])
def test_wrong_in_large_batches(shared: bool) -> None:
    wrong = wrong_if(lambda problem: problem.num_rows > 16)
    laws.matches_oracle(wrong, PROBLEM)
    laws.copies_change_nothing(wrong, PROBLEM, 5, shared=shared)
    with pytest.raises(AssertionError, match="6 copies of all rows"):
        laws.copies_change_nothing(wrong, PROBLEM, 6, shared=shared)
    with pytest.raises(AssertionError, match=r"out\.shape"):
        laws.copies_change_nothing(
            lambda *_: attention(PROBLEM, PROBLEM.tensors()), PROBLEM, 2, shared=shared
        )


def drawn(can: Capabilities) -> list[Problem]:
    found: list[Problem] = []

    @settings(
        max_examples=60,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(can.large_problems())
    def collect(problem: Problem) -> None:
        found.append(problem)

    collect()
    return found


def test_large_problems_are_large() -> None:
    for condition in (
        lambda problem: max(problem.path_len(row) for row in range(problem.num_rows)) > 512,
        lambda problem: max(problem.q_lens) > 16,
        lambda problem: problem.num_kv_heads > 2,
    ):
        assert any(condition(problem) for problem in drawn(Capabilities()))


def test_limits_that_are_set_are_kept() -> None:
    can = Capabilities(max_kv=40, max_q_len=3, max_kv_heads=4, same_q_len=True)
    for problem in drawn(can):
        assert max(problem.kv_lens) <= 40
        assert max(problem.q_lens) <= 3
        assert problem.num_kv_heads <= 4
    for problem in drawn(replace(can, max_q_len=Capabilities.max_q_len)):
        assert len(set(problem.q_lens)) == 1
        assert can.allows(problem)


def test_what_is_modified_on_another_device_is_seen() -> None:
    """The suite's own tensors are on the CPU: those that a function is lent elsewhere are copies."""

    class Elsewhere(Inputs):
        def to(self, device: torch.device | str) -> Inputs:
            return self.clone()

    def modifies(problem: Problem, inputs: Inputs) -> State:
        state = attention(problem, inputs)
        inputs.k.mul_(2)
        return state

    given = PROBLEM.tensors()
    elsewhere = Elsewhere(given.q, given.k, given.v, given.cu_seqlens_q, given.cu_seqlens_k)
    with pytest.raises(AssertionError, match="k was modified by the implementation"):
        adapt(modifies, Capabilities())(PROBLEM, elsewhere)
    adapt(attention, Capabilities())(PROBLEM, elsewhere)
