"""Plan: work laid out once, run by every layer, updated in place from step to step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from hydragen.appending import append_tokens
from hydragen.backends import Backend
from hydragen.backends.tokens import replace_constants
from hydragen.capacity import Capacity, capacity_for, fitted, lasting_tiles, page_entries
from hydragen.explain import Explanation, explanation
from hydragen.handles import NotCopied, new_handle
from hydragen.kv import KV
from hydragen.lengths import KVLens, check_kv_lens
from hydragen.ops import implement_run, run_in_graph
from hydragen.plan_state import PlanState, lasting
from hydragen.runner import Runner
from hydragen.target import target_of
from hydragen.tiles import Tile
from hydragen.transforms import check_no_transform
from hydragen.tree import PrefixTree
from hydragen.types import AttentionState
from hydragen.validation import check_bool
from hydragen.validation.append import check_append
from hydragen.validation.planned import Planned
from hydragen.validation.tables import tables_of, with_page_indices
from hydragen.validation.update import (
    check_new_lens,
    check_new_offsets,
    check_new_pages,
    check_new_tree,
)
from hydragen.work import WorkPlan, make_work_plan


class Plan(NotCopied):
    """Attention over one structure, planned once: `run` it for every layer, `update` it from step to step.

    Made by `hydragen.plan`. It owns its tables and partial results: run it on one stream at a time. A CUDA
    graph that captured a run reads them at every replay: keep the plan as long as the graph.

    Attributes
    ----------
    tree : PrefixTree
        Who shares what, as planned or last updated.
    """

    def __init__(
        self, planned: Planned, lens: KVLens, backend: Backend, batch_invariant: bool, reserve: float
    ) -> None:
        self._planned, self._backend = planned, backend
        self._batch_invariant = batch_invariant
        self._reserved = reserve > 1
        self._capacity: Capacity | None = None
        self._growing = lens.levels_on_device(planned.tree, planned.nodes)
        self._work = self._make_work(planned, lens)
        if self._reserved:
            again = self._make_work(planned, lens, lasting_tiles(self._work))
            self._capacity = capacity_for(again, reserve, page_entries(planned.nodes))
            self._work = fitted(again, self._capacity, page_entries(planned.nodes))
        with torch.inference_mode(False):  # what a plan owns outlives the mode in which it is made
            backend.prepare(self._work, self._device)
        self._state = PlanState(planned, self._work, lens, reserve)
        self._planned = self._state.with_own_pages(planned)
        self._runner = Runner(backend)
        self.handle = new_handle(self)

    @property
    def tree(self) -> PrefixTree:
        """Who shares what, as planned or last updated."""
        return self._planned.tree

    def run(
        self,
        q: Tensor,
        kv: KV | tuple[Tensor, Tensor],
        *,
        scale: float | None = None,
        causal: bool = False,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor | AttentionState:
        """Compute attention for one layer; nothing waits for the device.

        Parameters
        ----------
        q : tensor [num_rows, q_len, num_q_heads, head_dim], or packed [total_q, num_q_heads, head_dim]
            As planned for.
        kv : list of levels, or a pair of tensors
            The layer's keys and values, shaped as planned for: a list of pairs, or the pair (k, v) of packed
            tensors or pools. The PackedKV or PagedKV of the plan itself will do as well; its tables are then
            compared with the plan's, which inside torch.compile takes host time in every run.
        scale, causal, window, softcap, sinks, return_lse, out_dtype
            As in `attention`.

        Returns
        -------
        tensor or AttentionState
            As in `attention`.

        Raises
        ------
        TypeError, ValueError
            If the tensors are not those that the plan was made for, or options are out of range.
        """
        if torch.compiler.is_compiling() or isinstance(q, FakeTensor):
            state = run_in_graph(
                self.handle, q, kv, scale, causal, window, softcap, sinks, return_lse, out_dtype
            )
        else:
            options = (scale, causal, window, softcap, return_lse, out_dtype)
            state = self._runner.run(self._planned, self._work, self._state, q, kv, sinks, options)
        return state if return_lse else state.out

    def update(
        self,
        kv_lens: object = None,
        *,
        tree: PrefixTree | None = None,
        kv: KV | None = None,
        page_indices: object = None,
        cu_seqlens_q: Tensor | None = None,
        validate: bool = False,
    ) -> None:
        """Take over what has changed, in place: captured graphs see it. Once per step, for all layers.

        Lengths, page numbers and offsets on the device are not read back: such an update waits for nothing
        and can be captured. A new tree is laid out on the host and copied over; it must fit the `reserve`.
        torch.compile breaks its graph at an update, and at an `append`: fullgraph=True is for `run`.

        Parameters
        ----------
        kv_lens : optional
            Tokens in use per node, in the form of `attention`'s `kv_lens`. On the device they are clamped to
            the capacity; on the host, more is an error. `append` writes what this update let grow, at most
            q_len tokens a row: take tokens back (speculative decoding) by an update of its own before.
        tree : PrefixTree, optional
            Another structure with as many rows, whose queries keep their shape. A sequence that has finished
            may end at a node without tokens.
        kv : optional
            Keys and values of any layer in the new layout: with a tree that has other nodes.
        page_indices : integers, optional
            Other page numbers in the same places. They are copied, as lengths are: pass what has changed.
        cu_seqlens_q : tensor, optional
            Other offsets on the device, if the plan was made with such.
        validate : bool
            Check what lives on the device as well, and that no new token falls on a page's token that is in
            use already; waits for the device.

        Raises
        ------
        TypeError, ValueError
            If something does not fit the plan.
        """
        check_bool(validate, "validate")
        check_no_transform("Plan.update", "update before")
        planned = self._planned
        # all checks first: an update that raises has changed nothing
        lens: KVLens | None = None
        offsets = None if cu_seqlens_q is None else check_new_offsets(planned, cu_seqlens_q, validate)
        indices = None if page_indices is None else check_new_pages(planned, page_indices, validate)
        if tree is not None or kv is not None:
            if indices is not None:
                raise ValueError(
                    "page_indices must be left out where kv or tree changes, got both; "
                    "pass them in kv=PagedKV(...)"
                )
            self._change_tree(planned.tree if tree is None else tree, kv, kv_lens, validate)
        elif kv_lens is not None:
            room = None if self._state.kv_lens is None else self._work.kv_lens
            lens = check_new_lens(planned, room, kv_lens, validate)
        if validate and (lens is not None or indices is not None):
            self._state.check_places(planned, lens, indices)
        if indices is not None:
            self._state.set_pages(indices)
            self._runner.forget()
            tables = with_page_indices(planned.tables, page_indices)
            planned = self._planned = planned._replace(tables=tables)
        if offsets is not None and planned.rows.cu_seqlens_q is not None:
            planned.rows.cu_seqlens_q.copy_(offsets)
        if lens is not None:
            self._state.set_lens(planned, self._work, lens)
        elif indices is not None or offsets is not None:
            self._state.refresh(planned, self._work)

    def append(self, kv: KV | tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
        """Write one layer's keys and values of the newest tokens to where the last `update` made room.

        These are the tokens between a row's length before that update and its length since: none after a
        second update with the same lengths. After one with another tree or layout nothing has grown yet:
        update once more. Take tokens back by an update of its own. Rows at nodes without room have finished.
        It changes `kv`, which is what it is for; nothing waits for the device, and it can be captured. In a
        function for torch.compile call ``torch.compiler.disable(plan.append)``.

        Parameters
        ----------
        kv : list of levels, or a pair of tensors
            The layer's keys and values, as for `run`.
        k : tensor [num_rows, q_len, num_kv_heads, head_dim]
        v : tensor [num_rows, q_len, num_kv_heads, head_dim_v]
            Of row r's tokens as many as it grew by are written, from the first on: at most q_len. Where it is
            less, pad k and v behind and `q` in front: for `run` a row's queries are the last of its path.

        Raises
        ------
        TypeError, ValueError
            If shapes do not fit; if gradients are asked for; if lengths are fixed; if queries are packed; if
            rows do not end at nodes of their own, to which no other row attends, that have room and lie in
            one tensor.
        """
        planned = self._planned
        caches, new = check_append(planned, kv, k, v)
        slots = self._state.slots(planned)
        if slots is None:
            return
        append_tokens(caches, new, slots, self._backend)

    def explain(self) -> Explanation:
        """Say what is batched, what is read with and without sharing, and which limit binds.

        Lengths that live on the device are not read: their nodes count as full. Of the reference on a CPU,
        what it would be on an H200.
        """
        return explanation(self._work, self._backend.RUNS_TILES or self._device.type != "cpu")

    def __repr__(self) -> str:
        room = "" if self._capacity is None else f", room for {self._capacity.nodes} nodes"
        return f"<Plan: {self.tree!r}{room}>"

    @property
    def _device(self) -> torch.device:
        return self._planned.like.device

    def state(
        self, q: Tensor, kv: KV | tuple[Tensor, Tensor], scale: float | None, causal: bool,
        window: int | None, softcap: float | None, sinks: Tensor | None, return_lse: bool,
        out_dtype: torch.dtype | None,
    ) -> AttentionState:  # fmt: skip
        """`run`, which explains the arguments, outside of a graph, as (out, lse)."""
        options = (scale, causal, window, softcap, return_lse, out_dtype)
        return self._runner.run(self._planned, self._work, self._state, q, kv, sinks, options)

    def _make_work(self, planned: Planned, lens: KVLens, tiles: Mapping[Tile, int] | None = None) -> WorkPlan:
        rows, may_grow = planned.rows, bool(self._growing) or self._reserved
        return make_work_plan(
            planned.tree, planned.nodes, lens.planned, may_grow, rows.starts, rows.lens, planned.heads,
            target_of(self._device), self._batch_invariant, tiles, self._reserved,
        )  # fmt: skip

    def _change_tree(self, tree: PrefixTree, kv: KV | None, kv_lens: object, validate: bool) -> None:
        planned, device = self._planned, self._device
        if kv_lens is None and self._growing:
            raise ValueError(
                "kv_lens must be given with kv or tree in a plan whose lengths may grow, got None; pass how "
                "much the nodes hold now"
            )
        tree, nodes = check_new_tree(planned, self._capacity is not None, tree, kv, validate)
        lens = check_kv_lens(kv_lens, tree, nodes, device, validate, may_grow=True)
        lens = lens.growing(self._growing, tree, nodes, device)  # a list in place of a tensor fixes nothing
        tables = planned.tables if kv is None else tables_of(kv)
        changed = planned._replace(tree=tree, nodes=nodes, tables=tables)
        # these two raise if there is no room: nothing has changed until here
        room = self._capacity
        work = self._make_work(changed, lens, None if room is None else room.tiles)
        if room is not None:
            work = fitted(work, room, page_entries(nodes))
        if nodes.pages is not None and kv is not None:
            self._state.set_pages(nodes.pages.indices)
        work.uploads.update(lasting(self._work.uploads))
        changed = self._state.with_own_pages(changed)
        self._planned, self._work = changed, work
        self._runner.forget()
        replace_constants(work, device)
        self._backend.replace_tables(work, device)
        self._state.set_tree(changed)
        self._state.set_lens(changed, work, lens, grown=False)  # no token is new in a node that was not there


@implement_run
def _run_plan(
    plan: object, q: Tensor, kv: KV | tuple[Tensor, Tensor], scale: float | None, causal: bool,
    window: int | None, softcap: float | None, sinks: Tensor | None, return_lse: bool,
    out_dtype: torch.dtype | None,
) -> AttentionState:  # fmt: skip
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be the handle of a Plan, got that of {type(plan).__name__}")
    return plan.state(q, kv, scale, causal, window, softcap, sinks, return_lse, out_dtype)
