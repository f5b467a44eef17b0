"""Key sets that are closed-form masks: Longformer and the A-shape. One attention, no index memory, nothing to prepare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from attngen.language.expression import Expr
from attngen.language.patterns import dilated_window, global_tokens, window
from attngen.plan.keysets.base import KeySet, Pieces, Result, i, j, positive


@dataclass(frozen=True)
class Shape(KeySet):
    """Base of key sets that a condition on positions describes."""

    def condition(self) -> Expr:
        """Which pairs (i, j) are in the set."""
        raise NotImplementedError

    def run(self, pieces: Pieces, plan: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
        def build() -> dict[str, Any]:
            return {"mask": pieces.mask & self.condition(), "score": pieces.score}

        call = pieces.call
        return pieces.attend("shape", build, call.q, call.k, call.v, call.q_offset)


@dataclass(frozen=True)
class Longformer(Shape):
    """A sliding window, perhaps dilated, and global tokens."""

    window: int
    globals: int = 0
    dilation: int = 1

    name: ClassVar[str] = "longformer"

    def __post_init__(self) -> None:
        positive("longformer: window", self.window)
        positive("longformer: globals", self.globals, 0)
        positive("longformer: dilation", self.dilation)

    def condition(self) -> Expr:
        reach = self.window // 2 + 1
        local = window(reach) if self.dilation == 1 else dilated_window(reach, self.dilation)
        return local | global_tokens(self.globals) if self.globals else local


@dataclass(frozen=True)
class AShape(Shape):
    """The first keys and the last ones."""

    sink: int
    window: int

    name: ClassVar[str] = "a_shape"

    def __post_init__(self) -> None:
        positive("a_shape: sink", self.sink, 0)
        positive("a_shape: window", self.window)

    def condition(self) -> Expr:
        return (i >= j) & ((j < self.sink) | (i - j < self.window))


def longformer(window: int = 512, globals: int = 0, dilation: int = 1) -> Longformer:
    """Longformer (arXiv 2004.05150): `Spec(keys=ag.longformer(512, globals=2))`. A token sees window // 2 tokens on each
    side, `dilation` apart, and itself; the first `globals` tokens see all and are seen by all. With mask=ag.causal() it is
    the left half. Raises SpecError.
    """
    return Longformer(window, globals, dilation)


def a_shape(sink: int = 64, window: int = 1024) -> AShape:
    """The A-shape of MInference (arXiv 2407.02490) and SparseAccelerate (2412.06198), or StreamingLLM's attention sinks:
    `Spec(keys=ag.a_shape(64, 1024))`. A token sees the first `sink` tokens and the last `window`, itself included, as far
    as they are not after it. Raises SpecError.
    """
    return AShape(sink, window)
