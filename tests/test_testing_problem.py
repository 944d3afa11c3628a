"""Problems name what is wrong, print as the call that builds them, and give the same tensors every time."""

import dataclasses

import numpy as np
import pytest
import torch

import hydragen.testing
from hydragen.testing import Problem

GOOD = {"parents": (-1, 0, 0), "kv_lens": (5, 2, 0), "row_to_node": (1, 2), "q_lens": (1, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": ()}, "parents must name at least one node"),
        ({"parents": (-1, 1, 0)}, r"parents\[1\] = 1"),
        ({"parents": (-2, 0, 0)}, r"parents\[0\] = -2"),
        ({"kv_lens": (5, 2)}, "kv_lens must have one entry per node"),
        ({"kv_lens": (5, -1, 0)}, r"kv_lens\[1\] = -1"),
        ({"row_to_node": ()}, "row_to_node must name at least one row"),
        ({"row_to_node": (1, 3)}, r"row_to_node\[1\] = 3"),
        ({"q_lens": (1,)}, "q_lens must have one entry per row"),
        ({"q_lens": (1, 0)}, r"q_lens\[1\] = 0"),
        (
            {"num_q_heads": 3, "num_kv_heads": 2},
            "num_q_heads must be a multiple of num_kv_heads, got 3 and 2",
        ),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1"),
        ({"head_dim": 257}, "head_dim must be at most 256"),
        ({"head_dim_v": 0}, "head_dim_v must be at least 1"),
        ({"dtype": torch.int32}, "dtype must be one of"),
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": float("nan")}, "softcap must be None or a positive"),
        ({"softcap": -1}, "softcap must be None or a positive"),
        ({"scale": 10**400}, "scale must be None or a finite"),
        ({"scale": np.float32("nan")}, "scale must be None or a finite"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**64}, f"seed must be at most {2**64 - 1}, got "),
        ({"softcap": 0.0}, "softcap must be None or a positive"),
        ({"scale": float("inf")}, "scale must be None or a finite"),
        ({"sharpness": "blunt"}, "sharpness must be one of"),
        ({"sharpness": "very_negative", "softcap": 1.0}, "needs softcap=None"),
        ({"sharpness": "some_very_negative", "scale": 0.0}, "a scale other than 0"),
    ],
)
def test_a_wrong_number_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Problem(**{**GOOD, **change})


@pytest.mark.parametrize("change", [{"kv_lens": 5}, {"kv_lens": (5, 2.0, 0)}, {"q_lens": (True, 1)}])
def test_a_wrong_type_is_named(change):
    with pytest.raises(TypeError, match=next(iter(change))):
        Problem(**{**GOOD, **change})


INTEGERS = ("num_q_heads", "num_kv_heads", "head_dim", "head_dim_v", "window", "seed")
NUMBERS, FLAGS, CHOICES = ("softcap", "scale"), ("causal", "sinks"), ("dtype", "sharpness")
META = torch.tensor(1, device="meta")
TENSORS = [META, torch.tensor(2), np.array([1, 2]), np.bool_(True)]
ODD = ["x", b"x", [1], (1, 2, 3, 4), {}, object(), 1j, float, *TENSORS]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Problem)])
@pytest.mark.parametrize("odd", ODD)
def test_what_is_none_of_its_kind_is_named(name, odd):
    if isinstance(odd, str) and name == "sharpness":
        return
    kinds = {
        **dict.fromkeys(INTEGERS, " must be an integer, got "),
        **dict.fromkeys(NUMBERS, " must be None or a (positive )?finite number, got "),
        **dict.fromkeys(FLAGS, " must be True or False, got "),
        **dict.fromkeys(CHOICES, " must be one of "),
    }
    # a vector of integers, but too few or too many
    error = ValueError if isinstance(odd, (list, tuple)) and name not in kinds else TypeError
    with pytest.raises(error, match=f"^(kv_lens|q_lens|{name}){kinds.get(name, ' must ')}"):
        Problem(**{**GOOD, name: odd})


@pytest.mark.parametrize("name", [*INTEGERS, *FLAGS])
@pytest.mark.parametrize("odd", [2.5, 2.0, float("nan"), float("inf")])
def test_floats_are_named_where_they_are_wrong(name, odd):
    with pytest.raises(TypeError, match=f"^{name} must be .*, got {odd} of type float; "):
        Problem(**{**GOOD, name: odd})


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS, *CHOICES])
def test_a_bool_is_no_number(name):
    with pytest.raises(TypeError, match=f"^{name} must be .*, got True of type bool"):
        Problem(**{**GOOD, name: True})


@pytest.mark.parametrize("name", [*FLAGS, "seed", "dtype", "sharpness", "head_dim"])
def test_none_is_a_default_of_numbers_only(name):
    with pytest.raises(TypeError, match=f"^{name} must be "):
        Problem(**{**GOOD, name: None})


def test_numbers_of_numpy_print_as_numbers():
    given = {
        "head_dim": np.int64(16), "num_q_heads": np.int32(2), "window": np.uint8(3), "seed": np.int64(5),
        "softcap": np.float32(0.5), "scale": np.float64(0.25),
    }  # fmt: skip
    problem = Problem(**GOOD, **given)
    assert "np." not in repr(problem)
    assert eval(repr(problem)) == problem
    assert repr(Problem(**GOOD, scale=1)).endswith("scale=1)")


def test_the_repr_builds_the_problem_and_leaves_out_defaults():
    problem = Problem(**GOOD, num_q_heads=4, dtype=torch.bfloat16, causal=True, sharpness="peaked")
    names = {"Problem": Problem, "torch": torch}
    assert eval(repr(problem), names) == problem
    assert "window" not in repr(problem)


def test_a_problem_is_a_sentence():
    text = str(Problem(**GOOD, window=3, sinks=True))
    assert "1 at node 1, 3 at node 2" in text
    assert "5 in node 0, 2 in node 1 under 0" in text
    assert "window 3, sinks, flat" in text


def test_lists_become_tuples_so_that_problems_hash():
    problem = Problem(**{name: list(values) for name, values in GOOD.items()})
    assert hash(problem) == hash(Problem(**GOOD))


def test_derived_numbers():
    problem = Problem(**GOOD, num_q_heads=6, num_kv_heads=2, head_dim=16)
    assert (problem.num_nodes, problem.num_rows, problem.total_q, problem.total_kv) == (3, 2, 4, 7)
    assert problem.path(0) == (0, 1)
    assert problem.path_len(0) == 7
    assert problem.path_len(1) == 5
    assert problem.group_size == 3
    assert problem.logit_scale == 0.25


def test_tensors_are_the_same_every_time():
    problem = Problem(**GOOD, sinks=True, seed=3)
    one, other = problem.tensors(), problem.tensors()
    assert one.q is not other.q
    for name in ("q", "k", "v", "sinks", "cu_seqlens_q", "cu_seqlens_k"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert not torch.equal(one.q, Problem(**GOOD, seed=4).tensors().q)


def test_shapes_dtypes_and_offsets():
    inputs = Problem(
        **GOOD, num_q_heads=6, num_kv_heads=2, head_dim=3, head_dim_v=5, dtype=torch.float16, sinks=True
    ).tensors()
    assert inputs.q.shape == (4, 6, 3)
    assert inputs.k.shape == (7, 2, 3)
    assert inputs.v.shape == (7, 2, 5)
    assert inputs.q.dtype == inputs.k.dtype == inputs.v.dtype == torch.float16
    assert inputs.sinks.shape == (6,)
    assert inputs.sinks.dtype == torch.float32
    assert inputs.cu_seqlens_q.tolist() == [0, 1, 4]
    assert inputs.cu_seqlens_k.tolist() == [0, 5, 7, 7]
    assert inputs.cu_seqlens_q.dtype == inputs.cu_seqlens_k.dtype == torch.int32


def test_every_public_name_is_there():
    for name in hydragen.testing.__all__:
        assert getattr(hydragen.testing, name) is not None
    with pytest.raises(AttributeError, match="problem_s"):
        _ = hydragen.testing.problem_s
