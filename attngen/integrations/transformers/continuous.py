"""Continuous batching: `model.generate_batch`, `model.init_continuous_batching`, `transformers serve`.

It puts all requests behind one another and gives attention the ends of their sequences, which is attngen's packed call
(`attngen.integrations.transformers.attention`). But it knows the implementations that can do this by name.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

_allowed: set[str] = set()


def allow(name: str) -> None:
    """Let continuous batching keep an implementation of this name. Where the version of transformers has no such step, it says itself
    that it does not know the name.
    """
    try:
        from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager as Manager
    except ImportError:
        return
    choose = getattr(Manager, "switch_to_cb_friendly_attn", None)
    if choose is None:
        return
    _allowed.add(name)
    if getattr(choose, "knows_attngen", False):
        return

    @wraps(choose)
    def choose_or_keep(self: Any, model: Any, *args: Any, **named: Any) -> Any:
        return None if model.config._attn_implementation in _allowed else choose(self, model, *args, **named)

    choose_or_keep.knows_attngen = True  # type: ignore[attr-defined]
    Manager.switch_to_cb_friendly_attn = choose_or_keep  # type: ignore[method-assign]
