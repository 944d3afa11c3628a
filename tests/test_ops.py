"""hydragen.attention inside torch.compile: a registered operator, one graph whatever the lengths."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

import hydragen
from hydragen.handles import of_handle
from hydragen.ops import attention_op

PREFIX, SUFFIX, BATCH = 20, 10, 4


@pytest.fixture
def tensors() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    prefix, suffix = (1, PREFIX, 2, 16), (BATCH, SUFFIX, 2, 16)
    return (normal(BATCH, 1, 8, 16), normal(*prefix), normal(*prefix), normal(*suffix), normal(*suffix))


def two_levels(
    q: Tensor, pk: Tensor, pv: Tensor, sk: Tensor, sv: Tensor, lens: Tensor
) -> hydragen.AttentionState:
    state = hydragen.attention(q, [(pk, pv), (sk, sv)], kv_lens=[None, lens], return_lse=True)
    assert isinstance(state, hydragen.AttentionState)
    return state


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)


def test_opcheck_passes(tensors: tuple[Tensor, ...]) -> None:
    q, pk, pv, sk, sv = tensors
    lens = torch.tensor([3, 10, 0, 7])
    levels = ([pk, sk], [pv, sv], True, [None, None], None)
    pool = ([sk], [sv], False, [torch.arange(BATCH + 1)], torch.arange(BATCH, dtype=torch.int32))
    for kv, kv_lens in ((levels, [None, lens]), (pool, [lens])):
        for return_lse, out_dtype in ((False, None), (True, torch.float32)):
            options = (None, kv_lens, None, None, None, None, True, 5, 2.0, return_lse, out_dtype)
            torch.library.opcheck(attention_op, (q, *kv, *options, "reference", False, False))


def test_compiled_levels_equal_eager_bit_for_bit(tensors: tuple[Tensor, ...]) -> None:
    lens = torch.tensor([3, 10, 0, 7])
    graph = compiled(two_levels)
    expected = two_levels(*tensors, lens)
    out, lse = graph(*tensors, lens)  # type: ignore[misc]
    assert torch.equal(out, expected.out)
    assert torch.equal(lse, expected.lse)


def test_the_default_device_is_not_asked(tensors: tuple[Tensor, ...]) -> None:
    """Lengths in lists stay on the host."""
    q, pk, pv = tensors[:3]

    def attend(q: Tensor, pk: Tensor, pv: Tensor) -> object:
        return hydragen.attention(q, [(pk, pv)], kv_lens=[[7]])

    expected = attend(q, pk, pv)
    torch.set_default_device("meta")
    try:
        out = compiled(attend)(q, pk, pv)
    finally:
        torch.set_default_device(None)
    assert isinstance(out, Tensor)
    assert torch.equal(out, expected)


def test_growing_lengths_and_batches_do_not_recompile(tensors: tuple[Tensor, ...]) -> None:
    graph = compiled(two_levels)
    graph(*tensors, torch.tensor([3, 10, 0, 7]))
    graph(*(x[:3] if x.shape[0] == BATCH else x for x in tensors), torch.tensor([3, 10, 0]))
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(4):
            lens = torch.tensor([3, 6, 0, 5]) + step
            out, _ = graph(*tensors, lens)  # type: ignore[misc]
            torch.testing.assert_close(out, two_levels(*tensors, lens).out)


def test_compiled_packed_tree_equals_eager(tensors: tuple[Tensor, ...]) -> None:
    q, pk, pv, sk, sv = tensors
    tree = hydragen.PrefixTree.from_levels([[PREFIX], [SUFFIX] * BATCH])
    offsets = [0, *range(PREFIX, PREFIX + BATCH * SUFFIX + 1, SUFFIX)]
    k, v = torch.cat([pk[0], sk.flatten(0, 1)]), torch.cat([pv[0], sv.flatten(0, 1)])

    def attend(q: Tensor, lens: Tensor) -> object:
        return hydragen.attention(q, hydragen.PackedKV(k, v, offsets), tree=tree, kv_lens=lens, causal=True)

    lens = torch.tensor([PREFIX, 3, 10, 0, 7])
    assert torch.equal(compiled(attend)(q, lens), attend(q, lens))


Attend = Callable[[Tensor, object, object], object]


def of_packed(q: Tensor, offsets: object, _indices: object) -> object:
    k, v = POOL.flatten(1, 2)
    return hydragen.attention(q, hydragen.PackedKV(k, v, offsets))


def of_levels(q: Tensor, offsets: object, _indices: object) -> object:
    k, v = POOL.flatten(1, 2)
    prefix = k[None, :7], v[None, :7]
    return hydragen.attention(q, [prefix, hydragen.PackedKV(k, v, offsets)])


def of_pages(q: Tensor, offsets: object, indices: object) -> object:
    return hydragen.attention(q, hydragen.PagedKV(*POOL, offsets, indices))


POOL = torch.randn(2, 6, 1, 2, 16, generator=torch.Generator().manual_seed(4))
OFFSETS = ([0, 1, 3, 4, 6], [0, 3, 4, 5, 6], [0, 0, 0, 0, 6])
INDICES = ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [5, 5, 3, 3, 1, 0])


@pytest.mark.parametrize("attend", [of_packed, of_levels, of_pages])
@pytest.mark.parametrize("give", [list, np.array, torch.tensor], ids=lambda give: give.__name__)
def test_a_graph_follows_its_offsets(
    attend: Attend, give: Callable[[list[int]], object], tensors: tuple[Tensor, ...]
) -> None:
    """Traced with some offsets and page numbers, called with others: never with those of before."""
    torch.compiler.reset()
    graph = torch.compile(attend, fullgraph=True, backend="aot_eager")  # what does not change is a constant
    seen = []
    for number in (0, 1, 2, 0):
        offsets, indices = OFFSETS[number], INDICES[number]
        expected = attend(tensors[0], give(offsets), give(indices))
        assert isinstance(expected, Tensor)
        assert torch.equal(graph(tensors[0], give(offsets), give(indices)), expected)
        seen.append(expected)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("give", [list, np.array, torch.tensor], ids=lambda give: give.__name__)
def test_offsets_changed_in_place_are_followed(
    give: Callable[[list[int]], object], tensors: tuple[Tensor, ...]
) -> None:
    offsets: Any = give(OFFSETS[0])
    k, v = POOL.flatten(1, 2)
    kv = hydragen.PackedKV(k, v, offsets)

    def attend(q: Tensor) -> object:
        return hydragen.attention(q, kv)

    graph = compiled(attend)
    for changed in OFFSETS:
        offsets[:] = give(changed)
        assert torch.equal(graph(tensors[0]), attend(tensors[0]))


@pytest.mark.parametrize("give", [list, torch.tensor], ids=lambda give: give.__name__)
@pytest.mark.parametrize("layout", ["packed", "levels", "pages"])
def test_a_plan_in_a_graph_refuses_other_tables_than_its_own(
    layout: str, give: Callable[[list[int]], Any], tensors: tuple[Tensor, ...]
) -> None:
    """It would compute with its own, in silence, where the same call outside of the graph is refused."""
    q, (k, v) = tensors[0], POOL.flatten(1, 2)

    def kv_of(offsets: list[int], indices: list[int]) -> Any:
        if layout == "pages":
            return hydragen.PagedKV(*POOL, give(offsets), give(indices))
        packed = hydragen.PackedKV(k, v, give(offsets))
        return packed if layout == "packed" else [packed]

    tree = hydragen.PrefixTree.from_parents([-1] * BATCH)
    plan = hydragen.plan(tree, kv_of(OFFSETS[0], INDICES[0]), num_q_heads=8, backend="reference")

    def attend(q: Tensor, kv: Any) -> object:
        return plan.run(q, kv)

    graph = compiled(attend)
    own = {"packed": (k, v), "levels": [(k, v)], "pages": tuple(POOL)}[layout]
    expected = attend(q, own)
    for right in (own, kv_of(OFFSETS[0], INDICES[0])):
        assert torch.equal(graph(q, right), expected)
    wrong = [kv_of(OFFSETS[1], INDICES[0]), [(k, v), (k, v)]]
    if layout == "pages":
        wrong.append(kv_of(OFFSETS[0], INDICES[2]))
    for other in wrong:
        for call in (attend, graph):
            with pytest.raises(Exception, match=r"kv.* must (be|have)"):
                call(q, other)


def test_gradients_in_a_graph_are_refused_clearly(tensors: tuple[Tensor, ...]) -> None:
    q, *kv = tensors
    with pytest.raises(Exception, match=r"no gradients inside torch\.compile.*torch\.compiler\.disable"):
        compiled(two_levels)(q.clone().requires_grad_(), *kv, torch.tensor([3, 10, 0, 7]))


@pytest.mark.parametrize("planned", [False, True])
def test_transforms_in_a_graph_are_refused_clearly(tensors: tuple[Tensor, ...], planned: bool) -> None:
    """torch would drop an operator's tangents: a derivative of 0."""
    q, pk, pv, sk, sv = tensors
    kv = [(pk, pv), (sk, sv)]
    tree = hydragen.PrefixTree.from_levels([[PREFIX], [SUFFIX] * BATCH])
    plan = hydragen.plan(tree, kv, num_q_heads=8, backend="reference")

    def attend(q: Tensor) -> Tensor:
        return plan.run(q, kv) if planned else hydragen.attention(q, kv, backend="reference")

    def tangent(q: Tensor) -> Tensor:
        return torch.func.jvp(attend, (q,), (q,))[1]

    def mapped(q: Tensor) -> Tensor:
        return torch.vmap(attend)(q[None])

    with pytest.raises(Exception, match=r"no forward-mode derivatives inside torch\.compile.*leave it out"):
        compiled(tangent)(q)
    with pytest.raises(
        Exception, match=r"cannot be mapped by torch\.vmap inside torch\.compile.*leave it out"
    ):
        compiled(mapped)(q)
    graph = compiled(attend)
    expected = graph(q)
    with forward_ad.dual_level(), pytest.raises(Exception, match="no forward-mode derivatives inside"):
        graph(forward_ad.make_dual(q, q))
    assert torch.equal(graph(q), expected)
    torch.compiler.disable(tangent)(q)


def test_a_tree_is_found_by_its_handle_while_it_lives() -> None:
    tree = hydragen.PrefixTree.from_levels([[3], [1, 2]])
    handle = tree.handle
    assert of_handle(handle) is tree
    del tree
    with pytest.raises(ValueError, match=f"handle .* {handle}; keep the one that was compiled"):
        of_handle(handle)


def test_every_option_reaches_the_operator() -> None:
    """Compiled equals eager with everything on, one thing left out at a time."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(3, 2, 4, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 3, 9, 2, 8, generator=generator, dtype=torch.float64)
    everything = {
        "kv_lens": [torch.tensor([9, 4, 0])], "scale": 0.3, "causal": True, "window": 5, "softcap": 1.5,
        "sinks": torch.tensor([0.5, 1.0, -1.0, 0.0], dtype=torch.float64),
    }  # fmt: skip
    seen = []
    for left_out in (None, *everything):
        options = {name: value for name, value in everything.items() if name != left_out}

        def call(q: Tensor, options: dict[str, object] = options) -> hydragen.AttentionState:
            return hydragen.attention(q, [(k, v)], return_lse=True, **options)

        found, expected = compiled(call)(q), call(q)
        assert found.lse.dtype == torch.float64
        assert torch.equal(found.out, expected.out)
        assert torch.equal(found.lse, expected.lse)
        seen.append(expected.lse)
    assert all(not torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lens": [[2.7, 3.9, 1.0]]}, "must hold integers"),
        ({"kv_lens": []}, "kv_lens must be a list with an entry per level"),
        ({"kv_lens": [[True, False, True]]}, "must hold integers"),
        ({"causal": 1}, "causal must be True or False"),
        ({"window": True}, "window must be a number or None"),
        ({"scale": True}, "scale must be a number or None"),
        ({"return_lse": 1}, "return_lse must be True or False"),
        ({"kv": [(torch.zeros(3, 2, 1, 4),) * 3]}, "kv must hold pairs"),
        ({"kv": [torch.zeros(2, 3, 2, 1, 4)]}, "kv must hold pairs"),
        ({"kv": []}, "kv must be a list of levels"),
        ({"kv_lens": [[2, 3, 9]], "validate": True}, "must not exceed"),
    ],
)
def test_what_eager_refuses_is_refused_in_a_graph(changes: dict[str, object], message: str) -> None:
    arguments = {"kv": [(torch.zeros(3, 4, 1, 4),) * 2], **changes}

    def call(q: Tensor) -> object:
        given = dict(arguments)
        return hydragen.attention(q, given.pop("kv"), **given)

    with pytest.raises(Exception, match=message):
        compiled(call)(torch.zeros(3, 1, 2, 4))


def test_a_fresh_tree_inside_a_compiled_function() -> None:
    tree = hydragen.PrefixTree.from_token_ids([[1, 2, 3], [1, 2, 4, 5]])
    k, v = torch.randn(2, 5, 2, 8, generator=torch.Generator().manual_seed(0))

    def call(q: Tensor) -> object:
        return hydragen.attention(q, hydragen.PackedKV(k, v, tree.kv_offsets), tree=tree)

    q = torch.ones(2, 1, 4, 8)
    assert torch.equal(compiled(call)(q), call(q))


def test_fake_tensors_leave_nothing_behind() -> None:
    q, kv = torch.randn(2, 2, 2, 8), [(torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8))]
    with FakeTensorMode() as mode:
        fake = [tuple(mode.from_tensor(x) for x in kv[0])]
        out = hydragen.attention(mode.from_tensor(q), fake, causal=True, kv_lens=[[3, 7]])
    assert out.shape == q.shape
    hydragen.attention(q, kv, causal=True, kv_lens=[[3, 7]])


@pytest.mark.parametrize("real_allowed", [True, False])
def test_fake_tensors_leave_a_plan_as_it_is(real_allowed: bool) -> None:
    q, kv = torch.randn(2, 2, 2, 8), [(torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8))]
    plan = hydragen.plan(hydragen.PrefixTree.from_levels([[9, 9]]), kv, num_q_heads=2, q_len=2)
    with FakeTensorMode(allow_non_fake_inputs=real_allowed) as mode:
        fake = [tuple(mode.from_tensor(x) for x in kv[0])]
        out = plan.run(mode.from_tensor(q), fake, causal=True)
    assert isinstance(out, FakeTensor)
    assert out.shape == q.shape
    torch.testing.assert_close(plan.run(q, kv, causal=True), hydragen.attention(q, kv, causal=True))


def test_a_saved_handle_finds_nothing_in_another_process() -> None:
    """Numbers are random, so that a loaded graph cannot meet another tree under the number of its own."""
    trees = [hydragen.PrefixTree.from_levels([[3], [1, 2]]) for _ in range(3)]
    assert min(tree.handle for tree in trees) > 2**32
