"""Long sequences of updates, trees, appends, runs and nonsense: right ones are exact, wrong ones do nothing.

Every right run equals the dense oracle; every wrong call raises a ValueError or TypeError that names the
argument, and leaves the plan as it was.
"""

import re
from typing import Any

import nonsense
import nonsense_options
import numpy as np
import pytest
import torch
from plan_model import DIM, DIM_V, HEADS, KV_HEADS, Account
from torch import Tensor

import hydragen
from hydragen import AttentionState, PackedKV, PagedKV, PrefixTree

NAMED = re.compile(
    r"(append|backend|causal|cu_seqlens_q|cu_seqlens_k|k|kv|kv_lens|out_dtype|page_indices|q|return_lse|scale|sinks|"
    r"softcap|tree|v|validate|window)\b"
)
WITHIN = {"rtol": 2e-4, "atol": 2e-5}


def run(account: Account, q: Tensor, options: dict[str, Any]) -> AttentionState:
    kv = account.kv if account.rng.integers(2) else account.layer
    result = account.plan.run(q, kv, return_lse=True, **options)
    assert isinstance(result, AttentionState)
    return result


def a_right_run(account: Account) -> None:
    q, options = account.draw_q(), account.draw_options()
    result = run(account, q, options)
    out, lse = account.expected(q, options)
    torch.testing.assert_close(result.out.cpu(), out, **WITHIN)
    torch.testing.assert_close(result.lse.cpu(), lse, **WITHIN)


def new_lengths(account: Account) -> None:
    if not account.may_grow:
        return
    account.lens = account.rng.integers(0, account.most + 1)
    account.plan.update(account.new_lens())
    account.write()


def new_tokens(account: Account) -> None:
    """Rows grow by up to q_len tokens, which are appended; nothing else is written."""
    if not account.may_append:
        return
    rng, ends, q_len = account.rng, account.tree.row_to_node, account.q_lens[0]
    room = account.most
    before = account.lens.copy()
    grown = np.minimum(before[ends] + rng.integers(0, q_len + 1, ends.size), room[ends])
    account.lens[ends] = grown
    account.plan.update(account.new_lens())
    new = [
        torch.from_numpy(rng.standard_normal((ends.size, q_len, KV_HEADS, dim), np.float32))
        for dim in (DIM, DIM_V)
    ]
    for content, tokens in zip(account.content, new, strict=True):
        for row, end in enumerate(ends):
            count = int(grown[row] - before[end])
            content[end, before[end] : grown[row]] = tokens[row, :count]
    kv = account.layer if rng.integers(2) else account.kv
    for _ in range(int(rng.integers(1, 3))):
        account.plan.append(kv, *(tokens.to(account.device) for tokens in new))
    for which in (0, 1):
        pairs = [account.layer] if isinstance(account.layer, tuple) else account.layer
        for pair, right in zip(pairs, account.tensors(which), strict=True):
            torch.testing.assert_close(pair[which], right, rtol=0, atol=0, equal_nan=True)


def new_pages(account: Account) -> None:
    if account.layout != "paged":
        return
    account.pages = account.rng.permutation(account.num_pages)[: account.indptr[-1]]
    given: Any = account.pages
    if account.rng.integers(2):
        given = torch.from_numpy(given.astype(np.int32)).to(account.device)
    account.plan.update(page_indices=given)
    account.write()


def new_tree(account: Account) -> None:
    """Another tree and layout; without the room for it, nothing changes."""
    if account.reserve == 1:
        return
    names = ("tree", "room", "lens", "content", "kv", "layer", "pages", "indptr", "most")
    before = {name: getattr(account, name) for name in names if hasattr(account, name)}
    q, options = account.draw_q(), account.draw_options()
    found = run(account, q, options)
    account.draw_nodes(account.draw_tree(account.tree))
    try:
        lens = account.planned_lens()
        account.plan.update(lens, tree=account.tree, kv=account.kv, validate=bool(account.rng.integers(2)))
    except ValueError as error:
        assert re.match(r"(tree|kv) must fit the plan's", str(error)), error
        for name, value in before.items():
            setattr(account, name, value)
        unchanged(account, q, options, found)


def unchanged(account: Account, q: Tensor, options: dict[str, Any], found: AttentionState) -> None:
    assert account.plan.tree == account.tree
    for old, new in zip(found, run(account, q, options), strict=True):
        assert torch.equal(old, new)


def wrong_run(account: Account) -> tuple[str, Any]:
    rng = account.rng
    q, kv, options = account.draw_q(), account.layer, account.draw_options()
    which = int(rng.integers(4))
    if which == 0:
        q, _ = nonsense.a_tensor(rng, q)
    elif which == 1:
        kv = wrong_kv(account)
    elif which == 2:
        name = ["scale", "window", "softcap", "causal", "out_dtype"][rng.integers(5)]
        drawer = nonsense_options.flag if name == "causal" else getattr(nonsense_options, name)
        options[name], _ = drawer(rng)
    else:
        options["sinks"], _ = nonsense.a_tensor(rng, torch.zeros(HEADS))
    return "run", lambda: account.plan.run(q, kv, **options)


def wrong_kv(account: Account) -> Any:
    """Keys and values that are not those of the plan, or not in its form."""
    rng, right = account.rng, account.layer
    kind = int(rng.integers(5))
    if kind == 0:
        return nonsense.anything(rng)
    if kind == 1:
        return [account.layer, [account.layer], (account.layer, account.layer), 3, None, [], ()][rng.integers(7)]
    if kind == 2:
        zeros = torch.zeros(9, KV_HEADS, DIM)
        return [
            PackedKV(zeros, zeros, [0, 9]), PagedKV(zeros[None], zeros[None], [0, 1], [0]),
            PagedKV(None, 3, None, None), PackedKV(None, None, "x"), [PackedKV(zeros, zeros, [0, 9])],
        ][rng.integers(5)]  # fmt: skip
    pairs = [right] if isinstance(right, tuple) else list(right)
    at, side = int(rng.integers(len(pairs))), int(rng.integers(2))
    pair = list(pairs[at])
    pair[side], _ = nonsense.a_tensor(rng, pair[side])
    pairs[at] = tuple(pair)
    return pairs[0] if isinstance(right, tuple) else pairs


def wrong_append(account: Account) -> tuple[str, Any]:
    rng = account.rng
    shape = (account.num_rows, account.q_lens[0], KV_HEADS)
    arguments: list[Any] = [account.layer, torch.zeros(*shape, DIM), torch.zeros(*shape, DIM_V)]
    at = int(rng.integers(3))
    arguments[at] = wrong_kv(account) if at == 0 else nonsense.a_tensor(rng, arguments[at])[0]
    if at and isinstance(arguments[at], Tensor) and arguments[at].shape == (*shape, (DIM, DIM_V)[at - 1]):
        return "nothing", lambda: None
    return "append", lambda: account.plan.append(*arguments)


def wrong_update(account: Account) -> tuple[str, Any]:
    rng = account.rng
    names = ["kv_lens", "tree", "kv", "page_indices", "cu_seqlens_q", "validate"]
    chosen = {names[i] for i in rng.integers(len(names), size=rng.choice([1, 1, 2, 3]))}
    given: dict[str, Any] = {}
    right_lens = account.lens.tolist()
    for name in sorted(chosen):
        if name == "kv_lens":
            if "levels" in account.layout:
                given[name] = account.new_lens()
                level = int(rng.integers(account.num_levels))
                lens = account.lens[account.level_nodes(level)].tolist()
                given[name][level] = nonsense.integers(rng, lens)[0]
                if rng.integers(6) == 0:
                    given[name] = nonsense.lengths_by_level(rng)[0]
            else:
                given[name] = nonsense.integers(rng, right_lens)[0]
        elif name == "tree":
            given[name] = nonsense.tree(rng)[0]
        elif name == "kv":
            given[name] = wrong_kv(account)
        elif name == "page_indices":
            table = account.pages.tolist() if account.layout == "paged" else [0, 1]
            given[name] = nonsense.integers(rng, table)[0]
        elif name == "cu_seqlens_q":
            given[name] = nonsense.integers(rng, account.offsets)[0]
        else:
            given[name] = nonsense_options.flag(rng)[0]
    if account.device.type == "cuda":  # where nobody looks
        given = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
    return f"update {', '.join(given)}", lambda: account.plan.update(**given)


def nonsense_step(account: Account) -> bool:
    """Returns whether something was refused. What is taken for right must be so: the plan is made anew."""
    q, options = account.draw_q(), account.draw_options()
    before = run(account, q, options)
    held = [x.clone() for pair in pairs_of(account) for x in pair]
    what, call = [wrong_run, wrong_append, wrong_update][account.rng.integers(3)](account)
    try:
        call()
    except (ValueError, TypeError) as error:
        assert NAMED.match(str(error)), f"{what}: {type(error).__name__} {error}"
        refused = True
    else:
        refused = False
        if what.startswith("update"):  # by chance it was right: tell it what it should know
            account.restore()
    for x, y in zip(held, [x for pair in pairs_of(account) for x in pair], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=what)
    if refused:
        unchanged(account, q, options, before)
    else:
        a_right_run(account)
    return refused


def pairs_of(account: Account) -> list[Any]:
    return [account.layer] if isinstance(account.layer, tuple) else list(account.layer)


STEPS_OF = [a_right_run, new_lengths, new_tokens, new_pages, new_tree]


def fuzz(seed: int, plans: int, steps: int, backend: str, device: torch.device) -> tuple[int, int]:
    rng = np.random.default_rng(seed)
    right = refused = 0
    for number in range(plans):
        account = Account(rng, device, backend)
        trace = [f"{account.layout}, reserve {account.reserve}, {'growing' if account.growing else 'fixed'}"]
        try:
            for _ in range(steps):
                if rng.integers(3) == 0:
                    trace.append("nonsense")
                    refused += nonsense_step(account)
                else:
                    step = STEPS_OF[rng.integers(len(STEPS_OF))]
                    trace.append(step.__name__)
                    step(account)
                    a_right_run(account)
                    right += 1
        except Exception as error:
            error.add_note(f"seed {seed}, plan {number}: {'; '.join(trace)}")
            raise
    return right, refused


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_plan_follows_its_account(backend: str, device: torch.device) -> None:
    plans = 24 if backend == "triton" and device.type == "cpu" else 300
    right, refused = fuzz(0, plans, 12, backend, device)
    assert right > 3 * plans
    assert refused > plans
