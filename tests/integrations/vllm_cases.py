"""A batch through attngen's classes for vLLM, those of the wheel and those that stand in for it alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests.integrations.serving_cases import Case, Inputs


def common_metadata(classes: Any, case: Case, inputs: Inputs, padding: int = 0) -> Any:
    """vLLM's batch. padding: rows behind the last request's, as piecewise graphs have them."""
    starts = torch.tensor(case.starts, dtype=torch.int32)
    causal = torch.tensor(case.causal) if isinstance(case.causal, tuple) else case.causal
    return classes.CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor(case.lengths, dtype=torch.int32),
        num_reqs=len(case.requests),
        num_actual_tokens=case.rows,
        max_query_len=max(new for _, new in case.requests),
        max_seq_len=max(case.lengths),
        block_table_tensor=inputs.table,
        slot_mapping=torch.cat([inputs.slots, torch.full((padding,), -1)]),
        causal=causal,
    )


def config_of() -> Any:
    """As much of vLLM's configuration as a builder looks at."""
    return SimpleNamespace(speculative_config=None, parallel_config=SimpleNamespace(decode_context_parallel_size=1))


def cache_of(case: Case, inputs: Inputs, interleaved: bool = False) -> torch.Tensor:
    """vLLM's cache [blocks, Hkv, block, 2 D], in the memory order of either layout; what nobody wrote is no number."""
    shape = (inputs.blocks, case.kv_heads, case.block, 2 * case.head_dim)
    order = (0, 2, 1, 3) if interleaved else (0, 1, 2, 3)
    made = torch.full([shape[n] for n in order], torch.nan, dtype=inputs.q.dtype).permute(order)
    assert made.shape == shape
    return made


def run(
    backend: Any,
    classes: Any,
    case: Case,
    inputs: Inputs,
    *,
    interleaved: bool = False,
    padding: int = 3,
    **options: Any,
) -> torch.Tensor:
    """out [rows + padding, Hq, D]: new keys are written to the cache, then attention reads it there."""
    impl = backend.get_impl_cls()(
        case.heads,
        case.head_dim,
        case.scale,
        case.kv_heads,
        case.slopes,
        case.window,
        "auto",
        case.soft_cap,
        **({"sinks": case.sinks_of(inputs.q.dtype)} if case.sinks else {}),
        **options,
    )
    spec = SimpleNamespace(block_size=case.block)
    builder = backend.get_builder_cls()(spec, ["layer"], config_of(), torch.device("cpu"))
    metadata = builder.build(0, common_metadata(classes, case, inputs, padding))
    cache = cache_of(case, inputs, interleaved)
    for row, (k, v) in enumerate(inputs.old):
        impl.do_kv_cache_update(None, k, v, cache, inputs.cached_slots(case, row))
    q, k, v = (
        torch.cat([t, torch.full_like(t[:1], torch.nan).expand(padding, -1, -1)])
        for t in (inputs.q, inputs.k, inputs.v)
    )
    impl.do_kv_cache_update(None, k, v, cache, common_metadata(classes, case, inputs, padding).slot_mapping)
    out = torch.zeros_like(q)
    assert impl.forward(None, q, k, v, cache, metadata, out) is out
    assert out[case.rows :].eq(0).all()  # padding is left alone
    return out[: case.rows]
