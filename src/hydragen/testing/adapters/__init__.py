"""Implementations behind the suite's interface, ready for ``--implementation`` and to be copied from."""
