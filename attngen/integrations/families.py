"""What kinds of models attend like, as far as their configurations leave it unsaid: the defaults and layer patterns of transformers'
classes, as plain data. A kind that is not listed is refused, since a mask that nobody read would be lost in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]  # a configuration, with the defaults of its family filled in

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
NO_ATTENTION = ("linear_attention", "conv", "mamba", "moe")  # layers that mix tokens in another way


@dataclass(frozen=True)
class Family:
    """defaults: of fields that a configuration may leave out. pattern: the kind of a layer by its place, where `layer_types` does
    not list it. windows: whether the model reads sliding_window at all. wider: what is added to it, since some families count the
    distance and others the keys. sinks: see `Layer`.
    """

    defaults: Config = field(default_factory=dict)
    causal: bool = True
    pattern: Callable[[Config, int], str] = lambda config, layer: FULL
    windows: bool = False
    wider: int = 0
    sinks: bool = False


def _every_layer(config: Config, layer: int) -> str:
    return SLIDING if config.get("sliding_window") is not None else FULL


def _last_full(config: Config, layer: int) -> str:
    """Windows, and every so many layers full attention."""
    return SLIDING if (layer + 1) % config["sliding_window_pattern"] else FULL


def _first_full(config: Config, layer: int) -> str:
    return SLIDING if layer % config["global_attn_every_n_layers"] else FULL


def _upper_layers(config: Config, layer: int) -> str:
    return SLIDING if config.get("use_sliding_window") and layer >= config["max_window_layers"] else FULL


def _chunks(config: Config, layer: int) -> str:
    rotary = config.get("no_rope_layers") or []
    with_rope = bool(rotary[layer]) if rotary else (layer + 1) % config["no_rope_layer_interval"] != 0
    return CHUNKED if with_rope and config.get("attention_chunk_size") is not None else FULL


_PLAIN = Family()
_ENCODER = Family(causal=False)
_QWEN = {"num_key_value_heads": 32, "max_window_layers": 28, "sliding_window": 4096}
_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096}
_LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

FAMILIES: Mapping[str, Family] = {
    "llama": _PLAIN,
    "phi": _PLAIN,
    "granite": _PLAIN,
    "cohere": _PLAIN,
    "olmo": _PLAIN,
    "olmo2": _PLAIN,
    "gpt2": _PLAIN,
    "gpt_neox": _PLAIN,
    "opt": _PLAIN,
    "deepseek_v2": Family(_LATENT),
    "deepseek_v3": Family(_LATENT),
    "stablelm": Family({"num_key_value_heads": 32}),
    "seed_oss": Family({"num_key_value_heads": 8, "head_dim": 128}),
    "glm": Family({"num_key_value_heads": 2, "head_dim": 128}),
    "glm4": Family({"num_key_value_heads": 2, "head_dim": 128}),
    "gemma": Family({"num_key_value_heads": 16, "head_dim": 256}),
    "mistral": Family({"num_key_value_heads": 8, "sliding_window": 4096}, pattern=_every_layer, windows=True),
    "mixtral": Family({"num_key_value_heads": 8}, pattern=_every_layer, windows=True),
    "ministral": Family({"num_key_value_heads": 8, "sliding_window": 4096}, pattern=_every_layer, windows=True),
    "starcoder2": Family({"num_key_value_heads": 2}, pattern=_every_layer, windows=True),
    "phi3": Family(pattern=_every_layer, windows=True),
    "qwen2": Family(_QWEN, pattern=_upper_layers, windows=True),
    "qwen3": Family({**_QWEN, "head_dim": 128}, pattern=_upper_layers, windows=True),
    "gemma2": Family(
        {**_GEMMA, "attn_logit_softcapping": 50.0, "sliding_window_pattern": 2}, pattern=_last_full, windows=True
    ),
    "gemma3_text": Family({**_GEMMA, "sliding_window_pattern": 6}, pattern=_last_full, windows=True),
    "cohere2": Family({"sliding_window": 4096, "sliding_window_pattern": 4}, pattern=_last_full, windows=True),
    "olmo3": Family({"sliding_window": 4096, "sliding_window_pattern": 4}, pattern=_last_full, windows=True),
    "gpt_oss": Family(
        {
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "sliding_window_pattern": 2,
        },
        pattern=_last_full,
        windows=True,
        sinks=True,
    ),
    "llama4_text": Family(
        {"num_key_value_heads": 8, "head_dim": 128, "attention_chunk_size": 8192, "no_rope_layer_interval": 4},
        pattern=_chunks,
    ),
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "electra": _ENCODER,
    "distilbert": _ENCODER,
    "vit": _ENCODER,
    "modernbert": Family(
        {"local_attention": 128, "global_attn_every_n_layers": 3},
        causal=False,
        pattern=_first_full,
        windows=True,
        wider=1,
    ),
}

# Kinds whose attention is another one than their sizes say: why they are refused.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("bloom", "mpt", "falcon"), "may have ALiBi, which the configuration does not spell out"),
    **dict.fromkeys(("t5", "mt5", "umt5"), "has relative position biases and cross-attention"),
    **dict.fromkeys(("bart", "mbart", "whisper", "t5gemma", "marian", "pegasus"), "has cross-attention"),
    **dict.fromkeys(("deepseek_v32", "deepseek_v4", "minimax_m3_vl"), "attends keys that an indexer chooses"),
    **dict.fromkeys(("mamba", "mamba2", "rwkv"), "has no attention"),
}
