"""Use the installed wheel as a new user would. ci/wheel_check.py runs this inside an empty environment.

Arguments name the dependencies that are missing there on purpose.
"""

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import hydragen
import hydragen_reference


def check(condition: bool, message: str) -> None:
    """Stop with `message` unless `condition` holds."""
    if not condition:
        sys.exit(f"wheel check: {message}")


def main() -> None:
    """Look at what is installed, then attend once."""
    missing = sys.argv[1:]
    for package in (hydragen, hydragen_reference):
        folder = Path(str(package.__file__)).parent
        check(
            folder.is_relative_to(sys.prefix), f"{package.__name__} came from {folder}, not from {sys.prefix}"
        )
        check((folder / "py.typed").exists(), f"{package.__name__} is installed without py.typed")
    check(version("hydragen") == hydragen.__version__, "the wheel's version is not hydragen.__version__")
    check("triton" not in sys.modules or "triton" not in missing, "triton was imported though it is missing")
    for name in missing:
        check(importlib.util.find_spec(name) is None, f"{name} should be missing here")

    # Two sequences share four tokens and have three of their own: the same as dense attention.
    torch.manual_seed(0)
    q, prefix, suffix = torch.randn(2, 1, 4, 8), torch.randn(1, 4, 2, 8), torch.randn(2, 3, 2, 8)
    out = hydragen.attention(q, [(prefix, prefix), (suffix, suffix)])
    kv = torch.cat([prefix.expand(2, -1, -1, -1), suffix], dim=1).transpose(1, 2)
    dense = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), kv, kv, enable_gqa=True)
    check(torch.allclose(out, dense.transpose(1, 2), atol=1e-6), "attention is not dense attention")

    if "triton" in missing:
        try:
            hydragen.attention(q, [(prefix, prefix), (suffix, suffix)], backend="triton")
        except (ImportError, RuntimeError, ValueError) as error:
            check("triton" in str(error).lower(), f"the error does not say that triton is missing: {error}")
        else:
            check(False, "backend='triton' ran without triton")


if __name__ == "__main__":
    main()
