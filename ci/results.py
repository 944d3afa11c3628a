"""Write down what a stage of ci/gpu found, in ci/results/<gpu>.json.

`record` adds or replaces one stage; `require` fails unless stages were green for the source that is here now:
speed is reported only on green. Each stage carries its own commit, source hash and date: they may run apart.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from bench_results import merged, write_tables
from count_tests import count

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    *("src", "reference", "tests", "property_tests", "ci/compile_gate.py", "ci/compile_cases.py"),
    "pyproject.toml",
)


def first_line(*command: str) -> str:
    """First line that a command prints; empty if there is no such command or it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""


def source_hash() -> str:
    """Hash of every file that decides a result; the commit alone says nothing of a changed working tree."""
    seen = hashlib.sha256()
    for name in SOURCES:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix in (".py", ".toml") and path.is_file():
                seen.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()[:16]


def commit() -> str:
    """The commit this checkout stands at, with a mark if files that git knows differ from it."""
    if given := os.environ.get("HYDRAGEN_COMMIT"):
        return given
    changed = first_line("git", "status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
    return (first_line("git", "rev-parse", "HEAD") or "unknown") + (" with changes" if changed else "")


def machine() -> dict[str, str]:
    """The facts a number depends on."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        or "unknown",
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def results_path(gpu: str) -> Path:
    """File for a GPU: "NVIDIA H100 80GB HBM3" -> h100.json; the memory's size and kind are not its name."""
    words = [word for word in gpu.lower().split() if word != "nvidia" and not re.match(r"\d+gb|hbm", word)]
    folder = Path(os.environ.get("HYDRAGEN_RESULTS_DIR") or ROOT / "ci" / "results")
    return folder / f"{'-'.join(words) or 'gpu'}.json"


def benchmarks(path: Path) -> list[dict[str, Any]]:
    """pytest-benchmark's cases: what each put into extra_info, quartiles in µs, the number of rounds."""
    if not path.exists() or not path.stat().st_size:  # pytest-benchmark opens it before anything is timed
        return []
    return [
        {
            **case["extra_info"],
            "group": case["group"],
            "rounds": case["stats"]["rounds"],
            "quartiles_us": [round(case["stats"][name] * 1e6, 3) for name in ("q1", "q3")],
        }
        for case in json.loads(path.read_text())["benchmarks"]
    ]


def load(path: Path) -> dict[str, Any]:
    """What was recorded so far."""
    return dict(json.loads(path.read_text())) if path.exists() else {"stages": {}}


def record(stage: str, status: int, seconds: int, logs: Path) -> None:
    """Add or replace one stage's entry."""
    facts = machine()
    path = results_path(facts["gpu"])
    results = load(path)
    log = (logs / f"{stage}.log").read_text(errors="replace")
    entry: dict[str, Any] = {
        "ok": status == 0,
        "seconds": seconds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "source": source_hash(),
        "machine": facts,
    }
    if stage in ("compile", "conformance", "numerics", "sanitize"):
        entry["summary"] = (log.strip().splitlines() or [""])[-1]
    if stage not in ("compile", "conformance", "numerics"):
        entry |= count(log)
    if stage.startswith("bench"):
        # Each cell was checked before it was timed. Where one failed (1), earlier times are not kept: they
        # may be those of what is wrong now.
        before = results["stages"].get(stage, {}).get("benchmarks", []) if status != 1 else []
        entry["benchmarks"] = merged(before, benchmarks(logs / f"{stage}.json"))
    results["stages"][stage] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_tables(results, path)
    print(f"{stage}: {'ok' if status == 0 else 'FAILED'} in {seconds} s, written to {path}")


def require(stages: list[str]) -> None:
    """Stop unless every one of `stages` was green for the source that is here now."""
    recorded = load(results_path(machine()["gpu"]))["stages"]
    now = source_hash()
    missing = [s for s in stages if not (recorded.get(s, {}).get("ok") and recorded[s]["source"] == now)]
    if missing:
        sys.exit(f"speed is reported only on green: first run ci/gpu {' '.join(missing)} for this source")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("record")
    adding.add_argument("stage")
    adding.add_argument("--status", type=int, required=True)
    adding.add_argument("--seconds", type=int, required=True)
    adding.add_argument("--logs", type=Path, required=True)
    checking = commands.add_parser("require")
    checking.add_argument("stages", nargs="+")
    given = parser.parse_args()
    if given.command == "record":
        record(given.stage, given.status, given.seconds, given.logs)
    else:
        require(given.stages)


if __name__ == "__main__":
    main()
