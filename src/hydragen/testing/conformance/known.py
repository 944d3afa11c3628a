"""What an implementation is known to do wrong: a file that its owner keeps, strict in both directions.

::

    [[fails]]          # a law that does not hold: it must fail as long as it stands here
    law = "two_runs_give_the_same_bits"
    reason = "atomics in the combine, issue 12"

    [[fails]]          # problems that come out wrong: no law draws them, and one must still fail
    when = "problem.softcap and problem.window"
    reason = "softcap ignored with a window, issue 31"

    [[skips]]          # a law or problems that are not tested at all
    when = "0 in problem.kv_lens"
    reason = "empty segments are documented as undefined"

What is listed fails by a result outside of its budget (AssertionError); anything else, a mistake in a
wrapper say, is not what is known. ``error = "RuntimeError"`` names another exception to expect. What is
skipped is not looked at.

``when`` is a Python expression of ``problem`` (`hydragen.testing.Problem`) and ``torch``, and run as such:
read a file of somebody else's before you use it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from hypothesis.errors import Flaky, HypothesisException

from hydragen.testing.problem import Problem
from hydragen.testing.tally import said


@dataclass(frozen=True)
class Entry:
    """A law or a kind of problem, and why it is here."""

    reason: str
    fails: bool
    law: str | None = None
    when: str | None = None
    code: CodeType | None = None
    error: str = "AssertionError"

    def expects(self, failure: BaseException) -> bool:
        """Whether a failure is of the listed kind; of several (Hypothesis), each."""
        if isinstance(failure, BaseExceptionGroup):
            parts = [part for part in failure.exceptions if not isinstance(part, HypothesisException)]
            return all(self.expects(part) for part in parts)
        if isinstance(failure, Flaky):
            return True  # it differs from run to run: what it was says the group
        return any(kind.__name__ == self.error for kind in type(failure).__mro__)

    def unlike(self, failure: BaseException) -> str:
        """That it fails otherwise than is listed."""
        kind = type(failure).__name__
        return (
            f"not as listed, which is {self.error}, but by {kind}: {said(failure)}; if that is what is "
            f'known, write error = "{kind}"'
        )

    def repaired(self) -> str:
        """That it does not fail any more."""
        return f"works now: {self.law or self.when} ({self.reason}): remove it from the known failures"

    def as_dict(self) -> dict[str, str]:
        """As in the file."""
        about = {"law": self.law, "when": self.when, "error": self.error if self.fails else None}
        kind = "fails" if self.fails else "skips"
        return {"kind": kind, **{k: v for k, v in about.items() if v}, "reason": self.reason}

    def applies(self, problem: Problem) -> bool:
        """Whether the problem is of this entry's kind."""
        if self.code is None:
            return False
        # the file belongs to whoever runs the suite, like a conftest.py
        try:
            return bool(eval(self.code, {"problem": problem, "torch": torch}))
        except Exception as error:
            raise ValueError(
                f"known failures: when must be an expression of every problem, got {self.when!r}, which "
                f"raises {error!r} for {problem!r}"
            ) from error


@dataclass(frozen=True)
class Known:
    """All entries of a file."""

    entries: tuple[Entry, ...] = ()

    @property
    def problems(self) -> tuple[Entry, ...]:
        """Entries about problems, which are left out of the laws."""
        return tuple(entry for entry in self.entries if entry.code is not None)

    @property
    def failing_problems(self) -> tuple[Entry, ...]:
        """Entries about problems that must still fail."""
        return tuple(entry for entry in self.problems if entry.fails)

    def allows(self, problem: Problem) -> bool:
        """Whether no entry is about this problem."""
        return not any(entry.applies(problem) for entry in self.problems)

    def only(self, entry: Entry, problem: Problem) -> bool:
        """Whether this entry, and no other, is about the problem."""
        return all(other.applies(problem) == (other is entry) for other in self.problems)

    def law(self, name: str) -> Entry | None:
        """The entry about a law, if there is one."""
        return next((entry for entry in self.entries if entry.law == name), None)

    def check_laws(self, names: Collection[str]) -> None:
        """Raise ValueError if an entry names a law that there is not."""
        for entry in self.entries:
            if entry.law is not None and entry.law not in names:
                raise ValueError(
                    f"known failures: law must be one of {', '.join(sorted(names))}, got {entry.law!r}"
                )


def read(path: Path) -> Known:
    """Entries of a TOML file.

    Raises
    ------
    ValueError
        If it cannot be read, or an entry is not as described above; says which.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"known failures: {path} cannot be read: {error}") from None
    unknown = set(tables) - {"fails", "skips"}
    if unknown:
        raise ValueError(f"known failures: tables must be fails or skips, got {sorted(unknown)} in {path}")
    return Known(
        tuple(
            _entry(item, f"{path}, {kind}[{number}]", kind == "fails")
            for kind in ("fails", "skips")
            for number, item in enumerate(tables.get(kind, []))
        )
    )


def _entry(item: Any, where: str, fails: bool) -> Entry:
    if not isinstance(item, dict) or not all(isinstance(value, str) for value in item.values()):
        raise ValueError(f"known failures: {where} must be a table of strings, got {item!r}")
    keys = set(item) - ({"error"} if fails else set())
    if keys not in ({"law", "reason"}, {"when", "reason"}) or not item["reason"].strip():
        raise ValueError(
            f"known failures: {where} must have a reason, either law or when, and an error only if it fails, "
            f"got {sorted(item)}"
        )
    expected = item.get("error", "AssertionError")
    if not expected.isidentifier():
        raise ValueError(f"known failures: {where}: error must be the name of an exception, got {expected!r}")
    if "law" in item:
        return Entry(item["reason"], fails, law=item["law"], error=expected)
    try:
        code = compile(item["when"], where, "eval")
        sample = Problem((-1,), (1,), (0,), (1,))
        eval(code, {"problem": sample, "torch": torch})
    except Exception as error:  # noqa: BLE001 - whatever an expression of theirs may raise
        raise ValueError(
            f"known failures: {where}: when must be an expression of problem, got {item['when']!r}: {error}"
        ) from None
    return Entry(item["reason"], fails, when=item["when"], code=code, error=expected)
