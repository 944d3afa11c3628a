"""Forests hold what they say, a run counts what it judged, a mistake is found, shrunk and written down."""

import functools
import json

import numpy as np
import pytest
import torch
from faulty_attention import attention

from hydragen.testing import Problem
from hydragen.testing.adapters.ours import attend
from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.forests import configurations, draw_forest
from hydragen.testing.scale import main, run_scale

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
        problem = Problem((-1,), (3,), (0,), (1,), **configuration)
        assert can.allows(problem), problem


def test_a_run_counts_what_it_judged():
    outcome = run_scale(attention, SMALL, cases=70, batch=25, num_configurations=2)
    assert (outcome.cases, outcome.batches, outcome.failures) == (70, 3, 0)
    assert outcome.oracle_cases == 6
    assert outcome.oracle_apart <= 1
    assert all(0 < ratio < 1 for of in outcome.tally.worst.values() for ratio in of.values())
    assert run_scale(attention, SMALL, cases=100, seconds=0.0).cases == 0


@pytest.mark.parametrize("bug", ["causal mask one too many", "rows in tree order", "tile remainder dropped"])
def test_a_mistake_is_found_and_shrunk(bug):
    faulty = functools.partial(attention, bug=bug)
    can = Capabilities(**{**SMALL.__dict__, "causal": "always"})
    outcome = run_scale(faulty, can, cases=20, batch=20, num_configurations=1)
    assert 0 < outcome.failures <= 20
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
    assert {"device", "versions"} <= report.keys()
    assert "12 cases, 0 failures, seed 0" in capsys.readouterr().out
    assert main([*options, "--implementation=test_testing_scale:wrong"]) == 1
    assert main([*options, "--implementation=faulty_attention:attention", "--seconds=0"]) == 1


def wrong(problem, inputs):
    out, lse = attention(problem, inputs)
    return out * 1.5, lse


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
