"""A small engine: pages are taken as rows grow, a row ends, another goes on twice; torch's attention judges.

Story C as its user writes it: one plan for all layers and for the whole life of the batch.
"""

from itertools import chain

import torch
from running_on import INTERPRETED
from steps import normal
from torch import Tensor

import hydragen
from hydragen import PagedKV, PrefixTree

PAGE, POOL, HEADS, KV_HEADS, DIM, LAYERS, ROWS, ROOM = 4, 64, 4, 2, 16, 2, 3, 4
PROMPT = 10


class Engine:
    """Pools of pages, a plan, and beside them every row's keys and values end to end."""

    def __init__(self, backend: str, device: torch.device) -> None:
        self.device, self.steps = device, 0
        order = torch.randperm(POOL, generator=torch.Generator().manual_seed(0))
        self.free = order.tolist()
        self.pools = [
            torch.full((2, POOL, PAGE, KV_HEADS, DIM), torch.nan, device=device) for _ in range(LAYERS)
        ]
        self.pages: list[list[int]] = [self.take(3), [], [], []]
        self.histories = [[normal(2, PROMPT, KV_HEADS, DIM, seed=layer)] * ROWS for layer in range(LAYERS)]
        for pool, (first, *_) in zip(self.pools, self.histories, strict=True):
            for at in range(PROMPT):
                pool[:, self.pages[0][at // PAGE], at % PAGE] = first[:, at].to(device)
        self.tree = PrefixTree.from_parents([-1] + [0] * ROWS)
        self.lens = torch.tensor([PROMPT, 0, 0, 0], device=device)
        self.plan = hydragen.plan(
            self.tree, self.kv(), num_q_heads=HEADS, kv_lens=self.lens, backend=backend, reserve=5.0
        )

    def take(self, count: int) -> list[int]:
        return [self.free.pop() for _ in range(count)]

    def kv(self) -> PagedKV:
        """The page table: a row has ROOM entries, and those without a page yet name any, never to be read."""
        ends = set(self.tree.row_to_node.tolist())
        table = [
            mine + [0] * (ROOM - len(mine)) if node in ends else mine for node, mine in enumerate(self.pages)
        ]
        indptr = [0, *torch.tensor([len(mine) for mine in table]).cumsum(0).tolist()]
        return PagedKV(self.pools[0][0], self.pools[0][1], indptr, list(chain(*table)))

    def step(self) -> None:
        """Every row gets one token, in all layers, and attends."""
        self.steps += 1
        ends = self.tree.row_to_node.tolist()
        held = self.lens.tolist()
        for node in ends:
            if held[node] % PAGE == 0:
                self.pages[node] += self.take(1)
        self.lens[ends] += 1
        self.plan.update(self.lens, page_indices=self.kv().page_indices, validate=True)
        for layer, pool in enumerate(self.pools):
            q = normal(ROWS, 1, HEADS, DIM, seed=100 * self.steps + layer)
            new = normal(2, ROWS, 1, KV_HEADS, DIM, seed=100 * self.steps + layer + 50)
            self.plan.append((pool[0], pool[1]), new[0].to(self.device), new[1].to(self.device))
            out = self.plan.run(q.to(self.device), (pool[0], pool[1]), causal=True)
            assert isinstance(out, Tensor)
            rows = self.histories[layer]
            rows = [torch.cat([rows[row], new[:, row]], 1) for row in range(ROWS)]
            self.histories[layer] = rows
            for row, history in enumerate(rows):
                k, v = history.repeat_interleave(HEADS // KV_HEADS, 2).transpose(1, 2)
                right = torch.nn.functional.scaled_dot_product_attention(q[row].transpose(0, 1), k, v)
                torch.testing.assert_close(out[row].cpu(), right.transpose(0, 1), rtol=2e-4, atol=2e-5)

    def go_on(self, counts: list[int]) -> None:
        """Let row r have counts[r] successors, at new nodes with pages of their own."""
        ended = [
            node for node, count in zip(self.tree.row_to_node.tolist(), counts, strict=True) if not count
        ]
        self.tree = self.tree.fork(counts)
        for node in ended:
            self.free += self.pages[node]
            self.pages[node] = []
            self.lens[node] = 0
        self.pages += [[] for _ in range(ROWS)]
        self.lens = torch.cat([self.lens, self.lens.new_zeros(ROWS)])
        self.plan.update(self.lens, tree=self.tree, kv=self.kv(), validate=True)
        rows = torch.arange(ROWS).repeat_interleave(torch.tensor(counts)).tolist()
        self.histories = [[layer[row] for row in rows] for layer in self.histories]


def test_an_engine(backend: str, device: torch.device) -> None:
    engine = Engine(backend, device)
    for _ in range(2 if INTERPRETED else 6):
        engine.step()
    free = len(engine.free)
    engine.go_on([2, 1, 0])
    assert len(engine.free) > free  # the pages of the row that ended
    for _ in range(1 if INTERPRETED else 5):
        engine.step()
    engine.go_on([0, 3, 0])
    engine.step()
