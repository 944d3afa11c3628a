"""PrefixCache: what it holds stays true through reordering, refusals, interruptions and other hands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conversations import SYSTEM, greedy
from models import make_model
from transformers import PreTrainedModel

import hydragen
from hydragen.backends.appends import in_words
from hydragen.transformers import PrefixCache


@pytest.fixture
def ours() -> PreTrainedModel:
    return make_model("llama")


def answers(cache: PrefixCache, ids: list[list[int]] | None = None, new: int = 4) -> list[list[int]]:
    return [one.token_ids for one in cache.generate(ids, max_new_tokens=new, stop_token_ids=[])]


ROWS = [SYSTEM[:9], SYSTEM[9:18]]


def test_a_fork_does_not_see_rows_change_places(ours: PreTrainedModel) -> None:
    cache = PrefixCache(ours).prefill(ROWS)
    fork = cache.fork()
    cache.reorder_cache(torch.tensor([1, 1]))
    expected = [greedy(ours, [*row, 7], 4) for row in ROWS]
    assert expected[0] != expected[1]
    assert answers(fork, [[7], [7]]) == expected
    assert answers(cache, [[7], [7]]) == [expected[1]] * 2


def test_what_is_known_of_ends_moves_with_the_rows(ours: PreTrainedModel) -> None:
    """The logits of the last tokens, and then the tokens that have not been fed."""
    swapped = torch.tensor([1, 0])
    cache = PrefixCache(ours).prefill(ROWS)
    cache.reorder_cache(swapped)
    first = answers(cache)
    assert first == [greedy(ours, row, 4) for row in ROWS[::-1]]
    cache.reorder_cache(swapped)
    said = [row + answer for row, answer in zip(ROWS, first[::-1], strict=True)]
    assert answers(cache, [[7], [8]]) == [greedy(ours, [*said[0], 7], 4), greedy(ours, [*said[1], 8], 4)]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"seed": [1, 2]}, "seed must be"),
        ({"seed": 1.5}, "seed must"),
        ({"stop_token_ids": torch.tensor(5)}, "stop_token_ids must"),
        ({"max_new_tokens": [2.7]}, "max_new_tokens must hold integers"),
        ({"max_new_tokens": [2, 3]}, "max_new_tokens must be an int, or one per row, 1, got 2"),
        ({"max_new_tokens": "3"}, "max_new_tokens must"),
    ],
)
def test_what_is_refused_changes_nothing(ours: PreTrainedModel, options: dict[str, Any], error: str) -> None:
    cache = PrefixCache(ours).prefill(SYSTEM)
    with pytest.raises((TypeError, ValueError), match=error):
        cache.generate([4, 5], **{"max_new_tokens": 3, **options})
    assert cache.lengths.tolist() == [len(SYSTEM)]
    assert answers(cache, [[4, 5]]) == [greedy(ours, [*SYSTEM, 4, 5], 4)]


def test_one_stop_token_may_be_of_numpy(ours: PreTrainedModel) -> None:
    expected = greedy(ours, SYSTEM, 4)
    cache = PrefixCache(ours).prefill(SYSTEM)
    done = cache.generate(max_new_tokens=4, stop_token_ids=np.int64(expected[1]))
    assert done[0].token_ids == expected[: expected.index(expected[1]) + 1]


def test_a_token_fed_by_hand_is_not_fed_again(ours: PreTrainedModel) -> None:
    cache = PrefixCache(ours).prefill(SYSTEM)
    said = answers(cache)[0]
    with torch.no_grad():
        logits = ours(torch.tensor([said[-1:]]), past_key_values=cache, use_cache=True).logits
    assert cache.next_positions.tolist() == [len(SYSTEM) + 4]
    then = int(logits[0, -1].argmax())
    assert answers(cache, [[then]]) == [greedy(ours, [*SYSTEM, *said, then], 4)]


def test_the_token_that_waits_counts_among_the_positions(ours: PreTrainedModel) -> None:
    cache = PrefixCache(ours).prefill(SYSTEM)
    answers(cache)
    most = ours.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"in the model's {most} positions"):
        cache.generate(max_new_tokens=most - len(SYSTEM) - 3)
    assert len(answers(cache, new=most - len(SYSTEM) - 4)[0]) == most - len(SYSTEM) - 4


def test_finished_rows_write_to_a_place_of_their_own(ours: PreTrainedModel) -> None:
    """As on a GPU, where they are computed until somebody looks: row 1's tokens stay as they are."""
    cache = PrefixCache(ours).prefill(SYSTEM).fork(2)
    cache.rows.begin_decode(np.arange(2), np.array([16, 16]))
    token, active = torch.tensor([5, 6]), torch.tensor([True, True])
    with torch.no_grad():
        for _ in range(16):
            cache.decode(token, active)
        starts = cache.rows.step.layout.starts
        tails = [tail for layer in cache.layers for tail in layer._tails()]
        before = [tail.clone() for tail in tails]
        cache.decode(token + 1, ~active)
    for old, tail in zip(before, tails, strict=True):
        for begin in starts[:2]:
            assert torch.equal(old[begin : begin + 16], tail[begin : begin + 16])


def test_a_pass_that_broke_off_announces_nothing(ours: PreTrainedModel) -> None:
    """Tokens for one of two rows, and then a model that is called by hand with tokens for both."""
    cache = PrefixCache(ours).prefill(SYSTEM).fork(2)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = ours.get_input_embeddings().register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.extend([[7], []])
    hook.remove()
    positions = torch.full((2, 1), len(SYSTEM))
    with torch.no_grad():
        ours(torch.tensor([[7], [8]]), position_ids=positions, past_key_values=cache, use_cache=True)
    assert cache.lengths.tolist() == [len(SYSTEM) + 1] * 2
    assert answers(cache, [[5], [6]]) == [greedy(ours, [*SYSTEM, *two], 4) for two in ((7, 5), (8, 6))]


def test_the_default_device_is_not_asked(ours: PreTrainedModel) -> None:
    expected = [one.token_ids for one in hydragen.generate(ours, [SYSTEM], max_new_tokens=3, seed=1)]
    torch.set_default_device("meta")
    try:
        out = [one.token_ids for one in hydragen.generate(ours, [SYSTEM], max_new_tokens=3, seed=1)]
        hydragen.generate(ours, [SYSTEM], max_new_tokens=1)
    finally:
        torch.set_default_device(None)
    assert out == expected


def test_words_of_eight_bytes_begin_at_their_places() -> None:
    x = torch.arange(64, dtype=torch.float16)
    assert in_words(x[4:36].view(4, 8))
    assert not in_words(x[3:35].view(4, 8))


def test_a_prefill_that_fails_leaves_the_cache_empty(ours: PreTrainedModel) -> None:
    """In the model's second layer, when the first has stored its tokens."""
    cache = PrefixCache(ours)

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    hook = ours.model.layers[1].register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        cache.prefill(ROWS)
    hook.remove()
    assert cache.num_rows == cache.stored_tokens == 0
    assert answers(cache.prefill(ROWS)) == [greedy(ours, row, 4) for row in ROWS]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 1}])
def test_logits_that_are_no_numbers(ours: PreTrainedModel, options: dict[str, Any]) -> None:
    """From the third token on, in the second row: said, not answered with some token."""
    cache, passes = PrefixCache(ours).prefill(ROWS), 0

    def spoil(_: object, __: object, out: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return out if passes < 2 else out.index_fill(0, torch.tensor([1]), torch.nan)

    ours.lm_head.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"got NaN .* for row 1 after 2 new tokens"):
        cache.generate(max_new_tokens=6, stop_token_ids=[], **options)
