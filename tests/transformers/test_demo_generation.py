"""The demo's comparison of generation, in small, and that it would tell a difference."""

from __future__ import annotations

import pytest
import torch

from hydragen.demo import generation


def test_both_ways_give_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "CHAPTER_BYTES", 200)
    monkeypatch.setattr(generation, "COUNTS", (2, generation.NUM_QUESTIONS))
    monkeypatch.setattr(generation, "NEW_TOKENS", 4)
    found = generation.compare(torch.device("cpu"))
    assert found.wrong == 0
    assert found.identical > 60
    assert found.megabytes[1] < 0.6 * found.megabytes[0]
    assert "identical tokens: 6" in generation.report(found)


def test_a_difference_is_counted_where_it_belongs() -> None:
    tokens, margins = (
        torch.tensor([[1, 2], [3, 4], [5, 6]]),
        torch.tensor([[1.0, 1.0], [1.0, 1e-5], [1.0, 0.5]]),
    )
    assert generation._agreement((tokens, margins), [[1, 2], [3, 9], [5, 9]]) == (1, 1, 1)
