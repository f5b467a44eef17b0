"""Partial softmax states and their merge: what every tiling, split, union of pieces and ring is made of.

For a query row and a set of keys with logits s and values v, the state is

    m = max(s)     l = sum exp(s - m)     o = sum exp(s - m) * v

The states of disjoint key sets merge associatively and commutatively; the empty set's state (m = -inf, l = 0, o = 0) is
the identity (Milakov and Gimelshein 2018; Rabe and Staats 2021; Dao et al. 2022). Logits may be in base 2 throughout:
then exp and log are exp2 and log2.
"""

import math
from typing import NamedTuple

import torch


class State(NamedTuple):
    """m, l: [..., rows, 1]; o: [..., rows, Dv]; one floating dtype."""

    m: torch.Tensor
    l: torch.Tensor
    o: torch.Tensor


def empty(
    rows: tuple[int, ...], head_dim_v: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> State:
    """The identity of `merge`: m and l of shape [*rows, 1], o of shape [*rows, head_dim_v]."""
    column = (*rows, 1)
    return State(
        torch.full(column, -math.inf, dtype=dtype, device=device),
        torch.zeros(column, dtype=dtype, device=device),
        torch.zeros((*rows, head_dim_v), dtype=dtype, device=device),
    )


def merge(a: State, b: State, base_2: bool = False) -> State:
    """The state of the union of two disjoint key sets."""
    m = torch.maximum(a.m, b.m)
    # Where both are empty m is -inf, and -inf - -inf would be nan: a finite stand-in keeps the weights at 0.
    top = torch.where(m == -math.inf, torch.zeros_like(m), m)
    keep_a, keep_b = a.m - top, b.m - top
    keep_a, keep_b = (torch.exp2(keep_a), torch.exp2(keep_b)) if base_2 else (torch.exp(keep_a), torch.exp(keep_b))
    return State(m, a.l * keep_a + b.l * keep_b, a.o * keep_a + b.o * keep_b)


def finish(state: State, base_2: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """out [..., rows, Dv] and lse [..., rows] in the logits' base; a row without a key has out 0 and lse -inf."""
    log = torch.log2(state.l) if base_2 else torch.log(state.l)
    # The largest logit adds exp(0) to l, so l is 0 or at least 1.
    return state.o / state.l.clamp(min=1), (state.m + log).squeeze(-1)
