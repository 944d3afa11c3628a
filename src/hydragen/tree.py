"""PrefixTree: who shares which tokens.

Structure only: a node is a run of tokens, a row of the batch ends at a node and attends to every node on the
path from a root to there. Where the keys and values of a node live is the business of kv.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from hydragen.forest import path_sums, path_to, row_layout
from hydragen.handles import new_handle
from hydragen.host_ints import IntArray, as_index, as_int_vector, as_positive_int, frozen
from hydragen.radix import build_radix_tree
from hydragen.tree_changes import forked, unshared
from hydragen.tree_checks import check_tree, known, listed
from hydragen.tree_levels import stack_levels
from hydragen.tree_text import tree_text


@dataclass(frozen=True, eq=False, repr=False)
class PrefixTree:
    """A forest of token runs and the node at which each row of the batch ends.

    Make one with `from_token_ids`, `from_levels` or `from_parents`. Several rows may end at one node, inner
    ones included; a node may have no rows, a tree no nodes. Trees are immutable, compare by value (token ids
    included) and can be dictionary keys; the input is copied, every array they return is read-only.

    Attributes
    ----------
    parents : int64 [num_nodes]
        Parent of each node, -1 for roots; parents come before their children.
    kv_lens : int64 [num_nodes] or None
        Tokens in each node; None if the lengths come with the KV.
    row_to_node : int64 [num_rows]
        The node at which each row ends.
    token_ids : int64 [sum(kv_lens)] or None
        The tokens of all nodes, end to end in node order; only `from_token_ids` knows them.

    Raises
    ------
    TypeError, ValueError
        If an argument does not hold integers, or they do not describe a tree; from the class and from all
        functions that make one.
    """

    parents: IntArray
    kv_lens: IntArray | None
    row_to_node: IntArray
    token_ids: IntArray | None = None
    handle: int = field(init=False)
    _kv_offsets: IntArray | None = field(init=False)

    def __post_init__(self) -> None:
        for name in ("parents", "kv_lens", "row_to_node", "token_ids"):
            value = getattr(self, name)
            if value is not None or name in ("parents", "row_to_node"):
                object.__setattr__(self, name, frozen(as_int_vector(value, name).copy()))
        check_tree(*self._arrays)
        # not when it is asked for: compiled functions cannot trace a cache
        offsets = None if self.kv_lens is None else frozen(np.cumsum(np.append(0, self.kv_lens)))
        object.__setattr__(self, "_kv_offsets", offsets)
        object.__setattr__(self, "handle", new_handle(self))

    @classmethod
    def from_parents(
        cls, parents: object, kv_lens: object | None = None, *, row_to_node: object | None = None
    ) -> PrefixTree:
        """State the tree node by node.

        Parameters
        ----------
        parents : integers [num_nodes]
            Index of each node's parent, -1 for roots; parents come before their children.
        kv_lens : integers [num_nodes], optional
            Tokens in each node. None: the lengths come with the KV.
        row_to_node : integers [num_rows], optional
            The node at which each row ends. None: the leaves, in index order.

        Examples
        --------
        >>> print(PrefixTree.from_parents([-1, 0, 0, 1, 1], [1000, 30, 20, 7, 9]))
        PrefixTree: 5 nodes, 1 root, 3 rows
        └─ node 0: 1,000 tokens, 3 rows
           ├─ node 1: 30 tokens, 2 rows
           │  ├─ node 3: 7 tokens, 1 row (1 ends here)
           │  └─ node 4: 9 tokens, 1 row (2 ends here)
           └─ node 2: 20 tokens, 1 row (0 ends here)
        tokens: 1,066 stored once, 3,096 if copied per row (2.9x)
        """
        checked = as_int_vector(parents, "parents")
        if row_to_node is None:
            row_to_node = np.setdiff1d(np.arange(checked.size), checked)
        lengths = None if kv_lens is None else as_int_vector(kv_lens, "kv_lens")
        return cls(checked, lengths, as_int_vector(row_to_node, "row_to_node"))

    @classmethod
    def from_levels(
        cls,
        kv_lens: Sequence[object],
        *,
        parents: Sequence[object | None] | None = None,
        row_to_node: object | None = None,
    ) -> PrefixTree:
        """State the tree level by level; nodes are numbered in this order.

        Parameters
        ----------
        kv_lens : one vector of integers per level
            Tokens in each node of the level.
        parents : one vector of integers, or None, per level, optional
            For each node of the level its parent's position within the level above. None: equal groups, node
            i of n hangs under node i // (n // n_above). Level 0 holds the roots and has None.
        row_to_node : integers [num_rows], optional
            The node at which each row ends, counted across levels. None: the leaves, in index order.

        Examples
        --------
        >>> PrefixTree.from_levels([[100], [7, 5, 6, 9]])
        <PrefixTree: 5 nodes, 4 rows, 2 levels, 127 tokens>
        """
        all_parents, lengths = stack_levels(kv_lens, parents)
        return cls.from_parents(all_parents, lengths, row_to_node=row_to_node)

    @classmethod
    def from_token_ids(cls, sequences: Iterable[object], *, min_shared: int = 1) -> PrefixTree:
        """Find what token sequences share: a radix tree. Row i is sequence i.

        Identical sequences end at one node; a sequence that begins another ends at an inner node; sequences
        that share nothing have different roots; empty sequences end at a root of length 0 without children.
        Nodes are numbered depth-first, siblings in the order in which they first appear.

        Parameters
        ----------
        sequences : iterable of integers [len]
            Token ids of each row: lists, tuples, arrays or CPU tensors.
        min_shared : int
            A node that holds fewer tokens gets no children, they hold copies of its tokens instead: a run
            that short is not worth a segment of its own.

        Examples
        --------
        >>> tree = PrefixTree.from_token_ids([[5, 6, 7], [5, 6, 8, 9]])
        >>> tree.parents, tree.kv_lens, tree.row_to_node
        (array([-1,  0,  0]), array([2, 1, 2]), array([1, 2]))
        >>> tree.node_tokens(2)
        array([8, 9])
        """
        rows = listed(sequences, "sequences", "token id lists, one per row")
        vectors = [as_int_vector(ids, f"sequences[{i}]") for i, ids in enumerate(rows)]
        return cls(*build_radix_tree(vectors, as_positive_int(min_shared, "min_shared")))

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.parents.size

    @property
    def num_rows(self) -> int:
        """Number of rows, the batch size."""
        return self.row_to_node.size

    @property
    def num_levels(self) -> int:
        """Number of nodes on the longest path."""
        return len(self.level_nodes)

    @cached_property
    def depth(self) -> IntArray:
        """Steps from each node up to its root, int64 [num_nodes]; 0 for roots."""
        return frozen(path_sums(self.parents, (self.parents >= 0).astype(np.int64)))

    @cached_property
    def level_nodes(self) -> tuple[IntArray, ...]:
        """The nodes of each depth, in index order."""
        order = np.argsort(self.depth, kind="stable")
        ends = np.cumsum(np.bincount(self.depth))
        return tuple(frozen(nodes) for nodes in np.split(order, ends)[:-1])

    @cached_property
    def children_count(self) -> IntArray:
        """Number of children of each node, int64 [num_nodes]."""
        return frozen(np.bincount(self.parents[self.parents >= 0], minlength=self.num_nodes))

    @property
    def kv_offsets(self) -> IntArray:
        """Where each node's tokens begin when nodes lie end to end, int64 [num_nodes + 1]; needs kv_lens."""
        return known(self._kv_offsets, "kv_offsets")

    @cached_property
    def node_start(self) -> IntArray:
        """Tokens that come before each node on its path, int64 [num_nodes]; needs kv_lens."""
        lengths = known(self.kv_lens, "node_start")
        return frozen(path_sums(self.parents, lengths) - lengths)

    @cached_property
    def path_lens(self) -> IntArray:
        """Tokens on the path of each row, int64 [num_rows]; needs kv_lens."""
        lengths = known(self.kv_lens, "path_lens")
        return frozen((self.node_start + lengths)[self.row_to_node])

    @property
    def row_order(self) -> IntArray:
        """The row at each position of the depth-first order, int64 [num_rows].

        In this order the rows of every node are side by side. What hangs under a node follows in the order of
        its first rows; so this is the identity if that already keeps the rows of every node side by side.
        """
        return self._row_layout[0]

    @property
    def row_begin(self) -> IntArray:
        """First position in `row_order` of the rows whose path contains each node, int64 [num_nodes]."""
        return self._row_layout[1]

    @property
    def row_end(self) -> IntArray:
        """Position in `row_order` after the last row whose path contains each node, int64 [num_nodes]."""
        return self._row_layout[2]

    @cached_property
    def _row_layout(self) -> tuple[IntArray, IntArray, IntArray]:
        order, begin, end = row_layout(self.parents, self.row_to_node)
        return frozen(order), frozen(begin), frozen(end)

    def path(self, row: int) -> IntArray:
        """Return the nodes that row `row` attends to, int64 [nodes on its path], root first."""
        row = as_index(row, "row", self.num_rows, "rows")
        return frozen(path_to(self.parents, int(self.row_to_node[row])))

    def node_tokens(self, node: int) -> IntArray:
        """Return the token ids of node `node`, int64 [kv_lens[node]]; ValueError without `token_ids`."""
        if self.token_ids is None:
            raise ValueError(
                "node_tokens needs a tree with token_ids, got one that knows only the structure; "
                "make the tree with PrefixTree.from_token_ids"
            )
        node = as_index(node, "node", self.num_nodes, "nodes")
        return self.token_ids[self.kv_offsets[node] : self.kv_offsets[node + 1]]

    def fork(self, counts: object = 1, *, in_place: bool = False) -> PrefixTree:
        """Return the tree in which row r goes on as counts[r] rows (int64 [num_rows] or one number for all).

        Each goes on in a new, empty node of its own (but, `in_place`, a row that goes on alone where it is,
        even where others end too); these follow the old nodes, row after row. Nothing is copied: what a row
        held so far is shared, and its last node need not be full.

        >>> tree = PrefixTree.from_parents([-1, 0, 0], [10, 3, 4]).fork([2, 1])
        >>> tree.parents, tree.row_to_node
        (array([-1,  0,  0,  1,  1,  2]), array([3, 4, 5]))
        """
        return PrefixTree(*forked(self._arrays, counts, in_place))

    def unshared(self) -> PrefixTree:
        """Return the tree that shares nothing: row i has a root of its own, node i, with all its tokens."""
        return PrefixTree(*unshared(self._arrays, [self.path(row) for row in range(self.num_rows)]))

    def describe(self, max_lines: int = 40) -> str:
        """Return a readable picture of at most `max_lines` lines, between a heading and the totals."""
        lines, row_counts = as_positive_int(max_lines, "max_lines"), self.row_end - self.row_begin
        return tree_text(self.parents, self.kv_lens, self.row_to_node, row_counts, lines)

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        tokens = "" if self.kv_lens is None else f", {self.kv_lens.sum()} tokens"
        return f"<PrefixTree: {self.num_nodes} nodes, {self.num_rows} rows, {self.num_levels} levels{tokens}>"

    @property
    def _arrays(self) -> tuple[IntArray, IntArray | None, IntArray, IntArray | None]:
        return self.parents, self.kv_lens, self.row_to_node, self.token_ids

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PrefixTree):
            return NotImplemented
        if self is other:
            return True
        pairs = zip(self._arrays, other._arrays, strict=True)
        return hash(self) == hash(other) and all(
            a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in pairs
        )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # without the token ids, of which there may be millions
        return hash(tuple(None if array is None else array.tobytes() for array in self._arrays[:3]))

    def __reduce__(self) -> tuple[type[PrefixTree], tuple[IntArray | None, ...]]:
        # A copy is made anew: a cached hash does not hold in another process, and pickle drops the read-only
        # flags.
        return PrefixTree, self._arrays
