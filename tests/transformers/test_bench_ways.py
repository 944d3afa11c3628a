"""The benchmark's other ways of attending compute what they claim to."""

from __future__ import annotations

import torch
from models import VOCABULARY, make_model

from hydragen.transformers import PrefixCache, bench


def test_reading_per_sequence_gives_the_same_answers() -> None:
    """Sharing switched off over the same keys: only the speed may differ."""
    model = make_model("mistral")
    prompt = torch.randint(2, VOCABULARY, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    cache = PrefixCache(model).prefill(prompt).fork(3)
    shared = cache.generate([[5], [6], [7]], max_new_tokens=6)
    cache.reset()
    with bench.attention_replaced(bench.per_sequence):
        apart = cache.generate([[5], [6], [7]], max_new_tokens=6, seed=[one.seed for one in shared])
    assert apart == shared
    cache.reset()
    with bench.attention_replaced(bench.switched_off):
        off = cache.generate([[5], [6], [7]], max_new_tokens=6)
    assert off != shared
