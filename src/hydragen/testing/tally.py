"""What the judge has seen: how many results, how near they came to their budgets, and what failed last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hydragen.testing.problem import Problem


@dataclass
class Tally:
    """Counts over any number of verdicts.

    Attributes
    ----------
    cases
        Results of an implementation that were compared with the oracle.
    worst
        Largest error as a multiple of its budget (1 is the border), by dtype and by ``"out"`` or ``"lse"``.
    last
        The problem that an implementation was last run on.
    where
        What the last comparison outside of the budget said first.
    """

    cases: int = 0
    worst: dict[str, dict[str, float]] = field(default_factory=dict)
    last: Problem | None = None
    where: str = ""

    def add(self, problem: Problem, name: str, ratio: float) -> None:
        """Count the error of ``out`` or ``lse`` of one result."""
        of_dtype = self.worst.setdefault(str(problem.dtype).removeprefix("torch."), {})
        of_dtype[name] = max(of_dtype.get(name, 0.0), ratio)

    def merge(self, other: dict[str, Any]) -> None:
        """Add what another tally said by `as_dict`."""
        self.cases += other["cases"]
        for dtype, of_dtype in other["worst"].items():
            mine = self.worst.setdefault(dtype, {})
            for name, ratio in of_dtype.items():
                mine[name] = max(mine.get(name, 0.0), float(ratio))

    def as_dict(self) -> dict[str, Any]:
        """Counts as numbers and strings."""
        return {"cases": self.cases, "worst": {dtype: dict(names) for dtype, names in self.worst.items()}}


_open: list[Tally] = []


@contextmanager
def tallied() -> Iterator[Tally]:
    """Count every verdict of the block in a tally of its own."""
    tally = Tally()
    _open.append(tally)
    try:
        yield tally
    finally:
        _open.remove(tally)


def saw_run(problem: Problem) -> None:
    """An implementation is about to run."""
    for tally in _open:
        tally.last = problem


def saw_result(problem: Problem, ratios: dict[str, float], failure: str) -> None:
    """A result was compared with the oracle; ``failure`` is empty if it is within its budget."""
    for tally in _open:
        tally.cases += 1
        for name, ratio in ratios.items():
            tally.add(problem, name, ratio)
        if failure:
            tally.where = failure
