"""What the ranks of a ring tell each other before it turns: who has which lengths, whether all mean the same call, who sees whom.

Two small collectives of integers. An error on one rank is an error on every rank, so that nobody waits for a call that will
not come.
"""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import torch
import torch.distributed as dist

from attngen.distributed.block import Block
from attngen.distributed.shards import Shards, spans
from attngen.errors import AttngenError, GroupError, InputError
from attngen.language.call import Call, bind
from attngen.language.spec import Spec
from attngen.runtime.attention import CompiledAttention

TILE = 128  # of the tiles that are counted
Given = dict[str, Any]


class Ring(Protocol):
    """What is asked of the ring (`attngen.distributed.ring.Ring`)."""

    attention: CompiledAttention
    layout: str
    group: Any
    rank: int
    world: int
    block: Block


class lost:
    """Turns torch.distributed's errors into GroupError."""

    def __init__(self, ring: Ring):
        self.ring = ring

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, AttngenError):
            raise GroupError(
                f"ring: rank {self.ring.rank} of {self.ring.world} lost a neighbour, or waited longer than the group's "
                f"time-out: {error}. Look for the first error among the ranks; this group can't be used any more"
            ) from error


def agree(ring: Ring, q: Any, k: Any, v: Any, q_offset: Any, captures: Given) -> Shards:
    """The shards of a call. Collective."""
    sizes = _compare(ring, q, k, v, q_offset, captures)
    q_spans, k_spans = (spans([pair[side] for pair in sizes], ring.layout) for side in (0, 1))
    found = Shards(ring.rank, q_spans, k_spans, torch.zeros(ring.world, ring.world, dtype=torch.int64), [], ())
    rows: list[int] = []
    problem: AttngenError | None = None
    try:
        call = whole_call(ring, found, q, k, v, q_offset, captures)
        counts = _count(ring, found, call, {**captures, **call.params})
        rows = [sum(map(sum, block)) for block in counts]
    except AttngenError as error:
        problem = error
    everywhere = _exchange(ring, [1, *rows] if problem is None else [0, *[0] * ring.world])
    _nobody_failed(ring, problem, [row[0] for row in everywhere])
    live = [[[count > 0 for count in row] for row in block] for block in counts]
    tiles = torch.tensor([row[1:] for row in everywhere])
    return Shards(ring.rank, q_spans, k_spans, tiles, live, identity(ring, call))


def _compare(ring: Ring, q: Any, k: Any, v: Any, q_offset: Any, captures: Given) -> list[tuple[int, int]]:
    """(queries, keys) of every rank. InputError on all ranks if one has bad arguments, or others than the rest."""
    problem: AttngenError | None = None
    said: dict[str, Any] = {}
    try:
        bind(Spec(), q, k, v, q_offset=q_offset, captures={})
        tensors = {name: value for name, value in captures.items() if isinstance(value, torch.Tensor)}
        grad = torch.is_grad_enabled()
        said = {
            "batch": q.shape[0],
            "query heads": q.shape[1],
            "kv heads": k.shape[1],
            "head dim": q.shape[3],
            "value head dim": v.shape[3],
            "dtype": str(q.dtype),
            "device": q.device.type,
            "spec": ring.attention.spec.key[:15],
            "layout": ring.layout,
            "q_offset": "tensor" if isinstance(q_offset, torch.Tensor) else q_offset,
            "captures": sorted((n, list(x.shape), str(x.dtype)) for n, x in tensors.items()),
            "params": sorted((n, x) for n, x in captures.items() if isinstance(x, (int, float))),
            "wanted gradients": grad and any(x.requires_grad for x in (q, k, v, *tensors.values())),
            "captures with a gradient": sorted(n for n, x in tensors.items() if grad and x.requires_grad),
        }
    except AttngenError as error:
        problem = error
    numbers = [_number(value) for value in said.values()] or [0] * 14
    own = [0, 0, 0] if problem else [1, q.shape[2], k.shape[2]]
    everywhere = _exchange(ring, [*own, *numbers])
    _nobody_failed(ring, problem, [row[0] for row in everywhere])
    for place, (name, value) in enumerate(said.items()):
        answers = [row[3 + place] for row in everywhere]
        common = max(sorted(set(answers)), key=answers.count)
        shown = {answers[ring.rank]: value} | ({x: x for x in answers} if isinstance(value, int) else {})
        for rank, answer in enumerate(answers):
            if answer != common:
                expected = f"{name} {shown.get(common, '')} like rank {answers.index(common)}"
                raise InputError(f"ring: rank {rank}", " ".join(expected.split()), shown.get(answer, "another"))
    return [(row[1], row[2]) for row in everywhere]


def _number(value: Any) -> int:
    """The value itself, or a hash of its text: the same on every machine."""
    if isinstance(value, int):
        return int(value)
    return int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:7], "big")


def _nobody_failed(ring: Ring, problem: AttngenError | None, fine: list[int]) -> None:
    if problem is not None:
        raise problem
    for rank, ok in enumerate(fine):
        if not ok:
            raise InputError(f"ring: rank {rank}", "a valid call on every rank", "an error there", "see its message")


def _exchange(ring: Ring, row: list[int]) -> list[list[int]]:
    """Everybody's row of as many numbers."""
    if ring.world == 1:
        return [row]
    # On the device whose backend moves the keys: NCCL makes its connections in a collective in which all ranks take part.
    nccl = "nccl" in dist.get_backend_config(ring.group) and torch.cuda.is_available()
    own = torch.tensor(row, dtype=torch.int64, device="cuda" if nccl else "cpu")
    found = [torch.empty_like(own) for _ in range(ring.world)]
    with lost(ring):
        dist.all_gather(found, own, group=ring.group)
        return [x.tolist() for x in found]


def whole_call(ring: Ring, shards: Shards, q: Any, k: Any, v: Any, q_offset: Any, captures: Given) -> Call:
    """The call on the whole sequence, checked; its q, k, v have the right shape and no memory."""
    n_q, n_k = (sum(len(part) for own in side for part in own) for side in (shards.q, shards.k))
    for name, x, parts in (("q", q, shards.q), ("k", k, shards.k), ("v", v, shards.k)):
        own = sum(map(len, parts[shards.rank]))
        if not isinstance(x, torch.Tensor) or x.dim() != 4 or x.shape[2] != own:
            got = f"shape {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise InputError(
                name, f"[batch, heads, {own}, head dim], as in shards", got, "make new ones: ring.shards(...)"
            )

    def stretched(x: torch.Tensor, length: int) -> torch.Tensor:
        return x.new_empty(1).expand(*x.shape[:2], length, x.shape[3])

    whole = stretched(q, n_q), stretched(k, n_k), stretched(v, n_k)
    return bind(ring.attention.spec, *whole, q_offset=q_offset, captures=captures)


def identity(ring: Ring, call: Call) -> tuple[Any, ...]:
    """What shards depend on besides lengths and captured data."""
    offset = "tensor" if isinstance(call.q_offset, torch.Tensor) else call.q_offset
    params = tuple((name, call.params[name]) for name in sorted(call.spec.params))  # those a mask may read: no scale
    return ring.attention.spec.key[:12], ring.layout, tuple(call.q.shape[:2]), call.k.shape[1], offset, params


def _count(ring: Ring, shards: Shards, call: Call, given: Given) -> list[list[list[int]]]:
    """For each rank s, tiles of [own q ranges][k ranges of s]: by the walk that the kernels take."""
    shape, device = tuple(call.q.shape[:2]), call.q.device

    def count(i: range, j: range) -> torch.Tensor | int:
        return ring.block.tiles(i, j, TILE, shape, call.q_offset, given, device)

    counts = [[[count(i, j) for j in keys] for i in shards.q[shards.rank]] for keys in shards.k]
    tensors = [x for block in counts for row in block for x in row if isinstance(x, torch.Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])  # one wait for the device
    return [[[next(read) if isinstance(x, torch.Tensor) else x for x in row] for row in block] for block in counts]


def process_group(group: Any) -> Any:
    """The process group of `ring`'s argument. InputError for anything else."""
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError("group", "an initialised process group", "none", "call torch.distributed.init_process_group")
    if group is None:
        return dist.group.WORLD
    if hasattr(group, "get_group"):  # a DeviceMesh
        if group.ndim != 1:
            raise InputError("group", "a mesh of one dimension", f"{group.ndim} dimensions", 'pass mesh["name"]')
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise InputError("group", "a process group that this rank is in, or a DeviceMesh", type(group).__name__)
    return group
