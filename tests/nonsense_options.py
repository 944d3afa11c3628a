"""Options that make no sense: each draw is (value, whether no call with this value can be right)."""

import math
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import UninitializedParameter

Drawn = tuple[Any, bool]
HUGE = 2**62
META = torch.tensor(1, device="meta")


class Odd:
    """Of no use to anybody."""

    def __repr__(self) -> str:
        return "Odd()"


def scale(rng: np.random.Generator) -> Drawn:
    """Instead of a factor."""
    wrong = [
        math.nan,
        math.inf,
        -math.inf,
        10**400,
        "1",
        True,
        1j,
        [1.0],
        np.array([1.0]),
        torch.ones(2),
        META,
        UninitializedParameter(),
        Odd(),
    ]
    maybe = [1e38, -1e308, 1e-320, 0, np.float16(2)]
    return _either(rng, wrong, maybe)


def window(rng: np.random.Generator) -> Drawn:
    """Instead of a number of keys."""
    wrong = [
        0,
        -1,
        -(10**30),
        1.5,
        2.0,
        math.nan,
        "3",
        True,
        [1],
        1j,
        np.float64(2),
        torch.tensor([1, 2]),
        META,
        np.ma.masked,
        Odd(),
    ]
    return _either(rng, wrong, [1, 10**30, np.uint8(200)])


def softcap(rng: np.random.Generator) -> Drawn:
    """Instead of a cap."""
    wrong = [
        0,
        -1.0,
        math.nan,
        math.inf,
        "50",
        True,
        1j,
        [5.0],
        10**400,
        -(10**400),
        torch.ones(3),
        META,
        Odd(),
    ]
    return _either(rng, wrong, [1e-30, 1e30, 1e300, 1e-320, 1])


def flag(rng: np.random.Generator) -> Drawn:
    """Instead of True or False."""
    wrong = [0, 1, None, "yes", np.bool_(True), math.nan, torch.tensor(True), META, [], Odd()]
    return wrong[rng.integers(len(wrong))], True


def backend(rng: np.random.Generator) -> Drawn:
    """Instead of the name of a backend."""
    wrong = ["", "cuda", "Triton", "AUTO", None, 3, math.nan, b"auto", ["auto"], torch.device("cpu"), Odd()]
    return wrong[rng.integers(len(wrong))], True


def max_seqlen_q(rng: np.random.Generator) -> Drawn:
    """Instead of the tokens of the longest row."""
    return _either(rng, [-1, 1.5, math.nan, "4", True, [4], -HUGE, META, Odd()], [0, 1, HUGE, 10**30])


def out_dtype(rng: np.random.Generator) -> Drawn:
    """Instead of a floating-point dtype."""
    wrong = [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32", 32, float, Odd(), True]
    return _either(rng, wrong, [torch.float32, None])


def _either(rng: np.random.Generator, wrong: list[Any], maybe: list[Any]) -> Drawn:
    if rng.random() < 0.7:
        return wrong[rng.integers(len(wrong))], True
    return maybe[rng.integers(len(maybe))], False
