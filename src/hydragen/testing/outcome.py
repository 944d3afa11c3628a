"""What a run of `hydragen.testing.scale` has found so far, and where its time went."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hydragen.testing.tally import Tally


@dataclass
class Outcome:
    """What a run has found so far."""

    seed: int
    cases: int = 0
    failures: int = 0
    refused: int = 0
    batches: int = 0
    rows: int = 0
    tally: Tally = field(default_factory=Tally)
    oracle_cases: int = 0
    oracle_apart: float = 0.0
    shown: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, device: str) -> Iterator[None]:
        """Add the time that a block takes, on the device as well, to one of `phases`."""
        began = time.monotonic()
        try:
            yield
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(device)
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - began

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        worst = {
            dtype: {name: number_or_inf(ratio) for name, ratio in names.items()}
            for dtype, names in self.tally.as_dict()["worst"].items()
        }
        return {
            "cases": self.cases,
            "failures": self.failures,
            "refused": self.refused,
            "seed": self.seed,
            "worst_over_budget": worst,
            "rows": self.rows,
            "batches": self.batches,
            "seconds": round(self.seconds, 1),
            "phases": {name: round(seconds, 1) for name, seconds in self.phases.items()},
            "oracle_check": {"cases": self.oracle_cases, "worst_over_tolerance": self.oracle_apart},
            "first_failures": self.shown,
        }

    def lines(self) -> list[str]:
        """Failures, time and counts, for a reader."""
        lines = []
        for failure in self.shown:
            where = f"batch {failure['batch']}"
            if "error" in failure:
                lines.append(f"{where}: {failure['error']}")
            else:
                lines += [
                    f"{where}, case {failure['case']}: {failure['over_budget']}",
                    f"  {failure['problem']}",
                    *([f"  {failure['reproduce']}"] if failure["reproduce"] else []),
                ]
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.phases.items())
        worst = ", ".join(f"{dtype} {max(of.values()):.2f}" for dtype, of in self.tally.worst.items())
        refused = f", {self.refused:,} refused" if self.refused else ""
        return [
            *lines,
            f"time: {phases}",
            f"{self.cases:,} cases, {self.failures} failures{refused}, seed {self.seed}, worst error in "
            f"units of the budget: {worst}; oracle held to NumPy's on {self.oracle_cases} cases, "
            f"{self.oracle_apart:.2g} of the tolerance apart",
        ]


def number_or_inf(ratio: float) -> float | str:
    """A number for JSON, which knows no infinity."""
    return ratio if math.isfinite(ratio) else "inf"
