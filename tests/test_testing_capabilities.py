"""Capabilities and known failures: what they mean, and that mistakes in them are named."""

import pytest
import torch

from hydragen.testing import Problem
from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.conformance.known import read
from hydragen.testing.conformance.readers import parsed


def test_capabilities_as_values_and_as_text():
    said = {
        "dtypes": (torch.float16,),
        "head_dims": (64, 128),
        "causal": False,
        "sinks": "always",
        "lse": None,
    }
    text = ["dtypes=float16", "head_dims=64, 128", "causal=no", "sinks=always"]
    can = Capabilities().changed(said, "attribute")
    assert can == Capabilities().changed(parsed(text, "text"), "text")
    assert can.said() == {"dtypes": "float16", "head_dims": "64,128", "causal": "no", "sinks": "always"}
    assert Capabilities().changed(can.said(), "itself") == can


@pytest.mark.parametrize(
    ("trees", "problem", "allowed"),
    [
        ("prefix", Problem((-1, 0, 0), (3, 1, 2), (1, 2), (1, 1)), True),
        ("prefix", Problem((-1, 0, 0), (3, 1, 2), (2, 1), (1, 1)), False),
        ("prefix", Problem((-1,), (3,), (0,), (1,)), False),
        ("prefix", Problem((-1, 0), (3, 1), (1, 1), (1, 1)), False),
        ("none", Problem((-1, -1), (3, 1), (0, 1), (1, 1)), True),
        ("none", Problem((-1, -1), (3, 1), (1, 0), (1, 1)), False),
        ("none", Problem((-1, 0), (3, 1), (1,), (1,)), False),
        ("any", Problem((-1, 0), (3, 1), (1, 0, 1), (1, 1, 1)), True),
    ],
)
def test_kinds_of_trees(trees, problem, allowed):
    assert Capabilities(trees=trees).allows(problem) == allowed


@pytest.mark.parametrize("name", ["causal", "window", "softcap", "scale", "sinks"])
def test_what_is_no_capability_is_not_allowed(name):
    problem = Problem((-1,), (3,), (0,), (1,), **{name: True if name in ("causal", "sinks") else 2})
    assert Capabilities().allows(problem)
    assert not Capabilities(**{name: "no"}).allows(problem)
    assert Capabilities(**{name: "always"}).allows(problem)
    assert not Capabilities(**{name: "always"}).allows(Problem((-1,), (3,), (0,), (1,)))
    assert not Capabilities(dtypes=(torch.float16,), head_dims=(64,)).allows(problem)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"flash": True}, "capability must be one of dtypes"),
        ({"causal": "sometimes"}, "causal cannot be 'sometimes': choose from yes, no, always"),
        ({"dtypes": "float8"}, "choose from float32, float16, bfloat16, float64"),
        ({"trees": "some"}, "choose from any, prefix, none"),
        ({"head_dims": "64,x"}, "head_dims cannot be '64,x'"),
        ({"gqa": 2}, "gqa cannot be 2: choose from yes, no"),
        ({"device": "cdua"}, "device cannot be 'cdua': a device is cpu, cuda, cuda:1"),
    ],
)
def test_wrong_capabilities_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        Capabilities().changed(value, "here")


@pytest.mark.parametrize("value", [["causal"], "causal=no", 3, None])
def test_capabilities_that_are_no_mapping(value):
    with pytest.raises(ValueError, match=r"here must be a dict of capabilities, got .* for example"):
        Capabilities().changed(value, "here")


def test_capabilities_that_contradict_each_other():
    with pytest.raises(ValueError, match="group_sizes must be left out, or 1, where gqa=no, got 4"):
        Capabilities().changed({"gqa": "no", "group_sizes": "4"}, "here").check()
    for fine in ({"gqa": "no"}, {"gqa": "no", "group_sizes": 1}, {"group_sizes": 4}):
        Capabilities().changed(fine, "here").check()


@pytest.mark.parametrize("value", [False, "no", "No", "False", "false", "NO"])
def test_no_in_any_spelling(value):
    changed = Capabilities().changed({"causal": value, "gqa": value}, "here")
    assert (changed.causal, changed.gqa) == ("no", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[fails]]\nlaw = 'x'", "must have a reason, either law or when"),
        ("[[fails]]\nlaw = 'x'\nwhen = 'y'\nreason = 'z'", "must have a reason, either law or when"),
        ("[[fails]]\nwhen = 'problem.nothing'\nreason = 'z'", "has no attribute 'nothing'"),
        ("[[fails]]\nwhen = 'problem ='\nreason = 'z'", "when must be an expression"),
        ("[[flaky]]\nlaw = 'x'", "tables must be fails or skips"),
        ("[[fails", "cannot be read"),
        ("[[skips]]\nlaw = 3\nreason = 'z'", "must be a table of strings"),
    ],
)
def test_wrong_known_failures_are_named(tmp_path, text, message):
    path = tmp_path / "known.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_law_that_there_is_not(tmp_path):
    path = tmp_path / "known.toml"
    path.write_text("[[fails]]\nlaw = 'gravity'\nreason = 'none'")
    with pytest.raises(ValueError, match="law must be one of inertia, got 'gravity'"):
        read(path).check_laws({"inertia"})
