"""Small random-weight models of every family, with attention peaked so that it matters where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hydragen.transformers  # noqa: F401  (registers the attention implementation)

VOCABULARY = 97
# Every model is of this size; each family adds its own.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
_LATENT: dict[str, Any] = {
    **LATENT,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# Parts of the names of weights that queries and keys come from
_PEAKED = (
    "q_proj.weight",
    "k_proj.weight",
    "q_b_proj",
    "kv_a_proj",
    "self_attention.kv_proj",
    "self_attention.experts.input",
)
# Name -> (model type, what differs). A window of 9 is shorter than every prompt of the tests.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "codellama": ("llama", {"num_key_value_heads": 4, "rope_theta": 1e6}),
    "mistral": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "gemma2": (
        "gemma2",
        {"head_dim": 8, "sliding_window": 9, "attn_logit_softcapping": 12.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 9,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 8, "sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v2": ("deepseek_v2", {**_LATENT, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    # Two experts a token choose its queries: as many heads as num_key_value_heads times two.
    "jetmoe": ("jetmoe", {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def config_of(family: str, **changes: Any) -> Any:
    model_type, own = FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**SMALL, **own, **changes})


def make_model(family: str, attention: str = "hydragen", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model in float32 whose attention is peaked; the same weights for the same seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" not in name:
                parameter.normal_(0, 0.5)  # biases and sinks are born as zeros, or not at all
            elif parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            if any(part in name for part in _PEAKED):
                parameter.mul_(3.5)
            if "q_norm" in name or "k_norm" in name:
                parameter.add_(3.0)
        embedding = model.get_input_embeddings().weight
        embedding.normal_(0, 1)
        model.get_output_embeddings().weight.normal_(0, 1)
    model.set_attn_implementation(attention)
    return model.eval()


@dataclass
class Entropy:
    """Attention's entropy as a share of the largest possible, summed over queries with 2 keys or more."""

    total: float = 0.0
    most: float = 0.0


@contextmanager
def watched_entropy(model: PreTrainedModel) -> Iterator[Entropy]:
    """Count the entropy of the eager attention weights while the model runs."""
    found = Entropy()
    hooks = []

    def look(_module: object, _args: object, output: tuple[Tensor, Tensor]) -> None:
        weights = output[1].double()  # [rows, heads, tokens, keys]
        keys = (weights > 0).sum(-1).clamp(min=2)
        found.total += float(-torch.xlogy(weights, weights).sum())
        found.most += float(keys.log().sum())

    for name, module in model.named_modules():
        if name.endswith(("self_attn", "self_attention")):
            hooks.append(module.register_forward_hook(look))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


__all__ = ["ALL_ATTENTION_FUNCTIONS", "FAMILIES", "VOCABULARY", "config_of", "make_model", "watched_entropy"]
