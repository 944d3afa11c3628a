"""PrefixCache: what would have been wrong in silence is right, or refused by name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from conversations import QUESTIONS, SYSTEM, greedy, tokens
from models import SMALL, make_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hydragen
from hydragen.transformers import PrefixCache

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def ours() -> PreTrainedModel:
    return make_model("llama")


def answers(cache: PrefixCache, questions: list[list[int]], new: int = 4) -> list[list[int]]:
    return [one.token_ids for one in cache.generate(questions, max_new_tokens=new)]


# Models in training


def test_gradient_checkpoints_take_no_cache(ours: PreTrainedModel) -> None:
    ours.gradient_checkpointing_enable()
    cache = PrefixCache(ours).prefill(SYSTEM)  # harmless while nothing is trained
    expected = greedy(ours, SYSTEM, 3)
    assert answers(cache.fork(), [[]], 3) == [expected]
    ours.train()
    for run in (
        lambda: PrefixCache(ours).prefill(SYSTEM),
        cache.fork,
        lambda: hydragen.generate(ours, SYSTEM, max_new_tokens=2),
        lambda: ours.generate(torch.tensor([SYSTEM + [5]]), past_key_values=cache, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=r"must not checkpoint gradients .* call model\.eval\(\)"):
            run()


def test_values_that_are_dropped_out_are_no_answer() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_head=4, n_layer=2, vocab_size=97, attn_pdrop=0.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="hydragen", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"must not drop values out .* with p=0\.1 in training mode"):
        hydragen.generate(model.train(), SYSTEM, max_new_tokens=2)
    assert len(hydragen.generate(model.eval(), SYSTEM, max_new_tokens=2, stop_token_ids=[])) == 1


def test_a_model_in_training_mode_that_drops_nothing_is_right(ours: PreTrainedModel) -> None:
    expected = greedy(ours, SYSTEM, 4)
    assert hydragen.generate(ours.train(), SYSTEM, max_new_tokens=4)[0].token_ids == expected


# Rows that change places


def test_rows_of_unlike_length_may_not_change_places_but_branch(ours: PreTrainedModel) -> None:
    short, long = SYSTEM[:12], tokens(20, 7)
    cache = PrefixCache(ours).prefill([short, long])
    with pytest.raises(ValueError, match=r"must not give row 0, with room for 12 .* the 20 of row 1"):
        cache.reorder_cache(torch.tensor([1, 0]))
    branched = cache.branch([1, 0])
    assert answers(branched, [[], []]) == [greedy(ours, long, 4), greedy(ours, short, 4)]
    cache.reorder_cache(torch.tensor([0, 1]))
    assert answers(cache, [[], []]) == [greedy(ours, short, 4), greedy(ours, long, 4)]


@pytest.mark.parametrize("order", [[0], [0, 2], [0, -1], [0, 1, 1]])
def test_an_order_must_be_one_of_rows(ours: PreTrainedModel, order: list[int]) -> None:
    cache = PrefixCache(ours).prefill([SYSTEM, SYSTEM[:-1] + [3]])
    with pytest.raises(ValueError, match=r"beam_idx must hold a row of the cache, 0 to 1, for each of its 2"):
        cache.reorder_cache(torch.tensor(order))


def test_reset_brings_the_order_back(ours: PreTrainedModel) -> None:
    first, second = SYSTEM, tokens(20, 8)
    cache = PrefixCache(ours).prefill([first, second]).fork()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert answers(cache, [[], []]) == [greedy(ours, second, 4), greedy(ours, first, 4)]
    cache.reset()
    assert answers(cache, [[], []]) == [greedy(ours, first, 4), greedy(ours, second, 4)]


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_branch_keeps_nothing_of_the_callers(ours: PreTrainedModel, kind: str) -> None:
    first, second = SYSTEM, tokens(20, 8)
    cache = PrefixCache(ours).prefill([first, second])
    rows: Any = np.array([1, 0]) if kind == "array" else torch.tensor([1, 0])
    branched = cache.branch(rows)
    rows[:] = 1
    assert answers(branched, [[], []]) == [greedy(ours, second, 4), greedy(ours, first, 4)]


# Passes that broke off, or that were not the cache's own


def test_nothing_goes_on_from_a_cache_whose_pass_broke_off(
    ours: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PrefixCache(ours).prefill(SYSTEM)
    cache.extend([[5, 6, 7]])  # the tail has room for more
    with monkeypatch.context() as patched:
        patched.setattr(ours.model.layers[1], "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ours(torch.tensor([[8]]), past_key_values=cache)
    for run in (
        lambda: cache.extend([[9]]),
        lambda: cache.generate([[9]], max_new_tokens=1),
        cache.fork,
        lambda: cache.branch([0]),
        lambda: hydragen.generate(cache, [[9]], max_new_tokens=1),
        lambda: cache.reorder_cache(torch.tensor([0])),
    ):
        with pytest.raises(RuntimeError, match="broke off halfway"):
            run()
    cache.reset()
    assert answers(cache.prefill(SYSTEM), [[]]) == [greedy(ours, SYSTEM, 4)]


def test_rows_that_the_model_filled_itself_can_be_used(ours: PreTrainedModel) -> None:
    cache = PrefixCache(ours)
    with torch.no_grad():
        ours(torch.tensor([SYSTEM, SYSTEM[:-1] + [3]]), past_key_values=cache, use_cache=True)
    assert cache.next_positions.tolist() == [20, 20]
    with pytest.raises(ValueError, match="must have just been extended"):
        cache.last_logits(np.array([0, 1]))
    expected = [greedy(ours, SYSTEM + [7], 4), greedy(ours, SYSTEM[:-1] + [3, 8], 4)]
    assert answers(cache.fork(), [[7], [8]]) == expected
    assert answers(cache, [[7], [8]]) == expected


def test_beam_search_over_an_empty_cache(ours: PreTrainedModel) -> None:
    ids = torch.tensor([SYSTEM])
    options = {"num_beams": 3, "max_new_tokens": 5, "attention_mask": torch.ones_like(ids)}
    ours.set_attn_implementation("eager")
    expected = ours.generate(ids, **options)
    ours.set_attn_implementation("hydragen")
    # three rows for one prompt: transformers repeats it before its first step
    assert torch.equal(ours.generate(ids, past_key_values=PrefixCache(ours), **options), expected)


# Masks


def test_what_a_cache_holds_cannot_be_masked(ours: PreTrainedModel) -> None:
    cache = PrefixCache(ours).prefill(SYSTEM)
    ids = torch.tensor([SYSTEM + [5, 6]])
    mask = torch.ones_like(ids)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match=r"must be 1 for all 20 tokens that .* of row 0 .* left out"):
        ours.generate(ids, attention_mask=mask, past_key_values=cache.fork(), max_new_tokens=3)
    fork = cache.fork()
    positions = torch.arange(20, 22)[None]
    with pytest.raises(ValueError, match=r"must be 1 for all 20 tokens that .* of row 0 .* left out"):
        ours(ids[:, 20:], attention_mask=mask, position_ids=positions, past_key_values=fork)


def test_a_step_of_one_token_has_no_padding(ours: PreTrainedModel) -> None:
    cache = PrefixCache(ours).prefill([SYSTEM, SYSTEM]).fork()
    mask, step = torch.ones(2, 21, dtype=torch.int64), torch.tensor([[5], [6]])
    with torch.no_grad():
        ours(step, attention_mask=mask, position_ids=torch.full((2, 1), 20), past_key_values=cache)
        mask = torch.cat([mask, torch.tensor([[1], [0]])], 1)
        with pytest.raises(ValueError, match="must be 1 for a step's new tokens, got 0"):
            ours(step, attention_mask=mask, position_ids=torch.full((2, 1), 21), past_key_values=cache)


# Models


def test_a_cache_is_of_one_model(ours: PreTrainedModel) -> None:
    other = make_model("llama", seed=1)
    cache = PrefixCache(ours).prefill(SYSTEM)
    with pytest.raises(ValueError, match="must be used with the model that it was made for, got a LlamaAtt"):
        other.generate(torch.tensor([SYSTEM + [5]]), past_key_values=cache.fork(), max_new_tokens=2)


def test_weights_are_noted_by_whoever_fills_a_cache(ours: PreTrainedModel) -> None:
    cache = PrefixCache(ours)
    ids = torch.tensor([SYSTEM])
    ours.generate(ids, past_key_values=cache, max_new_tokens=2)
    with torch.no_grad():
        ours.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="weights changed since"):
        ours.generate(torch.tensor([SYSTEM + [5, 6, 7, 8]]), past_key_values=cache, max_new_tokens=2)


def test_longrope_ends_where_it_turns_what_is_stored() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 8.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    config = AutoConfig.for_model("phi3", **SMALL, original_max_position_embeddings=32, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="hydragen", dtype=torch.float32
    ).eval()
    assert hydragen.generate(model, SYSTEM, [[5] * 4], max_new_tokens=4)[0].token_ids == greedy(
        model, SYSTEM + [5] * 4, 4
    )
    with pytest.raises(ValueError, match=r"model's 32 positions \(longrope: beyond, it turns all tokens"):
        hydragen.generate(model, SYSTEM, [[5] * 14], max_new_tokens=4)
    cache, longer = PrefixCache(model).prefill(SYSTEM), torch.tensor([SYSTEM + [5] * 14])
    positions = torch.arange(20, 34)[None]
    with pytest.raises(ValueError, match=r"within 32 positions, got 34: .*rope_type longrope or dynamic"):
        model(longer[:, 20:], position_ids=positions, past_key_values=cache.fork())
    with pytest.raises(ValueError, match="generate leaves a kept cache out once"):
        model.generate(longer, past_key_values=cache, max_new_tokens=4)


def test_an_encoder_that_is_loaded_as_a_decoder_is_refused() -> None:
    config = AutoConfig.for_model("bert", hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="hydragen")
    with pytest.raises(ValueError, match="model must be causal, got BertLMHeadModel with bidirectional"):
        PrefixCache(model)
    config.is_decoder = True
    PrefixCache(AutoModelForCausalLM.from_config(config, attn_implementation="hydragen"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3"])
def test_a_compiled_model_goes_over_a_cache(family: str) -> None:
    model = make_model(family)
    expected = [greedy(model, SYSTEM + question, 3) for question in QUESTIONS]
    model.compile(backend="eager")
    found = hydragen.generate(model, SYSTEM, QUESTIONS, max_new_tokens=3)
    assert [one.token_ids for one in found] == expected


def test_a_compiled_model_under_a_default_device() -> None:
    """Which torch keeps by a mode that torch.compile takes along into whatever it follows."""
    torch.set_default_device("cpu")
    try:
        test_a_compiled_model_goes_over_a_cache("llama")
    finally:
        torch.set_default_device(None)


def test_autocast(ours: PreTrainedModel) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shared = hydragen.generate(ours, SYSTEM, [[], [7]], max_new_tokens=3, logprobs=True)
        alone = hydragen.generate(ours, SYSTEM + [7], max_new_tokens=3, logprobs=True)[0]
    assert shared[1].logprobs == pytest.approx(alone.logprobs, abs=0.2)


def test_a_config_that_returns_tuples(ours: PreTrainedModel) -> None:
    ours.config.return_dict = False
    with pytest.raises(ValueError, match="return_dict must be True, got False"):
        hydragen.generate(ours, SYSTEM, max_new_tokens=3)


# Copies


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_copy_goes_on_apart(ours: PreTrainedModel, copied: Any) -> None:
    cache = PrefixCache(ours).prefill(SYSTEM)
    ids = torch.tensor([SYSTEM + QUESTIONS[0]])
    for _ in range(2):  # transformers' own recipe for a prompt that is kept
        out = ours.generate(ids, past_key_values=copied(cache), max_new_tokens=3)
        assert out[0, ids.shape[1] :].tolist() == greedy(ours, SYSTEM + QUESTIONS[0], 3)
    assert cache.lengths.tolist() == [20]
    assert copied(PrefixCache(ours)).num_rows == 0
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(cache)
