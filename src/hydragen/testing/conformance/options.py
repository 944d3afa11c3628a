"""What a run of the suite is asked for: the command line's options and the configuration's, checked."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.errors import InvalidArgument

from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.conformance.known import Known, read
from hydragen.testing.conformance.readers import parsed
from hydragen.testing.conformance.subject import Subject, adapt, load

# Examples a law of each profile
EXAMPLES = {"dev": 15, "ci": 150, "nightly": 10_000}


def subject(path: str, config: pytest.Config) -> Subject:
    """The function that is named, with what all places together say that it can do."""
    function = load(path)
    can = Capabilities().changed(getattr(function, "capabilities", {}), f"{path}.capabilities")
    for settings_, source in (
        (config.getini("hydragen_capabilities"), "hydragen_capabilities"),
        (config.getoption("--capability"), "--capability"),
    ):
        can = can.changed(parsed(settings_, source), source)
    try:
        can.check()
        can.problems()
    except ValueError as error:  # a size of 0, or nothing to choose from
        raise ValueError(f"capabilities of {path}, as given in all places: {error}") from None
    return Subject(path, adapt(function, can), can)


def read_known(config: pytest.Config) -> Known:
    """The known failures that are named."""
    if given := config.getoption("--known-failures"):
        return read(config.invocation_params.dir / given)
    if said := config.getini("hydragen_known_failures"):
        base = config.inipath.parent if config.inipath else Path()
        return read(base / said)
    return Known()


def check_equals_signs(config: pytest.Config) -> None:
    """Raise ValueError where pytest may take a file's name for a folder of tests.

    It looks for its configuration file before it knows our options: a path after a space, if there is such a
    file, counts as a place of tests then, and another configuration, or none, would be read without a word.
    """
    for option in ("--known-failures", "--conformance-json"):
        if option in config.invocation_params.args:
            raise ValueError(
                f"{option} must be given as {option}=FILE: a name after a space would make pytest look for "
                "its configuration file elsewhere"
            )


def check_profile(config: pytest.Config) -> None:
    """Hypothesis itself would end in an internal error."""
    profile = config.getoption("--hypothesis-profile", default=None)
    try:
        settings.get_profile(profile or settings.get_current_profile_name())
    except InvalidArgument:
        raise pytest.UsageError(
            f"--hypothesis-profile must be one of {', '.join(EXAMPLES)}, or one that you have registered, "
            f"got {profile!r}"
        ) from None


def check_writable(path: Path) -> None:
    """Raise ValueError now, and not when all is done, if a report cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"--conformance-json must be a file that can be written: {error}") from None


def choose_seed(config: pytest.Config) -> None:
    """Where examples are random, settle the seed here, so that the header can say how to repeat the run."""
    profile = config.getoption("--hypothesis-profile", default=None)
    random_examples = not (settings.get_profile(profile) if profile else settings()).derandomize
    if random_examples and getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = random.randrange(10**9)
