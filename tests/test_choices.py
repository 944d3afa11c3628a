"""ci/choices.py: it plans what it says, times only what is right, and goes on where a run ended."""

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from running_on import CUDA

from hydragen import work

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "ci"))

import choices
from shapes import build, shape, uneven  # in tests/bench, which ci/choices.py puts on the path

SMALL, LARGE = shape("4/2 B3 P24 S5 d16 fp32"), shape("4/2 B3 P70 S5 d16 fp32")
TREE, FOREST = shape("4/2 1x70>2x9>4x3 d16 fp32"), uneven("uneven", groups=4, longest=70)
DEVICE = "cuda" if CUDA else "cpu"


class FakeTimer:
    """The n-th form made ready takes `us[n]`, for every shape again."""

    def __init__(self, *us: float) -> None:
        self.us, self.ready_ones = us, count()

    def ready(self, _run: Any) -> float:
        return self.us[next(self.ready_ones) % len(self.us)] * 1e-6

    def time(self, ready: float) -> float:
        return ready


@pytest.mark.triton
@pytest.mark.parametrize("this", [SMALL, LARGE, TREE, FOREST], ids=str)
@pytest.mark.parametrize("few", [False, True])
def test_each_path_is_planned_as_asked(this: Any, few: bool) -> None:
    before = work.is_small, work.apart_nodes
    inputs = build(this, DEVICE)
    batched, alone = (choices.plan_for(inputs, path, few).explain() for path in ("batched", "per_sequence"))
    assert (work.is_small, work.apart_nodes) == before
    # every node once; every row its whole path
    tokens = int(this.tree.kv_lens.sum()), int(this.tree.path_lens.sum())
    per_token = 2 * this.num_kv_heads * this.head_dim * this.dtype.itemsize
    assert (batched.bytes, alone.bytes) == tuple(per_token * n for n in tokens)


@pytest.mark.triton
def test_a_row() -> None:
    # auto, batched, batched few, per sequence, per sequence few
    row = choices.measure(SMALL, FakeTimer(12.0, 11.0, 10.0, 31.0, 30.5), DEVICE)
    forms = row.pop("forms")
    assert list(forms.values()) == [12.0, 11.0, 10.0, 31.0, 30.5]
    assert row == {
        "shape": SMALL.name, "auto_us": 12.0, "batched_us": 10.0, "per_sequence_us": 30.5,
        "chosen": row["chosen"], "better": "batched", "loss": 0.2,
    }  # fmt: skip
    assert choices.too_slow(row)
    if not CUDA:  # the interpreter's device: four multiprocessors, 16 keys a step
        assert row["chosen"] == "per_sequence"
        assert choices.measure(LARGE, FakeTimer(1.0), DEVICE)["chosen"] == "batched"


@pytest.mark.parametrize(
    ("auto", "batched", "per_sequence", "expected"),
    [
        (10.9, 10.0, 50.0, False),  # 9 %, but less than a µs
        (102.0, 120.0, 100.0, False),  # 2 µs, but 2 %
        (104.0, 120.0, 100.0, True),
        (104.0, 100.0, 120.0, True),
        (99.0, 120.0, 100.0, False),
    ],
)
def test_both_limits_must_be_passed(auto: float, batched: float, per_sequence: float, expected: bool) -> None:
    times = {("auto", False): auto, ("batched", False): batched, ("per_sequence", False): per_sequence}
    assert choices.too_slow(choices.judged("any", times, "mixed")) is expected


@pytest.mark.triton
def test_a_wrong_result_fails_and_gets_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = choices.hydragen.plan
    planned = count()

    class Wrong:
        def __init__(self, plan: Any) -> None:
            self.explain, self.right, self.number = plan.explain, plan.run, next(planned)

        def run(self, q: torch.Tensor, kv: Any) -> torch.Tensor:
            return self.right(q, kv) * (0.5 if self.number == 3 else 1)

    monkeypatch.setattr(choices.hydragen, "plan", lambda *args, **options: Wrong(right(*args, **options)))
    (row,) = choices.measure_all([SMALL], FakeTimer(1.0), DEVICE, 60)
    assert row.keys() == {"shape", "failed"}
    assert "per_sequence: row 0 is off by" in row["failed"]
    assert "FAILED" in capsys.readouterr().out


def test_shapes_are_those_promised_and_the_important_ones_come_first() -> None:
    shapes = [shape for group in choices.GROUPS.values() for shape in group]
    assert set(shapes) == {
        *choices.FIFTY_TWO,
        *(s for g in ("small", "pairs", "uneven") for s in choices.MORE[g]),
    }
    assert len(set(shapes)) == len(shapes)
    assert list(choices.GROUPS)[:3] == ["small", "pairs", "small batches"]
    assert all(this.q_len == 1 for this in shapes)  # else causal would have to be passed on


@pytest.mark.triton
def test_a_run_goes_on_where_the_last_one_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "choices.json"
    monkeypatch.setattr(choices, "GROUPS", {"small": [SMALL], "pairs": [LARGE]})

    def run(*arguments: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["choices.py", f"--out={out}", *arguments])
        with pytest.raises(SystemExit) as ended:
            choices.main(FakeTimer(10.0, 12.0, 13.0, 14.0, 9.5), DEVICE)
        rows = json.loads(out.read_text())["rows"] if out.exists() else []
        return ended.value.code, [row["shape"] for row in rows], capsys.readouterr().out

    code, shapes, said = run("--only=small")
    assert (code, shapes) == (0, [SMALL.name])  # 5 %, half a µs
    assert "0 of 1 shapes over 3% and 1.0 us, 0 failed" in said
    code, shapes, said = run("--seconds=0")
    assert shapes == [SMALL.name]
    assert "1 shapes not begun within 0 s" in said
    code, shapes, said = run()
    assert shapes == [SMALL.name, LARGE.name]
    assert out.with_suffix(".csv").read_text().splitlines()[:2] == [
        "shape,auto_us,batched_us,per_sequence_us,chosen,better,loss",
        f"{SMALL.name},10.0,12.0,9.5,{json.loads(out.read_text())['rows'][0]['chosen']},per_sequence,0.0526",
    ]
    monkeypatch.setattr(choices, "source_hash", lambda: "another")
    assert run("--only=pairs")[1] == [LARGE.name]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["choices.py", f"--out={tmp_path / 'x.json'}"])
    with pytest.raises(SystemExit, match="there is no GPU here"):
        choices.main()
