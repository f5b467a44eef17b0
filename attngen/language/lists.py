"""Lists that take the place of a mask's closed-form intervals: which tiles, or which rows, a kernel's two loops visit.

A spec made by a key set may name one of them; its data are captured tensors with fixed names. B' and H' are 1 where a list
serves the whole batch or all heads; a list of tiles else has one for each query head. Lists are in both directions, since
the backward of k and v walks queries; those of the direction that nobody walks may be empty tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from attngen.errors import SpecError


@dataclass(frozen=True)
class TileLists:
    """Live tiles of `block_m` queries (rows, not positions) and `block_n` keys, both multiples of 16.

    query_tiles int32 [B', H', X]: key-tile numbers, all lists one after the other. query_runs int32 [B', H', Tq, 3]: of each
    query tile the first element of its list, how many full tiles it has (every pair in range attends, whatever the mask
    says), and how many partial ones behind them. key_tiles int32 [B', H', Y], key_runs int32 [B', H', Tk, 3]: the same for
    key tiles, whose lists hold query-tile numbers. A tile is in a list once; both parts of a list ascend. A listed tile that
    reaches past the end of the walked axis is partial: so the ragged last key tile in query_runs, and the ragged last query
    tile in key_runs (where it is what is walked).
    """

    block_m: int
    block_n: int

    names: ClassVar[tuple[str, ...]] = ("query_tiles", "query_runs", "key_tiles", "key_runs")

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 16 or value % 16:
                raise SpecError(f"tile lists: {name} is a multiple of 16, got {value!r}")

    @property
    def text(self) -> str:
        return f"tiles({self.block_m}, {self.block_n})"

    @property
    def declared(self) -> dict[str, tuple[int, str]]:
        """What the spec captures for it: of each tensor its number of dimensions and its kind."""
        return {name: (3 if name.endswith("tiles") else 4, "int") for name in self.names}


@dataclass(frozen=True)
class RowLists:
    """Keys of each query row, one by one. A key listed twice counts twice.

    query_edges int32 [B', H', E]: key rows, all lists one after the other. query_runs int [B', H', Nq, 2]: of each query row
    the first element of its list and its length. key_edges int32 [B', H', F], key_runs int [B', H', Nk, 2]: of each key the
    query rows that list it. weighted: edge_weight float [B', H', E] is added to the logit of that element of query_edges,
    and key_places int [B', H', F] has, for each element of key_edges, its place in query_edges.

    H' is 1 or the number of kv heads. by_query_head: it is the number of query heads: heads that share keys have lists of
    their own.
    """

    weighted: bool = False
    by_query_head: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        extra = ("edge_weight", "key_places") if self.weighted else ()
        return ("query_edges", "query_runs", "key_edges", "key_runs", *extra)

    @property
    def text(self) -> str:
        words = [word for word in ("weighted", "by_query_head") if getattr(self, word)]
        return f"rows({', '.join(words)})"

    @property
    def declared(self) -> dict[str, tuple[int, str]]:
        """What the spec captures for it: of each tensor its number of dimensions and its kind."""
        kinds = {"edge_weight": "float"}
        return {name: (4 if name.endswith("runs") else 3, kinds.get(name, "int")) for name in self.names}


Lists = TileLists | RowLists


def parse(text: str) -> Lists:
    """Read a list's text back. SpecError."""
    tiles = re.fullmatch(r"tiles\((\d{1,9}), ?(\d{1,9})\)", text.strip())
    if tiles:
        return TileLists(int(tiles[1]), int(tiles[2]))
    rows = re.fullmatch(r"rows\(([a-z_, ]*)\)", text.strip())
    words = [] if not rows else [word.strip() for word in rows[1].split(",") if word.strip()]
    if rows and set(words) <= {"weighted", "by_query_head"}:
        return RowLists(**dict.fromkeys(words, True))
    raise SpecError("not a list", text=text, fix="lists are tiles(128, 128), rows(), rows(weighted, by_query_head)")


def read(lists: Any) -> Lists | None:
    """A list, its text or None. SpecError."""
    if lists is None or isinstance(lists, (TileLists, RowLists)):
        return lists
    if isinstance(lists, str):
        return parse(lists)
    raise SpecError(f"lists: expected TileLists or RowLists, got {type(lists).__name__}")
