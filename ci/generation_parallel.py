"""The end-to-end table's rows of CodeLlama-13b over several GPUs: transformers' tensor parallelism, NCCL.

torchrun --standalone --nproc-per-node 2 ci/generation_parallel.py [--seconds 200] [--weights FOLDER]

Rank 0 makes the model with random weights and saves it (26 GB, into a temporary folder unless FOLDER is
given); then all ranks load their parts of it as they would load any model. Rows as in ci/generation.py, to
ci/results/<gpu>-generation-<ranks>-gpus.csv. On a CPU, for a trial: --config of a small model and --out.
"""

import argparse
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from generation import CONFIGS, LARGE, LONGEST
from results import commit, machine, results_path, source_hash
from transformers import AutoModelForCausalLM, PreTrainedModel

from hydragen.transformers.bench import run
from hydragen.transformers.bench_cases import Case, random_model, release
from hydragen.transformers.bench_files import Results

SIZES = [(512, LONGEST), (256, LONGEST), (256, 2048), (32, 2048), (512, 2048), (32, LONGEST)]


def save_random_model(config: Path, folder: Path, device: torch.device) -> None:
    """Write a model with random weights, as its makers would publish it."""
    model = random_model(config, None, str(device))
    model.save_pretrained(folder)
    del model
    release(device)


def load(folder: Path) -> PreTrainedModel:
    """Load this process's part of the model."""
    with warnings.catch_warnings():
        # transformers 5.17 names tp_plan's successor, which older ones do not have
        warnings.simplefilter("ignore", FutureWarning)
        model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="hydragen", tp_plan="auto", dtype="auto"
        )
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def main() -> None:
    """Measure on all ranks; the first one speaks and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=200, help="begin no row when this is nearly over")
    parser.add_argument("--config", type=Path, default=CONFIGS / f"{LARGE}.json")
    parser.add_argument("--sizes", nargs="*", default=SIZES, type=_size, metavar="BATCH,PREFIX")
    parser.add_argument("--weights", type=Path, help="keep the weights here; used again if they are there")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        sys.exit("ci/generation_parallel.py: start it with torchrun --standalone --nproc-per-node 2")
    gpu, local = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
        # multicast over NVLink needs a fabric manager that not every host runs
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    first, ranks = dist.get_rank() == 0, dist.get_world_size()
    about = {"command": " ".join(sys.argv), "source": source_hash(), "commit": commit(), "ranks": ranks}
    if gpu:
        about |= machine()
    out = given.out
    if out is None:
        of_gpu = results_path(machine()["gpu"])
        out = of_gpu.with_name(f"{of_gpu.stem}-generation-{ranks}-gpus.csv")
    say: Callable[[str], None] = partial(print, flush=True) if first else _silent
    temporary = [tempfile.mkdtemp(prefix="hydragen-weights-") if first and given.weights is None else None]
    dist.broadcast_object_list(temporary)
    folder = Path(temporary[0] or given.weights)
    try:
        if first and not (folder / "config.json").exists():
            save_random_model(given.config, folder, device)
        dist.barrier()
        cases = [Case(given.config.stem, batch, prefix) for batch, prefix in given.sizes]
        # Rows that are there already are left out by all ranks alike.
        results = Results(out if first else None, about)
        there = [[case for case in cases if not results.has(case.key)]]
        dist.broadcast_object_list(there)
        run(there[0], lambda _: load(folder), results, seconds=given.seconds, say=say)
    finally:
        dist.destroy_process_group()
        if first and given.weights is None:
            shutil.rmtree(folder, ignore_errors=True)
    say(f"\n{out}\n{out.with_suffix('.json')}")


def _size(text: str) -> tuple[int, int]:
    batch, prefix = text.split(",")
    return int(batch), int(prefix)


def _silent(_: str) -> None:
    pass


if __name__ == "__main__":
    main()
