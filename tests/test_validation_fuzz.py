"""Nonsense of every kind gives a ValueError or TypeError that names the argument, and nothing else.

12,000 calls of hydragen.attention with up to three arguments replaced (`nonsense.py`), each within two
seconds. What happens to be right must give finite numbers of the right shape.
"""

import math
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nonsense
import nonsense_options
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedParameter

import hydragen
from hydragen import PackedKV, PagedKV

CASES, SEEDS = 1_500, range(8)
ARGUMENTS = (
    "q", "kv", "tree", "kv_lens", "cu_seqlens_q", "max_seqlen_q", "scale", "causal", "window", "softcap",
    "sinks", "return_lse", "out_dtype", "backend", "batch_invariant", "validate",
)  # fmt: skip
NAMED = re.compile(rf"({'|'.join(sorted(ARGUMENTS, key=len, reverse=True))})\b")


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End a call that hangs."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def shown(value: Any) -> str:
    """Something to build the value again from."""
    if isinstance(value, torch.Tensor) and (value.layout is not torch.strided or value.is_nested):
        return f"{value.layout} tensor"
    if isinstance(value, (UninitializedParameter, FakeTensor)):
        return type(value).__name__
    if isinstance(value, torch.Tensor) and value.numel() > 9:
        first = "" if value.is_meta or not value.is_floating_point() else f" of {value.flatten()[0]}"
        return f"{value.dtype} {list(value.shape)} strides {value.stride()} on {value.device}{first}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, PagedKV):
        fields = (value.k_cache, value.v_cache, value.page_indptr, value.page_indices)
        return f"PagedKV({', '.join(map(shown, fields))})"
    if isinstance(value, PackedKV):
        return f"PackedKV({shown(value.k)}, {shown(value.v)}, {shown(value.cu_seqlens_k)})"
    return repr(value)


def verdict(arguments: dict[str, Any], replaced: dict[str, bool]) -> str:
    """What is wrong with how a call answers; empty if nothing."""
    try:
        with at_most(2), torch.no_grad():
            result = hydragen.attention(**arguments)
    except (ValueError, TypeError) as error:
        text = str(error)
        if not NAMED.match(text):
            return f"the message does not begin with an argument: {text}"
        if not any(re.search(rf"\b{name}\b", text) for name in replaced):
            return f"the message names none of what is wrong: {text}"
        return ""
    except BaseException as error:  # noqa: BLE001 - that it is of another kind is what is looked for
        return f"{type(error).__name__}: {str(error)[:200]}"
    if any(replaced.values()):
        return "taken for right"
    out = result.out if isinstance(result, hydragen.AttentionState) else result
    q = arguments["q"]
    if out.shape[:-1] != q.shape[:-1] or out.dtype != (arguments.get("out_dtype") or q.dtype):
        return f"out is {out.dtype} {list(out.shape)}"
    kv = arguments["kv"]
    if isinstance(kv, PackedKV):
        tensors = [q, kv.k, kv.v]
    elif isinstance(kv, PagedKV):
        tensors = [q, kv.k_cache, kv.v_cache]
    else:
        tensors = [q, *(x for level in kv for x in level)]
    if arguments.get("sinks") is not None:
        tensors.append(arguments["sinks"])
    if all(bool(x.isfinite().all()) for x in tensors) and not bool(out.isfinite().all()):
        return "out is not finite"
    return ""


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("seed", SEEDS)
def test_nonsense_is_refused_by_name(seed: int) -> None:
    rng = np.random.default_rng(seed)
    failures: dict[str, str] = {}
    refused = 0
    for _ in range(CASES):
        arguments, replaced = nonsense.call(rng)
        found = verdict(arguments, replaced)
        refused += any(replaced.values())
        if found:
            what = ", ".join(f"{name}={shown(arguments[name])}" for name in replaced)
            form = "packed()" if isinstance(arguments.get("tree"), hydragen.PrefixTree) else "two_levels()"
            failures.setdefault(re.sub(r"[\d.]+", "#", found), f"{form} with {what}\n    {found}")
    assert refused > CASES / 2, "hardly any nonsense: this tests nothing"
    assert not failures, f"{len(failures)} kinds of failure\n" + "\n".join(failures.values())


def test_the_fuzzing_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of another kind, one that names nothing, nonsense that is accepted, a hang."""
    right, _ = nonsense.call(np.random.default_rng(0))
    out = torch.zeros(1)

    def raising(error: BaseException) -> Any:
        def attention(**_: Any) -> Any:
            raise error

        return attention

    for attention, found in (
        (raising(RuntimeError("CUDA error")), "RuntimeError"),
        (raising(ValueError("bad value")), "does not begin with an argument"),
        (raising(ValueError("scale must be finite")), "names none of what is wrong"),
        (lambda **_: out, "taken for right"),
        (lambda **_: [0 for _ in iter(lambda: math.nan, 0)], "TimeoutError"),
    ):
        monkeypatch.setattr(hydragen, "attention", attention)
        assert found in verdict(right, {"window": True})


def structures(rng: np.random.Generator) -> tuple[str, Any, dict[str, Any], list[str]]:
    """A call of another public function with one argument replaced: name, function, arguments, which one."""
    lens, _ = nonsense.integers(rng, [5, 2, 3])
    kind = int(rng.integers(8))
    if kind == 6:
        counts, _ = nonsense.integers(rng, [1, 2])
        return "fork", TREE.fork, {"counts": counts}, ["counts"]
    if kind == 7:
        name = ["num_q_heads", "q_len", "max_seqlen_q", "total_q", "reserve"][rng.integers(5)]
        return "plan", plan, {name: ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))]}, [name]
    if kind == 0:
        name = ["parents", "kv_lens", "row_to_node"][rng.integers(3)]
        right = {"parents": [-1, 0, 0], "kv_lens": [5, 2, 3], "row_to_node": [1, 2]}
        return "from_parents", hydragen.PrefixTree.from_parents, {**right, name: lens}, [name]
    if kind == 1:
        name = ["kv_lens", "parents", "row_to_node"][rng.integers(3)]
        value = [[5], lens, [1]][: int(rng.integers(2, 4))] if rng.integers(4) else nonsense.anything(rng)
        right = {"kv_lens": [[5], [2, 3]], "parents": [None, [0, 0]], "row_to_node": [1, 2]}
        return "from_levels", hydragen.PrefixTree.from_levels, {**right, name: value}, [name]
    if kind == 2:
        value = [[1, 2, 3], lens, [1, 2]] if rng.integers(4) else nonsense.anything(rng)
        return "from_token_ids", hydragen.PrefixTree.from_token_ids, {"sequences": value}, ["sequences"]
    if kind == 3:
        state = [torch.zeros(2, 4, 8), torch.zeros(2, 4)]
        at = int(rng.integers(2))
        state[at], _ = nonsense.a_tensor(rng, state[at])
        states = [hydragen.AttentionState(torch.zeros(2, 4, 8), torch.zeros(2, 4)), tuple(state)]
        value = states if rng.integers(8) else nonsense.anything(rng)
        return "merge_states", hydragen.merge_states, {"states": value}, ["states"]
    right = {
        "tree": TREE,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "dtype": torch.float16,
        "q_len": 1,
        "device": None,
    }
    name = list(right)[rng.integers(7)]
    odd = ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))]
    return "explain", hydragen.explain, {**right, name: odd}, [name]


TREE = hydragen.PrefixTree.from_levels([[100], [3, 4]])
ODD_NUMBERS = [
    0, -1, 2.5, math.nan, "4", None, True, 3, [4], torch.int32, nonsense_options.Odd(), 1j, 2**31 - 1, 2**62,
    10**30, 10**400, nonsense_options.META, torch.tensor(True), np.ma.masked, UninitializedParameter(),
]  # fmt: skip


def plan(**changes: Any) -> hydragen.Plan:
    pair = torch.zeros(107, 2, 8)
    return hydragen.plan(TREE, PackedKV(pair, pair, [0, 100, 103, 107]), **{"num_q_heads": 4, **changes})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("seed", range(2))
def test_nonsense_in_trees_states_and_explain(seed: int) -> None:
    rng = np.random.default_rng(seed)
    failures: dict[str, str] = {}
    for _ in range(CASES):
        function, call, arguments, names = structures(rng)
        found = ""
        try:
            with at_most(2), torch.no_grad():
                call(**arguments)
        except (ValueError, TypeError) as error:
            if not any(re.search(rf"\b{name}\b", str(error)) for name in names):
                found = f"the message names none of what is wrong: {error}"
        except BaseException as error:  # noqa: BLE001 - that it is of another kind is what is looked for
            found = f"{type(error).__name__}: {str(error)[:200]}"
        if found:
            what = ", ".join(f"{name}={shown(arguments[name])}" for name in names)
            failures.setdefault(function + re.sub(r"[\d.]+", "#", found), f"{function}: {what}\n    {found}")
    assert not failures, f"{len(failures)} kinds of failure\n" + "\n".join(failures.values())


def test_explain_refuses_numbers_beyond_int64() -> None:
    with pytest.raises((ValueError, TypeError), match="q_len"):
        hydragen.explain(TREE, num_q_heads=4, num_kv_heads=2, head_dim=8, q_len=10**30)
