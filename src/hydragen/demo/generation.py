"""The demo's second half: a model answers the questions, by ordinary generation and over shared prefixes.

The model is a small Llama with random weights, its queries and keys scaled so that attention is uneven: what
it says means nothing, but a wrong token of context would change it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hydragen
from hydragen.demo.workload import NUM_QUESTIONS, QUESTION_BYTES, build_sequences
from hydragen.transformers import PrefixCache

# The system text and the chapter's beginning, then the question: short enough for a CPU without sharing.
CHAPTER_BYTES = 1024
NEW_TOKENS = 32
COUNTS = (8, 32, NUM_QUESTIONS)
# Logits that are this close may change places by rounding: a difference there is counted, and shown.
NEAR_TIE = 1e-3


@dataclass(frozen=True)
class Generated:
    """What the comparison found.

    Attributes
    ----------
    seconds : per number of questions, (ordinary, shared)
    identical, near_ties : answers that agree token by token; that part where two tokens are tied
    wrong : answers that part elsewhere: none, or something is broken
    megabytes : of keys and values, (copied to every sequence, stored once)
    """

    seconds: dict[int, tuple[float, float]]
    identical: int
    near_ties: int
    wrong: int
    megabytes: tuple[float, float]


def make_model(device: torch.device) -> PreTrainedModel:
    """A Llama over bytes, 2 layers, float32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CHAPTER_BYTES + 512,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="hydragen", dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                weight.normal_(0, gain * weight.shape[-1] ** -0.5)
        model.get_input_embeddings().weight.normal_()
    return model.to(device).eval()


def prompts() -> list[NDArray[np.int64]]:
    """The questions, each after the beginning of its chapter."""
    return [np.concatenate([x[:CHAPTER_BYTES], x[-QUESTION_BYTES:]]) for x in build_sequences()]


def compare(device: torch.device) -> Generated:
    """Generate both ways for growing numbers of questions."""
    model, questions = make_model(device), prompts()
    seconds: dict[int, tuple[float, float]] = {}
    with tqdm(total=2 * sum(COUNTS), unit="answer", leave=False, disable=None) as bar:
        for count in COUNTS:
            bar.set_description(f"generating {count} answers")
            some = questions[:count]
            slow, ordinary = _timed(partial(_ordinary, model, some), device)
            bar.update(count)
            options = {"max_new_tokens": NEW_TOKENS, "batch_size": NUM_QUESTIONS}
            fast, shared = _timed(partial(hydragen.generate, model, some, **options), device)
            bar.update(count)
            seconds[count] = slow, fast
    identical, near_ties, wrong = _agreement(ordinary, [one.token_ids for one in shared])
    copied = sum(x.size + NEW_TOKENS for x in questions)
    tree = hydragen.PrefixTree.from_token_ids(questions, min_shared=16)
    stored = int(tree.kv_offsets[-1]) + NUM_QUESTIONS * NEW_TOKENS
    token = _bytes_per_token(model) / 1e6
    return Generated(seconds, identical, near_ties, wrong, (copied * token, stored * token))


def report(found: Generated) -> str:
    """Both ways side by side."""
    slow, fast = found.seconds[NUM_QUESTIONS]
    copied, stored = found.megabytes
    ties = f", {found.near_ties} part at a near-tie" if found.near_ties else ""
    lines = [
        ("", "shared", "ordinary", ""),
        ("KV memory", f"{stored:,.1f} MB", f"{copied:,.1f} MB", f"{copied / stored:.1f}x less"),
        ("time of generation", f"{fast:,.2f} s", f"{slow:,.2f} s", f"{slow / fast:.1f}x faster"),
    ]
    table = "\n".join(f"{name:<22}{a:>14}{b:>14}   {note}".rstrip() for name, a, b, note in lines)
    return f"{table}\nidentical tokens: {found.identical} of {NUM_QUESTIONS} answers{ties}"


def _ordinary(model: PreTrainedModel, questions: list[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """transformers' own generation: new tokens [rows, new] and how far each was ahead of the next."""
    model.set_attn_implementation("sdpa")
    try:
        ids = torch.from_numpy(np.stack(questions)).to(model.device)
        with torch.no_grad():
            out: Any = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
    finally:
        model.set_attn_implementation("hydragen")
    best = torch.stack(out.logits, dim=1).topk(2).values
    return out.sequences[:, ids.shape[1] :].cpu(), (best[..., 0] - best[..., 1]).cpu()


def _agreement(ordinary: tuple[Tensor, Tensor], shared: list[list[int]]) -> tuple[int, int, int]:
    """Count answers that agree, that part at a near-tie, and that part elsewhere."""
    tokens, margins = ordinary
    identical = near_ties = 0
    for row, answer in enumerate(shared):
        differ = (tokens[row] != torch.tensor(answer)).nonzero()
        if not len(differ):
            identical += 1
        elif margins[row, int(differ[0])] < NEAR_TIE:
            near_ties += 1
    return identical, near_ties, len(shared) - identical - near_ties


def _bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values of one token in all layers, as the cache stores them."""
    cache = PrefixCache(model).prefill([0])
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def _timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    began = time.perf_counter()
    out = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, out
