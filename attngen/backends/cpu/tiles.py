"""What a query tile visits on the CPU: runs of keys, cut into chunks, and the mask where a chunk needs it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, reduce
from typing import Any, NamedTuple

import sympy
import torch

from attngen.analysis import Axis, Facts, run
from attngen.analysis.tiles import Segments
from attngen.errors import InputError
from attngen.language.call import Call
from attngen.language.expression import (
    B,
    H,
    I,
    J,
    Load,
    Where,
    conjunction,
    evaluate,
    is_int,
    linear_terms,
    negate,
    to_text,
)
from attngen.language.lists import TileLists

GRAIN = 32  # keys: the walk's bounds are rounded to this, not to the chunk
SHORT, LONG = 256, 1024  # keys of a chunk that is worth bundling, and of a bundle
KEPT_BYTES = 2**26  # of masks that a job keeps


class Chunks(NamedTuple):
    """The keys a query tile visits, start[n] .. stop[n] - 1 in ascending order, and where it needs the mask: in columns
    low[x] .. high[x] - 1 of chunk owner[x]. Lists, because the inner loops take them as they are.
    """

    start: list[int]
    stop: list[int]
    owner: list[int]
    low: list[int]
    high: list[int]

    @property
    def bundle(self) -> list[int]:
        """Which chunks are taken together: the first of each bundle, and how many there are. Short ones are bundled."""
        first, keys = [], LONG
        for n, (start, stop) in enumerate(zip(self.start, self.stop, strict=True)):
            keys += stop - start
            if keys > LONG or stop - start > SHORT:
                first.append(n)
                keys = stop - start if stop - start <= SHORT else LONG
        return [*first, len(self.start)]


class Blocked:
    """A mask on one tile and column range, [rows, columns] or [heads, rows, columns]. cap: +inf and -inf."""

    def __init__(self, cap: torch.Tensor):
        self.cap = cap

    @cached_property
    def keep(self) -> torch.Tensor:
        """All bits set where the pair is attended, none elsewhere, as integers as wide as the logits."""
        return (self.cap > 0).to(torch.int64 if self.cap.dtype == torch.float64 else torch.int32).neg_()


class Keys:
    """The key chunks of every query tile of a call: the walk program, run for all tiles at once."""

    def __init__(self, call: Call, facts: Facts, block_m: int, chunk: int, kernel: str):
        offset: Any = call.q_offset.view(-1, 1, 1).long() if isinstance(call.q_offset, torch.Tensor) else call.q_offset
        env, tables = walk_env(call), call.tables.get(kernel)
        self.length, self.chunk = call.n_k, max(GRAIN, chunk)
        queries, keys = Axis("i", offset, call.q.shape[2]), Axis("j", 0, self.length)
        full, partial = run(facts.walk_keys, facts.program_keys, env, queries, keys, block_m, GRAIN, tables=tables)
        self.by_head = any(x.shape[1] > 1 for segment in (*full, *partial) for x in segment)
        every = (call.q.shape[0], call.q.shape[1] if self.by_head else 1, -(-call.q.shape[2] // block_m))
        self.visited = sum(int(count.expand(every).sum()) for _, count in (*full, *partial)) * GRAIN
        self._segments = [*_lists(full, False), *_lists(partial, True)]

    def chunks(self, b: int, h: int, tile: int) -> Chunks:
        """Chunks of a tile. A chunk has at most `chunk` keys and crosses no gap."""
        runs = []
        for firsts, counts, partial in self._segments:
            first, count = _at(firsts, b, h, tile), _at(counts, b, h, tile)
            if count > 0:
                runs.append((first * GRAIN, min((first + count) * GRAIN, self.length), partial))
        return cut(runs, self.chunk)


def walk_env(call: Call) -> dict[str, Any]:
    """What walks and their tables read."""
    return {
        **call.captures,
        **call.params,
        "b": torch.arange(call.q.shape[0]).view(-1, 1, 1),
        "h": torch.arange(call.q.shape[1]).view(1, -1, 1),
    }


class ListedKeys:
    """The same from lists of tiles (`attngen.language.lists.TileLists`); block_m divides theirs."""

    def __init__(self, call: Call, lists: TileLists, block_m: int, chunk: int):
        self.length, self.chunk, self.lists = call.n_k, max(lists.block_n, chunk), lists
        self._tiles_per_row = lists.block_m // block_m
        tiles, runs = call.captures["query_tiles"], call.captures["query_runs"]
        self.by_head = max(tiles.shape[1], runs.shape[1]) > 1
        batch = call.q.shape[0] if max(tiles.shape[0], runs.shape[0]) == 1 else 1
        self.visited = int(runs[..., 1:].sum()) * self._tiles_per_row * lists.block_n * batch
        self._tiles, self._runs = tiles.tolist(), runs.tolist()

    def chunks(self, b: int, h: int, tile: int) -> Chunks:
        """Chunks of a tile; neighbouring listed tiles share one."""
        first, full, partial = _at(self._runs, b, h, tile // self._tiles_per_row)
        own = self._tiles[b if len(self._tiles) > 1 else 0]
        own = own[h if len(own) > 1 else 0][first : first + full + partial]
        size = self.lists.block_n
        runs = [(n * size, min((n + 1) * size, self.length), at >= full) for at, n in enumerate(own)]
        return cut(runs, self.chunk)


def cut(runs: list[tuple[int, int, bool]], size: int) -> Chunks:
    """Disjoint runs of keys (start, stop, whether the mask is needed), as chunks of at most `size` keys."""
    chunks = Chunks([], [], [], [], [])
    for start, stop, partial in sorted(runs):
        while start < stop:
            if not (chunks.stop and chunks.stop[-1] == start and start - chunks.start[-1] < size):
                chunks.start.append(start)
                chunks.stop.append(start)
            begin = chunks.start[-1]
            chunks.stop[-1] = min(stop, begin + size)
            if partial:
                chunks.owner.append(len(chunks.start) - 1)
                chunks.low.append(start - begin)
                chunks.high.append(chunks.stop[-1] - begin)
            start = chunks.stop[-1]
    return chunks


def _lists(segments: Segments, partial: bool) -> Iterator[tuple[Any, Any, bool]]:
    for first, count in segments:
        yield first.tolist(), count.tolist(), partial


def _at(nested: Any, b: int, h: int, tile: int) -> Any:
    by_batch = nested[b if len(nested) > 1 else 0]
    by_head = by_batch[h if len(by_batch) > 1 else 0]
    return by_head[tile if len(by_head) > 1 else 0]


class Masks:
    """Masks of the tiles that one job visits. Each is evaluated once for all heads it holds for, and once for all tiles
    at one distance from the diagonal when it depends on i - j alone; then all threads may share one of these.
    """

    def __init__(self, call: Call, env: dict[str, Any], real: torch.dtype, like: Masks | None = None):
        """like: another job's masks of the same call."""
        self.mask, self.env, self.real = call.spec.mask, env, real
        self.by_batch = B in self.mask.free_symbols or isinstance(call.q_offset, torch.Tensor)
        self.by_head = H in self.mask.free_symbols
        self.by_distance = _depends_on_distance(self.mask)
        self.apart: Allowed | None = (
            like.apart if like is not None else None if self.by_distance else apart(call, env, real)
        )
        self.offsets: list[int] = torch.as_tensor(call.q_offset).expand(call.q.shape[0]).tolist()
        self._known: dict[Any, Blocked] = {}
        self._tile: Any = None
        self._bytes = 0

    def blocked(self, b: int, heads: range, first: int, rows: int, start: int, stop: int) -> Blocked:
        """For queries at positions first .. first + rows - 1 and keys start .. stop - 1."""
        if not self.by_distance and self._tile != (b, first):
            self._tile = (b, first)
            self._forget()
        place = first - start if self.by_distance else (first, start)
        key = (place, rows, stop - start, b if self.by_batch else 0, heads if self.by_head else None)
        block = self._known.get(key)
        if block is None:
            if self._bytes > KEPT_BYTES:
                self._forget()
            if self.apart is not None:
                allowed = self.apart(
                    b, heads, slice(first - self.offsets[b], first - self.offsets[b] + rows), slice(start, stop)
                )
            else:
                env = {**self.env, **positions(b, heads, first, rows, start, stop)}
                allowed = torch.as_tensor(evaluate(self.mask, env, real=self.real))
            allowed = allowed.expand(*allowed.shape[:-2], rows, stop - start)
            # 0 and 1 to -inf and +inf: masked_fill_ and where branch per element.
            cap = allowed.to(self.real).sub(0.5).mul_(torch.inf)
            block = self._known[key] = Blocked(cap)
            self._bytes += 2 * cap.numel() * cap.element_size()
        return block

    def of(self, chunks: Chunks, x: int, b: int, heads: range, first: int, rows: int) -> Blocked:
        """The x-th mask that a tile needs."""
        begin = chunks.start[chunks.owner[x]]
        return self.blocked(b, heads, first, rows, begin + chunks.low[x], begin + chunks.high[x])

    def _forget(self) -> None:
        self._known.clear()
        self._bytes = 0


# b, heads, rows, keys -> [heads or nothing, rows or 1, keys or 1]
Allowed = Callable[[int, range, slice, slice], torch.Tensor]


def apart(call: Call, env: dict[str, Any], real: torch.dtype) -> Allowed | None:
    """The mask of a tile, 1 where attended and 0 elsewhere, from parts that were evaluated once for all queries and once for
    all keys, where every integer comparison in it is a sum of such parts; None for other masks.
    """
    by_query, by_key = axis_scopes(call, env)

    def build(node: Any) -> Allowed | None:
        if isinstance(node, (sympy.And, sympy.Or)):
            parts = [build(arg) for arg in node.args]
            join = operator.mul if isinstance(node, sympy.And) else torch.maximum
            if any(part is None for part in parts):
                return None
            return lambda *at: reduce(join, (part(*at) for part in parts if part is not None))
        compare = _COMPARISONS.get(type(node))
        if compare is None or not is_int(node.args[0]):
            return None
        terms, constant = linear_terms(node.args[0])
        keyed = [term for term in terms if J in term.free_symbols]
        if any(I in term.free_symbols for term in keyed):
            return None
        rest = constant + sum(terms[term] * term for term in terms if term not in keyed)
        left = _by_place(evaluate(rest, by_query))
        right = _by_place(evaluate(-sum((terms[term] * term for term in keyed), sympy.Integer(0)), by_key))

        def allowed(b: int, heads: range, rows: slice, keys: slice) -> torch.Tensor:
            sides = _part(left, b, heads, rows).unsqueeze(-1), _part(right, b, heads, keys).unsqueeze(-2)
            shape = torch.broadcast_shapes(*(side.shape for side in sides))
            return compare(*sides, out=torch.empty(shape, dtype=real))  # in bool it would take three times as long

        return allowed

    return build(call.spec.mask)


_COMPARISONS: dict[Any, Any] = {
    sympy.GreaterThan: torch.ge,
    sympy.StrictGreaterThan: torch.gt,
    sympy.Equality: torch.eq,
    sympy.Unequality: torch.ne,
}


def axis_scopes(call: Call, env: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What expressions read along all queries, and along all keys: they broadcast to [B, H, N]."""
    offset = call.q_offset.view(-1, 1, 1) if isinstance(call.q_offset, torch.Tensor) else call.q_offset
    place = {"b": torch.arange(call.q.shape[0]).view(-1, 1, 1), "h": torch.arange(call.q.shape[1]).view(1, -1, 1)}
    rows = torch.arange(call.q.shape[2]).view(1, 1, -1) + offset
    return {**env, **place, "i": rows}, {**env, **place, "j": torch.arange(call.n_k).view(1, 1, -1)}


def _by_place(value: Any) -> torch.Tensor:
    """[B or 1, H or 1, N or 1]: what is the same at all places stays one number, which costs a comparison nothing."""
    value = torch.as_tensor(value)
    return value.view((1,) * (3 - value.ndim) + tuple(value.shape))


def _part(values: torch.Tensor, b: int, heads: range, places: slice) -> torch.Tensor:
    """[B or 1, H or 1, N or 1] -> [n], or [heads, n] for several heads that differ; n is 1 where the places don't differ."""
    own = values[b if values.shape[0] > 1 else 0]
    own = own if own.shape[1] == 1 else own[:, places]
    if own.shape[0] == 1:
        return own[0]
    return own[heads.start] if len(heads) == 1 else own[heads.start : heads.stop]


def positions(b: int, heads: range, first: int, rows: int, start: int, stop: int) -> dict[str, Any]:
    """b, h, i and j of a tile: they broadcast to [heads, rows, keys], or [rows, keys] for a single head."""
    return {
        "b": b,
        "h": heads[0] if len(heads) == 1 else torch.arange(heads.start, heads.stop).view(-1, 1, 1),
        "i": torch.arange(first, first + rows).view(-1, 1),
        "j": torch.arange(start, stop),
    }


@lru_cache(maxsize=256)
def _depends_on_distance(mask: Any) -> bool:
    """Whether moving query and key by one same amount changes nothing, as far as the form shows it."""
    step = sympy.Dummy("step", integer=True)
    return bool(mask.xreplace({I: I + step, J: J + step}) == mask)


# -- loads out of range -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def checked_loads(expr: Any, by_offset: bool) -> tuple[tuple[Load, Any], ...]:
    """Loads whose indices have to be checked at run time, each with the condition under which its value is used.

    Plain b, h, i, j are checked when a call is bound; i is not when the offset is a tensor (`by_offset`).
    """
    plain = {B, H, J} if by_offset else {B, H, I, J}
    found: dict[tuple[Load, Any], None] = {}

    def visit(node: Any, used: Any) -> None:
        if isinstance(node, Where):
            condition, yes, no = node.args
            visit(condition, used)
            visit(yes, conjunction([used, condition]))
            visit(no, conjunction([used, negate(condition)]))
            return
        if isinstance(node, Load) and any(index not in plain and not index.is_Integer for index in node.indices):
            found[node, used] = None
        for arg in node.args:
            visit(arg, used)

    visit(expr, sympy.true)
    return tuple(found)


def check_loads(
    loads: tuple[tuple[Load, Any], ...], env: dict[str, Any], attended: torch.Tensor | None, real: torch.dtype
) -> None:
    """InputError if an attended pair loads outside its tensor. `attended`: bool, broadcasts to the tile; None for all."""
    for load, used in loads:
        for dim, (index, size) in enumerate(zip(load.indices, env[load.name].shape, strict=True)):
            values = torch.as_tensor(evaluate(index, env, real=real))
            if values.numel() == 0:
                continue
            low, high = (int(x) for x in values.aminmax())
            if low >= 0 and high < size:
                continue
            wrong = ((values < 0) | (values >= size)) & torch.as_tensor(evaluate(used, env, real=real))
            wrong = wrong if attended is None else wrong & attended
            if wrong.any():
                value = int(values.expand(wrong.shape)[wrong][0])
                raise InputError(
                    load.name,
                    f"`{to_text(index)}`, its index {dim}, in 0 .. {size - 1} for every pair that the mask keeps",
                    f"{value}",
                    "clamp the index with min and max, mask these pairs out, or pass a larger tensor",
                )
