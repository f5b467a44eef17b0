"""The attention of a model's layer as a spec: the one place where both a model's configuration (to tune ahead of time) and its calls
(transformers' attention functions) get it from, so that a call finds the record that was made for it.

The scale is no part of it: calls give theirs (`scale=`), and models that differ in it alone share records and kernels.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import torch

from attngen.errors import SpecError
from attngen.language import patterns
from attngen.language.expression import Expr, Param, Tensor
from attngen.language.keyset import KeySet
from attngen.language.moved import b, h, i, j
from attngen.language.patterns import causal, row, window
from attngen.language.spec import Condition, Score, Spec

SINKS = "sinks"  # the capture that holds a layer's sinks


@dataclass(frozen=True)
class Layer:
    """What an attention layer does besides multiplying. window: keys that a causal query sees, itself included; without `causal`
    those at a distance below it on either side. chunk: keys of its own chunk of so many positions only. soft_cap: scores are
    cap * tanh(s / cap). sinks: a learned logit per head in the softmax's denominator.
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    soft_cap: float | None = None
    sinks: bool = False

    @property
    def mask(self) -> Expr | None:
        """The mask without anything of a batch (padding, packed sequences). SpecError for sizes that are not positive."""
        if self.chunk is not None and self.chunk < 1:
            raise SpecError(f"chunk: expected a positive number, got {self.chunk}")
        parts = [causal()] if self.causal else []
        parts += [window(self.window)] if self.window is not None else []
        parts += [_same_chunk(self.chunk)] if self.chunk is not None else []
        return reduce(operator.and_, parts) if parts else None

    @property
    def spec(self) -> Spec:
        """The spec of its calls without padding."""
        return _spec(self)

    @property
    def padded_spec(self) -> Spec:
        """The same for batches with padding at the ends of their sequences."""
        mask = unpadded("ends") if self.mask is None else self.mask & unpadded("ends")
        return layer_spec(mask, soft_cap=self.soft_cap, sinks=int(self.sinks))

    def captures(self, batch: int, n_k: int) -> dict[str, Any]:
        """All that the masks of typical calls read. With padding there is the most to do where none of it is left: so it is tuned."""
        start, end = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), n_k - 1)
        chunk = {} if self.chunk is None else {"t0": start, "shift": 0}
        return {**chunk, "first": start, "last": end}

    def __str__(self) -> str:
        words = ["causal" if self.causal else "full"]
        words += [f"window {self.window}"] if self.window is not None else []
        words += [f"chunk {self.chunk}"] if self.chunk is not None else []
        words += [f"soft-cap {self.soft_cap:g}"] if self.soft_cap is not None else []
        return ", ".join([*words, *(["sinks"] if self.sinks else [])])


def _same_chunk(size: int) -> Expr:
    """As transformers' chunks are traced: they begin behind a sequence's left padding, and positions count from the first key at
    hand, which in a sliding cache is not the sequence's first.
    """
    start, shift = Tensor("t0", 1, "int")[b], Param("shift")
    return (i + shift - start) // size == (j + shift - start) // size


@lru_cache(maxsize=256)
def _spec(layer: Layer) -> Spec:
    return layer_spec(layer.mask, soft_cap=layer.soft_cap, sinks=int(layer.sinks))


def layer_spec(
    mask: Condition,
    *,
    soft_cap: float | None = None,
    scores: Sequence[Score] = (),
    sinks: int = 0,
    dropout: bool = False,
    keys: KeySet | None = None,
) -> Spec:
    """A layer's spec for any mask and with whatever is added to its scores behind the soft-cap. sinks: dimensions of the capture `SINKS`,
    1 for [H], 3 for [B, H, Nq], 0 for none. dropout: whether weights are dropped, by the param "dropout". keys: a
    key set. SpecError.
    """
    captured = Tensor(SINKS, sinks)
    sink = None if not sinks else captured[h] if sinks == 1 else captured[b, h, row()]
    capped = [] if soft_cap is None else [patterns.soft_cap(soft_cap)]
    probability = Param("dropout", float) if dropout else None
    return Spec(mask, [*capped, *scores], sink=sink, dropout=probability, keys=keys)


def kept(padded: str, padding: Mapping[str, Any], b: Any, kv_idx: Any) -> Any:
    """Whether a key is no padding, of either kind: "ends", keys from `first` int [B] to `last` int [B] are there; "holes", those of
    `padding` bool [B, keys].
    """
    if padded == "holes":
        return padding["padding"][b, kv_idx]
    return (kv_idx >= padding["first"][b]) & (kv_idx <= padding["last"][b])


def unpadded(kind: str) -> Expr:
    """`kept` with its captures declared."""
    tensors = {
        "padding": Tensor("padding", 2, "bool"),
        "first": Tensor("first", 1, "int"),
        "last": Tensor("last", 1, "int"),
    }
    return kept(kind, tensors, b, j)
