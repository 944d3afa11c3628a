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
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hydragen.testing.batch import check_oracle, judge_rows
from hydragen.testing.conformance.capabilities import Capabilities, parsed
from hydragen.testing.conformance.report import device_name, versions
from hydragen.testing.conformance.subject import adapt, load
from hydragen.testing.forests import Forest, configurations, draw_forest
from hydragen.testing.judge import Implementation
from hydragen.testing.problem import Problem
from hydragen.testing.shrink import shrink
from hydragen.testing.tally import Tally

ORACLE_CASES = 3  # of each configuration's first batch are held to the NumPy oracle as well
SHOWN_FAILURES = 5


@dataclass
class Outcome:
    """What a run has found so far."""

    seed: int
    cases: int = 0
    failures: int = 0
    batches: int = 0
    rows: int = 0
    tally: Tally = field(default_factory=Tally)
    oracle_cases: int = 0
    oracle_apart: float = 0.0
    shown: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "cases": self.cases,
            "failures": self.failures,
            "seed": self.seed,
            "worst_over_budget": self.tally.as_dict()["worst"],
            "rows": self.rows,
            "batches": self.batches,
            "seconds": round(self.seconds, 1),
            "oracle_check": {"cases": self.oracle_cases, "worst_over_tolerance": self.oracle_apart},
            "first_failures": self.shown,
        }


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
    """
    began = time.monotonic()
    outcome = Outcome(seed)
    chosen = configurations(can, num_configurations, np.random.default_rng(seed))
    while outcome.cases < cases and time.monotonic() - began < seconds:
        number = outcome.batches
        # each batch has a generator of its own: one alone can be drawn again
        rng = np.random.default_rng([seed, number])
        forest = draw_forest(can, chosen[number % len(chosen)], min(batch, cases - outcome.cases), rng)
        if number < len(chosen):
            _check_the_oracle(forest, can.device, outcome)
        _judge(implementation, forest, number, can, outcome)
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
    implementation: Implementation, forest: Forest, number: int, can: Capabilities, outcome: Outcome
) -> None:
    problem = forest.problem
    inputs = problem.tensors().to(can.device)
    result = implementation(problem, inputs)
    out, lse = result if isinstance(result, tuple) else (result, None)
    judged = judge_rows(problem, inputs, out, lse)
    outcome.tally.add(problem, "out", float(judged.out.max()))
    if lse is not None:
        outcome.tally.add(problem, "lse", float(judged.lse.max()))
    failing = sorted({forest.case_of_row[row] for row in judged.failing_rows})
    outcome.batches += 1
    outcome.cases += len(forest.roots)
    outcome.rows += problem.num_rows
    outcome.failures += len(failing)
    for case in failing[: SHOWN_FAILURES - len(outcome.shown)]:
        rows = [row for row, of in enumerate(forest.case_of_row) if of == case]
        outcome.shown.append(
            {
                "batch": number,
                "case": case,
                "over_budget": {"out": float(judged.out[rows].max()), "lse": float(judged.lse[rows].max())},
                "problem": _smallest(implementation, forest.case(case), can),
            }
        )


def _smallest(implementation: Implementation, problem: Problem, can: Capabilities) -> str:
    """The case alone, shrunk if it fails alone as well; its values are not those that it had in the batch."""

    def fails(problem: Problem) -> bool:
        if not can.allows(problem):
            return False
        inputs = problem.tensors().to(can.device)
        result = implementation(problem, inputs)
        out, lse = result if isinstance(result, tuple) else (result, None)
        return bool(judge_rows(problem, inputs, out, lse).failing_rows)

    if not fails(problem):
        return f"{problem!r} (only together with the rest of its batch)"
    return repr(shrink(problem, fails, max_runs=100))


def main(arguments: list[str] | None = None, **facts: str) -> int:
    """Read the command line, run, write JSON with `facts`; 1 unless all cases were run and none failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--implementation", required=True, metavar="MODULE:FUNCTION")
    parser.add_argument("--capability", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--configurations", type=int, default=24)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    function = load(given.implementation)
    can = Capabilities().changed(getattr(function, "capabilities", {}), given.implementation)
    can = can.changed(parsed(given.capability, "--capability"), "--capability")
    outcome = run_scale(
        adapt(function, can),
        can,
        cases=given.cases,
        seed=given.seed,
        seconds=given.seconds,
        batch=given.batch,
        num_configurations=given.configurations,
        say=lambda line: print(line, flush=True),
    )
    report = {
        **outcome.as_dict(),
        "implementation": given.implementation,
        "device": device_name(),
        "versions": versions(),
        **facts,
    }
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    for failure in outcome.shown:
        print(f"batch {failure['batch']}, case {failure['case']}: {failure['over_budget']}")
        print(f"  {failure['problem']}")
    worst = ", ".join(f"{dtype} {max(of.values()):.2f}" for dtype, of in outcome.tally.worst.items())
    print(
        f"{outcome.cases:,} cases, {outcome.failures} failures, seed {outcome.seed}, worst error in units "
        f"of the budget: {worst}; oracle held to NumPy's on {outcome.oracle_cases} cases, "
        f"{outcome.oracle_apart:.2g} of the tolerance apart"
    )
    complete = outcome.cases >= given.cases
    return int(outcome.failures > 0 or not complete or outcome.oracle_apart > 1)


if __name__ == "__main__":
    sys.exit(main())
