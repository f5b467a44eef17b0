"""Mask functions for layers that come without a mask."""

from __future__ import annotations

from typing import Any

from attngen.integrations.flex.trace import Mod


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """The library's default."""
    return kv_idx <= q_idx


def causal_window(window: int | None) -> Mod:
    """Causal, and if there is a window the last `window` keys of those."""
    if window is None:
        return causal
    return lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (kv_idx > q_idx - window)
