"""The smallest case of a law that failed, what is wrong with it, and how to run it again."""

from __future__ import annotations

from functools import cache

from hypothesis.errors import FailedHealthCheck, Unsatisfiable

from hydragen.testing import laws
from hydragen.testing.conformance.subject import session
from hydragen.testing.judge import Implementation
from hydragen.testing.problem import Problem
from hydragen.testing.shrink import shrink
from hydragen.testing.tally import Tally, said, tallied


def smallest(implementation: Implementation, tally: Tally, error: BaseException) -> dict[str, str]:
    """The case with which Hypothesis ends, shrunk further where the oracle alone shows that it fails.

    Parameters
    ----------
    tally : Tally
        Of the law; what failed last is the case, None if none was run.
    error : exception
        That ended it.

    Returns
    -------
    dict
        ``problem``: the smallest case, ``where``: what is wrong with it, ``call``: the law that shows it, as
        Python. Of a function that refused too many problems only what it said.
    """
    if tally.refused and isinstance(error, (FailedHealthCheck, Unsatisfiable)):
        where = (
            f"the function refused {tally.refused:,} problems ({tally.refusal or 'NotImplementedError'}) and "
            f"did {tally.cases:,}: say by --capability what it cannot do"
        )
        return {"problem": "", "where": where, "call": ""}

    # A function that answers otherwise the next time (a race) is asked about each problem once: what has
    # failed has failed.
    @cache
    def wrong(problem: Problem) -> str:
        if not (session.capabilities.allows(problem) and session.known.allows(problem)):
            return ""
        with tallied() as seen:
            try:
                laws.matches_oracle(implementation, problem)
            except AssertionError as failure:
                return seen.where or said(failure)
            except (Exception, SystemExit):  # noqa: BLE001 - another failure, or a problem that the function refuses
                return ""
        return ""

    last, where, call = tally.failed or (tally.last, tally.where or said(error), tally.call)
    if last is None:
        return {"problem": "", "where": where, "call": ""}
    if wrong(last):
        last = shrink(last, lambda problem: wrong(problem) != "", max_runs=200)
        where, call = wrong(last), f"laws.matches_oracle(fn, {last!r})"
    return {"problem": repr(last), "where": where, "call": call}
