"""Mixtures of experts in decode steps: the product that graphs can hold gives the same tokens."""

from __future__ import annotations

import pytest
import torch
from models import make_model

from hydragen.transformers import PrefixCache, decode, experts


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2", "deepseek_v3"])
def test_copied_experts_give_the_same_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    usual = model.get_experts_implementation()
    assert "grouped_mm" in usual.values()
    prefix = PrefixCache(model).prefill(list(range(2, 40)))
    expected = prefix.fork(3).generate([[5], [6], [7]], max_new_tokens=8, logprobs=True)
    used = set()
    forward = PrefixCache.decode

    def watched(self: PrefixCache, *args: torch.Tensor) -> torch.Tensor:
        used.update(self.model.get_experts_implementation().values())
        return forward(self, *args)

    monkeypatch.setattr(PrefixCache, "decode", watched)
    monkeypatch.setattr(decode, "batched_pays", lambda *_: True)
    got = prefix.fork(3).generate([[5], [6], [7]], max_new_tokens=8, logprobs=True)
    assert used == {"batched_mm"}
    assert [one.token_ids for one in got] == [one.token_ids for one in expected]
    assert got[0].logprobs == pytest.approx(expected[0].logprobs, abs=1e-4)
    assert model.get_experts_implementation() == usual, "outside of decode steps nothing changes"


def test_what_copies_take() -> None:
    model = make_model("deepseek_v3")
    gate_and_up = 2 * 16 * 32 * 4  # twice 16 x 32 weights of four bytes
    assert experts.batched_bytes(model, 10) == 2 * 10 * 2 * gate_and_up
    assert experts.batched_bytes(make_model("llama"), 10) == 0
    assert not experts.batched_pays(model, 10), "on a CPU there are no graphs"
