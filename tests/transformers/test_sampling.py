"""Draws: a function of seed and count, and distributed as the probabilities say."""

from __future__ import annotations

import math

import pytest
import torch

from hydragen.transformers.sampling import Sampling, draw, logprobs_of, uniform

WORD = 2**64


def splitmix(x: int) -> int:
    """SplitMix64's finalizer in Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % WORD
    return x ^ (x >> 31)


def test_uniform_is_splitmix() -> None:
    seeds = [0, 1, -5, 2**62, 123456789]
    counts = [0, 1, 7, 100, 2**40]
    got = uniform(torch.tensor(seeds), torch.tensor(counts))
    for seed, count, value in zip(seeds, counts, got.tolist(), strict=True):
        word = splitmix((splitmix(seed % WORD) + (count + 1) * 0x9E3779B97F4A7C15) % WORD)
        assert value == (word >> 11) / 2**53


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    count = 20_000
    at = uniform(torch.arange(count), torch.zeros(count, dtype=torch.int64))
    drawn = draw(probabilities.expand(count, -1), at)
    found = torch.bincount(drawn, minlength=6) / count
    assert found[1] == found[5] == 0
    # Six standard deviations of the largest
    assert (found - probabilities).abs().max() < 6 * (0.25 / count) ** 0.5


def test_draws_at_the_ends_have_a_probability() -> None:
    probabilities = torch.tensor([[0.0, 1.0, 0.0]] * 2)
    assert draw(probabilities, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 1]


def test_filters() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(200, -1)
    seeds, counts = torch.arange(200), torch.zeros(200, dtype=torch.int64)
    for sampling, allowed in (
        (Sampling(True, top_k=2), {0, 1}),
        (Sampling(True, top_p=0.6), {0}),
        (Sampling(True, min_p=0.2), {0, 1}),
        (Sampling(True, temperature=0.01), {0}),
        (Sampling(True, temperature=100.0), {0, 1, 2, 3}),
        (Sampling(), {0}),
    ):
        tokens = sampling.choose(logits, seeds, counts)
        assert set(tokens.tolist()) == allowed
        expected = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs_of(logits, tokens), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"do_sample": True, "temperature": 0.0},
            "temperature must be a positive number, 1.18e-38 or more, got 0.0",
        ),
        ({"do_sample": True, "top_k": 0}, "top_k must be"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        (
            {"do_sample": True, "temperature": 1e-39},
            "temperature must be a positive number, 1.18e-38 or more",
        ),
        ({"temperature": 0.5}, "do_sample must be True"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_lowest_temperature_takes_the_likeliest(size: float) -> None:
    logits = torch.tensor([[0.25, 0.5, -1.0], [-3.0, -2.5, -2.75]]) * size
    coldest = Sampling(do_sample=True, temperature=torch.finfo(torch.float32).tiny)
    assert coldest.choose(logits, torch.tensor([3, 4]), torch.tensor([0, 0])).tolist() == [1, 1]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(do_sample=True, top_k=2, top_p=0.9, min_p=0.1)])
def test_nothing_is_chosen_from_what_is_no_number(sampling: Sampling) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0], [9.0, math.nan, 0.0], [1.0, -math.inf, -math.inf]])
    chosen = sampling.choose(logits, torch.arange(3), torch.zeros(3, dtype=torch.int64))
    assert chosen[1:].tolist() == [-1, 0]
    assert chosen[0] >= 0
