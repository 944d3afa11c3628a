"""Generation with transformers models over shared prompts: importing this registers the attention
implementation "hydragen".

Needs the extra `transformers`.
"""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError(
        "hydragen.transformers needs the package transformers; install hydragen with its extra: "
        "pip install '.[transformers]' in hydragen's checkout"
    )

from hydragen.transformers.attention import register
from hydragen.transformers.cache import PrefixCache
from hydragen.transformers.generate import Completion, continue_rows, generate, stream

register()
__all__ = ["Completion", "PrefixCache", "continue_rows", "generate", "stream"]
