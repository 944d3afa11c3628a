"""A problem: the structure of one attention call over a tree of segments, in small integers.

Everything else (tensors, views, oracle, budget) follows from it, so that a failing problem can be printed,
shrunk, pasted into a test and run again.
"""

from __future__ import annotations

import dataclasses
import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from hydragen.testing.arguments import finite, flag, integer, integers

if TYPE_CHECKING:
    from typing import Protocol

    class _Printer(Protocol):
        def text(self, text: str, /) -> None: ...

    from hydragen.testing.inputs import Inputs
    from hydragen.testing.views import Memory, View

Sharpness = Literal["flat", "peaked", "lopsided", "very_negative", "some_very_negative", "repeated"]
"""How the logits are spread; what each mode is for stands in `hydragen.testing.inputs`."""

SHARPNESS: tuple[Sharpness, ...] = get_args(Sharpness)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_HEAD_DIM = 256
MAX_SEED = 2**64 - 1  # of torch's generators


@dataclass(frozen=True, repr=False)
class Problem:
    """One attention call: rows of queries that attend to the segments on their path through a tree.

    Parameters
    ----------
    parents
        Parent of each node (segment), -1 for a root; parents come before children.
    kv_lens
        KV tokens of each node, 0 allowed.
    row_to_node
        Node at which each row (sequence) ends; inner nodes and repetitions are allowed.
    q_lens
        Queries of each row, at least 1.
    num_q_heads, num_kv_heads
        Heads; the first is a multiple of the second.
    head_dim, head_dim_v
        Elements of a query or key, and of a value, 1 to 256.
    dtype
        Of queries, keys, values and output.
    causal, window, softcap, scale
        Options of the call, as in ``hydragen.attention``; ``scale=None`` means ``head_dim ** -0.5``.
    sinks
        Whether each query head has one extra logit of zero value.
    sharpness
        How the logits are spread, one of `SHARPNESS`.
    seed
        Of the tensors' values, 0 to 2**64 - 1.

    Raises
    ------
    ValueError, TypeError
        If the numbers do not describe a problem.

    Examples
    --------
    >>> Problem(parents=(-1, 0, 0), kv_lens=(5, 2, 0), row_to_node=(1, 2), q_lens=(1, 1)).path(1)
    (0, 2)
    """

    parents: tuple[int, ...]
    kv_lens: tuple[int, ...]
    row_to_node: tuple[int, ...]
    q_lens: tuple[int, ...]
    num_q_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 8
    head_dim_v: int = 8
    dtype: torch.dtype = torch.float32
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False
    sharpness: Sharpness = "flat"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("parents", "kv_lens", "row_to_node", "q_lens"):
            object.__setattr__(self, name, integers(name, getattr(self, name)))
        _check_structure(self)
        for name, value in {**_sizes(self), **_options(self)}.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        """The call that builds this problem, without the fields that have their default value."""
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.default is dataclasses.MISSING or getattr(self, field.name) != field.default
        ]
        return f"Problem({', '.join(shown)})"

    def _repr_pretty_(self, printer: _Printer, cycle: bool) -> None:  # noqa: ARG002 - the protocol
        """Let Hypothesis (and IPython) print the short form as well."""
        printer.text(repr(self))

    def __str__(self) -> str:
        """The problem in a sentence."""
        rows = ", ".join(
            f"{q_len} at node {node}" for q_len, node in zip(self.q_lens, self.row_to_node, strict=True)
        )
        nodes = ", ".join(
            f"{kv_len} in node {node}" + ("" if parent < 0 else f" under {parent}")
            for node, (parent, kv_len) in enumerate(zip(self.parents, self.kv_lens, strict=True))
        )
        options = [f"{name} {getattr(self, name)}" for name in ("window", "softcap", "scale")]
        said = [text for text in options if not text.endswith("None")]
        said += [name for name in ("causal", "sinks") if getattr(self, name)]
        return (
            f"queries by row: {rows}; keys: {nodes}; heads {self.num_q_heads} on {self.num_kv_heads}, "
            f"head_dim {self.head_dim} and {self.head_dim_v}; "
            f"{', '.join([str(self.dtype), *said, self.sharpness])}"
        )

    @property
    def num_nodes(self) -> int:
        """Segments of the tree."""
        return len(self.parents)

    @property
    def num_rows(self) -> int:
        """Sequences of the batch."""
        return len(self.row_to_node)

    @property
    def total_q(self) -> int:
        """Queries of all rows."""
        return sum(self.q_lens)

    @property
    def total_kv(self) -> int:
        """KV tokens of all nodes, each counted once."""
        return sum(self.kv_lens)

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def logit_scale(self) -> float:
        """What q·k is multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def path(self, row: int) -> tuple[int, ...]:
        """Nodes from the root down to the end of a row."""
        nodes: list[int] = []
        node = self.row_to_node[row]
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return tuple(reversed(nodes))

    def path_len(self, row: int) -> int:
        """KV tokens along the path of a row."""
        return sum(self.kv_lens[node] for node in self.path(row))

    def options(self, inputs: Inputs) -> dict[str, Any]:
        """What ``hydragen.attention`` is to do with the tensors: scale, masks, cap and sinks, by name."""
        return {
            "scale": self.scale,
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
            "sinks": inputs.sinks,
        }

    def tensors(self, device: torch.device | str = "cpu") -> Inputs:
        """Queries, keys, values and sinks, the same for the same problem on every device."""
        from hydragen.testing.inputs import build  # noqa: PLC0415 - inputs.py imports this module

        return build(self).to(device)

    def as_packed(
        self, inputs: Inputs | None = None, *, spare: int = 0, memory: Memory | None = None
    ) -> View:
        """Arguments of ``hydragen.attention`` with packed keys and values; see `hydragen.testing.views`."""
        from hydragen.testing.views import packed_view  # noqa: PLC0415 - views.py imports this module

        return packed_view(self, self.tensors() if inputs is None else inputs, spare=spare, memory=memory)

    def as_levels(
        self, inputs: Inputs | None = None, *, spare: int = 0, memory: Memory | None = None
    ) -> View:
        """Arguments of ``hydragen.attention`` with padded levels; see `hydragen.testing.views`."""
        from hydragen.testing.views import levels_view  # noqa: PLC0415 - views.py imports this module

        return levels_view(self, self.tensors() if inputs is None else inputs, spare=spare, memory=memory)


def _check_structure(problem: Problem) -> None:
    num_nodes = len(problem.parents)
    if num_nodes == 0:
        raise ValueError(
            "parents must name at least one node, got (); a row without KV ends at an empty node"
        )
    for node, parent in enumerate(problem.parents):
        if not -1 <= parent < node:
            raise ValueError(
                f"parents must be -1 or an earlier node, got parents[{node}] = {parent}; "
                "number the nodes so that parents come before children"
            )
    if len(problem.kv_lens) != num_nodes:
        raise ValueError(f"kv_lens must have one entry per node ({num_nodes}), got {len(problem.kv_lens)}")
    if not problem.row_to_node:
        raise ValueError("row_to_node must name at least one row, got ()")
    if len(problem.q_lens) != len(problem.row_to_node):
        raise ValueError(
            f"q_lens must have one entry per row ({len(problem.row_to_node)}), got {len(problem.q_lens)}"
        )
    for name, values, low, high in (
        ("kv_lens", problem.kv_lens, 0, None),
        ("q_lens", problem.q_lens, 1, None),
        ("row_to_node", problem.row_to_node, 0, num_nodes),
    ):
        for index, value in enumerate(values):
            if value < low or (high is not None and value >= high):
                limit = f"at least {low}" + ("" if high is None else f" and below {high}")
                raise ValueError(f"{name} must be {limit}, got {name}[{index}] = {value}")


def _sizes(problem: Problem) -> dict[str, int]:
    """Return heads and their sizes."""
    found = {name: integer(name, getattr(problem, name), 1) for name in ("num_q_heads", "num_kv_heads")}
    for name in ("head_dim", "head_dim_v"):
        found[name] = integer(name, getattr(problem, name), 1, MAX_HEAD_DIM)
    if found["num_q_heads"] % found["num_kv_heads"]:
        raise ValueError(
            f"num_q_heads must be a multiple of num_kv_heads, "
            f"got {problem.num_q_heads} and {problem.num_kv_heads}"
        )
    return found


def _options(problem: Problem) -> dict[str, Any]:
    """Return the options that are numbers."""
    for name in ("causal", "sinks"):
        flag(name, getattr(problem, name))
    for name, known, wanted in (("dtype", DTYPES, torch.dtype), ("sharpness", SHARPNESS, str)):
        value = getattr(problem, name)
        expected = f"{name} must be one of {', '.join(map(str, known))}"
        if not isinstance(value, wanted):
            raise TypeError(f"{expected}, got {reprlib.repr(value)} of type {type(value).__name__}")
        if value not in known:
            raise ValueError(f"{expected}, got {value!r}")
    found: dict[str, Any] = {"seed": integer("seed", problem.seed, 0, MAX_SEED)}
    if problem.window is not None:
        found["window"] = integer("window", problem.window, 1)
    if problem.scale is not None:
        found["scale"] = finite("scale", problem.scale, "None or a finite number")
    if problem.softcap is not None:
        found["softcap"] = finite("softcap", problem.softcap, "None or a positive finite number")
        if found["softcap"] <= 0:
            raise ValueError(f"softcap must be None or a positive finite number, got {problem.softcap}")
    if "very_negative" in problem.sharpness and (problem.softcap is not None or problem.scale == 0):
        raise ValueError(
            f"sharpness={problem.sharpness!r} needs softcap=None and a scale other than 0, got softcap="
            f"{problem.softcap} and scale={problem.scale}: such logits cannot lie below -5e4"
        )
    return found
