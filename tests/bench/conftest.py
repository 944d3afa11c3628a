"""One GPU, one timer and one set of facts for all cells of a run."""

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cell import Bench, check, measure
from facts import ceilings, machine
from pytest_benchmark.logger import PytestBenchmarkWarning
from shapes import Shape
from suites import WITH_FLEX
from timing import GpuTimer, report

BEGAN = time.monotonic()
# Copies of keys and values may take this part of the device's memory; what we hold ourselves is small.
COPIES = 0.6


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Bench:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    timer = GpuTimer()
    facts = machine(device)
    if not pytestconfig.getoption("benchmark_disable"):
        facts["ceilings"] = ceilings(timer, device)
        say(pytestconfig, "  ".join(f"{name} {value}" for name, value in facts.items()))
        say(pytestconfig, "times on the device; in brackets our time over theirs")
    return Bench(device, timer, facts, COPIES * torch.cuda.get_device_properties(device).total_memory)


@pytest.fixture
def run_cell(benchmark: Any, bench: Bench, pytestconfig: pytest.Config) -> Callable[[Shape], None]:
    """Measure a shape and hand its times to pytest-benchmark."""

    def run(shape: Shape) -> None:
        limit = float(os.environ.get("HYDRAGEN_BENCH_SECONDS", "inf"))
        if time.monotonic() - BEGAN > limit:
            pytest.skip(f"not started within {limit:.0f} s; run it again with -k")
        if benchmark.disabled:
            check(shape, bench)
            report(benchmark, [0.0])
            return
        cell = measure(shape, bench, with_flex=shape.name in WITH_FLEX)
        benchmark.extra_info.update(cell.info)
        report(benchmark, cell.samples)
        say(pytestconfig, line(cell.info))

    return run


def pytest_configure() -> None:
    # That nothing was timed is said in pytest's last hook: as an error it would hide what went wrong before.
    warnings.filterwarnings("default", category=PytestBenchmarkWarning)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU leave our cells out, unless asked for alone: a hundred skipped tests say no more."""
    cells = [item for item in items if "run_cell" in getattr(item, "fixturenames", ())]
    if cells and len(cells) < len(items) and not torch.cuda.is_available():
        config.hook.pytest_deselected(items=cells)
        items[:] = [item for item in items if item not in cells]


def line(info: dict[str, Any]) -> str:
    """A cell in one line."""
    parts = [
        f"{info['shape']:32}{info['us']:9.1f} us {info['times_roof']:6.2f} x roof",
        f"host {info['host_us']['run']:.0f}",
    ]
    if peer := info.get("best_peer_of_another_run"):
        parts.append(f"best peer {peer['us']} ({peer['time_ratio']:.2f})")
    for name, entry in info["baselines"].items():
        parts.append(f"{name} {entry['us']} ({entry['time_ratio']:.2f})" if "us" in entry else f"{name} -")
    return "  ".join(parts)


def say(config: pytest.Config, text: str) -> None:
    """Write a line at once: a run takes minutes."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.ensure_newline()
        reporter.write_line(text)
