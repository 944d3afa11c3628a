"""hydragen.generate: shared prompts, levels, texts, seeds, stopping, batches."""

from __future__ import annotations

import copy
import re
import weakref
from typing import Any

import pytest
import torch
from models import VOCABULARY, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import hydragen
from hydragen.transformers import Completion, PrefixCache, stream
from hydragen.transformers.batches import Prompts
from hydragen.transformers.sampling import Sampling, logprobs_of


def tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(2, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


SYSTEM = tokens(20)
QUESTIONS = [tokens(5, 2), tokens(1, 3), tokens(9, 4), tokens(5, 2)]


@pytest.fixture(scope="module")
def ours() -> PreTrainedModel:
    return make_model("mistral")


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return make_model("mistral", "eager")


def ordinary(
    model: PreTrainedModel, prompt: list[int], new: int, sampling: Sampling | None = None, seed: int = 0
) -> tuple[list[int], list[float]]:
    """One sequence alone, without any cache: its new tokens and their log-probabilities."""
    ids, logprobs = list(prompt), []
    for count in range(new):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[:, -1]
        token = (sampling or Sampling()).choose(logits, torch.tensor([seed]), torch.tensor([count]))
        ids.append(int(token))
        logprobs.append(float(logprobs_of(logits, token)))
    return ids[len(prompt) :], logprobs


def check(out: list[Completion], prompts: list[list[int]], reference: PreTrainedModel, new: int = 8) -> None:
    __tracebackhide__ = True
    assert [(one.prompt, one.sample) for one in out] == [(i, 0) for i in range(len(prompts))]
    for one, prompt in zip(out, prompts, strict=True):
        assert one.token_ids == ordinary(reference, prompt, new)[0]


def test_a_shared_prompt(ours: PreTrainedModel, reference: PreTrainedModel) -> None:
    """The answers to one prompt, each with its own seed, are those of the sequences alone."""
    sampling: dict[str, Any] = {"temperature": 0.8, "top_k": 30, "top_p": 0.95}
    seeds = [7, 1, 7, 3]
    out = hydragen.generate(
        ours, SYSTEM, num_return_sequences=4, do_sample=True, max_new_tokens=8, seed=seeds, **sampling
    )
    expected = [ordinary(reference, SYSTEM, 8, Sampling(True, **sampling), seed)[0] for seed in seeds]
    assert [one.token_ids for one in out] == expected
    assert [one.seed for one in out] == seeds
    assert out[0].token_ids == out[2].token_ids != out[1].token_ids


def test_levels_of_prompts(ours: PreTrainedModel, reference: PreTrainedModel) -> None:
    out = hydragen.generate(ours, SYSTEM, QUESTIONS, max_new_tokens=8, min_shared=2)
    check(out, [SYSTEM + question for question in QUESTIONS], reference)


def test_a_tree_of_prompts(ours: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Three levels, uneven, as tensors; a path that ends where another goes on."""
    documents = [torch.tensor(tokens(12, 5)), torch.tensor(tokens(7, 6))]
    below = [[QUESTIONS[0], QUESTIONS[0] + QUESTIONS[2], QUESTIONS[1]], [QUESTIONS[2]]]
    out = hydragen.generate(ours, torch.tensor(SYSTEM), documents, below, max_new_tokens=8, min_shared=1)
    prompts = [
        SYSTEM + document.tolist() + question
        for document, questions in zip(documents, below, strict=True)
        for question in questions
    ]
    check(out, prompts, reference)


def test_prompts_that_share_nothing(ours: PreTrainedModel, reference: PreTrainedModel) -> None:
    prompts = [tokens(n, n) for n in (3, 11, 1)]
    check(hydragen.generate(ours, prompts, max_new_tokens=8), prompts, reference)


def test_the_callers_order(ours: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Prompts are computed side by side with those they share tokens with, and answered in order."""
    families = [tokens(18, 31), tokens(17, 32)]
    prompts = [families[i % 2] + tokens(2 + i, 40 + i) for i in range(6)]
    prompts += [prompts[1], families[0]]
    out = hydragen.generate(ours, prompts, max_new_tokens=8, batch_size=3)
    check(out, prompts, reference)


def test_shared_tokens_are_computed_once(ours: PreTrainedModel) -> None:
    seen: list[int] = []
    hook = ours.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        hydragen.generate(ours, SYSTEM, QUESTIONS[:3], max_new_tokens=1)
    finally:
        hook.remove()
    # the system prompt, then the questions padded to the longest
    assert seen == [len(SYSTEM), 3 * 9]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = {word: i for i, word in enumerate(["<pad>", "<s>", *(f"w{i}" for i in range(2, VOCABULARY))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>")


def as_text(ids: list[int]) -> str:
    return "".join(f"w{i} " for i in ids)


def test_texts(ours: PreTrainedModel, reference: PreTrainedModel, tokenizer: Any) -> None:
    prompts = [SYSTEM + question for question in QUESTIONS]
    plain = hydragen.generate(ours, [as_text(p) for p in prompts], tokenizer=tokenizer, max_new_tokens=8)
    check(plain, prompts, reference)
    assert plain[0].text == tokenizer.decode(plain[0].token_ids, skip_special_tokens=True)
    levels = hydragen.generate(
        ours, as_text(SYSTEM), [as_text(q) for q in QUESTIONS], tokenizer=tokenizer, max_new_tokens=8
    )
    assert [one.token_ids for one in levels] == [one.token_ids for one in plain]


def test_logprobs(ours: PreTrainedModel, reference: PreTrainedModel) -> None:
    out = hydragen.generate(ours, SYSTEM, QUESTIONS, max_new_tokens=8, logprobs=True)
    for one, question in zip(out, QUESTIONS, strict=True):
        expected = ordinary(reference, SYSTEM + question, 8)[1]
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(expected), rtol=0, atol=1e-4)
    assert hydragen.generate(ours, SYSTEM, max_new_tokens=2)[0].logprobs is None


def test_a_seed_decides_whatever_the_company(ours: PreTrainedModel) -> None:
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 3}
    whole = hydragen.generate(ours, SYSTEM, QUESTIONS, seed=11, **options)
    pieces = hydragen.generate(ours, SYSTEM, QUESTIONS, seed=11, batch_size=5, **options)
    assert whole == pieces
    alone = hydragen.generate(ours, SYSTEM, QUESTIONS[2:3], seed=[one.seed for one in whole[6:9]], **options)
    assert [one.token_ids for one in alone] == [one.token_ids for one in whole[6:9]]
    torch.manual_seed(3)
    first = hydragen.generate(ours, SYSTEM, **options)
    torch.manual_seed(3)
    assert first == hydragen.generate(ours, SYSTEM, **options)


def test_stop_tokens_end_answers_and_finished_rows_are_not_computed(ours: PreTrainedModel) -> None:
    free = hydragen.generate(ours, SYSTEM, QUESTIONS, max_new_tokens=8)
    stop = free[0].token_ids[2]
    expected = [
        one.token_ids[: one.token_ids.index(stop) + 1] if stop in one.token_ids else one.token_ids
        for one in free
    ]
    rows: list[int] = []

    def count(_module: object, _args: object, kwargs: dict[str, Tensor]) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            rows.append(len(kwargs["input_ids"]))

    hook = ours.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        out = hydragen.generate(ours, SYSTEM + [5, 5], QUESTIONS, max_new_tokens=1)  # no decode step at all
        assert rows == []
        out = hydragen.generate(ours, SYSTEM, QUESTIONS, max_new_tokens=8, stop_token_ids=[stop])
    finally:
        hook.remove()
    assert [one.token_ids for one in out] == expected
    ended = [stop in one for one in expected]
    assert [one.finish_reason == "stop" for one in out] == ended
    assert any(ended)
    assert not all(ended)
    # the first token comes from the prefill; each other one is one row of one step
    assert sum(rows) == sum(len(one) - 1 for one in expected)


def test_the_models_own_stop_token_is_the_default(reference: PreTrainedModel) -> None:
    free, _ = ordinary(reference, SYSTEM, 4)
    model = make_model("mistral")
    model.generation_config.eos_token_id = free[1]
    out = hydragen.generate(model, SYSTEM, max_new_tokens=4)
    assert out[0].token_ids == free[: free.index(free[1]) + 1]


def test_answers_come_as_they_finish(ours: PreTrainedModel) -> None:
    free = hydragen.generate(ours, SYSTEM, QUESTIONS[:3], max_new_tokens=8)
    stop = free[2].token_ids[1]
    got = list(stream(ours, SYSTEM, QUESTIONS[:3], max_new_tokens=8, stop_token_ids=[stop]))
    lengths = [len(one.token_ids) for one in got]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 1


def test_ten_thousand_answers_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix is computed once; no more than two batches are ever in memory."""
    model = make_model(
        "llama", hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1
    )
    alive: weakref.WeakSet[PrefixCache] = weakref.WeakSet()
    most, prefills = 0, []
    make, extend = Prompts.cache_for, PrefixCache.extend

    def watched(self: Prompts, prompts: Any) -> PrefixCache:
        nonlocal most
        cache = make(self, prompts)
        alive.add(cache)
        most = max(most, len(alive))
        return cache

    def counted(self: PrefixCache, input_ids: Any) -> PrefixCache:
        prefills.append(sum(len(x) for x in input_ids))
        return extend(self, input_ids)

    monkeypatch.setattr(Prompts, "cache_for", watched)
    monkeypatch.setattr(PrefixCache, "extend", counted)
    out = stream(
        model, SYSTEM, num_return_sequences=10_000, do_sample=True, max_new_tokens=2, batch_size=512, seed=0
    )
    answers = {(one.prompt, one.sample): one.token_ids for one in out}
    assert len(answers) == 10_000
    assert len({tuple(x) for x in answers.values()}) > 500
    assert most <= 2
    assert prefills == [len(SYSTEM)]


def test_progress_is_shown_when_asked_for(ours: PreTrainedModel, capfd: pytest.CaptureFixture[str]) -> None:
    hydragen.generate(ours, SYSTEM, QUESTIONS, max_new_tokens=2)
    hydragen.generate(ours, SYSTEM, QUESTIONS, max_new_tokens=2, progress=False)
    assert capfd.readouterr().err == ""
    hydragen.generate(ours, SYSTEM, QUESTIONS, max_new_tokens=2, progress=True)
    assert "4/4" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("max_new_token", "did you mean max_new_tokens?"),
        ("xyz", "choose from tokenizer, num_return_sequences, "),
    ],
)
def test_options_that_there_are_not(ours: PreTrainedModel, name: str, remedy: str) -> None:
    said = rf"^hydragen\.generate got an unexpected keyword argument '{name}'; {re.escape(remedy)}"
    with pytest.raises(TypeError, match=said):
        hydragen.generate(ours, SYSTEM, QUESTIONS, **{name: 2})
    cache = PrefixCache(ours)
    cache.prefill(SYSTEM)
    with pytest.raises(
        TypeError, match=rf"^PrefixCache\.generate got an unexpected keyword argument '{name}'; "
    ):
        cache.generate(**{name: 2})


def test_a_tokenizer_of_another_vocabulary(ours: PreTrainedModel, tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["more", "words"])
    with pytest.raises(ValueError, match=f"it has 99 tokens, the model {VOCABULARY}"):
        hydragen.generate(ours, "w5", tokenizer=tokenizer)


def test_a_gpu_or_cpu_dtype_is_the_models(ours: PreTrainedModel) -> None:
    """bfloat16 models work: the cache holds what the model computes."""
    half = make_model("llama").to(torch.bfloat16)
    out = hydragen.generate(half, SYSTEM, QUESTIONS, max_new_tokens=4)
    assert all(len(one.token_ids) == 4 for one in out)
    cache = PrefixCache(half).prefill(SYSTEM)
    assert cache.layers[0].keys.dtype == torch.bfloat16
