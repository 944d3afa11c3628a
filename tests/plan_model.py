"""A plan beside a plain account of what it should know: the state that a fuzzed sequence of calls changes.

The account is a padded copy of every node's keys and values, lengths and a tree. It writes the tensors that
the plan sees, in the plan's layout, and answers with the dense oracle or a fresh `hydragen.attention`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import hydragen
from hydragen import PackedKV, PagedKV, PrefixTree
from hydragen_reference import oracle

LAYOUTS = ("levels", "packed levels", "packed", "paged")
HEADS, KV_HEADS, DIM, DIM_V = 4, 2, 8, 4
POISON = torch.nan


class Account:
    """What a plan was told, and the tensors that it was told about."""

    def __init__(self, rng: np.random.Generator, device: torch.device, backend: str) -> None:
        self.rng, self.device, self.backend = rng, device, backend
        self.layout = LAYOUTS[rng.integers(len(LAYOUTS))]
        self.page_size = int(rng.choice([1, 2, 4, 5]))
        self.reserve = float(rng.choice([1.0, 3.0, 8.0]))
        self.growing = bool(rng.integers(2))
        self.batch_invariant = bool(rng.integers(5) == 0)
        self.num_rows = int(rng.choice([1, 2, 3, 5]))
        self.packed_q = rng.random() < 0.25
        q_lens = [int(x) for x in rng.choice([0, 1, 1, 2, 3], self.num_rows)]
        self.q_lens = q_lens if self.packed_q else [int(rng.choice([1, 1, 2, 3]))] * self.num_rows
        self.offsets = [0, *np.cumsum(self.q_lens).tolist()]
        self.draw_nodes(self.draw_tree(None))
        arguments: dict[str, Any] = {"cu_seqlens_q": self.offsets} if self.packed_q else {}
        if not self.packed_q:
            arguments["q_len"] = self.q_lens[0]
        lens = self.planned_lens()
        given = lens if isinstance(lens, list) and "levels" in self.layout else [lens]
        self.grows = any(isinstance(x, Tensor) for x in given)
        self.plan = hydragen.plan(
            self.tree, self.kv, num_q_heads=HEADS, kv_lens=lens, backend=backend,
            reserve=self.reserve, batch_invariant=self.batch_invariant, **arguments,
        )  # fmt: skip

    @property
    def may_grow(self) -> bool:
        return self.grows or self.reserve > 1

    @property
    def may_append(self) -> bool:
        """Whether `append` is for such a plan."""
        ends = self.tree.row_to_node
        by_level = "levels" in self.layout
        return (
            self.may_grow
            and not self.packed_q
            and np.unique(ends).size == ends.size
            and not any(
                set(self.tree.path(row)[:-1].tolist()) & set(ends.tolist()) for row in range(ends.size)
            )
            and bool((self.room[ends] > 0).all())
            and not (by_level and np.unique(self.tree.depth[ends]).size > 1)
        )

    def draw_tree(self, like: PrefixTree | None) -> PrefixTree:
        """A tree of as many rows; where nodes are levels, one of as many levels as before."""
        rng = self.rng
        while True:
            kind = int(rng.integers(4))
            if like is not None and kind == 0:  # some rows end, others go on twice
                counts = np.bincount(rng.integers(0, self.num_rows, self.num_rows), minlength=self.num_rows)
                tree = like.fork(counts)
            elif kind == 1:  # a prefix and rows of their own
                tree = PrefixTree.from_parents([-1] + [0] * self.num_rows)
            else:
                nodes = int(rng.integers(1, 7))
                parents = [int(rng.integers(-1, node)) for node in range(nodes)]
                ends = rng.integers(0, nodes, self.num_rows)
                tree = PrefixTree.from_parents(parents, row_to_node=ends)
            if tree.num_nodes > 12:
                continue
            if like is None or "levels" not in self.layout or tree.num_levels <= self.num_levels:
                return tree

    def draw_nodes(self, tree: PrefixTree) -> None:
        """Give every node of `tree` room, keys and values."""
        rng = self.rng
        first = not hasattr(self, "tree")
        self.tree = tree
        room = rng.choice([0, 1, 2, 3, 6, 9, 17], tree.num_nodes)
        if self.layout == "paged":
            self.indptr = np.append(0, np.cumsum(-(-room // self.page_size)))
            room = np.diff(self.indptr) * self.page_size
        if "levels" in self.layout:
            if first:
                self.num_levels = tree.num_levels
                self.packed_levels = [
                    self.layout == "packed levels" and bool(rng.integers(2)) for _ in range(self.num_levels)
                ]
            for level, nodes in enumerate(tree.level_nodes):
                if not self.packed_levels[level]:
                    room[nodes] = room[nodes].max()
        self.room = room.astype(np.int64)
        self.lens = rng.integers(0, self.room + 1)
        if rng.integers(3) == 0:
            self.lens = self.room.copy()
        shapes = [(tree.num_nodes, int(room.max()), KV_HEADS, dim) for dim in (DIM, DIM_V)]
        self.content = [torch.from_numpy(rng.standard_normal(shape, np.float32)) for shape in shapes]
        if self.layout == "paged":
            self.num_pages = getattr(self, "num_pages", int(self.indptr[-1]) + 4)
            self.num_pages = max(self.num_pages, int(self.indptr[-1]))
            self.pages = rng.permutation(self.num_pages)[: self.indptr[-1]]
        self.named = True  # a run may name the tables: they are on the host
        self.write()

    def write(self) -> None:
        """Make the tensors that the plan sees: poison, and the tokens in use."""
        pairs = [self.tensors(which) for which in (0, 1)]
        if self.layout == "paged":
            table = [int(x) for x in self.pages]
            self.kv: Any = PagedKV(pairs[0][0], pairs[1][0], self.indptr.tolist(), table)
            self.layer: Any = (pairs[0][0], pairs[1][0])
        elif self.layout == "packed":
            self.kv = PackedKV(pairs[0][0], pairs[1][0], np.append(0, np.cumsum(self.room)).tolist())
            self.layer = (pairs[0][0], pairs[1][0])
        else:
            self.layer = list(zip(*pairs, strict=True))
            self.kv = [
                PackedKV(k, v, self.level_offsets(level)) if self.packed_levels[level] else (k, v)
                for level, (k, v) in enumerate(self.layer)
            ]

    def level_offsets(self, level: int) -> list[int]:
        return [0, *np.cumsum(self.room[self.level_nodes(level)]).tolist()]

    def level_nodes(self, level: int) -> Any:
        levels = self.tree.level_nodes
        return levels[level] if level < len(levels) else np.zeros(0, np.int64)

    def tensors(self, which: int) -> list[Tensor]:
        """The keys (0) or values (1) as the plan should see them now."""
        content = self.content[which]
        tail = content.shape[2:]
        used = [content[node, : self.lens[node]] for node in range(self.tree.num_nodes)]

        def filled(node: int) -> Tensor:
            full = torch.full((int(self.room[node]), *tail), POISON)
            full[: self.lens[node]] = used[node]
            return full

        nodes = [filled(node) for node in range(self.tree.num_nodes)]
        if self.layout == "paged":
            pool = torch.full((self.num_pages, self.page_size, *tail), POISON)
            for node, full in enumerate(nodes):
                mine = self.pages[self.indptr[node] : self.indptr[node + 1]]
                pool[torch.from_numpy(mine)] = full.reshape(mine.size, self.page_size, *tail)
            return [pool.to(self.device)]
        if self.layout == "packed":
            return [torch.cat(nodes).to(self.device)]
        levels = []
        for level in range(self.num_levels):
            there = [nodes[node] for node in self.level_nodes(level)]
            empty = torch.zeros(0, *tail)
            if self.packed_levels[level]:
                made = torch.cat([empty, *there])
            else:
                made = torch.stack(there) if there else empty[None][:0]
            levels.append(made.to(self.device))
        return levels

    def planned_lens(self) -> Any:
        """Lengths to plan with, tensors where they may grow; `most` is what the plan then has room for."""
        self.most = self.lens.copy()
        if not self.growing:
            return self._by_level(lambda nodes: self.lens[nodes].tolist())

        def form(nodes: Any) -> Any:
            if "levels" in self.layout and self.rng.integers(4) == 0:
                return self.lens[nodes].tolist()
            self.most[nodes] = self.room[nodes]
            return self._on_device(self.lens[nodes])

        return self._by_level(form)

    def new_lens(self, lens: Any = None) -> Any:
        """Lengths for an update; a tensor may grow to all of the room, so it is only for what has that."""
        lens = self.lens if lens is None else lens

        def form(nodes: Any) -> Any:
            host = (self.most[nodes] < self.room[nodes]).any() or self.rng.integers(8) == 0
            return lens[nodes].tolist() if host else self._on_device(lens[nodes])

        return self._by_level(form)

    def _on_device(self, lens: Any) -> Tensor:
        dtype = [torch.int32, torch.int64][self.rng.integers(2)]
        return torch.tensor(lens, dtype=dtype, device=self.device)

    def _by_level(self, form: Any) -> Any:
        if "levels" in self.layout:
            return [form(self.level_nodes(level)) for level in range(self.num_levels)]
        return form(np.arange(self.tree.num_nodes))

    def restore(self) -> None:
        """Tell the plan all that it should know."""
        changes: dict[str, Any] = {}
        if self.reserve > 1:
            changes = {"tree": self.tree, "kv": self.kv}
        elif self.layout == "paged":
            changes = {"page_indices": self.pages}
            self.named = True
        self.plan.update(self.new_lens() if self.may_grow else None, **changes)
        if self.reserve > 1:
            self.plan.update(self.planned_lens(), **changes)

    def draw_q(self) -> Tensor:
        shape = (self.offsets[-1],) if self.packed_q else (self.num_rows, self.q_lens[0])
        q = self.rng.standard_normal((*shape, HEADS, DIM), np.float32) * 3
        return torch.from_numpy(q).to(self.device)

    def draw_options(self) -> dict[str, Any]:
        rng = self.rng
        options: dict[str, Any] = {"causal": bool(rng.integers(2))}
        if rng.integers(3) == 0:
            options["window"] = int(rng.choice([1, 2, 5, 100]))
        if rng.integers(4) == 0:
            options["softcap"] = 3.0
        if rng.integers(4) == 0:
            options["sinks"] = torch.linspace(-1, 2, HEADS).to(self.device)
        if rng.integers(4) == 0:
            options["scale"] = 0.7
        return options

    def expected(self, q: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The dense oracle on what the plan should attend to."""
        rows = q.cpu().numpy().reshape(-1, HEADS, DIM)
        given = {**options}
        if "sinks" in given:
            given["sinks"] = given["sinks"].cpu().numpy()
        k, v = (
            [content[node, : self.lens[node]].numpy() for node in range(self.tree.num_nodes)]
            for content in self.content
        )
        queries = [rows[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]
        out, lse = oracle.tree_attention(queries, k, v, self.tree.parents, self.tree.row_to_node, **given)
        shape = q.shape[:-1]
        return (
            torch.from_numpy(np.concatenate(out)).float().reshape(*shape, DIM_V),
            torch.from_numpy(np.concatenate(lse)).float().reshape(shape),
        )
