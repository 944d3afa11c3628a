"""Edges that only a GPU has: memory beyond 32-bit offsets, and bits that stay while another stream is busy.

The same code runs in small on a CPU, so that what is marked `gpu` is known to run.
"""

from collections.abc import Callable

import pytest
import torch

import hydragen
from hydragen import PackedKV, PagedKV, PrefixTree
from hydragen.testing import Problem, assert_within_budget
from hydragen.testing.adapters.ours import attend

HEADS, DIM, PAGE = 8, 128, 16
SIZES = [pytest.param(1 << 12, id="small"), pytest.param(2**31, id="huge", marks=pytest.mark.gpu)]


def pool(elements: int, device: torch.device) -> torch.Tensor:
    """Tokens [tokens, HEADS, DIM] of more than `elements` elements, NaN but for what a test fills in."""
    tokens = elements // (HEADS * DIM) + 4 * PAGE
    tokens += -tokens % PAGE
    return torch.full((tokens, HEADS, DIM), torch.nan, dtype=torch.bfloat16, device=device)


def draw(*shape: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).bfloat16().to(device)


@pytest.mark.parametrize("elements", SIZES)
def test_packed_tokens_far_into_their_memory(elements: int, device: torch.device) -> None:
    kv, length = pool(elements, device), 3 * PAGE + 1
    near = draw(length, HEADS, DIM, device=device)
    kv[-length:] = near
    q = draw(2, 1, 2 * HEADS, DIM, device=device)
    tree = PrefixTree.from_parents([-1, -1, 1])
    first, last = len(kv) - length, len(kv) - 5
    far_kv = PackedKV(kv, kv, [0, first, last, len(kv)])
    ends = PrefixTree.from_parents([-1, -1, 1], row_to_node=[1, 2])
    near_tree = PrefixTree.from_parents([-1, 0], row_to_node=[0, 1])
    far = hydragen.attention(q, far_kv, tree=ends, return_lse=True)
    same = hydragen.attention(
        q, PackedKV(near, near, [0, length - 5, length]), tree=near_tree, return_lse=True
    )
    assert tree.num_nodes == 3
    assert kv.numel() > elements
    assert torch.equal(far.out, same.out)
    assert torch.equal(far.lse, same.lse)
    assert far.out.isfinite().all()


@pytest.mark.parametrize("elements", SIZES)
def test_pages_far_into_their_pool(elements: int, device: torch.device) -> None:
    tokens = pool(elements, device)
    pages = tokens.view(-1, PAGE, HEADS, DIM)
    near = draw(3, PAGE, HEADS, DIM, device=device)
    chosen = [len(pages) - 1, 0, len(pages) - 2]
    pages[chosen] = near
    q = draw(2, 1, 2 * HEADS, DIM, device=device)
    tree = PrefixTree.from_parents([-1, 0], row_to_node=[0, 1])
    lens = [PAGE + 3, PAGE]
    far = hydragen.attention(
        q, PagedKV(pages, pages, [0, 2, 3], chosen), tree=tree, kv_lens=lens, return_lse=True
    )
    same = hydragen.attention(
        q, PagedKV(near, near, [0, 2, 3], [0, 1, 2]), tree=tree, kv_lens=lens, return_lse=True
    )
    assert torch.equal(far.out, same.out)
    assert torch.equal(far.lse, same.lse)
    assert far.out.isfinite().all()


@pytest.mark.parametrize(
    "tokens", [pytest.param(70, id="small"), pytest.param(2**20 + 70, id="huge", marks=pytest.mark.gpu)]
)
def test_queries_and_outputs_beyond_2_to_the_31_bytes(tokens: int, device: torch.device) -> None:
    """Rows of 2 KiB: the last ones are the same alone."""
    q = draw(64, HEADS, DIM, device=device).repeat(-(-tokens // 64), 1, 1)[:tokens]
    k = draw(1, 20, 2, DIM, device=device)
    state = hydragen.attention(q[:, None], [(k, k)], return_lse=True, batch_invariant=True)
    alone = hydragen.attention(q[-64:, None], [(k, k)], return_lse=True, batch_invariant=True)
    assert torch.equal(state.out[-64:], alone.out)
    assert torch.equal(state.lse[-64:], alone.lse)
    assert not state.out.isnan().any()


def repeated(problem: Problem, runs: int, device: torch.device, busy: Callable[[], bool]) -> int:
    """Every run has the bits of the first, which are right; how many runs began while `busy`."""
    inputs = problem.tensors(device)
    first = attend(problem, inputs)
    assert_within_budget(problem, first.out, first.lse)
    differing = torch.zeros((), dtype=torch.int64, device=device)
    beside = 0
    for _ in range(runs):
        beside += busy()
        again = attend(problem, inputs)
        differing += (again.out != first.out).sum() + (again.lse != first.lse).sum()
    assert int(differing) == 0
    return beside


MANY = Problem(
    (-1, *[0] * 40),
    (700, *range(0, 120, 3)),
    tuple(range(1, 41)),
    (1,) * 40,
    8,
    2,
    64,
    64,
    dtype=torch.bfloat16,
    sharpness="peaked",
)


def test_a_few_runs_have_the_same_bits(device: torch.device) -> None:
    assert repeated(MANY, 3, device, lambda: False) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_a_thousand_runs_have_the_same_bits_while_another_stream_is_busy(causal: bool) -> None:
    device = torch.device("cuda")
    load, done = torch.randn(4096, 4096, device=device), torch.cuda.Event()
    stream, result = torch.cuda.Stream(), torch.empty_like(load)
    problem = Problem(
        MANY.parents, MANY.kv_lens, MANY.row_to_node, (3,) * 40, 8, 2, 64, 64, torch.bfloat16, causal, seed=1
    )
    attend(problem, problem.tensors(device))  # compiled before the clock runs

    def busy() -> bool:
        """Whether the other stream is at work; where it is not, it gets new work."""
        working = not done.query()
        if not working:
            with torch.cuda.stream(stream):
                for _ in range(100):  # a quarter of a second of float32 products
                    torch.mm(load, load, out=result)
                done.record()
        return working

    beside = repeated(problem, 1000, device, busy)
    stream.synchronize()
    assert beside > 500, "the other stream was hardly ever busy: this tests nothing"
