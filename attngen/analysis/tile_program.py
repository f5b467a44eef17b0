"""Tile programs as plain data: which tiles of the other axis a tile visits, run for all tiles with torch or for one on integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from attngen.analysis.scalars import BEGIN, BLOCK, END, FIRST, LAST, ScalarProgram, Segments
from attngen.language.programs import Node, evaluate

Tensors = tuple[torch.Tensor, ...]
Evaluated = tuple[Tensors, Tensors, Tensors, Tensors]


@dataclass(frozen=True)
class TileProgram:
    """`WalkProgram` without its symbols. summarised: whether it reads tables of captured data."""

    lines: tuple[tuple[str, Node], ...]
    full: Segments
    partial: Segments
    summarised: bool

    def evaluate(self, first: Any, last: Any, begin: Any, end: Any, block: int, env: Mapping[str, Any]) -> Evaluated:
        """Run the program for many tiles: (full firsts, full counts, partial firsts, partial counts), one entry a
        segment.

        `first`, `last`: int64 [B or 1, 1, tiles], original positions of each tile's first and last row. `begin`,
        `end`: of the walked axis, ints or [B, 1, 1]. `env`: params, captures, "b" [B, 1, 1], "h" [1, H, 1] and
        prepared tables by name. Results are int64 and broadcast over [B or 1, H or 1, tiles].
        """
        scope = {**env, FIRST: first, LAST: last, BEGIN: begin, END: end, BLOCK: block}
        values: dict[Any, Any] = {}
        for name, expr in self.lines:
            scope[name] = evaluate(expr, scope, values)

        def tensors(expressions: Iterable[Node]) -> Tensors:
            device = first.device
            found = (evaluate(e, scope, values) for e in expressions)
            # A number is written by a kernel there: copying it to a GPU would wait for it.
            found = (x.to(device) if isinstance(x, torch.Tensor) else torch.full((), x, device=device) for x in found)
            return tuple(x.to(torch.int64) if x.ndim else x.to(torch.int64).view(1, 1, 1) for x in found)

        return (
            tensors(first for first, _ in self.full),
            tensors(count for _, count in self.full),
            tensors(first for first, _ in self.partial),
            tensors(count for _, count in self.partial),
        )

    @cached_property
    def scalar(self) -> ScalarProgram | None:
        """The same for one tile; None if that needs tables of captured data, or reals."""
        if self.summarised:
            return None
        try:
            return ScalarProgram(self.lines, self.full, self.partial)
        except KeyError:
            return None
