"""What the suite's report promises: failures that can be run again, known ones that are what is listed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
THEIRS = """
import torch
from faulty_attention import attention

def pages(problem, inputs):
    return attention(problem, inputs, None if inputs.pages is None else "page table ignored")
pages.capabilities = {"paged": True}

def capped(problem, inputs):
    out, lse = attention(problem, inputs)
    return (out if problem.softcap is None else out + 1), lse

def crashes(problem, inputs):
    out, lse = attention(problem, inputs)
    return (out if problem.softcap is None else misspelt(out)), lse

def refuses(problem, inputs):
    raise NotImplementedError("not yet")

def three(problem, inputs):
    return (*attention(problem, inputs), 3)

def leaves(problem, inputs):
    import pytest
    pytest.exit("done", returncode=0)

def ends(problem, inputs):
    raise SystemExit(0)

def skips(problem, inputs):
    import unittest
    raise unittest.SkipTest("not today")

def rejects(problem, inputs):
    import hypothesis
    hypothesis.reject()

def breaks(problem, inputs):
    class Own(BaseException):
        pass
    raise Own("away")

class Liar(torch.Tensor):
    pass

def lies(problem, inputs):
    return attention(problem, inputs)[0].as_subclass(Liar)

def sparse(problem, inputs):
    return attention(problem, inputs)[0].to_sparse()

def without_data(problem, inputs):
    return attention(problem, inputs)[0].to("meta")

def long_halves(problem, inputs):
    out, lse = attention(problem, inputs)
    return (out + 1 if problem.dtype == torch.float16 and problem.total_kv > 40 else out), lse

def in_order(problem, inputs):
    assert problem.row_to_node == tuple(range(problem.num_rows)), "row i has segment i"
    return attention(problem, inputs)
in_order.capabilities = {"trees": "none"}

def below_one(problem, inputs):
    assert problem.row_to_node == tuple(range(1, 1 + problem.num_rows)), "row i has segment i + 1"
    return attention(problem, inputs)
below_one.capabilities = {"trees": "prefix"}

def listed(problem, inputs):
    return attention(problem, inputs)
listed.capabilities = ["causal"]

def silent(problem, inputs):
    assert problem.num_rows < 3
    return attention(problem, inputs)
"""
CAPPED = '[[fails]]\nwhen = "problem.softcap is not None"\nreason = "cap"\n'


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("reported")
    (path / "theirs.py").write_text(THEIRS)
    return path


def python(home, *args):
    paths = [home, ROOT / "src", ROOT / "reference", ROOT / "tests"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "HYPOTHESIS_PROFILE": "dev"}
    env.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [sys.executable, *args], cwd=home, env=env, capture_output=True, text=True, check=False
    )


def suite(home, name, *options, known=None):
    if known is not None:
        (home / f"{name}.toml").write_text(known)
        options += (f"--known-failures={name}.toml",)
    plugins = ("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "hydragen.testing.conformance.plugin")
    asked = ("--pyargs", "hydragen.testing.conformance", f"--implementation=theirs:{name}")
    written = f"--conformance-json={name}.json"
    done = python(home, "-m", "pytest", *plugins, "-q", "--hypothesis-seed=0", *asked, written, *options)
    report = home / f"{name}.json"
    return done, json.loads(report.read_text()) if report.exists() else {}


def test_a_failure_can_be_run_again_by_what_is_printed(home):
    done, found = suite(home, "pages", "-k", "paging")
    assert done.returncode == 1, done.stdout
    (law,) = (law for law in found["laws"] if law["outcome"] == "FAILED")
    assert law["reproduce"].startswith("laws.paging_changes_nothing(fn, Problem(")
    printed = done.stdout.partition("to run one of these again:\n")[2].partition("=====")[0]
    lines = [line.strip() for line in printed.splitlines() if line.startswith("  ")]
    assert lines[-1] == 'fn = named("theirs:pages")'
    assert f"  {law['reproduce']}\n" in done.stdout
    again = python(home, "-c", "\n".join([*lines, law["reproduce"]]))
    assert "AssertionError" in again.stderr
    assert "outside of the error budget" in again.stderr


def test_known_problems_of_pages_must_still_fail_too(home):
    known = '[[fails]]\nwhen = "max(problem.kv_lens) > 40"\nreason = "pages"\n'
    done, found = suite(home, "pages", "-k", "known or out_and", known=known)
    assert done.returncode == 0, done.stdout
    assert found["counts"]["known to fail"] == 1
    assert found["known_failures"][0]["reason"] == "pages"


def test_another_failure_is_not_the_known_one(home):
    done, _ = suite(home, "capped", "-k", "known or out_and", known=CAPPED)
    assert done.returncode == 0, done.stdout
    assert "known to fail: problems with problem.softcap is not None (cap)" in done.stdout
    done, _ = suite(home, "crashes", "-k", "known or out_and", known=CAPPED)
    assert done.returncode == 1
    assert "NameError: name 'misspelt' is not defined" in done.stdout
    done, found = suite(home, "crashes", "-k", "known or out_and", known=CAPPED + 'error = "NameError"\n')
    assert done.returncode == 0, done.stdout
    assert found["known_failures"][0]["error"] == "NameError"


@pytest.mark.parametrize(("error", "code"), [("", 1), ('error = "NameError"\n', 0)])
def test_a_law_fails_as_listed_or_is_red(home, error, code):
    known = f'[[fails]]\nlaw = "out_and_lse_match_the_oracle"\nreason = "cap"\n{error}'
    done, found = suite(home, "crashes", "-k", "out_and", known=known)
    assert done.returncode == code, done.stdout
    assert found["counts"]["known to fail"] == 1 - code


def test_what_was_left_out_is_said_at_the_end(home):
    known = '[[skips]]\nwhen = "problem.window is not None"\nreason = "none"\n'
    done, found = suite(home, "capped", "-k", "two_runs", "--capability=softcap=no", known=known)
    assert done.returncode == 0, done.stdout
    end = done.stdout.partition("= conformance =")[2]
    assert "asked for: softcap=no\n" in end
    assert "skipped: problems with problem.window is not None (none)\n" in end
    assert found["known_failures"] == [
        {"kind": "skips", "when": "problem.window is not None", "reason": "none"}
    ]
    assert "came without lse" not in end, "two runs are compared with each other"
    assert found["without_lse"] == 0


def test_a_function_that_refuses_everything_is_told_so(home):
    done, found = suite(home, "refuses", "-k", "out_and")
    assert done.returncode == 1
    (law,) = (law for law in found["laws"] if law["outcome"] == "FAILED")
    assert law["where"].startswith("the function refused ")
    assert "(not yet) and did 0: say by --capability what it cannot do" in law["where"]
    assert law["smallest_failing_problem"] == law["reproduce"] == ""


def test_three_results_are_refused_and_a_silent_assertion_is_named(home):
    done, _ = suite(home, "three", "-k", "out_and")
    assert "an implementation must return out or (out, lse), got 3 results" in done.stdout
    done, _ = suite(home, "silent", "-k", "out_and")
    assert "smallest failing case of out_and_lse_match_the_oracle: assert" in done.stdout or (
        "AssertionError without a message" in done.stdout
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leaves", "the implementation ended the process: Exit('done')"),
        ("ends", "the implementation ended the process: SystemExit(0)"),
        ("skips", "the implementation raised SkipTest, which skips a test: raise NotImplementedError"),
        ("rejects", "the implementation called Hypothesis's reject or assume: raise NotImplementedError"),
        ("breaks", "which is no Exception"),
        ("lies", "an implementation must return plain tensors, got Liar for out"),
        ("sparse", "an implementation must return dense tensors, got the layout torch.sparse_coo for out"),
        ("without_data", "an implementation must return dense tensors, got no data (meta) for out"),
    ],
)
def test_what_is_no_result_is_a_failure(home, name, message):
    done, found = suite(home, name, "-k", "out_and")
    assert done.returncode == 1, done.stdout
    assert message in done.stdout
    assert found["counts"]["FAILED"] == 1


@pytest.mark.parametrize("text", ["raise RuntimeError('no GPU')", "raise SystemExit(0)", "def f(:"])
def test_a_module_that_cannot_be_imported_is_a_usage_error(home, text):
    (home / "broken.py").write_text(text)
    done, _ = suite(home, "right", "--implementation=broken:f")
    assert done.returncode == 4, done.stdout
    assert "--implementation broken:f: importing it raised" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ("[[fails]]\nlaw = 'x'\nreason = 'y'\nerror = ''", "error must be the name of an exception, got ''"),
        ("[[skips]]\nlaw = 'x'\nreason = 'y'\nerror = 'E'", "an error only if it fails"),
        (
            "[[fails]]\nwhen = '1 / (problem.num_rows - 2) > 0'\nreason = 'y'",
            "when must be an expression of every problem, got '1 / (problem.num_rows - 2) > 0', which raises",
        ),
    ],
)
def test_wrong_entries_are_named(home, known, message):
    done, _ = suite(home, "capped", "-k", "out_and or known", known=known)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_a_report_that_cannot_be_written_is_said_at_once(home):
    done, _ = suite(home, "capped", "-k", "out_and", "--conformance-json=theirs.py/x.json")
    assert done.returncode == 4
    assert "--conformance-json must be a file that can be written" in done.stdout + done.stderr
    assert "conformance =" not in done.stdout


def test_the_case_that_is_shown_fails_even_where_the_last_one_tried_does_not(home):
    """Of examples that are written down Hypothesis tries all, and raises what one of them did."""
    done, found = suite(home, "long_halves", "-k", "corners")
    assert done.returncode == 1, done.stdout
    (law,) = (law for law in found["laws"] if law["outcome"] == "FAILED")
    assert "dtype=torch.float16" in law["smallest_failing_problem"]
    imports = (
        "import torch\nfrom hydragen.testing import Problem, laws\nfrom theirs import long_halves as fn\n"
    )
    again = python(home, "-c", imports + law["reproduce"])
    assert "outside of the error budget" in again.stderr


@pytest.mark.parametrize("name", ["in_order", "below_one"])
def test_a_function_without_trees_need_not_know_another_order(home, name):
    done, found = suite(home, name)
    assert done.returncode == 0, done.stdout
    assert {law["outcome"] for law in found["laws"] if law["law"].startswith("permuting")} == {"held"}


def test_why_a_known_failure_is_red(home):
    fixed = '[[fails]]\nwhen = "problem.window is not None"\nreason = "old"\n'
    done, found = suite(home, "capped", "-k", "known", "--capability=softcap=no", known=fixed)
    assert done.returncode == 1
    said = "works now: problem.window is not None (old): remove it from the known failures"
    assert [law["reason"] for law in found["laws"]] == [said]
    assert f"  {said}\n" in done.stdout.partition("= conformance =")[2]
    law = '[[fails]]\nlaw = "two_runs_give_the_same_bits"\nreason = "old"\n'
    done, found = suite(home, "capped", "-k", "two_runs", known=law)
    assert done.returncode == 1
    assert found["laws"][0]["reason"].startswith("works now: two_runs_give_the_same_bits (old)")
    for name, known in (
        ("crashes", CAPPED),
        ("crashes", law.replace("two_runs_give_the_same_bits", "out_is_linear_in_v")),
    ):
        done, found = suite(home, name, "-k", "known or linear", known=known)
        assert done.returncode == 1
        (reason,) = (law["reason"] for law in found["laws"] if law["outcome"] == "FAILED")
        assert reason.startswith("not as listed, which is AssertionError, but by NameError: name 'misspelt'")
        assert reason.endswith('write error = "NameError"')


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--known-failures", "known.toml"), "--known-failures must be given as --known-failures=FILE"),
        (("--conformance-json", "r.json"), "--conformance-json must be given as --conformance-json=FILE"),
        (("--hypothesis-profile=foo",), "--hypothesis-profile must be one of dev, ci, nightly, or one"),
        (("--implementation=theirs:listed",), "theirs:listed.capabilities must be a dict of capabilities"),
        (("--capability=gqa=no", "--capability=group_sizes=4"), "group_sizes must be left out, or 1"),
    ],
)  # fmt: skip
def test_options_that_would_be_misread_are_refused(home, options, message):
    done, _ = suite(home, "capped", "-k", "out_and", *options)
    assert done.returncode == 4, done.stdout
    assert message in done.stdout + done.stderr
    assert "INTERNALERROR" not in done.stdout + done.stderr


def test_a_law_that_is_listed_but_not_tested_is_refused(home):
    known = '[[fails]]\nlaw = "paging_changes_nothing"\nreason = "w"\n'
    done, _ = suite(home, "capped", known=known)
    assert done.returncode == 4, done.stdout
    assert "paging_changes_nothing is not tested (not a capability: paged)" in done.stdout + done.stderr


def test_scale_names_what_is_wrong_and_how_much_was_tried(home):
    scale = ("-m", "hydragen.testing.scale", "--cases=20", "--batch=10")
    for options, message in (
        (("--implementation=theirs:nobody",), "error: --implementation theirs:nobody: "),
        (("--implementation=theirs:capped", "--capability=causal=maybe"), "error: --capability: capability"),
    ):  # fmt: skip
        done = python(home, *scale, *options)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    done = python(home, *scale, "--implementation=theirs:capped", "--seed=1", "--json=scale.json")
    assert "2 of 24 configurations were tried" in done.stdout
    found = json.loads((home / "scale.json").read_text())
    assert found["configurations_tried"] == 2
    for failure in found["first_failures"]:
        assert not failure["reproduce"] or failure["reproduce"].startswith("laws.")


def test_a_run_in_which_nothing_was_tested_is_not_green(home):
    known = '[[skips]]\nlaw = "two_runs_give_the_same_bits"\nreason = "slow"\n'
    done, found = suite(home, "capped", "-k", "two_runs", known=known)
    assert done.returncode == 5, done.stdout
    assert "nothing was tested" in done.stdout
    assert found["counts"] == {"held": 0, "FAILED": 0, "known to fail": 0, "not tested": 1}
