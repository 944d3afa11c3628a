"""What the benchmark writes: a table as text, a CSV of its main columns, and a JSON of all the rest."""

from __future__ import annotations

import csv
import io
import json
import os
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
_KEY = ("model", "batch", "prefix", "completion", "branches", "branch")
_REMEDY = "give another file, or remove this one"
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
        The CSV; the JSON lies beside it, with the same name. Rows that are there are kept; a line that was
        cut off is removed, and rows that only the JSON has are written again. None: nothing is written.
    about : dict, optional
        More facts about this run, as the commit.

    Raises
    ------
    ValueError
        If a file is there that is not such a table or its details, or is damaged; it is left as it is.
    """

    def __init__(self, path: Path | None, about: dict[str, Any] | None = None) -> None:
        self.path = path
        self._headed = False
        self._run: dict[str, Any] = {"about": facts() | (about or {}), "notes": [], "seconds": None}
        self._all: dict[str, Any] = {"measured": MEASURED, "runs": [], "rows": [], "left_out": []}
        self._keys: set[tuple[Any, ...]] = set()
        if path is None:
            return
        # All that may be refused is read before anything is written.
        listed, size = _read_table(path)
        self._all |= _read_details(self._json)
        flat = [row for row in self.rows if not row["branches"]]
        if listed and flat and not listed & {key_of(row) for row in flat}:
            raise ValueError(
                f"{self._json} must have the details of {path}, got those of other rows; give another "
                "file, or remove both"
            )
        self._keys = listed | {key_of(row) for row in self.rows}
        if path.exists() and size < path.stat().st_size:
            os.truncate(path, size)
        self._append([row for row in flat if key_of(row) not in listed])
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
        self._write()  # first: what the table lacks after an interruption is made up for from here
        if not row.case.branches:
            self._append(self.rows[-1:])
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

    def _append(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to the table, which gets its heading if it is new."""
        if self.path is None or not rows:
            return
        new = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(COLUMNS)
            for row in rows:
                cells = [row.get(name) for name in COLUMNS]
                writer.writerow(
                    ["" if x is None else f"{x:.1f}" if isinstance(x, float) else x for x in cells]
                )

    def _write(self) -> None:
        if self.path is not None:
            self._json.parent.mkdir(parents=True, exist_ok=True)
            new = self._json.with_suffix(".json.new")
            new.write_text(json.dumps(_rounded(self._all), indent=1) + "\n", encoding="utf-8")
            new.replace(self._json)


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return `Case.key` of a record."""
    return tuple(record[x] for x in _KEY)


def _read_table(path: Path) -> tuple[set[tuple[Any, ...]], int]:
    """Return the cases in a table, and the size in bytes of its whole lines; a ValueError if it is none."""
    if path.is_dir():
        raise ValueError(f"{path} must be a file for the table, got a folder; name a file in it")
    if path.suffix == ".json":
        raise ValueError(f"{path} must be a CSV file, the details being in a .json; name it .csv")
    heading = ",".join(COLUMNS)
    data = path.read_bytes() if path.exists() else b""
    if heading.encode().startswith(data):  # nothing yet, or cut off within the heading
        return set(), 0
    whole = data[: data.rfind(b"\n") + 1]
    try:
        lines = list(csv.reader(io.StringIO(whole.decode("utf-8"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be a CSV in UTF-8: {error}; {_REMEDY}") from error
    if not lines or tuple(lines[0]) != COLUMNS:
        got = data[:60].decode("utf-8", "replace").partition("\n")[0]
        raise ValueError(f"{path} must begin with the columns {heading}, got {got!r}; {_REMEDY}")
    listed = set()
    for number, cells in enumerate(lines[1:], start=2):
        if not cells:
            continue
        numbers = cells[1:4]
        if len(cells) != len(COLUMNS) or not all(x.isascii() and x.isdigit() for x in numbers):
            raise ValueError(
                f"{path}:{number} must have {heading}, got {','.join(cells)[:60]!r}; remove that line"
            )
        listed.add((cells[0], *map(int, numbers), 0, 0))
    return listed, len(whole)


def _read_details(path: Path) -> dict[str, Any]:
    """Return what the file beside a table says; a ValueError if it is something else."""
    if not path.exists():
        return {}
    problem = f"{path}, beside the table, must have the table's details"
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{problem}: {error}; {_REMEDY}") from error
    lists = [found.get(name) for name in ("runs", "rows", "left_out")] if isinstance(found, dict) else [None]
    if not all(isinstance(x, list) for x in lists):
        raise ValueError(f"{problem}, got a JSON file of something else; {_REMEDY}")
    for record in found["rows"] + found["left_out"]:
        lacking = [x for x in _KEY if x not in record] if isinstance(record, dict) else _KEY
        if lacking:
            raise ValueError(f"{problem}, got one without {', '.join(lacking)}; {_REMEDY}")
    return dict(found)


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
