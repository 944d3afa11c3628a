"""What mutation testing found that no other test would have noticed (ci/mutate)."""

import numpy as np
import pytest
import torch

from hydragen_reference import segment
from hydragen_reference.decomposed import Block, attend, tree_attention
from hydragen_reference.oracle import dense_attention
from hydragen_reference.oracle import tree_attention as oracle_tree


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_empty_block_does_not_end_the_list() -> None:
    q, k, v = draw(3, 2, 4), draw(1, 5, 1, 4, seed=1), draw(1, 5, 1, 4, seed=2)
    alone = tree_attention(q, [Block(k, v)])
    for empty in (
        Block(k[:, :0], v[:, :0]),
        Block(k[:0], v[:0], tokens=torch.zeros(0, 1, dtype=torch.int64)),
    ):
        after = tree_attention(q, [empty, Block(k, v)])
        assert torch.equal(after.out, alone.out)
        assert torch.equal(after.lse, alone.lse)


@pytest.mark.parametrize("order", [[1, 0], [1, 2, 0], [0, 2, 1]])
def test_tokens_in_another_order_are_gathered(order: list[int]) -> None:
    """Also where no token is in its place."""
    count = len(order)
    q, k, v = draw(count, 2, 4), draw(count, 3, 1, 4, seed=1), draw(count, 3, 1, 4, seed=2)
    tokens = torch.tensor(order)[:, None]
    state = tree_attention(q, [Block(k, v, tokens=tokens)])
    expected = attend(q[order][:, None], k, v)
    torch.testing.assert_close(state.out[order], expected.out[:, 0])
    torch.testing.assert_close(state.lse[order], expected.lse[:, 0])


def test_no_blocks_and_values_of_one_element() -> None:
    state = tree_attention(draw(3, 2, 1), [])
    assert torch.equal(state.out, torch.zeros(3, 2, 1, dtype=torch.float64))
    assert (state.lse == -torch.inf).all()


@pytest.mark.parametrize("causal", [False, True])
def test_any_tiling_gives_the_same(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of segments, of query tokens and of keys, where the others need one."""
    q, k, v = draw(3, 6, 4, 8), draw(3, 7, 2, 8, seed=1), draw(3, 7, 2, 5, seed=2)
    arguments = {
        "kv_lens": torch.tensor([7, 0, 4]),
        "q_pos": torch.arange(18).reshape(3, 6) % 7,
        "causal": causal,
    }
    whole = attend(q, k, v, **arguments)
    for elements, rows, keys in ((1, 4, 2), (40, 8, 3), (200, 1, 1024)):
        monkeypatch.setattr(segment, "CPU_TILE", elements)
        monkeypatch.setattr(segment, "MIN_QUERY_ROWS", rows)
        monkeypatch.setattr(segment, "KEYS_PER_CHUNK", keys)
        tiled = attend(q, k, v, **arguments)
        assert tiled.out.shape == whole.out.shape
        torch.testing.assert_close(tiled.out, whole.out)
        torch.testing.assert_close(tiled.lse, whole.lse)


def test_the_oracle_computes_in_float64_whatever_it_is_given() -> None:
    q, k, v = (draw(2, 1, 8, seed=seed).numpy().astype(np.float32) for seed in range(3))
    narrow = dense_attention(q, k, v)
    wide = dense_attention(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64))
    for one, other in zip(narrow, wide, strict=True):
        assert one.dtype == np.float64
        assert np.array_equal(one, other)


def test_the_oracle_refuses_rows_without_an_end() -> None:
    q, k = draw(1, 1, 4).numpy(), draw(2, 1, 4).numpy()
    with pytest.raises(ValueError, match="argument"):
        oracle_tree([q, q], [k], [k], [-1], [0])


def test_out_may_have_another_dtype_than_q() -> None:
    q, k, v = draw(2, 2, 4).half(), draw(1, 3, 1, 4, seed=1).half(), draw(1, 3, 1, 4, seed=2).half()
    wide = tree_attention(q, [Block(k, v)], out_dtype=torch.float32)
    narrow = tree_attention(q, [Block(k, v)])
    assert (wide.out.dtype, narrow.out.dtype) == (torch.float32, torch.float16)
    assert not torch.equal(wide.out, narrow.out.float())
    assert torch.equal(wide.out.half(), narrow.out)
