"""Add up pytest's closing lines in a folder of logs and print one line: N passed, N failed, N skipped."""

import re
import sys
from pathlib import Path


def count(text: str) -> dict[str, int]:
    """Outcomes in pytest's closing line, the last line of `text` that has one; errors count as failures."""
    closing = [line for line in text.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    found = {"passed": 0, "failed": 0, "skipped": 0}
    for number, outcome in re.findall(
        r"(\d+) (passed|failed|errors?|skipped)", closing[-1] if closing else ""
    ):
        found["failed" if outcome.startswith("error") else outcome] += int(number)
    return found


def main() -> None:
    """Print the sum over every log in the folder named on the command line."""
    total = {"passed": 0, "failed": 0, "skipped": 0}
    for log in sorted(Path(sys.argv[1]).glob("*.log")):
        for outcome, number in count(log.read_text(errors="replace")).items():
            total[outcome] += number
    if total["passed"] + total["failed"]:
        print("{passed} passed, {failed} failed, {skipped} skipped".format(**total))


if __name__ == "__main__":
    main()
