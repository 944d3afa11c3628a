"""The predicted time beside the measured one, on the 52 shapes of the committed results."""

import csv
import re
from pathlib import Path

import pytest
import torch

import hydragen
from hydragen import PrefixTree

RESULTS = Path(__file__).resolve().parent.parent / "ci" / "results" / "h200.csv"
ROWS = list(csv.DictReader(RESULTS.read_text().splitlines()))
MEASURED = ROWS[:52]
# others of one prompt, to which nothing is fitted but the tile of head_dim 256
NAME = re.compile(r"(\d+)/(\d+) (B\d+ P\d+ S[1-9]\d*)(?: d(\d+))?")
OTHERS = [row for row in ROWS[52:] if NAME.fullmatch(row["shape"])]


def tree_of(shape: str) -> PrefixTree:
    """From "32/8 B256 P4096 S128", or levels as "32/8 1x4096>8x1024>256x256"."""
    name = shape.split(" ", 1)[1]
    if match := re.fullmatch(r"B(\d+) P(\d+) S(\d+)", name):
        batch, prefix, suffix = map(int, match.groups())
        return PrefixTree.from_levels([[prefix], [suffix] * batch])
    levels = [tuple(map(int, level.split("x"))) for level in name.split(">")]
    return PrefixTree.from_levels([[tokens] * nodes for nodes, tokens in levels])


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row["shape"])
def test_within_10_per_cent(row: dict[str, str]) -> None:
    heads, kv_heads = map(int, row["shape"].split()[0].split("/"))
    explained = hydragen.explain(
        tree_of(row["shape"]), num_q_heads=heads, num_kv_heads=kv_heads, head_dim=128
    )
    assert explained.seconds * 1e6 == pytest.approx(float(row["roof_us"]), rel=0.06)
    assert explained.predicted_seconds * 1e6 == pytest.approx(float(row["us"]), rel=0.1)
    assert "predicted" in str(explained)


@pytest.mark.parametrize("row", OTHERS, ids=lambda row: row["shape"])
def test_other_shapes_within_30_per_cent(row: dict[str, str]) -> None:
    match = NAME.fullmatch(row["shape"])
    assert match is not None
    heads, kv_heads, levels, head_dim = match.groups(default="128")
    explained = hydragen.explain(
        tree_of(f"{heads}/{kv_heads} {levels}"),
        num_q_heads=int(heads),
        num_kv_heads=int(kv_heads),
        head_dim=int(head_dim),
    )
    assert explained.predicted_seconds * 1e6 == pytest.approx(float(row["us"]), rel=0.3)


def test_there_are_others() -> None:
    assert len(OTHERS) > 40
    assert {NAME.fullmatch(row["shape"])[4] for row in OTHERS} == {None, "64", "256"}


def test_bytes_count() -> None:
    """Where keys and values of one's own take the time, it is as long as there are bytes of them."""
    tree = PrefixTree.from_levels([[16], [8192] * 256])

    def predicted(**how: object) -> float:
        heads = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128} | how
        return hydragen.explain(tree, **heads).predicted_seconds

    usual = predicted()
    assert predicted(head_dim_v=64) == pytest.approx(0.75 * usual, rel=0.03)
    assert predicted(dtype=torch.float32) == pytest.approx(2 * usual, rel=0.03)
    assert predicted(num_q_heads=16) == pytest.approx(usual, rel=0.03)
