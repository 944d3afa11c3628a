"""Wrong arguments: each error names the argument, what was expected, what was given, and the remedy."""
# ruff: noqa: E501 - a table with one case per line

import decimal
from typing import Any

import numpy as np
import pytest
import torch
from right_arguments import keys, packed, packed_kv, star, two_levels, zeros
from running_on import INTERPRETED

import hydragen
from hydragen import PrefixTree


def levels_with(level: int, k: Any, v: Any) -> dict[str, Any]:
    kv = two_levels()["kv"]
    kv[level] = (k, v)
    return two_levels(kv=kv)


def meta(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, device="meta")


# What is wrong: arguments, error, how the message begins, what it says was given, and what to do.
Case = tuple[str, dict[str, Any], type[Exception], str, str, str]
CASES: list[Case] = [
    # kinds
    ("q-not-a-tensor", two_levels(q=np.zeros(3)), TypeError, "q must be a torch.Tensor", "got numpy.ndarray", "as_tensor"),
    ("q-none", two_levels(q=None), TypeError, "q must be a torch.Tensor", "got None", "torch.as_tensor"),
    ("k-not-a-tensor", levels_with(1, [1.0], keys()), TypeError, "kv[1] k must be a torch.Tensor", "got list", "as_tensor"),
    ("kv-none", two_levels(kv=None), TypeError, "kv must be a list of levels", "got None", "[(prefix_k, prefix_v)"),
    ("kv-tensor", two_levels(kv=keys()), TypeError, "kv must be a list of levels", "got torch.Tensor", "[(prefix_k,"),
    ("kv-string", two_levels(kv="kv"), TypeError, "kv must be a list of levels", "got str", "[(prefix_k,"),
    ("kv-one-pair", two_levels(kv=(keys(), keys())), TypeError, "kv[0] must be a pair", "got torch.Tensor", "[(k, v), ...]"),
    ("kv-triple", two_levels(kv=[(1, 2, 3)]), TypeError, "kv[0] must be a pair", "got tuple of 3", "[(k, v), ...]"),
    ("kv-empty", two_levels(kv=[]), ValueError, "kv must have at least one level", "got an empty list", "length 0"),
    ("tree-parents", two_levels(tree=[-1, 0]), TypeError, "tree must be a hydragen.PrefixTree", "got list", "from_parents"),
    ("causal-int", two_levels(causal=1), TypeError, "causal must be True or False", "got 1 of type int", "bool()"),
    ("return-lse-none", two_levels(return_lse=None), TypeError, "return_lse must be True or False", "got None", "bool()"),
    ("invariant-string", two_levels(batch_invariant="no"), TypeError, "batch_invariant must be True", "got 'no'", "bool()"),
    ("validate-numpy", two_levels(validate=np.True_), TypeError, "validate must be True", "numpy.bool", "bool()"),
    # dtypes
    ("q-integer", two_levels(q=torch.ones(4, 1, 4, 8).int()), TypeError, "q must have one of the dtypes", "torch.int32", ".to("),
    ("k-integer", levels_with(0, keys(1, 5).long(), keys(1, 5)), TypeError, "kv[0] k must have one of", "torch.int64", ".to("),
    ("v-complex", levels_with(0, keys(1, 5), keys(1, 5) + 0j), TypeError, "kv[0] v must have one of", "torch.complex64", ".to("),
    ("q-bool", two_levels(q=keys() > 0), TypeError, "q must have one of the dtypes", "got torch.bool", ".to(dtype)"),
    ("q-float8", two_levels(q=keys().to(torch.float8_e4m3fn)), TypeError, "q must have one of", "float8_e4m3fn", ".to(dtype)"),
    ("k-half", levels_with(1, keys().half(), keys()), TypeError, "kv[1] k must have the dtype of q, torch.float32", "got torch.float16", ".to(dtype)"),
    ("v-half", levels_with(1, keys(), keys().half()), TypeError, "kv[1] v must have the dtype of q, torch.float32", "got torch.float16", ".to(dtype)"),
    ("packed-half", packed(kv=packed_kv(v=zeros(17, 2, 8).bfloat16())), TypeError, "kv.v must have the dtype of q", "got torch.bfloat16", ".to(dtype)"),
    ("sinks-integer", two_levels(sinks=torch.ones(4).int()), TypeError, "sinks must have one of the dtypes", "torch.int32", ".to("),
    # layouts and devices
    ("q-sparse", two_levels(q=zeros(4, 2, 4, 8).to_sparse()), TypeError, "q must be a dense tensor", "torch.sparse_coo", ".to_dense()"),
    ("q-nested", two_levels(q=torch.nested.nested_tensor([zeros(2, 4, 8)] * 4, layout=torch.jagged)), TypeError, "q must be a dense tensor", "got a nested one", "cu_seqlens_q"),
    ("q-meta", two_levels(q=meta(4, 2, 4, 8)), ValueError, "q must hold data", "got a meta tensor", "device"),
    ("k-meta", levels_with(0, meta(1, 5, 2, 8), keys(1, 5)), ValueError, "kv[0] k must hold data", "got a meta tensor", "device"),
    ("sinks-meta", two_levels(sinks=meta(4)), ValueError, "sinks must hold data", "got a meta tensor", "device"),
    ("lens-third-device", two_levels(kv_lens=[None, torch.ones(4, device="meta").int()]), ValueError, "kv_lens[1] must be on the host or on the device of q, cpu", "got meta", ".to(device)"),
    ("lens-third-device-packed", packed(kv_lens=torch.ones(5, device="meta").int()), ValueError, "kv_lens must be on the host or on the device of q, cpu", "got meta", ".to(device)"),
    ("cu-q-third-device", packed(cu_seqlens_q=torch.ones(5, device="meta").int(), max_seqlen_q=4), ValueError, "cu_seqlens_q must be on the host or on the device of q, cpu", "got meta", ".to(device)"),
    ("cu-k-device", packed(kv=packed_kv(cu_seqlens_k=torch.ones(6, device="meta").int())), ValueError, "kv.cu_seqlens_k must be on the host", "got device meta", ".cpu()"),
    # shapes
    ("q-3d", two_levels(q=zeros(4, 4, 8)), ValueError, "q must have shape [batch, q_len, num_q_heads, head_dim]", "got [4, 4, 8]", "cu_seqlens_q"),
    ("q-4d-packed", packed(q=zeros(7, 1, 4, 8)), ValueError, "q must have shape [total_q, num_q_heads, head_dim]", "got [7, 1, 4, 8]", "leave cu_seqlens_q out"),
    ("q-no-queries", two_levels(q=zeros(4, 0, 4, 8)), ValueError, "q must have at least one query per row", "[4, 0, 4, 8]", "cu_seqlens_q"),
    ("k-3d", levels_with(1, zeros(4, 2, 8), keys()), ValueError, "kv[1] must hold k [nodes, len,", "got [4, 2, 8] and [4, 3, 2, 8]", "hydragen.PackedKV"),
    ("lens-of-k-and-v", levels_with(1, keys(), keys(length=4)), ValueError, "kv[1] must have k and v with the same nodes, len", "[4, 3, 2, 8] and [4, 4, 2, 8]", "only the last size"),
    ("nodes-of-k-and-v", levels_with(1, keys(), keys(2)), ValueError, "kv[1] must have k and v with the same nodes, len", "[4, 3, 2, 8] and [2, 3, 2, 8]", "only the last size"),
    ("heads-of-levels", levels_with(1, keys(heads=4), keys(heads=4)), ValueError, "kv[1] k must have the heads of kv[0] k, 2 of 8", "got 4 of 8", "same heads"),
    ("v-dims-of-levels", levels_with(1, keys(), keys(dim=6)), ValueError, "kv[1] v must have the heads of kv[0] v, 2 of 8", "got 2 of 6", "same heads"),
    ("packed-4d", packed(kv=packed_kv(k=keys())), ValueError, "kv.k must be [total_k, num_kv_heads, head_dim]", "got [4, 3, 2, 8]", "list of levels"),
    ("packed-v-tokens", packed(kv=packed_kv(v=zeros(16, 2, 8))), ValueError, "kv.k and kv.v must have the same total_k", "[17, 2, 8] and [16, 2, 8]", "only the last size"),
    ("sinks-per-kv-head", two_levels(sinks=zeros(2)), ValueError, "sinks must have shape [num_q_heads] = [4]", "got [2]", "one logit per head"),
    # heads
    ("head-dims", two_levels(q=zeros(4, 2, 4, 16)), ValueError, "kv must have keys with the head_dim of q, 16", "got 8", "must agree"),
    ("heads-do-not-divide", two_levels(q=zeros(4, 2, 3, 8)), ValueError, "q must have a positive multiple of kv's num_kv_heads", "got 3 query heads for 2 KV heads", "transpose(1, 2)"),
    ("fewer-q-heads", two_levels(q=zeros(4, 2, 1, 8)), ValueError, "q must have a positive multiple", "got 1 query heads for 2 KV heads", "transpose(1, 2)"),
    ("no-q-heads", two_levels(q=zeros(4, 2, 0, 8)), ValueError, "q must have a positive multiple", "got 0 query heads for 2", "transpose(1, 2)"),
    ("no-kv-heads", two_levels(kv=[(keys(4, heads=0), keys(4, heads=0))]), ValueError, "q must have a positive multiple", "got 4 query heads for 0", "transpose(1, 2)"),
    ("head-dim-257", two_levels(q=zeros(4, 2, 4, 257), kv=[(keys(dim=257), keys())]), ValueError, "q must have head_dim from 1 to 256", "got 257", "not supported"),
    ("head-dim-0", two_levels(q=zeros(4, 2, 4, 0), kv=[(keys(dim=0), keys())]), ValueError, "q must have head_dim from 1 to 256", "got 0", "not supported"),
    ("head-dim-v-257", two_levels(kv=[(keys(), keys(dim=257))]), ValueError, "kv must have head_dim_v from 1 to 256", "got 257", "not supported"),
    ("head-dim-v-0", two_levels(kv=[(keys(), keys(dim=0))]), ValueError, "kv must have head_dim_v from 1 to 256", "got 0", "not supported"),
    # kv_lens
    ("lens-negative", two_levels(kv_lens=[None, [3, 2, -1, 0]]), ValueError, "kv_lens[1] must not be negative", "got -1 at index 2", "length 0"),
    ("lens-too-long", two_levels(kv_lens=[[6], None]), ValueError, "kv_lens[0] must not exceed the tokens that kv holds", "got 6 at index 0 where kv has 5", "shorten"),
    ("lens-too-long-packed", packed(kv_lens=[5, 3, 3, 4, 3]), ValueError, "kv_lens must not exceed the tokens that kv holds", "got 4 at index 3 where kv has 3", "shorten"),
    ("lens-negative-packed", packed(kv_lens=torch.tensor([5, 3, 3, 3, -2])), ValueError, "kv_lens must not be negative", "got -2 at index 4", "length 0"),
    ("lens-of-the-tree", two_levels(tree=star(kv_lens=[5, 3, 3, 9, 3])), ValueError, "tree.kv_lens must not exceed", "got 9 at index 3 where kv has 3", "shorten"),
    ("lens-too-few", two_levels(kv_lens=[None, [3, 3]]), ValueError, "kv_lens[1] must have one length per node, 4", "got 2", "empty nodes count"),
    ("lens-levels", two_levels(kv_lens=[[3, 3, 3, 3]]), ValueError, "kv_lens must be a list with one entry per level of kv, 2", "got 1 entries", "[None, suffix_lens]"),
    ("lens-vector-for-levels", two_levels(kv_lens=torch.ones(4).int()), TypeError, "kv_lens must be a list with one entry per level of kv, 2", "got Tensor", "[None, suffix_lens]"),
    ("lens-string", two_levels(kv_lens="ab"), TypeError, "kv_lens must be a list with one entry per level", "got str", "[None, suffix_lens]"),
    ("lens-scalar", two_levels(kv_lens=[None, 3]), ValueError, "kv_lens[1] must be 1-D", "got shape ()", "one integer per entry"),
    ("lens-float", two_levels(kv_lens=[None, [1.0, 2.0, 3.0, 3.0]]), TypeError, "kv_lens[1] must hold integers", "got dtype float64", ".astype(numpy.int64)"),
    ("lens-bool", packed(kv_lens=[True] * 5), TypeError, "kv_lens must hold integers", "got dtype bool", ".astype(numpy.int64)"),
    ("lens-2d", packed(kv_lens=[[5, 3, 3, 3, 3]]), ValueError, "kv_lens must be 1-D", "got shape (1, 5)", "one integer per entry"),
    # trees
    ("tree-rows", two_levels(tree=PrefixTree.from_parents([-1, 0, 0, 0, 0], row_to_node=[1, 2])), ValueError, "tree must end one row per sequence of q, 4", "got a tree of 2 rows", "row_to_node"),
    ("tree-levels", two_levels(tree=PrefixTree.from_parents([-1, -1, 0, 0], row_to_node=[2, 3, 2, 3])), ValueError, "kv must have one level per depth of the tree, with one entry per node of that depth, [2, 2]", "got levels of [1, 4] nodes", "by their index"),
    ("tree-too-deep", two_levels(tree=PrefixTree.from_parents([-1, 0, 0, 0, 0, 1], row_to_node=[5, 2, 3, 4])), ValueError, "kv must have one level per depth of the tree, with one entry per node of that depth, [1, 4, 1]", "got levels of [1, 4]", "by their index"),
    ("level-without-nodes-in-the-tree", two_levels(tree=PrefixTree.from_parents([-1], row_to_node=[0] * 4)), ValueError, "kv must have one level per depth of the tree", "got levels of [1, 4]", "by their index"),
    ("groups-uneven", two_levels(kv=[(keys(3), keys(3)), (keys(), keys())]), ValueError, "kv must have levels whose numbers of nodes divide one another", "got 3 nodes in kv[0] for 4 in kv[1]", "pass tree="),
    ("batch-uneven", two_levels(kv=[(keys(3), keys(3))]), ValueError, "kv must have levels whose numbers of nodes divide", "got 3 nodes in kv[0] for 4 rows of q", "pass tree="),
    ("batch-without-nodes", two_levels(kv=[(keys(0), keys(0))]), ValueError, "kv must have levels whose numbers of nodes divide", "got 0 nodes in kv[0] for 4 rows of q", "pass tree="),
    ("packed-without-tree", packed(tree=None), ValueError, "tree must be given unless every row has a node of its own", "got 5 nodes", "from_parents"),
    ("packed-tree-nodes", packed(tree=star(5, None)), ValueError, "kv.cu_seqlens_k must have one offset per node of the tree and the end, 6 + 1", "got 6", "empty nodes count"),
    # offsets
    ("cu-q-begin", packed(cu_seqlens_q=[1, 1, 3, 3, 7]), ValueError, "cu_seqlens_q must begin with 0", "got [1, 1, 3, 3]", "offset of each entry"),
    ("cu-q-falls", packed(cu_seqlens_q=[0, 3, 1, 3, 7]), ValueError, "cu_seqlens_q must not decrease", "got 3 then 1 at index 2", "cumulative"),
    ("cu-q-end", packed(cu_seqlens_q=np.array([0, 1, 3, 3, 8])), ValueError, "cu_seqlens_q must end with the number of tokens in q, 7", "got 8", "correct the offsets"),
    ("cu-q-empty", packed(cu_seqlens_q=[]), ValueError, "cu_seqlens_q must begin with 0", "got []", "offset of each entry"),
    ("cu-k-end", packed(kv=packed_kv(cu_seqlens_k=(0, 5, 8, 11, 14, 16))), ValueError, "kv.cu_seqlens_k must end with the number of tokens in kv.k, 17", "got 16", "correct the offsets"),
    ("cu-k-float", packed(kv=packed_kv(cu_seqlens_k=np.linspace(0, 17, 6))), TypeError, "kv.cu_seqlens_k must hold integers", "got dtype float64", ".astype"),
    ("max-q-alone", two_levels(max_seqlen_q=2), ValueError, "max_seqlen_q must come with cu_seqlens_q", "got 2", "leave it out"),
    ("max-q-too-small", packed(max_seqlen_q=3), ValueError, "max_seqlen_q must be at least the query tokens of the longest row, 4", "got 3", "raise it"),
    ("max-q-float", packed(max_seqlen_q=4.0), TypeError, "max_seqlen_q must be an integer", "got 4.0 of type float", "longest row"),
    ("max-q-negative", packed(max_seqlen_q=-1), ValueError, "max_seqlen_q must be an integer of at least 0", "got -1", "longest row"),
    # options
    ("scale-nan", two_levels(scale=float("nan")), ValueError, "scale must be a finite number or None", "got nan", "head_dim ** -0.5"),
    ("scale-inf", two_levels(scale=np.float32("inf")), ValueError, "scale must be a finite number or None", "inf", "head_dim ** -0.5"),
    ("scale-beyond-float", two_levels(scale=10**400), ValueError, "scale must be a finite number or None", "got 1000", "head_dim ** -0.5"),
    ("scale-beyond-float32", two_levels(scale=1e39), ValueError, "scale must be at most 1.7e+38 in magnitude", "got 1e+39", "head_dim ** -0.5"),
    ("scale-tensor", two_levels(scale=torch.tensor(0.5)), TypeError, "scale must be a finite number", "torch.Tensor", "head_dim ** -0.5"),
    ("scale-bool", two_levels(scale=True), TypeError, "scale must be a finite number", "got True of type bool", "head_dim ** -0.5"),
    ("scale-decimal", two_levels(scale=decimal.Decimal(1)), TypeError, "scale must be a finite number", "decimal.Decimal", "head_dim ** -0.5"),
    ("scale-string", two_levels(scale="1"), TypeError, "scale must be a finite number", "got '1' of type str", "head_dim ** -0.5"),
    ("window-0", two_levels(window=0), ValueError, "window must be None or an integer of at least 1", "got 0", "W - 1 before it"),
    ("window-negative", two_levels(window=np.int64(-3)), ValueError, "window must be None or an integer of at least 1", "got -3", "W - 1 before it"),
    ("window-float", two_levels(window=4.0), TypeError, "window must be None or an integer", "got 4.0 of type float", "W - 1 before it"),
    ("window-pair", two_levels(window=(4, 0)), TypeError, "window must be None or an integer", "got (4, 0) of type tuple", "W - 1"),
    ("window-bool", two_levels(window=True), TypeError, "window must be None or an integer", "got True of type bool", "W - 1"),
    ("softcap-0", two_levels(softcap=0.0), ValueError, "softcap must be a positive finite number", "got 0.0", "None means no cap"),
    ("softcap-negative", two_levels(softcap=-2), ValueError, "softcap must be a positive finite number", "got -2.0", "None means no cap"),
    ("softcap-nan", two_levels(softcap=float("nan")), ValueError, "softcap must be a positive finite number", "got nan", "None means no cap"),
    ("softcap-too-small", two_levels(softcap=1e-39), ValueError, "softcap must be such that softcap and scale / softcap", "got softcap=1e-39", "None means no cap"),
    ("softcap-against-scale", two_levels(softcap=1e-20, scale=1e20), ValueError, "softcap must be such that", "scale=1e+20", "None means no cap"),
    ("backend-unknown", two_levels(backend="cuda"), ValueError, "backend must be one of 'auto', 'reference', 'triton'", "got 'cuda'", "choose one"),
    ("backend-none", two_levels(backend=None), ValueError, "backend must be one of 'auto', 'reference', 'triton'", "got None", "choose one"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_wrong_argument(case: Case) -> None:
    _, arguments, error, expectation, given, remedy = case
    with pytest.raises(error) as raised:
        hydragen.attention(**arguments)
    message = str(raised.value)
    assert message.startswith(expectation)
    said, separator, advice = message.rpartition("; ")
    assert separator, f"no remedy in: {message}"
    assert given in said
    assert remedy in advice


def test_the_arguments_that_cases_change_are_right() -> None:
    assert hydragen.attention(**two_levels()).shape == (4, 2, 4, 8)
    assert hydragen.attention(**packed()).shape == (7, 4, 8)


@pytest.mark.parametrize(
    "parents", [[-1, 2, 1], [-1, 1, 0], [1, -1], [-1, 5]], ids=["cycle", "self", "forward", "outside"]
)
def test_cycles_and_forward_references_in_parents(parents: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^parents.*got.*;"):
        PrefixTree.from_parents(parents)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter makes Triton run on a CPU")
def test_triton_on_a_cpu_says_how_to_get_it() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"needs CUDA tensors, got q on cpu.*TRITON_INTERPRET=1") as raised:
        hydragen.attention(**two_levels(backend="triton"))
    assert "reference" in str(raised.value)


@pytest.mark.triton
def test_triton_refuses_float64_by_name(device: torch.device) -> None:
    q, k = (
        zeros(2, 1, 2, 8, dtype=torch.float64).to(device),
        zeros(1, 3, 2, 8, dtype=torch.float64).to(device),
    )
    with pytest.raises(TypeError, match=r"torch.float64.*reference"):
        hydragen.attention(q, [(k, k)], backend="triton")


def test_offsets_whose_difference_passes_int64() -> None:
    offsets = [0, 2**63 - 1, -2, 5]
    with pytest.raises(ValueError, match=r"cu_seqlens_q must not decrease, got 9223372036854775807 then -2"):
        hydragen.attention(**packed(cu_seqlens_q=offsets))
    with pytest.raises(ValueError, match=r"kv\.cu_seqlens_k must not decrease"):
        hydragen.attention(**packed(kv=packed_kv(cu_seqlens_k=[0, 2**63 - 1, -2, 5, 5, 17])))


def test_more_than_32_bits_can_count_is_refused() -> None:
    """Views of one element: their memory is small, their places are not."""
    q, one = zeros(1, 1, 4, 8), zeros(1, 2, 8)
    for size, offsets, message in (
        (2**29 + 1, [0, 2**29 + 1], "kv must have room for at most 536870912 tokens on a path from a root"),
        (2**31, [0, 4, 2**31], "kv must hold fewer than 2147418112 tokens or nodes in one tensor"),
    ):
        k = one.expand(size, 2, 8)
        tree = PrefixTree.from_parents([-1] * (len(offsets) - 1), row_to_node=[0])
        with pytest.raises(ValueError, match=message):
            hydragen.attention(q, hydragen.PackedKV(k, k, offsets), tree=tree)
    # one token fewer than is refused, over several trees
    size = 2**31 - 2**16
    offsets = [0, 4, *(4 + i * (size // 8) for i in range(1, 8)), size - 1]
    k, more = one.expand(size - 1, 2, 8), one.expand(size, 2, 8)
    tree = PrefixTree.from_parents([-1] * 9, row_to_node=[0])
    out = hydragen.attention(q, hydragen.PackedKV(k, k, offsets), tree=tree, backend="reference")
    torch.testing.assert_close(out, hydragen.attention(q, [(k[None, :4], k[None, :4])], backend="reference"))
    with pytest.raises(ValueError, match="kv must hold fewer than 2147418112 tokens"):
        hydragen.attention(q, hydragen.PackedKV(more, more, [*offsets[:-1], size]), tree=tree)
    longest = one.expand(2**29, 2, 8)
    plan = hydragen.plan(
        PrefixTree.from_parents([-1]), hydragen.PackedKV(longest, longest, [0, 2**29]), num_q_heads=4
    )
    assert plan.tree.num_rows == 1
