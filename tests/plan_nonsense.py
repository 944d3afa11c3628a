"""Wrong calls of a plan's methods: what is called, and the call."""

from collections.abc import Callable
from typing import Any

import nonsense
import nonsense_options
import torch
from plan_model import DIM, DIM_V, HEADS, KV_HEADS, Account
from torch import Tensor

from hydragen import PackedKV, PagedKV


def wrong_run(account: Account) -> tuple[str, Callable[[], object]]:
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
    rng, right = account.rng, copied(account.layer)
    kind = int(rng.integers(5))
    if kind == 0:
        return nonsense.anything(rng)
    if kind == 1:
        return [right, [right], (right, right), 3, None, [], ()][rng.integers(7)]
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


def copied(layer: Any) -> Any:
    """One layer's tensors elsewhere: nonsense that is right by chance may write to these."""
    if isinstance(layer, tuple):
        return tuple(x.clone() for x in layer)
    return [copied(pair) for pair in layer]


def wrong_append(account: Account) -> tuple[str, Callable[[], object]]:
    rng = account.rng
    shape = (account.num_rows, account.q_lens[0], KV_HEADS)
    arguments: list[Any] = [copied(account.layer), torch.zeros(*shape, DIM), torch.zeros(*shape, DIM_V)]
    at = int(rng.integers(3))
    arguments[at] = wrong_kv(account) if at == 0 else nonsense.a_tensor(rng, arguments[at])[0]
    return "append", lambda: account.plan.append(*arguments)


def wrong_lens(account: Account) -> Any:
    rng = account.rng
    if "levels" not in account.layout:
        return nonsense.integers(rng, account.lens.tolist())[0]
    if rng.integers(6) == 0:
        return nonsense.lengths_by_level(rng)[0]
    given = account.new_lens()
    level = int(rng.integers(account.num_levels))
    given[level] = nonsense.integers(rng, account.lens[account.level_nodes(level)].tolist())[0]
    return given


def wrong_update(account: Account) -> tuple[str, Callable[[], object]]:
    rng = account.rng
    names = ["kv_lens", "tree", "kv", "page_indices", "cu_seqlens_q", "validate"]
    chosen = {names[i] for i in rng.integers(len(names), size=rng.choice([1, 1, 2, 3]))}
    given: dict[str, Any] = {}
    for name in sorted(chosen):
        if name == "kv_lens":
            given[name] = account.new_lens(rng.integers(0, account.most + 1))  # right but for what is beside
            if rng.integers(2):
                given[name] = wrong_lens(account)
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
