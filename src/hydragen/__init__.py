"""Exact attention over batches of sequences that share prefixes (Hydragen, arXiv 2402.05099)."""

from importlib import import_module
from typing import Any

from hydragen.api import attention, plan
from hydragen.block_tables import from_block_tables
from hydragen.explain import Explanation, SegmentCost, explain
from hydragen.kv import PackedKV, PagedKV
from hydragen.merging import merge_states
from hydragen.planned import Plan
from hydragen.tree import PrefixTree
from hydragen.types import AttentionState

__version__ = "0.1.0"
__all__ = [
    "AttentionState",
    "Explanation",
    "PackedKV",
    "PagedKV",
    "Plan",
    "PrefixTree",
    "SegmentCost",
    "attention",
    "explain",
    "from_block_tables",
    "merge_states",
    "plan",
]


# What needs an extra, or what few need: found when it is first asked for.
_LATER = {"generate": "hydragen.transformers"}
_MODULES = ("distributed", "testing", "transformers")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *_MODULES})
