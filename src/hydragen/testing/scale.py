"""Trees by the hundred thousand: an implementation against the oracle on its own device, in batches.

    python -m hydragen.testing.scale --implementation my_module:my_function --cases 100000 --seconds 540

One case is one root with its tree. A batch is a forest of many cases in one call, judged row by row
(`hydragen.testing.batch`). Batches take turns with a fixed number of configurations (dtype, heads, options),
so that kernels are compiled once and used again.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from hydragen.testing.batch import check_oracle, judge_rows
from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.conformance.readers import parsed
from hydragen.testing.conformance.report import device_name, versions
from hydragen.testing.conformance.subject import adapt, load
from hydragen.testing.device_inputs import draw_inputs
from hydragen.testing.forests import Forest, configurations, draw_forest, inputs_for
from hydragen.testing.judge import Implementation, run_in_place
from hydragen.testing.outcome import Outcome, number_or_inf
from hydragen.testing.problem import Problem
from hydragen.testing.shrink import shrink
from hydragen.testing.warm import warm_up

ORACLE_CASES = 3  # of each configuration's first batch are held to the NumPy oracle as well
SHOWN_FAILURES = 5
SHRINK_SECONDS = 20.0  # for each of them: every smaller head is another kernel to compile


def run_scale(
    implementation: Implementation,
    can: Capabilities,
    *,
    cases: int,
    seed: int = 0,
    seconds: float = math.inf,
    batch: int = 500,
    num_configurations: int = 24,
    say: Callable[[str], None] = lambda _: None,
    outcome: Outcome | None = None,
) -> Outcome:
    """Judge batches until there were `cases` of them or the time is up.

    Parameters
    ----------
    implementation
        As for `run`; its results stay on the device where they are.
    can
        What it can do; ``can.device`` is where it is given its tensors.
    batch
        Cases of a call.
    say
        Takes a line of progress now and then.
    outcome
        Where to count, for who wants to know even if the run is ended from outside.

    Raises
    ------
    ValueError
        If the implementation takes one tree alone: batches are forests.
    """
    ends = time.monotonic() + seconds
    began = time.monotonic()
    outcome = Outcome(seed) if outcome is None else outcome
    chosen = configurations(can, num_configurations, np.random.default_rng(seed))
    while outcome.cases + outcome.refused < cases and time.monotonic() < ends:
        number = outcome.batches
        wanted = min(batch, cases - outcome.cases - outcome.refused)
        with outcome.phase("draw", can.device):
            # each batch has a generator of its own: one alone can be drawn again
            rng = np.random.default_rng([seed, number])
            forest = draw_forest(can, chosen[number % len(chosen)], wanted, rng)
        first = number < len(chosen)
        if first:
            with outcome.phase("oracle_check", can.device):
                _check_the_oracle(forest, can.device, outcome)
        _judge(implementation, forest, number, first, can, ends, outcome)
        outcome.seconds = time.monotonic() - began
        if outcome.batches % len(chosen) == 0 or outcome.cases >= cases:
            say(f"{outcome.cases:,} cases, {outcome.failures} failures, {outcome.seconds:.0f} s")
    return outcome


def _check_the_oracle(forest: Forest, device: str, outcome: Outcome) -> None:
    for number in range(min(ORACLE_CASES, len(forest.roots))):
        case = forest.case(number)
        outcome.oracle_apart = max(outcome.oracle_apart, check_oracle(case, case.tensors(), device))
        outcome.oracle_cases += 1


def _judge(
    implementation: Implementation,
    forest: Forest,
    number: int,
    first: bool,
    can: Capabilities,
    ends: float,
    outcome: Outcome,
) -> None:
    problem, count = forest.problem, len(forest.roots)
    with outcome.phase("tensors", can.device):
        inputs = draw_inputs(problem, can.device)
        lent = inputs_for(forest, inputs)
    outcome.batches += 1
    try:
        with outcome.phase("first_calls" if first else "calls", can.device):
            out, lse = run_in_place(implementation, problem, lent)
        with outcome.phase("judge", can.device):
            judged = judge_rows(problem, inputs, out, lse)
    except NotImplementedError:
        outcome.refused += count
        return
    except Exception as error:  # noqa: BLE001 - whatever it raises is a failure of all that it was given
        outcome.cases += count
        outcome.failures += count
        if len(outcome.shown) < SHOWN_FAILURES:
            outcome.shown.append({"batch": number, "error": f"{type(error).__name__}: {error}"[:2000]})
        return
    outcome.cases += count
    outcome.rows += problem.num_rows
    outcome.tally.add(problem, "out", float(judged.out.max()))
    if lse is not None:
        outcome.tally.add(problem, "lse", float(judged.lse.max()))
    failing = sorted({forest.case_of_row[row] for row in judged.failing_rows})
    outcome.failures += len(failing)
    for case in failing[: SHOWN_FAILURES - len(outcome.shown)]:
        rows = [row for row, of in enumerate(forest.case_of_row) if of == case]
        over = {
            "out": number_or_inf(float(judged.out[rows].max())),
            "lse": number_or_inf(float(judged.lse[rows].max())),
        }
        with outcome.phase("shrink", can.device):
            smallest, call = _smallest(implementation, forest, case, can, ends)
        outcome.shown.append(
            {"batch": number, "case": case, "over_budget": over, "problem": smallest, "reproduce": call}
        )


def _smallest(
    implementation: Implementation, forest: Forest, case: int, can: Capabilities, ends: float
) -> tuple[str, str]:
    """The case alone, shrunk if it fails alone as well, and a law that shows it.

    Its values are not those that it had in the batch.
    """
    ends = min(ends, time.monotonic() + SHRINK_SECONDS)
    whole = forest.case(case)

    @cache  # asked once for each: a function with a race may answer otherwise the next time
    def fails(problem: Problem) -> bool:
        if problem != whole and (not can.allows(problem) or time.monotonic() > ends):
            return False
        inputs = problem.tensors().to(can.device)
        alone = Forest(problem, (0,) * problem.num_rows, (0,), forest.page_size)
        try:
            out, lse = run_in_place(implementation, problem, inputs_for(alone, inputs))
            return bool(judge_rows(problem, inputs, out, lse).failing_rows)
        except Exception:  # noqa: BLE001 - another failure than the one to be shown
            return False

    if not fails(whole):
        return f"{whole!r} (only together with the rest of its batch)", ""
    problem = shrink(whole, fails, max_runs=100)
    if forest.page_size:
        call = f"laws.paging_changes_nothing(fn, {problem!r}, {forest.page_size})"
        return f"{problem!r} (in pages of {forest.page_size})", call
    return repr(problem), f"laws.matches_oracle(fn, {problem!r})"


def main(arguments: list[str] | None = None, **facts: str) -> int:
    """Read the command line, run, write JSON with `facts`; 1 unless all cases were run and none failed."""
    given = _parser().parse_args(arguments)
    try:
        function = load(given.implementation)
        can = Capabilities().changed(getattr(function, "capabilities", {}), given.implementation)
        can = can.changed(parsed(given.capability, "--capability"), "--capability")
        can.check()
    except ValueError as error:
        _parser().error(str(error))
    sizes = {"seed": given.seed, "num_configurations": given.configurations, "batch": given.batch}
    outcome = Outcome(given.seed)
    began = time.monotonic()
    # ended from outside (timeout sends this): what was found until then is written down all the same
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"ended after {outcome.cases:,} cases"))
    try:
        if given.warm:
            limit = given.seconds / 3
            outcome.phases["warm_up"] = warm_up(
                given.implementation, can, **sizes, processes=given.warm, seconds=limit
            )
        run_scale(
            adapt(function, can),
            can,
            **sizes,
            cases=given.cases,
            seconds=given.seconds - (time.monotonic() - began),
            say=lambda line: print(line, flush=True),
            outcome=outcome,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
        complete = outcome.cases >= given.cases
        report = {
            **outcome.as_dict(),
            "complete": complete,
            "configurations_tried": min(outcome.batches, given.configurations),
            "total_seconds": round(time.monotonic() - began, 1),
            "implementation": given.implementation,
            "capabilities": can.said(),
            **sizes,
            "device": device_name(),
            "versions": versions(),
            **facts,
        }
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print("\n".join(outcome.lines()), flush=True)
        if outcome.batches < given.configurations:
            tried = f"{outcome.batches} of {given.configurations} configurations were tried"
            print(f"{tried}: a configuration takes {given.batch} cases (--batch)", flush=True)
    return int(outcome.failures > 0 or not complete or outcome.oracle_apart > 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--implementation", required=True, metavar="MODULE:FUNCTION", help="as in docs/conformance.md")
    add("--capability", action="append", default=[], metavar="NAME=VALUE", help="what it can do; repeatable")
    add("--cases", type=int, default=100_000, help="trees in all (default %(default)s)")
    seconds = "begins no batch after so many, so it ends a batch later (default %(default)s)"
    add("--seconds", type=float, default=540.0, help=seconds)
    add("--seed", type=int, default=0, help="of all that is drawn (default %(default)s)")
    add("--batch", type=int, default=500, help="trees of a call (default %(default)s)")
    configurations_ = "of dtype, heads and options; batches take turns with them (default %(default)s)"
    add("--configurations", type=int, default=24, help=configurations_)
    add("--warm", type=int, default=0, help="processes that compile kernels beforehand (default none)")
    add("--json", type=Path, help="write what was found there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
