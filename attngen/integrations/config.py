"""A model's configuration (transformers' config.json) as the attentions that it makes. transformers itself is not needed.

    attentions(read_config("config.json"))          # each different one, with the layers that have it
    workloads(..., batches=[1], contexts=[8192])    # its calls: prefill, and decode where there is one

Whatever this can't read is an InputError that names the field: a mask is never lost in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from attngen.errors import InputError
from attngen.integrations.families import CHUNKED, FAMILIES, FULL, NO_ATTENTION, REFUSED, SLIDING, Config, Family
from attngen.integrations.layers import Layer
from attngen.language.spec import Spec
from attngen.store import Shape, Workload

BY_HAND = "write its specs in a TOML file, `attngen tune FILE.toml`"
# Other names of fields, as transformers' own `attribute_map` has them.
ALIASES = {
    "hidden_size": ("n_embd", "dim"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_hidden_layers": ("n_layer", "n_layers"),
    "sliding_window_pattern": ("_sliding_window_pattern",),
    "dtype": ("torch_dtype",),
}


@dataclass(frozen=True)
class Attention:
    """One kind of attention of a model, and the layers that have it."""

    layer: Layer
    layers: tuple[int, ...]
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int

    @property
    def spec(self) -> Spec:
        return self.layer.spec

    def shape(self, batch: int, n_q: int, n_k: int) -> Shape:
        """Of a call with so many query rows and keys."""
        return Shape(batch, self.heads_q, self.heads_kv, n_q, n_k, self.head_dim, self.head_dim_v)

    def __str__(self) -> str:
        dims = f"D{self.head_dim}" + (f" Dv{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        return f"{self.layer}: Hq{self.heads_q} Hkv{self.heads_kv} {dims}, {len(self.layers)} layers"


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration in a file, or in the config.json of a folder. InputError."""
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError("--model", "a config.json as transformers writes it", f"{path}: {problem}") from None
    if not isinstance(config, dict):
        raise InputError("--model", "a config.json as transformers writes it", f"{path}: {type(config).__name__}")
    return config


def attentions(config: Config) -> list[Attention]:
    """The different attentions of a model, in the order of its layers. Of a model with several parts, those of its text part.

    InputError for a kind of model, a field or a layer that is not known, or a size that is missing.
    """
    config = config.get("text_config", config)
    family = _family(config)
    config = _filled(config, family)
    if config.get("is_encoder_decoder") or config.get("add_cross_attention"):
        raise InputError("is_encoder_decoder", "a model without cross-attention", True, BY_HAND)
    if str(config.get("position_embedding_type", "absolute")).startswith(("relative", "alibi")):
        raise _unread("position_embedding_type", config["position_embedding_type"], "no bias of positions")
    sizes = _sizes(config)
    found: dict[Layer, list[int]] = {}
    for place, kind in enumerate(_kinds(config, family)):
        if kind not in NO_ATTENTION:
            found.setdefault(_layer(config, family, kind, place), []).append(place)
    return [Attention(layer, tuple(places), *sizes) for layer, places in found.items()]


def workloads(
    config: Config,
    batches: Sequence[int],
    contexts: Sequence[int],
    *,
    dtype: str = "",
    training: bool = False,
    padded: bool = False,
) -> list[Workload]:
    """The calls of a model: for each attention, batch and context a prefill of the whole context, and for a causal one the decoding
    of its last token, whose cache holds no more keys than the window. dtype: by default the configuration's. training: the
    prefill's backward too. padded: the same for batches with padding.
    """
    part = config.get("text_config", config)
    dtype = dtype or str(_value(part, "dtype") or "").removeprefix("torch.")
    directions = ("forward", "backward") if training else ("forward",)
    found = []
    for attention, batch, n, padding in product(attentions(config), batches, contexts, [False, True][: 1 + padded]):
        layer = attention.layer
        name = f"{part.get('model_type')}, {layer}" + (", padded" if padding else "")
        spec = layer.padded_spec if padding else layer.spec
        calls = [(n, n, directions)]
        if layer.causal:
            calls.append((1, min(n, layer.window or n, layer.chunk or n), ("forward",)))
        for n_q, n_k, passes in calls:
            read = (*spec.tensors, *spec.params)
            captures = {capture: x for capture, x in layer.captures(batch, n_k).items() if capture in read}
            found.append(Workload(name, spec, attention.shape(batch, n_q, n_k), dtype, captures, passes))
    return found


def unread_parts(config: Config) -> list[str]:
    """Names of parts of a model (a vision tower) that `attentions` leaves out."""
    parts = [name for name, value in config.items() if name.endswith("_config") and isinstance(value, Mapping)]
    return [name for name in parts if "text_config" in config and name not in ("text_config", "quantization_config")]


# -- reading ----------------------------------------------------------------------------------------------------------


def _family(config: Config) -> Family:
    kind = str(config.get("model_type"))
    if kind in FAMILIES:
        return FAMILIES[kind]
    if kind in REFUSED:
        raise InputError(
            "model_type", "a model whose masks its configuration says", f"{kind!r}, which {REFUSED[kind]}", BY_HAND
        )
    known = ", ".join(FAMILIES)
    fix = f"if its attention is one of theirs, say so in a copy of the file; else {BY_HAND}"
    raise InputError("model_type", f"one whose attention is known ({known})", repr(kind), fix)


def _filled(config: Config, family: Family) -> Config:
    """With names as of today, and the family's defaults where a field is left out."""
    renamed = {name: _value(config, name) for name, others in ALIASES.items() if any(o in config for o in others)}
    return {**family.defaults, **config, **{name: value for name, value in renamed.items() if value is not None}}


def _value(config: Config, name: str) -> Any:
    return next((config[n] for n in (name, *ALIASES.get(name, ())) if config.get(n) is not None), None)


def _sizes(config: Config) -> tuple[int, int, int, int]:
    """Query heads, kv heads, and head dims of q and v."""
    heads = _whole(config, "num_attention_heads")
    if config.get("kv_lora_rank") is not None:  # latent attention: at a call k and v have as many heads as q
        parts = [_whole(config, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
        return heads, heads, parts[0] + parts[1], parts[2]
    kv = _whole(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
    if heads % kv:
        raise InputError("num_key_value_heads", f"a divisor of num_attention_heads, {heads}", kv)
    if config.get("head_dim") is not None:
        dim = _whole(config, "head_dim")
        return heads, kv, dim, dim
    if config.get("hidden_size") is None:
        fix = "add head_dim to the file, or save it whole: AutoConfig.from_pretrained(...).save_pretrained(...)"
        raise InputError("head_dim", "head_dim, or hidden_size to divide by the heads", "neither", fix)
    hidden = _whole(config, "hidden_size")
    if hidden % heads:
        raise InputError("head_dim", f"head_dim, or a hidden_size that {heads} heads divide", f"hidden_size {hidden}")
    return heads, kv, hidden // heads, hidden // heads


def _whole(config: Config, name: str) -> int:
    value = config.get(name)
    if type(value) is int and value > 0:
        return value
    fix = "add it to the file, or save it whole: AutoConfig.from_pretrained(...).save_pretrained(...)"
    raise InputError(name, "a positive int", "none" if value is None else repr(value), fix)


def _kinds(config: Config, family: Family) -> list[str]:
    """The kind of each layer."""
    count, listed = _whole(config, "num_hidden_layers"), config.get("layer_types")
    if listed is None:
        return [family.pattern(config, place) for place in range(count)]
    if not isinstance(listed, list) or len(listed) != count:
        got = f"{len(listed)} of them" if isinstance(listed, list) else repr(listed)
        raise InputError("layer_types", f"num_hidden_layers = {count} kinds of layers", got)
    return [FULL if kind == "attention" else str(kind) for kind in listed]


def _layer(config: Config, family: Family, kind: str, place: int) -> Layer:
    bidirectional = config.get("use_bidirectional_attention")
    if bidirectional and config["model_type"] != "gemma3_text":
        raise _unread("use_bidirectional_attention", bidirectional, "it for gemma3_text alone")
    causal = (family.causal or bool(config.get("is_decoder"))) and not bidirectional
    window = chunk = None
    if kind == SLIDING:
        if not family.windows:
            raise _unread(f"layer_types[{place}]", kind, f"no window in a model of kind {config['model_type']}")
        window = _window(config, family, bool(bidirectional))
    elif kind == CHUNKED:
        chunk = _whole(config, "attention_chunk_size")
    elif kind != FULL:
        raise _unread(f"layer_types[{place}]", kind, f"one of {', '.join((FULL, SLIDING, CHUNKED, *NO_ATTENTION))}")
    elif not family.windows and config.get("sliding_window") is not None:
        raise _unread(
            "sliding_window", config["sliding_window"], f"null, as models of kind {config['model_type']} have none"
        )
    return Layer(causal, window, chunk, _soft_cap(config), family.sinks)


def _window(config: Config, family: Family, bidirectional: bool) -> int:
    if config.get("use_sliding_window") is False:
        raise InputError("use_sliding_window", "true, next to layers of sliding_attention", False)
    if config.get("sliding_window") is None and config.get("local_attention") is not None:  # on both sides together
        return _whole(config, "local_attention") // 2 + family.wider
    size = _whole(config, "sliding_window")
    return size // 2 + 1 if bidirectional else size + family.wider


def _soft_cap(config: Config) -> float | None:
    cap = config.get("attn_logit_softcapping")
    if cap is None or (isinstance(cap, (int, float)) and cap > 0):
        return None if cap is None else float(cap)
    raise InputError("attn_logit_softcapping", "a positive number or null", repr(cap))


def _unread(field: str, value: object, expected: str) -> InputError:
    return InputError(field, expected, repr(value), BY_HAND)
