"""The places that a score loads a captured tensor from, and how a gradient is collected there: see `attngen.analysis.capture_sites`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from attngen.analysis.capture_sites import EDGE_WEIGHTS, CaptureSite
from attngen.language.expression import ROW, B, H, I, J
from attngen.language.programs import program_of


@dataclass(frozen=True)
class Site:
    """One load of a captured tensor in the score, and the score's derivative by it. load: None for the weights of listed keys.

    kind: see `attngen.analysis.capture_sites`. dims: for "bins" and "atomic", the tensor's dimensions whose index depends on i or j.
    number: which of the tensor's sites it is. by_batch, by_head: whether each batch, each head, has elements of its own.
    """

    load: Any
    slope: Any
    kind: str
    dims: tuple[int, ...]
    number: int = 0
    by_batch: bool = True
    by_head: bool = True

    @property
    def tensor(self) -> str:
        """The captured tensor's name."""
        return EDGE_WEIGHTS.tensor if self.load is None else str(self.load.name)

    @property
    def by_keys(self) -> bool:
        """Whether a key tile walks the queries."""
        return self.kind == "keys"

    def plain(self, deterministic: bool) -> CaptureSite:
        """The same as plain data."""
        indices = tuple(map(program_of, self.load.indices))
        by = self.by_batch, self.by_head
        return CaptureSite(self.tensor, self.number, deterministic, self.kind, self.dims, indices, *by)


# The weights of listed keys are added to the score: their slope is 1.
EDGES = Site(None, 1, EDGE_WEIGHTS.kind, ())


def sites(load_grads: Any, deterministic: bool = True) -> tuple[Site, ...]:
    """The sites of one captured tensor; `load_grads` are pairs (Load, derivative). Not deterministic: what would be
    "bins" or scattered "pairs" is added with atomics into [B, heads, sizes of the dimensions that depend on i or j]."""
    return tuple(_site(load, slope, number, deterministic) for number, (load, slope) in enumerate(load_grads))


def site_of(load_grads: Any, site: CaptureSite) -> Site:
    """What a kernel that collects at this place is rendered from. load_grads: of every captured tensor, see `Facts`."""
    if site.kind == EDGES.kind:
        return EDGES
    found = sites(load_grads[site.tensor], site.deterministic)[site.number]
    return replace(found, by_batch=site.by_batch, by_head=site.by_head)


def _site(load: Any, slope: Any, number: int, deterministic: bool) -> Site:
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
    by_batch, by_head = (any(symbol in index.free_symbols for index in load.indices) for symbol in (B, H))
    return Site(load, slope, kind, dims, number, by_batch, by_head)
