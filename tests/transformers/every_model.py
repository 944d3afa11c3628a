"""Every causal LM of transformers, small and with random weights, and which of them are refused."""

from __future__ import annotations

from typing import Any

import torch
from models import LATENT, SMALL, VOCABULARY
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Sizes under all their names: a configuration gets those that it has.
_SIZES: dict[str, Any] = {
    **SMALL,
    **dict.fromkeys(("ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(
        ("encoder_layers", "num_encoder_layers", "n_group", "topk_group", "first_k_dense_replace"), 1
    ),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_experts_per_tok"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "rotary_dim"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "embed_dim"), 32),
    "head_dim": 8,
    "sliding_window": 9,
}
# Set although the default is None: None stands for a number that is worked out, or for a token.
_EVEN_IF_NONE = {"head_dim", "num_key_value_heads", "eos_token_id", "pad_token_id", "bos_token_id"}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_d_head": 8}
_SLIDING = ("sliding_attention", "full_attention")
_PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
_GEMMA3N = {
    **_PER_LAYER,
    "num_hidden_layers": 4,
    "layer_types": [*_SLIDING, *_SLIDING],
    "num_kv_shared_layers": 2,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [48] * 4,
}
_GEMMA4 = {**_PER_LAYER, "global_head_dim": 16}
_DRAFT = {"vocab_size_per_layer_input": 0, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2}
# What a model type needs besides, or calls by names of its own
OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {
        "layer_types": list(_SLIDING),
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]} for kind in _SLIDING
        },
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "hidden_size": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_assistant": {"text_config": ("gemma4_text", _DRAFT), "backbone_hidden_size": 32},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {
        "text_config": {**_GEMMA4, "use_bidirectional_attention": None},
        "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
    },
    "gemma4_unified_assistant": {"text_config": ("gemma4_unified_text", _DRAFT), "backbone_hidden_size": 32},
    "gemma4_unified_text": {**_GEMMA4, "use_bidirectional_attention": None},
    "got_ocr2": {"text_config": ("qwen2", {})},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "head_dim": 4,
        "num_layers": 2,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 100,
        "split_ngram_parts": 1,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": (8, 24),
        "attention_head_size": 8,
        "feed_forward_size": 16,
    },
    "xlnet": {"d_head": 8},
    "zaya": {"num_experts_per_tok": 1},
}
OWN["qwen4_exp"] = {"text_config": OWN["qwen4_exp_text"]}
# Other layers than those of the default: name -> (model type, what differs)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text, layers that share keys": (
        "gemma4_text",
        {"num_hidden_layers": 4, "layer_types": [*_SLIDING, *_SLIDING], "num_kv_shared_layers": 2},
    ),
    "granitemoehybrid, attention only": ("granitemoehybrid", {"layer_types": ["attention", "attention"]}),
    "laguna, window": ("laguna", {"layer_types": list(_SLIDING)}),
    "lfm2, attention only": ("lfm2", {"layer_types": ["full_attention"] * 2}),
    "mllama, no cross-attention": ("mllama", {"text_config": {"cross_attention_layers": []}}),
}
# What cannot be built here, and why
NOT_BUILT = {
    "gemma3n": "needs the package timm",
    "musicgen": "AutoModelForCausalLM has no class that takes its configuration",
    "musicgen_melody": "as musicgen",
}
# Part of the reason -> model types that are refused for it
_REASONS = {
    "call its attention through transformers' AttentionInterface": """
        bart big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom codegen cpmant falcon git
        gpt_neo gpt_neox_japanese gptj marian mbart megatron-bert mpt mvp openai-gpt pegasus plbart
        prophetnet reformer rembert roformer rwkv stablelm trocr whisper xglm xlm xlnet xlstm""",
    "must be causal, got .* with bidirectional attention": """
        bert bert-generation camembert data2vec-text electra ernie roberta roberta-prelayernorm roc_bert
        xlm-roberta xlm-roberta-xl xmod""",
    "whose state is no list of tokens": """
        axk2 bamba deepseek_v32 deepseek_v4 falcon_h1 falcon_mamba glm_moe_dsa granitemoehybrid hy_v4
        inkling_text jamba kimi_linear lfm2 lfm2_moe llama4 llama4_text mamba mamba2 minimax
        minimax_m3_vl_text nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text
        qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma zamba zamba2 zaya""",
    "model type diffllama.*two halves of its cached values": "diffllama",
    "model type doge.*mask out of all cached values": "doge",
    "model type moshi.*answers depend on how tokens are fed": "moshi",
    "must be one stack of layers": "blt",
    r"cross-attention in layers \[1\]": "mllama",
    "must take past_key_values": "gemma4_assistant gemma4_unified_assistant",
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}
NAMES = [name for name in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS}) if name not in NOT_BUILT]


def build(name: str) -> PreTrainedModel:
    """A model of a type, or a variant of one, in float32 and with attention "hydragen"."""
    model_type, changes = VARIANTS.get(name, (name, {}))
    config = _small(CONFIG_MAPPING[model_type], {**OWN.get(model_type, {}), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if weight.dim() == 1 and "norm" not in part:
                weight.normal_(0, 0.5)  # biases and sinks are born as zeros, or not at all
            elif weight.dim() > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5)
                if any(
                    x in part for x in ("q_proj", "k_proj", "q_b_proj", "kv_a_proj", "qkv", "query", "c_attn")
                ):
                    weight.mul_(2.5)
        model.get_input_embeddings().weight.normal_(0, 1)
    model.set_attn_implementation("hydragen")
    return model


def _small(kind: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    """A small configuration, with those within it."""
    default = kind()
    sizes = dict(_SIZES)
    if getattr(default, "kv_lora_rank", None) is not None:
        sizes.update(LATENT)
        del sizes["head_dim"]  # of the rotary part, which is set by its own name
        if default.q_lora_rank is None:
            del sizes["q_lora_rank"]
    given = {name: size for name, size in sizes.items() if _takes(kind, default, name)}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if kinds and _takes(kind, default, "layer_types"):
        given["num_hidden_layers"] = count = max(2, len(kinds))
        given["layer_types"] = (kinds * 2)[:count]
    within = {}
    for name, inner in kind.sub_configs.items():
        mine = own.get(name, {})
        if isinstance(mine, tuple):  # of a type that the configuration leaves open
            within[name] = _small(CONFIG_MAPPING[mine[0]], mine[1])
        elif hasattr(inner, "sub_configs"):
            within[name] = _small(inner, mine)
    return kind(**{**given, **own, **within})


def _takes(kind: type[PreTrainedConfig], default: PreTrainedConfig, name: str) -> bool:
    """Whether a configuration has `name`, can be given it, and does not leave it out by default."""
    target = kind.attribute_map.get(name, name)
    if isinstance(getattr(kind, name, None), property) or isinstance(getattr(kind, target, None), property):
        return False
    held = vars(default)  # not by getattr, which some refuse for what may differ from layer to layer
    return target in held and (held[target] is not None or name in _EVEN_IF_NONE)
