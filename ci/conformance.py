"""100,000 generated trees on the GPU in one run, written down as ci/results/<gpu>-conformance.json.

    ci/gpu conformance        the stage: hydragen's Triton backend, packed and paged, within five minutes
    PYTHONPATH=src:reference python ci/conformance.py --cases 200 --capability device=cpu   anywhere, in small

Arguments are those of `python -m hydragen.testing.scale`.
"""

import os
import sys
from datetime import UTC, datetime

import torch
from results import commit, machine, results_path, source_hash

from hydragen.testing import scale

OURS = "hydragen.testing.adapters.ours:attention"
# On a GPU every head_dim, dtype and option is another kernel to compile; sizes are those of property_tests.
LIMITS = ("head_dims=64,128,33,256", "max_kv=600", "max_kv_heads=4")


def main() -> None:
    """Run with the defaults of the stage; what the command line says comes last and wins."""
    gpu = machine()["gpu"] if torch.cuda.is_available() else "cpu"
    target = results_path(gpu)
    target = target.with_name(f"{target.stem}-conformance.json") if torch.cuda.is_available() else None
    arguments = ["--implementation", OURS, "--cases", "100000", "--seconds", "270"]
    for limit in LIMITS:
        arguments += ["--capability", limit]
    if target is not None:
        arguments += ["--json", str(target), "--warm", str(min(16, os.cpu_count() or 1))]
    facts = {
        "commit": commit(),
        "source": source_hash(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": gpu,
    }
    sys.exit(scale.main([*arguments, *sys.argv[1:]], **facts))


if __name__ == "__main__":
    main()
