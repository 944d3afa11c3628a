"""Threads that use one cache, a model that computes in another dtype meanwhile, and what else is told."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from conversations import QUESTIONS, SYSTEM
from models import make_model
from transformers import PreTrainedModel

import hydragen
from hydragen.transformers import PrefixCache


@pytest.fixture
def ours() -> PreTrainedModel:
    return make_model("llama")


def answers(cache: PrefixCache, question: list[int]) -> list[list[int]]:
    return [answer.token_ids for answer in cache.generate([question] * cache.num_rows, max_new_tokens=4)]


@pytest.mark.parametrize("call", ["generate", "extend", "reset", "prefill", "reorder_cache"])
def test_a_second_thread_is_refused_and_the_first_goes_on(ours: PreTrainedModel, call: str) -> None:
    prefix = PrefixCache(ours).prefill(SYSTEM)
    expected = answers(prefix.fork(), QUESTIONS[0])
    cache, wrong = prefix.fork(), []

    calls: dict[str, Any] = {
        "generate": lambda: cache.generate([[1]], max_new_tokens=1),
        "extend": lambda: cache.extend([1]),
        "reset": cache.reset,
        "prefill": lambda: cache.prefill([1]),
        "reorder_cache": lambda: cache.reorder_cache(torch.tensor([0])),
    }

    def other() -> None:
        try:
            calls[call]()
        except RuntimeError as error:
            wrong.append(error)

    def meanwhile(*_: Any) -> None:
        if not wrong:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    handle = ours.register_forward_pre_hook(meanwhile)
    found = answers(cache, QUESTIONS[0])
    handle.remove()
    assert found == expected
    assert "in use by another thread" in str(wrong[0])
    if call != "prefill":  # which needs an empty cache
        thread = threading.Thread(target=other)  # afterwards it may
        thread.start()
        thread.join()
        assert len(wrong) == 1


def test_a_call_that_failed_lets_other_threads_in(ours: PreTrainedModel) -> None:
    cache = PrefixCache(ours).prefill(SYSTEM)
    with pytest.raises(ValueError, match="max_new_tokens"):
        cache.generate(max_new_tokens=0)
    thread = threading.Thread(target=lambda: cache.extend([3]))
    thread.start()
    thread.join()
    assert cache.lengths.tolist() == [len(SYSTEM) + 1]


@pytest.mark.parametrize("already", [0, 3])
def test_another_dtype_is_refused_and_changes_nothing(ours: PreTrainedModel, already: int) -> None:
    prefix = PrefixCache(ours).prefill(SYSTEM)
    cache, same = prefix.fork(2), prefix.fork(2)
    for one in (cache, same):
        one.extend([QUESTIONS[0][:already]] * 2)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"dtype that the cache holds, torch.float32, got torch.bfloat16"),
    ):
        cache.generate([[1], [2]], max_new_tokens=2)
    assert answers(cache, QUESTIONS[1]) == answers(same, QUESTIONS[1])


def test_a_mask_of_four_dimensions_is_refused(ours: PreTrainedModel) -> None:
    ids = torch.tensor([SYSTEM + QUESTIONS[0]])
    cache = PrefixCache(ours).prefill(SYSTEM).fork()
    new = ids[:, len(SYSTEM) :]
    mask = torch.zeros(1, 1, new.shape[1], ids.shape[1])
    with pytest.raises(ValueError, match=r"attention_mask must be \[rows, tokens\] over a PrefixCache"):
        ours(new, attention_mask=mask, past_key_values=cache)


def test_texts_as_tokens_are_told(ours: PreTrainedModel) -> None:
    cache = PrefixCache(ours).prefill(SYSTEM)
    for text in ("hi", ["hi"]):
        with pytest.raises(TypeError, match=r"tokenizer\(texts?\)\.input_ids"):
            cache.extend(text)


@pytest.mark.parametrize(("name", "value"), [("max_time", 3.0), ("renormalize_logits", True)])
def test_what_a_generation_config_asks_for_is_told(ours: PreTrainedModel, name: str, value: object) -> None:
    setattr(ours.generation_config, name, value)
    with pytest.warns(UserWarning, match=f"asks for {name}="):
        hydragen.generate(ours, SYSTEM, max_new_tokens=1)


def test_a_seed_in_a_list_draws_an_answer_again(ours: PreTrainedModel) -> None:
    how: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8}
    first, second = hydragen.generate(ours, SYSTEM, num_return_sequences=2, seed=3, **how)
    (again,) = hydragen.generate(ours, SYSTEM, seed=[second.seed], **how)
    assert again.token_ids == second.token_ids != first.token_ids
