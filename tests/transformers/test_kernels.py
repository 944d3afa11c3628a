"""Generation over the Triton kernels, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from models import make_model
from running_on import INTERPRETED

import hydragen
from hydragen import api
from hydragen.transformers import attention, plans


@pytest.mark.triton
def test_the_kernels_give_the_references_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill by `hydragen.attention`, decode by a plan, for a tree of prompts and a sliding window."""
    model = make_model("mistral", num_hidden_layers=1)
    options: dict[str, Any] = {"max_new_tokens": 3, "min_shared": 1, "logprobs": True}
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [[20, 21], [20]]]
    expected = hydragen.generate(model, *prompts, **options)
    if torch.cuda.is_available() and not INTERPRETED:
        model = model.cuda()
    monkeypatch.setattr(attention, "attention", partial(api.attention, backend="triton"))
    monkeypatch.setattr(plans, "plan", partial(api.plan, backend="triton"))
    got = hydragen.generate(model, *prompts, **options)
    assert [one.token_ids for one in got] == [one.token_ids for one in expected]
    for a, b in zip(got, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
