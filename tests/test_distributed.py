"""A prefix sharded over two processes equals the prefix in one."""

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

import hydragen
from hydragen.distributed import merge_over_ranks
from hydragen.testing import Problem, assert_within_budget, view

RANKS = 2
PROBLEM = Problem((-1, 0, 0), (61, 7, 12), (1, 2, 2), (1, 1, 1), 4, 2, 16, 16, sharpness="peaked")


def attend_to_a_shard(rank: int, meeting: str, results: Any) -> None:
    """One rank: its part of the root's keys; the leaves' are rank 0's."""
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    try:
        inputs = PROBLEM.tensors()
        packed = view(PROBLEM, inputs)
        begin, end = (0, 40) if rank == 0 else (40, 61)
        own = slice(61, None if rank == 0 else 61)
        k, v = (torch.cat([x[begin:end], x[own]]) for x in (inputs.k, inputs.v))
        leaves = (7, 12) if rank == 0 else (0, 0)
        offsets = torch.tensor([0, end - begin, *leaves]).cumsum(0)
        state = hydragen.attention(
            packed.q, hydragen.PackedKV(k, v, offsets), tree=packed.tree, cu_seqlens_q=packed.cu_seqlens_q,
            return_lse=True, out_dtype=torch.float32,
        )  # fmt: skip
        check_groups(rank, state)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merged = merge_over_ranks(state)
        results.put((rank, merged.out.tolist(), merged.lse.tolist()))
    finally:
        dist.destroy_process_group()


def check_groups(rank: int, state: Any) -> None:
    """Of a group of rank 0 alone, within the two."""
    alone = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="group must be one that this rank is in"):
            merge_over_ranks(state, alone)
    else:
        merged = merge_over_ranks(state, alone)
        torch.testing.assert_close(merged.out, state.out)
        torch.testing.assert_close(merged.lse, state.lse)
        half = merge_over_ranks((state.out.half(), state.lse), alone)
        assert half.out.dtype == torch.float16
    for wrong in (0, "gloo"):
        with pytest.raises(TypeError, match=r"group must be a torch\.distributed process group or None"):
            merge_over_ranks(state, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group must have a backend for tensors on meta"):
        merge_over_ranks((state.out.to("meta"), state.lse.to("meta")))


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    meeting = str(tmp_path / "meeting")
    processes = [
        context.Process(target=attend_to_a_shard, args=(rank, meeting, results)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    found = {rank: (out, lse) for rank, out, lse in (results.get(timeout=120) for _ in processes)}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert found[0] == found[1]
    assert_within_budget(PROBLEM, torch.tensor(found[0][0]), torch.tensor(found[0][1]))


def test_what_cannot_be_exchanged_is_refused() -> None:
    out, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        merge_over_ranks((out, lse))
    with forward_ad.dual_level(), pytest.raises(ValueError, match=r"state\.lse has a tangent"):
        merge_over_ranks((out, forward_ad.make_dual(lse, lse)))
    with pytest.raises(ValueError, match="state must not require gradients"):
        merge_over_ranks((out.requires_grad_(), lse))
    for wrong in (torch.int32, torch.bool, "x", float):
        with pytest.raises(TypeError, match="out_dtype must be None or a floating-point"):
            merge_over_ranks((torch.zeros(2, 3, 4), lse), out_dtype=wrong)  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError), match="lse"):
        merge_over_ranks((out, torch.zeros(5)))


def test_the_comparison_of_two_gpus_runs_on_a_cpu(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parent / "bench" / "two_gpus.py"
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    options = ["--device", "cpu", "--prefix", "101", "--batch", "3", "--rounds", "2", "--output", str(found)]
    done = subprocess.run(
        [*command, str(script), *options], capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shapes = json.loads(found.read_text())["shapes"]
    assert list(shapes) == ["32/32", "32/8"]
    assert all(shape["exact"] and shape["ratio"] > 0 for shape in shapes.values())
    assert "32/32, prefix 101, batch 3: one" in done.stdout
