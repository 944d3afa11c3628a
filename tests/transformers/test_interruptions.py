"""Calls that are interrupted or fail: what a cache holds afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conversations import SYSTEM, greedy, tokens
from models import make_model
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import hydragen
from hydragen.transformers import PrefixCache, stream
from hydragen.transformers.layers import PrefixLayer
from hydragen.transformers.rows import Rows

# Two users whose histories have unlike lengths, and what they say then: more than there is room for
FIRST = [tokens(5, 2), tokens(9, 4)]
SECOND = [tokens(25, 5), tokens(30, 6)]


def answers(cache: PrefixCache, ids: list[list[int]], new: int = 6) -> list[list[int]]:
    return [one.token_ids for one in cache.generate(ids, max_new_tokens=new, stop_token_ids=[])]


def chat_of(model: PreTrainedModel) -> tuple[PrefixCache, list[list[int]]]:
    """A chat after its first turn, and what each user said and heard."""
    chat = PrefixCache(model).prefill(SYSTEM).fork(2)
    heard = answers(chat, FIRST, 3)
    return chat, [SYSTEM + said + answer for said, answer in zip(FIRST, heard, strict=True)]


class Interruption:
    """KeyboardInterrupt at the n-th call of a module, before it runs."""

    def __init__(self, module: torch.nn.Module, when: int) -> None:
        self.left = when
        self.hook = module.register_forward_pre_hook(self.count)

    def count(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            self.hook.remove()
            raise KeyboardInterrupt


PLACES: dict[str, Callable[[PreTrainedModel], torch.nn.Module]] = {
    "before the first layer": lambda model: model.get_input_embeddings(),
    "within a layer that has stored": lambda model: model.model.layers[0].self_attn.o_proj,
    "between layers": lambda model: model.model.layers[1],
    "after the last layer": lambda model: model.lm_head,
}


@pytest.mark.parametrize("when", [1, 2, 4])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llama", "mistral", "deepseek_v3"])
def test_an_interrupted_turn_has_not_been(family: str, place: str, when: int) -> None:
    """In the prefill of what was said, or in one of the steps: nobody has heard a token of the answer."""
    model = make_model(family)
    chat, said = chat_of(model)
    kept, length, expected_before = chat.fork(), chat.lengths.tolist(), chat.next_positions.tolist()
    Interruption(PLACES[place](model), when)
    with pytest.raises(KeyboardInterrupt):
        answers(chat, SECOND)
    assert chat.lengths.tolist() == length
    assert chat.next_positions.tolist() == expected_before == [len(row) for row in said]
    expected = [greedy(model, row + more, 6) for row, more in zip(said, SECOND, strict=True)]
    for cache in (chat.fork(), kept, chat):
        assert answers(cache, SECOND) == expected
    said = [row + more + answer for row, more, answer in zip(said, SECOND, expected, strict=True)]
    assert answers(chat, [[5], [6]]) == [
        greedy(model, [*row, i], 6) for row, i in zip(said, (5, 6), strict=True)
    ]


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_keys_on_their_way_to_attention_are_forgotten(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    chat, said = chat_of(model)
    update, calls = PrefixLayer.update, 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        out = update(*args)
        if calls == 4:
            raise KeyboardInterrupt
        return out

    with monkeypatch.context() as patched:
        patched.setattr(PrefixLayer, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answers(chat, SECOND)
    expected = [greedy(model, row + more, 6) for row, more in zip(said, SECOND, strict=True)]
    assert answers(chat, SECOND) == expected


def test_an_interrupted_answer_without_a_question() -> None:
    """What is known of the ends of rows comes back too: their last logits, or the token not fed yet."""
    model = make_model("llama")
    cache = PrefixCache(model).prefill([SYSTEM, FIRST[1]])
    for before in ([SYSTEM, FIRST[1]], [row + greedy(model, row, 3) for row in (SYSTEM, FIRST[1])]):
        Interruption(model.lm_head, 2)
        with pytest.raises(KeyboardInterrupt):
            cache.generate(max_new_tokens=5, stop_token_ids=[])
        expected = [greedy(model, row, 3) for row in before]
        assert [one.token_ids for one in cache.generate(max_new_tokens=3, stop_token_ids=[])] == expected


class Broken:
    """A tokenizer that fails when the second answer is put into words."""

    calls = 0

    def __call__(self, *_: object) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        return 2

    def decode(self, ids: list[int], **_: object) -> str:
        self.calls += 1
        if self.calls == 2:
            raise OSError("the connection is gone")
        return str(ids)


def test_a_callback_that_fails_undoes_the_turn() -> None:
    model = make_model("llama")
    chat, said = chat_of(model)
    with pytest.raises(OSError, match="connection is gone"):
        chat.generate(SECOND, max_new_tokens=4, tokenizer=Broken())
    expected = [greedy(model, row + more, 4) for row, more in zip(said, SECOND, strict=True)]
    assert answers(chat, SECOND, 4) == expected


def test_logits_that_are_no_numbers_undo_the_turn() -> None:
    model = make_model("llama")
    chat, said = chat_of(model)
    spoil = model.lm_head.register_forward_hook(lambda _, __, out: out * torch.nan)
    with pytest.raises(ValueError, match="got NaN"):
        answers(chat, SECOND)
    spoil.remove()
    assert answers(chat, [[5], [6]]) == [
        greedy(model, [*row, i], 6) for row, i in zip(said, (5, 6), strict=True)
    ]


def test_room_that_memory_does_not_have_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    chat, said = chat_of(model)
    begin = Rows.begin_decode
    with monkeypatch.context() as patched:
        patched.setattr(Rows, "begin_decode", lambda self, rows, room: begin(self, rows, room + 2**44))
        with pytest.raises(MemoryError, match="GiB in each of 2 layers"):
            answers(chat, SECOND)
    expected = [greedy(model, row + more, 6) for row, more in zip(said, SECOND, strict=True)]
    assert answers(chat, SECOND) == expected


def test_an_extension_that_is_interrupted_between_rows_has_not_been(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydragen.transformers.cache.PREFILL_TOKENS", 8)
    model = make_model("llama")
    cache = PrefixCache(model).prefill([SYSTEM, SYSTEM[:-1] + [3]]).fork()
    Interruption(model.lm_head, 2)
    with pytest.raises(KeyboardInterrupt):
        cache.extend([[5] * 7, [6] * 7])  # one row after the other
    assert cache.lengths.tolist() == [20, 20]
    assert answers(cache.extend([[5] * 7, [6] * 7]), [[], []], 4) == [
        greedy(model, SYSTEM + [5] * 7, 4),
        greedy(model, SYSTEM[:-1] + [3] + [6] * 7, 4),
    ]


def test_a_stream_that_is_left_leaves_the_kept_prefix_alone() -> None:
    model = make_model("llama")
    prefix = PrefixCache(model).prefill(SYSTEM)
    expected = [
        one.token_ids for one in hydragen.generate(prefix, FIRST, max_new_tokens=4, stop_token_ids=[])
    ]
    options: dict[str, Any] = {"max_new_tokens": 4, "stop_token_ids": [], "batch_size": 1}
    answer = next(running := stream(prefix, FIRST, **options))
    running.close()
    assert answer.token_ids in expected
    Interruption(model.model.layers[1], 3)
    with pytest.raises(KeyboardInterrupt):
        hydragen.generate(prefix, FIRST, **options)
    assert prefix.lengths.tolist() == [len(SYSTEM)]
    assert [one.token_ids for one in hydragen.generate(prefix, FIRST, **options)] == expected


class Impatient(BaseStreamer):  # type: ignore[misc]  # mypy does not read transformers
    """A streamer that raises when the third token is handed out."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if value.numel() == 1:  # the prompt comes first
            self.tokens += value.tolist()
        if len(self.tokens) == 3:
            raise ConnectionError("nobody listens")

    def end(self) -> None:
        pass


def test_the_models_own_generate_leaves_what_it_has_fed() -> None:
    model = make_model("llama")
    cache, heard = PrefixCache(model).prefill(SYSTEM).fork(), Impatient()
    prompt = SYSTEM + FIRST[0]
    with pytest.raises(ConnectionError, match="nobody listens"):
        model.generate(torch.tensor([prompt]), past_key_values=cache, max_new_tokens=9, streamer=heard)
    expected = greedy(model, prompt, 9)
    assert heard.tokens == expected[:3]
    assert cache.lengths.tolist() == [len(prompt) + 2]
    assert answers(cache, [heard.tokens[-1:]]) == [expected[3:]]
