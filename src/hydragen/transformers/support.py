"""Which models can work over shared prefixes, and why the others cannot."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch.nn import ModuleList
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from hydragen.host_ints import IntArray
from hydragen.transformers.tokens import check_vocabulary

_KINDS = ("full_attention", "sliding_attention")
# RecurrentGemma's name for layers that attend
_ATTENDS = (*_KINDS, "attention")
# Model types of the common interface that still do what a PrefixCache cannot serve, with what that is.
_OWN_WAYS = {
    "diffllama": "attends to two halves of its cached values apart",
    "doge": "works its mask out of all cached values of a row",
    "moshi": "has a window in its cache and none in its mask, so that answers depend on how tokens are fed",
}


def text_config(model: PreTrainedModel) -> Any:
    """Return the configuration of the model's decoder."""
    return model.config.get_text_config(decoder=True)


def check_model(model: object) -> PreTrainedModel:
    """Return `model` if it can generate over a PrefixCache; else TypeError or ValueError with the reason."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers causal LM, got {type(model).__name__}; load one with "
            'AutoModelForCausalLM.from_pretrained(path, attn_implementation="hydragen")'
        )
    name = type(model).__name__
    config = text_config(model)
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(f"model must be a decoder that generates, got {name}; use a causal LM")
    if config.model_type in _OWN_WAYS:
        raise ValueError(
            f"model must leave what it caches to its attention function, got {name} (model type "
            f"{config.model_type}), which {_OWN_WAYS[config.model_type]}; use the model's own cache"
        )
    if not (hasattr(config, "layer_types") or hasattr(config, "num_hidden_layers")):
        raise ValueError(
            f"model must be one stack of layers, got {name}, whose config has no num_hidden_layers; use the "
            "model's own cache"
        )
    if _looks_elsewhere(config):
        raise ValueError(
            f"model must attend to its own tokens in every layer, got {name} with cross-attention in layers "
            f"{list(config.cross_attention_layers)}; use the model's own cache"
        )
    others = sorted({*layer_kinds(model), *getattr(config, "layers_block_type", ())} - set(_ATTENDS))
    if others:
        raise ValueError(
            f"model must attend to all tokens or a sliding window in every layer, got {name} with "
            f"{', '.join(others)}, whose state is no list of tokens that rows could share; use the model's "
            "own cache"
        )
    found, expected = _layers_of(model), getattr(config, "num_hidden_layers", 0)
    if found is not None and found < expected:
        raise ValueError(
            f"model must have the {expected} layers that its config says, got {found}; set "
            f"num_hidden_layers = {found} in it"
        )
    if not model.is_backend_compatible():
        raise ValueError(
            f"model must call its attention through transformers' AttentionInterface, got {name}, which has "
            "it built in; use the model's own cache"
        )
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"model must take past_key_values, got {name}, whose forward does not; use a model that "
            "keeps keys and values"
        )
    causal = getattr(config, "is_causal", None) is not False and not _has_layers_that_look_ahead(model)
    if not causal or getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"model must be causal, got {name} with bidirectional attention; use a causal LM")
    if not getattr(model.config, "return_dict", True):
        raise ValueError("model.config.return_dict must be True, got False; set it so")
    implementation = attention_of(config)
    if implementation != "hydragen":
        raise ValueError(
            f'model must have attn_implementation="hydragen", got {implementation!r}; load it so, or '
            'call model.set_attn_implementation("hydragen")'
        )
    stages = getattr(getattr(model.config, "distributed_config", None), "pp_size", None) or 1
    if stages > 1:
        raise ValueError(
            f"model must have all its layers in every process, got pp_size={stages}; use tensor parallelism: "
            'tp_plan="auto" under torchrun'
        )
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise ValueError(
            "model must be on one device, or tensor parallel, got layers spread over "
            f"{sorted(map(str, devices))}; load it "
            'without device_map, or with tp_plan="auto" under torchrun'
        )
    return model


def attention_of(config: Any) -> str:
    """Return the attention implementation that a model with this configuration uses."""
    name: str = config._attn_implementation  # noqa: SLF001  (transformers has no public name for it)
    return name


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """Return what each layer that has a cache attends to."""
    config = text_config(model)
    kinds: list[str] = get_layer_types_and_kwargs(config)[0]
    return kinds[: getattr(config, "num_hidden_layers", None)]  # a config cut short may list more


def layer_windows(model: PreTrainedModel) -> list[int | None]:
    """Return the sliding window of each layer that has a cache, None for full attention."""
    window = get_layer_types_and_kwargs(text_config(model))[1].get("sliding_window")
    return [window if kind == "sliding_attention" else None for kind in layer_kinds(model)]


def expands_cached(model: PreTrainedModel) -> bool:
    """Whether the model computes with what its cache returns before it attends.

    It expands latents (multi-head latent attention), or repeats heads (JetMoE).
    """
    config = text_config(model)
    return getattr(config, "kv_lora_rank", None) is not None or config.model_type == "jetmoe"


def check_tokens(model: PreTrainedModel, given: Sequence[IntArray], begin: IntArray) -> None:
    """Raise a ValueError unless given[i] are the model's tokens and fit its positions after begin[i]."""
    vocabulary, limit = model.get_input_embeddings().num_embeddings, max_positions(model)
    for row, ids in enumerate(given):
        check_vocabulary(ids, vocabulary, f"input_ids[{row}]")
        if limit is not None and begin[row] + ids.size > limit:
            raise ValueError(
                f"row {row} must fit the model's {limit} positions{_of_rope(model)}, got "
                f"{begin[row] + ids.size} tokens; shorten the prompt"
            )


def check_prompt(model: PreTrainedModel, ids: IntArray, new_tokens: int, name: str, before: int = 0) -> None:
    """Raise a ValueError unless the model can answer `ids` [len], which follow `before` tokens."""
    vocabulary, limit = model.get_input_embeddings().num_embeddings, max_positions(model)
    if ids.size + before == 0:
        raise ValueError(f"{name} must hold a token or more, got an empty prompt; leave it out")
    check_vocabulary(ids, vocabulary, name)
    if limit is not None and before + ids.size + new_tokens > limit:
        raise ValueError(
            f"{name} must leave room for max_new_tokens={new_tokens} in the model's {limit} "
            f"positions{_of_rope(model)}, got {before + ids.size} tokens; shorten it or ask for fewer new "
            "tokens"
        )


def _of_rope(model: PreTrainedModel) -> str:
    """Say why there are fewer positions than the configuration has, if so."""
    fewer = stored_positions(model)
    if fewer is None or fewer == getattr(text_config(model), "max_position_embeddings", None):
        return ""
    return " (longrope: beyond, it turns all tokens otherwise, stored ones too)"


def max_positions(model: PreTrainedModel) -> int | None:
    """Return how many positions the model can have over a cache, if its configuration says so."""
    limits = [getattr(text_config(model), "max_position_embeddings", None), stored_positions(model)]
    return min((int(limit) for limit in limits if limit is not None), default=None)


def stored_positions(model: PreTrainedModel) -> int | None:
    """Return up to how many positions tokens that are stored stay as the model would have them.

    Rotary embeddings of the types "longrope" and "dynamic" turn all tokens otherwise once the longest
    sequence of a forward pass ends beyond that; None for all other models.
    """
    config = text_config(model)
    given = getattr(config, "rope_parameters", None) or {}
    several = given.values() if all(isinstance(x, dict) for x in given.values()) else [given]
    longest = getattr(config, "max_position_embeddings", None)
    limits = []
    for rope in several:
        kind = rope.get("rope_type")
        if kind == "longrope":
            limits.append(rope.get("original_max_position_embeddings", longest))
        elif kind is not None and "dynamic" in kind:
            limits.append(longest)
    return min((int(limit) for limit in limits if limit is not None), default=None)


def check_generate(model: PreTrainedModel) -> None:
    """Raise a ValueError if the model's own `generate` goes wrong over any cache that is kept."""
    if _of_rope(model):
        raise ValueError(
            f"{type(model).__name__}.generate leaves a kept cache out once a sequence passes the "
            f"{stored_positions(model)} positions that its longrope embedding is made for, and then goes on "
            "without it; use hydragen.generate or cache.generate"
        )


def _layers_of(model: PreTrainedModel) -> int | None:
    """Return how many layers attend in a decoder that is one list of layers; None if it is something else."""
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    numbers = {getattr(module, "layer_idx", None) for module in decoder.modules()} - {None}
    return max(len(layers), len(numbers)) if isinstance(layers, ModuleList) and numbers else None


def _looks_elsewhere(config: Any) -> bool:
    """Whether some layers attend to something else than tokens: to images, which come another way."""
    layers = getattr(config, "cross_attention_layers", None) or ()
    return any(layer < config.num_hidden_layers for layer in layers)


def _has_layers_that_look_ahead(model: PreTrainedModel) -> bool:
    """Whether attention of the decoder says that it is not causal: encoders that are loaded as causal LMs."""
    decoder = model.get_decoder()
    return any(getattr(module, "is_causal", True) is False for module in decoder.modules())
