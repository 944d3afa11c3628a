"""Prompts, and the ordinary path's answers to them, for tests of PrefixCache."""

from __future__ import annotations

import torch
from models import VOCABULARY
from transformers import PreTrainedModel

from hydragen.transformers import PrefixCache


def tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(2, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


SYSTEM = tokens(20)
QUESTIONS = [tokens(5, 2), tokens(2, 3), tokens(9, 4)]


def greedy(model: PreTrainedModel, prompt: list[int], new: int) -> list[int]:
    """The ordinary path's answer."""
    model.set_attn_implementation("eager")
    try:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
    finally:
        model.set_attn_implementation("hydragen")
    return out[0, len(prompt) :].tolist()


def storages(cache: PrefixCache, level: int) -> list[int]:
    """Addresses of a level's tensors."""
    found = []
    for layer in cache.layers:
        kv = layer.kv()[level]
        pair = kv if isinstance(kv, tuple) else (kv.k, kv.v)
        found += [x.untyped_storage().data_ptr() for x in pair]
    return found
