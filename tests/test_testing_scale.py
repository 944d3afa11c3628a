"""Forests hold what they say, a run counts what it judged, a mistake is found, shrunk and written down."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_attention import attention

from hydragen.testing import Problem
from hydragen.testing.adapters.ours import attend
from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.conformance.subject import adapt
from hydragen.testing.forests import configurations, draw_forest
from hydragen.testing.scale import main, run_scale
from hydragen.testing.warm import warm_up

SMALL = Capabilities(head_dims=(8, 5), max_kv=33, group_sizes=(1, 3))


def test_a_forest_is_its_cases():
    rng = np.random.default_rng(0)
    (configuration,) = configurations(SMALL, 1, rng)
    forest = draw_forest(SMALL, configuration, 30, rng)
    cases = [forest.case(number) for number in range(30)]
    assert [case.parents.count(-1) for case in cases] == [1] * 30
    assert sum((case.kv_lens for case in cases), ()) == forest.problem.kv_lens
    assert sum(case.num_rows for case in cases) == forest.problem.num_rows
    for row, number in enumerate(forest.case_of_row):
        root = forest.problem.path(row)[0]
        assert forest.roots[number] == root


def test_hard_cases_are_drawn_often():
    rng = np.random.default_rng(1)
    can = Capabilities()
    drawn = []
    for configuration in configurations(can, 12, rng):
        forest = draw_forest(can, configuration, 40, rng)
        drawn += [forest.case(number) for number in range(40)]

    def share(looks) -> float:
        return sum(map(looks, drawn)) / len(drawn)

    assert share(lambda p: 0 in p.kv_lens) > 0.2
    assert share(lambda p: 0 in [p.path_len(row) for row in range(p.num_rows)]) > 0.1
    assert share(lambda p: any(abs(n - tile) <= 1 for n in p.kv_lens for tile in (16, 32, 64, 128))) > 0.3
    assert share(lambda p: max(len(p.path(row)) for row in range(p.num_rows)) > 2) > 0.1
    assert share(lambda p: len(set(p.row_to_node)) < p.num_rows) > 0.3
    assert share(lambda p: max(p.q_lens) > 1) > 0.3
    assert {p.dtype for p in drawn} == set(can.dtypes)
    assert {p.causal for p in drawn} == {p.sinks for p in drawn} == {False, True}


def test_configurations_keep_to_the_capabilities():
    can = Capabilities(
        causal="no", sinks="always", gqa=False, head_dims=(64,), same_head_dim_v=True, softcap="no"
    )
    for configuration in configurations(can, 20, np.random.default_rng(0)):
        assert configuration.pop("page_size") == 0
        problem = Problem((-1,), (3,), (0,), (1,), **configuration)
        assert can.allows(problem), problem
    sizes = [
        configuration["page_size"]
        for configuration in configurations(Capabilities(paged=True), 36, np.random.default_rng(0))
    ]
    assert sizes.count(0) == 27
    assert len(set(sizes)) == 4
    with pytest.raises(ValueError, match="trees must be any, got prefix"):
        configurations(Capabilities(trees="prefix"), 1, np.random.default_rng(0))


def test_a_run_counts_what_it_judged():
    outcome = run_scale(attention, SMALL, cases=70, batch=25, num_configurations=2)
    assert (outcome.cases, outcome.batches, outcome.failures) == (70, 3, 0)
    assert outcome.oracle_cases == 6
    assert outcome.oracle_apart <= 1
    assert all(0 < ratio < 1 for of in outcome.tally.worst.values() for ratio in of.values())
    assert {"draw", "oracle_check", "tensors", "first_calls", "calls", "judge"} == outcome.phases.keys()
    assert run_scale(attention, SMALL, cases=100, seconds=0.0).cases == 0


@pytest.mark.parametrize("bug", ["causal mask one too many", "rows in tree order", "tile remainder dropped"])
def test_a_mistake_is_found_and_shrunk(bug):
    faulty = functools.partial(attention, bug=bug)
    can = Capabilities(**{**SMALL.__dict__, "causal": "always"})
    outcome = run_scale(faulty, can, cases=80, batch=20, num_configurations=1)
    assert 0 < outcome.failures <= 80
    text = outcome.shown[0]["problem"].removesuffix(" (only together with the rest of its batch)")
    smallest = eval(text, {"Problem": Problem, "torch": torch})
    assert smallest.num_nodes <= 6


def test_the_command_writes_what_it_found(tmp_path, capsys):
    options = [
        "--cases=12",
        "--batch=6",
        "--configurations=2",
        "--capability=max_kv=20",
        "--capability=head_dims=8",
    ]
    path = tmp_path / "scale.json"
    right = ["--implementation=hydragen.testing.adapters.ours:reference", f"--json={path}"]
    assert main([*options, *right], commit="abc") == 0
    report = json.loads(path.read_text())
    assert (report["cases"], report["failures"], report["seed"], report["commit"]) == (12, 0, 0, "abc")
    assert report["worst_over_budget"].keys() <= {"float32", "float16", "bfloat16"}
    assert {"device", "versions", "phases", "complete", "capabilities"} <= report.keys()
    assert "12 cases, 0 failures, seed 0" in capsys.readouterr().out
    assert main([*options, "--implementation=test_testing_scale:wrong"]) == 1
    assert main([*options, "--implementation=faulty_attention:attention", "--seconds=0"]) == 1


def nothing(problem, inputs):
    return None


def wrong(problem, inputs):
    out, lse = attention(problem, inputs)
    return out * 1.5, lse


def modifying(problem, inputs):
    inputs.q.mul_(0.5)
    return attention(problem, inputs)


def raising(problem, inputs):
    raise RuntimeError("an illegal memory access was encountered")


def refusing(problem, inputs):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (modifying, "q was modified"),
        (raising, "RuntimeError: an illegal"),
        (nothing, "as tensors, got NoneType"),
    ],
)
def test_whatever_goes_wrong_is_counted_and_written_down(function, said):
    outcome = run_scale(function, SMALL, cases=20, batch=10, num_configurations=1)
    assert (outcome.cases, outcome.failures) == (20, 20)
    assert said in outcome.shown[0]["error"]
    assert any(said in line for line in outcome.lines())


def test_what_is_refused_is_no_case():
    outcome = run_scale(adapt(refusing, SMALL), SMALL, cases=20, batch=10, num_configurations=1)
    assert (outcome.cases, outcome.failures, outcome.refused) == (0, 0, 20)


def slow(problem, inputs):
    time.sleep(0.3)
    return attention(problem, inputs)


def test_a_run_that_is_ended_from_outside_writes_what_it_found(tmp_path):
    path = tmp_path / "scale.json"
    command = [sys.executable, "-m", "hydragen.testing.scale", f"--json={path}", "--batch=2"]
    command += ["--implementation=test_testing_scale:slow", "--capability=max_kv=10", "--configurations=2"]
    folders = [Path(__file__).parent, *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # two batches are done
        process.terminate()
        assert process.wait(60) != 0
    report = json.loads(path.read_text())
    assert 0 < report["cases"] < 100_000
    assert (report["failures"], report["complete"]) == (0, False)


def test_first_calls_may_be_made_beforehand_and_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv("CALLS", str(tmp_path))
    monkeypatch.syspath_prepend(Path(__file__).parent)
    options = {"seed": 0, "num_configurations": 3, "batch": 4, "processes": 2}
    seconds = warm_up("test_testing_scale:noting", SMALL, **options, seconds=100.0)
    assert 0 < seconds < 100
    noted = [path.read_text() for path in tmp_path.iterdir()]
    # as many as there are configurations, in two processes; the first of the run are the same
    assert len(noted) == 3
    assert len({path.name.partition("-")[0] for path in tmp_path.iterdir()}) == 2
    seen = []
    run_scale(lambda problem, _: seen.append(repr(problem)), SMALL, cases=12, batch=4, num_configurations=3)
    assert set(seen) == set(noted)
    assert warm_up("test_testing_scale:noting", SMALL, **options, seconds=0.0) < 30


def noting(problem, inputs):
    path = Path(os.environ["CALLS"]) / f"{os.getpid()}-{problem.seed}"
    path.write_text(repr(problem))
    return attention(problem, inputs)


@pytest.mark.triton
def test_the_kernels_at_small_scale(device):
    can = Capabilities(
        head_dims=(16, 33), group_sizes=(1, 3), max_kv=40, max_nodes=4, max_rows=4, device=device.type
    )
    outcome = run_scale(
        functools.partial(attend, backend="triton"), can, cases=30, batch=10, num_configurations=3
    )
    assert (outcome.cases, outcome.failures) == (30, 0)
    assert outcome.oracle_apart <= 1
