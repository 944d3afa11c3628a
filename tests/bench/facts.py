"""What a number depends on: the machine, the versions, the commit, and what this machine reaches at best."""

import contextlib
import os
import statistics
import subprocess
import warnings
from typing import Any

import torch


def first_line(*command: str) -> str:
    """First line that a command prints; empty if there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""


def machine(device: torch.device) -> dict[str, str]:
    """Device, driver, versions and commit."""
    try:
        import triton  # noqa: PLC0415 - not on every platform
    except ImportError:
        triton = None
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else device.type,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else "",
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "none",
        "commit": os.environ.get("HYDRAGEN_COMMIT") or first_line("git", "rev-parse", "HEAD") or "unknown",
    }


def ceilings(
    timer: Any, device: torch.device, *, size: int = 8192, copy_bytes: int = 1 << 30
) -> dict[str, float]:
    """What this device reaches in this run: a bf16 matrix product, a copy, and a graph of nothing."""

    def median(run: Any, rounds: int = 15) -> float:
        ready = timer.ready(run)
        times = [timer.time(ready) for _ in range(rounds + 3)]
        return statistics.median(times[3:])

    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(a)
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {
        "matmul_tflops": 2 * size**3 / median(lambda: torch.matmul(a, b, out=product)) / 1e12,
        "copy_tbs": 2 * copy_bytes / median(lambda: target.copy_(source)) / 1e12,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that such a graph is most likely not meant
        with contextlib.suppress(RuntimeError):  # not worth losing a run for
            found["empty_graph_us"] = median(lambda: None, rounds=40) * 1e6
    return {name: round(value, 3) for name, value in found.items()}
