"""What the judge has seen: how many results, how near they came to their budgets, and what failed last."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec

from hydragen.testing.problem import Problem

_P = ParamSpec("_P")

COUNTS = ("cases", "refused", "without_lse")


@dataclass
class Tally:
    """Counts over any number of verdicts.

    Attributes
    ----------
    cases
        Results of an implementation that were compared with the oracle.
    refused
        Problems that it would not do (NotImplementedError).
    without_lse
        Results among `cases` that had no lse to judge.
    worst
        Largest error as a multiple of its budget (1 is the border), by dtype and by ``"out"`` or ``"lse"``.
    last
        The problem that an implementation was last run on.
    where
        What the last comparison outside of the budget said first.
    call
        The law that was tried last, with its arguments, as Python; ``fn`` stands for the implementation.
    failed
        `last`, `where` and `call` of the law that failed last: of several examples that are written down
        (Hypothesis tries them all), the last one run need not be one that fails.
    refusal
        What the last refusal said.
    """

    cases: int = 0
    refused: int = 0
    without_lse: int = 0
    worst: dict[str, dict[str, float]] = field(default_factory=dict)
    last: Problem | None = None
    where: str = ""
    call: str = ""
    failed: tuple[Problem | None, str, str] | None = None
    refusal: str = ""

    def add(self, problem: Problem, name: str, ratio: float) -> None:
        """Count the error of ``out`` or ``lse`` of one result."""
        of_dtype = self.worst.setdefault(str(problem.dtype).removeprefix("torch."), {})
        of_dtype[name] = max(of_dtype.get(name, 0.0), ratio)

    def merge(self, other: dict[str, Any]) -> None:
        """Add what another tally said by `as_dict`."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + other[name])
        for dtype, of_dtype in other["worst"].items():
            mine = self.worst.setdefault(dtype, {})
            for name, ratio in of_dtype.items():
                mine[name] = max(mine.get(name, 0.0), float(ratio))

    def as_dict(self) -> dict[str, Any]:
        """Counts as numbers and strings."""
        worst = {dtype: dict(names) for dtype, names in self.worst.items()}
        return {**{name: getattr(self, name) for name in COUNTS}, "worst": worst}


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


def saw_refusal(said: str) -> None:
    """An implementation would not do a problem."""
    for tally in _open:
        tally.refused += 1
        tally.refusal = said


def said(error: BaseException) -> str:
    """The first line of what an exception says."""
    return str(error).partition("\n")[0] or f"{type(error).__name__} without a message"


def told(law: Callable[_P, None]) -> Callable[_P, None]:
    """Make a law say how it is called, so that a failure can be repeated outside of the suite."""

    @functools.wraps(law)
    def telling(*args: _P.args, **kwargs: _P.kwargs) -> None:
        __tracebackhide__ = True
        if _open:
            given = [*map(repr, args[1:]), *(f"{name}={value!r}" for name, value in kwargs.items())]
            for tally in _open:
                tally.call, tally.where = f"laws.{law.__name__}(fn, {', '.join(given)})", ""
        try:
            law(*args, **kwargs)
        except Exception as error:
            for tally in _open:
                tally.failed = tally.last, tally.where or said(error), tally.call
            raise

    return telling


def saw_result(problem: Problem, ratios: dict[str, float], failure: str) -> None:
    """A result was compared; ``failure`` is empty if it is within its budget.

    `ratios` is empty where two results were compared with each other, and not with the oracle.
    """
    for tally in _open:
        tally.cases += 1
        tally.without_lse += bool(ratios) and "lse" not in ratios
        for name, ratio in ratios.items():
            tally.add(problem, name, ratio)
        if failure:
            tally.where = failure
