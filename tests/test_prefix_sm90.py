"""The specialised prefix tile on a GPU, every candidate of it, judged as the plain one is."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from judged import check
from special_tiles import SM90, as_packed_and_in_pages, below_two_prefixes, served

import hydragen
from hydragen import api, prefix_tiles, tuning, work
from hydragen.prefix_tiles import PREFIX_TILES
from hydragen.testing import Problem
from hydragen.testing.pages import paged

pytestmark = SM90


# name, a program for several tasks, maxima raised lazily
EACH = [
    *((name, persistent, tile.lazy) for name, tile in PREFIX_TILES.items() for persistent in (False, True)),
    *(("narrow+2", True, False), ("single", False, True), ("256", False, True)),
]
# How tasks are shared out makes no difference to what a page is.
PERSISTENT = [of for of in EACH if of[1]]


@pytest.fixture(autouse=True, params=EACH)
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each candidate, with a program per task and with several each; some raise their maxima lazily."""
    name, persistent, lazy = request.param
    tile = replace(PREFIX_TILES[name], persistent=persistent, lazy=lazy)
    monkeypatch.setattr(tuning, "prefix_tile_for", lambda *_, **__: tile)
    monkeypatch.setattr(work, "is_small", lambda *_: False)  # or small problems do without it
    api._PLANS.clear()
    yield
    api._PLANS.clear()


def problem(**changes: Any) -> Problem:
    """96 rows with a few keys of their own each."""
    return below_two_prefixes([i % 5 for i in range(96)], **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16, "head_dim": 64, "head_dim_v": 64},
        {"head_dim": 64, "num_q_heads": 9, "num_kv_heads": 3},
        {"head_dim_v": 64, "num_q_heads": 16, "num_kv_heads": 4, "sharpness": "very_negative"},
        {"kv_lens": (128, 1, *[2] * 96)},
        {"q_lens": (3,) * 96, "scale": 0.2, "sinks": True},
    ],
)
@pytest.mark.parametrize("layout", ["packed", "levels"])
def test_matches_the_oracle(changes: dict[str, Any], layout: str, device: torch.device) -> None:
    check(problem(**changes), "triton", device, layout=layout, spare=150)
    assert served("attend_prefix", launch=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},  # rows with fewer keys of their own than queries: some of the prefix comes after these
        {"head_dim": 64, "head_dim_v": 64, "num_q_heads": 16, "sinks": True},
        {"kv_lens": (128, 1, *[5] * 96)},  # all of it comes before
        {"kv_lens": (2, 1, *[0] * 96), "q_lens": (9,) * 96},  # first queries see nothing
        {"q_lens": tuple(1 + row % 7 for row in range(96)), "sharpness": "very_negative"},
        {"parents": (-1,), "kv_lens": (700,), "row_to_node": (0,) * 5, "q_lens": (700, 300, 130, 64, 1)},
    ],
)
@pytest.mark.parametrize("layout", ["packed", "levels", "paged"])
def test_queries_before_some_keys(changes: dict[str, Any], layout: str, device: torch.device) -> None:
    asked = problem(**{"q_lens": (3,) * 96, **changes}, causal=True)
    inputs = asked.tensors()
    if layout == "paged":
        inputs = replace(inputs, pages=paged(asked, inputs, 16, seed=1, spare=40))
    check(asked, "triton", device, inputs, layout=layout)
    assert served("attend_prefix", launch=0)


@pytest.mark.parametrize("page_size", [32, 128, 256])
def test_causal_splits_within_pages(
    page_size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits that begin where a block of a tile of longer steps would reach into the next page."""
    monkeypatch.setattr(work, "split_size", lambda _, __, tile, *___, **____: tile.step)
    monkeypatch.setattr(prefix_tiles, "MEASURED_PAGES", {page_size})
    asked = problem(q_lens=(3,) * 96, causal=True)
    inputs = asked.tensors()
    pages = paged(asked, inputs, page_size, seed=1, spare=40)
    check(asked, "triton", device, replace(inputs, pages=pages), layout="paged")
    assert served("attend_prefix", launch=0)


def test_causal_lengths_on_the_device(device: torch.device) -> None:
    """As many queries as the rows have keys of their own, or more: known on the device only."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device=device, generator=generator)

    q, prefix, suffix = normal(96, 3, 8, 128), normal(2, 1, 700, 2, 128), normal(2, 96, 9, 2, 128)
    for shared in (700, 385, 2, 0):
        own = torch.randint(0, 10, (96,), generator=torch.Generator().manual_seed(shared)).tolist()
        poisoned = [prefix.clone(), suffix.clone()]
        poisoned[0][:, :, shared:] = torch.nan
        for row, length in enumerate(own):
            poisoned[1][:, row, length:] = torch.nan
        exactly = [tuple(prefix.double()), tuple(suffix.double())]
        expected = hydragen.attention(
            q.double(), exactly, kv_lens=[[shared], own], causal=True, backend="reference"
        )
        lens = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([shared], own)]
        api._PLANS.clear()
        runs = [
            hydragen.attention(q, [tuple(x) for x in poisoned], kv_lens=lens, causal=True) for _ in range(30)
        ]
        assert served("attend_prefix", launch=0)
        assert all(torch.equal(runs[0], again) for again in runs[1:])
        torch.testing.assert_close(runs[0].double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("chosen", PERSISTENT, indirect=True)
@pytest.mark.parametrize("page_size", [8, 16, 64, 128, 256])
@pytest.mark.parametrize("changes", [{}, {"head_dim": 64, "head_dim_v": 64, "num_q_heads": 16}])
def test_pages_hold_the_same_bits(
    changes: dict[str, Any], page_size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "warp_tile_for", lambda *_, **__: None)  # it may take other steps for pages
    packed, found = as_packed_and_in_pages(problem(**changes), page_size, device, monkeypatch)
    assert served("attend_prefix", launch=0)
    assert all(torch.equal(a, b) for a, b in zip(packed, found, strict=True))


def test_one_partial_is_written_as_output(device: torch.device) -> None:
    rows = 300
    shape = {"parents": (-1,), "kv_lens": (200,), "row_to_node": (0,) * rows, "q_lens": (1,) * rows}
    check(problem(**shape, sinks=True, num_q_heads=2), "triton", device)


def test_lengths_on_the_device_and_the_same_bits(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device=device, generator=generator)

    q, prefix, suffix = normal(256, 1, 8, 128), normal(2, 2, 700, 2, 128), normal(2, 256, 9, 2, 128)
    for lens in ([700, 700], [513, 0], [1, 384]):
        full = [prefix[:, :1, : lens[0]], prefix[:, 1:, : lens[1]]]
        halves = [
            hydragen.attention(half, [tuple(shared), tuple(own)], backend="reference")
            for half, shared, own in zip(q.chunk(2), full, suffix.chunk(2, 1), strict=True)
        ]
        poisoned = prefix.clone()
        for node, length in enumerate(lens):
            poisoned[:, node, length:] = torch.nan
        on_device = torch.tensor(lens, dtype=torch.int32, device=device)
        runs = [
            hydragen.attention(q, [tuple(poisoned), tuple(suffix)], kv_lens=[on_device, None])
            for _ in range(30)
        ]
        assert all(torch.equal(runs[0], again) for again in runs[1:])
        torch.testing.assert_close(runs[0].float(), torch.cat(halves).float(), atol=2e-2, rtol=2e-2)
