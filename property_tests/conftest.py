"""hydragen as the subject of the suite that it ships, and profiles for Triton's interpreter."""

from __future__ import annotations

import pytest
import subjects

from hydragen.testing.conformance import plugin
from hydragen.testing.conformance.subject import session

# One example costs about 20 ms, in the interpreter about 200 ms.
INTERPRETER_EXAMPLES = {"dev": 5, "ci": 25, "nightly": 2_000}


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    plugin.bring_along(pluginmanager)
    examples = INTERPRETER_EXAMPLES if subjects.INTERPRETED else plugin.EXAMPLES
    plugin.register_profiles(examples, default="dev")


def pytest_configure() -> None:
    if not session.subjects:  # nobody was named by --implementation
        session.subjects = subjects.ours()
