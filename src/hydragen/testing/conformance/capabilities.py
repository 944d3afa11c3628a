"""What an implementation can do: the suite tests that, all of it, and nothing else.

Said by the function itself (``fn.capabilities = {"causal": False, "head_dims": (64, 128)}``), in the pytest
configuration (``hydragen_capabilities``, one ``name=value`` a line) or by ``--capability name=value``; the
latter two use the same text. Later ones win.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from hydragen.testing import strategies
from hydragen.testing.conformance.larger import larger
from hydragen.testing.conformance.readers import READERS, Option, as_text, reason
from hydragen.testing.problem import SHARPNESS, Problem, Sharpness
from hydragen.testing.strategies import GROUP_SIZES, HEAD_DIMS, Trees

_GIVEN: dict[Option, bool | None] = {"yes": None, "no": False, "always": True}


@dataclass(frozen=True)
class Capabilities:
    """What an implementation can do; by default everything that a `Problem` may ask for, but pages.

    Attributes
    ----------
    dtypes
        Of queries, keys, values and output.
    head_dims, same_head_dim_v
        Sizes of a head, and whether values have the size of keys.
    gqa, group_sizes
        Whether several query heads may share a KV head, and how many.
    trees
        ``"any"`` forest; ``"prefix"``: one shared segment and one of its own for each row; ``"none"``:
        nothing is shared, row i attends to node i.
    paged
        The function reads ``inputs.pages`` where it is not None; see `hydragen.testing.pages`.
    strides
        Tensors may lie in memory in any way.
    same_q_len
        All rows have equally many queries.
    empty
        Segments may be empty.
    poison
        Segments that no row attends to hold NaN.
    causal, window, softcap, scale, sinks
        Whether the option is known; ``"always"``: no call without it.
    lse
        The log-sum-exp is returned as well. None: it is judged where it is returned.
    repeatable
        Two runs give the same bits.
    sharpness
        How logits may be spread (`hydragen.testing.inputs`).
    max_kv_heads, max_nodes, max_rows, max_q_len, max_kv
        The most KV heads, segments, rows, queries of a row and KV tokens of a segment. Two laws go beyond
        those that are left at their defaults.
    device
        Where the function wants its tensors; results may be on any device.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    head_dims: tuple[int, ...] = HEAD_DIMS
    same_head_dim_v: bool = False
    gqa: bool = True
    group_sizes: tuple[int, ...] = GROUP_SIZES
    trees: Trees = "any"
    paged: bool = False
    strides: bool = True
    same_q_len: bool = False
    empty: bool = True
    poison: bool = True
    causal: Option = "yes"
    window: Option = "yes"
    softcap: Option = "yes"
    scale: Option = "yes"
    sinks: Option = "yes"
    lse: bool | None = None
    repeatable: bool = True
    sharpness: tuple[Sharpness, ...] = SHARPNESS
    max_kv_heads: int = 2
    max_nodes: int = 8
    max_rows: int = 8
    max_q_len: int = 6
    max_kv: int = 150
    device: str = "cpu"

    def problems(self, **restrictions: Any) -> st.SearchStrategy[Problem]:
        """Problems that the implementation can do, restricted further by arguments of `problems`."""
        limits: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "dtypes",
                "head_dims",
                "same_head_dim_v",
                "trees",
                "same_q_len",
                "empty",
                "sharpness",
                "max_kv_heads",
                "max_nodes",
                "max_rows",
                "max_q_len",
                "max_kv",
            )
        }
        limits["group_sizes"] = self.group_sizes if self.gqa else (1,)
        for name in ("causal", "window", "softcap", "scale", "sinks"):
            limits[name] = _GIVEN[getattr(self, name)]
        return strategies.problems(**{**limits, **restrictions})

    def large_problems(self) -> st.SearchStrategy[Problem]:
        """Problems with many keys, many queries or many heads, if these limits are left at their defaults."""
        names = ("max_kv", "max_q_len", "max_kv_heads")
        free = [name for name in names if getattr(self, name) == getattr(Capabilities, name)]
        few = {"max_nodes": min(3, self.max_nodes), "max_rows": min(3, self.max_rows)}
        small = self.problems(**few, max_q_len=min(2, self.max_q_len))
        if not free:
            return small
        borders = {name: getattr(Capabilities, name) for name in names}
        beyond = functools.partial(larger, borders=borders, same_q_len=self.same_q_len)
        return st.builds(beyond, small, st.sampled_from(free), st.integers(0, 10**6))

    def allows(self, problem: Problem) -> bool:
        """Whether a problem asks for nothing else (sizes of the tree aside)."""
        given = {
            name: getattr(problem, name) not in (None, False)
            for name in ("causal", "window", "softcap", "scale", "sinks")
        }
        return (
            problem.dtype in self.dtypes
            and {problem.head_dim, problem.head_dim_v} <= set(self.head_dims)
            and (problem.head_dim == problem.head_dim_v or not self.same_head_dim_v)
            and problem.group_size in (self.group_sizes if self.gqa else (1,))
            and problem.sharpness in self.sharpness
            and (self.empty or 0 not in problem.kv_lens)
            and (len(set(problem.q_lens)) == 1 or not self.same_q_len)
            and all(_GIVEN[getattr(self, name)] in (None, value) for name, value in given.items())
            and _is_kind_of_tree(problem, self.trees)
        )

    def changed(self, values: Mapping[str, object], source: str) -> Capabilities:
        """The same with some of them replaced.

        Raises
        ------
        ValueError
            If a name is unknown or a value is not one of its kind; says where it came from.
        """
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{source} must be a dict of capabilities, got {values!r}; for example {{'causal': False}}"
            )
        changes = {}
        for name, value in values.items():
            if name not in READERS:
                raise ValueError(f"{source}: capability must be one of {', '.join(READERS)}, got {name!r}")
            try:
                changes[name] = READERS[name](value)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{source}: capability {name} cannot be {value!r}: {reason(name, error)}"
                ) from None
        return dataclasses.replace(self, **changes)

    def check(self) -> None:
        """Raise ValueError if two of them contradict each other."""
        if not self.gqa and self.group_sizes != GROUP_SIZES and set(self.group_sizes) != {1}:
            raise ValueError(
                f"group_sizes must be left out, or 1, where gqa=no, got {as_text(self.group_sizes)}"
            )

    def said(self) -> dict[str, str]:
        """What differs from the default, as text that ``--capability`` takes."""
        return {
            field.name: as_text(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }


def _is_kind_of_tree(problem: Problem, trees: Trees) -> bool:
    roots = 1 if trees == "prefix" else problem.num_nodes
    parents = (*[-1] * roots, *[0] * (problem.num_nodes - roots))
    own = tuple(range(1 if trees == "prefix" else 0, problem.num_nodes))
    return trees == "any" or (problem.parents == parents and problem.row_to_node == own)
