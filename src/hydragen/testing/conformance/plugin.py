"""pytest's side of the suite: options, header, what applies to whom, and what each test has seen."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings

from hydragen.testing.conformance.known import Entry
from hydragen.testing.conformance.options import (
    EXAMPLES,
    check_equals_signs,
    check_profile,
    check_writable,
    choose_seed,
    read_known,
    subject,
)
from hydragen.testing.conformance.report import Report, about_run
from hydragen.testing.conformance.smallest import smallest
from hydragen.testing.conformance.subject import Session, session
from hydragen.testing.tally import Tally, tallied

_SESSION = pytest.StashKey[Session]()
_REPORT = pytest.StashKey[Report]()
_TALLY = pytest.StashKey[Tally]()


def bring_along(pluginmanager: pytest.PytestPluginManager) -> None:
    """Register this module as a plugin, once however many ask for it."""
    if not pluginmanager.has_plugin(__name__):
        pluginmanager.register(sys.modules[__name__], __name__)


def register_profiles(examples: dict[str, int], default: str, explain: bool = False) -> None:
    """Make Hypothesis profiles of these sizes, and load the one that the environment names, or `default`."""
    for name, number in examples.items():
        settings.register_profile(
            name,
            max_examples=number,
            deadline=None,
            # The report has a call that repeats the failure; blobs are for tests of one's own.
            print_blob=False,
            # Explaining a failure runs it many times more, and the report has the smallest case.
            phases=[phase for phase in Phase if explain or phase is not Phase.explain],
            # In CI a change is to blame for a red build, never the day: always the same examples. New ones
            # are found by nightly (and at home by dev), whose header has the seed.
            derandomize=name == "ci",
            database=None if name == "ci" else settings().database,
        )
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", default))


def pytest_addoption(parser: pytest.Parser) -> None:
    register_profiles(EXAMPLES, default="ci")
    group = parser.getgroup("hydragen", "conformance of attention kernels (hydragen)")
    group.addoption(
        "--implementation",
        metavar="MODULE:FUNCTION",
        help="hold this function to the laws: (problem, inputs) or (problem) -> out or (out, lse)",
    )
    group.addoption(
        "--capability",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="what the function can do, e.g. causal=no, dtypes=float16,bfloat16, trees=prefix; repeatable",
    )
    group.addoption(
        "--known-failures",
        metavar="FILE",
        help="TOML file of laws and problems known to fail, or to skip: --known-failures=FILE",
    )
    group.addoption(
        "--conformance-json", metavar="FILE", help="write the report as JSON: --conformance-json=FILE"
    )
    parser.addini("hydragen_implementation", "see --implementation")
    parser.addini("hydragen_capabilities", "see --capability; one a line", type="linelist")
    parser.addini("hydragen_known_failures", "see --known-failures; relative to this file")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(**capabilities): the law is about these capabilities only")
    # NumPy, in which Triton's interpreter computes, warns of infinities; the judge says whether one is right.
    config.addinivalue_line("filterwarnings", "ignore:overflow encountered:RuntimeWarning:triton")
    config.stash[_REPORT] = Report()
    check_profile(config)
    path = config.getoption("--implementation") or config.getini("hydragen_implementation")
    try:
        check_equals_signs(config)
        session.known = read_known(config)
        if path:
            here = str(config.invocation_params.dir)
            if here not in sys.path:  # the module may lie in the current folder, as with `python -m pytest`
                sys.path.insert(0, here)
            session.subjects = [subject(path, config)]
        if written := config.getoption("--conformance-json"):
            check_writable(config.invocation_params.dir / written)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    choose_seed(config)


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not session.subjects:
        return []
    facts = about_run(session, config)
    lines = [f"{name}: {value}" for name, value in facts.items() if isinstance(value, str) and value]
    lines += [
        f"{name}: " + ", ".join(f"{key}={value}" for key, value in facts[name].items())
        for name in ("versions", "capabilities")
        if facts[name]
    ]
    return [f"hydragen conformance, {line}" for line in lines]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        if not session.subjects:
            raise pytest.UsageError(
                "nothing to test: name a function with --implementation module:function; hydragen itself is "
                "hydragen.testing.adapters.ours:attention"
            )
        subjects = [
            pytest.param(subject.implementation, id=subject.name, marks=subject.marks)
            for subject in session.subjects
        ]
        metafunc.parametrize("implementation", subjects)
    if "known_failure" in metafunc.fixturenames:
        entries = session.known.failing_problems
        metafunc.parametrize("known_failure", entries, ids=[entry.when for entry in entries])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A run of doctests over the package is not one of the suite."""
    asked = config.getoption("doctestmodules", default=False) and not session.subjects
    return True if asked and collection_path.is_relative_to(Path(__file__).parent) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the subjects cannot do, and mark what they are known to fail."""
    if config.getoption("--implementation"):
        _leave_out_others(config, items)
    laws = {_law(item) for item in items if item.get_closest_marker("needs")}
    if any(item.name.startswith("test_out_and_lse_match_the_oracle") for item in items):
        try:
            session.known.check_laws(laws)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
    for item in items:
        needs = item.get_closest_marker("needs")
        if needs is None:
            continue
        entry = session.known.law(_law(item))
        can = session.capabilities
        lacking = [name for name, wanted in needs.kwargs.items() if getattr(can, name) not in wanted]
        if lacking and entry is not None and entry.fails:
            raise pytest.UsageError(
                f"known failures: {entry.law} is not tested (not a capability: {', '.join(lacking)}), so "
                "nobody can say whether it still fails; remove the entry, or what leaves the law out"
            )
        if lacking:
            item.add_marker(pytest.mark.skip(reason=f"not a capability: {', '.join(lacking)}"))
        elif entry is not None and entry.fails:
            item.add_marker(pytest.mark.xfail(reason=entry.reason, strict=True))
        elif entry is not None:
            item.add_marker(pytest.mark.skip(reason=entry.reason))


def _leave_out_others(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests beside the laws, in a folder that brings the laws along, are about somebody else."""
    folders = {item.path.parent for item in items if item.get_closest_marker("needs")}
    others = [
        item
        for item in items
        if item.path.parent in folders and "implementation" not in getattr(item, "fixturenames", ())
    ]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def _law(item: pytest.Item) -> str:
    return getattr(item, "originalname", item.name).removeprefix("test_")


def _name(item: pytest.Item) -> str:
    """The test's name, in which a single implementation need not be named again."""
    name = item.name.removeprefix("test_")
    if len(session.subjects) == 1:
        only = session.subjects[0].name
        name = name.replace(f"[{only}]", "").replace(f"[{only}-", "[")
    return name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    with tallied() as tally:
        item.stash[_TALLY] = tally
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outermost: after pytest has made a known failure of it
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if "implementation" not in getattr(item, "fixturenames", ()) or call.when == "teardown":
        return report
    entry = session.known.law(_law(item))
    error = None if call.excinfo is None else call.excinfo.value
    why = ""
    if error and entry and hasattr(report, "wasxfail") and not entry.expects(error):
        report.outcome, report.longrepr = "failed", item.repr_failure(call.excinfo)  # type: ignore[arg-type]
        del report.wasxfail
        why = entry.unlike(error)
    elif entry and entry.fails and error is None and report.outcome == "failed" and call.when == "call":
        why = entry.repaired()
    params: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]  # it is a function
    listed: Entry | None = params.get("known_failure")
    if listed and error:
        why = str(error) if isinstance(error, pytest.fail.Exception) else listed.unlike(error)
    tally = item.stash.get(_TALLY, Tally())
    seen: dict[str, Any] = {"law": _law(item), "name": _name(item), "reason": why, **tally.as_dict()}
    if error is not None and not isinstance(error, pytest.fail.Exception):
        seen |= smallest(params["implementation"], tally, error)
    report.conformance = seen  # type: ignore[attr-defined]  # plain values: xdist carries them along
    if call.when == "call":  # for JUnit, which takes them from the item when it ends
        item.user_properties.append(("cases", tally.cases))
        for dtype, of_dtype in tally.worst.items():
            item.user_properties += [
                (f"worst_{name}_{dtype}", f"{ratio:.3g}") for name, ratio in of_dtype.items()
            ]
    return report


class _Collector:
    """Gathers the reports of all tests, of other processes as well."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if seen := getattr(report, "conformance", None):
            self.report.add(report, seen)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(_Collector(session.config.stash[_REPORT]), "hydragen-conformance")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    report = config.stash[_REPORT]
    if report.laws:
        terminalreporter.section("conformance")
        for line in report.lines():
            terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workerinput"):  # only the process that all others report to
        return
    if path := config.getoption("--conformance-json"):
        config.stash[_REPORT].write(Path(config.invocation_params.dir) / path, config)
    if config.stash[_REPORT].tested_nothing() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
