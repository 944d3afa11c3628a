"""The laws of exact attention, held to hydragen, or with --implementation to somebody else's function.

The tests are those that ship in the package; here they run for every backend that this machine has.
"""

from hydragen.testing.conformance.test_laws import *  # noqa: F403 - tests, which pytest finds by their names
