"""One model layer's share of the cache: new tokens on their way to the attention function, and the tail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hydragen.appending import Slots, append_tokens
from hydragen.host_ints import IntArray
from hydragen.kv import PackedKV
from hydragen.transformers.levels import Layout
from hydragen.transformers.rows import Rows

_HANDED_OVER = threading.local()


class PrefixLayer(CacheLayerMixin):  # type: ignore[misc]  # mypy does not read transformers
    """Keys and values of one layer: shared levels, read only, and a tail per row that grows.

    `update` returns the layer itself in place of keys and values: the model hands both on to the attention
    function unread, and that is the hydragen function or fails loudly. Only models that expand what they
    cache (`support.expands_cached`) compute with what `update` returns: they get back their new tokens, and
    the attention function finds the layer by `take_handed_over` and stores what it is given, expanded.
    """

    is_compileable = False

    def __init__(
        self,
        index: int,
        rows: Rows,
        window: int | None,
        expands: bool,
        implementation: Callable[[], str],
        modules: frozenset[int],
    ) -> None:
        super().__init__()
        self.index, self.rows, self.window, self.expands = index, rows, window, expands
        self.implementation = implementation
        # ids of the model's modules: another model's keys must not end up here
        self.modules = modules
        self.is_sliding = window is not None
        # The forward pass that wrote here last
        self.steps = rows.steps
        self.layout: Layout | None = None
        self.incoming: tuple[Tensor, Tensor] | None = None
        # The tails, flat: [layout.total, heads, dim]
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        # A fork reads the tails as they are: tokens may be added, not moved
        self.shared = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types for it
    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[object, object]:
        """Take a forward pass's new keys and values, each [rows, heads, tokens, dim], on to `store`."""
        if self.expands:
            other = take_handed_over()
            if other is not None and other.rows is self.rows:
                _wrong_attention()  # nobody asked for the layer before this one
            _HANDED_OVER.layer = self
            return key_states, value_states
        self.incoming = key_states, value_states
        return self, self

    def store(self, k: Tensor, v: Tensor, position_ids: Tensor | None, mask: Tensor | None) -> None:
        """Append the new tokens, k and v [rows, heads, tokens, dim], to the rows' tails."""
        num_rows, _, q_len, _ = k.shape
        self._check(k, v)  # before anything changes
        if self.steps == self.rows.steps:
            self.rows.begin_step(num_rows, q_len, position_ids, mask)
        self.steps = self.rows.steps
        step = self.rows.step
        if self.layout is not step.layout:
            self._move(step.layout, k, v)
        new = k.resolve_neg().transpose(1, 2), v.resolve_neg().transpose(1, 2)
        append_tokens(self._tails(), new, Slots((step.target,), step.source))
        self.rows.waiting -= 1

    def kv(self) -> list[PackedKV | tuple[Tensor, Tensor]]:
        """Return this layer's levels as `hydragen.attention` takes them: shared ones, then a tail if any."""
        shared = [level.kv[self.index] for level in self.rows.levels]
        return shared if self.layout is None else [*shared, self.layout.as_kv(*self._tails())]

    def shared_tail(self) -> PackedKV | tuple[Tensor, Tensor]:
        """Return the tail for a fork to read for as long as it likes."""
        self.shared = True
        return self.kv()[-1]

    def _tails(self) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            raise RuntimeError("this layer has no tails yet; the attention function makes them")
        return self.keys, self.values

    def _check(self, k: Tensor, v: Tensor) -> None:
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError(
                "a PrefixCache keeps no graph, got keys and values that require gradients; call "
                "the model under torch.no_grad()"
            )
        held, dtype = self.keys, k.dtype
        if v.dtype != dtype:
            raise TypeError(f"the model must give keys and values of one dtype, got {dtype} and {v.dtype}")
        if held is None and self.rows.levels:
            first = self.rows.levels[0].kv[self.index]
            held = first.k if isinstance(first, PackedKV) else first[0]
        if held is not None and held.dtype != dtype:
            raise TypeError(
                f"the model must give keys and values of the dtype that the cache holds, {held.dtype}, got "
                f"{dtype}; go on under the torch.autocast of the prefill, or prefill again"
            )

    def _move(self, layout: Layout, k: Tensor, v: Tensor) -> None:
        """Make room: allocate `layout` and copy the tokens that are there."""
        old = self.layout
        size = layout.total * k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()
        try:
            keys = k.new_empty(layout.total, k.shape[1], k.shape[3])
            values = v.new_empty(layout.total, v.shape[1], v.shape[3])
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, RuntimeError on a CPU
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise MemoryError(
                f"the rows' own tokens need {size / 2**30:,.3g} GiB in each of {self.rows.num_layers} layers "
                f"({size * self.rows.num_layers / 2**30:,.3g} GiB in all, for {layout.size} rows and "
                f"{layout.total} tokens); fork fewer rows or ask for fewer new tokens. The shared prefix is "
                "intact: call cache.reset() and go on"
            ) from error
        if old is not None:
            source, target = layout.moves(old, self.rows.lens_before)
            source, target = source.to(k.device), target.to(k.device)
            for new, tail in zip((keys, values), self._tails(), strict=True):
                new.index_copy_(0, target, tail[source])
        self.keys, self.values, self.layout, self.is_initialized = keys, values, layout, True
        self.shared = False

    def drop(self) -> None:
        """Forget the tail; its memory goes unless a fork shares it."""
        self.keys = self.values = None
        self.layout = self.incoming = None
        self.is_initialized = self.shared = False
        self.steps = self.rows.steps

    def reorder(self, rows: IntArray) -> None:
        """Move the tails so that row i continues what row rows[i] was."""
        if self.layout is not None:
            source, target = self.layout.moves(self.layout, self.rows.lens, rows)
            if self.shared:
                self.keys, self.values = (tail.clone() for tail in self._tails())
                self.shared = False
            for tail in self._tails():
                tail.index_copy_(0, target.to(tail.device), tail[source.to(tail.device)])

    # counted on the host, in NumPy, which torch.compile cannot follow under a default device
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types for it
    def get_seq_length(self) -> int:
        """Tokens that every row has at least: what `generate` need not feed again."""
        return int((self.rows.path_lens + self.rows.lens).min()) if self.rows.size else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002  (transformers' signature)
        """No mask over keys is wanted: (0, 0) tells the hydragen mask function so."""
        if self.implementation() != "hydragen":
            _wrong_attention()
        return 0, 0

    def get_max_length(self) -> int:
        """There is no maximum."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Tails are allocated when the first tokens come."""

    def to(self, *_: object, **__: object) -> PrefixLayer:
        """Stay: layers that attend to what another has cached bring it to their device, which is the same."""
        return self

    def __getattr__(self, name: str) -> NoReturn:
        if not name.startswith("_") and hasattr(Tensor, name):  # the model takes this for keys or values
            if self.implementation() == "hydragen":
                raise AttributeError(_computes(name))
            _wrong_attention()
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], *_: object) -> NoReturn:
        raise TypeError(_computes(getattr(func, "__name__", str(func))))


def take_handed_over() -> PrefixLayer | None:
    """Return the layer whose `update` was called last, once, if its model expands what it caches."""
    layer: PrefixLayer | None = getattr(_HANDED_OVER, "layer", None)
    _HANDED_OVER.layer = None
    return layer


def _computes(name: str) -> str:
    return (
        f"the model must leave cached keys and values to its attention function, got one that computes with "
        f"them first ({name}); a PrefixCache does not hold them in one tensor: use the model's own cache"
    )


def _wrong_attention() -> NoReturn:
    raise AttributeError(
        "a hydragen PrefixCache met another attention function; load the model with "
        'attn_implementation="hydragen", or call model.set_attn_implementation("hydragen")'
    )
