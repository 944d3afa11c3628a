"""What a name or folder on the command line holds: a model, and its tokenizer if it has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer

# Every tokenizer that transformers saves leaves one of these; so do the formats it reads beside its own.
TOKENIZER_FILES = ("*token*", "*tekken*", "vocab*", "*.model", "*.tiktoken")


def check_name(model: str) -> None:
    """Raise a ValueError if `model` is no folder and cannot be the name of a model on the hub.

    Names there are owner/name. The few older ones without an owner count if they have been downloaded.
    """
    if Path(model).is_dir():
        return
    parts = model.split("/")
    named = len(parts) == 2 and all(parts) and not model.startswith((".", "~"))
    if named or (len(parts) == 1 and _is_downloaded(model)):
        return
    found = "that is a file" if Path(model).is_file() else "there is no such folder"
    raise ValueError(
        f"--model must be a folder with a transformers model, or owner/name on the hub, got {model}: {found}"
        "; check the path, or write the owner too"
    )


def tokenizer_of(model: str) -> Any:
    """Return the model's tokenizer, or None if the folder has none."""
    folder = Path(model)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(model)


def _is_downloaded(model: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(model, "config.json"), str)
    except ValueError:  # it cannot be a name there
        return False
