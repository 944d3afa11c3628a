"""One cell of the results: a shape, checked, then timed beside everybody else."""

import gc
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from contenders import Contender, Form, UnavailableError, contenders, ours
from exact import Truth, assert_exact, solve
from plan_host import host_costs, planned
from shapes import PEERS, Inputs, Shape, build
from timing import HostTimer, sample


class Cell(NamedTuple):
    """Our times in seconds, and what else is to be known about them."""

    samples: list[float]
    info: dict[str, Any]


class Bench(NamedTuple):
    """What all cells of a run have in common; `limit`: bytes that copies of keys and values may take."""

    device: torch.device
    timer: Any
    facts: dict[str, Any]
    limit: float

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what the last cell held: the next one may need all of the memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def check(shape: Shape, bench: Bench, run: Callable[[Inputs], Form] = ours) -> tuple[Inputs, Form, Truth]:
    """Inputs, our call and the truth about it; AssertionError if the result is wrong."""
    bench.free()
    inputs = build(shape, bench.device)
    call, truth = run(inputs), solve(inputs)
    assert_exact(truth, call(), "hydragen")
    return inputs, call, truth


def measure(
    shape: Shape, bench: Bench, *, with_flex: bool = False, run: Callable[[Inputs], Form] = ours
) -> Cell:
    """Check, then time. A contender that cannot take part or is wrong is named, with the reason and no time.

    Raises
    ------
    AssertionError
        If our own result is wrong: there is no time for it.
    """
    inputs, call, truth = check(shape, bench, run)
    with torch.no_grad():
        host = host_costs(inputs, call, bench.synchronize)
        others = contenders(inputs, bench.limit, with_flex)
        admitted, reasons = admit(others, truth, bench.timer)
        invariant = planned(inputs, batch_invariant=True)
        assert_exact(truth, invariant(), "batch_invariant")
        own = {("hydragen", ""): call, ("hydragen", "batch_invariant"): invariant}
        samples = sample(bench.timer, {key: bench.timer.ready(run) for key, run in own.items()} | admitted)
    medians = {key: statistics.median(times) for key, times in samples.items()}
    seconds, invariant_seconds = (medians.pop(key) for key in own)
    baselines: dict[str, dict[str, Any]] = {}
    for other in others:
        forms = {form: t for (name, form), t in medians.items() if name == other.name}
        entry: dict[str, Any] = {"shares": other.shares}
        if forms:
            best = min(forms, key=forms.__getitem__)
            entry |= {"us": us(forms[best]), "form": best, "rounds": len(samples[other.name, best])}
            entry["time_ratio"] = ratio(seconds, forms[best])
        if not forms or len(reasons.get(other.name, {})):
            entry["left_out"] = reasons.get(other.name, {})
        baselines[other.name] = entry
    return Cell(
        samples[("hydragen", "")],
        {
            "shape": shape.name,
            "us": us(seconds),
            "roof_us": round(shape.roof_us, 3),
            "times_roof": ratio(seconds, shape.roof_us * 1e-6),
            "tflops": round(shape.flops / seconds / 1e12, 1),
            "tbs": round(shape.num_bytes / seconds / 1e12, 3),
            "host_us": host,
            "batch_invariant_us": us(invariant_seconds),
            "checked_rows": len(truth.rows),
            "baselines": baselines,
            **compared(shape.name, seconds, baselines, bench.facts["device"]),
            "run": bench.facts,
        },
    )


def admit(
    others: list[Contender], truth: Truth, timer: Any
) -> tuple[dict[Any, Any], dict[str, dict[str, str]]]:
    """Forms ready to be timed, by (contender, form), and why others are not, by contender and form."""
    admitted: dict[Any, Any] = {}
    reasons: dict[str, dict[str, str]] = {other.name: {} for other in others}
    for other in others:
        try:
            forms = other.forms()
        except Exception as error:  # noqa: BLE001 - torch raises what it likes; the run goes on, the reason is kept
            reasons[other.name]["all"] = reason(error)
            continue
        for form, call in forms.items():
            try:
                assert_exact(truth, call(), other.name)
                admitted[other.name, form] = timer.ready(call)
            except Exception as error:  # noqa: BLE001 - the same
                reasons[other.name][form] = reason(error)
    return admitted, reasons


def reason(error: Exception) -> str:
    """One line."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return text if isinstance(error, UnavailableError | AssertionError) else f"{type(error).__name__}: {text}"


def compared(name: str, seconds: float, baselines: dict[str, dict[str, Any]], device: str) -> dict[str, Any]:
    """Beside the fastest that does not share; on an H200 also beside the best peer, of another run."""
    found: dict[str, Any] = {}
    unshared = {key: entry["us"] for key, entry in baselines.items() if not entry["shares"] and "us" in entry}
    if unshared:
        best = min(unshared, key=unshared.__getitem__)
        found["best_unshared"] = {
            "name": best,
            "us": unshared[best],
            "time_ratio": ratio(seconds, unshared[best] * 1e-6),
        }
    if name in PEERS and "H200" in device:
        _, best_peer, best_us = PEERS[name]
        found["best_peer_of_another_run"] = {
            "name": best_peer,
            "us": best_us,
            "time_ratio": ratio(seconds, best_us * 1e-6),
            "source": "tests/bench/peers_h200.csv: another run, a machine of the same type",
        }
    return found


def us(seconds: float) -> float:
    return round(seconds * 1e6, 2)


def ratio(ours: float, theirs: float) -> float:
    """Our time over theirs: below 1 we are faster."""
    return round(ours / theirs, 4)


def cpu_bench() -> Bench:
    """The same on a CPU: for tests of what is written here, not for numbers."""
    return Bench(torch.device("cpu"), HostTimer(), {"device": "cpu"}, 1e9)
