"""The end-to-end benchmark: what it measures and writes, and that no failure ends it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model
from transformers import PreTrainedModel

from hydragen.transformers import PrefixCache, bench, timing
from hydragen.transformers.bench_cases import Case, Prefixes, random_model
from hydragen.transformers.bench_files import Results

ROOT = Path(__file__).resolve().parents[2]


def make(_: str) -> PreTrainedModel:
    return make_model("llama")


def run(cases: list[Case], out: Path | None, **options: Any) -> tuple[list[str], Results]:
    said: list[str] = []
    results = Results(out, {"commit": "abc"})
    bench.run(cases, options.pop("make", make), results, say=said.append, **options)
    return said, results


def test_a_row_has_all_ways_and_the_details(tmp_path: Path) -> None:
    out = tmp_path / "new" / "table.csv"
    cases = [
        Case("small", 3, 20, 9, hf=True, whole=True),
        Case("small", 4, 10, 9, branches=2, branch=8),
    ]
    assert len(run(cases, out)[0]) == 2
    written = json.loads(out.with_suffix(".json").read_text())
    assert written["runs"][0]["about"]["commit"] == "abc"
    assert written["runs"][0]["seconds"] > 0
    assert written["left_out"] == []
    row, tree = written["rows"]
    for name in ("ours", "attention_off", "per_sequence_read", "hf_generate", "prefill_s", "read_tb_s"):
        assert row[name] > 0, name
    details = row["details"]
    # a CPU has no roof to speak of
    assert (row["bound"] is None) == (details.get("roof_s") is None)
    assert set(details["step"]) == {"ours", "attention_off", "per_sequence_read"}
    step = details["step"]["ours"]
    assert row["ours"] == pytest.approx(3 / step["seconds"], rel=1e-4)
    # 8 steps attend to 1 to 8 tokens of a row's own: the middles of four parts are 1.5, 3.5 ...
    assert len(step["lengths"]) == 4
    assert sum(step["lengths"]) / 4 == pytest.approx(4.5, abs=0.6)
    assert not step["graph"]  # on a CPU
    assert details["whole"] > 0
    assert details["hf_generate"]["new_tokens"] == 8
    assert tree["first_level_only"] > 0
    assert tree["per_sequence_read"] is None
    with out.open() as file:
        assert [x["batch"] for x in csv.DictReader(file)] == ["3"], "the CSV has no column for trees"
    said, again = run([*cases, Case("small", 2, 20, 9)], out)
    assert len(said) == 1
    assert [x["run"] for x in again.rows] == [0, 0, 1]


def test_the_ways_share_the_memory_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = []

    def noted(cache: PrefixCache, completion: int, seconds: float) -> timing.StepTime:
        found = timing.time_step(cache, completion, seconds)
        addresses.append([layer.keys.data_ptr() for layer in cache.layers])
        assert cache.rows.levels[0].kv[0][0].data_ptr() == prefix.data_ptr(), "the prefix is not copied"
        return found

    prefixes, case = Prefixes("small", make("")), Case("small", 3, 20, 9)
    prefix = prefixes.of(case)[1].layers[0].keys
    monkeypatch.setattr(bench, "time_step", noted)
    bench.measure(prefixes, case)
    assert len(addresses) == 3
    assert addresses[0] == addresses[1] == addresses[2]


def fails(which: int, error: type[BaseException], of: Callable[..., Any]) -> Callable[..., Any]:
    """Let call number `which` fail."""
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == which:
            raise error("no memory\nfor this")
        return of(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_way_that_fails_leaves_the_others(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of a forward pass, after which a cache refuses to go on."""
    out = tmp_path / "table.csv"
    monkeypatch.setattr(bench, "switched_off", fails(4, error, bench.switched_off))
    said, results = run([Case("small", 3, 20, 9), Case("small", 2, 20, 9)], out)
    first, second = results.rows
    assert first["attention_off"] is None
    assert first["ours"] > 0
    assert first["per_sequence_read"] > 0
    assert first["details"]["left_out"] == {"attention_off": f"{error.__name__}: no memory"}
    assert "attention_off left out: " in said[0]
    assert second["attention_off"] > 0
    assert out.read_text().splitlines()[1].split(",")[5] == ""


def test_a_row_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, cases = tmp_path / "table.csv", [Case("small", 3, 20, 9), Case("small", 2, 20, 9)]
    monkeypatch.setattr(bench, "measure", fails(1, RuntimeError, bench.measure))
    said, results = run(cases, out)
    assert said[0] == "small, batch 3, prefix 20: left out: RuntimeError: no memory"
    assert [x["batch"] for x in results.rows] == [2]
    monkeypatch.undo()
    failing = fails(1, MemoryError, make)
    said, results = run([Case("other", 3, 20, 9), Case("other", 3, 20, 10)], out, make=failing)
    assert [(x["model"], x["completion"]) for x in results.rows] == [("small", 9), ("other", 10)]
    left = json.loads(out.with_suffix(".json").read_text())["left_out"]
    assert [(x["model"], x["batch"]) for x in left] == [("small", 3), ("other", 3)]
    assert len(run(cases, out)[0]) == 1, "what was left out is tried again"
    left = json.loads(out.with_suffix(".json").read_text())["left_out"]
    assert [x["model"] for x in left] == ["other"]


def test_what_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "table.csv"
    monkeypatch.setattr(bench, "free_bytes", lambda _: 2.5 * 2**30)
    said, results = run([Case("small", 2**22, 20, 9), Case("small", 2, 20, 9)], out)
    assert "left out: needs 11.0 GiB, 2.5 GiB are free" in said[0]
    assert [x["batch"] for x in results.rows] == [2]


def test_no_case_begins_when_the_time_is_over(tmp_path: Path) -> None:
    out, cases = tmp_path / "table.csv", [Case("small", size, 20, 9) for size in (2, 3, 4)]
    clock = iter([0.0, 1.0, 1.0, 5.0, 39.0, 81.0, 82.0])

    class Clock:
        perf_counter = staticmethod(lambda: next(clock))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "time", Clock)
        said, results = run(cases, out, seconds=100)
    assert [x["batch"] for x in results.rows] == [2, 3]
    assert said[-1] == "small, batch 4, prefix 20: left out: no time: 100 s in all"
    written = json.loads(out.with_suffix(".json").read_text())
    assert written["runs"][0]["seconds"] == 82.0


def test_long_steps_are_timed_once() -> None:
    prefixes, case = Prefixes("small", make("")), Case("small", 3, 20, 9)
    found = timing.time_step(prefixes.of(case)[1].fork(3), 9, seconds=0.0)
    assert found.lengths == (5,)
    assert found.replays == 1
    assert found.seconds == found.at[0]


def test_bad_cases() -> None:
    with pytest.raises(ValueError, match="batch must be a multiple of the 8 branches, got 12"):
        Case("small", 12, 20, 9, branches=8, branch=4)
    with pytest.raises(ValueError, match="in the model's 256 positions, got 257 in all"):
        bench.measure(Prefixes("small", make("")), Case("small", 2, 248, 9))


def test_random_models_are_born_in_their_dtype(tmp_path: Path) -> None:
    make("").config.save_pretrained(tmp_path)
    model = random_model(tmp_path, "bfloat16", "cpu")
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert not any(x.requires_grad for x in model.parameters())


def test_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goal of ci/generation.py at its border, from made-up rows."""
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    import generation  # noqa: PLC0415 - a program, not a package

    assert all(value == "not measured" and met is None for _, value, met in generation.goals([]))

    def row(model: str, batch: int, prefix: int, branches: int = 0, **rates: float) -> dict[str, Any]:
        ways = dict.fromkeys(("ours", "attention_off", "per_sequence_read", "first_level_only"))
        step = {"host_seconds": 1e-3, "seconds": 9e-3, "graph": True}
        details = {"roof_s": rates.pop("roof_s", None), "step": {"ours": step}}
        case = {"model": model, "batch": batch, "prefix": prefix, "branches": branches}
        return {**case, **ways, **rates, "details": details}

    # A step of 256 rows that takes 10 ms without attention and 13 ms with it, where the roof is 2 ms
    near = {"ours": 256 / 13e-3, "attention_off": 256 / 10e-3, "roof_s": 2.001e-3}
    met = [
        row("codellama-13b", 512, 16256, ours=3201, per_sequence_read=100),
        *(row(m, 256, p, **near) for m in ("codellama-13b", "llama-3.1-8b") for p in (2048,)),
        row("llama-3.1-8b", 256, 16256, **near),
        row("codellama-13b", 256, 16256, per_sequence_read=9.9, **near),
        row("codellama-13b", 256, 1024, ours=256 / 13e-3 / 0.751, per_sequence_read=100),
        row("codellama-13b", 32, 2048, ours=85.1, attention_off=100),
        row("llama-3.1-8b", 512, 2048, 8, ours=100, first_level_only=44.9),
        row("llama-3.1-8b", 256, 65536, ours=20, per_sequence_read=1),
    ]
    found = list(generation.goals(met))
    assert [ok for _, _, ok in found] == [True, None] + [True] * 8 + [None, True], found
    missed = [
        row("codellama-13b", 512, 16256, ours=3199, per_sequence_read=100),
        *(row(m, 256, 2048, **{**near, "roof_s": 1.99e-3}) for m in ("codellama-13b", "llama-3.1-8b")),
        row("llama-3.1-8b", 256, 16256, **{**near, "roof_s": 1.99e-3}),
        row("codellama-13b", 256, 16256, per_sequence_read=10.1, **{**near, "roof_s": 1.99e-3}),
        row("codellama-13b", 256, 1024, ours=256 / 13e-3 / 0.749, per_sequence_read=100),
        row("codellama-13b", 32, 2048, ours=84.9, attention_off=100),
        row("llama-3.1-8b", 512, 2048, 8, ours=100, first_level_only=45.1),
    ]
    missed[-2]["details"]["step"]["ours"]["host_seconds"] = 10e-3
    found = list(generation.goals(missed))
    assert [ok for _, _, ok in found] == [False, None] + [False] * 8 + [None, False], found
