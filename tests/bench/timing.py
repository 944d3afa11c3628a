"""Time on the device: CUDA graphs replayed with a cold L2 cache, between two events.

A timer has two methods, so that tests can put another in its place: `ready(run)` returns what is to be timed,
`time(ready)` the seconds of one go of it.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Run = Callable[[], Any]


class Clock:
    """A clock for pytest-benchmark that moves only when told to: its statistics are of what was measured.

    >>> clock = Clock()
    >>> clock.advance(0.25)
    >>> clock()
    0.25
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


CLOCK = Clock()


def report(benchmark: Any, samples: list[float]) -> None:
    """Hand measured seconds to pytest-benchmark, one a round. The test must be marked with `timer=CLOCK`."""
    remaining = iter(samples)
    # Rounds must not add up to where a float has no room for nanoseconds.
    CLOCK.seconds = 0.0
    benchmark.pedantic(lambda: CLOCK.advance(next(remaining, 0.0)), rounds=len(samples), iterations=1)


class Captured(NamedTuple):
    """A graph, and what it runs: that holds the tensors whose addresses the graph has."""

    graph: torch.cuda.CUDAGraph
    run: Run

    def replay(self) -> None:
        self.graph.replay()


class GpuTimer:
    """Seconds between two CUDA events around the replay of a graph, an empty graph's few µs included."""

    def __init__(self, flush_bytes: int = 256 << 20) -> None:
        # Evicted by reads: what is written would still be on its way to memory while the next kernel runs.
        self.buffer = torch.zeros(flush_bytes // 4, dtype=torch.float32, device="cuda")
        self.sink = torch.zeros((), dtype=torch.float32, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def ready(self, run: Run) -> Captured:
        """Run twice, which compiles, plans and allocates, and capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return Captured(graph, run)

    def time(self, ready: Captured) -> float:
        # The host records and replays while the device still reads the buffer: no gap between the events.
        torch.sum(self.buffer, dim=0, out=self.sink)
        self.start.record()
        ready.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3


class HostTimer:
    """Seconds of a call on the host: for devices without graphs."""

    def ready(self, run: Run) -> Run:
        run()
        return run

    def time(self, ready: Run) -> float:
        begin = time.perf_counter()
        ready()
        return time.perf_counter() - begin


def sample(
    timer: Any, ready: Mapping[str, Any], *, seconds: float = 0.06, least: int = 7, most: int = 60
) -> dict[str, list[float]]:
    """Times of each, by name: rounds for about `seconds`, in turn so that slow spells slow all of them."""
    first = {name: statistics.median(timer.time(this) for _ in range(3)) for name, this in ready.items()}
    rounds = {name: min(most, max(least, int(seconds / max(t, 1e-9)))) for name, t in first.items()}
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for number in range(max(rounds.values(), default=0)):
        for name, this in ready.items():
            if number < rounds[name]:
                samples[name].append(timer.time(this))
    return samples


def host_seconds(run: Run, synchronize: Run, calls: int = 40) -> float:
    """Median seconds until a call returns, whatever the device still has to do."""
    synchronize()
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    synchronize()
    return statistics.median(times)
