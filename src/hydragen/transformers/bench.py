"""The end-to-end table: decode throughput of a model over one shared prefix, and what else one could do."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from hydragen.explain import explain
from hydragen.transformers.arms import FirstLevelOnly, attention_replaced, per_sequence, switched_off
from hydragen.transformers.batches import bytes_per_token
from hydragen.transformers.cache import PrefixCache
from hydragen.transformers.decode import State, Step
from hydragen.transformers.sampling import Sampling
from hydragen.transformers.support import text_config
from hydragen.tree import PrefixTree

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


def measure_tree(
    model: PreTrainedModel, case: Case, branches: int, branch_tokens: int
) -> tuple[float, float, float]:
    """Measure two levels of sharing: decode tokens per second of case.batch answers.

    Under case.prefix shared tokens hang `branches` nodes of `branch_tokens` each, and under each of them as
    many answers.

    Returns
    -------
    ours, first_level_only, attention_off : float
        Both levels shared; only the first one; attention switched off.
    """
    if case.batch % branches:
        raise ValueError(f"batch must be a multiple of the {branches} branches, got {case.batch}; change one")
    numbers = np.random.default_rng(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    trunk = PrefixCache(model).prefill(numbers.integers(0, vocabulary, case.prefix)).fork(branches)
    trunk.extend(list(numbers.integers(0, vocabulary, (branches, branch_tokens))))
    ours = step_seconds(trunk, case)
    with attention_replaced(FirstLevelOnly()):
        first = step_seconds(trunk, case)
    with attention_replaced(switched_off):
        off = step_seconds(trunk, case)
    return case.batch / ours, case.batch / first, case.batch / off


def step_seconds(prefix: PrefixCache, case: Case) -> float:
    """Mean seconds of a decode step, over all steps after the warm-up."""
    device = prefix.model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the way before this one had
    cache = prefix.fork(case.batch // prefix.num_rows)
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


def append_csv(row: Row, path: Path) -> None:
    """Add a line to the table; empty where a way does not fit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        values = [getattr(row, name) for name in COLUMNS]
        writer.writerow(["" if x is None else f"{x:.1f}" if isinstance(x, float) else x for x in values])


def measured(path: Path | None) -> set[Case]:
    """Return the cases that a table has."""
    if path is None or not path.exists():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {Case(x["model"], int(x["batch"]), int(x["prefix"]), int(x["completion"])) for x in rows}


def _or_dash(x: float | None) -> str:
    return "-" if x is None else f"{x:,.0f}"
