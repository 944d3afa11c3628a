"""The numerics report: what its cells are, what it measures, and what it writes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ci"))

import numerics  # noqa: E402 - from ci/, found by the line above


def test_cells_cover_what_is_asked_for():
    cells = list(numerics.cells(small=False))
    assert {cell.dtype for cell in cells} == {"float32", "float16", "bfloat16"}
    assert {cell.length for cell in cells} == {1, 16, 128, 1024, 8192, 32768, 131072}
    assert {cell.levels for cell in cells} == {1, 2, 3, 5, 10}
    assert {cell.magnitude for cell in cells} == {1e-3, 1.0, 1e3}
    assert all(cell.levels <= cell.length for cell in cells)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_contender_attends_to_the_same_keys(dtype):
    inputs = numerics.draw(numerics.Cell(dtype, 33, 3, 2.0, "sharp"), 0, "cpu")
    assert sum(k.shape[1] for k, _ in inputs.levels) == 33
    expected = numerics.exact(inputs)
    tolerance = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}[dtype]
    for attention in (numerics.ours, numerics.fa2, numerics.original):
        torch.testing.assert_close(attention(inputs).double(), expected, rtol=tolerance, atol=tolerance)


def test_errors_are_relative_and_rounding_partials_shows():
    cell = numerics.Cell("bfloat16", 128, 5, 1e3, "flat")
    errors = numerics.measure(cell, 2, "cpu")
    assert all(1e-4 < error < 1e-1 for error in errors.values())
    assert numerics.ratio(errors, "ours") <= numerics.LIMIT
    assert numerics.ratio(errors, "original") > 1.2
    one = numerics.measure(cell._replace(length=1, levels=1), 2, "cpu")
    assert set(one.values()) == {0.0}
    assert numerics.ratio(one, "ours") == 1.0
    assert numerics.ratio({"ours": 1.0, "fa2": 0.0}, "ours") == math.inf


def test_the_report_is_written(tmp_path, monkeypatch):
    some = [numerics.Cell("float16", length, 1, 1.0, "flat") for length in (1, 16)]
    monkeypatch.setattr(numerics, "cells", lambda small: iter(some))
    monkeypatch.setattr(
        sys, "argv", ["numerics.py", "--seeds=1", "--device=cpu", "--processes=1", f"--out={tmp_path}"]
    )
    with pytest.raises(SystemExit) as ended:
        numerics.main()
    assert ended.value.code == 0
    report = json.loads((tmp_path / "cpu-numerics.json").read_text())
    assert [row["length"] for row in report["cells"]] == [1, 16]
    assert {"device", "versions", "commit", "worst_ours_over_fa2"} <= report.keys()
    assert "| float16 | 16 | 1 |" in (tmp_path / "cpu-numerics.md").read_text()
    assert (tmp_path / "cpu-numerics.png").stat().st_size > 1000


def test_the_figure_may_be_drawn_afterwards(tmp_path, monkeypatch, capsys):
    some = [numerics.Cell("float16", length, 1, 1.0, "flat") for length in (1, 16)]
    monkeypatch.setattr(numerics, "cells", lambda small: iter(some))
    arguments = ["numerics.py", "--seeds=1", "--device=cpu", "--processes=1", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", arguments)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(SystemExit) as ended:
            numerics.main()
    assert ended.value.code == 0
    assert not list(tmp_path.glob("*.png"))
    command = capsys.readouterr().out.partition("python ci/")[2].partition("\n")[0]
    monkeypatch.setattr(sys, "argv", command.split())
    numerics.main()
    assert (tmp_path / "cpu-numerics.png").stat().st_size > 1000


def test_processes_measure_the_same():
    chosen = [
        numerics.Cell(dtype, length, levels, 1.0, "flat")
        for dtype in ("float16", "bfloat16")
        for length, levels in ((4, 2), (1, 1), (9, 2))
    ]
    alone = [numerics.measure(cell, 1, "cpu") for cell in chosen]
    assert numerics.measure_all(chosen, 1, "cpu", processes=1) == alone
    assert numerics.measure_all(chosen, 1, "cpu", processes=2) == alone


def test_the_program_starts():
    done = subprocess.run(
        [sys.executable, ROOT / "ci" / "numerics.py", "--help"], capture_output=True, text=True
    )
    assert "--seeds" in done.stdout
