"""The classes that vLLM asks for: what attngen supports, what a batch is, and what a layer computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attngen.errors import InputError
from attngen.integrations.interface import require_names
from attngen.integrations.layers import SINKS, Layer
from attngen.integrations.serving import SLOPE, Batch, Kind, attend_packed, attention_of, table_width, write_pages

_INTERFACE = (
    *("AttentionBackend", "AttentionCGSupport", "AttentionImpl", "AttentionMetadataBuilder"),
    *("AttentionType", "CommonAttentionMetadata"),
)
require_names("vllm", {"vllm.v1.attention.backend": _INTERFACE})

from vllm.v1.attention.backend import (  # noqa: E402  not before it is known to be the interface
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

OTHER = "choose another backend with --attention-backend"
PLAIN_CACHES = ("auto", "float16", "bfloat16")
# Options of other backends, with the value that asks for nothing.
NOTHING = {"use_alibi_sqrt": False, "chunk_lookback": -1}
ENCODERS = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)


class Backend(AttentionBackend):
    """What vLLM asks before it chooses."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [*PLAIN_CACHES]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks it up in its own list

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return [16, 32, 64, 128, 256]  # larger blocks are cut into these

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 16 <= head_size <= 256

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in [*AttentionType]

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability.major >= 8

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # calls are made by the lengths on the host

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *others: Any, **named: Any
    ) -> str | None:
        if kv_cache_dtype in (None, "auto") or str(dtype) == f"torch.{kv_cache_dtype}":
            return None
        return f"a cache of {kv_cache_dtype} next to queries of {dtype}: give --kv-cache-dtype auto"


@dataclass
class Metadata:
    """A forward's batch. rows: how many of the queries are no padding. starts: of each request's queries, on the device.
    slot_mapping: where new keys go; vLLM's cross attention sets it.
    """

    batch: Batch
    causal: bool
    rows: int
    starts: torch.Tensor
    slot_mapping: torch.Tensor


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Makes it once a forward, for the layers of one cache group."""

    # A graph would keep what the batch's calls prepare, which the next batch makes anew. vLLM captures the rest in pieces.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Requests that decode come first, so that they are one call.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        """vLLM's own shape of a batch -> ours. InputError for a mask that attngen does not know.

        common_prefix_len is of no use: requests share a prefix by sharing its pages, and vLLM always passes 0.
        """
        common = common_attn_metadata
        for name in ("mm_req_doc_ranges", "rswa_prefix_lens", "dcp_local_seq_lens"):
            if getattr(common, name, None) is not None:
                raise InputError(name, "None", "a value, which says which keys are seen", OTHER)
        causal, table = common.causal, common.block_table_tensor
        full = (causal == 0) if isinstance(causal, torch.Tensor) else None
        width = table_width(common.max_seq_len, self.kv_cache_spec.block_size, table.shape[1])
        starts = common.query_start_loc_cpu.tolist()
        batch = Batch(starts, table[:, :width], common.seq_lens, full)
        return Metadata(batch, causal is True, common.num_actual_tokens, common.query_start_loc, common.slot_mapping)


class Impl(AttentionImpl[Metadata]):
    """A layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ):
        """alibi_slopes: of each head. sliding_window: keys that a query sees, itself included. logits_soft_cap: scores are cap *
        tanh(s / cap). sinks [num_heads]: logits of a key without a value. Raises InputError for what attngen does not compute.
        """
        for name, value in others.items():
            if value is not None and value != NOTHING.get(name):
                raise InputError(name, "what attngen computes", value, OTHER)
        if kv_cache_dtype not in PLAIN_CACHES:
            fix = f"give --kv-cache-dtype auto, or {OTHER}"
            raise InputError("kv_cache_dtype", f"one of {', '.join(PLAIN_CACHES)}", repr(kv_cache_dtype), fix)
        if attn_type not in [*AttentionType]:
            raise InputError("attn_type", f"one of {', '.join(AttentionType)}", repr(attn_type), OTHER)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype, self.attn_type = kv_cache_dtype, attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks, self.sliding_window = sinks, sliding_window
        self.logits_soft_cap = logits_soft_cap or None  # 0 is none, too
        self._slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        for name, given in (("alibi_slopes", self._slopes), ("sinks", sinks)):
            if given is not None and given.shape != (num_heads,):
                raise InputError(name, f"a number for each of {num_heads} heads", f"shape {list(given.shape)}")
        _ = self._kind(True, False, None).spec  # is refused now, if at all

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write attention into output [rows, Hq, Dv], and return it. query [rows, Hq, D], key and value [rows, Hkv, *], kv_cache
        [blocks, Hkv, block, D + Dv]. Raises InputError.
        """
        if output_scale is not None or output_block_scale is not None:
            raise InputError(
                "output_scale", "None", "a quantised output", "turn off fuse_attn_quant in the pass config"
            )
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        rows = attn_metadata.rows
        query, out = query[:rows], output[:rows]
        captures = self._captures(query.device)
        if self.attn_type in ENCODERS:
            assert key is not None and value is not None  # there is no cache to have them from
            attn, starts = attention_of(self._kind(False, False, None)), attn_metadata.starts
            attend_packed(attn, query, key[:rows], value[:rows], out, self.scale, captures, starts)
            return output
        if kv_cache.dtype != query.dtype:
            raise InputError(
                "kv_cache_dtype", f"{query.dtype}, as the queries", kv_cache.dtype, "give --kv-cache-dtype auto"
            )
        mixed = attn_metadata.batch.full is not None
        attn = attention_of(self._kind(attn_metadata.causal, mixed, kv_cache.shape[2]))
        keys, values = kv_cache.split([self.head_size, kv_cache.shape[3] - self.head_size], -1)
        attn_metadata.batch.attend(attn, query, keys, values, out, self.scale, captures)
        return output

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Put new keys and values [rows, Hkv, *] where slot_mapping int [rows] says; -1 is padding."""
        if self.attn_type not in ENCODERS and kv_cache.numel():
            rows = slot_mapping.shape[0]
            write_pages(key[:rows], value[:rows], kv_cache, slot_mapping)

    def _kind(self, causal: bool, mixed: bool, page_size: int | None) -> Kind:
        layer = Layer(causal, self.sliding_window, None, self.logits_soft_cap, self.sinks is not None)
        return Kind(layer, self._slopes is not None, mixed, page_size)

    def _captures(self, device: torch.device) -> dict[str, torch.Tensor]:
        found = {} if self.sinks is None else {SINKS: self.sinks}
        if self._slopes is not None:
            self._slopes = found[SLOPE] = self._slopes.to(device)
        return found
