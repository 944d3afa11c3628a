"""`ci/sanitize` with a tool that only pretends: what it runs, what it says, and when it fails."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ci"))

from count_tests import count  # noqa: E402 - from ci/, found by the line above
from racecheck import compilers_lines, judge  # noqa: E402 - the same

# Stands for the tool: refuses newer options, reports what is planted, and else what it is told to.
TOOL = """#!/usr/bin/env bash
echo "$*" >> "$NOTED"
[[ "$*" = *--kernel-name* ]] && exit 1
[[ "$*" = *torch.zeros* ]] && exit "${ATTACH:-0}"
[[ "$*" = *out_of_bounds* ]] && exit "${PLANTED:-9}"
[[ "$*" = *"--tool racecheck"*prefix_sm90* ]] && [ -n "${RACE:-}" ] &&
  { echo "$RACE"; echo "${TESTS:-30 passed in 2.00s}"; exit 9; }
echo "30 passed, 4 deselected in 12.34s"
echo "========= ERROR SUMMARY: 0 errors"
"""
PYTHON = f"""#!/usr/bin/env bash
[ "$1" = ci/racecheck.py ] && exec "{sys.executable}" "$@"
echo "30 passed in 1.00s"
"""


def sanitize(folder: Path, *arguments: str, tool: bool = True, **environment: str) -> tuple[int, str, str]:
    """Exit status, output, and the tool's command lines."""
    for name, text in (("compute-sanitizer", TOOL), ("python", PYTHON)):
        if tool or name == "python":
            (folder / name).write_text(text)
            (folder / name).chmod(stat.S_IRWXU)
    noted = folder / "noted"
    noted.touch()
    done = subprocess.run(
        ["bash", ROOT / "ci" / "sanitize", *arguments],
        env={
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": str(folder / "python"),
            "NOTED": str(noted),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, noted.read_text()


def report(*lines: int, errors: int = 1) -> str:
    """What racecheck prints of accesses at those lines of the kernel, a read and writes."""
    accesses = [f"Read access at attend_prefix+0xf0 in prefix_sm90.py:{lines[0]}"]
    accesses += [f"Write access at attend_prefix+0x8f30 in prefix_sm90.py:{line}" for line in lines[1:]]
    text = "\n=========     and ".join(accesses)
    summary = f"========= RACECHECK SUMMARY: 1 hazard displayed ({errors} errors, 0 warnings)"
    return f"========= Error: Race reported between {text} [28 hazards]\n========= \n{summary}"


KERNEL = min(compilers_lines())
BEHIND = max(compilers_lines())


def test_both_tools_watch_our_kernels(tmp_path: Path) -> None:
    status, said, noted = sanitize(tmp_path)
    assert status == 0, said
    for name in ("memcheck", "racecheck"):
        lines = [line for line in noted.splitlines() if f"--tool {name}" in line and "-m pytest" in line]
        assert len(lines) == {"memcheck": 3, "racecheck": 2}[name]
        assert all("--kernel-regex kns=attend" in line and "--error-exitcode 9" in line for line in lines)
        assert any("test_prefix_sm90" in line for line in lines)
    last = said.splitlines()[-1]
    assert last.startswith("compute-sanitizer clean, a planted error reported: memcheck plain 30 passed")
    assert count(said)["passed"] == 5 * 30


@pytest.mark.parametrize(
    ("environment", "status", "said"),
    [
        ({"RACE": "9"}, 1, "compute-sanitizer NOT clean"),
        ({"RACE": report(KERNEL, KERNEL, BEHIND)}, 0, "compute-sanitizer clean"),
        ({"RACE": report(KERNEL, KERNEL, BEHIND), "TESTS": "1 failed, 2 passed in 1.00s"}, 1, "NOT clean"),
        ({"RACE": report(KERNEL, KERNEL - 80)}, 1, "compute-sanitizer NOT clean"),
        ({"RACE": report(KERNEL, KERNEL, errors=2)}, 1, "compute-sanitizer NOT clean"),
        ({"PLANTED": "0"}, 1, "a planted access out of bounds was not reported"),
        ({"ATTACH": "1"}, 0, "cannot attach to this device: nothing was checked"),
    ],
)
def test_when_it_fails(environment: dict[str, str], status: int, said: str, tmp_path: Path) -> None:
    found = sanitize(tmp_path, "racecheck", **environment)
    assert (found[0], said in found[1].splitlines()[-1]) == (status, True), found[1]


def test_races_of_the_compiler_are_told_from_ours() -> None:
    assert judge(report(KERNEL, BEHIND)) == (1, [])
    for ours in ((KERNEL, KERNEL + 30), (KERNEL - 80, KERNEL - 80)):  # the barriers' set-up; a consumer
        assert judge(report(*ours))[0] == 0
    for cut in ("", report(KERNEL, BEHIND, errors=2), report(KERNEL, BEHIND).partition("RACECHECK")[0]):
        with pytest.raises(ValueError, match="racecheck"):
            judge(cut)


def test_it_chooses_tests_that_there_are() -> None:
    """As many as when they were chosen: a test that is renamed must not fall out in silence."""
    script = (ROOT / "ci" / "sanitize").read_text().replace("\\\n", "")
    for group, number in (("PLAIN", 53), ("SPECIAL", 60), ("RESERVED", 16)):
        body = script.partition(f"\n{group}=(")[2].partition('")\n')[0]
        files, _, expression = body.partition('-k "')
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *files.split(), "-k", expression],
            cwd=ROOT,
            env={**os.environ, "PYTEST_ADDOPTS": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"{number}/" in done.stdout.splitlines()[-1], done.stdout[-2000:]
