"""Choosing the next token: greedy, or drawn with a seed per sequence that no other sequence touches."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hydragen.host_ints import as_positive_int

_TINY = torch.finfo(torch.float32).tiny
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the filters are transformers' own.

    Attributes
    ----------
    do_sample : bool
        Draw; False takes the likeliest token.
    temperature : float
        Logits are divided by it.
    top_k, top_p, min_p : optional
        Keep the k likeliest tokens, the smallest set of at least this probability, those at least this share
        as likely as the likeliest.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise TypeError(f"do_sample must be True or False, got {self.do_sample!r}")
        for name in ("temperature", "top_p", "min_p"):
            given = getattr(self, name)
            if (given is None and name != "temperature") or (
                isinstance(given, numbers.Real) and not isinstance(given, bool)
            ):
                continue
            raise TypeError(f"{name} must be a number, got {given!r}; leave it out for the default")
        # Below, float32 has no reciprocal of it, and a GPU may take it for 0.
        if not (math.isfinite(self.temperature) and self.temperature >= _TINY):
            raise ValueError(
                f"temperature must be a positive number, {_TINY:.3g} or more, got {self.temperature}; "
                "do_sample=False is greedy"
            )
        if self.top_k is not None:
            as_positive_int(self.top_k, "top_k")
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {share}; None switches it off")
        filtered = (self.temperature, self.top_k, self.top_p, self.min_p) != (1.0, None, None, None)
        if not self.do_sample and filtered:
            raise ValueError(
                f"do_sample must be True for temperature, top_k, top_p or min_p to matter, got {self}; "
                "pass do_sample=True"
            )

    def choose(self, logits: Tensor, seeds: Tensor, counts: Tensor) -> Tensor:
        """Choose a token per row.

        Parameters
        ----------
        logits : tensor [rows, vocabulary]
        seeds : int64 [rows]
        counts : int64 [rows]
            How many tokens each row has drawn before: the draw depends on the seed and this alone.

        Returns
        -------
        int64 [rows]
            -1 where there is nothing to choose from: logits that are NaN, or, to draw from, infinite.
        """
        if not self.do_sample:
            top, tokens = logits.max(dim=-1)  # a NaN counts as the largest
            return torch.where(top.isnan(), -1, tokens)
        logits = logits.float()
        # The largest becomes 0, so that no temperature makes an infinity of it.
        probabilities = torch.softmax(self._filtered(logits - logits.amax(dim=-1, keepdim=True)), dim=-1)
        tokens = draw(probabilities, uniform(seeds, counts))
        return torch.where(probabilities[:, 0].isnan(), -1, tokens)

    def _filtered(self, logits: Tensor) -> Tensor:
        none = torch.empty(0, device="cpu")  # the filters take the tokens so far, and do not look at them
        logits = TemperatureLogitsWarper(float(self.temperature))(none, logits)
        if self.top_k is not None:
            logits = TopKLogitsWarper(self.top_k)(none, logits)
        if self.top_p is not None:
            logits = TopPLogitsWarper(self.top_p)(none, logits)
        if self.min_p is not None:
            logits = MinPLogitsWarper(self.min_p)(none, logits)
        return logits


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probabilities of `tokens`, float32 [rows], before temperature and filters.

    They take several passes over logits [rows, vocabulary] in float32: not for those who do not ask.
    """
    logits = logits.float()
    return logits.gather(1, tokens[:, None])[:, 0] - torch.logsumexp(logits, dim=-1)


def draw(probabilities: Tensor, at: Tensor) -> Tensor:
    """Invert the cumulative distribution of each row, probabilities [rows, vocabulary], at `at` [rows]."""
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    # right=True: the first token whose sum exceeds the point, so never one of probability 0
    points = at[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True)[:, 0].clamp(max=probabilities.shape[1] - 1)


def uniform(seeds: Tensor, counts: Tensor) -> Tensor:
    """Return numbers in [0, 1), float64, that are a function of seed and count: SplitMix64 (Steele, 2014)."""
    x = _mixed(_mixed(seeds) + (counts + 1) * _GOLDEN)
    return ((x >> 11) & (2**53 - 1)).to(torch.float64) * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64, which wraps as uint64 does; its shifts fill with zeros."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))
