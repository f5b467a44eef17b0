"""What attngen does with one call and why, as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from attngen.inspect import page, picture, plan_picture
from attngen.inspect.explanation import Alternative, Attention, Explanation, explanation
from attngen.runtime.attention import CompiledAttention

BY_KEY = "key by key: each row visits the keys that it lists, and no others of a tile"


def explain(
    attention: CompiledAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offset: Any,
    captures: Mapping[str, Any],
    png: str | Path | None = None,
    html: str | Path | None = None,
) -> str:
    """Sections: the spec, the plan of both directions with sizes, bytes and schedules, and of each attention in it the mask's
    picture and tile counts, facts, the cost bound, the schedule and where it came from, and what other tiles would visit.
    Everything about a GPU that is not here is modelled, and says so. html: a file for the same as a page, with the generated
    sources.
    """
    found = explanation(attention, q, k, v, q_offset, captures)
    if png is not None:
        plan_picture.draw(found.plans, png)
    if html is not None:
        Path(html).write_text(page.page(found), encoding="utf-8")
    return text(found)


def text(found: Explanation) -> str:
    """The sections as text."""
    parts = [("spec", f"{found.spec}\nkey {found.spec.key[:16]}"), ("plan", _plans(found))]
    if found.together:
        parts.append(("pairs of all attentions together", found.together))
    for own in found.attentions:
        sections = _attention(own, found.backend)
        parts += (
            sections if len(found.attentions) == 1 else [(f"{own.name}: {title}", body) for title, body in sections]
        )
    return "\n\n".join(f"{title}\n{_indent(body)}" for title, body in parts)


def _plans(found: Explanation) -> str:
    about = {name: "\n".join(map(str, made)) for name, made in found.made.items()}
    about |= {own.name: f"{own.sizes}, spec {own.call.spec.key[:12]}\n{_schedule(own)}" for own in found.attentions}
    # Sizes are those of a forward: what a backward makes is not there yet.
    texts = {name: plan.text(about if name == "forward" else {}) for name, plan in found.plans.items()}
    return "\n".join(f"{name}\n{_indent(body)}" for name, body in texts.items())


def _attention(own: Attention, backend: str) -> list[tuple[str, str]]:
    """What is to be said of one ordinary attention."""
    parts = []
    if own.tiles is not None:
        title = f"mask of batch 0, head 0, {own.sizes.n_q} queries x {own.sizes.n_k} keys"
        legend = f"{picture.LEGEND}   (tiles of {own.cell[0]} x {own.cell[1]})"
        counts = BY_KEY if own.by_key else picture.summary(own.tiles)
        parts.append((title, f"{picture.text(own.tiles, 32)}\n{legend}\n{counts}"))
    parts.append(("facts", own.known))
    parts.append(("cost bound (modelled)", str(own.cost)))
    parts.append((f"schedule on backend {backend!r}", _schedule(own)))
    if own.kernels:
        lines = [f"{direction}: {', '.join(names)}" for direction, names in own.kernels.items()]
        parts.append(("kernels, and the captured tensors whose gradients they add up", "\n".join(lines)))
    if own.alternatives:
        title = "alternatives: pairs visited by other forward tiles, against the attended pairs"
        if backend == "cpu":
            title += f" (a tile's keys begin and end at multiples of {own.tile[1]}, whatever block_n)"
        parts.append((title, "\n".join(map(_alternative, own.alternatives))))
    return parts


def _schedule(own: Attention) -> str:
    return f"{own.schedule}\nfrom {own.origin}"


def _alternative(tile: Alternative) -> str:
    mark = "   <- this schedule" if tile.chosen else ""
    return f"{tile.block_m:4} x {tile.block_n:<4} {tile.visited:6.3f} x{mark}"


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.split("\n"))
