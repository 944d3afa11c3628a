"""Profiles, and the choice of what the laws are held to."""

from __future__ import annotations

import os

import pytest
import subjects
from hypothesis import Phase, settings

# One example costs about 20 ms, in the interpreter about 200 ms.
EXAMPLES = {"dev": 15, "ci": 150, "nightly": 10_000}
INTERPRETER_EXAMPLES = {"dev": 5, "ci": 25, "nightly": 2_000}

for _name, _examples in (INTERPRETER_EXAMPLES if subjects.INTERPRETED else EXAMPLES).items():
    settings.register_profile(
        _name,
        max_examples=_examples,
        deadline=None,
        print_blob=True,
        # Explaining a failure runs it many times more: too slow in the interpreter.
        phases=[phase for phase in Phase if phase is not Phase.explain or not subjects.INTERPRETED],
        # In CI a change is to blame for a red build, never the day: always the same examples. New ones are
        # found by nightly (and at home by dev), whose failures can be reproduced by the blob they print.
        derandomize=_name == "ci",
        database=None if _name == "ci" else settings().database,
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--implementation",
        metavar="MODULE:FUNCTION",
        help="hold this function (problem, inputs) -> out or (out, lse) to the laws, in place of hydragen",
    )


def pytest_configure(config: pytest.Config) -> None:
    subjects.choose(config.getoption("--implementation", default=None))
    # NumPy, in which the interpreter computes, warns of infinities; the judge says whether one is right.
    config.addinivalue_line("filterwarnings", "ignore:overflow encountered:RuntimeWarning:triton")


def pytest_report_header() -> str:
    names = ", ".join(subject.name for subject in subjects.chosen())
    how = " in Triton's interpreter" if subjects.INTERPRETED else " on a GPU" if subjects.CUDA else ""
    return f"laws held to: {names}{how}; profile {settings.get_current_profile_name()}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        cases = [
            pytest.param(subject.implementation, id=subject.name, marks=subject.marks)
            for subject in subjects.chosen()
        ]
        metafunc.parametrize("implementation", cases)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --implementation, leave out what is about hydragen itself."""
    if config.getoption("--implementation", default=None) is None:
        return
    here = [item for item in items if item.path.parent == config.rootpath / "property_tests"]
    own = [item for item in here if "implementation" not in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=own)
    items[:] = [item for item in items if item not in own]
