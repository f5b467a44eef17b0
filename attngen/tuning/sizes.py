"""Sizes that a search derives from the one it is about."""

from __future__ import annotations

import math
from dataclasses import replace

from attngen.store import Shape

CHECK_LENGTH = 1000  # the dense check's longest sequence; no multiple of a tile, so that tails are checked too
CHECK_PAIRS = 32e6  # the dense check's largest matrix, in elements over all heads


def small_shape(shape: Shape) -> Shape:
    """The same attention at a size whose dense matrix fits anywhere: heads keep their ratio."""
    group = shape.heads_q // shape.heads_kv
    batch, kv = min(shape.batch, 2), min(shape.heads_kv, 2)
    longest = min(CHECK_LENGTH, int(math.sqrt(CHECK_PAIRS / (batch * kv * group))))
    n_q, n_k = min(shape.n_q, longest), min(shape.n_k, longest)
    return replace(shape, batch=batch, heads_q=kv * group, heads_kv=kv, n_q=n_q, n_k=n_k)


def offset_of(shape: Shape) -> int:
    """Where the queries of a tuned shape stand: fewer queries than keys are the last ones, as in decoding."""
    return max(0, shape.n_k - shape.n_q)
