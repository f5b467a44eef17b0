"""What a spec's expressions read on the CPU: captures and params by name, and positions that broadcast."""

from __future__ import annotations

from typing import Any

import torch

from attngen.backends.cpu.loads import check_loads, checked_loads
from attngen.language.call import Call
from attngen.language.programs import evaluate


def real_of(call: Call) -> torch.dtype:
    """What a call is computed in."""
    return torch.float64 if call.q.dtype == torch.float64 else torch.float32


def environment(call: Call, real: torch.dtype) -> dict[str, Any]:
    """Captures, floats in the computing dtype, and params."""
    if not call.captures:
        return call.params
    captures = {n: t.detach().to(real) if t.is_floating_point() else t for n, t in call.captures.items()}
    return {**captures, **call.params}


def offsets_of(call: Call) -> list[int]:
    """The position of each batch's first query."""
    if isinstance(call.q_offset, torch.Tensor):
        return call.q_offset.tolist()
    return [call.q_offset] * call.q.shape[0]


def sinks_of(call: Call, env: dict[str, Any], offsets: list[int], real: torch.dtype) -> torch.Tensor:
    """The sink's logits [B, Hq, Nq], in natural base. InputError if it loads outside a captured tensor."""
    heads, rows = call.q.shape[1:3]
    sinks = torch.empty(call.q.shape[:3], dtype=real)
    checks = checked_loads(call.spec.sink, isinstance(call.q_offset, torch.Tensor))
    for b, offset in enumerate(offsets):
        scope = {**env, **positions(b, range(heads), offset, rows, 0, 1), "q_offset": offset}
        check_loads(checks, scope, None, real)
        sinks[b] = torch.as_tensor(evaluate(call.spec.sink, scope, real=real)).expand(heads, rows, 1).squeeze(-1)
    return sinks


def positions(b: int, heads: range, first: int, rows: int, start: int, stop: int) -> dict[str, Any]:
    """b, h, i and j of a tile: they broadcast to [heads, rows, keys], or [rows, keys] for a single head."""
    return {
        "b": b,
        "h": heads[0] if len(heads) == 1 else torch.arange(heads.start, heads.stop).view(-1, 1, 1),
        "i": torch.arange(first, first + rows).view(-1, 1),
        "j": torch.arange(start, stop),
    }


def axis_scopes(call: Call, env: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What expressions read along all queries, and along all keys: they broadcast to [B, H, N]."""
    offset = call.offset_column
    place: dict[str, Any] = {
        "b": torch.arange(call.q.shape[0]).view(-1, 1, 1),
        "h": torch.arange(call.q.shape[1]).view(1, -1, 1),
        "q_offset": offset,
    }
    rows = torch.arange(call.q.shape[2]).view(1, 1, -1) + offset
    return {**env, **place, "i": rows}, {**env, **place, "j": torch.arange(call.n_k).view(1, 1, -1)}


def walk_scope(call: Call) -> dict[str, Any]:
    """What walks and their tables read."""
    return {
        **call.captures,
        **call.params,
        "b": torch.arange(call.q.shape[0]).view(-1, 1, 1),
        "h": torch.arange(call.q.shape[1]).view(1, -1, 1),
        "q_offset": call.offset_column,
    }
