"""The benchmark's other ways of attending compute what they claim to."""

from __future__ import annotations

import torch
from models import VOCABULARY, make_model

from hydragen.transformers import PrefixCache, arms


def test_reading_per_sequence_gives_the_same_answers() -> None:
    """Sharing switched off over the same keys: only the speed may differ."""
    model = make_model("mistral")
    prompt = torch.randint(2, VOCABULARY, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    cache = PrefixCache(model).prefill(prompt).fork(3)
    shared = cache.generate([[5], [6], [7]], max_new_tokens=6)
    cache.reset()
    with arms.attention_replaced(arms.per_sequence):
        apart = cache.generate([[5], [6], [7]], max_new_tokens=6, seed=[one.seed for one in shared])
    assert apart == shared
    cache.reset()
    with arms.attention_replaced(arms.switched_off):
        off = cache.generate([[5], [6], [7]], max_new_tokens=6)
    assert off != shared


def test_sharing_the_first_level_only_gives_the_same_answers() -> None:
    """In a model of one layer the copies are that layer's own."""
    model = make_model("llama", num_hidden_layers=1)
    cache = PrefixCache(model).prefill([5, 6, 7, 8]).fork(2).extend([[9, 10, 11], [12, 13, 14]]).fork(2)
    shared = cache.generate(max_new_tokens=6)
    fresh = PrefixCache(model).prefill([5, 6, 7, 8]).fork(2).extend([[9, 10, 11], [12, 13, 14]]).fork(2)
    with arms.attention_replaced(arms.FirstLevelOnly()):
        apart = fresh.generate(max_new_tokens=6, seed=[one.seed for one in shared])
    assert apart == shared
