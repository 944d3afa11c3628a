"""PrefixCache: forks share memory, prefixes are kept and extended."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from conversations import QUESTIONS, SYSTEM, greedy, storages, tokens
from models import make_model
from torch import Tensor
from transformers import PreTrainedModel

import hydragen
from hydragen.transformers import PrefixCache
from hydragen.transformers.levels import Layout

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def ours() -> PreTrainedModel:
    return make_model("llama")


# A chat: turns, users, a prefix that stays


def test_many_users_and_turns(ours: PreTrainedModel) -> None:
    """Rows keep their history; a turn feeds only what is new, the last answer's last token included."""
    users = PrefixCache(ours).prefill(SYSTEM).fork(3)
    history = [list(SYSTEM) for _ in range(3)]
    for turn in range(3):
        said = [tokens(3 + user, 10 * turn + user) if (user + turn) % 3 else [] for user in range(3)]
        if turn == 0:
            said[0] = tokens(2, 77)
        answers = users.generate(said, max_new_tokens=[4, 2, 5])
        for user, answer in enumerate(answers):
            history[user] += said[user]
            assert answer.token_ids == greedy(ours, history[user], [4, 2, 5][user])
            history[user] += answer.token_ids
    assert users.lengths.tolist() == [len(x) - 1 for x in history]


def test_users_who_are_silent_are_not_answered(ours: PreTrainedModel) -> None:
    users = PrefixCache(ours).prefill(SYSTEM).fork(2)
    first = users.generate(QUESTIONS[:2], max_new_tokens=3)
    only = users.generate([[], QUESTIONS[2]], max_new_tokens=[0, 4])
    assert [one.prompt for one in only] == [1]
    assert only[0].token_ids == greedy(ours, SYSTEM + QUESTIONS[1] + first[1].token_ids + QUESTIONS[2], 4)
    again = users.generate([[9], []], max_new_tokens=[4, 0])
    assert again[0].token_ids == greedy(ours, SYSTEM + QUESTIONS[0] + first[0].token_ids + [9], 4)
    before = users.lengths
    with pytest.raises(ValueError, match=r"row 1 must leave room for 250 new tokens"):
        users.generate(max_new_tokens=[0, 250])
    assert users.lengths.tolist() == before.tolist()


def test_a_conversation_can_be_forked(ours: PreTrainedModel) -> None:
    chat = PrefixCache(ours).prefill(SYSTEM).fork(2)
    first = chat.generate(QUESTIONS[:2], max_new_tokens=3)
    branches = chat.fork([2, 1])
    out = branches.generate([QUESTIONS[2], [9], [8, 7]], max_new_tokens=4)
    for one, (row, said) in zip(out, ((0, QUESTIONS[2]), (0, [9]), (1, [8, 7])), strict=True):
        assert one.token_ids == greedy(ours, SYSTEM + QUESTIONS[row] + first[row].token_ids + said, 4)


def test_a_prefix_is_kept_over_many_calls_and_extended(ours: PreTrainedModel) -> None:
    prefix = PrefixCache(ours).prefill(SYSTEM)
    for question in QUESTIONS:
        for _ in range(2):
            out = hydragen.generate(prefix, question, max_new_tokens=4)
            assert out[0].token_ids == greedy(ours, SYSTEM + question, 4)
    assert hydragen.generate(prefix, max_new_tokens=4)[0].token_ids == greedy(ours, SYSTEM, 4)
    prefix.extend(QUESTIONS[0])
    out = hydragen.generate(prefix, QUESTIONS, max_new_tokens=4)
    for one, question in zip(out, QUESTIONS, strict=True):
        assert one.token_ids == greedy(ours, SYSTEM + QUESTIONS[0] + question, 4)


# Memory


def test_forks_copy_nothing(ours: PreTrainedModel) -> None:
    prefix = PrefixCache(ours).prefill(SYSTEM)
    own = storages(prefix, 0)
    deep = prefix.fork(3).extend(QUESTIONS).fork(4)
    assert storages(deep.fork(2), 0) == storages(deep, 0) == own
    assert deep.stored_tokens == len(SYSTEM) + sum(map(len, QUESTIONS))
    keys = prefix.layers[0].keys
    assert keys.untyped_storage().nbytes() == len(SYSTEM) * 2 * 8 * 4


def test_forks_do_not_see_what_is_added_or_forgotten_later(ours: PreTrainedModel) -> None:
    prefix = PrefixCache(ours).prefill(SYSTEM)
    fork = prefix.fork()
    prefix.extend(QUESTIONS[0])
    prefix.reset()
    prefix.prefill(QUESTIONS[2])
    out = hydragen.generate(fork, QUESTIONS[1], max_new_tokens=5)
    assert out[0].token_ids == greedy(ours, SYSTEM + QUESTIONS[1], 5)


def test_reset_keeps_the_shared_prefix(ours: PreTrainedModel) -> None:
    fork = PrefixCache(ours).prefill(SYSTEM).fork(3)
    for _ in range(2):
        out = fork.generate(QUESTIONS, max_new_tokens=4)
        for one, question in zip(out, QUESTIONS, strict=True):
            assert one.token_ids == greedy(ours, SYSTEM + question, 4)
        fork.reset()
        assert fork.lengths.tolist() == [len(SYSTEM)] * 3
    # and what follows the prefix is still known
    assert fork.generate(max_new_tokens=4)[2].token_ids == greedy(ours, SYSTEM, 4)


def test_a_cache_is_freed_without_the_garbage_collector(ours: PreTrainedModel) -> None:
    """Its tensors are the largest there are."""
    cache = PrefixCache(ours).prefill(SYSTEM)
    keys = weakref.ref(cache.layers[0].keys)
    gc.disable()
    try:
        del cache
        assert keys() is None
    finally:
        gc.enable()


def test_a_fork_that_has_generated_is_freed_without_the_garbage_collector(ours: PreTrainedModel) -> None:
    """Ten thousand answers are many forks, and what they hold of the prefix is the largest there is."""
    prefix = PrefixCache(ours).prefill(SYSTEM)
    keys = weakref.ref(prefix.layers[0].keys)
    gc.disable()
    try:
        fork = prefix.fork(2)
        fork.generate(QUESTIONS[:2], max_new_tokens=4)
        tails = weakref.ref(fork.layers[0].keys)
        del prefix, fork
        assert tails() is None
        assert keys() is None
    finally:
        gc.enable()


def test_long_prompts_go_in_pieces(ours: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydragen.transformers.cache.PREFILL_TOKENS", 7)
    out = hydragen.generate(ours, SYSTEM, QUESTIONS, max_new_tokens=4)
    for one, question in zip(out, QUESTIONS, strict=True):
        assert one.token_ids == greedy(ours, SYSTEM + question, 4)


def test_out_of_memory_says_how_much_and_the_prefix_survives(ours: PreTrainedModel) -> None:
    prefix = PrefixCache(ours).prefill(SYSTEM)
    fork = prefix.fork(3)
    fork.generate(QUESTIONS, max_new_tokens=2)
    fork.rows.begin_decode(np.arange(3), np.full(3, 2**44))
    with pytest.raises(MemoryError, match=r"need .* GiB in each of 2 layers .* shared prefix is intact"):
        fork.decode(torch.tensor([1, 2, 3]), torch.ones(3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="broke off halfway"):
        fork.extend(QUESTIONS)
    fork.reset()
    out = fork.generate(QUESTIONS, max_new_tokens=4)
    assert out[0].token_ids == greedy(ours, SYSTEM + QUESTIONS[0], 4)
    assert hydragen.generate(prefix, QUESTIONS[1], max_new_tokens=4)[0].token_ids == greedy(
        ours, SYSTEM + QUESTIONS[1], 4
    )


# Weights


@pytest.mark.parametrize("how", ["optimizer", "load_state_dict", "new parameter", "said so"])
def test_changed_weights_are_detected(ours: PreTrainedModel, how: str) -> None:
    prefix = PrefixCache(ours).prefill(SYSTEM)
    fork = prefix.fork(2)
    weight = ours.model.layers[0].self_attn.q_proj.weight
    if how == "optimizer":
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.1).step()
    elif how == "load_state_dict":
        ours.load_state_dict({name: x.clone() for name, x in ours.state_dict().items()})
    elif how == "new parameter":
        ours.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(weight.detach() * 2)
    else:
        weight.data.mul_(2)
        prefix.invalidate()
    ids = torch.tensor([SYSTEM + [5]] * 2)
    for use in (
        lambda: hydragen.generate(prefix, [5]),
        lambda: fork.generate([[5], [5]]),
        fork.fork,
        lambda: ours.generate(ids, past_key_values=fork, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="weights changed since this prefix was computed"):
            use()


def test_layouts_move_what_is_there() -> None:
    """Growing from ragged tails to even ones keeps every row's tokens."""
    old, new = Layout.of(np.array([3, 0, 2])), Layout.of(np.array([4, 4, 4]))
    flat = torch.arange(5)
    source, target = new.moves(old, np.array([2, 0, 2]))
    grown: Tensor = torch.full((12,), -1)
    grown[target] = flat[source]
    assert grown.view(3, 4).tolist() == [[0, 1, -1, -1], [-1] * 4, [3, 4, -1, -1]]
