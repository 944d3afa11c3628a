"""The tile of a single warp on a GPU, every candidate of it, judged as the plain one is."""

from dataclasses import replace
from typing import Any

import pytest
import special_tiles
import torch
from judged import check
from special_tiles import SM90, as_packed_and_in_pages, below_two_prefixes

import hydragen
from hydragen import api, tuning, work
from hydragen.testing import Problem
from hydragen.testing.pages import paged
from hydragen.warp_tiles import WARP_ROWS, WARP_TILES

pytestmark = SM90

# Around the steps of 16 and 32 keys, and the rings of two and four.
LENGTHS = (0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 64, 65, 100, 128, 130)


@pytest.fixture(autouse=True, params=WARP_TILES)
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each candidate in turn, whatever the number of programs."""
    tile = WARP_TILES[request.param]
    monkeypatch.setattr(
        tuning, "warp_tile_for", lambda *_, most_rows, **__: tile if most_rows <= WARP_ROWS else None
    )
    monkeypatch.setattr(work, "is_small", lambda *_: False)  # or small problems do without it
    api._PLANS.clear()
    yield
    api._PLANS.clear()


def problem(**changes: Any) -> Problem:
    """90 rows with 0 to 130 keys of their own."""
    return below_two_prefixes([LENGTHS[i % 15] for i in range(90)], **changes)


def served() -> bool:
    return special_tiles.served("attend_rows", launch=-1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16, "head_dim": 64, "head_dim_v": 64},
        {"head_dim": 64, "num_q_heads": 9, "num_kv_heads": 3},
        {"head_dim_v": 64, "num_q_heads": 16, "sharpness": "very_negative"},
        {"num_q_heads": 2, "sharpness": "very_negative"},
        {"num_q_heads": 7, "num_kv_heads": 1},
        {"q_lens": (2,) * 90, "scale": 0.2, "sinks": True},
        {"row_to_node": tuple(range(91, 1, -1)), "q_lens": tuple(1 + i % 2 for i in range(90))},
        {"parents": (-1, 0, *[0] * 45, *[1] * 45), "sharpness": "flat"},
    ],
)
@pytest.mark.parametrize("layout", ["packed", "levels"])
def test_matches_the_oracle(changes: dict[str, Any], layout: str, device: torch.device) -> None:
    check(problem(**changes), "triton", device, layout=layout, spare=50)
    assert served()


@pytest.fixture(params=["as chosen", "merge launch"])
def merging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the last launch merges, where it can."""
    if request.param == "merge launch":
        monkeypatch.setattr(work, "with_merge", lambda tiles, *_: tiles)
    return bool(request.param == "as chosen")


def merges() -> bool:
    (plan,) = api._PLANS.values()
    warp = plan.work.tiles[0].warp
    return warp is not None and warp.merges


@pytest.mark.parametrize(
    ("changes", "can"),
    [
        ({"own": 1}, True),
        ({"own": 1, "num_q_heads": 6, "sinks": True}, True),
        ({"own": 1, "num_q_heads": 4, "head_dim": 64, "head_dim_v": 64, "num_kv_heads": 1}, True),
        ({"own": 1, "q_lens": (2,) * 90, "num_q_heads": 8, "sinks": True}, True),
        (
            {"own": 1, "row_to_node": tuple(range(91, 1, -1)), "q_lens": tuple(1 + i % 2 for i in range(90))},
            True,
        ),
        ({"own": 1, "num_q_heads": 16}, False),  # no registers for eight heads
        ({"own": 0}, False),  # a row without keys of its own
    ],
)
@pytest.mark.parametrize("layout", ["packed", "levels", "paged"])
def test_the_last_launch_merges(
    changes: dict[str, Any], can: bool, layout: str, merging: bool, device: torch.device
) -> None:
    given = {key: value for key, value in changes.items() if key != "own"}
    lengths = [LENGTHS[i % 15] + changes["own"] for i in range(90)]
    asked = below_two_prefixes(lengths, **given)
    inputs = asked.tensors()
    if layout == "paged":
        inputs = replace(inputs, pages=paged(asked, inputs, 32, seed=1, spare=40))
    check(asked, "triton", device, inputs, layout=layout)
    assert served()
    assert merges() == (merging and can)


def test_unaligned_keys_take_the_merge_launch(device: torch.device) -> None:
    """The plain tile steps in when it is launched: what it leaves must be merged."""
    check(below_two_prefixes([40] * 90), "triton", device, layout="levels", memory="shifted")
    assert merges()
    assert not served()


@pytest.mark.parametrize("page_size", [16, 32, 48, 128])
@pytest.mark.parametrize("changes", [{}, {"num_q_heads": 2, "head_dim": 64, "head_dim_v": 64}])
def test_pages_hold_the_same_bits(
    changes: dict[str, Any],
    page_size: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(
        tuning, "prefix_tile_for", lambda *_, **__: None
    )  # which reads not all of these pages
    packed, found = as_packed_and_in_pages(problem(**changes), page_size, device, monkeypatch)
    assert served()
    tile = WARP_TILES[request.node.callspec.params["chosen"]]
    if page_size % tile.block_n == 0:  # or a tile of shorter steps takes its place
        assert all(torch.equal(a, b) for a, b in zip(packed, found, strict=True))


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("sinks", [False, True])
def test_one_partial_is_written_as_output(group: int, sinks: bool, device: torch.device) -> None:
    rows = 60
    changes = {
        "parents": (-1,) * rows, "kv_lens": tuple(LENGTHS[i % 15] for i in range(rows)), "sinks": sinks,
        "row_to_node": tuple(range(rows)), "q_lens": (1,) * rows, "num_q_heads": 2 * group,
    }  # fmt: skip
    check(problem(**changes), "triton", device)
    assert served()


def test_rows_beyond_those_of_the_tile_take_the_plain_one(device: torch.device) -> None:
    check(problem(num_q_heads=18), "triton", device)
    assert not served()


@pytest.mark.parametrize("step", [0.3, 3.0, 30.0])
def test_maxima_that_rise_from_block_to_block(step: float, device: torch.device) -> None:
    """By less than the tile lets pass, by about as much, and by so much that nothing before counts."""
    generator = torch.Generator(device).manual_seed(0)
    q = torch.ones(64, 1, 8, 128, device=device, dtype=torch.bfloat16)
    prefix, own = (
        torch.randn(2, *size, 2, 128, device=device, generator=generator) for size in ((1, 300), (64, 200))
    )
    # a logit of so many natural units: the scale is head_dim ** -0.5
    own[0] = (0.01 * own[0] + step / 16 * torch.arange(200, device=device)[:, None, None]) * 128**-0.5
    kv = [tuple(x.bfloat16()) for x in (prefix, own)]
    exactly = [tuple(x.double() for x in pair) for pair in kv]
    expected = hydragen.attention(q.double(), exactly, backend="reference")
    api._PLANS.clear()
    found = hydragen.attention(q, kv)
    assert served()
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)


def test_lengths_on_the_device_and_the_same_bits(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device=device, generator=generator)

    q, prefix, suffix = normal(128, 1, 8, 128), normal(2, 1, 300, 2, 128), normal(2, 128, 70, 2, 128)
    for seed in range(3):
        lens = torch.randint(0, 71, (128,), generator=torch.Generator().manual_seed(seed)).tolist()
        poisoned = suffix.clone()
        for row, length in enumerate(lens):
            poisoned[:, row, length:] = torch.nan
        levels = [tuple(prefix.double()), tuple(suffix.double())]
        expected = hydragen.attention(q.double(), levels, kv_lens=[None, lens], backend="reference")
        api._PLANS.clear()
        on_device = torch.tensor(lens, dtype=torch.int32, device=device)
        runs = [
            hydragen.attention(q, [tuple(prefix), tuple(poisoned)], kv_lens=[None, on_device])
            for _ in range(30)
        ]
        assert served()
        assert all(torch.equal(runs[0], again) for again in runs[1:])
        torch.testing.assert_close(runs[0].double(), expected, atol=2e-2, rtol=2e-2)
