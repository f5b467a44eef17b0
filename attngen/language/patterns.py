"""The library of named masks and scores. Masks are conditions and combine with & | ~; scores go into `Spec(score=...)`,
several of them as a list, applied in order.

Where a size is an `int`, a `Param` does as well: then its value is given at the call and changing it compiles nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from attngen.errors import InputError, SpecError
from attngen.language.expression import ROW, B, Expr, H, I, J, Param, S, Tensor, absolute, maximum, tanh, where
from attngen.language.expression.builder import wrap

b, h, i, j, s, r = Expr(B), Expr(H), Expr(I), Expr(J), Expr(S), Expr(ROW)

Size = int | Param | Expr

# -- masks ------------------------------------------------------------------------------------------------------------


def causal() -> Expr:
    """A query sees itself and what came before: i >= j."""
    return i >= j


def window(size: Size | None = None, *, left: Size | None = None, right: Size | None = None) -> Expr:
    """A sliding window. `size`: |i - j| < size, so that `causal() & window(n)` sees the last n keys, itself included.
    Or one-sided: `left` keeps i - j < left, `right` keeps j - i < right; None leaves that side open.
    """
    if size is not None and (left is not None or right is not None):
        raise SpecError("window: give size, or left and right, not both")
    left, right = (size, size) if size is not None else (left, right)
    if left is None and right is None:
        raise SpecError("window: give size, left or right")
    condition = wrap(True)
    for place, extent, distance in (("left", left, i - j), ("right", right, j - i)):
        if extent is not None:
            condition = condition & (distance < _positive(f"window: {place}", extent))
    return condition


def prefix_lm(prefix: Size | Tensor) -> Expr:
    """Prefix-LM: every query sees the first `prefix` keys, and causally the rest. A 1-D int Tensor gives one per batch."""
    length = prefix[b] if isinstance(prefix, Tensor) else wrap(prefix)
    return (j < length) | (i >= j)


def global_tokens(count: Size) -> Expr:
    """The first `count` tokens see and are seen by all: combine it, as in `window(512) | global_tokens(4)`."""
    return (i < count) | (j < count)


def dilated_window(size: Size, dilation: Size) -> Expr:
    """Every `dilation`-th key on both sides, `size` of them each way, itself included (Longformer, arXiv 2004.05150)."""
    size, dilation = (
        wrap(_positive("dilated_window: size", size)),
        wrap(_positive("dilated_window: dilation", dilation)),
    )
    return (absolute(i - j) <= (size - 1) * dilation) & ((i - j) % dilation == 0)


def documents(doc: Tensor | None = None) -> Expr:
    """Packed documents: a query sees the keys of its own document. doc: int ids [B, N] or [N], indexed by position; None
    declares a Tensor "doc" [B, N]. `document_ids(lengths)` makes them. Raises SpecError.
    """
    doc = Tensor("doc", 2, dtype=torch.int32) if doc is None else doc
    _is_tensor("documents: doc", doc, (1, 2), "int")
    return doc[b, i] == doc[b, j] if doc.ndim == 2 else doc[i] == doc[j]


def document_ids(lengths: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """The id of each position for documents of these lengths, an int tensor [D] or a sequence of D ints: int32 [sum of lengths],
    on the tensor's device, of a sequence on the CPU. InputError for anything else.
    """
    wanted = "an int tensor [D], or a sequence of ints of at least 0"
    if not isinstance(lengths, torch.Tensor):
        given = list(lengths) if isinstance(lengths, Sequence) else [None]
        if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in given):
            raise InputError("lengths", wanted, f"{lengths!r:.100}", "give the number of tokens of each document")
        lengths = torch.tensor(given, dtype=torch.int64, device="cpu")
    elif lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype in (torch.bool, torch.uint64):
        raise InputError(
            "lengths", wanted, f"{lengths.dtype} {list(lengths.shape)}", "of a batch, stack one row for each"
        )
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths.long()).to(torch.int32)


def block_causal(size: Size) -> Expr:
    """Causal between blocks of `size`, full inside a block."""
    size = wrap(_positive("block_causal: size", size))
    return i // size >= j // size


def neighborhood_2d(width: Size, radius: Size) -> Expr:
    """Tokens on a row-major grid `width` wide see the square of side 2 * radius + 1 around them (NATTEN's, without its
    shifting of windows at the border).
    """
    width = wrap(_positive("neighborhood_2d: width", width))
    return (absolute(i // width - j // width) <= radius) & (absolute(i % width - j % width) <= radius)


def tree(ancestor: Tensor | None = None, start: Size | None = None) -> Expr:
    """Speculative decoding over a token tree: keys before `start` are the shared past; among the new tokens a query sees
    its ancestors. ancestor: bool [T, T] or [B, T, T], ancestor[x, y] true iff new token x sees new token y.
    """
    ancestor = Tensor("ancestor", 2, dtype=torch.bool) if ancestor is None else ancestor
    _is_tensor("tree: ancestor", ancestor, (2, 3), "bool")
    start = Param("start") if start is None else start
    new_i, new_j = maximum(i - start, 0), maximum(j - start, 0)
    return (j < start) | (ancestor[b, new_i, new_j] if ancestor.ndim == 3 else ancestor[new_i, new_j])


# -- scores -----------------------------------------------------------------------------------------------------------


def alibi(slope: Tensor | None = None) -> Expr:
    """ALiBi (arXiv 2108.12409): s + slope[h] * (j - i). slope: float [H] at the call, which may be learned; `alibi_slopes(heads)`
    gives the paper's. None declares a Tensor of that name.
    """
    slope = Tensor("slope", 1) if slope is None else slope
    _is_tensor("alibi: slope", slope, (1,), "float")
    return s + slope[h] * (j - i)


def alibi_slopes(heads: int) -> torch.Tensor:
    """The ALiBi paper's slopes, float32 [heads]: a geometric sequence, interleaved when heads is no power of two."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (n + 1) / power) for n in range(power)]
    slopes += [2 ** (-4 * (2 * n + 1) / power) for n in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


def soft_cap(cap: float | Param) -> Expr:
    """cap * tanh(s / cap), as in Gemma 2. cap: a positive number, or a float Param. Raises SpecError."""
    if isinstance(cap, (int, float)) and not cap > 0:
        raise SpecError(f"soft_cap: expected a positive number, got {cap}")
    return cap * tanh(s / cap)


def bias(dims: str = "bhij", name: str = "bias") -> Expr:
    """An additive bias tensor with the named dimensions, in that order: bias("hij") is bias[h, i, j]. A dimension of size
    1 at the call broadcasts. It may be learned.

    "i" is the query's position, so that a bias for the whole sequence serves every call; "r" is the call's row: bias("bhrj")
    has size Nq there, whatever q_offset is.
    """
    if len(set(dims)) != len(dims) or not set(dims) <= set("bhirj") or len(dims) > 4:
        raise SpecError(f"bias: dims names up to four of b, h, i, r, j once each, got {dims!r}")
    places = {"b": b, "h": h, "i": i, "r": r, "j": j}
    return s + Tensor(name, len(dims))[tuple(places[dim] for dim in dims)]


def t5_bias(buckets: int = 32, max_distance: int = 128, bidirectional: bool = True, name: str = "rel_bias") -> Expr:
    """T5's relative bias (arXiv 1910.10683): s + rel_bias[bucket(j - i), h], rel_bias float [buckets, H]."""
    half = buckets // 2 if bidirectional else buckets
    exact = half // 2
    if exact < 1 or max_distance <= exact:
        raise SpecError(
            f"t5_bias: buckets={buckets} and max_distance={max_distance} leave no room for log-spaced buckets"
        )
    distance = absolute(i - j) if bidirectional else maximum(i - j, 0)
    # The bucket counts the thresholds passed; they are found with T5's own float32 formula, so no rounding differs.
    n = torch.arange(exact, max_distance + 1, dtype=torch.float32)
    large = exact + (torch.log(n / exact) / math.log(max_distance / exact) * (half - exact)).to(torch.int64)
    large = large.clamp(max=half - 1)
    bucket: Any = where(distance < exact, distance, exact)
    for value in range(exact + 1, half):
        passed = (large >= value).nonzero()
        if len(passed):
            bucket = bucket + where(distance >= exact + int(passed[0]), 1, 0)
    if bidirectional:
        bucket = bucket + where(j > i, half, 0)
    return s + Tensor(name, 2)[bucket, h]


def row() -> Expr:
    """The query's row in the call, i - q_offset: for masks and scores that are made for the rows of one call."""
    return r


def sink(name: str = "sink") -> Expr:
    """Attention sinks, for `Spec(sink=...)`: a learned logit per query head in the softmax's denominator, float [H]."""
    return Tensor(name, 1)[h]


def _positive(place: str, size: Size) -> Size:
    if isinstance(size, int) and size < 1:
        raise SpecError(f"{place}: expected a positive number, got {size}")
    return size


def _is_tensor(place: str, value: Any, ndims: tuple[int, ...], kind: str) -> None:
    if not isinstance(value, Tensor) or value.ndim not in ndims or value.kind != kind:
        raise SpecError(
            f"{place}: expected a {kind} ag.Tensor with {' or '.join(map(str, ndims))} dimensions, got {value!r}"
        )
