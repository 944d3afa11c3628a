"""Whether a model's weights are still those that a prefix was computed with."""

from __future__ import annotations

from dataclasses import dataclass

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
        """Raise a ValueError if they have changed since, as far as that shows, or somebody said so."""
        if not self.valid or self.seen not in (None, fingerprint(model)):
            raise ValueError(
                "the model's weights changed since this prefix was computed, so it no longer fits them; "
                "prefill it again in a new PrefixCache"
            )


def fingerprint(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """Return addresses and version counters: they change when parameters are replaced or written in place."""
    return tuple(
        (p.data_ptr(), -1 if p.is_inference() else p._version)  # noqa: SLF001  (autograd's counter, read only)
        for p in model.parameters()
    )
