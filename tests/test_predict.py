"""The predicted time beside the measured one, on the 52 shapes of the committed results."""

import csv
import re
from pathlib import Path

import pytest

import hydragen
from hydragen import PrefixTree

RESULTS = Path(__file__).resolve().parent.parent / "ci" / "results" / "h200.csv"
MEASURED = list(csv.DictReader(RESULTS.read_text().splitlines()))[:52]


def tree_of(shape: str) -> PrefixTree:
    """From "32/8 B256 P4096 S128", or levels as "32/8 1x4096>8x1024>256x256"."""
    name = shape.split(" ", 1)[1]
    if match := re.fullmatch(r"B(\d+) P(\d+) S(\d+)", name):
        batch, prefix, suffix = map(int, match.groups())
        return PrefixTree.from_levels([[prefix], [suffix] * batch])
    levels = [tuple(map(int, level.split("x"))) for level in name.split(">")]
    return PrefixTree.from_levels([[tokens] * nodes for nodes, tokens in levels])


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row["shape"])
def test_within_30_per_cent(row: dict[str, str]) -> None:
    heads, kv_heads = map(int, row["shape"].split()[0].split("/"))
    explained = hydragen.explain(
        tree_of(row["shape"]), num_q_heads=heads, num_kv_heads=kv_heads, head_dim=128
    )
    assert explained.seconds * 1e6 == pytest.approx(float(row["roof_us"]), rel=0.06)
    assert explained.predicted_seconds * 1e6 == pytest.approx(float(row["us"]), rel=0.3)
    assert "predicted" in str(explained)
