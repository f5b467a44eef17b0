"""The places that a score loads a captured tensor from, and how a gradient is collected there: see `attngen.analysis.capture_sites`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attngen.analysis.capture_sites import EDGE_WEIGHTS, CaptureSite
from attngen.language.expression import ROW, B, H, I, J
from attngen.language.programs import program_of


@dataclass(frozen=True)
class Site:
    """One load of a captured tensor in the score, and the score's derivative by it.

    kind: see `attngen.analysis.capture_sites`. dims: for "bins" and "atomic", the tensor's dimensions whose index depends on i or j.
    """

    load: Any
    slope: Any
    kind: str
    dims: tuple[int, ...]

    @property
    def tensor(self) -> str:
        """The captured tensor's name."""
        return str(self.load.name)

    @property
    def by_keys(self) -> bool:
        """Whether a key tile walks the queries."""
        return self.kind == "keys"

    def uses(self, symbol: Any) -> bool:
        """Whether an index of the load depends on this symbol."""
        return any(symbol in index.free_symbols for index in self.load.indices)

    def plain(self, number: int, deterministic: bool) -> CaptureSite:
        """The same as plain data. number: which of the tensor's sites it is."""
        indices = tuple(map(program_of, self.load.indices))
        shared = self.uses(B), self.uses(H)
        return CaptureSite(self.tensor, number, deterministic, self.kind, self.dims, indices, *shared)


# The weights of listed keys are added to the score: their slope is 1.
EDGES = Site(None, 1, EDGE_WEIGHTS.kind, ())


def sites(load_grads: Any, deterministic: bool = True) -> tuple[Site, ...]:
    """The sites of one captured tensor; `load_grads` are pairs (Load, derivative). Not deterministic: what would be
    "bins" or scattered "pairs" is added with atomics into [B, heads, sizes of the dimensions that depend on i or j]."""
    return tuple(_site(load, slope, deterministic) for load, slope in load_grads)


def _site(load: Any, slope: Any, deterministic: bool) -> Site:
    dims = tuple(d for d, index in enumerate(load.indices) if index.free_symbols & {I, J})
    used = frozenset().union(*[load.indices[d].free_symbols & {I, J} for d in dims])
    plain = [I if load.indices[d] == ROW else load.indices[d] for d in dims]
    if not used:
        kind = "total"
    elif used == {I}:
        kind = "rows"
    elif used == {J}:
        kind = "keys"
    elif sorted(plain, key=str) == [I, J]:
        kind = "pairs"
    elif not deterministic:
        kind = "atomic"
    else:
        kind = "bins" if len(dims) == 1 else "pairs"
    return Site(load, slope, kind, dims)
