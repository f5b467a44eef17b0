"""Logits, sinks, dropout and masked pairs of one chunk: the steps that the Python loops of both directions share."""

from __future__ import annotations

import math
from typing import Any

import torch

from attngen.backends.cpu.masks import Blocked
from attngen.backends.cpu.products import product
from attngen.backends.cpu.work import Unit, Work
from attngen.language.programs import evaluate, uniform


def logits_of(
    work: Work,
    unit: Unit,
    q: torch.Tensor,
    k: torch.Tensor,
    blocked: list[tuple[int, int, Blocked]],
    scope: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scaled logits before the score, logits after score and mask), [heads x rows, keys], both in the work's base; one
    tensor where the score is the identity.
    """
    scaled = logits = product(q, k)
    if work.scale_after != 1.0:
        scaled.mul_(work.scale_after)
    if not work.identity:
        tile = scaled.view(unit.tile)
        value = torch.as_tensor(evaluate(work.spec.score, {**scope, "s": tile}, real=work.real))
        # The steps after this one write in place: what the score only passed on has to be copied first.
        if value._is_view() or value.shape != tile.shape or value.dtype != work.real:
            value = torch.empty_like(tile).copy_(value)
        logits = value.view(scaled.shape)
    for low, high, block in blocked:
        # Bits, so that nan goes as well; masked_fill_ branches per element and takes ten times as long.
        columns = logits.view(unit.tile)[..., low:high]
        _bits(columns).bitwise_and_(block.keep)
        columns.add_(block.cap.clamp(max=0))
    return scaled, logits


def dropout_of(work: Work, unit: Unit, scope: dict[str, Any]) -> torch.Tensor:
    """0 or 1 / (1 - p) for each weight: [heads x rows, keys]."""
    kept = uniform(scope["seed"], scope["b"], scope["h"], scope["i"], scope["j"]) >= 1.0 - work.kept
    return (kept.to(work.real) / work.kept).reshape(len(unit.heads) * unit.rows, -1)


def times(x: torch.Tensor, slope: Any, unit: Unit, blocked: list[tuple[int, int, Blocked]]) -> torch.Tensor:
    """x [heads x rows, keys] times a derivative that may be anything on masked pairs."""
    return keep((x.view(unit.tile) * slope).view(x.shape), unit, blocked)


def keep(x: torch.Tensor, unit: Unit, blocked: list[tuple[int, int, Blocked]]) -> torch.Tensor:
    """Set masked pairs of x [heads x rows, keys] to 0 in place, whatever they hold."""
    for low, high, block in blocked:
        _bits(x.view(unit.tile)[..., low:high]).bitwise_and_(block.keep)
    return x


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)


def reaching(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """values [m, k] @ weights [n, k].T, in which inf and nan of `values` reach only where the weight is not 0."""
    broken = ~values.isfinite()
    result = product(values.masked_fill(broken, 0).contiguous(), weights)
    reached = product(broken.to(values.dtype).contiguous(), (weights != 0).to(values.dtype)) > 0
    return result.masked_fill_(reached, math.nan)
