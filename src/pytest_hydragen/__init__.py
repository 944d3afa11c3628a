"""Lets `pytest --pyargs hydragen.testing.conformance` know its options.

pytest loads this in every run where hydragen is installed, so it imports nothing of hydragen, and does
nothing unless the run asks for the suite.
"""

from __future__ import annotations

import importlib
from typing import Any

SUITE = "hydragen.testing.conformance"


def pytest_load_initial_conftests(early_config: Any, args: list[str]) -> None:
    """Register the suite's plugin, and with it the options, before the command line is read in full."""
    if any(argument.partition("::")[0].startswith(SUITE) for argument in args):
        importlib.import_module(f"{SUITE}.plugin").bring_along(early_config.pluginmanager)
