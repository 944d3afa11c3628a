"""hydragen.attention inside torch.compile: a registered operator, one graph whatever the lengths."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
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
    assert torch.equal(compiled(attend)(q, lens), attend(q, lens))  # type: ignore[arg-type]


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
    with pytest.raises(ValueError, match=f"handle .* {handle}; keep the PrefixTree alive"):
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


def test_a_saved_handle_finds_nothing_in_another_process() -> None:
    """Numbers are random, so that a loaded graph cannot meet another tree under the number of its own."""
    trees = [hydragen.PrefixTree.from_levels([[3], [1, 2]]) for _ in range(3)]
    assert min(tree.handle for tree in trees) > 2**32
