"""What the benchmark measures: cases, models with random weights, and prompts that they have run."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hydragen.host_ints import IntArray
from hydragen.transformers.cache import PrefixCache
from hydragen.transformers.timing import timed

# Prompts up to so long run twice, so that the time of a prefill is not that of compiling.
_WARM_UP = 20_000


@dataclass(frozen=True)
class Case:
    """`batch` sequences over `prefix` shared tokens, `completion` new tokens each.

    Attributes
    ----------
    branches, branch : int
        Nodes under the prefix and tokens in each, for two levels of sharing; the batch is spread over them.
    hf : bool
        Whether to measure transformers' own generate too.
    whole : bool
        Whether to run whole completions with `generate` too, as a check of the steps' times.
    """

    model: str
    batch: int
    prefix: int
    completion: int = 128
    branches: int = 0
    branch: int = 0
    hf: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if self.batch % max(self.branches, 1):
            raise ValueError(
                f"batch must be a multiple of the {self.branches} branches, got {self.batch}; change one"
            )

    @property
    def key(self) -> tuple[str, int, int, int, int, int]:
        """What tells cases apart."""
        return self.model, self.batch, self.prefix, self.completion, self.branches, self.branch


class Prefixes:
    """A model and the prompts that it has run, each once."""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name, self.model = name, model
        self._made: dict[tuple[int, int, int], tuple[float, PrefixCache]] = {}

    def prompt(self, tokens: int) -> IntArray:
        """Return random token ids; a longer prompt begins with a shorter one."""
        vocabulary = self.model.get_input_embeddings().num_embeddings
        return np.random.default_rng(0).integers(0, vocabulary, tokens)

    def of(self, case: Case) -> tuple[float, PrefixCache]:
        """Return the seconds of a prefill and its cache, of a row per branch."""
        key = case.prefix, case.branches, case.branch
        if key not in self._made:
            if case.prefix <= _WARM_UP:
                PrefixCache(self.model).prefill(self.prompt(case.prefix))  # compiles
            seconds, cache = timed(
                lambda: PrefixCache(self.model).prefill(self.prompt(case.prefix)), self.model.device
            )
            if case.branches:
                cache = cache.fork(case.branches)
                shape = case.branches, case.branch
                vocabulary = self.model.get_input_embeddings().num_embeddings
                texts = np.random.default_rng(1).integers(0, vocabulary, shape)
                more, cache = timed(lambda: cache.extend(list(texts)), self.model.device)
                seconds += more
            self._made[key] = seconds, cache
        return self._made[key]

    def keep_only(self, case: Case) -> None:
        """Drop the others."""
        key = case.prefix, case.branches, case.branch
        self._made = {key: self._made[key]}


def random_model(config: Path, dtype: str | torch.dtype | None, device: str) -> PreTrainedModel:
    """Make a model with random weights of a config.json, directly on its device and in its dtype."""
    read = AutoConfig.from_pretrained(config)
    chosen = dtype or getattr(read, "dtype", None) or torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(read, attn_implementation="hydragen", dtype=chosen)
    return model.eval().requires_grad_(False)


def free_bytes(device: torch.device) -> float:
    """Return what can be allocated."""
    if device.type != "cuda":
        return float("inf")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + unused)


def release(device: torch.device) -> None:
    """Give back what nobody holds: to the device, for those who ask for memory in other sizes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
