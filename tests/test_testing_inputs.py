"""Each sharpness does what it is for, in every dtype and for the odd shapes as well."""

import math
from dataclasses import replace

import pytest
import torch

from hydragen.testing import Problem
from hydragen.testing.budget import rows
from hydragen.testing.device_inputs import draw_inputs
from hydragen.testing.problem import DTYPES
from hydragen.testing.views import MEMORY

BASE = Problem(
    parents=(-1, 0, 0, -1),
    kv_lens=(40, 17, 1, 30),
    row_to_node=(1, 2, 3, 0),
    q_lens=(8, 3, 9, 12),
    num_q_heads=6,
    num_kv_heads=2,
    head_dim=16,
)
HEAD_DIMS = [1, 2, 3, 33, 256]
SCALES = [None, 0.05, 1.0, -0.5]


@pytest.fixture(params=["NumPy", "on the device"], autouse=True)
def drawn_by(request, monkeypatch):
    """Hold the tensors of forests, which PyTorch draws, to the same."""
    if request.param != "NumPy":
        monkeypatch.setattr(Problem, "tensors", lambda problem: draw_inputs(problem, "cpu"))


def logits(problem):
    """Of every row, float64 [num_q_heads, q_len, path_len]."""
    inputs = problem.tensors()
    return [row.q.double() @ row.k.double().mT * problem.logit_scale for row in rows(problem, inputs)]


def entropy_share(problem):
    """Mean entropy of the weights in units of its maximum, over rows with a choice."""
    shares = []
    for row in logits(problem):
        weights = torch.softmax(row, -1)
        entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)
        shares.append(entropy.flatten() / math.log(row.shape[-1]))
    return float(torch.cat(shares).mean())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_peaked_entropy_is_under_half_of_its_maximum(head_dim, scale):
    peaked = [
        entropy_share(replace(BASE, sharpness="peaked", head_dim=head_dim, scale=scale, seed=seed))
        for seed in range(4)
    ]
    assert max(peaked) < 0.5


@pytest.mark.parametrize("head_dim", HEAD_DIMS[1:])
def test_flat_entropy_is_near_its_maximum(head_dim):
    assert entropy_share(replace(BASE, head_dim=head_dim)) > 0.7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_very_negative_logits_are_all_below_the_finite_infinity(head_dim, scale, dtype):
    for seed in range(5):
        problem = replace(
            BASE, sharpness="very_negative", head_dim=head_dim, scale=scale, dtype=dtype, seed=seed
        )
        assert max(float(row.max()) for row in logits(problem)) < -5e4


def test_some_queries_are_very_negative_and_the_others_flat():
    rows_of = logits(replace(BASE, sharpness="some_very_negative"))
    highest = torch.cat([row.amax((0, 2)) for row in rows_of])
    assert 0.2 < float((highest < -5e4).float().mean()) < 0.8
    assert float(highest.max()) < 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_lopsided_nodes_reach_a_magnitude_of_1e4_on_both_sides(head_dim, dtype):
    drawn = [
        logits(replace(BASE, sharpness="lopsided", head_dim=head_dim, dtype=dtype, seed=seed))
        for seed in range(12)
    ]
    flat = torch.cat([row.flatten() for problem in drawn for row in problem])
    assert float(flat.max()) > 9e3
    assert float(flat.min()) < -9e3
    assert float(flat.abs().max()) < 1.2e4


def test_repeated_has_two_queries_and_two_keys():
    inputs = replace(BASE, sharpness="repeated").tensors()
    assert len(inputs.q.unique(dim=0)) == 2
    assert len(inputs.k.unique(dim=0)) == 2
    assert len(inputs.v.unique(dim=0)) == len(inputs.v)


@pytest.mark.parametrize("sharpness", ["flat", "peaked", "lopsided", "very_negative", "repeated"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [*SCALES, 0.0])
def test_tensors_are_signed_and_finite(sharpness, dtype, scale):
    if scale == 0 and sharpness == "very_negative":
        scale = None
    problem = replace(BASE, sharpness=sharpness, dtype=dtype, scale=scale, sinks=True)
    inputs = problem.tensors()
    for tensor in (inputs.q, inputs.k, inputs.v, inputs.sinks):
        assert tensor.isfinite().all()
    for tensor in (inputs.q, inputs.v):
        assert tensor.min() < 0 < tensor.max()


def test_no_keys_and_one_coordinate():
    empty = replace(BASE, kv_lens=(0, 0, 0, 0), head_dim=1)
    for sharpness in ("flat", "lopsided", "repeated", "some_very_negative"):
        assert replace(empty, sharpness=sharpness).tensors().k.shape == (0, 2, 1)


@pytest.mark.parametrize("memory", MEMORY)
def test_clones_and_moves_keep_strides_and_share_nothing(memory):
    inputs = BASE.tensors().with_memory(memory)
    for copy in (inputs.clone(), inputs.to("meta")):
        for name in ("q", "k", "v"):
            assert getattr(copy, name).stride() == getattr(inputs, name).stride()
            assert getattr(copy, name).storage_offset() == getattr(inputs, name).storage_offset()
    copy = inputs.clone()
    copy.k.zero_()
    assert inputs.k.abs().sum() > 0
