"""Runs of segments: rows that walk several of them in one program, whole or split, of any lengths."""

from dataclasses import replace

import pytest
import torch
from judged import check

from hydragen import api, work
from hydragen.testing import Problem

HEADS = {"num_q_heads": 4, "num_kv_heads": 1}
PROBLEMS = {
    # a split that begins within the first segment and goes on with the second from its beginning
    "split across two": Problem((-1, 0), (65, 23), (1,), (1,), **HEADS, head_dim=64, head_dim_v=64),
    "one key over": Problem((-1, 0), (81, 1), (1,), (1,), **HEADS, head_dim=128, head_dim_v=128),
    "three": Problem((-1, 0, 1), (503, 6, 564), (2,), (1,), **HEADS, head_dim=64, head_dim_v=64),
    "ten, shared by all rows but for the last": Problem(
        (-1, *range(8), *[8] * 4), (*[103] * 9, 97, 30, 0, 64), (9, 10, 11, 12), (1,) * 4, 4, 2, 64, 64
    ),
    "empty ones between": Problem(
        (-1, 0, 1, 2), (70, 0, 0, 90), (3,), (1,), **HEADS, head_dim=64, head_dim_v=64
    ),
    "small, a row each": Problem((-1, 0, 0, 0), (40, 21, 0, 3), (1, 2, 3), (1,) * 3, 4, 2, 64, 64),
    "rows that end above others": Problem((-1, 0, 1), (33, 20, 40), (0, 2, 1), (1,) * 3, 4, 2, 64, 64),
}
SMALL = {"small, a row each", "rows that end above others"}  # for a device of more than four multiprocessors


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 50}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["packed", "levels"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_as_the_oracle(
    name: str, layout: str, dtype: torch.dtype, options: dict[str, object], backend: str,
    device: torch.device, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if name in SMALL:
        monkeypatch.setattr(work, "is_small", lambda *_: True)
    problem = replace(PROBLEMS[name], dtype=dtype, **options)
    api._PLANS.clear()
    check(problem, backend, device, layout=layout)
    if backend == "triton":
        (plan,) = api._PLANS.values()
        assert any(launch.has_runs for launch in plan.work.launches)
