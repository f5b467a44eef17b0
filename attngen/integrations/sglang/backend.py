"""SGLang's attention backend: what a batch is, and what a layer computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from attngen.errors import InputError
from attngen.integrations.interface import require_names
from attngen.integrations.layers import SINKS, Layer
from attngen.integrations.serving import Batch, Kind, attention_of, table_width

_INTERFACE: Mapping[str, tuple[str, ...]] = {
    "sglang.srt.layers.attention.base_attn_backend": ("AttentionBackend",),
    "sglang.srt.layers.radix_attention": ("AttentionType",),
    "sglang.srt.mem_cache.memory_pool": ("KVWriteLoc",),
    "sglang.srt.model_executor.forward_batch_info": ("ForwardMode",),
}
require_names("sglang", _INTERFACE)

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend  # noqa: E402  not before it is known to be the interface
from sglang.srt.layers.radix_attention import AttentionType  # noqa: E402
from sglang.srt.mem_cache.memory_pool import KVWriteLoc  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402

OTHER = "choose another --attention-backend"
LARGEST_PAGE = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OTHER_MASKS = ("spec_info", "encoder_lens", "multi_item_delimiter_indices", "dcp_kv_mask")  # of a batch
# Attributes of a layer, with the value that asks for nothing more than attngen computes.
NOTHING = {"is_cross_attention": False, "pos_encoding_mode": "NONE", "logit_capping_method": "tanh"}
MODES = (ForwardMode.EXTEND, ForwardMode.DECODE, ForwardMode.MIXED)


@dataclass
class Metadata:
    """A forward's requests, of layers that see all and of those whose windows have a pool of their own. swa_loc: where the latter put new
    keys.
    """

    full: Batch
    window: Batch | None = None
    swa_loc: torch.Tensor | None = None


class Backend(AttentionBackend):
    """Reads SGLang's pool of token slots [slots, Hkv, D] in place, as pages: with --page-size 1 each token is one."""

    forward_metadata: Metadata | None = None

    def __init__(self, model_runner: Any):
        """Raises InputError for a cache that attngen does not read."""
        super().__init__()
        pool = model_runner.token_to_kv_pool
        if model_runner.use_mla_backend:
            raise InputError("model", "keys and values of each head", "a model with latent attention (MLA)", OTHER)
        if pool.dtype not in DTYPES or getattr(pool, "is_quantized_kv_cache", False):
            got, fix = model_runner.kv_cache_dtype, f"leave out --kv-cache-dtype, or {OTHER}"
            raise InputError("--kv-cache-dtype", "float16, bfloat16 or float32", got, fix)
        if getattr(model_runner.kv_index_translator, "is_translating", False):
            raise InputError("the cache", "slots that are physical", "the unified pool, whose are not", OTHER)
        if model_runner.attention_chunk_size is not None:
            raise InputError("attention_chunk_size", "None", model_runner.attention_chunk_size, OTHER)
        self.page_size = model_runner.page_size
        if not 1 <= self.page_size <= LARGEST_PAGE:
            raise InputError("--page-size", f"from 1 to {LARGEST_PAGE}", self.page_size)
        self.kv_index_translator = model_runner.kv_index_translator
        self.req_to_token, self.token_to_kv_pool = model_runner.req_to_token_pool.req_to_token, pool

    # -- a batch ------------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Read a batch before its layers run. Raises InputError for one whose mask attngen does not know."""
        batch, self.forward_metadata = forward_batch, None
        if batch.forward_mode.is_idle():
            return
        if batch.forward_mode not in MODES:
            raise InputError("forward_mode", "extend, decode or mixed", batch.forward_mode.name, OTHER)
        for name in OTHER_MASKS:
            if getattr(batch, name, None) is not None:
                raise InputError(name, "None", "a value, which says which keys are seen", OTHER)
        counts = [1] * batch.batch_size if batch.forward_mode.is_decode() else batch.extend_seq_lens_cpu
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + int(count))
        slots = self._slots(batch)
        self.forward_metadata = Metadata(self._batch(starts, slots, batch.seq_lens))
        if self._has_window_pool:
            translate = self.token_to_kv_pool.translate_loc_from_full_to_swa
            self.forward_metadata.window = self._batch(starts, translate(slots), batch.seq_lens)
            self.forward_metadata.swa_loc = translate(batch.out_cache_loc)

    def _slots(self, batch: Any) -> torch.Tensor:
        """The slot of each page's first token, [requests, pages]."""
        most = self.req_to_token.shape[1] // self.page_size
        longest = most * self.page_size if batch.seq_lens_cpu is None else int(batch.seq_lens_cpu.max())
        width = table_width(longest, self.page_size, most)
        return self.req_to_token[batch.req_pool_indices, : width * self.page_size : self.page_size]

    def _batch(self, starts: list[int], slots: torch.Tensor, lengths: torch.Tensor) -> Batch:
        return Batch(starts, slots // self.page_size, lengths)

    @property
    def _has_window_pool(self) -> bool:
        return hasattr(self.token_to_kv_pool, "translate_loc_from_full_to_swa")

    # -- graphs -------------------------------------------------------------------------------------------------------

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Raises InputError: a graph would keep the page table of the batch that it was captured with."""
        _no_graph("decode")

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Raises InputError inside of a capture."""
        if in_capture:
            _no_graph("decode")
        self.init_forward_metadata(forward_batch)

    def init_forward_metadata_for_breakable_cuda_graph_capture(self, forward_batch: Any) -> None:
        """Raises InputError."""
        _no_graph("prefill")

    # -- a layer ------------------------------------------------------------------------------------------------------

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        """q [rows, Hq * D], k and v [rows, Hkv, *] or nothing new -> [rows, Hq * Dv]. options: sinks [Hq]. Raises InputError."""
        sinks = options.pop("sinks", None)
        kind = self._kind(layer, sinks, options)
        metadata, pool = self.forward_metadata, self.token_to_kv_pool
        assert metadata is not None  # of an idle batch nobody asks
        if save_kv_cache and k is not None:
            pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch, swa_loc=metadata.swa_loc), k, v)
        windowed = metadata.window is not None and pool.layers_mapping[layer.layer_id][1]
        batch = metadata.window if windowed else metadata.full
        assert batch is not None
        keys, values = (self._pages(buffer(layer.layer_id)) for buffer in (pool.get_key_buffer, pool.get_value_buffer))
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = q.new_empty(queries.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        out[batch.starts[-1] :] = 0  # rows that fill up the batch
        captures = {} if sinks is None else {SINKS: sinks}
        batch.attend(attention_of(kind), queries, keys, values, out, layer.scaling, captures)
        return out.flatten(1)

    forward_extend = forward_decode  # the batch knows how many queries each request has

    def _pages(self, buffer: torch.Tensor) -> torch.Tensor:
        """[slots, Hkv, *] as [pages, Hkv, page size, *], in place."""
        if buffer.dim() != 3:
            raise InputError(
                "the cache", "[slots, Hkv, head dim]", f"shape {list(buffer.shape)}", "leave its layout as it is"
            )
        return buffer.unflatten(0, (-1, self.page_size)).transpose(1, 2)

    def _kind(self, layer: Any, sinks: torch.Tensor | None, options: Mapping[str, Any]) -> Kind:
        """What a layer computes. InputError for what it must not lose."""
        for name, value in options.items():
            if value is not None:
                raise InputError(name, "what attngen computes", value, OTHER)
        for name, nothing in NOTHING.items():
            if getattr(layer, name) != nothing:
                raise InputError(f"the layer's {name}", nothing, getattr(layer, name), OTHER)
        if layer.xai_temperature_len > 0:
            raise InputError("the layer's xai_temperature_len", "none", layer.xai_temperature_len, OTHER)
        if layer.attn_type not in (AttentionType.DECODER, AttentionType.ENCODER_ONLY):
            raise InputError("the layer's attn_type", "decoder or encoder_only", layer.attn_type.value, OTHER)
        causal = layer.attn_type == AttentionType.DECODER
        window = layer.sliding_window_size + 1 if layer.sliding_window_size > -1 else None  # theirs is a distance
        return Kind(Layer(causal, window, None, layer.logit_cap or None, sinks is not None), page_size=self.page_size)


def _no_graph(phase: str) -> NoReturn:
    fix = f"start with --cuda-graph-backend-{phase}=disabled"
    raise InputError(f"CUDA graphs of {phase}", "none with attngen's attention", "a capture", fix)
