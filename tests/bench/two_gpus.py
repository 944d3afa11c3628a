"""One long prefix over the GPUs of a host, beside one GPU.

`torchrun --standalone --nproc-per-node 2 tests/bench/two_gpus.py`. Every rank attends to its part of the
prefix, `merge_over_ranks` puts the parts together: the exchange is in the time. First the result of all ranks
is held against dense attention in float64, beside that of one GPU. Then both are timed as replayed CUDA
graphs with cold caches, all ranks starting together; a round takes as long as its slowest rank. `--device
cpu` does all this with gloo, on the clock of the host.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from facts import machine
from torch import Tensor

import hydragen
from hydragen.distributed import merge_over_ranks

# Query and KV heads. A quarter of the keys and values makes for a quarter of the work, and the same exchange.
HEADS = [(32, 32), (32, 8)]
AIM = {"32/32": 0.65}
FLUSH_BYTES = 256 << 20
FLUSHES = 16


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention in float64, KV head by KV head; q [rows, 1, heads, dim], k and v [1, keys, ...]."""
    group = q.shape[2] // k.shape[2]
    outs = []
    for head in range(k.shape[2]):
        rows = q[:, 0, head * group : (head + 1) * group].double()
        logits = torch.einsum("rgd,kd->rgk", rows, k[0, :, head].double()) * q.shape[-1] ** -0.5
        outs.append(torch.einsum("rgk,kd->rgd", logits.softmax(-1), v[0, :, head].double()))
    return torch.cat(outs, 1)[:, None]


class Timer:
    """Seconds of the slowest rank, all starting together."""

    def __init__(self, device: torch.device, *, capture: bool) -> None:
        self.device, self.capture, self.how = device, capture, "clock of the host"
        self.together = torch.zeros(1, device=device)
        if device.type == "cuda":
            self.how = "replayed CUDA graph" if capture else "CUDA events around eager calls"
            self.flush = torch.zeros(FLUSH_BYTES // 4, device=device)
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def ready(self, run: Callable[[], object]) -> Callable[[], object]:
        """Run until all is compiled and planned, then capture."""
        for _ in range(3):
            run()
        if not self.capture:
            return run
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # the communicator's own thread goes on meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            held = run()

        def replay(held: object = held) -> None:  # the graph has the addresses of what it holds
            graph.replay()

        return replay

    def time(self, ready: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            dist.all_reduce(self.together)
            begin = time.perf_counter()
            ready()
            return time.perf_counter() - begin
        # Reads evict the caches, and take long enough for the host to have all that follows in the stream:
        # a rank whose host is late would keep the others waiting within the exchange.
        for _ in range(FLUSHES):
            torch.sum(self.flush)
        dist.all_reduce(self.together)  # in the stream: nobody begins before all are here
        self.start.record()
        ready()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3

    def medians(self, runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
        """Median seconds of each, in turn so that slow spells slow all of them."""
        prepared = {name: self.ready(run) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in prepared}
        for _ in range(rounds):
            for name, run in prepared.items():
                times[name].append(self.time(run))
        slowest = torch.tensor(list(times.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return {name: statistics.median(of) for name, of in zip(times, slowest.tolist(), strict=True)}


def measure(heads: tuple[int, int], arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Check and time one shape on all ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator(device).manual_seed(0)  # the same on every rank

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).bfloat16()

    q = 3 * normal(arguments.batch, 1, heads[0], 128)  # weights far from equal
    k, v = (normal(1, arguments.prefix, heads[1], 128) for _ in range(2))
    cuts = [arguments.prefix * i // size for i in range(size + 1)]
    part = (k[:, cuts[rank] : cuts[rank + 1]], v[:, cuts[rank] : cuts[rank + 1]])
    tree = hydragen.PrefixTree.from_parents([-1], row_to_node=[0] * arguments.batch)
    whole_plan = hydragen.plan(tree, [(k, v)], num_q_heads=heads[0])
    part_plan = hydragen.plan(tree, [part], num_q_heads=heads[0])

    def one() -> Tensor:
        out = whole_plan.run(q, [(k, v)])
        assert isinstance(out, Tensor)
        return out

    def attend() -> hydragen.AttentionState:
        state = part_plan.run(q, [part], return_lse=True, out_dtype=torch.float32)
        assert isinstance(state, hydragen.AttentionState)
        return state

    def all_ranks() -> Tensor:
        return merge_over_ranks(attend(), out_dtype=q.dtype).out

    right, merged, alone = dense(q, k, v), all_ranks(), one()
    errors = {name: float((x.double() - right).abs().max()) for name, x in (("one", alone), ("all", merged))}
    everywhere = [torch.empty_like(merged) for _ in range(size)]
    dist.all_gather(everywhere, merged.contiguous())
    # no more than rounding to bfloat16 beyond what one GPU has
    bound = errors["one"] + torch.finfo(torch.bfloat16).eps * float(right.abs().max())
    exact = errors["all"] <= bound and all(torch.equal(x, merged) for x in everywhere)
    mine = attend()
    runs: dict[str, Callable[[], object]] = {
        "one": one, "all": all_ranks, "attend": attend, "merge": lambda: merge_over_ranks(mine),
    }  # fmt: skip
    timer = Timer(device, capture=device.type == "cuda" and not arguments.eager)
    seconds = timer.medians(runs, arguments.rounds)
    return {
        "exact": exact,
        "error_one": errors["one"],
        "error_all": errors["all"],
        **{f"{name}_us": round(value * 1e6, 2) for name, value in seconds.items()},
        "ratio": round(seconds["all"] / seconds["one"], 4),
        "timed_by": timer.how,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--prefix", type=int, default=128 * 1024, help="tokens of the prefix")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--eager", action="store_true", help="do not capture CUDA graphs")
    parser.add_argument("--output", type=Path, default=Path("ci/results/h200-two-gpus.json"))
    arguments = parser.parse_args()
    device = torch.device("cpu")
    if arguments.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # multicast over NVLink needs a fabric manager that not every host runs
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with torch.inference_mode():
            shapes = {f"{h}/{kv}": measure((h, kv), arguments, device) for h, kv in HEADS}
        if dist.get_rank() == 0:
            report(shapes, arguments, device)
        if not all(shape["exact"] for shape in shapes.values()):
            raise SystemExit("the ranks together are not as exact as one")
    finally:
        dist.destroy_process_group()


def report(shapes: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> None:
    """Print a line per shape and write all to the output file."""
    ranks = dist.get_world_size()
    for name, shape in shapes.items():
        aim = f", at most {AIM[name]} wanted" if name in AIM else ""
        parts = f"attention {shape['attend_us']:,.1f}, exchange and merge {shape['merge_us']:,.1f}"
        print(  # noqa: T201 - a program's output
            f"{name}, prefix {arguments.prefix:,}, batch {arguments.batch}: one {shape['one_us']:,.1f} us, "
            f"{ranks} ranks {shape['all_us']:,.1f} us ({parts}): ratio {shape['ratio']:.3f}{aim}; "
            f"largest error {shape['error_all']:.1e} beside {shape['error_one']:.1e}; {shape['timed_by']}"
        )
    facts = {"machine": machine(device), "ranks": ranks, "prefix": arguments.prefix, "batch": arguments.batch}
    arguments.output.write_text(json.dumps({**facts, "shapes": shapes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
