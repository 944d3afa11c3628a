"""What the command line refuses before a model is loaded, in the words of its options."""

# transformers takes seconds to import, which --help need not take: functions import it.

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydragen.transformers.jsonl import Prompt


def two_levels(tree: str | None) -> tuple[int, int]:
    """Return the nodes and tokens of a tree like 8x2048; none if there is no tree."""
    if tree is None:
        return 0, 0
    # Not isdigit, for which ² is a digit and int does not.
    found = re.fullmatch("([0-9]{1,9})x([0-9]{1,9})", tree)
    branches, tokens = map(int, found.groups()) if found else (0, 0)
    if not (branches and tokens):
        raise ValueError(
            f"--tree must be like 8x2048, nodes x tokens, each from 1 to 999,999,999, got {tree[:60]}"
        )
    return branches, tokens


def sampling_of(
    n: int, temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None
) -> dict[str, Any]:
    """Return what the library calls these options; a ValueError says which do not go together."""
    from hydragen.transformers.sampling import Sampling

    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature must be positive, or 0 for greedy, got {temperature}; leave it out")
    for name, share in (("--top-p", top_p), ("--min-p", min_p)):
        if share is not None and not 0 < share <= 1:
            raise ValueError(
                f"{name} must be above 0 and at most 1, got {share}; leave it out for all tokens"
            )
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    if temperature == 0:
        greedy = "with --temperature 0, which always takes the likeliest token"
        if n > 1:
            raise ValueError(f"-n must be 1 {greedy}: all answers would be the same, got {n}; leave one out")
        for name, value in filters.items():
            if value is not None:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} must not stand {greedy}, got {value}; leave one of them out")
        return {"do_sample": False}
    if temperature is None and n == 1 and all(value is None for value in filters.values()):
        return {"do_sample": False}
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.0 if temperature is None else temperature}
    sampling |= filters
    Sampling(**sampling)  # raises what the first answer would
    return sampling


def check_sizes(**sizes: int | None) -> None:
    """Raise a ValueError for a size that the library would refuse once the model is loaded."""
    from hydragen.host_ints import as_positive_int

    for name, size in sizes.items():
        if size is not None:
            as_positive_int(size, f"--{name.replace('_', '-')}")


def check_prompts(model: Any, prompts: dict[str, Prompt], new_tokens: int) -> None:
    """Raise a ValueError that names file and line of a prompt which the model cannot answer."""
    import numpy as np

    from hydragen.transformers.support import check_prompt

    for where, prompt in prompts.items():
        check_prompt(model, np.array(prompt.ids, dtype=np.int64), new_tokens, where)


def config_name(path: Path) -> str:
    """Return what to call a model: its file, or the folder of its config.json."""
    return path.resolve().parent.name if path.name == "config.json" else path.resolve().stem
