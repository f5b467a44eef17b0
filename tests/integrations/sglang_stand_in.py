"""SGLang 0.5.23's interface, as far as a backend meets it: names, signatures and defaults are the wheel's, everything else is left out."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto
from types import SimpleNamespace
from typing import Any

import torch


class ForwardMode(IntEnum):
    EXTEND = auto()
    DECODE = auto()
    MIXED = auto()
    IDLE = auto()
    TARGET_VERIFY = auto()

    def is_decode(self) -> bool:
        return self == ForwardMode.DECODE

    def is_idle(self) -> bool:
        return self == ForwardMode.IDLE


class AttentionType(Enum):
    DECODER = "decoder"
    DECODER_BIDIRECTIONAL = "decoder_bidirectional"
    ENCODER_ONLY = "encoder_only"


class AttentionBackend:
    kv_index_translator: Any = None

    def forward(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> Any:
        if forward_batch.forward_mode.is_idle():
            return q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        run = self.forward_decode if forward_batch.forward_mode.is_decode() else self.forward_extend  # type: ignore[attr-defined]
        return run(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)


@dataclass
class KVWriteLoc:
    loc: torch.Tensor
    swa_loc: torch.Tensor | None = None
    full_loc: torch.Tensor | None = None
    physical: bool = False

    @classmethod
    def for_batch(cls, forward_batch: Any, *, swa_loc: Any = None, full_loc: Any = None) -> KVWriteLoc:
        return cls(forward_batch.out_cache_loc, swa_loc, full_loc, physical=forward_batch.out_cache_loc_is_physical)


class Pool:
    """MHATokenToKVPool: a buffer of token slots for each layer."""

    def __init__(self, slots: int, heads: int, head_dim: int, dtype: torch.dtype, layers: int = 1):
        self.dtype = dtype
        self.k_buffer, self.v_buffer = (
            [torch.full((slots, heads, head_dim), torch.nan, dtype=dtype) for _ in range(layers)] for _ in "kv"
        )

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.k_buffer[layer_id]

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.v_buffer[layer_id]

    def set_kv_buffer(self, layer: Any, loc_info: KVWriteLoc, cache_k: torch.Tensor, cache_v: torch.Tensor) -> None:
        self.k_buffer[layer.layer_id][loc_info.loc] = cache_k
        self.v_buffer[layer.layer_id][loc_info.loc] = cache_v


class WindowPool(Pool):
    """SWAKVPool: layers with windows keep their keys in slots of their own."""

    def __init__(self, *sizes: Any, mapping: torch.Tensor, windowed: tuple[bool, ...]):
        super().__init__(*sizes, layers=len(windowed))
        self.full_to_swa_index_mapping = mapping
        self.layers_mapping = {place: (place, own) for place, own in enumerate(windowed)}

    def translate_loc_from_full_to_swa(self, kv_indices: torch.Tensor) -> torch.Tensor:
        return self.full_to_swa_index_mapping[kv_indices]

    def set_kv_buffer(self, layer: Any, loc_info: KVWriteLoc, cache_k: torch.Tensor, cache_v: torch.Tensor) -> None:
        if self.layers_mapping[layer.layer_id][1]:
            assert loc_info.swa_loc is not None
            loc_info = KVWriteLoc(loc_info.swa_loc)
        super().set_kv_buffer(layer, loc_info, cache_k, cache_v)


@dataclass
class Layer:
    """RadixAttention's attributes."""

    tp_q_head_num: int
    tp_k_head_num: int
    qk_head_dim: int
    v_head_dim: int
    scaling: float
    layer_id: int = 0
    logit_cap: float = 0.0
    sliding_window_size: int = -1
    is_cross_attention: bool = False
    pos_encoding_mode: str = "NONE"
    logit_capping_method: str = "tanh"
    attn_type: AttentionType = AttentionType.DECODER
    xai_temperature_len: int = -1


@dataclass
class ForwardBatch:
    forward_mode: ForwardMode
    batch_size: int
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    out_cache_loc: torch.Tensor
    seq_lens_cpu: torch.Tensor | None = None
    extend_seq_lens_cpu: list[int] | None = None
    out_cache_loc_is_physical: bool = False
    encoder_lens: torch.Tensor | None = None
    spec_info: Any = None
    multi_item_delimiter_indices: Any = None


@dataclass
class ModelRunner:
    token_to_kv_pool: Pool
    req_to_token: torch.Tensor
    page_size: int
    use_mla_backend: bool = False
    attention_chunk_size: int | None = None
    kv_cache_dtype: Any = torch.float32
    kv_index_translator: Any = field(default_factory=lambda: SimpleNamespace(is_translating=False))

    @property
    def req_to_token_pool(self) -> Any:
        return SimpleNamespace(req_to_token=self.req_to_token)


ATTENTION_BACKEND_CHOICES = ["triton", "torch_native"]
ATTENTION_BACKENDS: dict[str, Any] = {}


def register_attention_backend(name: str) -> Any:
    def decorator(fn: Any) -> Any:
        ATTENTION_BACKENDS[name] = fn
        return fn

    return decorator


def modules() -> dict[str, types.ModuleType]:
    """What stands in sys.modules."""
    contents: dict[str, dict[str, Any]] = {
        "sglang.srt.arg_groups.choices": {
            "ATTENTION_BACKEND_CHOICES": ATTENTION_BACKEND_CHOICES,
            "add_attention_backend_choices": ATTENTION_BACKEND_CHOICES.extend,
        },
        "sglang.srt.layers.attention.attention_registry": {"register_attention_backend": register_attention_backend},
        "sglang.srt.layers.attention.base_attn_backend": {"AttentionBackend": AttentionBackend},
        "sglang.srt.layers.radix_attention": {"AttentionType": AttentionType},
        "sglang.srt.mem_cache.memory_pool": {"KVWriteLoc": KVWriteLoc},
        "sglang.srt.model_executor.forward_batch_info": {"ForwardMode": ForwardMode},
    }
    made: dict[str, types.ModuleType] = {}
    for name, names in contents.items():
        parts = name.split(".")
        for depth in range(1, len(parts)):
            above = ".".join(parts[:depth])
            made.setdefault(above, types.ModuleType(above))
        made[name] = types.ModuleType(name)
        made[name].__dict__.update(names)
    return made
