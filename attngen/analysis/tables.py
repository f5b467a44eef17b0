"""The tables of a walk while it is analysed: which summaries of captured data (`attngen.analysis.summaries`) its bounds read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import sympy

from attngen.analysis.summaries import Summary
from attngen.language.expression import is_int, loads, to_text
from attngen.language.programs import program_of


@dataclass(frozen=True)
class Table:
    """How to compute one summary. `symbols` stand in bounds for its values, one int32 [B or 1, H or 1, tiles] each."""

    kind: str  # "extent" | "order" | "match" | "floor"
    tile: Any
    walked: Any
    strict: bool
    symbols: tuple[Any, ...]

    @property
    def real(self) -> bool:
        """Whether its terms are real numbers."""
        return not is_int(self.tile + self.walked)

    @cached_property
    def summary(self) -> Summary:
        """The same as plain data."""
        names = tuple(symbol.name for symbol in self.symbols)
        return Summary(self.kind, program_of(self.tile), program_of(self.walked), self.strict, self.real, names)

    def __str__(self) -> str:
        relation = {"order": " > 0" if self.strict else " >= 0", "match": " == 0"}.get(self.kind, "")
        return f"{', '.join(s.name for s in self.symbols)}: {self.kind} of {to_text(self.tile + self.walked)}{relation}"


class Tables:
    """The tables of one walk while it is analysed; equal ones are shared."""

    _SUFFIXES: ClassVar[dict[str, tuple[str, ...]]] = {
        "extent": ("low", "high"),
        "order": ("first", "stop"),
        "match": ("first", "stop", "run_first", "run_stop"),
        "floor": ("floor",),
    }

    def __init__(self, tile: Any, walked: Any, taken: Iterable[str]):
        self.axes = (tile, walked)
        self._taken = set(taken)
        self._known: dict[Any, Table] = {}

    def extent(self, term: Any) -> tuple[Any, ...]:
        """(least, largest) of a tile-axis term."""
        return self._get("extent", term, sympy.Integer(0), False)

    def order(self, tile: Any, walked: Any, strict: bool) -> tuple[Any, ...]:
        """(first, stop) of where tile + walked >= 0, or > 0."""
        return self._get("order", tile, walked, strict)

    def match(self, tile: Any, walked: Any) -> tuple[Any, ...]:
        """(first, stop, run_first, run_stop) of where tile + walked == 0."""
        return self._get("match", tile, walked, False)

    def floor(self, value: Any) -> Any:
        """floor(value) of a real value that is free of both axes."""
        return self._get("floor", value, sympy.Integer(0), False)[0]

    def used_by(self, expressions: Iterable[Any]) -> tuple[Table, ...]:
        """The tables that some expression reads."""
        free = {symbol for e in expressions for symbol in e.free_symbols}
        return tuple(table for table in self._known.values() if free & set(table.symbols))

    def _get(self, kind: str, tile: Any, walked: Any, strict: bool) -> tuple[Any, ...]:
        key = (kind, tile, walked, strict)
        if key not in self._known:
            named = loads(walked) or loads(tile)
            stem = named[0].name if named else "rows"
            suffixes, base, number = self._SUFFIXES[kind], stem, 1
            while self._taken & {f"{base}_{suffix}" for suffix in suffixes}:
                number += 1
                base = f"{stem}{number}"
            names = [f"{base}_{suffix}" for suffix in suffixes]
            self._taken.update(names)
            self._known[key] = Table(kind, tile, walked, strict, tuple(sympy.Symbol(n, integer=True) for n in names))
        return self._known[key].symbols
