"""What a model's generation_config asks for and hydragen.generate does not do: it is told."""

from __future__ import annotations

import warnings

from transformers import PreTrainedModel

# Fields of a generation_config that change which tokens are chosen, with what leaves them alone. Those that
# hydragen.generate has arguments for (temperature, do_sample, max_new_tokens, ...) are the caller's to give.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "sequence_bias": (None, {}, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "num_beams": (None, 1),
    "guidance_scale": (None, 1.0),
    "stop_strings": (None, []),
    "watermarking_config": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "penalty_alpha": (None, 0.0),
    "prompt_lookup_num_tokens": (None,),
    "max_time": (None,),
    "renormalize_logits": (None, False),
    "remove_invalid_values": (None, False),
}


def warn_of_defaults(model: PreTrainedModel) -> None:
    """Warn of what the model's generation_config asks for and only its own `generate` does."""
    config = model.generation_config
    asked = {name: getattr(config, name, None) for name in _NEUTRAL}
    found = [f"{name}={value!r}" for name, value in asked.items() if value not in _NEUTRAL[name]]
    if found:
        warnings.warn(
            f"the model's generation_config asks for {', '.join(found)}, which hydragen.generate does not "
            "do; model.generate(ids, past_key_values=cache.fork(n)) does, over the same shared prefix",
            UserWarning,
            stacklevel=3,
        )
