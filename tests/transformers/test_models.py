"""Every family, through transformers' own generate: our cache against the ordinary one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, VOCABULARY, make_model, watched_entropy
from same_tokens import assert_logits_within_budget, assert_same_tokens, left_padded, oracle_of
from torch import Tensor
from transformers import PreTrainedModel

from hydragen.transformers import PrefixCache
from hydragen.transformers.rows import Rows

NEW = 12
# Far above float32's errors in logits of this size, far below the distance of two random logits.
NEAR = 1e-3
Pair = tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest) -> Pair:
    """The ordinary path and ours, with the same weights."""
    return make_model(request.param, "eager"), make_model(request.param)


def tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(2, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


SYSTEM = tokens(14)
QUESTIONS = [tokens(5, 2), tokens(2, 3), tokens(9, 4)]
PROMPTS = [SYSTEM + question for question in QUESTIONS]


def generate(model: PreTrainedModel, prompts: list[list[int]], cache: Any = None, **options: Any) -> Any:
    ids, mask = left_padded(prompts)
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=NEW,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )


def new_tokens(out: Any, prompts: list[list[int]]) -> Tensor:
    return out.sequences[:, max(map(len, prompts)) :]


def margins(out: Any) -> Tensor:
    """How far the best logit was ahead of the next, [rows, new]."""
    best = torch.stack(out.logits, dim=1).topk(2).values
    return best[..., 0] - best[..., 1]


def same(got: Any, expected: Any, prompts: list[list[int]]) -> int:
    __tracebackhide__ = True
    return assert_same_tokens(
        new_tokens(got, prompts), new_tokens(expected, prompts), margins(expected), NEAR
    )


def shared(model: PreTrainedModel, n: int = 1) -> PrefixCache:
    """SYSTEM stored once, a row per question and answer."""
    return PrefixCache(model).prefill(SYSTEM).fork(len(QUESTIONS) * n)


def test_attention_is_peaked(pair: Pair) -> None:
    """Random weights barely attend; then a wrong fork or position would change nothing."""
    with watched_entropy(pair[0]) as entropy, torch.no_grad():
        pair[0](torch.tensor([PROMPTS[2]]))
    assert entropy.total < 0.5 * entropy.most


def test_logits(pair: Pair) -> None:
    reference, ours = pair
    ids = torch.tensor([PROMPTS[2]])
    rest = torch.arange(len(SYSTEM), ids.shape[1])
    with torch.no_grad():
        exact = oracle_of(reference)(ids).logits
        ordinary = reference(ids).logits
        alone = ours(ids).logits
        cache = shared(ours)
        forked = ours(
            ids[:, rest].expand(3, -1), position_ids=rest[None].expand(3, -1), past_key_values=cache
        ).logits
    assert_logits_within_budget(alone, ordinary, exact)
    assert_logits_within_budget(forked, ordinary[:, rest], exact[:, rest].expand(3, -1, -1))


def test_greedy(pair: Pair, record_property: Callable[[str, object], None]) -> None:
    """Left-padded prompts of three lengths, of which the first 14 tokens are shared."""
    reference, ours = pair
    expected = generate(reference, PROMPTS)
    got = generate(ours, PROMPTS, shared(ours))
    tied = same(got, expected, PROMPTS)
    record_property("rows with a near-tie", tied)
    assert tied <= 1


def test_greedy_without_shared_tokens(pair: Pair) -> None:
    reference, ours = pair
    expected = generate(reference, PROMPTS)
    got = generate(ours, PROMPTS, PrefixCache(ours))
    same(got, expected, PROMPTS)


def test_sampling(pair: Pair) -> None:
    reference, ours = pair
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 20, "num_return_sequences": 3}
    torch.manual_seed(5)
    expected = generate(reference, PROMPTS, **options)
    torch.manual_seed(5)
    got = generate(ours, PROMPTS, shared(ours, 3), **options)
    # A draw near the border of two tokens would differ: none of these seeds has one.
    assert new_tokens(got, PROMPTS).tolist() == new_tokens(expected, PROMPTS).tolist()
    assert len({tuple(row) for row in new_tokens(got, PROMPTS).tolist()}) == 9


def test_beam_search(pair: Pair) -> None:
    reference, ours = pair
    options: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 2}
    expected = generate(reference, PROMPTS, **options)
    got = generate(ours, PROMPTS, shared(ours, 4), **options)
    assert new_tokens(got, PROMPTS).tolist() == new_tokens(expected, PROMPTS).tolist()
    torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, rtol=0, atol=1e-4)


def test_two_levels(pair: Pair) -> None:
    """Questions of three lengths are a level of their own, two rows each."""
    reference, ours = pair
    prompts = [prompt + tokens(3, 7) for prompt in PROMPTS for _ in range(2)]
    prompts[1] += tokens(4, 8)
    expected = generate(reference, prompts)
    cache = PrefixCache(ours).prefill(SYSTEM).fork(3).extend(QUESTIONS).fork(2)
    got = generate(ours, prompts, cache)
    same(got, expected, prompts)


def test_an_off_by_one_fork_is_caught(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the fork takes one token less of the prefix. These models tell."""
    reference, ours = pair
    expected = generate(reference, PROMPTS)
    honest = Rows.kv_lens

    def one_short(self: Rows) -> list[Any]:
        lens = honest(self)
        return [lens[0] - 1, *lens[1:]] if len(lens) > 1 else lens

    monkeypatch.setattr(Rows, "kv_lens", one_short)
    got = generate(ours, PROMPTS, shared(ours))
    with pytest.raises(AssertionError, match="differs"):
        same(got, expected, PROMPTS)


def test_a_fork_at_the_wrong_node_is_caught(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: rows hang under their neighbour's question."""
    reference, ours = pair
    prompts = [prompt + tokens(3, 7) for prompt in PROMPTS]
    expected = generate(reference, prompts)
    cache = PrefixCache(ours).prefill(SYSTEM).fork(3).extend(QUESTIONS).fork()
    cache.rows.parents = np.roll(cache.rows.parents, 1)
    got = generate(ours, prompts, cache)
    with pytest.raises(AssertionError, match="differs"):
        same(got, expected, prompts)
