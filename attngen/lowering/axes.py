"""The two axes of a tile, which of them is resident in a kernel and which is walked, and how a program finds its batch, head
and tile."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attngen.lowering.statements import Assign, Loop, Name, Statements, Value, arange, assign, call, name, unhoisted

N_Q, N_K, GROUP, HEADS_, BATCH = (name(length) for length in ("n_q", "n_k", "group", "heads", "batch"))
B, H, TILES, PROGRAM = name("b"), name("h"), name("tiles"), name("program")


@dataclass(frozen=True)
class TileAxis:
    """Variables of the query rows, or of the keys, of a tile.

    tile: the number of a resident one; tiles: how many there are. block: rows of a tile; length: of the whole axis. index: row
    numbers; lane: the lanes of a walked tile; stored: which resident rows exist. rows: the statements that make a resident
    tile's row numbers. position: makes original positions from row numbers, None where they are the same; safe: makes
    positions that exist, for loads. packed: the rows belong to several heads, so `h` is a vector along them.
    """

    noun: str
    axis: str
    tile: str
    tiles: Value
    block: str
    length: str
    index: str
    lane: str
    stored: str
    rows: Statements
    position: Assign | None
    safe: Assign
    packed: bool = False

    @property
    def shift(self) -> bool:
        """Whether original positions are row numbers plus q_offset."""
        return self.position is not None


def _row(row: Value, stored: Value) -> Statements:
    return assign("row", row, "i"), assign("row_in", stored, "i")


_QUERY_TILE, _ROW, _SLOT = name("query_tile"), name("row", "i"), name("slot", "i")
_KEY_TILE, _KEY, _KEY_SLOT = name("key_tile"), name("j", "j"), name("slot", "j")
_M, _N = name("BLOCK_M"), name("BLOCK_N")
_FIRST_ROW = _QUERY_TILE * _M

QUERY = TileAxis(
    noun="query",
    axis="i",
    tile="query_tile",
    tiles=call("tl.cdiv", N_Q, _M),
    block="BLOCK_M",
    length="n_q",
    index="row",
    lane="lane_m",
    stored="row_in",
    rows=_row(_FIRST_ROW + arange("BLOCK_M"), _ROW.less(N_Q)),
    position=assign("i", _ROW + name("q_offset"), "i"),
    safe=assign("i_safe", call("tl.minimum", _ROW, N_Q - 1) + name("q_offset"), "i"),
)
KEY = TileAxis(
    noun="key",
    axis="j",
    tile="key_tile",
    tiles=call("tl.cdiv", N_K, _N),
    block="BLOCK_N",
    length="n_k",
    index="j",
    lane="lane_n",
    stored="key_in",
    rows=(assign("j", _KEY_TILE * _N + arange("BLOCK_N"), "j"), assign("key_in", _KEY.less(N_K), "j")),
    position=None,
    safe=assign("j_safe", call("tl.minimum", _KEY, N_K - 1), "j"),
)
# Rows are (query, head of the group) pairs, so that keys are read once for all heads that share them.
PACKED = replace(
    QUERY,
    tiles=call("tl.cdiv", N_Q * GROUP, _M),
    rows=(
        assign("slot", _FIRST_ROW + arange("BLOCK_M"), "i"),
        assign("row", _SLOT // GROUP, "i"),
        assign("h", name("kv_head") * GROUP + _SLOT % GROUP, "i"),
        assign("row_in", _ROW.less(N_Q), "i"),
    ),
    packed=True,
)
# With a list of keys per query the rows of a tile are the heads of one query.
HEADS = replace(
    QUERY,
    tiles=N_Q * call("tl.cdiv", GROUP, _M),
    rows=(
        assign("group_tiles", call("tl.cdiv", GROUP, _M)),
        assign("query", _QUERY_TILE // name("group_tiles")),
        assign("slot", _QUERY_TILE % name("group_tiles") * _M + arange("BLOCK_M"), "i"),
        assign("row", name("query") + call("tl.zeros_like", _SLOT), "i"),
        assign("h", name("kv_head") * GROUP + call("tl.minimum", _SLOT, GROUP - 1), "i"),
        assign("row_in", _SLOT.less(GROUP), "i"),
    ),
    packed=True,
)
# One query of one head, or one key: the other rows of the tile are copies that are not stored.
ONE_QUERY = replace(
    QUERY,
    tiles=N_Q,
    rows=(
        assign("query", _QUERY_TILE),
        assign("slot", arange("BLOCK_M"), "i"),
        assign("row", name("query") + call("tl.zeros_like", _SLOT), "i"),
        assign("row_in", _SLOT.less(1), "i"),
    ),
)
ONE_KEY = replace(
    KEY,
    tiles=N_K,
    rows=(
        assign("slot", arange("BLOCK_N"), "j"),
        assign("j", _KEY_TILE + call("tl.zeros_like", _KEY_SLOT), "j"),
        assign("key_in", _KEY_SLOT.less(1), "j"),
    ),
)


@dataclass(frozen=True)
class Roles:
    """Which axis is resident in a kernel and which is walked, and whether a program serves a whole GQA group in turn."""

    resident: TileAxis
    walked: TileAxis
    grouped: bool = False

    @property
    def by_kv_head(self) -> bool:
        """Whether an output belongs to a kv head, not to a query head."""
        return self.grouped or self.resident.packed


def roles_of(by_keys: bool, grouped: bool, *, packed: bool, listed: bool, by_query_head: bool) -> Roles:
    """by_keys: keys are resident. grouped: for all query heads in turn. packed: (query, head) rows. listed: a list of keys per
    query, `by_query_head` each head its own.
    """
    if by_keys:
        return Roles(ONE_KEY if listed else KEY, QUERY, grouped)
    if listed:
        return Roles(HEADS if packed and not by_query_head else ONE_QUERY, KEY)
    return Roles(PACKED if packed else QUERY, KEY)


# -- which output a program computes ----------------------------------------------------------------------------------

_KV_HEAD = assign("kv_head", H // GROUP)
_KV_HEADS = assign("kv_heads", HEADS_ // GROUP)


def decode(roles: Roles, number: Name) -> Statements:
    """Finds tile, batch and head from the number of an output."""
    heads, head = ("kv_heads", "kv_head") if roles.by_kv_head else ("heads", "h")
    return (
        assign(roles.resident.tile, number % TILES),
        *((_KV_HEADS,) if roles.by_kv_head else ()),
        assign(head, number // TILES % name(heads)),
        assign("b", number // TILES // name(heads)),
        *(() if roles.by_kv_head else (_KV_HEAD,)),
    )


def decode_tables(roles: Roles, by_batch: bool, by_head: bool) -> Statements:
    """The same for one program per tile of the batches and heads that differ."""
    rest = PROGRAM // TILES
    out = [assign(roles.resident.tile, PROGRAM % TILES)]
    if by_head:
        out.append(assign("h", rest % HEADS_))
        rest = rest // HEADS_
    return (*out, *((assign("b", rest),) if by_batch else ()))


def decode_longest_first(roles: Roles, number: Name) -> Statements:
    """The same for an order in which the tiles of `together` heads come by turns, those with most to visit first."""
    heads, head = ("kv_heads", "kv_head") if roles.by_kv_head else ("heads", "h")
    together, section, members, turn = (name(n) for n in ("together", "section", "members", "turn"))
    tile = turn // members if roles.resident.noun == "key" else TILES - 1 - turn // members
    return (
        *((_KV_HEADS,) if roles.by_kv_head else ()),
        assign("section", number // (TILES * together)),
        assign("members", call("tl.minimum", name(heads) * BATCH - section * together, together)),
        assign("turn", number % (TILES * together)),
        assign(roles.resident.tile, tile),
        assign("pair", section * together + turn % members),
        assign(head, name("pair") % name(heads)),
        assign("b", name("pair") // name(heads)),
        *(() if roles.by_kv_head else (_KV_HEAD,)),
    )


def every_output(roles: Roles, programs: Value) -> tuple[Value, Value, Value]:
    """The bounds of the numbers of the outputs that one of so many programs has."""
    heads = HEADS_ // GROUP if roles.by_kv_head else HEADS_
    return PROGRAM, TILES * heads * BATCH, programs


def decode_shared(roles: Roles, all_batches: bool, all_heads: bool, launched: Value) -> tuple[Statements, Loop | None]:
    """The same for programs that compute what batches or heads share, and the loop over those. launched: how many programs
    there are.
    """
    if roles.by_kv_head or not (all_batches or all_heads):
        return decode(roles, PROGRAM), None
    if not all_heads:
        every = unhoisted(*every_output(roles, launched))
        return (), Loop("output", every, decode(roles, name("output")), "the batch, which shares a result")
    number = call("tl.full", name("[]"), name("g"), name("tl.int32"))
    tile = assign(roles.resident.tile, PROGRAM % TILES)
    if not all_batches:
        each = (assign("h", number), _KV_HEAD)
        comment = "the heads, which share the result"
        return (tile, assign("b", PROGRAM // TILES)), Loop("g", call("range", HEADS_), each, comment)
    pair = name("pair")
    both = (assign("pair", number), assign("b", pair // HEADS_), assign("h", pair % HEADS_), _KV_HEAD)
    return (tile,), Loop("g", call("range", BATCH * HEADS_), both, "batch and heads, which share the result")


# -- tensors ----------------------------------------------------------------------------------------------------------


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

    dim: its head dim; columns: the name of its column numbers. head: the variable with its head number; packed: that is a
    vector along the rows. strided: the last dimension has a stride of its own. paged: rows are in pages, found by a page
    table. described: tiles are loaded through a tensor descriptor. axis: of its rows.
    """

    name: str
    dim: int
    columns: str
    head: str
    axis: TileAxis
    strided: bool = False
    packed: bool = False
    paged: bool = False
    described: bool = False

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The slices of its head dim that the kernel holds."""
        return chunks(self.dim)
