"""What a query tile visits on the CPU: runs of keys, cut into chunks, and the mask where a chunk needs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch

from attngen.analysis import Axis, Facts, run
from attngen.analysis.tiles import Segments
from attngen.errors import InputError
from attngen.expression import B, H, I, J, Load, S, Where, conjunction, evaluate, negate, to_text
from attngen.inputs import Call

GRAIN = 32  # keys: the walk's bounds are rounded to this, not to the chunk
KEPT_MASKS = 64  # masks that a job keeps for tiles at the same distance from the diagonal


@dataclass(frozen=True)
class Chunk:
    """Keys start .. stop - 1, and the column ranges (relative to start) in which the mask has to be applied."""

    start: int
    stop: int
    partial: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Blocked:
    """A mask on one tile and column range, ready to apply: [M, columns] or [heads, M, columns].

    keep: all bits set where the pair is attended, none elsewhere, as an integer of the logits' width; cap: +inf and -inf.
    """

    keep: torch.Tensor
    cap: torch.Tensor


class Keys:
    """The key chunks of every query tile of a call: the walk program, run for all tiles at once."""

    def __init__(self, call: Call, facts: Facts, block_m: int, chunk: int):
        offset: Any = call.q_offset.view(-1, 1, 1).long() if isinstance(call.q_offset, torch.Tensor) else call.q_offset
        env: dict[str, Any] = {
            **call.captures,
            **call.params,
            "b": torch.arange(call.q.shape[0]).view(-1, 1, 1),
            "h": torch.arange(call.q.shape[1]).view(1, -1, 1),
        }
        self.length, self.chunk = call.k.shape[2], max(GRAIN, chunk)
        queries, keys = Axis("i", offset, call.q.shape[2]), Axis("j", 0, self.length)
        full, partial = run(facts.walk_keys, facts.program_keys, env, queries, keys, block_m, GRAIN)
        self.by_head = any(x.shape[1] > 1 for segment in (*full, *partial) for x in segment)
        self.visited = sum(int(count.sum()) for _, count in (*full, *partial)) * GRAIN
        self._segments = [*_lists(full, False), *_lists(partial, True)]

    def chunks(self, b: int, h: int, tile: int) -> tuple[Chunk, ...]:
        """Chunks of a tile in ascending order. A chunk has at most `chunk` keys and crosses no gap."""
        runs = []
        for firsts, counts, partial in self._segments:
            first, count = _at(firsts, b, h, tile), _at(counts, b, h, tile)
            if count > 0:
                runs.append((first * GRAIN, min((first + count) * GRAIN, self.length), partial))
        return _cut(tuple(sorted(runs)), self.chunk)


def _lists(segments: Segments, partial: bool) -> Iterator[tuple[Any, Any, bool]]:
    for first, count in segments:
        yield first.tolist(), count.tolist(), partial


def _at(nested: Any, b: int, h: int, tile: int) -> int:
    by_batch = nested[b if len(nested) > 1 else 0]
    by_head = by_batch[h if len(by_batch) > 1 else 0]
    return by_head[tile if len(by_head) > 1 else 0]


@lru_cache(maxsize=4096)
def _cut(runs: tuple[tuple[int, int, bool], ...], size: int) -> tuple[Chunk, ...]:
    chunks: list[Chunk] = []
    for start, stop, partial in runs:
        while start < stop:
            last = chunks[-1] if chunks else None
            if last is not None and last.stop == start and start - last.start < size:
                chunks.pop()
            else:
                last = Chunk(start, start, ())
            end = min(stop, last.start + size)
            columns = ((start - last.start, end - last.start),) if partial else ()
            chunks.append(Chunk(last.start, end, last.partial + columns))
            start = end
    return tuple(chunks)


class Masks:
    """Masks of the tiles that one job visits. Each is evaluated once for all heads it holds for, and once for all tiles
    at one distance from the diagonal when it depends on i - j alone.
    """

    def __init__(self, call: Call, env: dict[str, Any], real: torch.dtype):
        self.mask, self.env, self.real = call.spec.mask, env, real
        self.by_batch = B in self.mask.free_symbols or isinstance(call.q_offset, torch.Tensor)
        self.by_head = H in self.mask.free_symbols
        self.by_distance = _depends_on_distance(self.mask)
        self._known: dict[Any, Blocked] = {}
        self._tile: Any = None

    def blocked(self, b: int, heads: range, first: int, rows: int, start: int, stop: int) -> Blocked:
        """For queries at positions first .. first + rows - 1 and keys start .. stop - 1."""
        if (self._tile != (b, first) and not self.by_distance) or len(self._known) > KEPT_MASKS:
            self._known.clear()
        self._tile = (b, first)
        place = first - start if self.by_distance else (first, start)
        key = (place, rows, stop - start, b if self.by_batch else 0, heads if self.by_head else None)
        if key not in self._known:
            env = {**self.env, **positions(b, heads, first, rows, start, stop)}
            allowed = torch.as_tensor(evaluate(self.mask, env, real=self.real))
            allowed = allowed.expand(torch.broadcast_shapes(allowed.shape, (rows, stop - start)))
            word = torch.int64 if self.real == torch.float64 else torch.int32
            cap = torch.full(allowed.shape, torch.inf, dtype=self.real).masked_fill_(~allowed, -torch.inf)
            self._known[key] = Blocked(allowed.to(word).neg_(), cap)
        return self._known[key]


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


def is_identity(score: Any) -> bool:
    """Whether the score is s itself."""
    return bool(score == S)
