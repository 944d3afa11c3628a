"""hydragen.attention inside torch.compile: a registered operator, one graph whatever the lengths."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

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
    with pytest.raises(Exception, match=r"no gradients inside torch\.compile.*backend=\"reference\""):
        compiled(two_levels)(q.clone().requires_grad_(), *kv, torch.tensor([3, 10, 0, 7]))


def test_a_tree_is_found_by_its_handle_while_it_lives() -> None:
    tree = hydragen.PrefixTree.from_levels([[3], [1, 2]])
    handle = tree.handle
    assert of_handle(handle) is tree
    del tree
    with pytest.raises(ValueError, match=f"handle .* {handle}; keep the PrefixTree alive"):
        of_handle(handle)
