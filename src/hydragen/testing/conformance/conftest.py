"""Brings the options along when pytest is given this folder's path."""

from __future__ import annotations

import pytest

from hydragen.testing.conformance import plugin


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Register the options."""
    plugin.bring_along(pluginmanager)
