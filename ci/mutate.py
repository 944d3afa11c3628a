"""Mutation testing of the specification and the work table: does some test fail for every small change?

    ci/mutate                  all of it: three quarters of an hour on one core
    ci/mutate reference        only the specification: minutes

mutmut (pip install mutmut) changes one operator, constant or argument at a time, in a copy under out/mutate,
and runs the tests that reach it. Mutants that survive must be explained in ci/mutants.toml: others
are printed with their change, and the exit status is 1. Counts and survivors of each group go to
ci/results/mutants.json; a group that is not run keeps those it has.
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

REFERENCE_TESTS = ("state", "segment", "decomposed", "oracle", "precision", "mutants")
WORK_TESTS = (
    *("work", "work_plan", "apart", "runs", "ragged"),
    *("prefix_tiles", "tuning", "measured_choices", "planted_kernels"),
)
ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "out" / "mutate"
# What is mutated, and the tests that must notice; kernels, which are slow, only where they are needed.
GROUPS = {
    "reference": (
        ["src/hydragen_reference/*"],
        [f"tests/test_reference_{name}.py" for name in REFERENCE_TESTS],
    ),
    "work": (
        [f"src/hydragen/{name}.py" for name in ("work", "queries", "layout", "runs", "apart", "ragged")],
        [f"tests/test_{name}.py" for name in WORK_TESTS],
    ),
}
# Memory is measured in processes of their own, which know nothing of mutants; bugs are planted elsewhere;
# times say little here; of runs in kernels, which are slow, one kind in 24.
NOT = (
    "not memory_does_not_grow and not judge_catches and not 32_bits and not long_chain"
    " and not (test_as_the_oracle and (reference or float32 or levels or causal or sinks))"
)


def lay_out(group: str) -> None:
    """Copy what is mutated and what tests it; both packages under one folder, as mutmut wants them."""
    where = HERE / group
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    shutil.copytree(ROOT / "src" / "hydragen", where / "src" / "hydragen")
    shutil.copytree(ROOT / "reference" / "hydragen_reference", where / "src" / "hydragen_reference")
    shutil.copytree(ROOT / "tests", where / "tests", ignore=shutil.ignore_patterns("bench"))
    mutated, tests = GROUPS[group]
    settings = {
        "source_paths": ["src"],
        "only_mutate": mutated,
        "pytest_add_cli_args": ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", NOT],
        "pytest_add_cli_args_test_selection": tests,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    text = (ROOT / "pyproject.toml").read_text()
    (where / "pyproject.toml").write_text(text + "\n[tool.mutmut]\n" + "\n".join(lines) + "\n")


def mutmut(group: str, *arguments: str) -> str:
    """Run mutmut on a group and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    if group == "work":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(
        command, cwd=HERE / group, env=environment, stdout=subprocess.PIPE, text=True, check=False
    ).stdout


def results(group: str) -> dict[str, str]:
    """Outcome of every mutant of a group that was tested, by name."""
    printed = mutmut(group, "results", "--all", "true")
    found = dict(re.findall(r"^\s*(\S+): (.+)$", printed, flags=re.MULTILINE))
    return {name: outcome for name, outcome in found.items() if outcome != "not checked"}


def change(group: str, mutant: str) -> list[str]:
    """The lines that a mutant takes away and puts in their place."""
    return [line for line in mutmut(group, "show", mutant).splitlines() if re.match(r"[+-](?![+-])", line)]


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
    parser.add_argument("groups", nargs="*", default=list(GROUPS), metavar="GROUP", help="reference, work")
    parser.add_argument("--children", type=int, default=1, help="mutants tested at the same time")
    parser.add_argument("--report", action="store_true", help="no run: report on the last one")
    given = parser.parse_args()
    rules = tomllib.loads((ROOT / "ci" / "mutants.toml").read_text())["survives"]
    path = ROOT / "ci" / "results" / "mutants.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    unexplained = 0
    for group in given.groups:
        if not given.report:
            lay_out(group)
            mutmut(group, "run", "--max-children", str(given.children))
        of_group = results(group)
        if not of_group:
            sys.exit(f"mutmut has no results: run it in {HERE / group} and see what it prints")
        survivors = {name: change(group, name) for name, found in of_group.items() if found == "survived"}
        reasons = {name: reason(name, lines, rules) for name, lines in survivors.items()}
        counts = Counter(of_group.values())
        report[group] = {
            "mutants": len(of_group),
            "outcomes": dict(counts),
            "survivors": [
                {"mutant": name, "change": lines, "reason": reasons[name]}
                for name, lines in survivors.items()
            ],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        open_ones = [name for name, why in reasons.items() if not why]
        unexplained += len(open_ones)
        for name in open_ones:
            print("\n".join([name, *survivors[name], ""]))
        print(
            f"{group}: {len(of_group)} mutants: "
            f"{', '.join(f'{number} {outcome}' for outcome, number in counts.items())}; "
            f"{len(open_ones)} survivors without an explanation in ci/mutants.toml",
            flush=True,
        )
    sys.exit(bool(unexplained))


if __name__ == "__main__":
    main()
