"""Views hold the same values at other places, and NaN wherever nothing may be read."""

import math
from dataclasses import replace

import pytest
import torch

from hydragen.testing import Problem, restride, view
from hydragen.testing.views import KV_LAYOUTS, MEMORY, levels

PROBLEM = Problem(
    parents=(-1, 0, -1, 1, 0),
    kv_lens=(3, 0, 4, 2, 1),
    row_to_node=(3, 2, 4),
    q_lens=(2, 2, 2),
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=5,
    head_dim_v=3,
)


def test_levels_are_nodes_by_depth():
    assert levels(PROBLEM.parents) == [[0, 2], [1, 4], [3]]


@pytest.mark.parametrize("spare", [0, 1, 17])
def test_levels_are_padded_with_nan(spare):
    inputs = PROBLEM.tensors()
    made = PROBLEM.as_levels(inputs, spare=spare)
    assert made.kv_lens == [[3, 4], [0, 1], [2]]
    assert [k.shape[1] for k, _ in made.kv] == [4 + spare, 1 + spare, 2 + spare]
    starts = inputs.cu_seqlens_k.tolist()
    for (k, v), nodes in zip(made.kv, levels(PROBLEM.parents), strict=True):
        for index, node in enumerate(nodes):
            used = PROBLEM.kv_lens[node]
            assert torch.equal(k[index, :used], inputs.k[starts[node] : starts[node + 1]])
            assert torch.equal(v[index, :used], inputs.v[starts[node] : starts[node + 1]])
            assert k[index, used:].isnan().all()
            assert v[index, used:].isnan().all()


def test_rows_of_equal_length_become_a_batch_and_ragged_rows_stay_packed():
    made = PROBLEM.as_levels()
    assert made.q.shape == (3, 2, 4, 5)
    assert made.cu_seqlens_q is None
    assert torch.equal(made.packed(made.q), PROBLEM.tensors().q)
    ragged = replace(PROBLEM, q_lens=(1, 3, 2)).as_levels()
    assert ragged.q.shape == (6, 4, 5)
    assert ragged.cu_seqlens_q.tolist() == [0, 1, 4, 6]
    assert ragged.packed(ragged.q) is ragged.q


def test_packed_without_spare_is_the_tensors_themselves():
    inputs = PROBLEM.tensors()
    made = PROBLEM.as_packed(inputs)
    assert made.kv.k.data_ptr() == inputs.k.data_ptr()
    assert made.kv_lens is None
    assert made.tree.parents.tolist() == list(PROBLEM.parents)
    assert made.tree.row_to_node.tolist() == list(PROBLEM.row_to_node)


def test_packed_with_spare_has_nan_between_the_nodes():
    inputs = PROBLEM.tensors()
    made = PROBLEM.as_packed(inputs, spare=2)
    assert made.kv_lens == list(PROBLEM.kv_lens)
    assert made.kv.cu_seqlens_k.tolist() == [0, 5, 7, 13, 17, 20]
    assert made.kv.cu_seqlens_k.dtype == torch.int32
    assert torch.equal(made.kv.k[7:11], inputs.k[3:7])
    assert made.kv.k[11:13].isnan().all()
    assert int(made.kv.v.isnan().all(-1).all(-1).sum()) == 2 * 5


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("shape", [(6, 4, 5), (2, 3, 4, 5), (0, 2, 1), (3, 1, 1)])
def test_restride_moves_values_and_poisons_the_gaps(shape, memory):
    tensor = torch.randn(shape)
    moved = restride(tensor, memory)
    assert torch.equal(moved, tensor)
    assert restride(tensor, None) is tensor
    everything = torch.empty(0).set_(moved.untyped_storage())
    assert int((~everything.isnan()).sum()) == tensor.numel()
    if min(shape) > 1:
        assert moved.is_contiguous() == (memory in ("contiguous", "shifted"))


@pytest.mark.parametrize("kv_layout", KV_LAYOUTS)
@pytest.mark.parametrize("memory", MEMORY)
def test_every_view_has_the_strides_asked_for(kv_layout, memory):
    made = view(PROBLEM, PROBLEM.tensors(), kv_layout, memory=memory)
    k = {
        "packed": lambda: made.kv.k,
        "levels": lambda: made.kv[0][0],
        "packed_levels": lambda: made.kv[0].k,
        "paged": lambda: made.kv.k_cache,
    }[kv_layout]()
    for tensor in (made.q, k):
        assert tensor.is_contiguous() == (memory in ("contiguous", "shifted"))
        assert (tensor.storage_offset() == 1) == (memory in ("shifted", "interleaved"))
        assert (tensor.stride(-1) == 2) == (memory == "interleaved")


def test_wrong_arguments_are_named():
    inputs = PROBLEM.tensors()
    with pytest.raises(
        ValueError, match=r"kv_layout must be one of packed, levels, packed_levels, paged, got 'heaped'"
    ):
        view(PROBLEM, inputs, "heaped")
    with pytest.raises(ValueError, match="memory must be one of"):
        restride(inputs.q, "sideways")
    with pytest.raises(ValueError, match="spare must be at least 0, got -1"):
        PROBLEM.as_packed(spare=-1)
    with pytest.raises(ValueError, match=r"inputs\.k must have the problem's shape"):
        replace(PROBLEM, head_dim=6).as_packed(inputs)
    assert math.isnan(float(restride(inputs.q, "sliced").as_strided((), (), 0)))
