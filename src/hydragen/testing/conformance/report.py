"""What the suite found: a table at the end of the run, and the same as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import settings

from hydragen.testing.conformance.corners import FAMILIES
from hydragen.testing.conformance.subject import Session, session
from hydragen.testing.tally import COUNTS, Tally

HELD, FAILED, KNOWN, SKIPPED = "held", "FAILED", "fails, as known", "not tested"
# What the JSON file counts them as
COUNTED = {"held": HELD, "FAILED": FAILED, "known to fail": KNOWN, "not tested": SKIPPED}
# The test that passes because what is listed still fails
STILL_FAILS = "known_failures_still_fail"
_WORST = (FAILED, KNOWN, HELD, SKIPPED)


@dataclass
class Law:
    """One law for one implementation."""

    name: str
    law: str
    outcome: str
    seconds: float
    tally: Tally
    reason: str = ""
    problem: str = ""
    where: str = ""
    call: str = ""

    def joined(self, before: Law) -> Law:
        """One part of a law with those before it: the worst outcome, and what the first failure said."""
        worst = min(self, before, key=lambda law: _WORST.index(law.outcome))
        first = before if before.outcome == worst.outcome else worst
        tally = Tally()
        for part in (before, self):
            tally.merge(part.tally.as_dict())
        return replace(first, seconds=self.seconds + before.seconds, tally=tally)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: infinity is not a number there."""
        seen = self.tally.as_dict()
        worst = {
            dtype: {name: ratio if math.isfinite(ratio) else "inf" for name, ratio in names.items()}
            for dtype, names in seen["worst"].items()
        }
        return {
            "law": self.law,
            "test": self.name,
            "outcome": self.outcome,
            "reason": self.reason,
            "seconds": round(self.seconds, 3),
            **{name: seen[name] for name in COUNTS},
            "worst_over_budget": worst,
            "smallest_failing_problem": self.problem,
            "where": self.where,
            "reproduce": self.call,
        }


@dataclass
class Report:
    """All laws of a run."""

    laws: dict[str, Law] = field(default_factory=dict)

    def add(self, report: pytest.TestReport, seen: dict[str, Any]) -> None:
        """Count one phase of one test."""
        if report.when == "setup" and report.outcome == "passed":
            return
        tally = Tally()
        tally.merge(seen)
        xfail = getattr(report, "wasxfail", None)
        outcome = {"passed": HELD, "failed": FAILED, "skipped": SKIPPED if xfail is None else KNOWN}
        if seen["law"] == STILL_FAILS:
            outcome["passed"] = KNOWN
        reason = xfail or seen.get("reason", "")
        if report.outcome == "skipped" and xfail is None and isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        found = Law(
            _whole(seen["name"]),
            seen["law"],
            outcome[report.outcome],
            report.duration,
            tally,
            reason,
            *(seen.get(name, "") for name in ("problem", "where", "call")),
        )
        key = _whole(report.nodeid)
        self.laws[key] = found if key not in self.laws else found.joined(self.laws[key])

    def total(self) -> Tally:
        """Of laws that hold: what fails, expected or not, says nothing of the rest."""
        total = Tally()
        for law in self.laws.values():
            if law.outcome == HELD:
                total.merge(law.tally.as_dict())
        return total

    def count(self, outcome: str) -> int:
        """Laws with this outcome."""
        return sum(law.outcome == outcome for law in self.laws.values())

    def tested_nothing(self) -> bool:
        """Whether all laws that were asked for were left out."""
        return bool(self.laws) and self.count(SKIPPED) == len(self.laws)

    def lines(self) -> list[str]:
        """The table, and the smallest failing cases."""
        dtypes = sorted({dtype for law in self.laws.values() for dtype in law.tally.worst})
        width = max(len(law.name) for law in self.laws.values())
        lines = [
            f"{'law':{width}}  {'outcome':15} {'cases':>7}"
            + "".join(f" {dtype:>9}" for dtype in dtypes)
            + "  (worst error as a multiple of the budget)"
        ]
        for law in self.laws.values():
            line = f"{law.name:{width}}  {law.outcome:15} {law.tally.cases:7,}"
            line += "".join(f" {_ratio(law.tally, dtype):>9}" for dtype in dtypes)
            lines.append(f"{line}  {law.reason}".rstrip())
        total = self.total()
        lines.append(
            f"{self.count(HELD)} laws held, {self.count(FAILED)} failed, {self.count(KNOWN)} known to fail, "
            f"{self.count(SKIPPED)} not tested; {total.cases:,} cases held"
            + "".join(f", {dtype} at most {_ratio(total, dtype)}" for dtype in sorted(total.worst))
        )
        if self.tested_nothing():
            lines.append("nothing was tested: the run counts as one without tests (exit status 5)")
        if total.refused:
            lines.append(f"{total.refused:,} problems were refused by the function (NotImplementedError)")
        if total.without_lse and session.capabilities.lse is not False:
            lines.append(f"{total.without_lse:,} of these cases came without lse, which was not judged there")
        narrowed = session.capabilities.said()
        if narrowed:
            lines.append("asked for: " + ", ".join(f"{name}={value}" for name, value in narrowed.items()))
        for entry in session.known.entries:
            about = entry.law or f"problems with {entry.when}"
            lines.append(f"{'known to fail' if entry.fails else 'skipped'}: {about} ({entry.reason})")
        failed = [law for law in self.laws.values() if law.outcome == FAILED and law.where]
        for law in failed:
            shrunk = "failing" if law.law == STILL_FAILS else "smallest failing"
            lines += ["", f"{shrunk} case of {law.name}: {law.where}"]
            lines += [f"  {text}" for text in (law.problem, law.call) if text]
        if any(law.call for law in failed):
            lines += ["", *_to_repeat()]
        return lines

    def write(self, path: Path, config: pytest.Config) -> None:
        """Write all of it as JSON."""
        total = self.total()
        content = {
            **{name: value for name, value in about_run(session, config).items() if name != "known failures"},
            "profile": settings.get_current_profile_name(),
            "seed": None if settings().derandomize else getattr(config.option, "hypothesis_seed", None),
            "counts": {name: self.count(outcome) for name, outcome in COUNTED.items()},
            **{name: getattr(total, name) for name in COUNTS},
            "worst_over_budget": total.as_dict()["worst"],
            "known_failures": [entry.as_dict() for entry in session.known.entries],
            "laws": [law.as_dict() for law in self.laws.values()],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _whole(name: str) -> str:
    """A test's name without the part of `corners` that it is about."""
    return re.sub(rf"-?(?:{'|'.join(FAMILIES)})-\d+", "", name).replace("[]", "")


def _to_repeat() -> list[str]:
    """What the calls of the failing cases need."""
    name = session.subjects[0].name if session.subjects else ""
    fn = f'fn = named("{name}")' if ":" in name else "fn = ...  # the implementation, of (problem, inputs)"
    return [
        "to run one of these again:",
        "  import torch",
        "  from hydragen.testing import Problem, laws",
        "  from hydragen.testing.conformance.subject import named",
        f"  {fn}",
    ]


def _ratio(tally: Tally, dtype: str) -> str:
    ratios = tally.worst.get(dtype)
    return f"{max(ratios.values()):.2f}" if ratios else ""


def about_run(session: Session, config: pytest.Config) -> dict[str, Any]:
    """What is tested, with what, where, and how to repeat it."""
    profile = settings.get_current_profile_name()
    seed = getattr(config.option, "hypothesis_seed", None)
    examples = f"profile {profile}, {settings().max_examples} examples a law, "
    known = session.known.entries
    return {
        "implementation": ", ".join(_with_version(subject.name) for subject in session.subjects),
        "device": _device(session),
        "versions": versions(),
        "capabilities": session.capabilities.said(),
        "examples": examples
        + (
            "the same as long as your source is"
            + (f" (--hypothesis-seed={seed} is for other profiles)" if seed is not None else "")
            if settings().derandomize
            else f"repeat with --hypothesis-seed={seed}"
        ),
        "known failures": f"{len(known)} entries" if known else "",
    }


def versions() -> dict[str, str]:
    """Of everything that a result depends on, as far as it is installed."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "hypothesis": hypothesis.__version__,
    }
    for name in ("triton", "hydragen"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if module := sys.modules.get(name):
                found[name] = str(getattr(module, "__version__", "unknown"))
    return found


def _device(session: Session) -> str:
    return f"tensors on {session.capabilities.device}; this machine: {device_name()}"


def device_name() -> str:
    """The GPU of this machine, or else its processor."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return platform.processor() or platform.machine()


def _with_version(path: str) -> str:
    """The implementation's name and the version of the package it is from, if it has one."""
    top = path.partition(":")[0].partition(".")[0]
    module = sys.modules.get(top)
    version = getattr(module, "__version__", None)
    if version is None:
        names = importlib.metadata.packages_distributions().get(top, [])
        version = importlib.metadata.version(names[0]) if names else None
    return f"{path} {version}" if version else path
