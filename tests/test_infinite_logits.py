"""Infinite logits, sinks and values give what dense softmax attention gives."""

from typing import Any

import numpy as np
import pytest
import torch

import hydragen
from hydragen_reference import oracle

KEYS = 40
INF = float("inf")
CASES: dict[str, dict[str, Any]] = {
    "a key of +inf": {"key": INF},
    "a key of -inf": {"key": -INF},
    "a capped key": {"key": INF, "softcap": 3.0},
    "a sink of +inf": {"sinks": [INF, 0.0]},
    "a sink of -inf": {"sinks": [-INF, 0.0]},
    "a sink of NaN": {"sinks": [float("nan"), 0.0]},
    "both": {"key": INF, "sinks": [INF, 0.0]},
    "values": {"value": INF},
}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_as_dense_attention(
    name: str, split: bool, batch_invariant: bool, backend: str, device: torch.device
) -> None:
    options = dict(CASES[name])
    generator = torch.Generator().manual_seed(0)
    q, k = torch.ones(1, 1, 2, 16), torch.rand(1, KEYS, 1, 16, generator=generator)
    v = torch.randn(1, KEYS, 1, 16, generator=generator)
    k[0, 3] = options.pop("key", 0.5)
    v[0, 30] = options.pop("value", 0.5)
    sinks = options.pop("sinks", None)
    given = None if sinks is None else np.array(sinks)
    with np.errstate(invalid="ignore"):
        expected = oracle.dense_attention(q[0].numpy(), k[0].numpy(), v[0].numpy(), sinks=given, **options)
    cuts = [(0, KEYS)] if not split else [(0, 17), (17, KEYS)]
    result = hydragen.attention(
        q.to(device), [(k[:, a:b].to(device), v[:, a:b].to(device)) for a, b in cuts], return_lse=True,
        sinks=None if sinks is None else torch.tensor(sinks, device=device), backend=backend,
        batch_invariant=batch_invariant, **options,
    )  # fmt: skip
    assert isinstance(result, hydragen.AttentionState)
    out, lse = (torch.from_numpy(x)[None].float() for x in expected)
    torch.testing.assert_close(result.out.cpu(), out, equal_nan=True)
    torch.testing.assert_close(result.lse.cpu(), lse, equal_nan=True)
