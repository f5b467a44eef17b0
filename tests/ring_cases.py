"""What each of the four processes of `test_ring` runs: every case against one process's result on the whole sequence."""

from __future__ import annotations

import os
import time
import traceback
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import attngen as ag
from attngen.backends.cpu import passes
from attngen.distributed.ring import Ring
from attngen.distributed.shards import positions, shard

WORLD = 4
DEAD = 2  # the rank that dies in the last case
TIMEOUT = timedelta(seconds=8)
Case = Callable[[int], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def work(rank: int, world: int, folder: str, answers: Any) -> None:
    """Run all cases; put (rank, name, "" or what went wrong)."""
    torch.set_num_threads(1)
    os.environ["ATTNGEN_CACHE_DIR"] = folder
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for name, function in CASES.items():
        try:
            function(rank)
            answers.put((rank, name, ""))
        except BaseException:
            answers.put((rank, name, traceback.format_exc()))
    answers.close()
    answers.join_thread()
    os._exit(0)  # the last case leaves a broken group behind, which ordinary shutdown would wait for


def compare(
    spec: ag.Spec,
    rank: int,
    *,
    layout: str = "contiguous",
    sizes: list[int] | int = 256,
    sizes_k: list[int] | None = None,
    heads: tuple[int, int] = (2, 2),
    dtype: torch.dtype = torch.float32,
    q_offset: Any = 0,
    group: Any = None,
    **captures: Any,
) -> Ring:
    """out, lse and all gradients of a rank's shard against those of one process, to float32 rounding (1e-5, 1e-4 relative)."""
    world = dist.get_world_size(group)
    own_sizes = sizes if isinstance(sizes, list) else [sizes // world] * world
    k_sizes = sizes_k or own_sizes
    generator = torch.Generator().manual_seed(7)

    def draw(count: int, length: int, dim: int) -> torch.Tensor:
        return torch.randn(2, count, length, dim, generator=generator).to(dtype).requires_grad_()

    q, k, v = draw(heads[0], sum(own_sizes), 16), draw(heads[1], sum(k_sizes), 16), draw(heads[1], sum(k_sizes), 24)
    weights = [torch.randn(2, heads[0], sum(own_sizes), *dims, generator=generator) for dims in ((24,), ())]
    learned = {name: x for name, x in captures.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    for x in learned.values():
        x.requires_grad_()

    def loss(
        out: torch.Tensor, lse: torch.Tensor, out_weights: torch.Tensor, lse_weights: torch.Tensor
    ) -> torch.Tensor:
        return (out.float() * out_weights).sum() + (torch.where(lse.isfinite(), lse, 0.0) * lse_weights).sum()

    attn = ag.compile(spec)
    want = attn(q, k, v, return_lse=True, q_offset=q_offset, **captures)
    want_grads = torch.autograd.grad(loss(*want, *weights), [q, k, v, *learned.values()])

    def mine(x: torch.Tensor, lengths: list[int] = own_sizes) -> torch.Tensor:
        return shard(x.detach(), rank, lengths, layout)

    parts = [mine(q), mine(k, k_sizes), mine(v, k_sizes)]
    for x in parts:
        x.requires_grad_()
    ring = ag.ring(attn, group, layout=layout)
    got = ring(*parts, return_lse=True, q_offset=q_offset, **captures)
    got_grads = torch.autograd.grad(loss(*got, *map(mine, weights)), [*parts, *learned.values()])
    assert got[0].dtype == dtype
    close("out", got[0], mine(want[0]), 1e-5)
    close("lse", got[1], mine(want[1]), 1e-5)
    for name, x, y in zip("qkv", got_grads, want_grads, strict=False):
        close(f"d{name}", x, mine(y, own_sizes if name == "q" else k_sizes), 1e-4)
    for name, x, y in zip(learned, got_grads[3:], want_grads[3:], strict=True):
        close(f"d{name}", x, y, 1e-4)
    return ring


def close(name: str, got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    assert got.shape == want.shape, f"{name}: {got.shape} {want.shape}"
    assert torch.equal(got.isneginf(), want.isneginf()), f"{name}: rows without a key differ"
    limit *= {torch.float64: 1e-6, torch.float16: 50}.get(got.dtype, 1)
    got, want = (x.detach().double().masked_fill(x.isneginf(), 0.0) for x in (got, want))
    error = (got - want).norm() / want.norm().clamp(min=1e-3)
    assert error <= limit, f"{name}: relative error {error:.2e}"


@case
def full(rank: int) -> None:
    compare(ag.Spec(), rank)


@case
def causal(rank: int) -> None:
    for layout in ("contiguous", "paired"):
        compare(ag.Spec(mask=ag.causal()), rank, layout=layout)


@case
def scaled(rank: int) -> None:
    """Of every block the call's own scale; shards do not depend on it."""
    spec = ag.Spec(mask=ag.causal())
    ring = compare(spec, rank, scale=0.7)
    x = torch.ones(1, 1, 64, 16) / (1 + rank)
    shards = ring.shards(x, x, x)
    assert torch.equal(ring(x, x, x, shards=shards, scale=0.7), ring(x, x, x, scale=0.7))


@case
def windowed(rank: int) -> None:
    width = ag.Param("width")
    spec = ag.Spec(mask=lambda b, h, i, j: (i >= j) & (i - j < width))
    ring = compare(spec, rank, width=40)
    compare(spec, rank, layout="paired", width=70)
    q = torch.zeros(1, 1, 64, 16)
    shards = ring.shards(q, q, q, width=40)
    assert shards.hops == [1, 1, 1, 0], shards.hops  # nobody sees further back than the neighbour
    assert ring.shards(q, q, q, width=66).hops == [2, 2, 1, 0]
    assert ring.shards(q, q, q, width=1).hops == [0, 0, 0, 0]


@case
def documents(rank: int) -> None:
    doc = ag.Tensor("doc", 2, dtype=torch.int32)
    spec = ag.Spec(mask=lambda b, h, i, j: (doc[b, i] == doc[b, j]) & (i >= j))
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor([64, 64, 100, 28])).int().expand(2, -1)
    ring = compare(spec, rank, doc=ids)
    compare(spec, rank, layout="paired", doc=ids[:1])
    q = torch.zeros(2, 1, 64, 16)
    assert ring.shards(q, q, q, doc=ids).hops == [0, 0, 1, 0]


@case
def soft_cap_and_slopes(rank: int) -> None:
    slope = ag.Tensor("slope", 1)
    spec = ag.Spec(mask=ag.causal(), score=lambda s, b, h, i, j: 5 * ag.tanh(s / 5) + slope[h] * (j - i))
    compare(spec, rank, layout="paired", slope=torch.tensor([0.1, 0.3]))


@case
def captures_by_key_and_by_distance(rank: int) -> None:
    weight, table = ag.Tensor("weight", 2), ag.Tensor("table", 2)
    spec = ag.Spec(mask=ag.window(100), score=lambda s, b, h, i, j: s * weight[b, j] + table[h, i - j + 255])
    captures = {"weight": torch.rand(1, 256), "table": torch.randn(2, 511)}
    same_everywhere(captures)
    compare(spec, rank, **captures)
    compare(spec, rank, layout="paired", **captures)


@case
def sinks(rank: int) -> None:
    sink = ag.Tensor("sink", 1)
    compare(ag.Spec(mask=ag.causal(), sink=sink[ag.Expr(_h())]), rank, layout="paired", sink=torch.tensor([0.5, -1.0]))


@case
def grouped_heads_and_half(rank: int) -> None:
    compare(ag.Spec(mask=ag.causal()), rank, heads=(4, 2), layout="paired")
    compare(ag.Spec(mask=ag.causal()), rank, heads=(4, 1), dtype=torch.float16)
    compare(ag.Spec(mask=ag.causal()), rank, heads=(2, 1), dtype=torch.float64)


@case
def uneven(rank: int) -> None:
    compare(ag.Spec(mask=ag.causal()), rank, sizes=[1, 70, 0, 33])
    compare(ag.Spec(mask=ag.causal()), rank, sizes=[37, 4, 90, 1], layout="paired")
    compare(ag.Spec(mask=ag.causal()), rank, sizes=[20, 4, 9, 30], sizes_k=[40, 17, 0, 50], q_offset=44)
    offsets = torch.tensor([44, 3])
    compare(
        ag.Spec(mask=ag.causal() & ag.window(60)), rank, sizes=[20, 4, 9, 30], sizes_k=[40, 17, 0, 50], q_offset=offsets
    )


@case
def without_a_key(rank: int) -> None:
    compare(ag.Spec(mask="i >= j and j > 100"), rank)
    compare(ag.Spec(mask="i < 0"), rank)


@case
def shards_prepared_once(rank: int) -> None:
    ring = ag.ring(ag.compile(ag.Spec(mask=ag.causal())), layout="paired")
    q = torch.randn(1, 2, 32, 16)
    shards = ring.shards(q, q, q)
    assert torch.equal(ring(q, q, q, shards=shards), ring(q, q, q))
    rejects(lambda: ring(q[:, :, :8], q, q, shards=shards), r"q: expected \[batch, heads, 32, head dim\], as in shards")
    wide = torch.randn(1, 4, 32, 16)
    rejects(lambda: ring(wide, wide, wide, shards=shards), r"shards: expected those of \(.*\(1, 4\)")
    window = ag.ring(ag.compile(ag.Spec(mask=ag.causal() & ag.window(ag.Param("width")))))
    narrow = window.shards(q, q, q, width=3)
    rejects(lambda: window(q, q, q, width=90, shards=narrow), "'width', 90")
    rejects(lambda: ring(q, q, q, shards=3), "shards: expected what ring.shards")
    assert positions(rank, [32] * WORLD, "paired")[0] == 16 * rank


@case
def balanced(rank: int) -> None:
    """Causal, head and tail: the busiest rank's tiles are within 10% of the mean."""
    attn = ag.compile(ag.Spec(mask=ag.causal()))
    q = torch.empty(1, 1, 2048, 16)
    each = ag.ring(attn, layout="paired").shards(q, q, q).tiles.sum(1)
    assert each.max() <= 1.1 * each.double().mean(), each
    assert ag.ring(attn).shards(q, q, q).balance < 0.7
    q = torch.empty(1, 1, 1900 + 50 * rank, 16)
    each = ag.ring(attn, layout="paired").shards(q, q, q).tiles.sum(1)
    assert each.max() <= 1.1 * each.double().mean(), each


@case
def device_mesh_and_subgroups(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    compare(ag.Spec(mask=ag.causal()), rank % 2, group=mesh["sequence"], sizes=64)
    attn = ag.compile(ag.Spec())
    rejects(lambda: ag.ring(attn, mesh), "group: expected a mesh of one dimension")
    rejects(lambda: ag.ring(attn, 3), "group: expected a process group")


@case
def alone(rank: int) -> None:
    groups = [dist.new_group([r]) for r in range(WORLD)]
    compare(ag.Spec(mask=ag.causal()), 0, group=groups[rank], sizes=64, layout="paired")


@case
def disagreement(rank: int) -> None:
    ring = ag.ring(ag.compile(ag.Spec(mask=ag.causal())))

    def q(heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
        return torch.zeros(1, heads, 8, dim, dtype=dtype, requires_grad=grad)

    def given(odd: torch.Tensor, whose: int) -> torch.Tensor:
        return odd if rank == whose else q()

    for whose in (0, 3):
        name = f"ring: rank {whose}: expected "
        rejects(lambda w=whose: ring(given(q(dim=32), w), *[given(q(dim=32), w)] * 2), name + "head dim 16 like rank")
        half = q(dtype=torch.float16)
        rejects(lambda w=whose, half=half: ring(*[given(half, w)] * 3), name + "dtype (torch.float32 )?like rank")
        rejects(lambda w=whose: ring(*[given(q(grad=True), w)] * 3), name + "wanted gradients")
    rejects(
        lambda: ring(given(q(), 1), given(q()[0], 1), q()) if rank != 1 else ring(q()[0], q(), q()),
        "q: expected 4|rank 1",
    )
    other = ag.ring(ag.compile(ag.Spec(mask=ag.causal() if rank else ag.window(3))))
    rejects(lambda: other(q(), q(), q()), "ring: rank 0: expected spec .*like rank 1")
    slope = ag.Tensor("slope", 1)
    biased = ag.ring(ag.compile(ag.Spec(score=lambda s, b, h, i, j: s + slope[h])))
    rejects(
        lambda: biased(q(), q(), q(), slope=torch.zeros(1 + rank // 3 * 2)),
        "ring: rank 3: expected captures .*like rank 0",
    )
    rejects(lambda: biased(q(), q(), q(), slope=torch.zeros(2, dtype=torch.int32)), "slope: expected a floating dtype")
    assert ring(q(), q(), q()).shape == (1, 2, 8, 16)  # the group is in order


@case
def what_blocks_keep(rank: int) -> None:
    """For the backward: nothing without gradients, and nothing behind the backward or in a checkpoint."""
    q, k, v = (torch.randn(1, 2, 32, 16, requires_grad=True) for _ in range(3))
    ring = ag.ring(ag.compile(ag.Spec(), schedule=ag.Schedule(store=True)))
    seen: list[Any] = []
    keeping = passes.forward_keeping

    def noted(*args: Any) -> Any:
        result = keeping(*args)
        seen.append(weakref.ref(result[2]))
        return result

    def alive() -> int:
        return sum(ref() is not None for ref in seen)

    passes.forward_keeping = noted  # type: ignore[assignment]
    try:
        with torch.no_grad():
            ring(q, k, v)
        assert not seen, "kept without gradients"
        out = ring(q, k, v)
        assert alive() == WORLD
        torch.autograd.grad(out.sum(), (q, k, v))
        assert not alive(), "kept behind the backward"
        out = checkpoint(ring, q, k, v, use_reentrant=False)
        assert not alive(), "kept in a checkpoint"
        torch.autograd.grad(out.sum(), (q, k, v))
        assert len(seen) == 3 * WORLD and not alive()
    finally:
        passes.forward_keeping = keeping


@case
def refused(rank: int) -> None:
    for spec, message in (
        (ag.Spec(keys=ag.qk_sparse()), "keys= cannot be cut into blocks: a key set"),
        (ag.Spec(dropout=0.1), "dropout= cannot be cut into blocks"),
    ):
        rejects(lambda spec=spec: ag.ring(ag.compile(spec)), message, ag.SpecError)
    rejects(lambda: ag.ring(ag.compile(ag.Spec()), layout="striped"), "layout: expected one of contiguous, paired")


@case
def silence(rank: int) -> None:
    """A rank that does not answer: the others give up after the group's time-out."""
    group = dist.new_group(list(range(WORLD)), timeout=timedelta(seconds=2))
    ring = ag.ring(ag.compile(ag.Spec()), group)
    q = torch.randn(1, 2, 32, 16)
    shards = ring.shards(q, q, q)
    start = time.monotonic()
    if rank == DEAD:
        time.sleep(4)
        return
    rejects(lambda: ring(q, q, q, shards=shards), f"ring: rank {rank} of 4 lost a neighbour", ag.GroupError)
    assert time.monotonic() - start < 4


@case
def death(rank: int) -> None:
    """Last: it ends a process."""
    group = dist.new_group(list(range(WORLD)), timeout=TIMEOUT)
    ring = ag.ring(ag.compile(ag.Spec()), group)
    q = torch.randn(1, 2, 32, 16)
    shards = ring.shards(q, q, q)
    if rank == DEAD:
        return
    start = time.monotonic()
    rejects(lambda: ring(q, q, q, shards=shards), f"ring: rank {rank} of 4 lost a neighbour", ag.GroupError)
    assert time.monotonic() - start < 2 * TIMEOUT.total_seconds()


def rejects(call: Callable[[], Any], message: str, kind: type[Exception] = ag.InputError) -> None:
    import re

    try:
        call()
    except kind as error:
        assert re.search(message, str(error)), f"{error} is not {message!r}"
    else:
        raise AssertionError(f"no {kind.__name__}: {message}")


def same_everywhere(captures: dict[str, torch.Tensor]) -> None:
    for x in captures.values():
        dist.broadcast(x, 0)


def _h() -> Any:
    from attngen.language.expression import H

    return H
