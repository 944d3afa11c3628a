"""Every Python block of README.md runs as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = [
    pytest.param(match.group(1), id=f"line-{README.read_text()[: match.start()].count(chr(10)) + 1}")
    for match in re.finditer(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
]


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs(code: str, tmp_path: Path) -> None:
    # Each alone in a new interpreter, elsewhere: a block must not live on what an earlier one defined.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(README.parent / part) for part in ("src", "reference")]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    (tmp_path / "test_block.py").write_text(code)
    # A block that defines tests is a test file; any other is a program.
    program = ["-m", "pytest", "-q"] if re.search(r"^def test_", code, flags=re.MULTILINE) else []
    command = [sys.executable, *program, "test_block.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
