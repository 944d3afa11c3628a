"""hydragen.generate and PrefixCache.generate: what is given for options and prompts, by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conversations import QUESTIONS, SYSTEM, greedy
from models import make_model
from transformers import AutoConfig, AutoModelForCausalLM, BatchEncoding, PreTrainedModel

import hydragen
from hydragen.transformers import PrefixCache, model_files, stream


@pytest.fixture
def ours() -> PreTrainedModel:
    return make_model("llama")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": True}, TypeError, "seed must be an integer"),
        ({"seed": 2**70}, ValueError, "seed must fit in 64 bits"),
        ({"temperature": "1", "do_sample": True}, TypeError, "temperature must be a number, got '1'"),
        ({"temperature": True, "do_sample": True}, TypeError, "temperature must be a number, got True"),
        ({"top_p": "0.5", "do_sample": True}, TypeError, "top_p must be a number"),
        ({"do_sample": "no"}, TypeError, "do_sample must be True or False, got 'no'"),
        ({"tokenizer": "x"}, TypeError, "tokenizer must be a transformers tokenizer, got str"),
    ],
    ids=str,
)
def test_options_by_name(
    ours: PreTrainedModel, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hydragen.generate(ours, SYSTEM, max_new_tokens=2, **options)
    cache = PrefixCache(ours).prefill(SYSTEM)
    with pytest.raises(error, match=message):
        cache.generate([[5]], max_new_tokens=2, **options)
    assert cache.lengths.tolist() == [20]


def test_what_a_tokenizer_returns_and_no_system_prompt(ours: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match="got BatchEncoding; pass its input_ids"):
        hydragen.generate(ours, BatchEncoding({"input_ids": [SYSTEM]}), max_new_tokens=2)
    found = hydragen.generate(ours, [], QUESTIONS, max_new_tokens=3)
    assert [one.token_ids for one in found] == [greedy(ours, question, 3) for question in QUESTIONS]


def test_numpy_numbers_are_numbers(ours: PreTrainedModel) -> None:
    options = {"do_sample": True, "max_new_tokens": 3}
    first, second = (hydragen.generate(ours, SYSTEM, seed=seed, **options) for seed in (np.int64(3), 3))
    assert first == second
    assert PrefixCache(ours).prefill(SYSTEM).fork(np.int64(2)).num_rows == 2


def test_seeds_may_change_while_answers_are_drawn(ours: PreTrainedModel) -> None:
    seeds = np.arange(4)
    options = {"do_sample": True, "max_new_tokens": 3, "num_return_sequences": 4, "batch_size": 1}
    expected = [one.seed for one in hydragen.generate(ours, SYSTEM, seed=seeds, **options)]
    found = []
    for one in stream(ours, SYSTEM, seed=seeds, **options):
        seeds[:] = 77
        found.append(one.seed)
    assert sorted(found) == expected == [0, 1, 2, 3]


def test_what_a_generation_config_asks_for_is_not_dropped_in_silence(ours: PreTrainedModel) -> None:
    ours.generation_config.repetition_penalty = 1.2
    ours.generation_config.suppress_tokens = [5]
    with pytest.warns(UserWarning, match=r"repetition_penalty=1\.2, suppress_tokens=\[5\], which hydragen"):
        hydragen.generate(ours, SYSTEM, max_new_tokens=2)
    with pytest.warns(UserWarning, match="generation_config asks for"):
        PrefixCache(ours).prefill(SYSTEM).generate(max_new_tokens=2)


def test_a_model_with_attention_of_its_own_is_named(tmp_path: Any) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must call its attention through transformers' AttentionInterface"):
        model_files.load(str(tmp_path), "float32", "cpu")


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama"])
def test_a_mask_that_is_added_on_the_ordinary_path(family: str) -> None:
    model, ids = make_model(family), torch.tensor([SYSTEM])
    allowed = torch.ones(20, 20, dtype=torch.bool).tril()
    allowed[:, 3] = False
    allowed[3, 3] = True
    added = torch.zeros(1, 1, 20, 20).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        ours = model(ids, attention_mask=added).logits
        model.set_attn_implementation("eager")
        assert torch.allclose(ours, model(ids, attention_mask=added).logits, atol=1e-4)
