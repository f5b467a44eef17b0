"""How the programs of a launch lie over its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Grid:
    """One program per (batch, head, tile), all on one axis; of a split kernel, so many per tile, or a fixed number."""

    length: str  # "n_q" or "n_k"
    block: int
    heads: str  # "q" or "kv": which head count; "one": a program serves all heads
    batched: bool = True  # False: a program serves the whole batch
    rows: str = "rows"  # "packed": (query, head of the group) pairs; "heads": the heads of one query; "single": one row
    sliced: str = ""  # "split" or "stream"
    persistent: int = 0  # programs per multiprocessor; 0: one per output
    parts: int = 1  # programs that share an output
    again: bool = False  # as many programs as there is room for look after those of an earlier launch

    def tiles(self, sizes: Mapping[str, int]) -> int:
        """Tiles of one (batch, head). sizes: batch, heads, group, n_q, n_k."""
        group, length = sizes["group"], sizes[self.length]
        return {
            "rows": -(-length // self.block),
            "packed": -(-length * group // self.block),
            "heads": length * -(-group // self.block),
            "single": length,
        }[self.rows]

    def outputs(self, sizes: Mapping[str, int]) -> int:
        """Tiles of all batches and heads, computed by whatever number of programs."""
        group = sizes["group"]
        heads = {"q": sizes["heads"], "kv": sizes["heads"] // group, "one": 1}[self.heads]
        return self.tiles(sizes) * heads * (sizes["batch"] if self.batched else 1)

    def programs(self, sizes: Mapping[str, int]) -> int:
        """The number of programs to launch. sizes: also splits, programs, multiprocessors."""
        if self.again:
            return min(replace(self, again=False).programs(sizes), sizes["multiprocessors"])
        outputs = self.outputs(sizes)
        if self.persistent:
            return min(outputs * self.parts, self.persistent * sizes["multiprocessors"])
        if self.sliced == "stream":
            return min(outputs, 1) * sizes["programs"]
        return outputs * self.parts * (sizes["splits"] if self.sliced == "split" else 1)
