"""The laws of exact attention, held to hydragen, or with --implementation to somebody else's function.

The tests are those that ship in the package; here they run for every backend that this machine has.
"""

# All of them, whatever they are called: by a list of names, a law that is added would be left out in silence.
from hydragen.testing.conformance.test_laws import *  # noqa: F403 - see above; nothing else stands in this file
