"""The smallest case of a law that failed, and what is wrong with it."""

from __future__ import annotations

from functools import cache

from hydragen.testing import laws
from hydragen.testing.conformance.subject import session
from hydragen.testing.judge import Implementation
from hydragen.testing.problem import Problem
from hydragen.testing.shrink import shrink
from hydragen.testing.tally import tallied


def smallest(implementation: Implementation, last: Problem | None, where: str) -> tuple[str, str]:
    """The case with which Hypothesis ends, shrunk further where the oracle alone shows that it fails.

    Parameters
    ----------
    last : Problem, optional
        The case; None if none was run.
    where : str
        What is wrong with it.

    Returns
    -------
    problem, where
        The smallest case, and what is wrong with that one.
    """

    # A function that answers otherwise the next time (a race) is asked about each problem once: what has
    # failed has failed.
    @cache
    def wrong(problem: Problem) -> str:
        if not (session.capabilities.allows(problem) and session.known.allows(problem)):
            return ""
        with tallied() as tally:
            try:
                laws.matches_oracle(implementation, problem)
            except AssertionError as error:
                return tally.where or str(error).partition("\n")[0] or "it fails"
            except Exception:  # noqa: BLE001 - another failure, or a problem that the function refuses
                return ""
        return ""

    if last is None:
        return "", where
    if wrong(last):
        last = shrink(last, lambda problem: wrong(problem) != "", max_runs=200)
        where = wrong(last)
    return repr(last), where
