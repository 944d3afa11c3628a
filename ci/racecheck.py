"""Judge a racecheck report on the specialised tile: which races are in our code, and which in the compiler's.

python3 ci/racecheck.py LOG    exit status 0 if all that is reported is the compiler's; the rest is printed

To start and to end the partitions of `gl.warp_specialize`, Triton writes words of shared memory that idle
warps read behind named barriers; racecheck does not follow these. That code has no source line of its own: it
is reported at the kernel's `def`, or behind the call, where the source touches no shared memory.
"""

import re
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "hydragen" / "kernels" / "prefix_sm90.py"
_ACCESS = re.compile(r"(?:between|and) (?:Read|Write) access at (\S+) in (\S+):(\d+)")


def compilers_lines() -> set[int]:
    """Return the lines of SOURCE whose accesses to shared memory are not in the source."""
    lines = SOURCE.read_text().splitlines()
    kernel = next(i for i, line in enumerate(lines, 1) if line.startswith("def attend_prefix("))
    last_call = max(i for i, line in enumerate(lines, 1) if "gl.warp_specialize(" in line)
    behind = next(i for i, line in enumerate(lines, 1) if i > last_call and line.startswith("    if PDL"))
    return {kernel, *range(behind, len(lines) + 1)}


def judge(log: str) -> tuple[int, list[str]]:
    """Return how many reports are the compiler's, and the others; ValueError if some were not printed."""
    reports = [block for block in re.split(r"(?=Error: )", log) if block.startswith("Error: ")]
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?", log)
    if summary is None:
        raise ValueError("no summary of racecheck")
    if int(summary.group(1)) < int(summary.group(2)) or len(reports) < int(summary.group(2)):
        raise ValueError(f"racecheck did not print all it found: {summary.group(0)}")
    allowed = compilers_lines()
    ours = []
    for report in reports:
        accesses = _ACCESS.findall(report)
        known = [name == SOURCE.name and int(line) in allowed for _, name, line in accesses]
        if len(accesses) < 2 or not all(known):
            ours.append(report.partition("\n========= \n")[0])
    return len(reports) - len(ours), ours


def main() -> int:
    """Judge the log that is named."""
    try:
        compilers, ours = judge(Path(sys.argv[1]).read_text())
    except ValueError as error:
        print(f"racecheck: {error}")
        return 1
    for report in ours:
        print(report.strip())
    print(f"racecheck: {len(ours)} races in our code, {compilers} in the compiler's start of partitions")
    return len(ours) > 0


if __name__ == "__main__":
    raise SystemExit(main())
