"""The function that docs/conformance.md shows is right, and not once an expression of it is changed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
(SHOWN,) = re.findall(
    r"^```python\n(import torch\n.*?def by_the_book.*?)^```",
    (ROOT / "docs" / "conformance.md").read_text(),
    flags=re.MULTILINE | re.DOTALL,
)
# Mistakes of one expression each.
CHANGES = {
    "nothing": ("", ""),
    "heads in turns": ("x.double().repeat_interleave(group, dim=1)", "x.double().repeat(1, group, 1)"),
    "queries first": ("len(k) - len(q) + torch.arange", "torch.arange"),
    "window of one more": ("query - problem.window", "query - problem.window - 1"),
    "log2": ("lse.float()", "(lse / 0.6931471805599453).float()"),
    "capped later": ("problem.softcap * torch.tanh", "torch.tanh"),
    "nothing seen": ("lse.nan_to_num(neginf=0)[..., None]", "lse[..., None]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_documented_function(change: str, tmp_path: Path) -> None:
    old, new = CHANGES[change]
    assert old in SHOWN
    (tmp_path / "mine.py").write_text(SHOWN.replace(old, new) if old else SHOWN)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("src", "reference"))
    command = [
        "-m",
        "pytest",
        "-p",
        "hydragen.testing.conformance.plugin",
        "--pyargs",
        "hydragen.testing.conformance",
        "-q",
    ]
    options = ["--implementation", "mine:by_the_book", "-k", "oracle", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, *command, *options],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if change == "nothing" else 1), done.stdout + done.stderr
    assert ("smallest failing case" in done.stdout) == (change != "nothing")
