"""What becomes of measured cells: merged files, tables, ci/compare and the figure, from made-up numbers."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench_results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    return importlib.import_module("bench_results")


def cell(shape: str, us: float, fa2: float | None = 1000.0, peer: float | None = None) -> dict[str, Any]:
    left_out = {"shares": False, "left_out": {"all": "copied keys and values take 99 GB, more than 84 GB"}}
    made: dict[str, Any] = {
        "shape": shape,
        "us": us,
        "roof_us": us / 2,
        "times_roof": 2.0,
        "host_us": {"attention": 60.0, "run": 50.0, "launches": 20.0, "plan": 500.0},
        "batch_invariant_us": 20.0,
        "baselines": {
            "fa2": {"shares": False, "us": fa2} if fa2 else left_out,
            "original": {"shares": True, "us": 2 * us},
        },
        "run": {"device": "NVIDIA H200", "commit": "abc", "ceilings": {"copy_tbs": 4.3}},
    }
    if fa2:
        made["best_unshared"] = {"name": "fa2", "us": fa2, "time_ratio": us / fa2}
    if peer:
        made["best_peer_of_another_run"] = {"name": "fiMix3", "us": peer, "time_ratio": us / peer}
    return made


def results(*cells: dict[str, Any]) -> dict[str, Any]:
    return {"stages": {"check": {"ok": True}, "bench-52": {"ok": True, "benchmarks": list(cells)}}}


def test_newer_cells_replace_older_ones_and_the_52_come_first(bench_results: ModuleType) -> None:
    old = [cell("8/1 B512 P1024 S0", 5), cell("32/32 B256 P4096 S128", 4), cell("other", 3)]
    new = [cell("32/8 B256 P4096 S128", 2), cell("other", 1)]
    found = [(this["shape"], this["us"]) for this in bench_results.merged(old, new)]
    assert found == [
        ("32/8 B256 P4096 S128", 2),
        ("32/32 B256 P4096 S128", 4),
        ("8/1 B512 P1024 S0", 5),
        ("other", 1),
    ]


def test_tables(bench_results: ModuleType, tmp_path: Path) -> None:
    cells = [
        cell("32/8 B256 P4096 S128", 60, peer=131.2),
        cell("32/32 B256 P4096 S128", 210, fa2=None, peer=200),
        cell("32/8 B1 P128 S64", 12, fa2=10),
        cell("32/8 B2 P128 S64", 10.9, fa2=10),
    ]
    bench_results.write_tables(results(*cells), tmp_path / "h200.json")
    assert (tmp_path / "h200.csv").read_text().splitlines()[:2] == [
        "shape,us,roof_us",
        "32/8 B256 P4096 S128,60.00,30.0",
    ]
    text = (tmp_path / "h200.md").read_text()
    assert (
        "all 2.000, 32/8 heads 2.000, 32/32 heads 2.000. Slower than the best peer by more than 2 %: 1 of 2."
        in text
    )
    assert "1 of 3: 32/8 B1 P128 S64." in text
    assert "| 1.200 **slower** |" in text
    assert "| 1.090 |" in text  # within a microsecond
    assert "does not fit" in text
    assert "copy_tbs 4.3" in text


def test_nothing_is_written_without_cells(bench_results: ModuleType, tmp_path: Path) -> None:
    bench_results.write_tables({"stages": {"check": {"ok": True}}}, tmp_path / "h200.json")
    assert list(tmp_path.iterdir()) == []


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "ci" / "compare"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def csv_file(path: Path, **times: float) -> Path:
    path.write_text("shape,us,roof_us\n" + "".join(f"32/8 {name},{us},1\n" for name, us in times.items()))
    return path


def test_compare_lists_what_changed_by_more_than_the_noise(tmp_path: Path) -> None:
    old = csv_file(tmp_path / "old.csv", small=10, large=1000, slow=100, fast=100, gone=1)
    new = csv_file(tmp_path / "new.csv", small=10.9, large=1029, slow=104, fast=90, fresh=1)
    done = compare(old, new)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "slower: 1 of 4"
    assert lines[1].split() == ["32/8", "slow", "100.0", "->", "104.0", "us", "x", "1.040"]
    assert lines[2] == "faster: 1 of 4"
    assert "32/8 fast" in lines[3]
    assert lines[-2:] == ["only in old: 32/8 gone", "only in new: 32/8 fresh"]
    assert compare(old, new, "--percent", 5).returncode == 0
    assert compare(new, old).returncode == 1
    assert compare(old, old).returncode == 0


def test_compare_reads_results_files_of_both_kinds(tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text(json.dumps(results(cell("32/8 a", 50))))
    done = compare(csv_file(tmp_path / "old.csv", a=100), tmp_path / "new.json")
    assert done.returncode == 0, done.stderr
    assert "x 0.500" in done.stdout


def test_compare_says_what_it_cannot_read(tmp_path: Path) -> None:
    old = csv_file(tmp_path / "old.csv", a=100)
    other = csv_file(tmp_path / "other.csv", b=100)
    (tmp_path / "wrong.csv").write_text("name\nx\n")
    for arguments, message in (
        ((old, "missing.csv"), "no file missing.csv"),
        ((old, other), "no shape in common"),
        ((old, tmp_path / "wrong.csv"), "has no columns"),
    ):
        done = compare(*arguments)
        assert done.returncode == 2
        assert message in done.stderr


def test_figure(bench_results: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = importlib.import_module("figure")
    cells = [cell(f"32/8 B256 P{p} S128", p / 50, fa2=p / 2) for p in (16384, 1024, 65536)]
    cells += [cell(f"32/8 B{b} P16384 S128", 100 + b, fa2=None) for b in (64, 1024)]
    cells += [cell("32/8 B256 P4096 S512", 1), cell("32/32 B256 P4096 S128", 1)]
    lines = figure.curves(cells, over="prefix")
    assert lines["fa2"] == [(1024, 512), (16384, 8192), (65536, 32768)]
    assert lines["cudnn"] == []
    assert [x for x, _ in figure.curves(cells, over="batch")["hydragen"]] == [64, 256, 1024]
    figure.draw(results(*cells), tmp_path / "deep" / "h200.png")
    assert (tmp_path / "deep" / "h200.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="bench-more"):
        figure.draw(results(cells[-1]), tmp_path / "none.png")
