"""What the tests of key sets measure: tiles visited, memory, and whether anything waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import pytest
import torch
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attngen as ag
from attngen.language.call import Call
from attngen.language.listed_pairs import as_log_weight
from attngen.language.lists import RowLists, TileLists
from attngen.language.programs import evaluate
from attngen.reference.dense import dense_env
from attngen.reference.keysets import attended
from attngen.runtime import operators

Case = tuple[Any, dict[str, Any]]  # a key set and its captures

# -- one case of each key set that is no list of tiles (those are in test_keys_tiles) ----------------------------------


def spread(rows: int, n: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """For each row different numbers below n, `count` of them or all: int64 [rows, count]."""
    count = min(count, n)
    start = torch.randint(0, n, (rows, 1), generator=generator)
    return (start + torch.arange(count) * (n // count)) % n


def _qk_sparse(size: tuple[int, ...], generator: torch.Generator) -> Case:
    batch, heads, group, n_q, n_k, _ = size
    keep_q = torch.rand((batch, heads * group, n_q), generator=generator) < 0.5
    return ag.qk_sparse(), dict(keep_q=keep_q, keep_k=torch.rand((batch, heads, n_k), generator=generator) < 0.5)


def _hash_sparse(size: tuple[int, ...], generator: torch.Generator) -> Case:
    batch, heads, group, n_q, n_k, _ = size
    q_bucket = torch.randint(0, 5, (batch, heads * group, n_q), generator=generator)
    k_bucket = torch.randint(0, 5, (batch, heads, n_k), generator=generator)
    return ag.hash_sparse(), dict(q_bucket=q_bucket, k_bucket=k_bucket)


def _hyper(size: tuple[int, ...], generator: torch.Generator) -> Case:
    return ag.hyper(32, 32, 64), dict(seed=3)


def _codebook(size: tuple[int, ...], generator: torch.Generator) -> Case:
    return ag.codebook(), dict(count=torch.randint(0, 4, (size[0], size[1], size[4]), generator=generator))


def _gather(size: tuple[int, ...], generator: torch.Generator) -> Case:
    index = spread(size[0] * size[1], size[4], 70, generator)
    return ag.gather(), dict(index=index.view(*size[:2], -1))


def _gather_by_row(size: tuple[int, ...], generator: torch.Generator) -> Case:
    batch, heads, group, n_q, n_k, _ = size
    index = spread(batch * heads * group * n_q, n_k, 40, generator)
    return ag.gather(), dict(index=torch.where(index % 7 == 0, -1, index).view(batch, heads * group, n_q, -1))


def _graph(size: tuple[int, ...], generator: torch.Generator, lead: tuple[int, ...] = ()) -> Case:
    """Rows of degree 0 to 40, no edge twice, and padding behind the last."""
    n_q, n_k = size[3:5]
    degree = torch.randint(0, min(40, n_k) + 1, (*lead, n_q), generator=generator)
    crow = torch.nn.functional.pad(degree.cumsum(-1), (1, 0))
    col = torch.zeros((*lead, 40 * n_q), dtype=torch.int64)
    for own, ends, count in zip(col.view(-1, 40 * n_q), crow.view(-1, n_q + 1), degree.view(-1, n_q), strict=True):
        listed = spread(n_q, n_k, 40, generator)
        own[: int(ends[-1])] = listed[torch.arange(listed.shape[1]) < count.unsqueeze(-1)]
    return ag.graph(), dict(crow=crow, col=col)


def _graph_by_head(size: tuple[int, ...], generator: torch.Generator) -> Case:
    return _graph(size, generator, (size[0], size[1] * size[2]))


def _sparse_k(window: int | None, incremental: bool, **more: int) -> Callable[..., Case]:
    def make(size: tuple[int, ...], generator: torch.Generator) -> Case:
        u = torch.randn((size[0], size[1], size[4]), generator=generator)
        return ag.sparse_k(48, window, incremental, **more), dict(u=u)

    return make


def _union(size: tuple[int, ...], generator: torch.Generator) -> Case:
    near, (_, captures) = ag.causal() & ag.window(9), _qk_sparse(size, generator)
    far = ag.Spec(keys=ag.qk_sparse(), mask=ag.causal() & ~ag.window(9))
    return ag.union(ag.Spec(mask=near), far).keys, captures


CASES: dict[str, Callable[..., Case]] = {
    "qk_sparse": _qk_sparse,
    "hash_sparse": _hash_sparse,
    "hyper": _hyper,
    "codebook": _codebook,
    "gather": _gather,
    "gather by row": _gather_by_row,
    "graph": _graph,
    "graph by head": _graph_by_head,
    "sparse_k": _sparse_k(None, False),
    "sparse_k, window": _sparse_k(16, False),
    "incremental": _sparse_k(None, True),
    "incremental, window": _sparse_k(16, True),
    "incremental, capacity": _sparse_k(None, True, capacity=192),
    "union": _union,
}


def case(name: str, size: tuple[int, ...], seed: int = 0) -> Case:
    """A key set and its captures at (B, Hkv, group, Nq, Nk, q_offset)."""
    return CASES[name](size, torch.Generator().manual_seed(seed))


# -- tiles ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Tiles that the forward and the backward of k and v visit, tiles that hold an attended pair, and pairs, over all batches
    and heads. A list of rows has tiles of one row (in the backward, one key) and some of what it lists.
    """

    forward: int = 0
    backward: int = 0
    needed: int = 0
    needed_back: int = 0
    pairs: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def work(spec: ag.Spec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, **captures: Any) -> list[Work]:
    """Of each piece that a call with a backward runs, in tiles of `block` a side unless the piece lists its own."""
    return [of_piece(call, block) for _, call in ag.compile(spec).attends(q.requires_grad_(), k, v, **captures)]


def of_piece(call: Call, block: int) -> Work:
    q, k = call.q, call.k
    pairs = torch.as_tensor(evaluate(call.spec.mask, dense_env(call, torch.float64)))
    pairs = pairs.expand(*q.shape[:3], k.shape[2]).long()
    lists = call.spec.lists
    if lists is not None:
        times = as_log_weight(call)
        assert times is not None
        pairs = pairs * times.exp().round().long()
    total = int(pairs.sum())
    if isinstance(lists, RowLists):
        ways = [_tiles_of(pairs.sum(dim), block) for dim in (3, 2)]
        seen = [_over_heads(-(-runs[..., 1] // block), call) for runs in _runs(call.captures)]
        return Work(*seen, *ways, total)
    block_m, block_n = (lists.block_m, lists.block_n) if isinstance(lists, TileLists) else (block, block)
    pad = torch.nn.functional.pad(pairs > 0, (0, -k.shape[2] % block_n, 0, -q.shape[2] % block_m))
    needed = int(pad.unflatten(-1, (-1, block_n)).unflatten(2, (-1, block_m)).any(-1).any(3).sum())
    if isinstance(lists, TileLists):
        seen = [_over_heads(runs[..., 1:].sum(-1), call) for runs in _runs(call.captures)]
        return Work(*seen, needed, needed, total)
    return Work(*(_mapped(call, block, back) for back in (False, True)), needed, needed, total)


def _runs(named: dict[str, Any]) -> list[torch.Tensor]:
    return [named["query_runs"], named["key_runs"]]


def _over_heads(counts: torch.Tensor, call: Any) -> int:
    """The sum over all batches and query heads, of counts [B', H', *] that some of them share."""
    batch, heads = call.q.shape[:2]
    return int(counts.sum()) * (batch // counts.shape[0]) * (heads // counts.shape[1])


def _tiles_of(counts: torch.Tensor, block: int) -> int:
    return int((-(-counts // block)).sum())


def _mapped(call: Call, block: int, transposed: bool) -> int:
    """Tiles that the walk of a closed form visits."""
    return int((tile_maps(call, block, transposed) > 0).sum())


def tile_maps(call: Call, block: int, transposed: bool = False) -> torch.Tensor:
    """Of each batch and head what `ag.tile_map` says: [B, Hq, tiles_q, tiles_k]."""
    named = {**call.captures, **call.params}
    read = {name: value for name, value in named.items() if name in {s.name for s in call.spec.mask.free_symbols}}
    more: dict[str, Any] = dict(q_offset=call.q_offset, transposed=transposed, **read)
    sizes, (batch, heads) = (call.q.shape[2], call.k.shape[2], block, block), call.q.shape[:2]
    maps = [[ag.tile_map(call.spec, *sizes, b=b, h=h, **more) for h in range(heads)] for b in range(batch)]
    return torch.stack([torch.stack(own) for own in maps])


def pairs_of(spec: ag.Spec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: dict[str, Any]) -> int:
    """How many pairs the definition attends; of a union, those of its pieces."""
    specs = spec.keys.specs if spec.keys is not None and spec.keys.name == "union" else (spec,)
    total = 0
    for own in specs:
        names = {*own.tensors, *own.params, *(() if own.keys is None else own.keys.captures())}
        named = {name: value for name, value in captures.items() if name in names}
        total += int(attended(own, q, k, v, 0, named).sum())
    return total


# -- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes that were allocated at one time, at most, and at once."""

    peak: int
    largest: int


def memory(run: Callable[[], Any]) -> Memory:
    """What the allocator gave out while `run` ran in this thread, temporaries inside of operators included."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(use_cpu=True, profile_memory=True) as found:
            kept = run()
        events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
        del kept
    finally:
        torch.set_num_threads(threads)
    now = peak = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now, largest = now + event.nbytes(), max(largest, event.nbytes())
        peak = max(peak, now)
    return Memory(peak, largest)


# -- waiting for the device -------------------------------------------------------------------------------------------


class OnDevice(TorchDispatchMode):
    """Fails where an operation takes a tensor of the CPU that is more than a number: on a GPU that is a copy, and waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu" and (copies or x.dim()):
                raise AssertionError(f"{func} of a tensor {list(x.shape)} on the CPU")
        return func(*args, **(kwargs or {}))


class _NoGenerator:
    """In the place of a generator: the meta device has none."""

    def __init__(self, device: Any = None):
        pass

    def manual_seed(self, seed: int) -> _NoGenerator:
        return self


def on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets whole calls run on the meta device, where nothing has a value and reading one is an error: without random numbers,
    and step by step where operators are watched.
    """

    def without_generator(draw: Any) -> Any:
        return lambda *args, generator=None, **more: draw(*args, **more)

    monkeypatch.setattr(operators, "_traced", lambda q: False)
    monkeypatch.setattr(torch, "Generator", _NoGenerator)
    for name in ("randn", "randint", "rand"):
        monkeypatch.setattr(torch, name, without_generator(getattr(torch, name)))


def without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.tensor` and `as_tensor` of Python's numbers on a device fail: they copy from the CPU, and wait for it; `full` does
    not. No dispatch mode gets to see them.
    """

    def checked(make: Any) -> Any:
        def refuse(data: Any, *args: Any, **more: Any) -> torch.Tensor:
            there = torch.device(more.get("device") or "cpu").type != "cpu"
            if there and (not isinstance(data, torch.Tensor) or data.device.type == "cpu"):
                raise AssertionError(f"{data!r} copied to {more['device']}")
            return make(data, *args, **more)

        return refuse

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, checked(getattr(torch, name)))


def to_meta(captures: dict[str, Any]) -> dict[str, Any]:
    """The same captures, without their values."""
    return {
        name: torch.empty_like(x, device="meta") if isinstance(x, torch.Tensor) else x for name, x in captures.items()
    }
