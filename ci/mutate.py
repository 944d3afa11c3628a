"""Mutation testing of the specification and the work table: does some test fail for every small change?

    ci/mutate                      all of it: about half an hour on one core
    ci/mutate --only oracle        only mutants whose name holds this text

mutmut (pip install mutmut) changes one operator, constant or argument at a time, in a copy under out/mutate,
and runs the tests that reach it. Mutants that survive must be explained in ci/mutants.toml: others
are printed with their change, and the exit status is 1. Counts and survivors go to ci/results/mutants.json.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHERE = ROOT / "out" / "mutate"
MUTATED = ["src/hydragen_reference/*", "src/hydragen/work.py", "src/hydragen/queries.py"]
TESTS = [
    *(
        f"tests/test_reference_{name}.py"
        for name in ("state", "segment", "decomposed", "oracle", "precision")
    ),
    "tests/test_reference_mutants.py",
    "tests/test_work.py",
    "tests/test_planted_kernels.py",
]
# Memory is measured in processes of their own, which know nothing of mutants; bugs are planted elsewhere.
NOT = "not memory_does_not_grow and not judge_catches and not 32_bits"
Survivor = tuple[str, list[str]]


def lay_out() -> None:
    """Copy what is mutated and what tests it; both packages under one folder, as mutmut wants them."""
    shutil.rmtree(WHERE, ignore_errors=True)
    WHERE.mkdir(parents=True)
    shutil.copytree(ROOT / "src" / "hydragen", WHERE / "src" / "hydragen")
    shutil.copytree(ROOT / "reference" / "hydragen_reference", WHERE / "src" / "hydragen_reference")
    shutil.copytree(ROOT / "tests", WHERE / "tests", ignore=shutil.ignore_patterns("bench"))
    settings = {
        "source_paths": ["src"],
        "only_mutate": MUTATED,
        "pytest_add_cli_args": ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", NOT],
        "pytest_add_cli_args_test_selection": TESTS,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    text = (ROOT / "pyproject.toml").read_text()
    (WHERE / "pyproject.toml").write_text(text + "\n[tool.mutmut]\n" + "\n".join(lines) + "\n")


def mutmut(*arguments: str) -> str:
    """Run mutmut there and return what it prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(
        command, cwd=WHERE, env=environment, stdout=subprocess.PIPE, text=True, check=False
    ).stdout


def results() -> dict[str, str]:
    """Outcome of every mutant, by name."""
    found = re.findall(r"^\s*(\S+): (.+)$", mutmut("results", "--all", "true"), flags=re.MULTILINE)
    return dict(found)


def change(mutant: str) -> list[str]:
    """The lines that a mutant takes away and puts in their place."""
    return [line for line in mutmut("show", mutant).splitlines() if re.match(r"[+-](?![+-])", line)]


def reason(mutant: str, lines: list[str], rules: list[dict[str, str]]) -> str:
    """Why a mutant may survive; empty if nobody has said."""
    text = "\n".join(lines)
    for rule in rules:
        if fnmatch(mutant, rule["where"]) and re.search(rule["line"], text):
            return rule["reason"]
    return ""


def main() -> None:
    """Lay out, run, compare with the explanations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="only mutants whose name holds this text")
    parser.add_argument("--children", type=int, default=1, help="mutants tested at the same time")
    parser.add_argument("--report", action="store_true", help="no run: report on the last one")
    given = parser.parse_args()
    if not given.report:
        lay_out()
        chosen = [f"*{given.only}*"] if given.only else []
        mutmut("run", "--max-children", str(given.children), *chosen)
    outcomes = results()
    if not outcomes:
        sys.exit("mutmut has no results: run `ci/mutate` and see what it prints")
    rules = tomllib.loads((ROOT / "ci" / "mutants.toml").read_text())["survives"]
    survivors = {name: change(name) for name, outcome in outcomes.items() if outcome == "survived"}
    reasons = {name: reason(name, lines, rules) for name, lines in survivors.items()}
    counts = Counter(outcomes.values())
    report = {
        "mutants": len(outcomes),
        "outcomes": dict(counts),
        "survivors": [
            {"mutant": name, "change": lines, "reason": reasons[name]} for name, lines in survivors.items()
        ],
    }
    if not given.only:
        path = ROOT / "ci" / "results" / "mutants.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    unexplained = [name for name, why in reasons.items() if not why]
    for name in unexplained:
        print("\n".join([name, *survivors[name], ""]))
    print(
        f"{len(outcomes)} mutants: {', '.join(f'{number} {outcome}' for outcome, number in counts.items())}; "
        f"{len(unexplained)} survivors without an explanation in ci/mutants.toml"
    )
    sys.exit(bool(unexplained))


if __name__ == "__main__":
    main()
