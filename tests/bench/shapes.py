"""What is measured: shapes by name, the least work that each needs, and the tensors."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hydragen import PackedKV, PagedKV, PrefixTree

# An H200's limits as once measured, fixed so that ratios compare across runs; each run writes down its own.
PEAK_FLOPS = 790e12
BANDWIDTH = 4.31e12

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Peer(NamedTuple):
    """A row of peers_h200.csv."""

    roof_us: float
    best_peer: str
    best_us: float


def read_peers() -> dict[str, Peer]:
    lines = (Path(__file__).parent / "peers_h200.csv").read_text().splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {
        row["shape"]: Peer(float(row["roof_us"]), row["best_peer"], float(row["best_us"])) for row in rows
    }


PEERS = read_peers()


@dataclass(frozen=True)
class Shape:
    """One problem: every row attends to all nodes on its path, causal where a row has several queries.

    Attributes
    ----------
    levels : ((nodes, tokens in each), ...) or None
        Equal groups, level by level; the last divides the batch. None if lengths or groups differ.
    page_size : tokens of a page of ours, scattered over a pool; 0: levels, as all others have them.
    lens : one list of lengths per level, or None
        For uneven trees, with `owners`: for each level, the parents' places in the level above (None: equal).
    """

    name: str
    num_q_heads: int
    num_kv_heads: int
    batch: int
    levels: tuple[tuple[int, int], ...] | None = None
    lens: tuple[tuple[int, ...], ...] = ()
    owners: tuple[tuple[int, ...] | None, ...] = ()
    q_len: int = 1
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def causal(self) -> bool:
        return self.q_len > 1

    @cached_property
    def tree(self) -> PrefixTree:
        if self.levels is None:
            return PrefixTree.from_levels(self.lens, parents=self.owners)
        last = self.levels[-1][0]
        first = sum(nodes for nodes, _ in self.levels[:-1])
        rows = first + np.arange(self.batch) // (self.batch // last)
        return PrefixTree.from_levels([[length] * nodes for nodes, length in self.levels], row_to_node=rows)

    @cached_property
    def flops(self) -> int:
        """Two products of head_dim multiply-adds per query head and visible pair of query and key."""
        hidden = self.q_len * (self.q_len - 1) // 2 if self.causal else 0
        pairs = self.q_len * int(self.tree.path_lens.sum()) - hidden * self.batch
        return 4 * self.head_dim * self.num_q_heads * pairs

    @cached_property
    def num_bytes(self) -> int:
        """Distinct bytes: every key and value once, queries read, results written."""
        kv = int(self.tree.kv_lens.sum()) * self.num_kv_heads
        q = self.batch * self.q_len * self.num_q_heads
        return 2 * self.head_dim * (kv + q) * self.dtype.itemsize

    @property
    def unshared_bytes(self) -> int:
        """Keys and values when every row has a copy of its own."""
        tokens = int(self.tree.path_lens.sum())
        return 2 * self.head_dim * tokens * self.num_kv_heads * self.dtype.itemsize

    @property
    def roof(self) -> float:
        """Seconds that no implementation beats on an H200: products and traffic overlap perfectly."""
        return max(self.flops / PEAK_FLOPS, self.num_bytes / BANDWIDTH)

    @property
    def roof_us(self) -> float:
        """The roof in µs; for the shapes of peers_h200.csv the one of that file, so that ratios compare."""
        return PEERS[self.name].roof_us if self.name in PEERS else self.roof * 1e6


def shape(name: str) -> Shape:
    """Shape of equal groups by its name.

    "32/8 B256 P4096 S128": query/KV heads, batch, prefix, suffix (S0: none). "32/8 1x4096>8x1024>256x256":
    levels of nodes x tokens, a row at each last node. Then q4 (queries a row), d64 (head_dim), fp16,
    pages16 (tokens of a page).
    """
    heads, what, *rest = name.split(" ", 2)
    num_q_heads, num_kv_heads = map(int, heads.split("/"))
    words = f"{what} {' '.join(rest)}".split()
    if "x" in words[0]:
        levels = tuple(tuple(map(int, level.split("x"))) for level in words.pop(0).split(">"))
        batch = levels[-1][0]
    else:
        batch, prefix, suffix = (int(word[1:]) for word in words[:3])
        if "".join(word[0] for word in words[:3]) != "BPS":
            raise ValueError(f"a shape's name must say B, P and S in this order, got {name!r}")
        words = words[3:]
        levels = ((1, prefix), (batch, suffix)) if suffix else ((1, prefix),)
    options = {"q_len": 1, "head_dim": 128, "dtype": torch.bfloat16}
    for word in words:
        if word in DTYPES:
            options["dtype"] = DTYPES[word]
        elif match := re.fullmatch(r"(q|d|pages)(\d+)", word):
            options[{"q": "q_len", "d": "head_dim", "pages": "page_size"}[match[1]]] = int(match[2])
        else:
            raise ValueError(f"unknown word {word!r} in the shape name {name!r}")
    return Shape(name, num_q_heads, num_kv_heads, batch, levels, **options)


def uneven(name: str, groups: int, root: int = 0, longest: int = 8192, seed: int = 0) -> Shape:
    """Groups of 1 to 32 rows with prefixes of 64 to `longest` tokens and suffixes of 1 to 512, 32/8 heads."""
    generator = np.random.default_rng(seed)
    prefixes = np.exp(generator.uniform(np.log(min(64, longest)), np.log(longest), groups)).astype(int)
    owner = np.repeat(np.arange(groups), generator.integers(1, 33, groups))
    suffixes = generator.integers(1, 513, owner.size)
    lens = [prefixes, suffixes]
    owners = [None, owner]
    if root:
        lens, owners = [np.array([root]), *lens], [None, None, owner]
    return Shape(
        name,
        32,
        8,
        owner.size,
        lens=tuple(tuple(x.tolist()) for x in lens),
        owners=tuple(None if x is None else tuple(x.tolist()) for x in owners),
    )


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is attended: q [batch, q_len, num_q_heads, head_dim], and the KV as `hydragen.attention` takes it.

    `levels` holds (k, v) per level, [nodes, tokens, num_kv_heads, head_dim]; for uneven trees `packed` holds
    the same end to end, node after node, and with a page size `paged` holds the same in pages.
    """

    shape: Shape
    q: torch.Tensor
    levels: list[tuple[torch.Tensor, torch.Tensor]]
    packed: PackedKV | None
    paged: PagedKV | None = None

    @property
    def kv(self) -> PagedKV | PackedKV | list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values as our own calls take them."""
        return self.paged or self.packed or self.levels

    @property
    def tree(self) -> PrefixTree | None:
        """The tree, where it does not follow from `kv`."""
        return self.shape.tree if self.paged or self.packed else None

    def node(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [tokens, num_kv_heads, head_dim] of a node of the tree."""
        if self.packed is not None:
            begin, end = self.shape.tree.kv_offsets[index : index + 2].tolist()
            return self.packed.k[begin:end], self.packed.v[begin:end]
        for k, v in self.levels:
            if index < k.shape[0]:
                return k[index], v[index]
            index -= k.shape[0]
        raise IndexError(index)

    def path(self, row: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """k and v of each node that a row attends to, root first."""
        return (self.node(node) for node in self.shape.tree.path(row).tolist())


def build(shape: Shape, device: torch.device | str) -> Inputs:
    """Random inputs from a fixed seed, drawn on the device.

    Keys and values are standard normal; queries have three times that deviation. With the usual random inputs
    tens of thousands of keys weigh the same, and a kernel that took the wrong suffix would still seem right.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=shape.dtype, device=device, generator=generator)

    q = normal(shape.batch, shape.q_len, shape.num_q_heads, shape.head_dim).mul_(3)
    per_token = shape.num_kv_heads, shape.head_dim
    if shape.levels is None:
        total = int(shape.tree.kv_offsets[-1])
        return Inputs(
            shape,
            q,
            [],
            PackedKV(normal(total, *per_token), normal(total, *per_token), shape.tree.kv_offsets),
        )
    levels = [(normal(n, length, *per_token), normal(n, length, *per_token)) for n, length in shape.levels]
    return Inputs(shape, q, levels, None, in_pages(shape, levels) if shape.page_size else None)


def in_pages(shape: Shape, levels: list[tuple[torch.Tensor, torch.Tensor]]) -> PagedKV:
    """Levels copied into two pools, pages scattered by a fixed seed, NaN behind a node's last key."""
    counts = np.concatenate([[-(-tokens // shape.page_size)] * nodes for nodes, tokens in shape.levels])
    indptr = np.concatenate([[0], np.cumsum(counts)])
    table = torch.from_numpy(np.random.default_rng(0).permutation(int(indptr[-1])))
    pools = []
    for side in (0, 1):
        pool = levels[0][side].new_empty(int(indptr[-1]), shape.page_size, *levels[0][side].shape[2:])
        done = 0
        for level in levels:
            x = level[side]
            room = -(-x.shape[1] // shape.page_size) * shape.page_size
            whole = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, room - x.shape[1]), value=torch.nan).view(
                -1, *pool.shape[1:]
            )
            pool[table[done : done + whole.shape[0]].to(pool.device)] = whole
            done += whole.shape[0]
        pools.append(pool)
    return PagedKV(*pools, indptr, table.int().to(pools[0].device))
