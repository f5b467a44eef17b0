"""What the order of outputs is worth under a causal mask: modelled, by handing programs to places as they come free.

A program takes as long as it has key tiles to visit, and two tiles' time to begin and end. What is left out: that programs on one
multiprocessor slow each other down, and the second-level cache, for which heads take turns only as far as their keys fit half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attngen as ag
from attngen.backends.work import turns
from benchmarks.stream_k import SMS, makespan

SPEC = ag.Spec(mask=ag.causal())
LENGTHS, HEADS = (1024, 2048, 4096, 8192, 16384), (16, 32, 64, 128)
BLOCK_M, BLOCK_N, ONCE = 128, 64, 2  # once: of a program, in tiles
CACHE = 50 * 2**20  # of an H100, which has as many multiprocessors as an H200
ROW = 2 * 2 * 128  # bytes of a key and its value


def visits(n: int) -> list[int]:
    """Of each query tile of a head, with what is done once."""
    return ((ag.tile_map(SPEC, n, n, BLOCK_M, BLOCK_N) > 0).sum(-1).flatten() + ONCE).tolist()


def ordered(order: str, tiles: list[int], heads: int, together: int) -> Iterator[int]:
    """The programs as a GPU starts them, see `lowering.axes.decode` and `decode_longest_first`."""
    if order == "by_head":
        return (work for _ in range(heads) for work in tiles)
    sections = [min(together, heads - start) for start in range(0, heads, together)]
    return (work for members in sections for work in reversed(tiles) for _ in range(members))


def run(say: Callable[[str], None]) -> dict[str, Any]:
    """All lengths and heads (batch times heads), one and two programs a multiprocessor."""
    lines = []
    for resident in (1, 2):
        for n in LENGTHS:
            tiles = visits(n)
            for heads in HEADS:
                places = SMS * resident
                together = turns(heads, CACHE // 2 // (n * ROW))
                least = max(sum(tiles) * heads / places, max(tiles))
                found = {
                    order: makespan(ordered(order, tiles, heads, together), sm_rate=1.0, slots=places) / least
                    for order in ("by_head", "longest_first")
                }
                waves = round(len(tiles) * heads / places, 1)
                lines.append({"resident": resident, "n": n, "heads": heads, "waves": waves, **found})
                say(f"{resident} {n:6} {heads:4} {waves:6} {found['by_head']:.2f} {found['longest_first']:.2f}")
    return {"modelled": True, "lines": lines}


def table(results: dict[str, Any]) -> str:
    """As Markdown."""
    head = (
        "# The order of outputs under a causal mask: modelled\n\n"
        f"Time over the least possible of a forward in tiles of {BLOCK_M} x {BLOCK_N} on {SMS} multiprocessors, when each program "
        "starts where a place comes free first. By head is the order of FlexAttention's kernels; longest first is attngen's default.\n\n"
        "| programs a multiprocessor | length | heads | waves | by head | longest first | gain |\n|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(
        f"| {line['resident']} | {line['n']:,} | {line['heads']} | {line['waves']} | {line['by_head']:.2f} | "
        f"{line['longest_first']:.2f} | {line['by_head'] / line['longest_first']:.2f} |\n"
        for line in results["lines"]
    )
