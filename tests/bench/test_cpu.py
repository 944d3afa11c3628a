"""Decoding on a CPU: the reference over a shared prefix against PyTorch over a copy of it per sequence.

`pytest tests/bench/test_cpu.py --benchmark-only` times everything; `python tests/bench/test_cpu.py` prints
the ratios. Both check the answer against float64 first, and want a machine that does nothing else: a busy
core stalls many short parallel loops more than few long ones.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hydragen_reference.decomposed import Block, tree_attention

TIMES_FASTER = 4.0


class Decode(NamedTuple):
    """One decoding step: a query token per sequence, one prefix for all, a suffix for each. float32."""

    batch: int
    prefix_len: int
    suffix_len: int
    rounds: int
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64

    def __str__(self) -> str:
        return f"batch {self.batch}, prefix {self.prefix_len}, suffix {self.suffix_len}"


DECODES = [Decode(64, 4096, 64, rounds=21), Decode(256, 8192, 32, rounds=9)]
# Where nothing is timed, a small one shows that the benchmark runs.
SMOKE = Decode(4, 96, 8, rounds=1)


class Setup(NamedTuple):
    """Inputs, and by name the functions that compute attention from them: out [batch, heads, head_dim]."""

    q: Tensor
    prefix: Tensor
    suffix: Tensor
    run: dict[str, Callable[[], Tensor]]


def set_up(decode: Decode) -> Setup:
    generator = torch.Generator().manual_seed(0)
    batch, num_kv_heads, head_dim = decode.batch, decode.num_kv_heads, decode.head_dim
    group_size = decode.num_q_heads // num_kv_heads
    q = torch.randn(batch, decode.num_q_heads, head_dim, generator=generator)
    prefix = torch.randn(2, 1, decode.prefix_len, num_kv_heads, head_dim, generator=generator)
    suffix = torch.randn(2, batch, decode.suffix_len, num_kv_heads, head_dim, generator=generator)
    blocks = [Block(*prefix), Block(*suffix)]

    unshared = torch.cat([prefix.expand(-1, batch, -1, -1, -1), suffix], 2)
    k, v = unshared.transpose(2, 3).contiguous()  # each [batch, num_kv_heads, len, head_dim]
    run = {
        "hydragen": lambda: tree_attention(q, blocks).out,
        "sdpa": lambda: scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0],
        # Not what a user would write, but the fastest that PyTorch has: a KV head's query heads as rows.
        "sdpa, heads as rows": lambda: scaled_dot_product_attention(
            q.view(batch, num_kv_heads, group_size, head_dim), k, v
        ).flatten(1, 2),
    }
    if k.numel() * group_size * 2 * 4 < 2**31:  # bytes of both
        all_k, all_v = k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1)
        run["sdpa, heads repeated"] = lambda: scaled_dot_product_attention(q[:, :, None], all_k, all_v)[
            :, :, 0
        ]
    return Setup(q, prefix, suffix, run)


def assert_exact(decode: Decode, setup: Setup) -> None:
    """Dense softmax in float64 over all logits of a row, within the error budget relative to PyTorch."""
    heads = (decode.num_kv_heads, decode.num_q_heads // decode.num_kv_heads)
    q = setup.q.double().unflatten(1, heads) * decode.head_dim**-0.5
    prefix, suffix = setup.prefix[:, 0].double(), setup.suffix.double()
    logits = torch.cat(
        [torch.einsum("bhgd,shd->bhgs", q, prefix[0]), torch.einsum("bhgd,bshd->bhgs", q, suffix[0])], -1
    )
    largest = logits.abs().max()
    weights = logits.softmax(-1).split([decode.prefix_len, decode.suffix_len], -1)
    expected = torch.einsum("bhgs,shd->bhgd", weights[0], prefix[1])
    expected = (expected + torch.einsum("bhgs,bshd->bhgd", weights[1], suffix[1])).flatten(1, 2)

    def error(name: str) -> Tensor:
        return (setup.run[name]().double() - expected).abs().max()

    eps = torch.finfo(torch.float32).eps
    values = max(prefix[1].abs().max(), suffix[1].abs().max())
    budget = 2 * error("sdpa") + eps * expected.abs().max() + eps * largest.clamp(min=1.0) * values
    assert error("hydragen") <= budget
    for name in setup.run:
        assert error(name) < 1e-5  # no baseline is fast by computing something else


def interleaved_medians(setup: Setup, rounds: int) -> dict[str, float]:
    """Seconds per call. One call of each in turn, so that a slow spell of the machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in setup.run}
    for _ in range(rounds + 1):
        for name, run in setup.run.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def ratios(medians: dict[str, float]) -> dict[str, float]:
    """How many times faster than each baseline, and than the faster of the two that a user would write."""
    times_faster = {name: medians[name] / medians["hydragen"] for name in medians if name != "hydragen"}
    usual = [times_faster[name] for name in ("sdpa", "sdpa, heads repeated") if name in times_faster]
    return {**times_faster, "usual": min(usual)}


@pytest.mark.parametrize("decode", DECODES, ids=str)
def test_decode(benchmark, decode):
    timed = not benchmark.disabled
    decode = decode if timed else SMOKE
    benchmark.group = f"cpu: {decode}"
    setup = set_up(decode)
    assert_exact(decode, setup)
    medians = interleaved_medians(setup, decode.rounds)
    benchmark.extra_info.update(
        times_faster=ratios(medians),
        interleaved_medians_ms={name: 1e3 * median for name, median in medians.items()},
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        capability=torch.backends.cpu.get_cpu_capability(),
    )
    benchmark.pedantic(setup.run["hydragen"], rounds=decode.rounds, warmup_rounds=1)
    if timed:
        assert ratios(medians)["usual"] >= TIMES_FASTER


def print_ratios() -> None:
    for decode in DECODES:
        setup = set_up(decode)
        assert_exact(decode, setup)
        medians = interleaved_medians(setup, decode.rounds)
        print(f"{decode}: {1e3 * medians['hydragen']:.2f} ms")  # noqa: T201 - a program, when run as one
        for name, ratio in ratios(medians).items():
            print(f"  {ratio:5.2f} times faster than {name}")  # noqa: T201 - the same


if __name__ == "__main__":
    print_ratios()
