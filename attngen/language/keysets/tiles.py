"""Key sets of tiles: layouts given at the call, patterns that a formula lists, lines and columns, closed forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from attngen.errors import SpecError
from attngen.language.keyset import KeySet, positive
from attngen.language.lists import TileLists

if TYPE_CHECKING:
    from attngen.language.expression import Expr

Block = tuple[int, int]


@dataclass(frozen=True)
class Tiles(KeySet):
    """Base of key sets that list tiles of `block` = (queries, keys), a field of each."""


def read_block(place: str, block: Any) -> Block:
    """(queries, keys) of a tile, from a pair or from one number for both. SpecError unless both are multiples of 16."""
    pair = (block, block) if isinstance(block, int) else block
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise SpecError(f"{place}: block is (queries, keys) of a tile, or one number for both, got {block!r}")
    try:
        lists = TileLists(*pair)
    except SpecError:
        wanted = "block is (queries, keys) of a tile, both multiples of 16, or one number for both"
        raise SpecError(f"{place}: {wanted}, got {block!r}") from None
    return lists.block_m, lists.block_n


@dataclass(frozen=True)
class BlockSparse(Tiles):
    """Tiles given as a layout, or as counts and indices."""

    block: Block

    name: ClassVar[str] = "block_sparse"
    prepared: ClassVar[tuple[str, ...]] = ("layout", "counts", "indices")
    optional: ClassVar[tuple[str, ...]] = ("layout", "counts", "indices")

    def __post_init__(self) -> None:
        read_block(self.name, self.block)


@dataclass(frozen=True)
class BlockCluster(Tiles):
    """Key tiles given per query tile. index int [B or 1, H or 1, tiles_q, K], -1 for none."""

    block: Block

    name: ClassVar[str] = "block_cluster"
    prepared: ClassVar[tuple[str, ...]] = ("index",)

    def __post_init__(self) -> None:
        read_block(self.name, self.block)


def block_sparse(block: Any = (128, 128)) -> BlockSparse:
    """Attention to live tiles (block-sparse FlashAttention, arXiv 2205.14135): `Spec(keys=ag.block_sparse((128, 128)),
    mask=...)`, block = (queries, keys) of a tile, multiples of 16. At the call either

    layout= bool [B or 1, H or 1, tiles_q, tiles_k], True for a live tile; or, for long inputs,
    counts= int [B or 1, H or 1, tiles_q] and indices= int [B or 1, H or 1, tiles_q, L]: row r's live tiles are the first
    counts[r] entries of indices[r], in any order; one that is listed twice counts once.

    Tiles are of rows: query tile r has rows r * block_m and on, whatever q_offset is. The mask holds inside live tiles;
    H is the number of query heads. `attn.plan` sorts the tiles by what the mask makes of them: it needs the mask's
    captures, and serves calls with the same ones. Raises SpecError, and InputError at the call.
    """
    return BlockSparse(read_block("block_sparse", block))


def block_cluster(block: Any = (64, 64)) -> BlockCluster:
    """Each query tile attends to the key tiles it names (SparseAccelerate's block clusters, arXiv 2412.06198):
    `Spec(keys=ag.block_cluster((64, 64)), mask=ag.causal())`, called with index= int [B or 1, H or 1, tiles_q, K], -1 for
    none; a tile that is named twice counts once. Raises SpecError, and InputError at the call.
    """
    return BlockCluster(read_block("block_cluster", block))


@dataclass(frozen=True)
class Butterfly(Tiles):
    """Tiles whose places on a grid differ in at most one bit."""

    block: Block
    size: int | None = None
    levels: int | None = None
    global_rows: int = 0
    global_columns: int = 0

    name: ClassVar[str] = "butterfly"

    def __post_init__(self) -> None:
        read_block(self.name, self.block)
        if self.size is not None and positive("butterfly: size", self.size) & (self.size - 1):
            raise SpecError(f"butterfly: size is a power of two, got {self.size}")
        for place, least in (("levels", 0), ("global_rows", 0), ("global_columns", 0)):
            if getattr(self, place) is not None:
                positive(f"butterfly: {place}", getattr(self, place), least)


@dataclass(frozen=True)
class BigBird(Tiles):
    """A window of tiles, global ones, and random ones."""

    block: Block
    window: int = 3
    globals: int = 1
    random: int = 3
    seed: int = 0

    name: ClassVar[str] = "big_bird"

    def __post_init__(self) -> None:
        read_block(self.name, self.block)
        for place in ("window", "globals", "random", "seed"):
            positive(f"big_bird: {place}", getattr(self, place), 0)
        if self.window % 2 == 0 and self.window:
            raise SpecError(f"big_bird: window is an odd number of tiles (or 0), got {self.window}")


def butterfly(
    block: Any = (128, 128),
    size: int | None = None,
    levels: int | None = None,
    global_rows: int = 0,
    global_columns: int = 0,
) -> Butterfly:
    """Block-sparse FlashAttention's butterfly (arXiv 2205.14135, section 3.3): `Spec(keys=ag.butterfly((128, 128)))`.

    Places r and c of a square grid are connected iff r xor c is 0 or a power of two below 2^levels (None: every power
    below the grid's side). `size`, a power of two, is the grid's side; it is stretched over the tiles: tile (r, c) is at
    the place (r * size // tiles_q, c * size // tiles_k). None: a grid on which each tile has a place of its own. The first
    `global_rows` query tiles see all keys, and the first `global_columns` key tiles are seen by all. Raises SpecError.
    """
    return Butterfly(read_block("butterfly", block), size, levels, global_rows, global_columns)


def big_bird(block: Any = (64, 64), window: int = 3, globals: int = 1, random: int = 3, seed: int = 0) -> BigBird:
    """BigBird (arXiv 2007.14062): `Spec(keys=ag.big_bird((64, 64), window=3, globals=2, random=3))`, sizes in tiles.

    Query tile r sees: the `window` (odd) key tiles around tile r * tiles_k // tiles_q; the first `globals` key tiles, and
    the first `globals` query tiles see all keys; and `random` other tiles, drawn without replacement for each query tile
    and head, the same for one seed on every device (all the others where there are no more). Raises SpecError.
    """
    return BigBird(read_block("big_bird", block), window, globals, random, seed)


@dataclass(frozen=True)
class Slashes(KeySet):
    """Base: heads that attend to columns, distances and whole tiles, in square tiles of `block`."""


@dataclass(frozen=True)
class VerticalSlash(Slashes):
    """Columns and distances given at the call."""

    block: int = 64

    name: ClassVar[str] = "vertical_slash"
    prepared: ClassVar[tuple[str, ...]] = ("vertical", "slash")

    def __post_init__(self) -> None:
        _square(self.name, self.block)


@dataclass(frozen=True)
class Adaptive(Slashes):
    """Per head an A-shape, vertical lines and slashes, or clusters of tiles, as an `Estimate` says."""

    block: int = 64

    name: ClassVar[str] = "adaptive"
    prepared: ClassVar[tuple[str, ...]] = ("estimate",)

    def __post_init__(self) -> None:
        _square(self.name, self.block)


def vertical_slash(block: int = 64) -> VerticalSlash:
    """Key columns and distances, chosen per head (MInference, arXiv 2407.02490; SparseAccelerate, 2412.06198):
    `Spec(keys=ag.vertical_slash(), mask=ag.causal())`, called with vertical= int [B, H, Kv], keys j, and slash=
    int [B, H, Ks], distances i - j of at least 0; -1 for none, H query heads. A pair is attended iff j is in vertical or
    i - j is in slash, and the mask holds; what is named twice counts once. Work goes with the tiles (`block` a side, a
    multiple of 16) that slash lines touch, and with Kv. Raises SpecError, and InputError at the call.
    """
    return VerticalSlash(_square("vertical_slash", block))


def adaptive(block: int = 64) -> Adaptive:
    """Per head the pattern that `ag.estimate` chose for it, all heads in one call: `Spec(keys=ag.adaptive(64),
    mask=ag.causal())`, called with estimate=ag.estimate(q, k, block=64, ...). Raises SpecError, and InputError at the call.
    """
    return Adaptive(_square("adaptive", block))


def _square(place: str, block: Any) -> int:
    try:
        return TileLists(positive(place, block), block).block_m
    except SpecError:
        raise SpecError(f"{place}: block is a multiple of 16, got {block!r}") from None


@dataclass(frozen=True)
class Pruned(Tiles):
    """The best tiles of each row of tiles, in the best heads."""

    keep: float
    block: Block = (64, 64)
    heads: float = 1.0

    name: ClassVar[str] = "pruned"

    def __post_init__(self) -> None:
        read_block(self.name, self.block)
        for place in ("keep", "heads"):
            value = getattr(self, place)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise SpecError(f"pruned: {place} is a share from 0 to 1, got {value!r}")


def pruned(keep: float, block: Any = (64, 64), heads: float = 1.0) -> Pruned:
    """Pruning by a cheap score, after Hybrid Dynamic Pruning (arXiv 2407.12893): `Spec(keys=ag.pruned(keep=0.25),
    mask=ag.causal())`. Nothing is given at the call; the choice gets no gradient. The rule:

    1. The rows of q in each query tile and of k in each key tile (`block`) are averaged. For each (b, head) the averages
       are divided by their step, (the largest absolute number among them) / 127, and rounded to integers.
    2. The score of tile (r, c) is the product of the two rows of integers.
    3. Of the n tiles of row r that the mask leaves (those where `ag.tile_map` is not 0), the ceil(keep * n) with the
       largest score are kept; of equal ones the lower c.
    4. A head's importance is the sum of |score| over its kept tiles, times its step of q and its step of k. In each batch
       the ceil(heads * H) most important heads are kept, of equal ones the lower; a dropped head has out 0 and lse -inf
       and costs nothing.

    Raises SpecError.
    """
    return Pruned(keep, read_block("pruned", block), heads)


@dataclass(frozen=True)
class Shape(KeySet):
    """Base of key sets that a condition on positions describes."""

    def condition(self) -> Expr:
        """Which pairs (i, j) are in the set."""
        raise NotImplementedError


@dataclass(frozen=True)
class Longformer(Shape):
    """A sliding window, perhaps dilated, and global tokens."""

    window: int
    globals: int = 0
    dilation: int = 1

    name: ClassVar[str] = "longformer"

    def __post_init__(self) -> None:
        positive("longformer: window", self.window)
        positive("longformer: globals", self.globals, 0)
        positive("longformer: dilation", self.dilation)

    def condition(self) -> Expr:
        from attngen.language.patterns import dilated_window, global_tokens, window

        reach = self.window // 2 + 1
        local = window(reach) if self.dilation == 1 else dilated_window(reach, self.dilation)
        return local | global_tokens(self.globals) if self.globals else local


@dataclass(frozen=True)
class AShape(Shape):
    """The first keys and the last ones."""

    sink: int
    window: int

    name: ClassVar[str] = "a_shape"

    def __post_init__(self) -> None:
        positive("a_shape: sink", self.sink, 0)
        positive("a_shape: window", self.window)

    def condition(self) -> Expr:
        from attngen.language.moved import i, j

        return (i >= j) & ((j < self.sink) | (i - j < self.window))


def longformer(window: int = 512, globals: int = 0, dilation: int = 1) -> Longformer:
    """Longformer (arXiv 2004.05150): `Spec(keys=ag.longformer(512, globals=2))`. A token sees window // 2 tokens on each
    side, `dilation` apart, and itself; the first `globals` tokens see all and are seen by all. With mask=ag.causal() it is
    the left half. Raises SpecError.
    """
    return Longformer(window, globals, dilation)


def a_shape(sink: int = 64, window: int = 1024) -> AShape:
    """The A-shape of MInference (arXiv 2407.02490) and SparseAccelerate (2412.06198), or StreamingLLM's attention sinks:
    `Spec(keys=ag.a_shape(64, 1024))`. A token sees the first `sink` tokens and the last `window`, itself included, as far
    as they are not after it. Raises SpecError.
    """
    return AShape(sink, window)
