"""Shapes without values: calls of tensors on the meta device. What a call prepares and moves runs as on a GPU; no kernel does."""

from __future__ import annotations

from typing import Any

import torch

from attngen.analysis.summaries import Axis
from attngen.backends.work import environment, table_tiles
from attngen.language.call import Call
from attngen.schedule import Schedule

__all__ = ["backward", "delta", "forward", "forward_keeping", "table_tiles", "tables"]


def forward(call: Call, facts: Any, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, see `attngen.backends`."""
    lse = call.q.new_empty(call.q.shape[:3], dtype=_real(call.q.dtype))
    return call.q.new_empty((*call.q.shape[:3], call.v.shape[3])), lse


def forward_keeping(call: Call, facts: Any, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor, None]:
    """out and lse, see `attngen.backends`; there is nothing to keep."""
    return *forward(call, facts, schedule), None


def delta(out: torch.Tensor, do: torch.Tensor, dlse: torch.Tensor | None = None) -> torch.Tensor:
    """rowsum(dO * O) - dlse, see `attngen.backends`."""
    return out.new_empty(out.shape[:3], dtype=_real(out.dtype))


def backward(
    call: Call,
    facts: Any,
    schedule: Schedule,
    lse: torch.Tensor,
    delta: torch.Tensor,
    do: torch.Tensor,
    wanted: list[str],
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Gradients, see `attngen.backends`."""
    captured = {name: torch.empty_like(call.captures[name], dtype=lse.dtype) for name in wanted}
    return torch.empty_like(call.q), torch.empty_like(call.k), torch.empty_like(call.v), captured


def tables(call: Call, facts: Any, schedule: Schedule, kernel: str) -> dict[str, torch.Tensor]:
    """What `triton.launch.tables` makes, with torch: on any device, and without values."""
    tile = schedule.tile(kernel)
    queries, keys = Axis("i", call.offset_column, call.q.shape[2]), Axis("j", 0, call.n_k)
    device, env = call.q.device, environment(call)
    if kernel == "dkv":
        return dict(facts.walk_queries.prepare(env, keys, queries, tile.block_n, device))
    return dict(facts.walk_keys.prepare(env, queries, keys, tile.block_m, device))


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
