"""Long sequences of updates, trees, appends, runs and nonsense: right ones are exact, wrong ones do nothing.

Every right run equals the dense oracle; every wrong call raises a ValueError or TypeError that names the
argument, and leaves the plan as it was.
"""

import contextlib
import re
from typing import Any

import numpy as np
import pytest
import torch
from plan_model import DIM, DIM_V, KV_HEADS, Account
from plan_nonsense import wrong_append, wrong_run, wrong_update
from running_on import INTERPRETED
from torch import Tensor

import hydragen
from hydragen import AttentionState
from hydragen.validation import tables

NAMED = re.compile(
    r"(append|backend|causal|cu_seqlens_q|cu_seqlens_k|k|kv|kv_lens|out_dtype|page_indices|q|return_lse|scale|sinks|"
    r"softcap|tree|v|validate|window)\b"
)
WITHIN = {"rtol": 2e-4, "atol": 2e-5}


def run(account: Account, q: Tensor, options: dict[str, Any]) -> AttentionState:
    by_name = bool(account.rng.integers(2)) and account.named
    result = account.plan.run(q, account.kv if by_name else account.layer, return_lse=True, **options)
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
    kv = account.kv if rng.integers(2) and account.named else account.layer
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
    # numbers on a device are not read back: a run cannot name them by those on the host
    account.named = not tables.on_device(given)


def new_tree(account: Account) -> None:
    """Another tree and layout; without the room for it, nothing changes."""
    if account.reserve == 1:
        return
    names = (
        "tree",
        "room",
        "lens",
        "content",
        "kv",
        "layer",
        "pages",
        "indptr",
        "num_pages",
        "most",
        "named",
    )
    before = {name: getattr(account, name) for name in names if hasattr(account, name)}
    q, options = account.draw_q(), account.draw_options()
    found = run(account, q, options)
    account.draw_nodes(account.draw_tree(account.tree))
    try:
        lens = account.planned_lens()
        account.plan.update(lens, tree=account.tree, kv=account.kv, validate=bool(account.rng.integers(2)))
    except ValueError as error:
        if not re.match(r"(tree|kv) must fit the plan's", str(error)):
            raise
        for name, value in before.items():
            setattr(account, name, value)
        unchanged(account, q, options, found)


def unchanged(account: Account, q: Tensor, options: dict[str, Any], found: AttentionState) -> None:
    assert account.plan.tree == account.tree
    for old, new in zip(found, run(account, q, options), strict=True):
        assert torch.equal(old, new)


def nonsense_step(account: Account) -> bool:
    """Returns whether something was refused. What is taken for right must be so: the plan is made anew."""
    q, options = account.draw_q(), account.draw_options()
    before = run(account, q, options)
    held = [x.clone() for pair in pairs_of(account) for x in pair]
    what, call = [wrong_run, wrong_append, wrong_update][account.rng.integers(3)](account)
    try:
        call()
    except (ValueError, TypeError) as error:
        if not NAMED.match(str(error)):
            raise
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


# Plans and steps of a seed: some thousand steps; where each takes longer, fewer: a second in Triton's
# interpreter, a tenth on a GPU, whose results are read back. A test per seed, so that workers share them.
SEEDS = range(3 if INTERPRETED else 8)
AMOUNTS = {"reference": (50, 12), "interpreter": (1, 8), "gpu": (5, 12)}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # interpreted
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_plan_follows_its_account(seed: int, backend: str, device: torch.device) -> None:
    on_cpu = "reference" if backend == "reference" else "interpreter"
    plans, steps = AMOUNTS["gpu" if device.type == "cuda" else on_cpu]
    right, refused = fuzz(seed, plans, steps, backend, device)
    assert right > plans * steps / 3
    assert refused > plans * steps / 10


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_plan_follows_its_account_of_tables_that_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a run cannot name page numbers on the device by those on the host."""
    monkeypatch.setattr(tables, "on_device", lambda given: isinstance(given, Tensor))
    right, refused = fuzz(0, 50, 12, "reference", torch.device("cpu"))
    assert right > 300
    assert refused > 75


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fuzzing_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that forgets, one that an error changes, one that appends nothing, an error without a name."""
    cpu = torch.device("cpu")
    honest = {name: getattr(hydragen.Plan, name) for name in ("update", "run")}

    def forgets(plan: Any, *given: Any, **named: Any) -> None:
        if "tree" in named:
            honest["update"](plan, *given, **named)

    def changed_by_errors(plan: Any, kv_lens: Any = None, **named: Any) -> None:
        if kv_lens is not None and named:
            with contextlib.suppress(ValueError, TypeError):
                honest["update"](plan, kv_lens)
        honest["update"](plan, kv_lens, **named)

    def nothing(*_: Any) -> None:
        pass

    def nameless(plan: Any, *given: Any, **named: Any) -> Any:
        try:
            return honest["run"](plan, *given, **named)
        except ValueError:
            raise ValueError("bad value") from None

    planted = {"update": [forgets, changed_by_errors], "append": [nothing], "run": [nameless]}
    for name, plants in planted.items():
        for planted_bug in plants:
            with monkeypatch.context() as patch:
                patch.setattr(hydragen.Plan, name, planted_bug)
                with pytest.raises((AssertionError, ValueError)):
                    fuzz(0, 60, 12, "reference", cpu)
