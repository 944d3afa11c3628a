"""A model as the command line names it: what its files are, and it loaded, or what is wrong with them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

# What an answer depends on beside the tokenizer, whose work is in the prompts' token ids.
MODEL_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.index.json",
    "pytorch_model*.bin",
)  # fmt: skip


def state_of(model: str) -> dict[str, list[int]] | str | None:
    """Return what changes when a model's files do: size and time of each (ns), or the commit on the hub.

    None if nothing is known: the model is on the hub, and nothing of it has been downloaded.
    """
    folder = Path(model)
    if not folder.is_dir():
        # Not the files: those of the weights come only when the model is loaded.
        snapshot = _snapshot(model)
        return None if snapshot is None else snapshot.name
    found = {path.name: path.stat() for pattern in MODEL_FILES for path in folder.glob(pattern)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(found.items())}


def load(model: str, dtype: str, device: str) -> Any:
    """Load a model with the hydragen attention; a ValueError names a file of weights that is damaged."""
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation="hydragen", dtype=dtype)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        damaged = _damaged(model)
        if damaged is None:
            raise
        path, reason = damaged
        raise ValueError(f"{path} must hold weights, got a damaged file: {reason}; fetch it again") from error
    except KeyError as error:
        if error.args != ("hydragen",):
            raise
        # a table of attention classes, in which the name of an implementation is looked up
        raise ValueError(
            f"{model} must call its attention through transformers' AttentionInterface, got a model that has "
            "its own kinds of attention built in; use the model's own cache"
        ) from error
    return loaded.to(device).eval()


def pick(device: str) -> str:
    """Return the device to use; a ValueError says why it cannot be used."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    problem = f"--device must be cpu, or a GPU that torch finds, as cuda or cuda:1, got {device}"
    remedy = "leave it out for the GPU if there is one"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:  # which lists all that torch has names for
        raise ValueError(f"{problem}; {remedy}") from error
    try:
        if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"{problem}: torch finds {torch.cuda.device_count()} GPUs; {remedy}")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, ImportError) as error:  # torch was built without it, or it is busy
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{problem}: {reason}; {remedy}") from error
    if chosen.type == "meta":
        raise ValueError(f"{problem}, which holds no data; {remedy}")
    return device


def _snapshot(model: str) -> Path | None:
    """Return the folder of a downloaded model, named like its commit; None if there is none."""
    config = try_to_load_from_cache(model, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _damaged(model: str) -> tuple[Path, SafetensorError] | None:
    """Return the first file of weights that cannot be read, and why."""
    folder = Path(model) if Path(model).is_dir() else _snapshot(model)
    for path in sorted(folder.glob("*.safetensors")) if folder is not None else []:
        try:
            with safe_open(path, framework="pt"):  # reads the header, which says how long the file must be
                pass
        except SafetensorError as error:
            return path, error
    return None
