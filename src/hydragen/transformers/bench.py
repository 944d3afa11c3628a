"""The end-to-end benchmark: decode throughput of a model over shared tokens, and what else one could do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hydragen.transformers.arms import FirstLevelOnly, attention_replaced, per_sequence, switched_off
from hydragen.transformers.attention import read_as_usual
from hydragen.transformers.batches import bytes_per_token
from hydragen.transformers.bench_cases import Case, Prefixes, free_bytes, release
from hydragen.transformers.bench_files import Results
from hydragen.transformers.cache import PrefixCache
from hydragen.transformers.layers import PrefixLayer
from hydragen.transformers.ordinary import ordinary_bytes, ordinary_step
from hydragen.transformers.parallel import smallest
from hydragen.transformers.support import max_positions
from hydragen.transformers.timing import StepTime, roof_seconds, time_step, timed

# Seconds to measure one way of one case, where a step does not take longer
SECONDS = 0.5
# A case begins only if this many seconds are left: the longest takes about as much.
LAST_START = 20.0
# Beside weights, prefix and the rows' own tokens: activations, tables and partial results
_SPARE = 2 * 2**30

Way = Callable[[PrefixLayer, Tensor, dict[str, Any]], Tensor]


@dataclass
class Row:
    """What was measured of a case: decode tokens per second of each way; None where it does not fit.

    Attributes
    ----------
    bound : float or None
        Attention switched off plus the attention's own roof; None on a CPU, whose roof is not known.
    first_level_only : float or None
        With two levels: sharing the first only.
    prefill_s : float
        Seconds to run the prefix once.
    read_tb_s : float or None
        What the per-sequence way reads of keys and values, in the time that it takes longer than attention
        switched off, terabytes per second: caches included, so it may exceed the memory's.
    details : dict
        Step times, the attention's roof, memory, and why something was left out.
    """

    case: Case
    prefill_s: float
    ours: float | None = None
    attention_off: float | None = None
    per_sequence_read: float | None = None
    hf_generate: float | None = None
    bound: float | None = None
    first_level_only: float | None = None
    read_tb_s: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


def measure(prefixes: Prefixes, case: Case) -> Row:
    """Measure all ways for one case; one that fails is left out, with the reason in `details`."""
    device, most = prefixes.model.device, max_positions(prefixes.model)
    positions = case.prefix + case.branch + case.completion
    if most is not None and positions > most:
        raise ValueError(
            f"prefix must leave room for the completion in the model's {most} positions, got {positions} in "
            "all; shorten it"
        )
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prefill_s, prefix = prefixes.of(case)
    row = Row(case, prefill_s)
    row.details = {"left_out": {}, "bytes_per_token": bytes_per_token(prefix)}
    # All ways share the memory of the rows' own tokens.
    needed = row.details["bytes_per_token"] * case.batch * case.completion + _SPARE
    if not _fits(prefixes.model, needed):
        prefixes.keep_only(case)
        release(device)
    if not _fits(prefixes.model, needed):
        free = free_bytes(device) / 2**30
        row.details["left_out"]["all"] = f"needs {needed / 2**30:,.1f} GiB, {free:,.1f} GiB are free"
        return row
    _time_ways(row, prefix.fork(case.batch // prefix.num_rows))
    release(device)
    if device.type == "cuda":
        row.details["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    if case.hf:
        _measure_ordinary(row, prefixes)
    return row


def _fits(model: PreTrainedModel, needed: float) -> bool:
    """Whether every process of the model has so much memory."""
    return bool(smallest(model, int(free_bytes(model.device) >= needed)))


def _time_ways(row: Row, cache: PrefixCache) -> None:
    """Time the ways over what one fork holds, one after another."""
    case, device, left_out = row.case, cache.model.device, row.details["left_out"]
    third: tuple[str, Way] = ("per_sequence_read", per_sequence)
    if case.branches:
        third = "first_level_only", FirstLevelOnly()
    times: dict[str, StepTime] = {}
    for name, way in (("ours", read_as_usual), ("attention_off", switched_off), third):
        with attention_replaced(way):
            found = _unless_it_fails(lambda: time_step(cache, case.completion, SECONDS), left_out, name)
        if found is None:
            cache.reset()  # a forward pass may have broken off halfway
        else:
            times[name] = found
            setattr(row, name, case.batch / found.seconds)
            if name == "ours":
                row.details["roof_s"] = roof_seconds(cache, found.lengths)
        release(device)
    row.details["step"] = {name: vars(found) for name, found in times.items()}
    _compare(row, times)
    if case.whole:
        cache.reset()
        row.details["whole"] = _unless_it_fails(lambda: _whole(cache, case), left_out, "whole")


def _compare(row: Row, times: dict[str, StepTime]) -> None:
    """Fill in what follows from several ways."""
    roof, off, apart = row.details.get("roof_s"), times.get("attention_off"), times.get("per_sequence_read")
    if off is not None and roof is not None:
        row.bound = row.case.batch / (off.seconds + roof)
    if off is not None and apart is not None:
        tokens = row.case.prefix + sum(apart.lengths) / len(apart.lengths)
        read = row.details["bytes_per_token"] * row.case.batch * tokens
        row.read_tb_s = read / max(apart.seconds - off.seconds, 1e-9) / 1e12


def run(
    cases: Iterable[Case],
    make: Callable[[str], PreTrainedModel],
    results: Results,
    *,
    seconds: float = float("inf"),
    say: Callable[[str], None] = print,
) -> None:
    """Measure cases in order and write each down at once; those that `results` has are not measured again.

    Parameters
    ----------
    cases : iterable of Case
        Those of one model side by side: one model lives at a time.
    make : callable
        Makes the model of a name.
    results : Results
    seconds : float
        How long all may take: a case begins only while there is time.
    say : callable
        Is told each row as text.
    """
    began = time.perf_counter()
    prefixes: Prefixes | None = None
    for case in cases:
        if results.has(case.key):
            continue
        in_time = time.perf_counter() - began <= max(seconds - LAST_START, seconds / 2)
        if prefixes is not None:
            in_time = bool(smallest(prefixes.model, int(in_time)))  # in step with the other processes
        if not in_time:
            say(results.leave_out(case, f"no time: {seconds:.0f} s in all"))
            continue
        try:
            if prefixes is None or prefixes.name != case.model:
                prefixes = None  # the memory of the one before
                release(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
                start = time.perf_counter()
                prefixes = Prefixes(case.model, make(case.model))
                results.note(f"{case.model}: made in {time.perf_counter() - start:.1f} s")
            say(results.add(measure(prefixes, case)))
        except (RuntimeError, MemoryError) as error:
            say(results.leave_out(case, _reason(error)))
    results.finish(time.perf_counter() - began)


def _whole(cache: PrefixCache, case: Case) -> float:
    """Tokens per second of whole completions by `generate`, but for the first, which the prefill gives."""

    def complete() -> None:
        cache.generate(max_new_tokens=case.completion, stop_token_ids=[])

    return case.batch * (case.completion - 1) / timed(complete, cache.model.device)[0]


def _measure_ordinary(row: Row, prefixes: Prefixes) -> None:
    case, device, left_out = row.case, prefixes.model.device, row.details["left_out"]
    tokens = case.prefix + case.completion
    needed = ordinary_bytes(prefixes.model, row.details["bytes_per_token"], case.batch, tokens)
    if needed > 0.9 * free_bytes(device):
        left_out["hf_generate"] = f"needs {needed / 2**30:,.1f} GiB"
        return
    found = _unless_it_fails(
        lambda: ordinary_step(prefixes.model, prefixes.prompt(case.prefix), case.batch, case.completion),
        left_out,
        "hf_generate",
    )
    if found is not None:
        row.hf_generate = case.batch / found["seconds"]
        row.details["hf_generate"] = found


def _unless_it_fails(run: Callable[[], Any], left_out: dict[str, str], name: str) -> Any:
    """Return what `run` returns, or None and note the reason: running out of memory is a finding."""
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        left_out[name] = _reason(error)
        return None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
