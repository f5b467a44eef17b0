"""What is resident in a kernel and what is walked, and how a program finds its batch, head and tile."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Side:
    """Names of what belongs to the query rows or to the keys of a tile.

    tiles: how many tiles there are, as text. rows: the lines that make a resident tile's row numbers, and `stored`, which of
    them exist. position: the line that makes original positions from row numbers, None where they are the same; safe: the
    line that makes positions that exist, for loads. packed: the rows belong to several heads, so `h` is a vector along them.
    """

    noun: str
    tile: str
    tiles: str
    block: str
    length: str
    index: str
    lane: str
    stored: str
    rows: tuple[str, ...]
    position: str | None
    safe: str
    packed: bool = False

    @property
    def axis(self) -> str:
        return "i" if self.noun == "query" else "j"


QUERY = Side(
    noun="query",
    tile="query_tile",
    tiles="tl.cdiv(n_q, BLOCK_M)",
    block="BLOCK_M",
    length="n_q",
    index="row",
    lane="lane_m",
    stored="row_in",
    rows=("row = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]", "row_in = row < n_q"),
    position="i = row + q_offset",
    safe="i_safe = tl.minimum(row, n_q - 1) + q_offset",
)
KEY = Side(
    noun="key",
    tile="key_tile",
    tiles="tl.cdiv(n_k, BLOCK_N)",
    block="BLOCK_N",
    length="n_k",
    index="j",
    lane="lane_n",
    stored="key_in",
    rows=("j = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]", "key_in = j < n_k"),
    position=None,
    safe="j_safe = tl.minimum(j, n_k - 1)",
)
# Rows are (query, head of the group) pairs, so that keys are read once for all heads that share them.
PACKED = replace(
    QUERY,
    tiles="tl.cdiv(n_q * group, BLOCK_M)",
    rows=(
        "slot = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]",
        "row = slot // group",
        "h = kv_head * group + slot % group",
        "row_in = row < n_q",
    ),
    packed=True,
)
# With a list of keys per query the rows of a tile are the heads of one query.
HEADS = replace(
    QUERY,
    tiles="n_q * tl.cdiv(group, BLOCK_M)",
    rows=(
        "group_tiles = tl.cdiv(group, BLOCK_M)",
        "query = query_tile // group_tiles",
        "slot = query_tile % group_tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]",
        "row = query + tl.zeros_like(slot)",
        "h = kv_head * group + tl.minimum(slot, group - 1)",
        "row_in = slot < group",
    ),
    packed=True,
)
# One query of one head, or one key: the other rows of the tile are copies that are not stored.
ONE_QUERY = replace(
    QUERY,
    tiles="n_q",
    rows=(
        "query = query_tile",
        "slot = tl.arange(0, BLOCK_M)  # [BLOCK_M]",
        "row = query + tl.zeros_like(slot)",
        "row_in = slot < 1",
    ),
)
ONE_KEY = replace(
    KEY,
    tiles="n_k",
    rows=(
        "slot = tl.arange(0, BLOCK_N)  # [BLOCK_N]",
        "j = key_tile + tl.zeros_like(slot)",
        "key_in = slot < 1",
    ),
)


@dataclass(frozen=True)
class Sides:
    """Which side is resident in a kernel and which is walked, and whether a program serves a whole GQA group in turn."""

    resident: Side
    walked: Side
    grouped: bool = False


@dataclass(frozen=True)
class Loop:
    """A loop around all of a program's work: its comment, its variable, the argument of range, and its first lines."""

    comment: str
    variable: str
    range: str
    lines: tuple[str, ...]


def sides_of(by_keys: bool, grouped: bool, *, packed: bool, listed: bool, by_query_head: bool) -> Sides:
    """by_keys: keys are resident. grouped: for all query heads in turn. packed: (query, head) rows. listed: a list of keys per
    query, `by_query_head` each head its own.
    """
    if by_keys:
        return Sides(ONE_KEY if listed else KEY, QUERY, grouped)
    if listed:
        return Sides(HEADS if packed and not by_query_head else ONE_QUERY, KEY)
    return Sides(PACKED if packed else QUERY, KEY)


KV_HEAD = "kv_head = h // group"


def decode_longest_first(sides: Sides, number: str) -> tuple[str, ...]:
    """The same for an order in which the tiles of `together` heads come by turns, those with most to visit first."""
    resident, heads = sides.resident, "kv_heads" if sides.grouped or sides.resident.packed else "heads"
    own = "kv_head" if heads == "kv_heads" else "h"
    tile = "place // members" if resident.noun == "key" else "tiles - 1 - place // members"
    return (
        *(("kv_heads = heads // group",) if own == "kv_head" else ()),
        f"section = {number} // (tiles * together)",
        f"members = tl.minimum({heads} * batch - section * together, together)",
        f"place = {number} % (tiles * together)",
        f"{resident.tile} = {tile}",
        "pair = section * together + place % members",
        f"{own} = pair % {heads}",
        f"b = pair // {heads}",
        *((KV_HEAD,) if own == "h" else ()),
    )


def decode(
    sides: Sides, number: str, loop_b: bool = False, loop_h: bool = False
) -> tuple[tuple[str, ...], Loop | None]:
    """Lines that find tile, batch and head from `number`, and the loop over those that one program owns."""
    tile = f"{sides.resident.tile} = {number} % tiles"
    if sides.grouped or sides.resident.packed:
        return (
            tile,
            "kv_heads = heads // group",
            f"kv_head = {number} // tiles % kv_heads",
            f"b = {number} // tiles // kv_heads",
        ), None
    if not (loop_b or loop_h):
        return (tile, f"h = {number} // tiles % heads", f"b = {number} // tiles // heads", KV_HEAD), None
    if not loop_b:
        comment = "the heads, which share the result"
        return (tile, f"b = {number} // tiles"), Loop(comment, "g", "heads", ("h = tl.full([], g, tl.int32)", KV_HEAD))
    if not loop_h:
        comment = "the batch, which shares the result"
        return (tile, f"h = {number} // tiles", KV_HEAD), Loop(comment, "g", "batch", ("b = tl.full([], g, tl.int32)",))
    both = ("pair = tl.full([], g, tl.int32)", "b = pair // heads", "h = pair % heads", KV_HEAD)
    return (tile,), Loop("batch and heads, which share the result", "g", "batch * heads", both)


@dataclass(frozen=True)
class Chunk:
    """A power-of-two slice of a head dim. `limit`: the head dim where the slice reaches beyond it, else None."""

    index: int
    start: int
    width: int
    limit: int | None


def chunks(head_dim: int) -> tuple[Chunk, ...]:
    """192 = 128 + 64, 80 = 64 + 16; a rest below 16 is padded to 16, the least a matrix product takes."""
    out: list[Chunk] = []
    start = 0
    while start < head_dim:
        width = max(16, 1 << ((head_dim - start).bit_length() - 1))
        out.append(Chunk(len(out), start, width, head_dim if start + width > head_dim else None))
        start += width
    return tuple(out)


@dataclass(frozen=True)
class View:
    """A tensor [B, heads, n, d] as the kernel sees it.

    head: the variable with its head number; packed: that is a vector along the rows. strided: the last dimension has a stride
    of its own. paged: rows are in pages, found by a page table.
    """

    name: str
    chunks: tuple[Chunk, ...]
    columns: str
    head: str
    strided: bool
    packed: bool = False
    paged: bool = False
    described: bool = False
    side: Side | None = None
