"""The suite as a command, for functions that are right, wrong, narrow or known to be wrong."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from faulty_attention import attention

from hydragen.testing import Problem
from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.conformance.subject import adapt, bound, load
from hydragen.testing.pages import in_pages, paged

ROOT = Path(__file__).resolve().parent.parent
THEIRS = """
import torch
from faulty_attention import attention

__version__ = "3.1"

def right(problem, inputs):
    return attention(problem, inputs)

def wrong(problem, inputs):
    return attention(problem, inputs, "GQA heads interleaved")

def narrow(problem):  # one argument: the tensors come with the problem
    assert problem.head_dim == 8 and not problem.sinks and problem.parents.count(-1) == 1
    if problem.causal:
        raise NotImplementedError
    return attention(problem, problem.tensors())[0]

narrow.capabilities = {"head_dims": (8,), "sinks": False, "trees": "prefix"}

calls = 0

def restless(problem, inputs):  # wrong every fifth time, as a race would be
    global calls
    calls += 1
    out, lse = attention(problem, inputs)
    return (out + 1 if calls % 5 == 0 else out), lse

lasting = {}

def one_buffer(problem, inputs):  # right, and its results lie where the last ones lay, as a graph's do
    results = attention(problem, inputs)
    buffers = [lasting.setdefault((x.dtype, x.dim()), x.new_empty(2**20)) for x in results]
    return tuple(old[: x.numel()].view(x.shape).copy_(x) for old, x in zip(buffers, results, strict=True))

def skips(problem, inputs):
    import pytest
    pytest.skip("not today")

def expects(problem, inputs):
    import pytest
    pytest.xfail("somebody else's")

def choosy(problem, inputs):
    if problem.causal:
        raise NotImplementedError
    out, lse = attention(problem, inputs)
    return out, (lse if problem.window is None else None)

def partly(problem, inputs):
    out, lse = attention(problem, inputs, "softcap dropped")
    return out, lse
"""
KNOWN = """
[[fails]]
when = "problem.softcap is not None"
reason = "softcap ignored, issue 31"

[[fails]]
when = "problem.window == 3"
reason = "repaired long ago"

[[fails]]
law = "permuting_rows_permutes_results"
reason = "holds, in fact"

[[skips]]
law = "out_is_linear_in_v"
reason = "not of interest"
"""
LAWS = 17
OF_PAGES = 2


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "theirs.py").write_text(THEIRS)
    (folder / "known.toml").write_text(KNOWN)
    return folder


def suite(home: Path, name: str, *options: str) -> subprocess.CompletedProcess:
    """Run it as somebody would who has hydragen and nothing of its repository."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HYP", "PYTEST"))
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(home), str(ROOT / "tests"), *sys.path])
    environment["HYPOTHESIS_PROFILE"] = "dev"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    # what the entry point of an installed package does
    command += ["-p", "hydragen.testing.conformance.plugin", "--pyargs", "hydragen.testing.conformance"]
    if name:
        command += ["--implementation", f"theirs:{name}"]
    return subprocess.run([*command, *options], cwd=home, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def right(home):
    return suite(
        home, "right", "--conformance-json=r.json", "--junitxml=r.xml", "--capability=dtypes=float32,float16"
    )


def test_a_right_function_holds_every_law(right):
    assert right.returncode == 0, right.stdout
    held = f"{LAWS - OF_PAGES} laws held, 0 failed, 0 known to fail, {OF_PAGES} not tested"
    assert held in right.stdout
    assert "not a capability: paged" in right.stdout


def test_the_header_says_what_is_tested_and_how_to_repeat_it(right):
    head = right.stdout.partition("collected")[0]
    assert "implementation: theirs:right 3.1" in head
    assert f"torch={torch.__version__}" in head
    assert "tensors on cpu" in head
    assert "dtypes=float32,float16" in head
    assert "profile dev, 15 examples a law, repeat with --hypothesis-seed=" in head


def test_the_report_as_json_and_junit(right, home):
    report = json.loads((home / "r.json").read_text())
    assert report["counts"] == {
        "held": LAWS - OF_PAGES, "FAILED": 0, "known to fail": 0, "not tested": OF_PAGES,
    }  # fmt: skip
    assert set(report["worst_over_budget"]) == {"float32", "float16"}
    assert all(0 < ratio < 1 for of in report["worst_over_budget"].values() for ratio in of.values())
    assert report["cases"] == sum(law["cases"] for law in report["laws"]) > 15 * (LAWS - 6)
    first = next(law for law in report["laws"] if law["law"] == "out_and_lse_match_the_oracle")
    assert first["cases"] == 15
    cases = ET.parse(home / "r.xml").getroot().iter("testcase")
    properties = {case.get("name"): {p.get("name") for p in case.iter("property")} for case in cases}
    assert {"cases", "worst_out_float32", "worst_lse_float16"} <= properties[
        "test_out_and_lse_match_the_oracle[theirs:right]"
    ]


def test_a_wrong_function_fails_with_the_smallest_case(home):
    options = ("-k", "lse_match_the_oracle", "--hypothesis-seed=0", "--conformance-json=w.json")
    wrong = suite(home, "wrong", *options)
    assert wrong.returncode == 1, wrong.stdout
    assert "is outside of the error budget" in wrong.stdout
    assert "laws.matches_oracle(fn, Problem(" in wrong.stdout
    assert 'fn = named("theirs:wrong")' in wrong.stdout
    law = json.loads((home / "w.json").read_text())["laws"][0]
    assert law["outcome"] == "FAILED"
    assert f"smallest failing case of {law['test']}" in wrong.stdout
    smallest = eval(law["smallest_failing_problem"], {"Problem": Problem, "torch": torch})
    assert smallest.num_nodes <= 3
    assert smallest.total_kv + smallest.total_q <= 8
    assert smallest.num_kv_heads == 2
    # what is said to be wrong is wrong with that case, not with the one that it was shrunk from
    row, query = map(int, re.search(r"at row (\d+), query (\d+)", law["where"]).groups())
    assert query < smallest.q_lens[row]


def test_a_function_that_answers_otherwise_each_time_fails(home):
    """The report comes, though the case with which Hypothesis ends may not fail again."""
    done = suite(home, "restless", "-k", "lse_match_the_oracle or same_bits", "--conformance-json=r.json")
    assert done.returncode == 1, done.stdout
    assert "INTERNALERROR" not in done.stdout
    assert {law["outcome"] for law in json.loads((home / "r.json").read_text())["laws"]} == {"FAILED"}


def test_results_may_lie_in_memory_that_is_used_again(home):
    laws = "lse_match_the_oracle or linear_in_v or same_bits"
    done = suite(home, "one_buffer", "-k", laws, "--conformance-json=b.json")
    assert done.returncode == 0, done.stdout
    assert {law["outcome"] for law in json.loads((home / "b.json").read_text())["laws"]} == {"held"}


@pytest.mark.parametrize("name", ["skips", "expects"])
def test_a_function_cannot_end_its_own_test(home, name):
    """pytest.skip or xfail within it: a law that was never tried does not pass, nor is it known to fail."""
    done = suite(home, name, "-k", "lse_match_the_oracle", "--conformance-json=s.json")
    assert done.returncode == 1, done.stdout
    assert "raise NotImplementedError for what it cannot do" in done.stdout
    assert json.loads((home / "s.json").read_text())["counts"]["FAILED"] == 1


def test_the_report_counts_what_was_refused_and_what_came_without_lse(home):
    options = ["-k", "lse_match_the_oracle", "--conformance-json=c.json", "--hypothesis-seed=0"]
    done = suite(home, "choosy", *options)
    assert done.returncode == 0, done.stdout
    found = json.loads((home / "c.json").read_text())
    assert found["refused"] > 0
    assert 0 < found["without_lse"] < found["cases"]
    assert f"{found['refused']:,} problems were refused by the function" in done.stdout
    assert f"{found['without_lse']:,} of these cases came without lse" in done.stdout


def test_a_module_in_the_current_folder_is_found(home):
    """As the `pytest` command is run, which does not look there by itself."""
    (home / "here").mkdir()
    (home / "here" / "mine.py").write_text(THEIRS)
    start = "import sys; sys.path[:] = filter(None, sys.path); import pytest; sys.exit(pytest.main())"
    options = ["-p", "no:cacheprovider", "-p", "hydragen.testing.conformance.plugin", "--collect-only", "-q"]
    options += ["--pyargs", "hydragen.testing.conformance", "--implementation", "mine:right"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", start, *options],
        cwd=home / "here",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_narrow_function_of_one_argument(home):
    # it refuses more than half of what is drawn, so that some seeds give hypothesis too little
    narrow = suite(home, "narrow", "--hypothesis-seed=0")
    assert narrow.returncode == 0, narrow.stdout
    assert " laws held, 0 failed" in narrow.stdout, narrow.stdout
    for law in (
        "corners_match_the_oracle ",
        "permuting_rows_permutes_results",
        "equal_heads_may_lie_in_one_place",
    ):
        assert re.search(rf"^{law} +held", narrow.stdout, re.MULTILINE), narrow.stdout
    assert "not a capability: trees" in narrow.stdout


def test_known_failures_are_strict(home):
    run = suite(
        home,
        "partly",
        "--known-failures=known.toml",
        "-k=lse_match_the_oracle or permuting or linear or known",
        "--conformance-json=k.json",
        "--hypothesis-seed=0",
    )
    report = json.loads((home / "k.json").read_text())
    laws = report["laws"]
    outcomes = {law["test"].partition("[")[2][:-1] or law["law"]: law["outcome"] for law in laws}
    assert outcomes == {
        "out_and_lse_match_the_oracle": "held",  # softcaps are left out
        "permuting_rows_permutes_results": "FAILED",  # listed, but holds
        "out_is_linear_in_v": "not tested",
        "problem.softcap is not None": "fails, as known",  # still fails, as listed
        "problem.window == 3": "FAILED",
    }, run.stdout
    assert report["counts"] == {"held": 1, "FAILED": 2, "known to fail": 1, "not tested": 1}
    assert report["cases"] == sum(law["cases"] for law in laws if law["outcome"] == "held")
    assert f"{1} laws held, 2 failed, 1 known to fail, 1 not tested" in run.stdout
    assert re.search(
        r"known_failures_still_fail\[problem\.softcap is not None\] +fails, as known", run.stdout
    )
    assert "works now: problem.window == 3 (repaired long ago)" in run.stdout
    assert "holds, in fact" in run.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name a function with --implementation module:function"),
        (["--implementation=theirs:right", "--capability=causal"], "must be name=value, got 'causal'"),
    ],
)  # fmt: skip
def test_wrong_options_are_usage_errors(home, options, message):
    done = suite(home, "", *options)
    assert done.returncode in (2, 4), done.stdout
    assert message in done.stdout + done.stderr


def test_functions_that_cannot_be_loaded():
    for path, message in (
        ("faulty_attention", "must be module:function, got 'faulty_attention'"),
        ("faulty_attention:nobody", "has no attribute 'nobody'"),
        ("faulty_bugs:BUGS", "got dict"),
        ("nowhere:f", "No module named 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path)
    assert load("hydragen.testing:Problem.path") is Problem.path


def test_lse_is_asked_for_dropped_or_judged_where_it_is():
    problem = Problem((-1,), (3,), (0,), (2,))
    inputs = problem.tensors()
    no_lse = adapt(lambda problem, inputs: inputs.q, Capabilities(lse=True))
    with pytest.raises(AssertionError, match="lse is not returned, but the capability lse=yes says so"):
        no_lse(problem, inputs)
    assert adapt(attention, Capabilities(lse=False))(problem, inputs)[1] is None
    assert adapt(attention, Capabilities())(problem, inputs)[1] is not None


def test_a_bound_problem_gives_out_the_tensors_of_the_call():
    problem = Problem((-1, 0), (3, 2), (1,), (2,))
    inputs = problem.tensors().with_memory("sliced")
    given = bound(problem, inputs)
    assert given.tensors() is inputs
    assert given.as_packed().q is inputs.q
    assert repr(given) == repr(problem)


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_pages_hold_every_token_once_and_nan_elsewhere(page_size):
    problem = Problem((-1, 0, 0), (7, 0, 4), (1, 2), (1, 1), num_kv_heads=1)
    inputs = problem.tensors()
    pages = paged(problem, inputs, page_size, seed=3)
    starts, indptr = inputs.cu_seqlens_k.tolist(), pages.page_indptr.tolist()
    assert len(set(pages.page_indices.tolist())) == len(pages.page_indices) < len(pages.k_cache)
    for node, kv_len in enumerate(problem.kv_lens):
        mine = pages.k_cache[pages.page_indices[indptr[node] : indptr[node + 1]].long()].flatten(0, 1)
        assert torch.equal(mine[:kv_len], inputs.k[starts[node] : starts[node] + kv_len])
        assert mine[kv_len:].isnan().all()
    assert int((~pages.v_cache.isnan()).sum()) == inputs.v.numel()
    lent = in_pages(problem, inputs, page_size)
    assert lent.k.isnan().all()
    assert lent.clone().pages.k_cache.data_ptr() != lent.pages.k_cache.data_ptr()
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        paged(problem, inputs, 0)
