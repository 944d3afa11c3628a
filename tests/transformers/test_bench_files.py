"""The benchmark's table and its details: gone on from after a kill, and foreign files left as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hydragen.transformers.bench import Row
from hydragen.transformers.bench_cases import Case
from hydragen.transformers.bench_files import COLUMNS, Results

HEADING = ",".join(COLUMNS)


def add(out: Path, *sizes: int, **more: Any) -> Results:
    results = Results(out)
    for size in sizes:
        case = Case("small", size, 20, 9, **more)
        if not results.has(case.key):
            row = Row(case, 0.5, ours=size * 10.0, attention_off=size / 3, details={"left_out": {}})
            results.add(row)
    results.finish(1.0)
    return results


def lines(out: Path) -> list[str]:
    return out.read_text().splitlines()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    out = tmp_path / "table.csv"
    add(out, 2, 3)
    assert lines(out) == [HEADING, "small,2,20,9,20.0,0.7,,,", "small,3,20,9,30.0,1.0,,,"]
    return out


def test_a_table_cut_anywhere_is_made_whole(table: Path) -> None:
    whole = table.read_bytes()
    details = table.with_suffix(".json").read_bytes()
    for size in range(len(whole)):
        # The details were written before the line was.
        table.write_bytes(whole[:size])
        table.with_suffix(".json").write_bytes(details)
        add(table, 2, 3, 4)
        assert sorted(lines(table)) == sorted([*whole.decode().splitlines(), "small,4,20,9,40.0,1.3,,,"]), (
            size
        )


def test_a_cut_line_without_details_is_measured_again(table: Path) -> None:
    whole = table.read_bytes()
    table.with_suffix(".json").unlink()
    table.write_bytes(whole[:-5])
    assert [row["batch"] for row in add(table, 2, 3).rows] == [3]
    assert table.read_bytes() == whole


def test_the_details_come_first(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Results, "_append", lambda results, rows: killed() if rows else None)
    with pytest.raises(KeyboardInterrupt):
        add(table, 4)
    monkeypatch.undo()
    assert len(lines(table)) == 3
    add(table)
    assert lines(table)[3] == "small,4,20,9,40.0,1.3,,,"


def test_trees_have_details_only(table: Path) -> None:
    before = table.read_bytes()
    add(table, 4, branches=2, branch=8)
    assert table.read_bytes() == before
    alone = table.with_name("trees.csv")
    add(alone, 4, branches=2, branch=8)
    add(alone, 5)
    assert lines(alone) == [HEADING, "small,5,20,9,50.0,1.7,,,"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"x,y\n",
            "must begin with the columns model,batch.*, got 'x,y'; give another file, or remove this one",
        ),
        (b"x,y", "must begin with the columns"),
        (b'{"prompt": [5]}\n{"pro', "must begin with the columns"),
        (b"\n", "must begin with the columns"),
        (b"\xff\xfe\n", "must be a CSV in UTF-8"),
        (HEADING.encode() + b",more\n", "must begin with the columns"),
        (
            HEADING.encode() + b"\nsmall,2,20,9,2small,3,20,9,30.0,1.0,,,\n",
            r"table\.csv:2 must have model,.*rem",
        ),
        (
            HEADING.encode() + b"\nsmall,2,20,9,20.0,0.7,,,\nsmall,x,20,9,30.0,1.0,,,\n",
            r"table\.csv:3 must have",
        ),
        (HEADING.encode() + "\nsmall,²,20,9,30.0,1.0,,,\n".encode(), r"table\.csv:2 must have"),
    ],
)
def test_foreign_tables_are_left_as_they_are(table: Path, content: bytes, message: str) -> None:
    table.write_bytes(content)
    details = table.with_suffix(".json").read_bytes()
    with pytest.raises(ValueError, match=message):
        Results(table)
    assert table.read_bytes() == content
    assert table.with_suffix(".json").read_bytes() == details


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "table's details: Expecting property name"),
        (b"\xff", "table's details: "),
        (b"[" * 100_000, "table's details: "),
        (b"[]", "got a JSON file of something else"),
        (b'{"model_type": "llama"}', "got a JSON file of something else"),
        (b'{"runs": [], "rows": 5, "left_out": []}', "got a JSON file of something else"),
        (b'{"runs": [], "rows": [5], "left_out": []}', "got one without model, batch"),
        (b'{"runs": [], "rows": [{"name": 1}], "left_out": []}', "got one without model, batch"),
        (b'{"runs": [], "rows": [], "left_out": [{"model": "m"}]}', "got one without batch"),
    ],
)
def test_foreign_details_are_left_as_they_are(table: Path, content: bytes, message: str) -> None:
    os.truncate(table, table.stat().st_size - 5)
    before = table.read_bytes()
    details = table.with_suffix(".json")
    details.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Results(table)
    assert str(error.value).startswith(f"{details}, beside the table, must have the table's details")
    assert details.read_bytes() == content
    assert table.read_bytes() == before, "nothing is written before all is read"


def test_details_of_other_rows_are_refused(table: Path, tmp_path: Path) -> None:
    add(tmp_path / "other.csv", 7)
    table.with_suffix(".json").write_bytes((tmp_path / "other.json").read_bytes())
    with pytest.raises(
        ValueError, match=r"table\.json must have the details of .*table\.csv, got those of other"
    ):
        Results(table)


def test_names_that_cannot_be_a_table(table: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a file for the table, got a folder"):
        Results(tmp_path)
    with pytest.raises(ValueError, match=r"must be a CSV file, the details being in a \.json"):
        Results(table.with_suffix(".json"))
    assert json.loads(table.with_suffix(".json").read_text())["rows"]
