"""Which sequences are computed together, and the cache that holds what they share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from hydragen.host_ints import IntArray, as_positive_int
from hydragen.transformers.cache import PrefixCache
from hydragen.transformers.parallel import smallest
from hydragen.tree import PrefixTree

# Sequences at a time where memory does not decide
_ROWS_ON_CPU, _MOST_ROWS = 64, 1024


class Prompts:
    """Prompts that are stored as a tree: what all of them share at once, the rest batch by batch.

    Parameters
    ----------
    base : PrefixCache
        Of no row, or of one row that all prompts go on from.
    token_ids : one vector per prompt
    min_shared : int
        The fewest tokens that are worth a node of their own.
    """

    def __init__(self, base: PrefixCache, token_ids: list[IntArray], min_shared: int) -> None:
        self.tree = PrefixTree.from_token_ids(token_ids, min_shared=min_shared)
        self.trunk = _trunk(self.tree)
        self.base = base
        tokens = [self.tree.node_tokens(node) for node in self.trunk]
        trunk = np.concatenate([np.empty(0, dtype=np.int64), *tokens])
        if base.num_rows:
            self.base = base.fork().extend([trunk])
        elif trunk.size:
            self.base = PrefixCache(base.model).prefill(trunk)

    def batches(self, n: int, size: int) -> Iterator[IntArray]:
        """Split n sequences per prompt into batches of `size`; each the prompts of its sequences.

        Prompts that share tokens are side by side, so that what they share is computed in few batches.
        """
        order = np.repeat(self.tree.row_order, n)
        yield from np.split(order, range(size, order.size, size))

    def cache_for(self, prompts: IntArray) -> PrefixCache:
        """Return a cache with a row per entry of `prompts`, each shared piece of them computed once."""
        tree, ends = self.tree, self.tree.row_to_node[prompts]
        needed = np.unique(np.concatenate([tree.path(int(prompt)) for prompt in np.unique(prompts)]))
        needed = np.setdiff1d(needed, self.trunk)
        at = int(self.trunk[-1]) if self.trunk.size else -1
        cache, row_of = self.base, {at: 0}
        for depth in np.unique(tree.depth[needed]):
            nodes = needed[tree.depth[needed] == depth]
            # Sequences that end above wait, at a node without tokens, until all others have come down.
            waiting = [node for node in row_of if node in ends]
            tokens = [tree.node_tokens(int(node)) for node in nodes]
            if cache.num_rows:
                above = [row_of[int(tree.parents[node])] for node in nodes] + [row_of[x] for x in waiting]
                cache = cache.branch(above).extend([*tokens, *([[]] * len(waiting))])
            else:
                cache = PrefixCache(cache.model).prefill(tokens)
            row_of = {int(node): row for row, node in enumerate([*nodes, *waiting])}
        return cache.branch([row_of[int(node)] for node in ends])


def rows_at_a_time(batch_size: int | None, cache: PrefixCache, new_tokens: int, longest: int) -> int:
    """Return how many sequences fit: `batch_size`, or as many as the device's free memory holds."""
    if batch_size is not None:
        return as_positive_int(batch_size, "batch_size")
    model = cache.model
    if model.device.type != "cuda":
        return _ROWS_ON_CPU
    vocabulary = model.get_output_embeddings().weight.shape[0]
    # A row's own prompt and new tokens, and its logits in float32 with the copies that sampling makes
    per_row = bytes_per_token(cache) * (longest + new_tokens + 1) + 24 * vocabulary
    device = model.device
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    rows = int(0.8 * (free - torch.cuda.memory_allocated(device)) / per_row)
    return max(1, min(_MOST_ROWS, smallest(model, rows)))


def bytes_per_token(cache: PrefixCache) -> int:
    """Return what the keys and values of one token take in all layers."""
    if not cache.num_rows:
        cache = PrefixCache(cache.model).prefill([0])
    pairs = [layer.kv()[0] for layer in cache.layers] if cache.rows.levels else []
    pairs = pairs or [layer.kv()[-1] for layer in cache.layers]
    tensors = [x for pair in pairs for x in (pair if isinstance(pair, tuple) else (pair.k, pair.v))]
    return sum(x.shape[-2] * x.shape[-1] * x.element_size() for x in tensors)


def _trunk(tree: PrefixTree) -> IntArray:
    """Nodes that are on the path of every row, root first."""
    everyone = np.flatnonzero(tree.row_end - tree.row_begin == tree.num_rows)
    return everyone[np.argsort(tree.depth[everyone])]
