"""Own keys by each warp of the prefix tile's consumers: checked against float32, replays compared, then timed.

    PYTHONPATH=src:reference:tests/bench:tests/bench/unfinished python tests/bench/unfinished/try_fused3.py

fused3_sm90.py compiles for sm_90 (231,008 bytes of shared memory, no wgmma serialised, 8 bytes spilled by a producer)
and has not run yet; fused3_barriers.py runs its barriers in random order. The harness has passed with fused_sm90.py of 15f8bc9.
"""

import statistics

import numpy as np
import torch
from fused3_sm90 import attend_fused

import hydragen
from hydragen.kernels.merge import merge
from hydragen.kernels.prefix_sm90 import BLOCK_LAYOUT, TensorDescriptor
from hydragen.target import Target
from hydragen.tuning import merge_shape

LAYERS = 6


def timed(run):
    sink, flush = torch.zeros((), device="cuda"), torch.zeros(64 << 20, device="cuda")
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def go(count):
        found = []
        for _ in range(count):
            sink.copy_(flush.sum())
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record()
            graph.replay()
            b.record()
            torch.cuda.synchronize()
            found.append(a.elapsed_time(b) * 1e3)
        return statistics.median(found) / LAYERS

    return go


class Fused:
    """One prefix, rows with keys of their own: items by row block and split, a row of `own` per token."""

    def __init__(self, batch, prefix, capacity, splits, q_heads=32, kv_heads=8, keys=128, k=2, v=1, own_k=2, own_v=2, registers=(232, 40)):
        group = q_heads // kv_heads
        size = -(-prefix // splits // keys) * keys
        items, used = [], 0
        for split in range(splits):
            if split * size >= prefix:
                continue
            for row in range(0, batch * group, 128):
                item = np.zeros(16, np.int32)
                item[:9] = 0, 0, 0, split * size, min(prefix, (split + 1) * size), 0, batch, row, used * batch
                item[9], item[11] = 1, used
                items.append(item)
            used += 1
        table = np.stack(items)
        table[:, 12] = used
        own_table = np.zeros((batch, 4), np.int32)
        own_table[:, 0], own_table[:, 1], own_table[:, 2] = 1 + np.arange(batch), np.arange(batch), capacity
        ints = dict(dtype=torch.int32, device="cuda")
        self.items, self.own = torch.tensor(table, **ints), torch.tensor(own_table, **ints)
        self.lens = torch.zeros(batch + 1, **ints)
        self.lens[0] = prefix
        self.indptr = torch.arange(batch + 1, **ints) * used
        self.indices = (torch.arange(batch, **ints)[:, None] + torch.arange(used, **ints) * batch).flatten().contiguous()
        self.part = torch.full((used * batch, q_heads, 128), float("nan"), device="cuda")
        self.part_lse = torch.full((used * batch, q_heads), float("nan"), device="cuda")
        self.token, self.no_lse = torch.arange(batch, **ints), torch.empty(0, device="cuda")
        self.keys = keys
        self.constants = (keys, k, v, own_k, own_v, *registers, False, True, used == 1, False, False)
        self.shape = merge_shape(batch, q_heads, used, Target(90, 132, 1.0, 1.0), False)
        self.batch, self.q_heads, self.kv_heads, self.capacity, self.splits = batch, q_heads, kv_heads, capacity, used

    def __call__(self, q, levels, out):
        (k, v), (own_k, own_v) = levels
        width = self.kv_heads * 128

        def describe(x, box):
            return TensorDescriptor(x, [x.shape[0] * x.shape[1], width], [width, 1], box, BLOCK_LAYOUT)

        tasks, merges = len(self.items) * self.kv_heads, self.splits > 1
        attend_fused[(min(tasks, 132),)](
            q, describe(k, [self.keys, 128]), describe(v, [self.keys, 128]), describe(own_k, [16, 64]), describe(own_v, [16, 64]),
            out, self.no_lse, self.part, self.part_lse, self.part_lse, self.items, self.own, self.token, self.lens,
            tasks, len(self.items), 1, k.shape[1], v.shape[1], (self.capacity,) * 2, 128**-0.5 * 1.4426950408889634,
            q.stride(0), 0, q.stride(-2), self.q_heads // self.kv_heads, self.kv_heads, 128, 128, *self.constants, merges,
            num_warps=4, maxnreg=168,
        )  # fmt: skip
        if merges:
            h = self.shape.heads
            merge[(self.batch, -(-self.q_heads // h), 1)](
                self.part, self.part_lse, out, self.no_lse, self.part_lse, self.indptr, self.indices, self.token,
                self.q_heads, 128, h, 128, self.shape.unroll, False, False, False, True, False,
                num_warps=self.shape.num_warps, launch_pdl=True,
            )  # fmt: skip


def dense(q, levels, lens):
    (k, v), (own_k, own_v) = levels
    group = q.shape[-2] // k.shape[-2]
    q = q[:, 0].float() * 128**-0.5
    k, v = (x[0].float().repeat_interleave(group, 1) for x in (k, v))
    own_k, own_v = (torch.nan_to_num(x.float()).repeat_interleave(group, 2) for x in (own_k, own_v))
    own = torch.einsum("bhd,bkhd->bhk", q, own_k)
    past = torch.arange(own_k.shape[1], device="cuda")[None, None] >= lens[:, None, None]
    p = torch.cat([torch.einsum("bhd,khd->bhk", q, k), own.masked_fill(past, float("-inf"))], -1).softmax(-1)
    at = k.shape[0]
    return torch.einsum("bhk,khd->bhd", p[..., :at], v) + torch.einsum("bhk,bkhd->bhd", p[..., at:], own_v)


def problem(batch, prefix, capacity, q_heads=32, kv_heads=8, layers=LAYERS):
    def pair(*shape):
        return tuple(torch.randn(*shape, kv_heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    levels = [[pair(1, prefix), pair(batch, capacity)] for _ in range(layers)]
    return levels, [torch.randn(batch, 1, q_heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]


def check():
    for batch, prefix, capacity, splits, *heads in (
        (256, 2048, 128, 2, 32, 8), (37, 300, 64, 1, 32, 8), (600, 200, 48, 2, 32, 8), (70, 700, 96, 3, 20, 4),
    ):  # fmt: skip
        levels, (q,) = problem(batch, prefix, capacity, *heads, 1)
        for lens in (
            torch.randint(0, capacity + 1, (batch,)), torch.full((batch,), 48), torch.zeros(batch),
            torch.full((batch,), capacity), torch.where(torch.arange(batch) == 5, 17, 0),
        ):  # fmt: skip
            lens = lens.int().cuda()
            own = [x.clone() for x in levels[0][1]]
            for x in own:
                x[torch.arange(capacity, device="cuda")[None] >= lens[:, None]] = float("nan")
            now = [levels[0][0], tuple(own)]
            fused, out = Fused(batch, prefix, capacity, splits, *heads), torch.full_like(q, float("nan"))
            fused.lens[1:] = lens
            fused(q, now, out)
            error = (out[:, 0].float() - dense(q, now, lens)).abs().max().item()
            assert error < 1e-2, (batch, prefix, error)
            first = out.clone()
            for _ in range(20):
                out.fill_(float("nan"))
                fused(q, now, out)
                assert torch.equal(out, first), (batch, prefix, "replays differ")


WAYS = {
    "128 keys, V once": {},
    "128 keys, own once": {"v": 2, "own_k": 1, "own_v": 1},
    "64 keys": {"keys": 64, "k": 3, "v": 3, "registers": (224, 56)},
}


def main():
    for batch, prefix, splits in ((256, 2048, 2), (64, 4096, 8), (256, 4096, 2), (256, 1024, 2), (1024, 4096, 1)):
        levels, qs = problem(batch, prefix, 128, layers=2 if batch > 256 else LAYERS)
        lens = torch.full((batch,), 16, dtype=torch.int32, device="cuda")
        tree = hydragen.PrefixTree.from_parents([-1] + [0] * batch, row_to_node=np.arange(1, batch + 1))
        plan = hydragen.plan(tree, levels[0], num_q_heads=32, kv_lens=[None, lens])
        arms = {"now": (timed(lambda: [plan.run(q, level) for q, level in zip(qs, levels, strict=True)]), None)}
        for name, way in WAYS.items():
            fused, outs = Fused(batch, prefix, 128, splits, **way), [torch.empty_like(q) for q in qs]

            def run(fused=fused, outs=outs):
                for q, level, out in zip(qs, levels, outs, strict=True):
                    fused(q, level, out)

            arms[name] = timed(run), fused
        for name, (go, fused) in arms.items():
            found = []
            for own in (16, 48, 80, 112, 128):
                if fused is None:
                    plan.update([None, torch.full_like(lens, own)])
                else:
                    fused.lens[1:] = own
                found.append(go(20) * LAYERS / len(qs))
            mean = sum(found[:4]) / 4
            print(f"B{batch} P{prefix} {name}:", *(f"{x:.1f}" for x in found), f"mean of four {mean:.1f}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        check()
        main()
