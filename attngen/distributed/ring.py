"""Sequence parallel attention: every rank has a shard of the sequence, keys and values go round (Ring Attention, 2310.01889).

    forward    own q stays; k, v of rank r - t arrive at step t; the blocks' results merge by lse
    backward   own q, dO stay; k, v go round again, and after them dk, dv, which collect every rank's share and go home; a block
               is differentiated by its own lse, with its share of dO (see `attngen.plan.backward`)

The next keys are on their way while the current block computes. A block is a run of queries by a run of keys: one ordinary
attention whose queries begin at `q_offset` and whose keys begin at the param `key_start`, so that one compiled spec serves
all of them, and the analysis of the mask tells which are empty. Keys are handed on no further than to the last rank that
sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from attngen.distributed.block import block_of
from attngen.distributed.handshake import Given, agree, identity, lost, process_group, whole_call
from attngen.distributed.shards import Shards, check_layout
from attngen.errors import InputError
from attngen.language.call import Call, bind
from attngen.language.programs import evaluate, tensor_of
from attngen.plan.merging import Result, merge, weigh
from attngen.runtime.attention import CompiledAttention
from attngen.runtime.operators import lse_dtype


def ring(attention: CompiledAttention, group: Any = None, *, layout: str = "contiguous") -> Ring:
    """Sequence parallel `attention` over the ranks of a process group.

    group: a `torch.distributed` process group (gloo on CPUs, NCCL on GPUs), a DeviceMesh of one dimension, or None for all
        ranks.
    layout: how the sequence lies on the ranks (`ag.shard`): "paired" balances causal masks; with a narrow window "contiguous"
        is as balanced, and keys go to a neighbour or two and no further.
    Raises InputError, and SpecError for a spec with keys=, lists, pages or dropout.
    """
    return Ring(attention, group, layout)


class Ring:
    """ring(q, k, v, *, return_lse=False, q_offset=0, shards=None, **captures) -> out, or (out, lse), on every rank.

    q [B, Hq, n, D], k [B, Hkv, m, D], v [B, Hkv, m, Dv]: this rank's shard, n and m its own (0 included), all else the same on
    all ranks. out [B, Hq, n, Dv] and lse [B, Hq, n] are the shard of what one process gets for the whole sequence.
    captures: whole on every rank, indexed by positions in the whole sequence, of the same values everywhere; the gradient of
    a float one is the sum over all ranks. Forward and backward are collective: all ranks of the group call them in the same
    order.

    shards: see `shards`. Without it each call exchanges the lengths and what the mask sees, and so waits for the device.
    Raises InputError on every rank, naming the rank, where ranks disagree, and GroupError where one is lost.
    """

    def __init__(self, attention: CompiledAttention, group: Any, layout: str):
        check_layout(layout)
        self.attention, self.layout = attention, layout
        self.group = process_group(group)
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.block = block_of(attention)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        return_lse: bool = False,
        q_offset: int | torch.Tensor = 0,
        shards: Shards | None = None,
        **captures: Any,
    ) -> Any:
        if isinstance(q, torch.Tensor) and torch.is_autocast_enabled(q.device.type):
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = (t.to(dtype) if t.dtype == torch.float32 else t for t in (q, k, v))
        if shards is None:
            shards = self.shards(q, k, v, q_offset=q_offset, **captures)
        else:
            self._check_shards(shards)
        call = whole_call(self, shards, q, k, v, q_offset, captures)
        if shards.of != identity(self, call):
            raise InputError("shards", f"those of {identity(self, call)}", shards.of, "make new ones: ring.shards(...)")
        given = {name: _Shared.apply(value, self) if _learned(value) else value for name, value in captures.items()}
        names = self.block.names
        tensors = q, k, v, *(given[name] for name in names)
        # Asked here: a Function's own forward runs without gradients, and ctx.needs_input_grad does not know of no_grad.
        wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        out, lse = _Ring.apply(_Step(self, shards, q_offset, call.params, names, wants_grad), *tensors)
        if self.attention.spec.sink is not None:
            sink = _sink(self, shards, lse, q_offset, {**call.params, **given})
            out, lse = merge((out, lse), (out.new_zeros(()).expand(out.shape), sink))
        return (out, lse) if return_lse else out

    def shards(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, q_offset: int | torch.Tensor = 0, **captures: Any
    ) -> Shards:
        """Let the ranks exchange lengths, check that they agree, and find which of them see each other.

        Collective. Pass the result as `shards=` to calls of the same lengths (in other layers and steps), with the same
        params and, where the mask reads captured tensors, the same values in those. Raises InputError on every rank.
        """
        return agree(self, q, k, v, q_offset, captures)

    def _check_shards(self, shards: Shards) -> None:
        if not isinstance(shards, Shards):
            raise InputError("shards", "what ring.shards(...) returns", type(shards).__name__)
        if (shards.rank, shards.world) != (self.rank, self.world):
            got = f"those of rank {shards.rank} of {shards.world}"
            raise InputError("shards", f"those of rank {self.rank} of {self.world}", got)

    def __repr__(self) -> str:
        return f"<ring of {self.world}, {self.layout}: {self.attention!r}>"


# -- one call ---------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """A call apart from its differentiable tensors, whose names are in `names`. wants_grad: whether a backward may come."""

    ring: Ring
    shards: Shards
    q_offset: int | torch.Tensor
    params: Mapping[str, int | float]
    names: list[str]
    wants_grad: bool

    def blocks(self, source: int) -> Iterator[tuple[range, range, range, range]]:
        """The blocks with an attended pair: own rows, their positions, rows of the keys of rank `source`, their positions."""
        queries, keys = self.shards.q[self.shards.rank], self.shards.k[source]
        for a, (rows, i) in enumerate(zip(_rows(queries), queries, strict=True)):
            for c, (columns, j) in enumerate(zip(_rows(keys), keys, strict=True)):
                if self.shards.live[source][a][c]:
                    yield rows, i, columns, j

    def call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: range, j: range, given: Given) -> Call:
        """The ordinary attention of a block."""
        inner = self.ring.block.attention.spec
        captures = self.ring.block.captures({**given, **self.params}, j)
        return bind(inner, q, k, v, q_offset=self.q_offset + i.start, captures=captures)


class _Piece(NamedTuple):
    """What a block leaves for the backward: its rows, lse, and what its backend keeps."""

    rows: range
    lse: torch.Tensor
    kept: torch.Tensor | None


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: _Step, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tensors: Any) -> Result:
        given = dict(zip(step.names, tensors, strict=True))
        lse = torch.full(q.shape[:3], -torch.inf, dtype=lse_dtype(q.dtype), device=q.device)
        out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=lse.dtype, device=q.device)
        begun: set[range] = set()
        pieces = []  # of every block, in their order
        for source, keys, values in _rotate(step, k, v):
            for rows, i, columns, j in step.blocks(source):
                operands = _part(q, rows), _part(keys, columns), _part(values, columns)
                call = step.call(*operands, i, j, given)
                call.wants_grad = step.wants_grad
                piece, piece_lse, kept = step.ring.block.forward(call)
                pieces.append(_Piece(rows, piece_lse, kept))
                so_far, result = (_part(out, rows), _part(lse, rows)), (piece.to(out.dtype), piece_lse)
                for target, value in zip(so_far, merge(so_far, result) if rows in begun else result, strict=True):
                    target.copy_(value)
                begun.add(rows)
        out = out.to(q.dtype)
        ctx.step, ctx.rows = step, [piece.rows for piece in pieces]
        left = *(piece.lse for piece in pieces), *(piece.kept for piece in pieces)
        # All of it through autograd, so that checkpoints reach it and a backward frees it.
        ctx.save_for_backward(q, k, v, out, *tensors, *left)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> Any:
        step: _Step = ctx.step
        q, k, v, out, *saved = ctx.saved_tensors
        many, blocks = len(step.names), len(ctx.rows)
        tensors, lses, kept = saved[:many], saved[many : many + blocks], saved[many + blocks :]
        pieces = [_Piece(*piece) for piece in zip(ctx.rows, lses, kept, strict=True)]
        ring, shards, given = step.ring, step.shards, dict(zip(step.names, tensors, strict=True))
        needed = {name for name, need in zip(step.names, ctx.needs_input_grad[4:], strict=True) if need}
        wanted = [name for name in ring.block.learned if ring.block.sources[name][0] in needed]
        real = lse_dtype(q.dtype)
        dq = torch.zeros(q.shape, dtype=real, device=q.device)
        totals = {name: torch.zeros(given[name].shape, dtype=real, device=q.device) for name in needed}
        delta = ring.block.delta(out, grad_out, grad_lse)
        shares = zip(_shares(pieces), pieces, strict=True)

        hops, rank, world = shards.hops, shards.rank, shards.world
        home: list[tuple[torch.Tensor, int]] = []
        arriving, arrived = _Transfer(step, 0), None
        for t, (source, keys, values) in enumerate(_rotate(step, k, v, everything=True)):
            share = None
            if keys is not None:
                share = torch.zeros(_flat_size(keys, values), dtype=real, device=q.device)
                dk, dv = _unpack(share, keys.shape, values.shape)
                for rows, i, columns, j in step.blocks(source):
                    operands = _part(q, rows), _part(keys, columns), _part(values, columns)
                    share_of_block, piece = next(shares)
                    do = (_part(grad_out, rows) * share_of_block.unsqueeze(-1)).to(q.dtype)
                    block_call, block_delta = step.call(*operands, i, j, given), _part(delta, rows) * share_of_block
                    found = ring.block.backward(block_call, piece.lse, block_delta, do, wanted, piece.kept)
                    block_dq, block_dk, block_dv, captured = found
                    _part(dq, rows).add_(block_dq)
                    _part(dk, columns).add_(block_dk)
                    _part(dv, columns).add_(block_dv)
                    for name, value in captured.items():
                        ring.block.add_gradient(totals, name, value, j)
            arriving.wait()
            if share is not None and arrived is not None:
                share += arrived
            following = (rank - t - 1) % world
            arrived = None
            if t + 1 < world and hops[following] > t:
                shape = _shapes(shards, following, k, v)
                arrived = torch.empty(sum(x.numel() for x in shape), dtype=real, device=q.device)
            sends = []
            if share is not None and hops[source] > t:
                sends.append((share, (rank + 1) % world))
            elif share is not None and source != rank:
                home.append((share, source))
            elif share is not None:
                own = share
            arriving = _Transfer(step, 2 * t + 1, sends, [] if arrived is None else [(arrived, (rank - 1) % world)])
        if hops[rank]:
            own = torch.empty(_flat_size(k, v), dtype=real, device=q.device)
        receives = [(own, (rank + hops[rank]) % world)] if hops[rank] else []
        _Transfer(step, 2 * world, home, receives).wait()
        dk, dv = _unpack(own, k.shape, v.shape)
        captures = [totals[name].to(given[name].dtype) if name in totals else None for name in step.names]
        return None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *captures


def _rotate(step: _Step, k: torch.Tensor, v: torch.Tensor, everything: bool = False) -> Iterator[tuple[int, Any, Any]]:
    """(rank, its k, its v) in the order of arrival, own first, the next on its way while the caller computes. `everything`:
    steps in which nothing arrives here as well, with None.
    """
    shards = step.shards
    hops, rank, world = shards.hops, shards.rank, shards.world
    packed: torch.Tensor | None = torch.cat([k.reshape(-1), v.reshape(-1)]) if hops[rank] else None
    keys: Any = k
    values: Any = v
    for t in range(max(hops) + 1):
        source, following = (rank - t) % world, (rank - t - 1) % world
        coming, sends, receives = None, [], []
        if packed is not None and hops[source] > t:
            sends = [(packed, (rank + 1) % world)]
        if hops[following] > t and following != rank:
            shapes = _shapes(shards, following, k, v)
            coming = torch.empty(sum(x.numel() for x in shapes), dtype=k.dtype, device=k.device)
            receives = [(coming, (rank - 1) % world)]
        transfer = _Transfer(step, 2 * t, sends, receives)
        if keys is not None or everything:
            yield source, keys, values
        transfer.wait()
        packed, keys, values = coming, None, None
        if coming is not None:
            keys, values = _unpack(coming, *shapes)


class _Transfer:
    """Messages on their way: (tensor, rank) to send, (tensor, rank) to receive into. Neighbours post theirs in one order."""

    def __init__(self, step: _Step, tag: int, sends: Sequence[Any] = (), receives: Sequence[Any] = ()):
        self.step, self.kept = step, (sends, receives)
        group = step.ring.group
        operations = [dist.P2POp(dist.isend, x, group=group, tag=tag, group_peer=peer) for x, peer in sends]
        operations += [dist.P2POp(dist.irecv, x, group=group, tag=tag, group_peer=peer) for x, peer in receives]
        with lost(step.ring):
            self.works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        """Until they have arrived: on a GPU its stream waits, not the host."""
        with lost(self.step.ring):
            for work in self.works:
                work.wait()
        self.works, self.kept = [], ((), ())


class _Shared(torch.autograd.Function):
    """A tensor that every rank has: its gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ring: Ring) -> torch.Tensor:
        ctx.ring = ring
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        total = grad.to(lse_dtype(grad.dtype), copy=True, memory_format=torch.contiguous_format)
        with lost(ctx.ring):
            dist.all_reduce(total, group=ctx.ring.group)
        return total.to(grad.dtype), None


def _sink(ring: Ring, shards: Shards, lse: torch.Tensor, q_offset: Any, env: Given) -> torch.Tensor:
    """The sink's logits of the own rows: of lse's shape [B, Hq, n] and dtype."""
    device, offset = lse.device, q_offset.view(-1, 1, 1) if isinstance(q_offset, torch.Tensor) else q_offset
    rows = torch.cat([torch.arange(part.start, part.stop, device=device) for part in shards.q[shards.rank]])
    env = {**env, "i": rows + offset}
    env |= {"b": torch.arange(lse.shape[0], device=device).view(-1, 1, 1)}
    env |= {"h": torch.arange(lse.shape[1], device=device).view(1, -1, 1)}
    value = tensor_of(evaluate(ring.attention.spec.sink, env, real=lse.dtype), device)
    return value.to(lse.dtype).expand(lse.shape)


def _shares(pieces: Sequence[_Piece]) -> list[torch.Tensor]:
    """How much of its rows each block has: the shares of one run of rows sum to 1."""
    found = [torch.zeros_like(piece.lse) for piece in pieces]
    for rows in {piece.rows for piece in pieces}:
        places = [place for place, piece in enumerate(pieces) if piece.rows == rows]
        weights = weigh([(pieces[place].lse.reshape(-1), None) for place in places], found[places[0]].numel()).parts
        for place, weight in zip(places, weights, strict=True):
            found[place] = weight.view(found[place].shape)
    return found


# -- rows -------------------------------------------------------------------------------------------------------------


def _rows(parts: Sequence[range]) -> list[range]:
    """Where ranges of positions lie in the shard."""
    ends = [sum(map(len, parts[: n + 1])) for n in range(len(parts))]
    return [range(end - len(part), end) for part, end in zip(parts, ends, strict=True)]


def _part(x: torch.Tensor, rows: range) -> torch.Tensor:
    return x[:, :, rows.start : rows.stop]


def _shapes(shards: Shards, rank: int, k: torch.Tensor, v: torch.Tensor) -> list[torch.Size]:
    return [torch.Size((*x.shape[:2], shards.n_k(rank), x.shape[3])) for x in (k, v)]


def _flat_size(k: torch.Tensor, v: torch.Tensor) -> int:
    return k.numel() + v.numel()


def _unpack(packed: torch.Tensor, k: torch.Size, v: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = packed.split([k.numel(), v.numel()])
    return first.view(k), second.view(v)


def _learned(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled()
