"""What a call needs to know of a spec, as plain data: the part of its `Facts` that outlives the analysis, and travels in packs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attngen.analysis.capture_sites import CaptureSite, SinkSlope
from attngen.analysis.summaries import Axis, Summary, prepare
from attngen.analysis.tile_program import TileProgram


@dataclass(frozen=True)
class WalkFacts:
    """What running a walk takes of it, see `attngen.analysis.walk.Walk`. divisors: params that divide positions. by_batch, by_head:
    whether its tables differ from one batch or query head to the next.
    """

    summaries: tuple[Summary, ...]
    divisors: frozenset[str]
    by_batch: bool
    by_head: bool

    @property
    def needs_tables(self) -> bool:
        """Whether the walk reads captured data that has to be summarised before."""
        return bool(self.summaries)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The names of its tables' values."""
        return tuple(name for summary in self.summaries for name in summary.symbols)

    def differ(self, offset_tensor: bool) -> tuple[bool, bool]:
        """Whether its tables differ from one batch to the next, and from one query head to the next."""
        return offset_tensor or self.by_batch, self.by_head

    def prepare(
        self, env: Mapping[str, Any], tile: Axis, walked: Axis, block: int, device: Any = "cpu"
    ) -> dict[str, torch.Tensor]:
        """The walk's tables for one call, see `summaries.prepare`; nothing for closed-form masks."""
        return prepare(self.summaries, env, tile, walked, block, device)


@dataclass(frozen=True, eq=False)
class CallFacts:
    """`Facts` for who only calls. sites: of each captured tensor with a gradient the places that load it, by whether atomics are
    allowed; slopes: of each one that the sink loads; natural, paged: see `Facts`.
    """

    walk_keys: WalkFacts
    walk_queries: WalkFacts
    program_keys: TileProgram
    program_queries: TileProgram
    positive: frozenset[str]
    natural: bool
    paged: bool
    sites: Mapping[str, tuple[CaptureSite, ...]] = field(default_factory=dict)
    atomic_sites: Mapping[str, tuple[CaptureSite, ...]] = field(default_factory=dict)
    slopes: Mapping[str, tuple[SinkSlope, ...]] = field(default_factory=dict)

    def walk_of(self, kernel: str) -> WalkFacts:
        """The walk of a kernel: "dkv" goes through queries, all others through keys."""
        return self.walk_queries if kernel == "dkv" else self.walk_keys

    @property
    def learned(self) -> frozenset[str]:
        """The captured tensors that can have a gradient."""
        return frozenset({*self.sites, *self.slopes})

    def sites_of(self, name: str, deterministic: bool) -> tuple[CaptureSite, ...]:
        """Where the score loads a captured tensor. deterministic: without atomics."""
        return (self.sites if deterministic else self.atomic_sites).get(name, ())

    def restores(self, dtype: torch.dtype) -> bool:
        """Whether the backward takes what a large lse lacks, see `restores`."""
        return restores(self.natural, self.paged, dtype)


def restores(natural: bool, paged: bool, dtype: torch.dtype) -> bool:
    """Whether the backward, where there is one, takes what a large lse lacks: where float32 results would show it, and where the
    score may be large by itself. (Products of q and k that are large for half a float have lost more before they are summed.)
    """
    return not paged and (natural or dtype == torch.float32)


def facts_of(spec: Any) -> Any:
    """What is known of a spec for its calls: what came with it, else its `Facts`."""
    return spec.known or importlib.import_module("attngen.analysis.spec_facts").facts(spec)
