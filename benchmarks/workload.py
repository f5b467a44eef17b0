"""Sequences whose tiles the models of machine code count: one length, with documents of many lengths."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import attngen as ag

LENGTH = 4096  # of the sequences whose tiles are counted


@cache
def lengths() -> tuple[int, ...]:
    """Of the documents that fill a sequence: many short ones, few long ones."""
    generator, found = torch.Generator().manual_seed(0), [0]
    while sum(found) < LENGTH:
        drawn = torch.empty(1).exponential_(1 / 512, generator=generator).item()
        found.append(min(max(int(drawn), 32), 2048, LENGTH - sum(found)))
    return tuple(found[1:])


def document_ids() -> torch.Tensor:
    """int32 [LENGTH]: which document a position is of."""
    return torch.repeat_interleave(torch.arange(len(lengths())), torch.tensor(lengths())).int()


def captures(spec: ag.Spec) -> dict[str, Any]:
    """What the mask reads."""
    known = {"doc": document_ids()[None], "slope": torch.ones(1), "width": 1024, "prefix": 512}
    return {name: known[name] for name in (*spec.tensors, *spec.params) if name in known}


@cache
def tile_counts(spec: ag.Spec, block_m: int, block_n: int, by_keys: bool) -> tuple[int, int]:
    """(full, partial) tiles of a head."""
    tiles = ag.tile_map(spec, LENGTH, LENGTH, block_m, block_n, transposed=by_keys, **captures(spec))
    return int((tiles == 2).sum()), int((tiles == 1).sum())


@cache
def pairs(spec: ag.Spec) -> int:
    """Attended pairs of one head."""
    return int((ag.tile_map(spec, LENGTH, LENGTH, 1, 1, **captures(spec)) > 0).sum())
