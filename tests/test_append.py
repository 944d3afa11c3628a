"""New tokens written where rows grew, in every layout."""

from typing import Any

import numpy as np
import pytest
import torch
from steps import BATCH, DIM, HEADS, KV_HEADS, LAYOUTS, PREFIX, ROOM, TREE, growing, normal, queries, suffix
from torch import Tensor

import hydragen
from hydragen import PackedKV, PagedKV, PrefixTree
from hydragen.validation.append import entangled


@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_tokens_are_appended_where_rows_grew(layout: str, backend: str, device: torch.device) -> None:
    kv, lens, views = growing(layout, device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, q_len=2, kv_lens=lens, backend=backend)
    held: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(BATCH)]
    grow = lens[1] if layout == "levels" else lens[1:]
    untouched = [suffix(layout, views, which).clone() for which in (0, 1)]
    for step, by in enumerate(([1, 2, 0, 2, 1], [2, 2, 0, 1, 0], [0, 2, 0, 2, 2])):
        new = [normal(BATCH, 2, KV_HEADS, DIM, seed=10 * step + i, device=device) for i in range(2)]
        grow += torch.tensor(by, device=device)
        plan.update(kv_lens=lens)
        for _ in range(2):  # as often as one likes
            plan.append(kv, *new)
        for row, count in enumerate(by):
            held[row] += [(new[0][row, i], new[1][row, i]) for i in range(count)]
        for which in (0, 1):
            seen = suffix(layout, views, which)
            for row, tokens in enumerate(held):
                for at, token in enumerate(tokens):
                    assert torch.equal(seen[row, at], token[which])
                rest = slice(len(tokens), None)
                assert torch.equal(seen[row, rest], untouched[which][row, rest])
    assert max(len(tokens) for tokens in held) <= ROOM


def test_a_step_appends_and_attends(backend: str, device: torch.device) -> None:
    """Token by token with a plan equals everything at once."""
    kv, lens, _ = growing("paged", device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=lens, backend=backend)
    new = normal(2, BATCH, 4, KV_HEADS, DIM, seed=5, device=device)
    q = queries(4, device=device)
    steps = []
    for t in range(4):
        lens[1:] += 1
        plan.update(kv_lens=lens)
        plan.append(kv, new[0][:, t : t + 1], new[1][:, t : t + 1])
        steps.append(plan.run(q[:, t : t + 1], kv))
    expected = hydragen.attention(q, kv, tree=TREE, kv_lens=lens, causal=True, backend=backend)
    torch.testing.assert_close(torch.cat(steps, 1), expected)


@pytest.mark.filterwarnings("ignore")  # of what torch.compile cannot trace
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compiled_step_appends(layout: str) -> None:
    """With inductor, which does a bare copy of what is overwritten next too late; seen on CPUs."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        pytest.skip("a GPU machine may lack the C++ compiler that inductor takes for CPUs")
    torch.compiler.reset()
    kv, lens, views = growing(layout, device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=lens, backend="reference")
    grow = lens[1] if layout == "levels" else lens[1:]
    before = [suffix(layout, views, which).clone() for which in (0, 1)]

    @torch.compile
    def step(q: Tensor, lens: Any, k: Tensor, v: Tensor) -> Any:
        plan.update(kv_lens=lens)
        plan.append(kv, k, v)
        return plan.run(q, kv)

    q = queries(device=device)
    with torch.no_grad():
        for t in range(2):
            new = [normal(BATCH, 1, KV_HEADS, DIM, seed=10 * t + i, device=device) for i in range(2)]
            grow += 1
            out = step(q, lens, *new)
            for which in (0, 1):
                before[which][:, t] = new[which][:, 0]
                assert torch.equal(suffix(layout, views, which), before[which])
            torch.testing.assert_close(out, hydragen.attention(q, kv, tree=TREE, kv_lens=lens))


def test_appending_is_refused_where_it_cannot_work() -> None:
    device = torch.device("cpu")
    kv, lens, _ = growing("packed", device)
    new = torch.zeros(BATCH, 1, KV_HEADS, DIM)
    fixed = hydragen.plan(TREE, kv, num_q_heads=HEADS)
    with pytest.raises(ValueError, match="append needs a plan whose lengths may grow"):
        fixed.append(kv, new, new)
    together = PrefixTree.from_parents(TREE.parents, row_to_node=[1, 1, 2, 3, 4])
    with pytest.raises(ValueError, match="append needs every row to end at a node of its own"):
        hydragen.plan(together, kv, num_q_heads=HEADS, kv_lens=lens).append(kv, new, new)
    packed = hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=lens, cu_seqlens_q=[0, 1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match=r"k must have shape|append needs queries in a batch"):
        packed.append(kv, new, new)
    growing_plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=lens)
    for wrong in (new[:2], new[..., :3], new.half(), None):
        with pytest.raises((ValueError, TypeError), match="k must"):
            growing_plan.append(kv, wrong, new)
    full = hydragen.plan(
        TREE, PackedKV(kv.k[:PREFIX], kv.v[:PREFIX], [0, *[PREFIX] * 6]), num_q_heads=HEADS,
        kv_lens=torch.tensor([PREFIX, 0, 0, 0, 0, 0]),
    )  # fmt: skip
    with pytest.raises(ValueError, match="append needs room in the node of some row"):
        full.append((kv.k[:PREFIX], kv.v[:PREFIX]), new, new)


@pytest.mark.parametrize("packed_prefix", [True, False])
def test_levels_of_two_kinds(packed_prefix: bool) -> None:
    device = torch.device("cpu")
    (pk, pv), (sk, sv) = growing("levels", device)[0]
    prefix: Any = PackedKV(pk[0], pv[0], [0, PREFIX]) if packed_prefix else (pk, pv)
    offsets = list(range(0, BATCH * ROOM + 1, ROOM))
    own: Any = (sk, sv) if packed_prefix else PackedKV(sk.flatten(0, 1), sv.flatten(0, 1), offsets)
    lens = torch.zeros(BATCH, dtype=torch.int64)
    plan = hydragen.plan(TREE, [prefix, own], num_q_heads=HEADS, kv_lens=[None, lens])
    before, new = sk.clone(), normal(2, BATCH, 1, KV_HEADS, DIM, seed=4)
    plan.update([None, lens + 1])
    plan.append([prefix, own], new[0], new[1])
    stored = sk if packed_prefix else own.k.unflatten(0, (BATCH, ROOM))
    assert torch.equal(stored[:, :1], new[0])
    assert torch.equal(stored[:, 1:], before[:, 1:])


def test_after_an_append_the_tree_may_become_one_without() -> None:
    kv, lens, _ = growing("packed", torch.device("cpu"))
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=lens, reserve=2.0)
    new = torch.zeros(BATCH, 1, KV_HEADS, DIM)
    plan.update(lens)
    plan.append(kv, new, new)
    together = PrefixTree.from_parents(TREE.parents, row_to_node=[1, 1, 2, 3, 4])
    lens[1:] += 1
    plan.update(lens, tree=together)
    expected = hydragen.attention(queries(), kv, tree=together, kv_lens=lens)
    torch.testing.assert_close(plan.run(queries(), kv), expected)
    with pytest.raises(ValueError, match="append needs every row to end at a node of its own"):
        plan.append(kv, new, new)


@pytest.mark.parametrize("frozen_first", [True, False])
def test_a_frozen_row_may_point_at_a_page_of_another(frozen_first: bool) -> None:
    """As engines do with rows that have finished: their pages are reused, or set to a dummy."""
    pool, values = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8)
    tree = PrefixTree.from_parents([-1, -1])
    lens = torch.tensor([0, 2] if frozen_first else [2, 0])
    grown = torch.tensor([0, 3] if frozen_first else [3, 0])
    plan = hydragen.plan(tree, PagedKV(pool, values, [0, 1, 2], [0, 1]), num_q_heads=4, kv_lens=lens)
    plan.update(grown, page_indices=[1, 1])
    new = normal(2, 2, 1, 2, 8, seed=2)
    plan.append((pool, values), new[0], new[1])
    live = 1 if frozen_first else 0
    assert torch.equal(pool[1, 2], new[0][live, 0])
    assert torch.equal(values[1, 2], new[1][live, 0])
    assert int((pool != 0).any(-1).any(-1).sum()) == 1


def test_rows_may_move_to_a_level_of_another_kind() -> None:
    """From a padded level to a packed one and back; a graph captured before writes nothing meanwhile."""
    root = tuple(normal(2, 1, 8, KV_HEADS, DIM))
    k, v = normal(2, 8, KV_HEADS, DIM, seed=1)
    kv: Any = [root, PackedKV(k, v, [0, 8])]
    tree = PrefixTree.from_parents([-1, 0])
    up = PrefixTree.from_parents([-1, 0], row_to_node=[0])
    lens = [torch.tensor([2]), torch.tensor([3])]
    plan = hydragen.plan(tree, kv, num_q_heads=HEADS, kv_lens=lens, reserve=2.0)
    new = normal(2, 1, 1, KV_HEADS, DIM, seed=2)
    level_of = {tree: 1, up: 0}
    for now in (tree, up, tree, up):
        plan.update(lens, tree=now)
        lens[level_of[now]] += 1
        plan.update(lens)
        plan.append(kv, *new)
        stored = root[0][0] if now is up else k
        assert torch.equal(stored[int(lens[level_of[now]]) - 1], new[0][0, 0])
        armed = {level: bool(slots.fresh.any()) for level, (_, slots) in plan._state._slots._levels.items()}
        assert [level for level, fresh in armed.items() if fresh] == [level_of[now]]
    expected = hydragen.attention(queries()[:1], kv, tree=up, kv_lens=lens)
    torch.testing.assert_close(plan.run(queries()[:1], kv), expected)


def test_caches_that_cannot_be_written_to() -> None:
    tree, lens = PrefixTree.from_parents([-1]), torch.tensor([1])

    def pool() -> Tensor:
        return torch.zeros(2, 4, KV_HEADS, DIM)

    plan = hydragen.plan(tree, PagedKV(pool(), pool(), [0, 2], [0, 1]), num_q_heads=HEADS, kv_lens=lens)
    plan.update(lens + 1)
    new, leaf = torch.ones(1, 1, KV_HEADS, DIM), torch.ones(1, 1, KV_HEADS, DIM, requires_grad=True)
    with torch.inference_mode():
        frozen = pool()
    one = pool()
    cases: list[tuple[tuple[Tensor, Tensor], Tensor, Tensor, str]] = [
        ((pool().requires_grad_(), pool()), new, new, "kv k must not require gradients"),
        ((pool(), pool()), new, leaf, "v must not require gradients"),
        ((pool()[:1].expand(2, -1, -1, -1), pool()), new, new, "kv k must have a place for each element"),
        ((pool(), frozen), new, new, "kv v must not be a tensor made under torch.inference_mode"),
        ((one, one), new, new + 1, "kv v must have memory of its own"),
    ]
    for kv, k, v, message in cases:
        with pytest.raises(ValueError, match=message):
            plan.append(kv, k, v)
    with torch.no_grad():
        cache = (pool().requires_grad_(), pool())
        plan.append(cache, leaf, leaf)
    assert torch.equal(cache[0][0, 1], new[0, 0])
    with torch.inference_mode():
        plan.append((frozen, frozen), new, new)  # keys that are the values
    assert torch.equal(frozen[0, 1], new[0, 0])


def test_writes_that_would_overlap_are_found_on_request() -> None:
    """Two rows that were forked in the middle of a page and still share it; a row in a page of the prefix."""
    k, v = normal(2, 4, 4, KV_HEADS, DIM)
    tree = PrefixTree.from_parents([-1, 0, 0])
    table = PagedKV(k, v, [0, 1, 2, 3], [0, 1, 1])
    lens = torch.tensor([3, 2, 2])
    plan = hydragen.plan(tree, table, num_q_heads=HEADS, kv_lens=lens)
    plan.update(torch.tensor([3, 2, 3]), validate=True)  # one of the two has ended
    with pytest.raises(ValueError, match="page_indices must give every new token a place of its own"):
        plan.update(torch.tensor([3, 4, 4]), validate=True)
    with pytest.raises(ValueError, match="page_indices must give every new token a place of its own"):
        plan.update(torch.tensor([3, 3, 3]), page_indices=[0, 0, 1], validate=True)
    plan.update(torch.tensor([3, 3, 4]), page_indices=[0, 1, 2], validate=True)
    plan.append((k, v), *normal(2, 2, 1, KV_HEADS, DIM))


def test_nothing_has_grown_when_the_tree_changes(backend: str, device: torch.device) -> None:
    """What a node of a new tree holds was there before: nothing is to be appended until the next update."""
    kv, lens, views = growing("levels", device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=lens, reserve=2, backend=backend)
    before = [suffix("levels", views, which).clone() for which in (0, 1)]
    lens[1] += 2
    other = PrefixTree.from_levels([[PREFIX], [ROOM] * BATCH], row_to_node=[2, 1, 3, 4, 5])
    plan.update(kv_lens=lens, tree=other)
    new = [normal(BATCH, 1, KV_HEADS, DIM, seed=i, device=device) for i in range(2)]
    with pytest.raises(ValueError, match="append needs an update of kv_lens without tree or kv since"):
        plan.append(kv, *new)
    assert all(torch.equal(suffix("levels", views, which), before[which]) for which in (0, 1))
    lens[1] += 1
    plan.update(kv_lens=lens)
    plan.append(kv, *new)
    written = [suffix("levels", views, which)[:, 2] for which in (0, 1)]
    assert all(torch.equal(written[which], new[which][[1, 0, 2, 3, 4], 0]) for which in (0, 1))


def test_appending_within_a_transform_is_refused() -> None:
    kv, lens, _ = growing("levels", torch.device("cpu"))
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=lens)
    new = normal(BATCH, 1, KV_HEADS, DIM, seed=0, device=torch.device("cpu"))

    def append(k: Tensor) -> Tensor:
        plan.append(kv, k, new)
        return k

    for call in (
        lambda: torch.func.jvp(append, (new,), (new,)),
        lambda: torch.func.vmap(append)(new[None]),
    ):
        with pytest.raises(ValueError, match=r"Plan.append cannot|Plan.append computes"):
            call()


def test_caches_that_overlap_are_refused() -> None:
    """In all ways that strides can describe: judged by the elements themselves."""
    generator = np.random.default_rng(0)
    memory = torch.arange(4000)
    met = 0
    for _ in range(1000):
        sizes = generator.integers(1, 5, generator.integers(2, 5)).tolist()
        strides, reach = [0] * len(sizes), 0
        for dim in generator.permutation(len(sizes)):
            strides[dim] = reach + int(generator.integers(1, 4))
            reach += strides[dim] * (sizes[dim] - 1)
        others = [*sizes[:-1], int(generator.integers(1, sizes[-1] + 1))]
        a, b = (memory.as_strided(size, strides, int(generator.integers(60))) for size in (sizes, others))
        expected = bool(set(a.flatten().tolist()) & set(b.flatten().tolist()))
        assert entangled(a, b) == expected, (sizes, others, strides)
        met += expected
    assert 200 < met < 800

    tree, new = PrefixTree.from_parents([-1] * 3), torch.ones(3, 1, 2, 8)
    together = torch.zeros(3, 4, 3, 8)
    for k, v, message in (
        (together[:, :, :2], together[:, :, 1:], "v must have memory of its own"),
        (
            together[:, :, :2],
            together[:, :, :2].clone().as_strided((3, 4, 2, 8), (16, 16, 8, 1)),
            "a place for",
        ),
    ):
        plan = hydragen.plan(tree, [(k, v)], num_q_heads=2, kv_lens=[torch.zeros(3, dtype=torch.long)])
        plan.update([torch.ones(3, dtype=torch.long)])
        with pytest.raises(ValueError, match=message):
            plan.append([(k, v)], new, new)
    halves = torch.zeros(3, 2, 4, 2, 8)  # as pools of keys and values in one tensor are
    plan = hydragen.plan(tree, [(halves[:, 0], halves[:, 1])], num_q_heads=2, kv_lens=[torch.ones(3).long()])
    plan.update([torch.full((3,), 2)])
    plan.append([(halves[:, 0], halves[:, 1])], new, 2 * new)
    assert halves[:, 0].sum() * 2 == halves[:, 1].sum() == 2 * new.numel() * 1


def test_a_row_above_another_may_not_append() -> None:
    """Its token would land in what the other row shares."""
    tree = PrefixTree.from_levels([[10], [4, 4]], row_to_node=[0, 1, 2])
    kv = PackedKV(torch.zeros(18, 2, 8), torch.zeros(18, 2, 8), [0, 10, 14, 18])
    plan = hydragen.plan(tree, kv, num_q_heads=2, kv_lens=torch.tensor([5, 1, 1]))
    plan.update(torch.tensor([6, 1, 1]))
    new = torch.zeros(3, 1, 2, 8)
    with pytest.raises(ValueError, match="got row 0 at node 0, above another row's; give it an empty node"):
        plan.append(kv, new, new)
    fine = PrefixTree.from_levels([[10], [4, 4]], row_to_node=[1, 2])
    plan = hydragen.plan(fine, kv, num_q_heads=2, kv_lens=torch.tensor([5, 1, 1]))
    plan.update(torch.tensor([5, 2, 1]))
    plan.append(kv, new[:2], new[:2])


def test_packed_queries_are_named_before_shapes() -> None:
    tree = PrefixTree.from_parents([-1, -1], [4, 4])
    kv = PackedKV(torch.zeros(8, 2, 8), torch.zeros(8, 2, 8), [0, 4, 8])
    plan = hydragen.plan(tree, kv, num_q_heads=2, kv_lens=torch.tensor([1, 1]), cu_seqlens_q=[0, 1, 3])
    with pytest.raises(ValueError, match="append needs queries in a batch"):
        plan.append(kv, torch.zeros(2, 2, 2, 8), torch.zeros(2, 2, 2, 8))


def one_row_each(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    k, v = torch.zeros(2, 2, 6, 2, 16, device=device)
    return k, v, torch.tensor([2, 2], device=device)


def test_new_tokens_with_the_negative_bit(backend: str, device: torch.device) -> None:
    k, v, lens = one_row_each(device)
    plan = hydragen.plan(
        PrefixTree.from_parents([-1] * 2), [(k, v)], num_q_heads=2, kv_lens=[lens], backend=backend
    )
    plan.update([lens + 1])
    new = torch.complex(*torch.ones(2, 2, 1, 2, 16, device=device)).conj().imag
    assert new.is_neg()
    plan.append([(k, v)], new, new.clone())
    assert (k[:, 2] == -1).all()
    assert (v[:, 2] == -1).all()


def test_new_tokens_that_lie_where_they_are_written(device: torch.device) -> None:
    k, v, lens = one_row_each(device)
    plan = hydragen.plan(PrefixTree.from_parents([-1] * 2), [(k, v)], num_q_heads=2, kv_lens=[lens])
    plan.update([lens + 1])
    new = torch.ones(2, 1, 2, 16, device=device)
    for given, message in (
        (
            (new, k[:, 2:3]),
            r"v must not lie in kv\[0\] k, to which it is written, got a part of it; pass a clone",
        ),
        ((k[:, 1:2], new), r"k must not lie in kv\[0\] k"),
        ((v[:, 4:5], new), r"k must not lie in kv\[0\] v"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.append([(k, v)], *given)
    assert not k.any()
    assert not v.any()
    plan.append([(k, v)], new, new)  # one tensor for both, of its own
    assert v[:, 2].all()


def test_a_row_that_has_finished_above_another(backend: str, device: torch.device) -> None:
    """Its node has no room, and lies on the path of a row that goes on: nothing is written for it."""
    k, v = torch.zeros(2, 10, 2, 16, device=device)
    tree, lens = (
        PrefixTree.from_parents([-1, 0, 1], row_to_node=[1, 2]),
        torch.tensor([4, 0, 2], device=device),
    )
    plan = hydragen.plan(tree, PackedKV(k, v, [0, 4, 4, 10]), num_q_heads=2, kv_lens=lens, backend=backend)
    plan.update(lens + torch.tensor([0, 0, 1], device=device))
    new = normal(2, 2, 1, 2, 16, device=device)
    plan.append((k, v), new[0], new[1])
    for held, given in ((k, new[0]), (v, new[1])):
        assert torch.equal(held[6], given[1, 0])
        assert held.count_nonzero() == held[6].count_nonzero()
