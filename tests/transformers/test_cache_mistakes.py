"""PrefixCache: mistakes are told, models that cannot work are refused."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conversations import QUESTIONS, SYSTEM, greedy, tokens
from models import VOCABULARY, make_model
from same_tokens import left_padded
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import hydragen
from hydragen.transformers import PrefixCache, attention

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def ours() -> PreTrainedModel:
    return make_model("llama")


# Mistakes


def test_an_ordinary_cache_takes_the_ordinary_path_and_warns_once(
    ours: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = greedy(ours, SYSTEM, 4)
    monkeypatch.setattr(attention, "_WARNED", False)
    ids = torch.tensor([SYSTEM])
    with pytest.warns(UserWarning, match="goes on from an ordinary cache") as caught:
        out = ours.generate(ids, past_key_values=DynamicCache(config=ours.config), max_new_tokens=4)
    assert len(caught) == 1
    assert out[0, len(SYSTEM) :].tolist() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.generate(ids, max_new_tokens=4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_another_attention_over_a_prefix_cache_fails_loudly(family: str, implementation: str) -> None:
    model = make_model(family)
    cache = PrefixCache(model).prefill(SYSTEM).fork()
    model.set_attn_implementation(implementation)
    with pytest.raises((AttributeError, ValueError), match='attn_implementation="hydragen"'):
        model.generate(torch.tensor([SYSTEM + [5]]), past_key_values=cache, max_new_tokens=3)


def test_a_fork_that_does_not_match_num_beams(ours: PreTrainedModel) -> None:
    ids, mask = left_padded([SYSTEM + question for question in QUESTIONS])
    cache = PrefixCache(ours).prefill(SYSTEM).fork(3)
    with pytest.raises(ValueError, match=r"a row per sequence of the batch, 6, got 3; fork it"):
        ours.generate(ids, attention_mask=mask, past_key_values=cache, num_beams=2, max_new_tokens=2)


def test_a_reused_cache(ours: PreTrainedModel) -> None:
    ids, mask = left_padded([SYSTEM + question for question in QUESTIONS])
    cache = PrefixCache(ours).prefill(SYSTEM).fork(3)
    ours.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5)
    with pytest.raises(ValueError, match=r"none for row|positions of row"):
        ours.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5)


def test_a_prompt_that_is_cached_to_its_end(ours: PreTrainedModel) -> None:
    cache = PrefixCache(ours).prefill(SYSTEM).fork()
    with pytest.raises(ValueError, match="at least one new token for every row, got none for row 0"):
        ours(torch.tensor([SYSTEM[-1:]]), position_ids=torch.tensor([[19]]), past_key_values=cache)


def test_other_prompts_than_the_cached_ones(ours: PreTrainedModel) -> None:
    """Rows of another length than their prompt's go on at the wrong position."""
    cache = PrefixCache(ours).prefill([SYSTEM, SYSTEM[:8]]).fork()
    ids, mask = left_padded([SYSTEM[:8] + QUESTIONS[1], SYSTEM + QUESTIONS[1]])
    with pytest.raises(ValueError, match="none for row 0"):
        ours.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)


def test_padding_on_the_right(ours: PreTrainedModel) -> None:
    ids = torch.tensor([[5, 6, 0], [5, 6, 7]])
    with pytest.raises(ValueError, match="padded on the left"):
        ours(ids, attention_mask=(ids != 0).long(), past_key_values=PrefixCache(ours))


LIMIT = 256
MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty prompt": ([[1, 2], []], {}, r"prompts\[1\] must hold a token or more, got an empty prompt"),
    "no prompt": ([], {}, "must hold a token or more|must hold a prompt or more"),
    "too long": (tokens(LIMIT - 3), {"max_new_tokens": 8}, r"max_new_tokens=8 in the model's 256 positions"),
    "other vocabulary": ([1, VOCABULARY], {}, r"vocabulary, 0 to 96, got 1 to 97"),
    "negative id": ([1, -1], {}, "vocabulary"),
    "text without tokenizer": ("text", {}, "tokenizer must be given for texts"),
    "greedy copies": ([1], {"num_return_sequences": 2}, "do_sample=True"),
    "seeds": ([1], {"seed": [1, 2]}, r"seed must be an int, or 1 of them, one per sequence, got 2"),
    "no new tokens": ([1], {"max_new_tokens": 0}, "max_new_tokens"),
    "no batch": ([1], {"batch_size": 0}, "batch_size"),
    "float": ([1.5], {}, "integers|token ids"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_before_anything_is_computed(case: str, ours: PreTrainedModel) -> None:
    prompts, options, message = MISTAKES[case]
    hook = ours.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    try:
        with pytest.raises((ValueError, TypeError), match=message):
            hydragen.generate(ours, prompts, **{"max_new_tokens": 4, **options})
    finally:
        hook.remove()


def test_levels_that_do_not_fit(ours: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"continuations\[1\] must hold one list .* each of the 2 paths"):
        hydragen.generate(ours, [1], [[2], [3]], [[4], [5]])
    with pytest.raises(ValueError, match="a kept prefix must be one row, got a PrefixCache of 2"):
        hydragen.generate(PrefixCache(ours).prefill([1]).fork(2), [3])


def test_a_cache_used_in_the_wrong_order(ours: PreTrainedModel) -> None:
    cache = PrefixCache(ours)
    with pytest.raises(ValueError, match="prefill a prompt before you fork"):
        cache.fork(2)
    with pytest.raises(ValueError, match="prefill a prompt first"):
        cache.generate()
    cache.prefill([1, 2])
    with pytest.raises(ValueError, match="needs an empty cache, got one with 1 rows"):
        cache.prefill([1, 2])
    with pytest.raises(ValueError, match="one list of tokens per row, 1, got 2"):
        cache.extend([[1], [2]])
    with pytest.raises(ValueError, match="n must be a positive int"):
        cache.fork(0)
    with pytest.raises(ValueError, match=r"fit the model's 256 positions, got 302"):
        cache.extend(tokens(300))
    with pytest.raises(NotImplementedError, match="takes no tokens back"):
        cache.crop(-1)
    ours(torch.tensor([[3]]), position_ids=torch.tensor([[2]]), past_key_values=cache)
    with pytest.raises(ValueError, match=r"row \[0\] must have just been extended"):
        cache.last_logits(np.arange(1))


# Models that cannot work


def test_models_are_refused_with_the_reason(ours: PreTrainedModel) -> None:
    ours.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r'must have attn_implementation="hydragen", got .sdpa.'):
        PrefixCache(ours)
    with pytest.raises(TypeError, match="must be a transformers causal LM, got Linear"):
        hydragen.generate(torch.nn.Linear(2, 2), [1])
    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {**small, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
    encoder = AutoModel.from_config(
        AutoConfig.for_model("t5", vocab_size=97, d_model=32, d_kv=8, num_layers=1)
    )
    with pytest.raises(ValueError, match="must be a decoder that generates"):
        PrefixCache(encoder)
    built_in = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **small, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match=r"AttentionInterface, got BloomForCausalLM"):
        PrefixCache(built_in)
    linear = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "qwen3_next", **sizes, layer_types=["linear_attention", "full_attention"], num_experts=4
        )
    )
    with pytest.raises(ValueError, match=r"with linear_attention, whose state is no list of tokens"):
        PrefixCache(linear)
    chunked = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama4_text", **sizes, head_dim=8, attention_chunk_size=16, num_local_experts=2)
    )
    with pytest.raises(ValueError, match="chunked_attention"):
        PrefixCache(chunked)


def test_layers_in_other_processes_are_refused(
    ours: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours.config, "distributed_config", SimpleNamespace(pp_size=2), raising=False)
    with pytest.raises(ValueError, match="model must have all its layers in every process, got pp_size=2"):
        PrefixCache(ours)


def test_attention_weights_and_dropout_are_refused(ours: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="output_attentions must be False"):
        ours(torch.tensor([[1, 2]]), output_attentions=True)
    ours.config.attention_dropout = 0.5
    for layer in ours.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ours.train()
    with pytest.raises(ValueError, match=r"dropout must be 0 over a PrefixCache, got 0.5; call model.eval"):
        ours(torch.tensor([[1, 2]]), past_key_values=PrefixCache(ours))


# Import


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


def test_importing_hydragen_leaves_transformers_alone_until_generate_is_asked_for() -> None:
    code = """
import sys, hydragen
assert "transformers" not in sys.modules
assert hydragen.generate.__module__ == "hydragen.transformers.generate"
from transformers import AttentionInterface
assert "hydragen" in AttentionInterface().valid_keys()
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_without_transformers_the_error_says_what_to_install() -> None:
    code = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "transformers" else found(name, *rest)
import hydragen
try:
    hydragen.generate
except ImportError as error:
    assert "pip install '.[transformers]'" in str(error)
else:
    raise SystemExit("no error")
try:
    hydragen.nothing
except AttributeError:
    pass
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
