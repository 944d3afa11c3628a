"""What the benchmark writes: a table as text, a CSV of its main columns, and a JSON of all the rest."""

from __future__ import annotations

import csv
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from hydragen.transformers.bench_cases import Case

if TYPE_CHECKING:
    from hydragen.transformers.bench import Row

WAYS = ("ours", "attention_off", "per_sequence_read", "hf_generate", "bound")
COLUMNS = ("model", "batch", "prefix", "completion", *WAYS)
_HEADINGS = (
    "batch", "prefix", "prefill s", "ours", "attn off", "per seq.", "TB/s", "HF", "bound", "tokens/s of",
)  # fmt: skip
MEASURED = (
    "Decode tokens per second of all sequences together: batch / the mean step of a completion. A step is "
    "the model, the append of the new keys and values, attention, and the greedy choice of tokens; on a GPU "
    "the replay of one CUDA graph, timed by events. It is timed at `lengths` tokens of each row's own, the "
    "middles of equal parts of a completion (median of `replays` each), over random keys and values, and "
    "averaged. The prefill is apart, and so are the loop's looks at the tokens, one every 16 steps; `whole` "
    "has them: tokens per second of whole completions by `generate`, its planning and capture included. "
    'hf_generate: the median step of transformers\' generate, eager, attention "sdpa", at the beginning of a '
    "completion (`new_tokens`)."
)


class Results:
    """Rows as they are measured: each is on disk when `add` returns.

    Parameters
    ----------
    path : Path or None
        The CSV; the JSON lies beside it, with the same name. Rows that are there are kept. None: nothing is
        written.
    about : dict, optional
        More facts about this run, as the commit.
    """

    def __init__(self, path: Path | None, about: dict[str, Any] | None = None) -> None:
        self.path = path
        self._headed = False
        self._run: dict[str, Any] = {"about": facts() | (about or {}), "notes": [], "seconds": None}
        self._all: dict[str, Any] = {"measured": MEASURED, "runs": [], "rows": [], "left_out": []}
        self._keys: set[tuple[Any, ...]] = set()
        if path is None:
            return
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                for x in csv.DictReader(file):
                    sizes = (int(x[name]) for name in COLUMNS[1:4])
                    self._keys.add((x["model"], *sizes, 0, 0))
        if self._json.exists():
            self._all |= json.loads(self._json.read_text(encoding="utf-8"))
            self._keys |= {key_of(row) for row in self._all["rows"]}
        self._all["runs"].append(self._run)

    @property
    def _json(self) -> Path:
        if self.path is None:
            raise ValueError("path must be a file to write to, got None")
        return self.path.with_suffix(".json")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Everything that has been measured, those of earlier runs included."""
        rows: list[dict[str, Any]] = self._all["rows"]
        return rows

    def has(self, key: tuple[Any, ...]) -> bool:
        """Whether a case has been measured."""
        return key in self._keys

    def add(self, row: Row) -> str:
        """Write a row down, and return it as text."""
        if row.ours is None:
            return self.leave_out(row.case, "; ".join(row.details["left_out"].values()))
        values = asdict(row)
        self.rows.append({**values.pop("case"), **values, "run": len(self._all["runs"]) - 1})
        self._keys.add(row.case.key)
        self._all["left_out"] = [x for x in self._all["left_out"] if key_of(x) != row.case.key]
        if self.path is not None and not row.case.branches:
            new = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                if new:
                    writer.writerow(COLUMNS)
                cells = [*row.case.key[:4], *(getattr(row, name) for name in WAYS)]
                writer.writerow(
                    ["" if x is None else f"{x:.1f}" if isinstance(x, float) else x for x in cells]
                )
        self._write()
        heading, self._headed = not self._headed, True
        return as_text(row, heading)

    def leave_out(self, case: Case, reason: str) -> str:
        """Note that a case was not measured, and why."""
        self._all["left_out"] = [x for x in self._all["left_out"] if key_of(x) != case.key]
        self._all["left_out"].append({**asdict(case), "reason": reason})
        self._write()
        return f"{case.model}, batch {case.batch:,}, prefix {case.prefix:,}: left out: {reason}"

    def note(self, text: str) -> None:
        """Note something about this run."""
        self._run["notes"].append(text)

    def finish(self, seconds: float) -> None:
        """Note how long the run took."""
        self._run["seconds"] = seconds
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            self._json.parent.mkdir(parents=True, exist_ok=True)
            new = self._json.with_suffix(".json.new")
            new.write_text(json.dumps(_rounded(self._all), indent=1) + "\n", encoding="utf-8")
            new.replace(self._json)


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return `Case.key` of a record."""
    return tuple(record[x] for x in ("model", "batch", "prefix", "completion", "branches", "branch"))


def facts() -> dict[str, Any]:
    """Return the device and the versions that numbers depend on."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.machine(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def as_text(row: Row, heading: bool = True) -> str:
    """Return a row as text, under a heading or not."""
    case = row.case
    cells = [f"{case.batch:,}", f"{case.prefix:,}", f"{row.prefill_s:.2f}"]
    cells += [_or_dash(x) for x in (row.ours, row.attention_off, row.per_sequence_read)]
    cells += ["-" if row.read_tb_s is None else f"{row.read_tb_s:.2f}"]
    cells += [_or_dash(x) for x in (row.hf_generate, row.bound)]
    lines = ["".join(f"{name:>10}" for name in _HEADINGS[:-1]) + "  " + _HEADINGS[-1]] if heading else []
    lines.append("".join(f"{cell:>10}" for cell in cells) + "  " + case.model)
    if case.branches:
        first = row.first_level_only
        lines[-1] += f" > {case.branches}x{case.branch:,}: first level shared only {_or_dash(first)}"
        if first is not None and row.ours is not None:
            lines[-1] += f", both take {first / row.ours:.0%} of its time"
    lines += [f"{name} left out: {reason}" for name, reason in row.details["left_out"].items()]
    return "\n".join(lines)


def _or_dash(x: float | None) -> str:
    return "-" if x is None else f"{x:,.0f}"


def _rounded(x: Any) -> Any:
    """Six digits of every number: what was measured has no more."""
    if isinstance(x, dict):
        return {name: _rounded(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_rounded(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x
