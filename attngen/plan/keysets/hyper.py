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
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attngen.backends.rows import flat_rows, take_flat
from attngen.errors import InputError
from attngen.language.expression import Expr
from attngen.plan.keysets.base import (
    KeySet,
    Pieces,
    Result,
    b,
    by_distance,
    h,
    i,
    j,
    moved,
    moved_by,
    offset_column,
    positive,
    split_causal,
)
from attngen.state.merging import merge_rows

if TYPE_CHECKING:
    from attngen.language.call import Call
    from attngen.language.spec import Spec

BITS = 7


@dataclass(frozen=True)
class Hyper(KeySet):
    """See the module. Called with seed=, an int: equal seeds draw equal projections and samples on one kind of device."""

    block: int = 256
    samples: int = 256
    min_len: int = 4096

    name: ClassVar[str] = "hyper"
    prepared: ClassVar[tuple[str, ...]] = ("seed",)

    def __post_init__(self) -> None:
        positive("hyper: block", self.block)
        positive("hyper: samples", self.samples, 0)
        positive("hyper: min_len", self.min_len)

    def prepare(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
        seed = given.get("seed")
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise InputError(
                "seed", "an int of 64 bits", repr(seed), "" if seed is not None else "pass seed=... at the call"
            )
        n_q, n_k = call.q.shape[2], call.k.shape[2]
        layout = self.layout(spec, n_q, n_k)
        if layout is None or call.q.numel() == 0 or call.k.numel() == 0:
            return {"levels": ()}
        if layout.levels and (n_q != n_k or isinstance(call.q_offset, torch.Tensor) or call.q_offset != 0):
            got = f"{n_q} queries, {n_k} keys, q_offset {call.q_offset}"
            raise InputError("q", "as many queries as keys and no q_offset, for a causal mask from 2 * min_len on", got)
        draws = Draws(call, seed)
        q_rank, k_rank = draws.ranks(call.q, layout.length), draws.ranks(call.k, layout.length)
        plan: dict[str, Any] = {"levels": layout.pairs}
        for level, pairs in enumerate(layout.pairs):
            plan |= {
                f"{name}.{level}": value for name, value in self._level(call, draws, pairs, q_rank, k_rank).items()
            }
        if layout.levels:
            plan["start"] = (torch.arange(layout.leaves, device=call.q.device) * layout.leaf).to(torch.int32)
            plan["start"] = plan["start"].repeat(call.q.shape[0])
            plan["batch"] = _batches(call, layout.leaves)
        return plan

    def layout(self, spec: Spec, n_q: int, n_k: int) -> Layout | None:
        """How the sequence is cut, None where attention is exact."""
        if split_causal(spec.mask) is None:
            if n_k < self.min_len or n_q == 0:
                return None
            return Layout(0, n_k, max(n_q, n_k), (Pairs(1, 0, n_q, 0, n_k, -(-n_q * self.block // n_k), self.block),))
        levels = 0
        while -(-n_q >> levels) >= 2 * self.min_len:
            levels += 1
        return cut(n_q, levels, self.block) if levels else None

    def _level(
        self, call: Call, draws: Draws, pairs: Pairs, q_rank: torch.Tensor, k_rank: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Rows and positions of a level's queries and keys in hash order, and its samples."""
        q_order, k_order = (
            pairs.sort(q_rank, pairs.q_first, pairs.q_size),
            pairs.sort(k_rank, pairs.k_first, pairs.k_size),
        )
        length, group = q_rank.shape[2], call.group
        k_for_q = k_order if group == 1 else k_order.repeat_interleave(group, 1)
        found = {
            "q_rows": _fold(flat_rows(q_order, length)),
            "k_rows": _fold(flat_rows(k_order, length)),
            "q_position": _fold(q_order + _per_pair(offset_column(call))).to(torch.int32),
            "k_position": _fold(k_for_q).to(torch.int32),
            "batch": _batches(call, pairs.count),
        }
        if self.samples == 0 or pairs.k_size <= pairs.k_block:
            return found
        place = draws.samples(pairs, self.samples)  # [B, Hq, pairs, m], places in sorted order
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

    def run(self, pieces: Pieces, plan: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
        call = pieces.call
        if not plan["levels"]:
            return pieces.attend(
                "exact", lambda: {"mask": pieces.mask, "score": pieces.score}, call.q, call.k, call.v, call.q_offset
            )
        layout = self.layout(call.spec, call.q.shape[2], call.k.shape[2])
        assert layout is not None
        q, k, v = (_padded(x, layout.length) for x in (call.q, call.k, call.v))
        levels = [_at_level(plan, level) for level in range(len(layout.pairs))]
        rows = [own[name] for name in ("k_rows", "s_rows") for own in levels if name in own]
        queries = take_flat(q, *(own["q_rows"] for own in levels))
        keys, values = take_flat(k, *rows), take_flat(v, *rows)
        sampled = iter(range(len(levels), len(rows)))
        rest, found = _rest(pieces.mask), []
        for level, (pairs, own) in enumerate(zip(layout.pairs, levels, strict=True)):
            inner = (own, pairs, rest, queries[level])
            found.append((_buckets(pieces, *inner, keys[level], values[level]), own["q_rows"]))
            if "s_rows" in own:
                at = next(sampled)
                found.append((_sampled(pieces, *inner, keys[at], values[at]), own["q_rows"]))
        if layout.levels:
            base = _leaves(pieces, plan, layout, q, k, v)
        else:  # the pieces have all rows between them
            base = q.new_zeros((*q.shape[:3], v.shape[3])), torch.full(q.shape[:3], -torch.inf, device=q.device)
            base = base[0], base[1].to(found[0][0][1].dtype)
        out, lse = merge_rows(base, *found)
        return out[:, :, : call.q.shape[2]], lse[:, :, : call.q.shape[2]]


def _at_level(plan: Mapping[str, Any], level: int) -> dict[str, Any]:
    suffix = f".{level}"
    return {name.removesuffix(suffix): value for name, value in plan.items() if name.endswith(suffix)}


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
    rest = split_causal(mask.sym)
    return mask if rest is None else Expr(rest, mask.declared)


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


def _leaves(
    pieces: Pieces, plan: Mapping[str, Any], layout: Layout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Result:
    """Each part's queries on its own keys, exactly."""

    def build() -> dict[str, Any]:
        start, batch = pieces.tensor("start", 1), pieces.tensor("batch", 1)
        by_batch = {"b": batch[b]}
        there = by_batch | {"i": i + start[b], "j": j + start[b]}
        mask = moved_by(pieces.mask, lambda atom: by_batch if by_distance(atom) else there)
        return {"mask": mask, "score": moved(pieces.score, **there)}

    def parts(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (layout.leaves, layout.leaf)).transpose(1, 2).flatten(0, 1)

    result = pieces.attend("leaves", build, parts(q), parts(k), parts(v), start=plan["start"], batch=plan["batch"])
    out, lse = (x.unflatten(0, (-1, layout.leaves)).transpose(1, 2).flatten(2, 3) for x in result)
    return out, lse


def _buckets(
    pieces: Pieces, own: Mapping[str, Any], pairs: Pairs, rest: Expr, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Result:
    def build() -> dict[str, Any]:
        places = _places(pieces, "k_position")
        return {
            "mask": moved(rest, **places) & (i // pairs.q_block == j // pairs.k_block),
            "score": moved(pieces.score, **places),
        }

    role = ("buckets", pairs.q_block, pairs.k_block)
    return pieces.attend(role, build, q, k, v, **{n: own[n] for n in ("q_position", "k_position", "batch")})


def _sampled(
    pieces: Pieces, own: Mapping[str, Any], pairs: Pairs, rest: Expr, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Result:
    def build() -> dict[str, Any]:
        places = _places(pieces, "s_position")
        s_block = pieces.tensor("s_block", 3)
        mask = moved(rest, **places) & (s_block[b, h, j] != i // pairs.q_block)
        return {"mask": mask, "score": moved(pieces.score, **places)}

    names = ("q_position", "s_position", "batch", "s_block")
    out, lse = pieces.attend(("samples", pairs.q_block), build, q, k, v, **{name: own[name] for name in names})
    # A log-weight that is the same for all keys of a row moves its lse and leaves its out as it is.
    block = torch.arange(pairs.q_size, device=q.device) // pairs.q_block
    return out, lse + own["log_weight"][:, :, block]


def _places(pieces: Pieces, keys: str) -> dict[str, Expr]:
    q_position, k_position, batch = pieces.tensor("q_position", 3), pieces.tensor(keys, 3), pieces.tensor("batch", 1)
    return {"i": q_position[b, h, i], "j": k_position[b, h, j], "b": batch[b]}


def _fold(x: torch.Tensor) -> torch.Tensor:
    """[B, H, pairs, n] -> [B * pairs, H, n]."""
    return x.transpose(1, 2).flatten(0, 1)


def _per_pair(offset: Any) -> Any:
    return offset.unsqueeze(-1) if isinstance(offset, torch.Tensor) else offset


def _batches(call: Call, count: int) -> torch.Tensor:
    """The original batch of each of B * count."""
    return torch.arange(call.q.shape[0], device=call.q.device, dtype=torch.int32).repeat_interleave(count)


def _padded(x: torch.Tensor, length: int) -> torch.Tensor:
    return x if x.shape[2] == length else torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[2]))


def hyper(block: int = 256, samples: int = 256, min_len: int = 4096) -> Hyper:
    """HyperAttention: `Spec(keys=ag.hyper(), mask=ag.causal())` or without a mask, called with seed=.

    block: keys in a bucket's block; samples: keys drawn for the rest; min_len: fewer keys than this are attended exactly.
    Memory is O(N), time O(N * (block + samples)), with a factor log N where causal. Other conditions in the mask hold
    pair by pair; the estimate stays unbiased (arXiv 2310.05869).

    A causal mask over 2 * min_len queries or more needs as many queries as keys and no q_offset: InputError else.
    """
    return Hyper(block, samples, min_len)
