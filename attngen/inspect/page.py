"""An explanation as one page of HTML, which loads nothing: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from attngen.inspect import picture
from attngen.inspect.explanation import Attention, Explanation
from attngen.inspect.generated import generated

CELLS = 128  # rows and columns of a mask's picture
ROWS = 64  # query tiles whose live intervals are listed
NARROW, WIDE = 0.5, 8.0  # a picture's width against its height, however many keys a query has


def page(found: Explanation) -> str:
    """The whole page."""
    folder = Path(__file__).resolve().parent.parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=True,  # names and texts are a user's
    )
    template = environment.get_template("explain.html")
    return template.render(
        found=found,
        by_step={own.name: own for own in found.attentions},
        drawings={own.name: Drawing.of(own) for own in found.attentions},
        kernels=generated(found),
        anchor={own.name: f"attention-{place}" for place, own in enumerate(found.attentions, 1)},
    )


@dataclass(frozen=True)
class Drawing:
    """A mask's tiles for a page. counts: of (kind, how many, share of all). paths: by kind, an SVG path in a box of `across` by
    `down` cells, `shape` its width against its height. intervals: of every `every`-th query tile its first and last row, and
    the keys that it visits, as (kind, first, last); none where rows list single keys.
    """

    counts: tuple[tuple[str, int, float], ...]
    paths: dict[str, str]
    across: int
    down: int
    shape: float
    every: int
    intervals: tuple[tuple[int, int, tuple[tuple[str, int, int], ...]], ...]

    @classmethod
    def of(cls, own: Attention) -> Drawing | None:
        """None where there are no tiles."""
        if own.tiles is None:
            return None
        cells = picture.shrink(own.tiles, CELLS)
        down, across = cells.shape
        shape = min(max(own.sizes.n_k / own.sizes.n_q, NARROW), WIDE)
        every = -(-own.tiles.shape[0] // ROWS)
        # Rows that list their keys visit these alone: a tile is no unit of theirs.
        intervals = () if own.by_key else _intervals(own, every)
        return cls(_counts(own.tiles), _paths(cells), across, down, shape, every, intervals)


def _counts(tiles: Any) -> tuple[tuple[str, int, float], ...]:
    counts = picture.counts(tiles)
    return tuple((kind, count, count / tiles.numel()) for kind, count in counts.items())


def _paths(cells: Any) -> dict[str, str]:
    paths = dict.fromkeys(picture.NAMES, "")
    for row, runs in enumerate(picture.runs(cells)):
        for kind, first, stop in runs:
            paths[kind] += f"M{first} {row}h{stop - first}v1h{first - stop}z"
    del paths["empty"]  # the paper that the others are drawn on
    return paths


def _intervals(own: Attention, every: int) -> tuple[tuple[int, int, tuple[tuple[str, int, int], ...]], ...]:
    assert own.tiles is not None
    (block_m, block_n), n_q, n_k = own.cell, own.sizes.n_q, own.sizes.n_k
    rows = []
    for place, runs in enumerate(picture.runs(own.tiles[::every])):
        first = place * every * block_m
        live = [(kind, a * block_n, min(b * block_n, n_k) - 1) for kind, a, b in runs if kind != "empty"]
        rows.append((first, min(first + block_m, n_q) - 1, tuple(live)))
    return tuple(rows)
