"""The examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_chat(model_folder: Path) -> None:
    talk = "ann: w5 w6\nbob: w7\n\nbob: w8\n\nann: w9 w10\ncid: w11\n"
    done = subprocess.run(
        [sys.executable, ROOT / "examples/chat.py", "--model", model_folder, "--max-new-tokens", "3"],
        input=talk,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines() if not line.startswith(" ")][:5] == [
        "ann", "bob", "bob", "ann", "cid",
    ]  # fmt: skip
    assert "tokens stored for 3 users" in done.stdout


def test_a_chat_that_fills_the_positions(model_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples/chat.py", "--model", model_folder, "--max-new-tokens", "99999"],
        input="ann: w5 w6\n\nann: w7\nbob: w8\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ann: w7\n   (no room left after" in done.stdout
    assert "bob: w8\n   ->" in done.stdout


@pytest.mark.parametrize(
    ("name", "billions", "positions"), [("codellama-13b", 13.0, 16384), ("llama-3.1-8b", 8.03, 131072)]
)
def test_configurations_are_of_the_published_sizes(name: str, billions: float, positions: int) -> None:
    # In a process of its own: poisoned memory is real memory, and this model has none.
    code = f"""
import torch
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained({str(ROOT / "examples" / "configs" / f"{name}.json")!r})
with torch.device("meta"):
    print(AutoModelForCausalLM.from_config(config).num_parameters(), config.max_position_embeddings)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parameters, limit = map(int, done.stdout.split())
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert limit == positions
