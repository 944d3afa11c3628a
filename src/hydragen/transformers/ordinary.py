"""What the benchmark compares with: transformers' own generate, the prefix copied to every sequence."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from hydragen.host_ints import IntArray
from hydragen.transformers.support import text_config

# New tokens of which steps are timed, at most; the first two of them warm up.
NEW_TOKENS = 8


class _Stamps(StoppingCriteria):  # type: ignore[misc]  # mypy does not read transformers
    """Note when each token is there; stop nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, *_: object, **__: object) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def ordinary_bytes(model: PreTrainedModel, token_bytes: int, batch: int, tokens: int) -> int:
    """Return what the copied cache needs: a step joins old and new keys of a layer in a new tensor."""
    return int(token_bytes * tokens * batch * (1 + 2 / text_config(model).num_hidden_layers))


@torch.no_grad()
def ordinary_step(model: PreTrainedModel, prompt: IntArray, batch: int, completion: int) -> dict[str, Any]:
    """Time a greedy step of the model's own generate, with attention "sdpa".

    Returns
    -------
    dict
        `seconds`, the median step, and `new_tokens`, how many were made: at the beginning of a completion,
        where steps are shortest.
    """
    new = min(NEW_TOKENS, completion)
    ids, stamps = torch.from_numpy(prompt).to(model.device)[None], _Stamps()
    model.set_attn_implementation("sdpa")
    try:
        cache = DynamicCache(config=text_config(model))
        model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(batch)
        model.generate(
            ids.expand(batch, -1),
            attention_mask=torch.ones_like(ids).expand(batch, -1),
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            stopping_criteria=StoppingCriteriaList([stamps]),
        )
    finally:
        model.set_attn_implementation("hydragen")
    steps = [end - start for start, end in pairwise(stamps.times)]
    return {"seconds": median(steps[1:] or steps), "new_tokens": new}
