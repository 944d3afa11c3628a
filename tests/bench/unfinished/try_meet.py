"""Whoever comes last merges: checked, then timed against the launch that merges, and the programs that wait."""

import re
import statistics
import sys
from dataclasses import replace
from contextlib import ExitStack

import numpy as np
import torch
from shapes import shape
from timing import GpuTimer, sample
from try_prefix_tiles import PLAIN, Problem, checked, deciding, say, set_to, Variant
from try_warp_tiles import with_warp
from hydragen.warp_tiles import WARP_TILES

import hydragen
from hydragen import tuning, work
from hydragen.backends import special

SHAPES = sys.argv[2:] or [
    "32/8 B256 P2048 S64",
    "32/8 B256 P4096 S128",
    "32/8 B1024 P4096 S128",
    "32/8 B64 P4096 S128",
    "32/8 B256 P16384 S128",
    "32/8 B1024 P16384 S128",
    "32/32 B256 P4096 S128",
    "32/32 B1024 P16384 S128",
    "32/8 1x4096>8x1024>256x256",
    "32/8 B256 P4096 S512",
    "32/8 B64 P65536 S128",
]


def merging(tiles, chosen, covered, num_programs, group, *_):
    warp, last = tiles[0].warp, tiles[int(chosen.max(initial=0))]
    if warp is None or last.prefix is None or not covered:
        return tiles
    return tuning._with_warp(tiles, replace(warp, merges=True))


def arms(stack, how):
    if how == "launch":
        stack.enter_context(set_to(work, "with_merge", lambda tiles, *_: tiles))
    elif how.startswith("meet"):
        stack.enter_context(set_to(work, "with_merge", merging))
        stack.enter_context(set_to(special, "MEET", True))
    if how.endswith("small"):
        stack.enter_context(with_warp(WARP_TILES["small"]))


def cells():
    timer = GpuTimer()
    for name in SHAPES:
        problem = Problem.of(shape(name))
        graphs, held = {}, []
        for how in ("as it is", "launch", "meet", "meet, small"):
            with ExitStack() as stack:
                arms(stack, how)
                try:
                    plan = problem.plan()
                    graphs[how], out = checked(timer, problem, plan, how)
                except Exception as e:
                    say(f"{name} {how}: {type(e).__name__} {str(e)[:300]}")
                    continue
            held.append((plan, out))
        times = sample(timer, graphs)
        found = ", ".join(f"{what} {statistics.median(of) * 1e6:.1f}" for what, of in times.items())
        say(f"{name} roof {problem.case.roof_us:.1f}: {found}")


LAYERS = 6


def chain():
    sink, flush = torch.zeros((), device="cuda"), torch.zeros(64 << 20, device="cuda")
    for batch, prefix in ((256, 2048), (64, 4096), (256, 1024), (256, 16256)):
        def pair(*s):
            return tuple(torch.randn(*s, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        levels = [[pair(1, prefix), pair(batch, 128)] for _ in range(LAYERS)]
        qs = [torch.randn(batch, 1, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(LAYERS)]
        tree = hydragen.PrefixTree.from_parents([-1] + [0] * batch, row_to_node=np.arange(1, batch + 1))
        for how in ("as it is", "launch", "meet", "meet, small"):
            lens = torch.full((batch,), 16, dtype=torch.int32, device="cuda")
            with ExitStack() as stack:
                arms(stack, how)
                plan = hydragen.plan(tree, levels[0], num_q_heads=32, kv_lens=[None, lens])
                run = lambda: [plan.run(q, level) for q, level in zip(qs, levels, strict=True)]
                run()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    outs = run()
            found = []
            for own in (16, 48, 80, 112, 128):
                plan.update([None, torch.full_like(lens, own)])
                t = []
                for _ in range(25):
                    sink.copy_(flush.sum())
                    a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    a.record(); graph.replay(); b.record()
                    torch.cuda.synchronize()
                    t.append(a.elapsed_time(b) * 1e3)
                found.append(statistics.median(t) / LAYERS)
            say(f"B{batch} P{prefix} {how}: " + " ".join(f"{x:.1f}" for x in found) + f" mean {sum(found[:4]) / 4:.1f}")


if __name__ == "__main__":
    with torch.no_grad():
        (chain if sys.argv[1] == "chain" else cells)()
