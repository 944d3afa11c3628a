"""The end-to-end table: decode throughput of a model over one shared prefix, and what else one could do."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hydragen.explain import explain
from hydragen.kv import PackedKV
from hydragen.transformers import attention as layer_attention
from hydragen.transformers.batches import bytes_per_token
from hydragen.transformers.cache import PrefixCache
from hydragen.transformers.decode import State, Step
from hydragen.transformers.layers import PrefixLayer
from hydragen.transformers.sampling import Sampling
from hydragen.transformers.support import text_config
from hydragen.tree import PrefixTree

USUAL = layer_attention.read_levels
# Steps that are not timed: the first is eager, the second captured.
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """`batch` sequences over `prefix` shared tokens, `completion` new tokens each."""

    model: str
    batch: int
    prefix: int
    completion: int


@dataclass(frozen=True)
class Row:
    """One line of the table: decode tokens per second of each way; None where it does not fit.

    Attributes
    ----------
    bound : float or None
        Attention switched off plus the attention's own roof; None on a CPU, whose roof is not known.
    prefill_s, hf_prefill_s : float
        Seconds to run the prefix once, and once through transformers' own attention.
    read_tb_s : float
        What the per-sequence arm reads of the prefix's keys and values, in the time it takes longer than
        attention switched off, terabytes per second.
    """

    model: str
    batch: int
    prefix: int
    completion: int
    ours: float
    attention_off: float
    per_sequence_read: float
    hf_generate: float | None
    bound: float | None
    prefill_s: float
    read_tb_s: float


COLUMNS = [field.name for field in fields(Row)][:9]


def measure(model: PreTrainedModel, case: Case, hf: bool = True) -> Row:
    """Measure all ways for one case, in one go."""
    vocabulary = model.get_input_embeddings().num_embeddings
    prompt = np.random.default_rng(0).integers(0, vocabulary, case.prefix)
    prefill_s, prefix = timed(lambda: PrefixCache(model).prefill(prompt), model.device)
    ours = step_seconds(prefix, case)
    with attention_replaced(switched_off):
        off = step_seconds(prefix, case)
    with attention_replaced(per_sequence):
        unshared = step_seconds(prefix, case)
    size = bytes_per_token(prefix)
    read = size * case.prefix * case.batch / max(unshared - off, 1e-9) / 1e12
    roof = roof_seconds(prefix, case) if model.device.type == "cuda" else None
    del prefix
    other = hf_step_seconds(model, prompt, case, size) if hf else None

    def rate(seconds: float | None) -> float | None:
        return None if seconds is None else case.batch / seconds

    return Row(
        case.model,
        case.batch,
        case.prefix,
        case.completion,
        case.batch / ours,
        case.batch / off,
        case.batch / unshared,
        rate(other),
        rate(None if roof is None else off + roof),
        prefill_s,
        read,
    )


def step_seconds(prefix: PrefixCache, case: Case) -> float:
    """Mean seconds of a decode step, over all steps after the warm-up."""
    cache, device = prefix.fork(case.batch), prefix.model.device
    limits = np.full(case.batch, case.completion)
    with torch.no_grad():
        state = State.begin(limits, np.arange(case.batch), device)
        none = torch.empty(0, dtype=torch.int64, device=device)
        state.accept(cache.last_logits(np.arange(case.batch)), Sampling(), none)
        cache.rows.begin_decode(np.arange(case.batch), limits - 1)
        step = Step(cache, state, Sampling(), none)
        for _ in range(min(WARM_UP, case.completion - 2)):
            step.run()
        steps = case.completion - 1 - min(WARM_UP, case.completion - 2)

        def run() -> None:
            for _ in range(steps):
                step.run()

        seconds, _ = timed(run, device)
    return seconds / steps


def hf_step_seconds(model: PreTrainedModel, prompt: Any, case: Case, token_bytes: int) -> float | None:
    """Seconds a step of transformers' own generate, the prefix copied to every sequence; None: no room."""
    needed = token_bytes * (case.prefix + case.completion) * case.batch
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        # A step joins old and new keys of a layer in a new tensor, and the prefix is there once more.
        layers = text_config(model).num_hidden_layers
        if needed * (1 + 2 / layers) > 0.9 * torch.cuda.mem_get_info(model.device)[0]:
            return None
    ids = torch.from_numpy(prompt).to(model.device)[None]
    model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            cache = DynamicCache(config=text_config(model))
            model(ids[:, :-1], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(case.batch)
            options = {"past_key_values": cache, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            ids = ids.expand(case.batch, -1)
            seconds, out = timed(
                lambda: model.generate(ids, max_new_tokens=case.completion, **options), model.device
            )
    finally:
        model.set_attn_implementation("hydragen")
    new: int = out.shape[1] - ids.shape[1]
    return seconds / new


def roof_seconds(prefix: PrefixCache, case: Case) -> float:
    """Least time of a step's attention in all layers: its arithmetic and its memory traffic overlapping."""
    tails = np.full(case.batch, case.completion // 2)
    tree = PrefixTree.from_levels([[case.prefix], tails])
    config, total = text_config(prefix.model), 0.0
    for layer in prefix.layers:
        kv = layer.kv()[0]
        k, v = kv if isinstance(kv, tuple) else (kv.k, kv.v)
        total += explain(
            tree,
            num_q_heads=config.num_attention_heads,
            num_kv_heads=k.shape[-2],
            head_dim=k.shape[-1],
            head_dim_v=v.shape[-1],
            dtype=k.dtype,
            device=k.device,
        ).seconds
    return total


@contextmanager
def attention_replaced(other: Callable[[PrefixLayer, Tensor, dict[str, Any]], Tensor]) -> Iterator[None]:
    """Let models read what a PrefixCache holds by `other`."""
    layer_attention.read_levels = other  # type: ignore[assignment]
    try:
        yield
    finally:
        layer_attention.read_levels = USUAL


def switched_off(layer: PrefixLayer, q: Tensor, _: dict[str, Any]) -> Tensor:
    """Attention switched off: right shape, no work."""
    tail = layer.kv()[-1]
    v = tail.v if isinstance(tail, PackedKV) else tail[1]
    return q.new_zeros(*q.shape[:-1], v.shape[-1])


def per_sequence(layer: PrefixLayer, q: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention with sharing switched off: the same keys, in place, as a segment of each row's own.

    Decode steps over one shared prefix; others are read as usual.
    """
    rows, kv = layer.rows, layer.kv()
    if rows.step.plans is None or len(kv) != 2 or rows.levels[0].lens.size != 1:
        return USUAL(layer, q, options)
    prefix = kv[0]
    k, v = (prefix.k[None], prefix.v[None]) if isinstance(prefix, PackedKV) else prefix
    level = k.expand(rows.size, -1, -1, -1), v.expand(rows.size, -1, -1, -1)
    apart = PrefixTree.from_parents(
        np.append(np.full(rows.size, -1), np.arange(rows.size)),
        row_to_node=rows.step.tree.row_to_node + rows.size - 1,
    )

    def lens() -> list[object]:
        return [np.repeat(rows.levels[0].lens, rows.size), rows.lens_on_device]

    plan = rows.step.plans.get(apart, [level, kv[1]], q.shape[2], lens)
    return cast("Tensor", plan.run(q, [level, kv[1]], **options))


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that `run` takes, device work included, and what it returns."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    began = time.perf_counter()
    out = run()
    wait()
    return time.perf_counter() - began, out


def table(rows: Sequence[Row], heading: bool = True) -> str:
    """Return rows as text."""
    names = [
        "batch",
        "prefix",
        "prefill s",
        "ours",
        "attn off",
        "per seq.",
        "TB/s",
        "HF",
        "bound",
        "tokens/s",
    ]
    lines = ["".join(name.rjust(10) for name in names)] if heading else []
    for row in rows:
        rates = [row.ours, row.attention_off, row.per_sequence_read]
        cells = [f"{row.batch:,}", f"{row.prefix:,}", f"{row.prefill_s:.2f}", *(f"{x:,.0f}" for x in rates)]
        cells += [f"{row.read_tb_s:.2f}", *(_or_dash(x) for x in (row.hf_generate, row.bound)), row.model]
        lines.append("".join(cell.rjust(10) for cell in cells[:-1]) + "  " + cells[-1])
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the table; empty where a way does not fit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            values = [getattr(row, name) for name in COLUMNS]
            writer.writerow(["" if x is None else f"{x:.1f}" if isinstance(x, float) else x for x in values])


def _or_dash(x: float | None) -> str:
    return "-" if x is None else f"{x:,.0f}"
