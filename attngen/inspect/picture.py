"""A mask as a picture: tiles that are empty, partial or full, in the terminal and as PNG."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from attngen.errors import InputError
from attngen.language.keysets.cached import Paged, SharedPrefix
from attngen.language.spec import Spec
from attngen.reference.keysets import attended
from attngen.reference.samples import made_up

EMPTY, PARTIAL, FULL = 0, 1, 2
NAMES = ("empty", "partial", "full")
LEGEND = "█ full tile   ▒ partial tile   · empty tile"
_GLYPHS = "·▒█"
_COLORS = ("#f4f1ea", "#e8a33d", "#27548a")


MOST = 4096  # queries and keys of a picture that is made from all pairs


def of_keys(
    spec: Spec, n_q: int, n_k: int, block_m: int, block_n: int, q_offset: int, captures: dict[str, Any]
) -> tuple[torch.Tensor, str]:
    """Tiles that a spec with a key set attends: int8 [tiles_q, tiles_k], 0 no pair, 1 some, 2 all; and what was made up for
    it, in words: q, k, and the captures of the key set. From the definition, not from a kernel. InputError.
    """
    if not 1 <= max(n_q, n_k) <= MOST or min(n_q, n_k) < 1:
        raise InputError("-n", f"1 to {MOST} queries and keys, to draw every pair of a key set", (n_q, n_k))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, n, 64, generator=generator) for n in (n_q, n_k))
    words, pairs = ["random q and k"], torch.zeros(1, 1, n_q, n_k, dtype=torch.bool)
    for part in spec.keys.specs if getattr(spec.keys, "name", "") == "union" else (spec,):  # type: ignore[union-attr]
        named = {name: captures[name].cpu() if isinstance(captures[name], torch.Tensor) else captures[name]
                 for name in (*part.tensors, *part.params)}  # fmt: skip
        if part.keys is not None:
            if isinstance(part.keys, (Paged, SharedPrefix)):
                raise InputError("keys", "a key set whose keys are k's rows", part.keys.name, "draw its mask alone")
            own, how = made_up(part.keys, q, k, k, q_offset=q_offset)
            named, words = {**named, **own}, [*words, *how]
        pairs |= attended(part, q, k, k, q_offset, named)
    grid = torch.nn.functional.pad(pairs[0, 0].float(), (0, -n_k % block_n, 0, -n_q % block_m), value=torch.nan)
    cells = grid.unflatten(1, (-1, block_n)).unflatten(0, (-1, block_m)).transpose(1, 2).flatten(2)
    share = cells.nanmean(-1)
    tiles = torch.where(share == 0, EMPTY, torch.where(share == 1, FULL, PARTIAL)).to(torch.int8)
    return tiles, "; ".join(words)


def shrink(tiles: torch.Tensor, most: int) -> torch.Tensor:
    """A tile map [rows, columns] with at most `most` rows and columns: cells that mix become partial."""
    down, across = (max(1, -(-size // most)) for size in tiles.shape)
    rows, columns = -(-tiles.shape[0] // down), -(-tiles.shape[1] // across)
    low, high = (torch.full((rows * down, columns * across), fill, dtype=tiles.dtype) for fill in (FULL, EMPTY))
    for padded in (low, high):
        padded[: tiles.shape[0], : tiles.shape[1]] = tiles
    low = low.view(rows, down, columns, across).amin((1, 3))
    high = high.view(rows, down, columns, across).amax((1, 3))
    return torch.where(high == EMPTY, EMPTY, torch.where(low == FULL, FULL, PARTIAL)).to(tiles.dtype)


def text(tiles: torch.Tensor, most: int = 48) -> str:
    """The picture in characters, query tiles down, key tiles across."""
    cells = shrink(tiles, most)
    return "\n".join("".join(_GLYPHS[cell] * 2 for cell in row) for row in cells.tolist())


def counts(tiles: torch.Tensor) -> dict[str, int]:
    """How many tiles are full, partial and empty."""
    return {name: int((tiles == NAMES.index(name)).sum()) for name in reversed(NAMES)}


def runs(tiles: torch.Tensor) -> Iterator[list[tuple[str, int, int]]]:
    """Of each row of tiles its runs of one kind: what they are, the first column, and one past the last."""
    for row in tiles.tolist():
        stops = [place for place in range(1, len(row)) if row[place] != row[place - 1]]
        yield [(NAMES[row[a]], a, b) for a, b in pairwise([0, *stops, len(row)])]


def summary(tiles: torch.Tensor) -> str:
    """Counts and shares of full, partial and empty tiles."""
    total, found = max(tiles.numel(), 1), counts(tiles)
    parts = ", ".join(f"{count} {name} ({count / total:.1%})" for name, count in found.items())
    live = found["full"] + found["partial"]
    return f"{tiles.shape[0]} x {tiles.shape[1]} tiles: {parts}; visited {live / total:.1%} of the dense work"


def png(tiles: torch.Tensor, path: str | Path, title: str, block_m: int, block_n: int) -> None:
    """Draw the tile map into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    cells = shrink(tiles, 512)
    figure, axes = plt.subplots(figsize=(6.4, 6.8), dpi=150)
    extent: Any = (0, tiles.shape[1] * block_n, tiles.shape[0] * block_m, 0)
    axes.imshow(
        cells.numpy(), cmap=ListedColormap(list(_COLORS)), vmin=0, vmax=2, interpolation="nearest", extent=extent
    )
    axes.set_xlabel("key position j")
    axes.set_ylabel("query position i")
    axes.set_title(title, fontsize=10, wrap=True)
    names = ("empty: skipped", "partial: masked", "full: no mask code")
    handles = [
        Patch(facecolor=color, edgecolor="#555555", label=name) for color, name in zip(_COLORS, names, strict=True)
    ]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=3, frameon=False, fontsize=8)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
