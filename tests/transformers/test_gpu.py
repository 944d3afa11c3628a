"""On a GPU: the same tokens as on a CPU, decode steps as CUDA graphs, memory that is bounded."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from models import FAMILIES, VOCABULARY, make_model
from test_generate import QUESTIONS, SYSTEM

import hydragen
from hydragen.transformers import PrefixCache, stream
from hydragen.transformers.decode import Step

pytestmark = pytest.mark.gpu
# Their experts ask the host how many tokens each has: no graph can hold that.
ON_THE_HOST = ["jetmoe"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Every decode step that is made."""
    made: list[Step] = []
    begin = Step.__init__

    def noted(self: Step, *args: Any) -> None:
        begin(self, *args)
        made.append(self)

    monkeypatch.setattr(Step, "__init__", noted)
    return made


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ON_THE_HOST])
def test_a_gpu_gives_the_tokens_of_a_cpu(family: str, steps: list[Step]) -> None:
    there, here = make_model(family).cuda(), make_model(family)
    options: dict[str, Any] = {"max_new_tokens": 12, "min_shared": 4, "logprobs": True}
    got = hydragen.generate(there, SYSTEM, QUESTIONS, **options)
    expected = hydragen.generate(here, SYSTEM, QUESTIONS, **options)
    assert [one.token_ids for one in got] == [one.token_ids for one in expected]
    for a, b in zip(got, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)
    assert any(step.graph is not None for step in steps)


@pytest.mark.parametrize("family", ON_THE_HOST)
def test_what_no_graph_can_hold_is_told_and_goes_on(family: str, steps: list[Step]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "min_shared": 4}
    with pytest.warns(UserWarning, match="cannot be captured in a CUDA graph"):
        got = hydragen.generate(make_model(family).cuda(), SYSTEM, QUESTIONS, **options)
    expected = hydragen.generate(make_model(family), SYSTEM, QUESTIONS, **options)
    assert [one.token_ids for one in got] == [one.token_ids for one in expected]
    assert all(step.graph is None for step in steps)


def test_rows_that_finish_are_dropped_under_graphs(steps: list[Step]) -> None:
    there = make_model("mistral").cuda()
    free = hydragen.generate(there, SYSTEM, QUESTIONS, max_new_tokens=60)
    stop = free[0].token_ids[20]
    out = hydragen.generate(there, SYSTEM, QUESTIONS, max_new_tokens=60, stop_token_ids=[stop])
    for one, whole in zip(out, free, strict=True):
        ids = whole.token_ids
        assert one.token_ids == (ids[: ids.index(stop) + 1] if stop in ids else ids)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_experts_in_bfloat16_are_captured_as_they_are(family: str, steps: list[Step]) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("before sm_90 torch multiplies experts on the host's word in every dtype")
    there = make_model(family).to("cuda", torch.bfloat16)
    hydragen.generate(there, SYSTEM, QUESTIONS, max_new_tokens=6)
    assert any(step.graph is not None for step in steps)
    assert not any(step.batched_experts for step in steps)


def test_seeds_decide_under_graphs() -> None:
    there = make_model("llama").cuda()
    options: dict[str, Any] = {"num_return_sequences": 40, "do_sample": True, "max_new_tokens": 20, "seed": 5}
    whole = hydragen.generate(there, SYSTEM, **options)
    assert whole == hydragen.generate(there, SYSTEM, **options)
    assert len({tuple(one.token_ids) for one in whole}) > 30


def test_a_conversation_under_graphs() -> None:
    there, here = make_model("llama").cuda(), make_model("llama")
    answers = []
    for model in (there, here):
        users = PrefixCache(model).prefill(SYSTEM).fork(3)
        turns = [users.generate(QUESTIONS[:3], max_new_tokens=[4, 20, 7]) for _ in range(3)]
        answers.append([one.token_ids for turn in turns for one in turn])
    assert answers[0] == answers[1]


def test_memory_of_many_batches_is_that_of_one() -> None:
    there = make_model("llama").cuda()
    prefix = PrefixCache(there).prefill(list(range(2, VOCABULARY)) * 2)
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "batch_size": 500, "seed": 0}
    peaks = []
    gc.disable()  # which knows nothing of a device's memory
    try:
        for count in (1_000, 10_000):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            made = sum(1 for _ in stream(prefix, num_return_sequences=count, **options))
            assert made == count
            peaks.append(torch.cuda.max_memory_allocated() - before)
    finally:
        gc.enable()
    assert peaks[1] <= 1.1 * peaks[0]
