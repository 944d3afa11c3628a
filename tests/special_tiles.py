"""What the tests of the specialised tiles on a GPU have in common."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from judged import check

from hydragen import api, prefix_tiles
from hydragen.testing import Problem
from hydragen.testing.pages import paged

# What they are compiled for: other GPUs take the plain tiles, which the other tests are for.
SM90 = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90"
    ),
]


def backend(name: str) -> Any:
    """A module of hydragen.backends that needs Triton: imported where a test runs, not where it is listed."""
    return import_module(f"hydragen.backends.{name}")


def below_two_prefixes(own: Sequence[int], **changes: Any) -> Problem:
    """Rows of group 4 below two prefixes that end within a block, each with so many keys of its own."""
    rows = len(own)
    given: dict[str, Any] = {
        "parents": (-1, 0, *[1] * rows), "kv_lens": (333, 70, *own),
        "row_to_node": tuple(range(2, rows + 2)), "q_lens": (1,) * rows, "num_q_heads": 8, "num_kv_heads": 2,
        "head_dim": 128, "head_dim_v": 128, "dtype": torch.bfloat16, "sharpness": "peaked",
    }  # fmt: skip
    return Problem(**{**given, **changes})


def served(kernel: str, launch: int) -> bool:
    """Whether this launch of the one plan that there is was of a specialised kernel, and not handed on."""
    (plan,) = api._PLANS.values()
    found = [made[0] for made in plan.uploads.values() if isinstance(made, tuple)]
    return kernel in kernels_of(launches[launch] for launches in found if isinstance(launches, tuple))


def kernels_of(launchers: Iterable[Any]) -> set[str]:
    """The specialised kernels among these launches; what is handed on to the plain tile is not described."""
    tma = backend("tma")
    special = [x for x in launchers if isinstance(x, tma.TmaLauncher) and x._fields]
    return {x.launcher._kernel.__name__ for x in special}


def as_packed_and_in_pages(
    asked: Problem, page_size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`out` and `lse` of a problem, both times judged; the pages scattered, with NaN behind the last key."""
    monkeypatch.setattr(prefix_tiles, "MEASURED_PAGES", {page_size})
    packed = check(asked, "triton", device)
    api._PLANS.clear()
    inputs = asked.tensors()
    pages = paged(asked, inputs, page_size, seed=1, spare=40)
    return [packed, check(asked, "triton", device, replace(inputs, pages=pages), layout="paged")]
