"""Whether a model's weights are still those that a prefix was computed with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass
class Weights:
    """What the weights were when a prefix was computed; one object for a cache and all its forks."""

    seen: tuple[tuple[int, int], ...] | None = None
    valid: bool = True

    def see(self, model: PreTrainedModel) -> None:
        """Note the weights as they are."""
        self.seen = fingerprint(model)

    def check(self, model: PreTrainedModel) -> None:
        """Raise a ValueError if they have changed since, as far as that shows, or somebody said so.

        And if the model is in a training mode that a cache cannot serve.
        """
        check_mode(model)
        if not self.valid or self.seen not in (None, fingerprint(model)):
            raise ValueError(
                "the model's weights changed since this prefix was computed, so it no longer fits them; "
                "prefill it again in a new PrefixCache"
            )


def check_mode(model: PreTrainedModel) -> None:
    """Raise a ValueError if some part of the model drops values or caches, as it may while it is trained."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        if getattr(module, "gradient_checkpointing", False):
            raise ValueError(
                "model must not checkpoint gradients while it generates, since layers that do take no cache, "
                f"got {name or type(module).__name__} in training mode; call model.eval()"
            )
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            raise ValueError(
                f"model must not drop values out while it generates, got {name} with p={module.p} in "
                "training mode; call model.eval()"
            )


def fingerprint(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """Return addresses and version counters: they change when parameters are replaced or written in place."""
    return tuple(
        (p.data_ptr(), -1 if p.is_inference() else p._version)  # noqa: SLF001  (autograd's counter, read only)
        for p in model.parameters()
    )
