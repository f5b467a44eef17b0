"""HyperAttention (arXiv 2310.05869): attention inside hash buckets plus a sampled estimate of the rest.

Without causality, for n_q queries and n_k keys (with fewer than min_len keys: exact):

1. Queries and keys are hashed to 7 bits by the signs of random projections. The bits are read as a Gray code, so that
   buckets next to each other differ in one bit, and queries and keys are sorted by bucket, each on its own.
2. In sorted order a query attends the keys of its block of `block`.
3. `samples` keys are drawn uniformly with replacement per (b, h), or every key once if there are no more. Those outside of
   the query's block stand for all keys outside of it, each with the log-weight log(keys outside / samples outside).
4. The two are merged.

Causal: the sequence is halved until a part is shorter than 2 * min_len. Parts are exact; of each pair of halves the second
half's queries attend the first half's keys as above. All pairs of one level run in one call, as batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attngen.errors import InputError
from attngen.language.call import Call
from attngen.language.keysets.sorted import Hyper
from attngen.plan.moves import Pad, Parts, Rows, flat_rows
from attngen.plan.planner import FAMILIES, Family, Planner
from attngen.plan.steps import Part, Result

if TYPE_CHECKING:
    from attngen.language.expression import Expr
    from attngen.language.spec import Spec


BITS = 7
SAMPLED = ("s_rows", "s_position", "s_block", "log_weight")


def plan_hyper(keys: Hyper, planner: Planner) -> Result:
    """Exact, or of each level of pairs the buckets and the samples, and under a causal mask the leaves; merged."""
    sizes, queries = planner.sizes, planner.sizes.shapes["q"]
    layout = layout_of(keys, planner.spec, sizes.n_q, sizes.n_k)
    if layout is None or 0 in (*queries, sizes.heads_kv, sizes.n_k):
        return _exact(planner)
    levels = tuple(_names(keys, pairs, level) for level, pairs in enumerate(layout.pairs))
    base = ("leaf_start", "leaf_batch") if layout.levels else ()
    writes = [name for own in levels for name in own.values()]
    make = partial(_prepare, keys, layout)
    found = planner.prepare("hash and sample", make, ("q", "k", "seed"), (*writes, *base))
    q = planner.take("padded queries", "q", Pad(layout.length)) if layout.length != sizes.n_q else "q"
    k = planner.take("padded keys", "k", Pad(layout.length)) if layout.length != sizes.n_k else "k"
    v = planner.take("padded values", "v", Pad(layout.length)) if layout.length != sizes.n_k else "v"
    parts = [Part(_leaves(planner, layout, found, q, k, v))] if layout.levels else []
    for level, (pairs, names) in enumerate(zip(layout.pairs, levels, strict=True)):
        own = {name: found[written] for name, written in names.items()}
        rows = planner.take(f"queries of level {level}", q, Rows(), own["q_rows"])
        parts.append(Part(_buckets(planner, level, pairs, own, rows, k, v), own["q_rows"]))
        if "s_rows" in own:
            sampled = _sampled(planner, level, pairs, own, rows, k, v)
            (shift,) = planner.derive(
                f"log-weights of level {level}", partial(_by_query, pairs), (own["log_weight"],), (f"shift.{level}",)
            )
            parts.append(Part(sampled, own["q_rows"], shift))
    merged = planner.merge(*parts, rows=layout.length)
    if layout.length == sizes.n_q:
        return merged
    return planner.put("without padding", merged, Pad(layout.length), None, queries)


def _exact(planner: Planner) -> Result:
    def build() -> dict[str, Any]:
        return {"mask": planner.mask, "score": planner.score}

    return planner.attend("exact", "exact", build, "q", "k", "v", offset=True)


def layout_of(keys: Hyper, spec: Spec, n_q: int, n_k: int) -> Layout | None:
    """How the sequence is cut, None where attention is exact."""
    if not spec.is_causal:
        if n_k < keys.min_len or n_q == 0:
            return None
        return Layout(0, n_k, max(n_q, n_k), (Pairs(1, 0, n_q, 0, n_k, -(-n_q * keys.block // n_k), keys.block),))
    levels = 0
    while -(-n_q >> levels) >= 2 * keys.min_len:
        levels += 1
    return cut(n_q, levels, keys.block) if levels else None


def _names(keys: Hyper, pairs: Pairs, level: int) -> dict[str, str]:
    """What is prepared for a level, and the name of each in the plan."""
    names: tuple[str, ...] = ("q_rows", "k_rows", "q_position", "k_position", "batch")
    names += SAMPLED if keys.samples and pairs.k_size > pairs.k_block else ()
    return {name: f"{name}.{level}" for name in names}


# -- preparation ------------------------------------------------------------------------------------------------------


def read_seed(keys: Hyper, given: Mapping[str, Any], q: Any, k: Any) -> dict[str, Any]:
    """seed=, checked. InputError."""
    seed = given.get("seed")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        fix = "" if seed is not None else "pass seed=... at the call"
        raise InputError("seed", "an int of 64 bits", repr(seed), fix)
    return {"seed": seed}


def _prepare(keys: Hyper, layout: Layout, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """Rows in hash order and samples of every level, and where the leaves start."""
    n_q, n_k = call.q.shape[2], call.k.shape[2]
    if layout.levels and (n_q != n_k or isinstance(call.q_offset, torch.Tensor) or call.q_offset != 0):
        got = f"{n_q} queries, {n_k} keys, q_offset {call.q_offset}"
        raise InputError("q", "as many queries as keys and no q_offset, for a causal mask from 2 * min_len on", got)
    draws = Draws(call, given["seed"])
    q_rank, k_rank = draws.ranks(call.q, layout.length), draws.ranks(call.k, layout.length)
    found: dict[str, Any] = {}
    for level, pairs in enumerate(layout.pairs):
        own = _level(keys, call, draws, pairs, q_rank, k_rank)
        found |= {written: own[name] for name, written in _names(keys, pairs, level).items()}
    if layout.levels:
        start = (torch.arange(layout.leaves, device=call.q.device) * layout.leaf).to(torch.int32)
        found |= {"leaf_start": start.repeat(call.q.shape[0]), "leaf_batch": _batches(call, layout.leaves)}
    return found


def _level(
    keys: Hyper, call: Call, draws: Draws, pairs: Pairs, q_rank: torch.Tensor, k_rank: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Rows and positions of a level's queries and keys in hash order, and its samples."""
    q_order, k_order = (
        pairs.sort(q_rank, pairs.q_first, pairs.q_size),
        pairs.sort(k_rank, pairs.k_first, pairs.k_size),
    )
    length, group, offset = q_rank.shape[2], call.group, call.offset_column
    offset = offset.unsqueeze(-1) if isinstance(offset, torch.Tensor) else offset
    k_for_q = k_order if group == 1 else k_order.repeat_interleave(group, 1)
    found = {
        "q_rows": _fold(flat_rows(q_order, length)),
        "k_rows": _fold(flat_rows(k_order, length)),
        "q_position": _fold(q_order + offset).to(torch.int32),
        "k_position": _fold(k_for_q).to(torch.int32),
        "batch": _batches(call, pairs.count),
    }
    if keys.samples == 0 or pairs.k_size <= pairs.k_block:
        return found
    place = draws.samples(pairs, keys.samples)  # [B, Hq, pairs, m], places in sorted order
    block = _fold(place // pairs.k_block)
    blocks = -(-pairs.k_size // pairs.k_block)
    inside = torch.zeros((*block.shape[:2], blocks), dtype=torch.int32, device=block.device)
    inside.scatter_add_(-1, block, torch.ones_like(block, dtype=torch.int32))
    starts = torch.arange(blocks, device=block.device) * pairs.k_block
    outside = pairs.k_size - (pairs.k_size - starts).clamp(max=pairs.k_block)
    drawn = block.shape[-1] - inside
    rows = k_for_q.gather(-1, place)
    kv_rows = (
        flat_rows(rows.view(*k_order.shape[:2], group, *rows.shape[2:]), length)
        if group > 1
        else flat_rows(rows, length)
    )
    return found | {
        "s_rows": _fold(kv_rows.flatten(1, 2) if group > 1 else kv_rows),
        "s_position": _fold(rows).to(torch.int32),
        "s_block": block.to(torch.int32),
        "log_weight": torch.where(drawn > 0, torch.log(outside / drawn.clamp(min=1)), 0.0).float(),
    }


# -- how a sequence is cut --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """The pairs of one level: queries q_first + p * stride .. + q_size - 1 and keys likewise, for p < count, with
    stride = q_size + k_size; blocks of q_block queries meet blocks of k_block keys.
    """

    count: int
    q_first: int
    q_size: int
    k_first: int
    k_size: int
    q_block: int
    k_block: int

    def sort(self, rank: torch.Tensor, first: int, size: int) -> torch.Tensor:
        """Rows of each pair in the order of rank [B, H, N]: [B, H, count, size]."""
        starts = torch.arange(self.count, device=rank.device).view(-1, 1) * (self.q_size + self.k_size) + first
        rows = starts + torch.arange(size, device=rank.device)
        return torch.argsort(rank[:, :, rows], dim=-1, stable=True) + starts


@dataclass(frozen=True)
class Layout:
    """`levels` halvings into parts of `leaf`, padded to `length`; the pairs of each level, the smallest first."""

    levels: int
    leaf: int
    length: int
    pairs: tuple[Pairs, ...]

    @property
    def leaves(self) -> int:
        return 1 << self.levels


def cut(n: int, levels: int, block: int) -> Layout:
    """Halve n positions `levels` times: parts of equal size, the last of which may lack up to 2 ** levels - 1 positions."""
    leaf = -(-n >> levels)
    pairs = []
    for level in range(levels):
        size = leaf << level
        count = -(-max(0, n - size) // (2 * size))  # of the pairs whose second half has a position
        if count:
            pairs.append(Pairs(count, size, size, 0, size, block, block))
    return Layout(levels, leaf, leaf << levels, tuple(pairs))


def _rest(mask: Expr) -> Expr:
    """The mask as it is between two halves, where i > j holds anyway."""
    from attngen.language.moved import split_causal

    rest = split_causal(mask.sym)
    return mask if rest is None else type(mask)(rest, mask.declared)


# -- random numbers and hashes ----------------------------------------------------------------------------------------


class Draws:
    """Everything random of a call, drawn in one fixed order from one generator: projections, then samples level by level."""

    def __init__(self, call: Call, seed: int):
        self.call = call
        self.generator = torch.Generator(call.q.device).manual_seed(seed)
        shape = (call.q.shape[3], BITS)
        self.projections = torch.randn(shape, generator=self.generator, device=call.q.device)

    def ranks(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """The place of each row's bucket in the order of buckets, int16 [B, H, length]; rows past x's end come last."""
        bits = (x.detach().float() @ self.projections) > 0
        code = (bits * (1 << torch.arange(BITS, device=x.device))).sum(-1)
        rank = gray_decode(code).to(torch.int16)
        return torch.nn.functional.pad(rank, (0, length - x.shape[2]), value=1 << BITS)

    def samples(self, pairs: Pairs, count: int) -> torch.Tensor:
        """Places 0 .. k_size - 1 in ascending order, [B, Hq, pairs, m]: uniform with replacement, or every place once."""
        device, lead = self.call.q.device, (*self.call.q.shape[:2], pairs.count)
        if count >= pairs.k_size:
            return torch.arange(pairs.k_size, device=device).expand(*lead, -1)
        drawn = torch.randint(0, pairs.k_size, (*lead, count), generator=self.generator, device=device)
        return drawn.sort(-1).values


def gray_decode(code: torch.Tensor) -> torch.Tensor:
    """The place of a code in the reflected Gray sequence: the codes at places p and p + 1 differ in one bit."""
    for shift in (1, 2, 4):
        code = code ^ (code >> shift)
    return code


# -- pieces -----------------------------------------------------------------------------------------------------------


def _leaves(planner: Planner, layout: Layout, found: Mapping[str, str], q: str, k: str, v: str) -> Result:
    """Each part's queries on its own keys, exactly."""

    def build() -> dict[str, Any]:
        from attngen.language.moved import b, by_distance, i, j, moved, moved_by

        start, batch = planner.tensor("start", 1), planner.tensor("batch", 1)
        by_batch = {"b": batch[b]}
        there = by_batch | {"i": i + start[b], "j": j + start[b]}
        mask = moved_by(planner.mask, lambda atom: by_batch if by_distance(atom) else there)
        return {"mask": mask, "score": moved(planner.score, **there)}

    move = Parts(layout.leaves, layout.leaf)
    q, k, v = (planner.take(f"{name} of leaves", x, move) for name, x in (("queries", q), ("keys", k), ("values", v)))
    captures = {"start": found["leaf_start"], "batch": found["leaf_batch"]}
    result = planner.attend("leaves", "leaves", build, q, k, v, captures)
    batch, heads, _ = planner.sizes.shapes["q"]
    return planner.put("leaves in place", result, move, None, (batch, heads, layout.length))


def _buckets(planner: Planner, level: int, pairs: Pairs, own: Mapping[str, str], rows: str, k: str, v: str) -> Result:
    """In hash order a block of queries attends a block of keys."""

    def build() -> dict[str, Any]:
        from attngen.language.moved import i, j, moved

        places = _places(planner, "k_position")
        return {
            "mask": moved(_rest(planner.mask), **places) & (i // pairs.q_block == j // pairs.k_block),
            "score": moved(planner.score, **places),
        }

    k = planner.take(f"keys of level {level}", k, Rows(), own["k_rows"])
    v = planner.take(f"values of level {level}", v, Rows(), own["k_rows"])
    captures = {name: own[name] for name in ("q_position", "k_position", "batch")}
    role = ("buckets", pairs.q_block, pairs.k_block)
    return planner.attend(f"buckets of level {level}", role, build, rows, k, v, captures)


def _sampled(planner: Planner, level: int, pairs: Pairs, own: Mapping[str, str], rows: str, k: str, v: str) -> Result:
    """The drawn keys outside of the query's block. That they stand for all others moves a row's lse and leaves its out as it
    is, since their log-weights are the same: the merge adds it.
    """

    def build() -> dict[str, Any]:
        from attngen.language.moved import b, h, i, j, moved

        places = _places(planner, "s_position")
        s_block = planner.tensor("s_block", 3)
        mask = moved(_rest(planner.mask), **places) & (s_block[b, h, j] != i // pairs.q_block)
        return {"mask": mask, "score": moved(planner.score, **places)}

    k = planner.take(f"sampled keys of level {level}", k, Rows(unique=False), own["s_rows"])
    v = planner.take(f"sampled values of level {level}", v, Rows(unique=False), own["s_rows"])
    captures = {name: own[name] for name in ("q_position", "s_position", "batch", "s_block")}
    return planner.attend(f"samples of level {level}", ("samples", pairs.q_block), build, rows, k, v, captures)


def _by_query(pairs: Pairs, call: Call, log_weight: torch.Tensor) -> tuple[torch.Tensor]:
    """The log-weights of blocks [*, blocks] for every query of a pair."""
    block = torch.arange(pairs.q_size, device=log_weight.device) // pairs.q_block
    return (log_weight[:, :, block],)


def _places(planner: Planner, keys: str) -> dict[str, Expr]:
    from attngen.language.moved import b, h, i, j

    q_position, k_position, batch = planner.tensor("q_position", 3), planner.tensor(keys, 3), planner.tensor("batch", 1)
    return {"i": q_position[b, h, i], "j": k_position[b, h, j], "b": batch[b]}


def _fold(x: torch.Tensor) -> torch.Tensor:
    """[B, H, pairs, n] -> [B * pairs, H, n]."""
    return x.transpose(1, 2).flatten(0, 1)


def _batches(call: Call, count: int) -> torch.Tensor:
    """The original batch of each of B * count."""
    return torch.arange(call.q.shape[0], device=call.q.device, dtype=torch.int32).repeat_interleave(count)


FAMILIES[Hyper] = Family(plan_hyper, read=read_seed)
