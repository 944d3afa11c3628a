"""Tensor parallelism by transformers' own plan: two processes give the tokens of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import make_model
from parallel_worker import answer

HERE = Path(__file__).resolve().parent


def two_processes(folder: Path) -> dict[str, list[list[float]]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, str(HERE / "parallel_worker.py"), str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER"))
    found: dict[str, list[list[float]]] = json.loads(line.removeprefix("ANSWER "))
    return found


def check(folder: Path) -> None:
    # The vocabulary must divide by the number of processes.
    model = make_model("llama", vocab_size=98)
    model.save_pretrained(folder)
    alone, together = answer(model), two_processes(folder)
    assert together["tokens"] == alone["tokens"]
    for a, b in zip(together["logprobs"], alone["logprobs"], strict=True):
        assert a == pytest.approx(b, abs=1e-3)
    assert (alone["kv_heads"], together["kv_heads"]) == (2, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPUs' test runs instead")
def test_two_gloo_processes_give_the_tokens_of_one(tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_tokens_of_one(tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measured there")
def test_the_table_over_two_processes(tmp_path: Path) -> None:
    """A model is saved, loaded in parts and timed in step; the second time nothing is left to do."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    limits = {"vocab_size": 98, "intermediate_size": 128, "max_position_embeddings": 512}
    config = {"model_type": "llama", "torch_dtype": "float32", **sizes, **limits}
    (tmp_path / "small.json").write_text(json.dumps(config))
    root = HERE.parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(root / "ci" / "generation_parallel.py"), "--config", str(tmp_path / "small.json")]
    command += [
        "--sizes",
        "4,40",
        "8,60",
        "--out",
        str(tmp_path / "table.csv"),
        "--weights",
        str(tmp_path / "w"),
    ]
    paths = os.pathsep.join([str(root / "src"), str(root / "reference")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    for _ in range(2):
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
    rows = (tmp_path / "table.csv").read_text().splitlines()
    assert [row.split(",")[:3] for row in rows[1:]] == [["small", "4", "40"], ["small", "8", "60"]]
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["runs"][0]["about"]["ranks"] == 2
    assert [row["run"] for row in found["rows"]] == [0, 0]
