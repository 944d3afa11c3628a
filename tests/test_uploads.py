"""Tables on a device, and what a captured graph copies there at every replay."""

import numpy as np
import pytest
import torch

from hydragen.backends.uploads import Uploaded


def test_replaced_under_a_captured_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was captured while the tables were made copies them from the host's memory again."""
    waits: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    tables = Uploaded([np.arange(3), np.arange(5, 9)], torch.device("cpu"))
    tables.replace([np.arange(10, 13), np.arange(4)])
    assert [part.tolist() for part in tables.parts] == [[10, 11, 12], [0, 1, 2, 3]]
    assert not waits
    # as in a capture, where the host's memory is kept
    tables._host = tables._flat.clone()
    tables.replace([np.arange(3), np.arange(7, 11)])
    assert waits == [torch.device("cpu")]
    tables._flat.copy_(tables._host)  # a replay
    assert [part.tolist() for part in tables.parts] == [[0, 1, 2], [7, 8, 9, 10]]
    with pytest.raises(ValueError, match="must have the sizes"):
        tables.replace([np.arange(3)])
