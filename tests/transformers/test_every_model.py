"""Every causal LM of transformers: the ordinary path's tokens over shared prompts, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conversations import tokens
from every_model import NAMES, NOT_BUILT, REFUSED, VARIANTS, build
from models import make_model
from same_tokens import assert_same_tokens, left_padded
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hydragen
from hydragen.transformers import PrefixCache
from hydragen.transformers.layers import PrefixLayer
from hydragen.transformers.rows import Rows

NEW = 6
# Above float32's errors in log-probabilities, below what a token more or less of the prompt changes
NEAR = 1e-4
SYSTEM = tokens(14)
DOCUMENTS = [tokens(5, 2), tokens(3, 3)]
QUESTIONS = [[tokens(5, 4), tokens(2, 5)], [tokens(9, 6), tokens(4, 7)]]
PROMPTS = [
    SYSTEM + document + question
    for document, questions in zip(DOCUMENTS, QUESTIONS, strict=True)
    for question in questions
]
# Models may say what they like; what counts is what they answer.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ordinary(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities and margins, [4, NEW] each: left-padded prompts, the model's own cache."""
    model.set_attn_implementation("eager")
    ids, mask = left_padded(PROMPTS)
    try:
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    finally:
        model.set_attn_implementation("hydragen")
    best = torch.log_softmax(torch.stack(out.logits, dim=1).float(), dim=-1).topk(2).values
    return out.sequences[:, ids.shape[1] :], best[..., 0], best[..., 0] - best[..., 1]


def shared(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities, [4, NEW] each, over two levels and what follows them."""
    options: dict[str, Any] = {"max_new_tokens": NEW, "stop_token_ids": [], "min_shared": 1, "logprobs": True}
    answers = hydragen.generate(model, SYSTEM, DOCUMENTS, QUESTIONS, **options)
    return torch.tensor([one.token_ids for one in answers]), torch.tensor([one.logprobs for one in answers])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_the_tokens_of_the_ordinary_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    tokens, logprobs = shared(model)
    expected, likely, margins = ordinary(model)
    assert_same_tokens(tokens, expected, margins, NEAR)
    same = (tokens == expected).cumprod(dim=1).bool()  # beyond a near-tie rows may go apart
    assert (logprobs - likely)[same].abs().max() < NEAR
    # Planted: a token less of the shared prefix. Each of these models tells.
    honest = Rows.kv_lens

    def one_short(self: Rows) -> list[Any]:
        lens = honest(self)
        return [lens[0] - 1, *lens[1:]] if len(lens) > 1 else lens

    monkeypatch.setattr(Rows, "kv_lens", one_short)
    assert (shared(model)[1] - logprobs).abs().max() > NEAR


@pytest.mark.parametrize("name", [name for name in NAMES if name in REFUSED])
def test_refused_before_anything_is_computed(name: str) -> None:
    model = build(name)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=REFUSED[name]) as refused:
        hydragen.generate(model, SYSTEM, max_new_tokens=NEW)
    assert type(model).__name__ in str(refused.value)


def test_no_model_type_is_listed_that_is_not_there() -> None:
    assert {*REFUSED, *NOT_BUILT} - {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS} == set()


@pytest.mark.parametrize(
    ("compute", "error"),
    [
        (lambda layer: layer.repeat(1, 2, 1, 1), AttributeError),
        (lambda layer: torch.chunk(layer, 2), TypeError),
    ],
    ids=["method", "function"],
)
def test_a_model_that_computes_with_what_is_cached_is_told(
    compute: Callable[[Any], Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models from elsewhere, which no list can name."""
    cache, update = PrefixCache(make_model("llama")), PrefixLayer.update
    monkeypatch.setattr(PrefixLayer, "update", lambda *args: compute(update(*args)[0]))
    message = r"must leave cached keys and values to its attention function, .* \((repeat|chunk)\)"
    with pytest.raises(error, match=message):
        cache.prefill(SYSTEM)
