"""What a caller may give as prompts: token ids or texts, one or many, in levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydragen.host_ints import IntArray
from hydragen.transformers.tokens import is_prompt, token_row

# A text, or token ids
Prompt = Any


def join_levels(levels: Sequence[object]) -> list[list[Prompt]]:
    """Return the pieces of every prompt, in the caller's order, depth first.

    levels[0] is a prompt or a list of them; before other levels it may be empty. A further level holds what
    follows: a prompt or a list of them if there is one path so far, else one list of prompts per path so far.
    """
    paths: list[list[Prompt]] = [[]]
    for depth, level in enumerate(levels):
        name = "prompts" if depth == 0 else f"continuations[{depth - 1}]"
        if depth == 0 and is_prompt(level):
            paths = [[level]]
            continue
        if depth == 0 and len(levels) > 1 and isinstance(level, list | tuple) and not level:
            continue  # no system prompt
        branches = [[level]] if is_prompt(level) else _listed(level, name)
        nested = depth > 0 and len(branches) > 0 and not any(is_prompt(x) for x in branches)
        if not nested and len(paths) == 1:
            branches = [branches]
        elif not nested or len(branches) != len(paths):
            raise ValueError(
                f"{name} must hold one list of prompts for each of the {len(paths)} paths above it, got "
                f"{_said(level, branches, nested)}; nest it: [[a1, a2], [b1], ...]"
            )
        paths = [
            [*path, prompt]
            for i, (path, below) in enumerate(zip(paths, branches, strict=True))
            for prompt in _listed(below, f"{name}[{i}]")
        ]
    if not paths:
        raise ValueError("prompts must hold a prompt or more, got none; pass token ids or texts")
    return paths


def token_ids_of(paths: list[list[Prompt]], tokenizer: Any, special: bool) -> list[IntArray]:
    """Return the token ids of every prompt; texts of one path are joined before they are tokenized."""
    if any(isinstance(piece, str) for path in paths for piece in path):
        if tokenizer is None:
            raise ValueError("tokenizer must be given for texts, got None; pass the model's tokenizer")
        if not all(isinstance(piece, str) for path in paths for piece in path):
            raise TypeError(
                "prompts must all be texts or all be token ids, got both; tokenize the texts first"
            )
        texts = ["".join(path) for path in paths]
        ids = tokenizer(texts, add_special_tokens=special, padding=False)["input_ids"]
        return [np.asarray(row, dtype=np.int64).reshape(-1) for row in ids]
    none = [np.empty(0, dtype=np.int64)]
    return [
        np.concatenate(none + [token_row(piece, f"prompts[{i}]") for piece in path])
        for i, path in enumerate(paths)
    ]


def _said(level: object, branches: list[Prompt], nested: bool) -> str:
    return "one prompt" if is_prompt(level) else f"{len(branches)} {'lists' if nested else 'prompts'}"


def _listed(value: object, name: str) -> list[Prompt]:
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray | Tensor):
        remedy = "pass its input_ids" if hasattr(value, "input_ids") else "for one prompt pass [prompt]"
        raise TypeError(
            f"{name} must be a list of prompts (token ids or texts), got {type(value).__name__}; {remedy}"
        )
    if isinstance(value, Tensor | np.ndarray) and value.ndim != 2:
        raise ValueError(f"{name} must be [prompts, tokens] if it is a tensor, got {list(value.shape)}")
    if any(isinstance(x, Mapping) for x in value):
        raise TypeError(
            f"{name} must be token ids or texts, got the messages of a chat; lay them out: "
            'tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]'
        )
    return list(value)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise a TypeError unless answers and prompts can be put into words with it."""
    if tokenizer is not None and not (callable(tokenizer) and callable(getattr(tokenizer, "decode", None))):
        raise TypeError(
            f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}; load one with "
            "AutoTokenizer.from_pretrained(path)"
        )


def draw_seeds(seed: int | Sequence[int] | None, count: int) -> IntArray:
    """Return a seed per sequence: the given ones, or all derived from one, or from torch's own state."""
    if seed is None:
        return torch.randint(2**62, (count,), device="cpu").numpy()
    if isinstance(seed, bool):
        raise TypeError(f"seed must be an integer, or one per sequence, got {seed}; give a number")
    if isinstance(seed, (int, np.integer)):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must fit in 64 bits, got {seed}; give a smaller one")
        generator = torch.Generator("cpu").manual_seed(int(seed))
        return torch.randint(2**62, (count,), generator=generator, device="cpu").numpy()
    seeds = token_row(seed, "seed").copy()  # answers are drawn later, from these
    if seeds.size != count:
        raise ValueError(f"seed must be an int, or {count} of them, one per sequence, got {seeds.size}")
    return seeds
