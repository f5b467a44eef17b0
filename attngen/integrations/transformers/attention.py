"""The attention function of transformers' `AttentionInterface`: from what a layer passes to a form, its captures, and a call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from attngen.errors import InputError
from attngen.integrations.transformers.forms import Form, attention_of
from attngen.integrations.transformers.masks import FIX, PADDING, Mask, make_mask
from attngen.integrations.transformers.windows import causal_window

_collector: Any = None
with contextlib.suppress(ImportError):  # no name of the library's public ones, so it may go
    from transformers.utils.output_capturing import _active_collector as _collector

# What models and continuous batching pass along that changes no attention.
IGNORED = frozenset(
    {"position_ids", "use_cache", "cache", "past_key_values", "seq_idx", "deterministic", "return_dict"}
    | {"num_items_in_batch", "output_hidden_states", "output_router_logits"}
    | {"cu_seq_lens_k", "max_length_q", "max_length_k"}  # next to cu_seq_lens_q
    | {"read_index", "write_index", "logits_indices", "logits_processor_args"}
)


class _Pairs(NamedTuple):
    """Which pairs attend: fields of a `Form`, the captures of a call, and its q_offset."""

    form: dict[str, Any]
    captures: dict[str, Any]
    q_offset: Any = 0


def attention_function(backend: str, ignored: frozenset[str]) -> Callable[..., tuple[torch.Tensor, None]]:
    """What `AttentionInterface.register` takes. ignored: names of arguments that change nothing, besides `IGNORED`."""
    harmless = IGNORED | ignored

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [B, H, N, D], key [B, Hkv, Nk, D], value [B, Hkv, Nk, Dv] -> out [B, N, H, Dv] and no weights. InputError, SpecError."""
        _refuse_unknown(others, harmless)
        if _weights_are_asked_for():
            raise _no_weights()
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if query.shape[0] == 1 != key.shape[0]:  # learned queries
            query = query.expand(key.shape[0], -1, -1, -1)
        if attention_mask is None and cu_seq_lens_q is not None:
            pairs = _packed(cu_seq_lens_q, others.get("cu_seq_lens_k"), is_causal, sliding_window)
        else:
            pairs = _pairs(attention_mask, query, key, is_causal, sliding_window, cu_seq_lens_q)
        captures = pairs.captures
        if position_bias is not None:
            captures["position_bias"] = _of_pairs("position_bias", position_bias, query, key)
        sinks = s_aux if sinks is None else sinks.squeeze(-1)
        if sinks is not None:
            captures["sinks"] = sinks
        dropout = dropout if module.training else 0.0
        if dropout > 0:  # the generator's state is what checkpointing restores
            captures["dropout"] = dropout
            captures["seed"] = torch.randint(2**31 - 1, (), dtype=torch.int64, device=query.device)
        form = Form(
            softcap=softcap,
            bias=position_bias is not None,
            sinks=0 if sinks is None else sinks.dim(),
            dropout=dropout > 0,
            **pairs.form,
        )
        out = attention_of(form, backend)(query, key, value, q_offset=pairs.q_offset, scale=scaling, **captures)
        return out.transpose(1, 2).contiguous(), None

    return attention


def _pairs(
    mask: Any, query: torch.Tensor, key: torch.Tensor, is_causal: bool, window: int | None, packed: torch.Tensor | None
) -> _Pairs:
    """Of a mask of attngen's, a 4-D tensor, or none. InputError."""
    if isinstance(mask, torch.Tensor):
        return _dense(mask, query, key)
    if mask is None:
        if not is_causal or (query.shape[2] == 1 and window is None):
            return _Pairs({}, {})
        mask = _causal(query, key, window)
    if not isinstance(mask, Mask):
        fix = f"a BlockMask of FlexAttention's goes with its own implementation; {FIX}"
        raise InputError("attention_mask", "attngen's mask, a 4-D tensor, or None", type(mask).__name__, fix)
    sizes, lengths = (mask.sizes[2], mask.sizes[3]), (query.shape[2], key.shape[2])
    if sizes != lengths:
        raise InputError("attention_mask", f"one for {lengths} queries and keys", sizes, "make it for this call")
    if packed is not None and packed.shape[0] > 2 and not mask.captures.keys() - PADDING - {"shift"}:
        fix = "pass use_cache=False and position_ids that begin at 0 in each sequence: then the mask has them"
        raise InputError("cu_seq_lens_q", "nothing, or a mask that keeps its sequences apart", "a plain mask", fix)
    offset = mask.q_offset
    if isinstance(offset, torch.Tensor) and offset.device.type == "cpu" and not torch.compiler.is_compiling():
        offset = int(offset)  # of a static cache: where nobody waits for a number, it is cheaper
    return _Pairs({"mask": mask.name, "padded": mask.padded}, dict(mask.captures), offset)


def _causal(query: torch.Tensor, key: torch.Tensor, window: int | None) -> Mask:
    """For a layer that is causal and got no mask. As for SDPA, rows and keys begin together, or one query stands at the last key.
    InputError for other numbers.
    """
    (batch, _, n_q, _), n_k = query.shape, key.shape[2]
    if n_q not in (1, n_k):
        fix = f"pass is_causal=False, or a mask: where {n_q} queries stand among {n_k} keys, nothing says"
        raise InputError("attention_mask", "a mask for a causal layer with a cache", "None", fix)
    return make_mask(batch, n_q, n_k, n_k - n_q, mask_function=causal_window(window), device=query.device)


def _dense(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> _Pairs:
    """A 4-D mask: True for pairs that attend, or numbers that are added."""
    mask = _of_pairs("attention_mask", mask, query, key)
    if mask.dtype == torch.bool:
        return _Pairs({"dense": "bool"}, {"keep": mask})
    if not mask.is_floating_point():
        raise InputError("attention_mask", "a bool or a floating dtype", mask.dtype, "convert it with .bool()")
    # Minus infinity and the least finite number exclude a pair, also after a model added something to them.
    return _Pairs({"dense": "float"}, {"additive": mask, "lowest": torch.finfo(mask.dtype).min / 2})


def _of_pairs(name: str, x: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A tensor that broadcasts to [B, H, Nq, Nk]. InputError."""
    sizes = (*query.shape[:3], key.shape[2])
    if x.dim() != 4 or any(n not in (1, size) for n, size in zip(x.shape, sizes, strict=False)):
        raise InputError(name, f"4 dimensions that broadcast to {list(sizes)}", f"shape {list(x.shape)}")
    return x


def _packed(cu_q: torch.Tensor, cu_k: torch.Tensor | None, is_causal: bool, window: int | None) -> _Pairs:
    """Sequences behind one another, as in continuous batching: a sequence's last query stands at its last key."""
    cu_k = cu_q if cu_k is None else cu_k
    captures = {"cu_q": cu_q, "cu_k": cu_k}
    if not is_causal:
        return _Pairs({}, captures)
    form = make_mask(1, 1, 1, mask_function=causal_window(window), device=cu_q.device)
    return _Pairs({"mask": form.name}, captures, cu_k.diff() - cu_q.diff())


def _weights_are_asked_for() -> bool:
    """By a caller whose model does not say so to its layers, as GPT-2's: transformers collects what layers return. Whoever traces can't
    look there, and is told by the argument alone.
    """
    collected = None if _collector is None or torch.compiler.is_compiling() else _collector.get()
    return collected is not None and any(name.endswith("attentions") for name in collected)


def _no_weights() -> InputError:
    fix = 'weights are never made for all pairs: model.set_attn_implementation("eager")'
    return InputError("output_attentions", "False with attngen", True, fix)


def _refuse_unknown(others: Mapping[str, Any], harmless: frozenset[str]) -> None:
    """InputError for an argument that may change attention, and for weights that are asked for."""
    for name, x in others.items():
        if x is None or x is False or name in harmless:
            continue
        if name == "output_attentions":
            raise _no_weights()
        fix = f'{FIX}; if it changes no attention, say attngen.integrations.transformers.register(ignore=["{name}"])'
        raise InputError(name, "no argument of attention that attngen does not know", type(x).__name__, fix)
