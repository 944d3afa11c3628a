"""How often does the error budget fail a correct implementation? Counts failures, and how near they come.

    PYTHONPATH=src:reference python property_tests/simulate_budget.py --cases 500

Runs attention as a kernel would on random problems, correct but rounded in every way that kernels round:
tiles of any size, any number of splits, any order of merging, exp or exp2, weights rounded to the inputs'
dtype or not. Each result is held to the budget of `hydragen.testing` and to the formulas it was derived from.
README.md has the outcome.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hydragen.testing import Inputs, Problem, RowBudget
from hydragen.testing.budget import Row, compute_budgets, compute_oracle, errors, largest, rows
from hydragen.testing.problem import SHARPNESS

LOG2_E = math.log2(math.e)
MOST_MERGES = 64  # one after the other: each rounds the running lse once more
RESULTS_PER_CASE = 8


@dataclass(frozen=True)
class Rounding:
    """One way to compute the same thing."""

    tile: int
    split: int | None  # tokens of a partial result; None: one per segment
    order: str
    base2: bool
    round_weights: bool


# What each formula allows, given a row's budget and the largest magnitude of its output.
OUT_FORMULAS: dict[str, Callable[[RowBudget, float], float]] = {
    "design section 5": lambda b, out: 2 * b.dense_out + b.eps * out + b.eps_state * b.logits * b.max_v,
    "Σ p|v| for |out|": lambda b, out: (
        2 * b.dense_out + b.eps * b.absolute + b.eps_state * b.logits * b.max_v
    ),
    "without dense": lambda b, out: b.out - 2 * b.dense_out,
    "adopted": lambda b, out: b.out,
}
LSE_FORMULAS: dict[str, Callable[[RowBudget, float], float]] = {
    "design section 5": lambda b, out: 4 * b.eps_state * b.logits,
    "with |lse|": lambda b, out: 4 * b.eps_state * b.magnitude,
    "with |lse|, dense": lambda b, out: 2 * b.dense_lse + 4 * b.eps_state * b.magnitude,
    "without dense": lambda b, out: b.lse - 2 * b.dense_lse,
    "adopted": lambda b, out: b.lse,
}


def attend(
    row: Row, problem: Problem, begin: int, end: int, how: Rounding, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Online softmax over the keys from begin to end: out and natural lse, both wide."""
    exp = torch.exp2 if how.base2 else torch.exp
    unit = LOG2_E if how.base2 else 1.0
    num_q_heads, q_len, _ = row.q.shape
    running_max = torch.full((num_q_heads, q_len), -math.inf, dtype=wide)
    running_sum = torch.zeros(num_q_heads, q_len, dtype=wide)
    acc = torch.zeros(num_q_heads, q_len, problem.head_dim_v, dtype=wide)
    for start in range(begin, end, how.tile):
        tile = slice(start, min(start + how.tile, end))
        logits = row.q.to(wide) @ row.k[:, tile].to(wide).transpose(1, 2)
        if problem.softcap is None:
            logits = logits * torch.tensor(problem.logit_scale * unit, dtype=wide)
        else:
            logits = problem.softcap * torch.tanh(logits * (problem.logit_scale / problem.softcap)) * unit
        logits = logits.masked_fill(~row.visible[:, tile], -math.inf)
        new_max = torch.maximum(running_max, logits.amax(-1))
        pivot = new_max.masked_fill(new_max == -math.inf, 0.0)
        weights, rescale = exp(logits - pivot[..., None]), exp(running_max - pivot)
        running_sum = running_sum * rescale + weights.sum(-1)
        used = weights.to(problem.dtype).to(wide) if how.round_weights else weights
        acc = acc * rescale[..., None] + used @ row.v[:, tile].to(wide)
        running_max = new_max
    empty = running_sum == 0
    total = running_sum.masked_fill(empty, 1.0)
    lse = (total.log2() + running_max) / LOG2_E if how.base2 else total.log() + running_max
    return acc / total[..., None], lse.masked_fill(empty, -math.inf)


def merge(states: list[tuple[Tensor, Tensor]], base2: bool) -> tuple[Tensor, Tensor]:
    lses = torch.stack([lse for _, lse in states])
    pivot = lses.amax(0)
    pivot = pivot.masked_fill(pivot == -math.inf, 0.0)
    weights = torch.exp2((lses - pivot) * LOG2_E) if base2 else torch.exp(lses - pivot)
    total = weights.sum(0)
    empty = total == 0
    divisor = total.masked_fill(empty, 1.0)
    out = (weights[..., None] * torch.stack([out for out, _ in states])).sum(0) / divisor[..., None]
    return out, (pivot + divisor.log()).masked_fill(empty, -math.inf)


def compute(
    problem: Problem, inputs: Inputs, how: Rounding, rng: random.Random
) -> list[tuple[Tensor, Tensor]]:
    """``out`` and ``lse`` of each row, ``[q_len, num_q_heads, ...]``."""
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    results = []
    for index, row in enumerate(rows(problem, inputs)):
        path_len = row.k.shape[1]
        if how.split is None:
            bounds = [0]
            for node in problem.path(index):
                bounds.append(bounds[-1] + problem.kv_lens[node])
        else:
            bounds = [*range(0, max(path_len, 1), how.split), path_len]
        states = [attend(row, problem, *pair, how, wide) for pair in itertools.pairwise(bounds)]
        if row.sinks is not None:
            out, lse = states[0]
            states.append((torch.zeros_like(out), row.sinks.to(wide)[:, None].expand_as(lse)))
        if how.order == "at once":
            states = [merge(states, how.base2)]
        elif how.order == "backwards":
            states.reverse()
        elif how.order == "any":
            rng.shuffle(states)
        out, lse = states[0]
        for state in states[1:]:
            out, lse = merge([(out, lse), state], how.base2)
        results.append((out.transpose(0, 1).to(problem.dtype), lse.transpose(0, 1)))
    return results


def draw(family: str, dtype: torch.dtype, rng: random.Random) -> Problem:
    """A problem of a family: one output element, a few tokens, tiles, or long segments."""
    sharpness = rng.choice(SHARPNESS)
    scale = rng.choice([None, None, 0.05, 1.0])
    seed = rng.randrange(10**6)
    if family == "element":
        return Problem(
            parents=(-1,),
            kv_lens=(rng.choice([2, 2, 3, 4, 8]),),
            row_to_node=(0,),
            q_lens=(1,),
            head_dim=rng.choice([1, 1, 2, 4]),
            head_dim_v=1,
            dtype=dtype,
            scale=scale,
            sharpness=sharpness,
            seed=seed,
        )
    if family == "long":
        return Problem(
            parents=(-1, 0),
            kv_lens=(rng.choice([300, 1000, 4000]), rng.choice([0, 1, 100])),
            row_to_node=(1, 1),
            q_lens=(1, 1),
            head_dim=rng.choice([1, 16, 64, 256]),
            head_dim_v=4,
            dtype=dtype,
            scale=scale,
            sharpness=sharpness,
            seed=seed,
        )
    tiny = family == "tiny"
    num_nodes, num_rows = rng.choice([1, 1, 2, 2, 3, 4, 6]), rng.choice([1, 1, 2, 3])
    longest = 4 if tiny else 130
    kv_heads, group = rng.choice([1, 1, 2]), rng.choice([1, 1, 3, 4])
    return Problem(
        parents=tuple(rng.randrange(-1, node) for node in range(num_nodes)),
        kv_lens=tuple(rng.choice([0, 1, 2, 3, rng.randint(0, longest)]) for _ in range(num_nodes)),
        row_to_node=tuple(rng.randrange(num_nodes) for _ in range(num_rows)),
        q_lens=tuple(rng.choice([1, 1, 2, 3]) for _ in range(num_rows)),
        num_q_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=rng.choice([1, 1, 2, 3, 4] if tiny else [1, 2, 8, 16, 33, 64, 128, 129, 192, 256]),
        head_dim_v=rng.choice([1, 1, 2] if tiny else [1, 2, 8, 64]),
        dtype=dtype,
        causal=rng.random() < 0.4,
        window=rng.choice([None, None, 1, 2, 5, 20]),
        softcap=None if "very" in sharpness else rng.choice([None, None, 1.0, 5.0, 50.0]),
        scale=scale,
        sinks=rng.random() < 0.3,
        sharpness=sharpness,
        seed=seed,
    )


def draw_rounding(problem: Problem, rng: random.Random) -> Rounding:
    longest = max(problem.path_len(row) for row in range(problem.num_rows))
    splits = [split for split in (1, 7, 32, 256) if longest <= MOST_MERGES * split]
    tiles = [16, 64] if longest > 300 else [1, 4, 16, 64]
    return Rounding(
        tile=rng.choice(tiles),
        split=rng.choice([None, None, *splits]),
        order=rng.choice(["at once", "forwards", "backwards", "any"]),
        base2=rng.random() < 0.6,
        round_weights=rng.random() < 0.7,
    )


@dataclass
class Tally:
    """Of one formula: how many results were outside, and how near the worst came (1: at the border)."""

    failures: int = 0
    worst: float = 0.0

    def add(self, ratio: float) -> None:
        self.failures += ratio > 1
        self.worst = max(self.worst, ratio)


def simulate(family: str, dtype: torch.dtype, cases: int, seed: int) -> None:
    rng = random.Random(seed)
    tallies = {("out", name): Tally() for name in OUT_FORMULAS} | {
        ("lse", name): Tally() for name in LSE_FORMULAS
    }
    for _ in range(cases):
        problem = draw(family, dtype, rng)
        inputs = problem.tensors()
        oracle = compute_oracle(problem, inputs)
        budgets = compute_budgets(problem, inputs, oracle)
        expected = list(
            zip(oracle.out.split(list(problem.q_lens)), oracle.lse.split(list(problem.q_lens)), strict=True)
        )
        for _ in range(RESULTS_PER_CASE):
            how = draw_rounding(problem, rng)
            ratios = dict.fromkeys(tallies, 0.0)
            for (out, lse), (true_out, true_lse), budget in zip(
                compute(problem, inputs, how, rng), expected, budgets, strict=True
            ):
                wrong = {"out": float(errors(out, true_out).max()), "lse": float(errors(lse, true_lse).max())}
                for kind, name in tallies:
                    formula = (OUT_FORMULAS if kind == "out" else LSE_FORMULAS)[name]
                    allowed = formula(budget, largest(true_out))
                    ratio = wrong[kind] / allowed if allowed else math.inf if wrong[kind] else 0.0
                    ratios[kind, name] = max(ratios[kind, name], ratio)
            for key, tally in tallies.items():
                tally.add(ratios[key])
    for (kind, name), tally in tallies.items():
        print(  # noqa: T201 - this program prints
            f"{str(dtype)[6:]:9} {family:8} {cases * RESULTS_PER_CASE:7} {kind}  {name:19}"
            f"{tally.failures:6} outside, worst {tally.worst:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=300, help="problems per family and dtype")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for family, share in (("element", 1.0), ("tiny", 1.0), ("small", 0.5), ("long", 0.05)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            simulate(family, dtype, max(1, round(arguments.cases * share)), arguments.seed)


if __name__ == "__main__":
    main()
