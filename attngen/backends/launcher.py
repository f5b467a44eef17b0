"""Run a plan's launches on a GPU: buffers, arguments, grids. The same code drives compiled kernels, interpreted ones, and those of
a pack: where kernels come from, and how one is started, is a `Sources`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from attngen.analysis.capture_sites import CAPTURED, CaptureSite, collect
from attngen.backends.work import Facts, sizes_of, states_of, stream_runs, table_tiles, walk_tables
from attngen.errors import InputError
from attngen.language.call import Call
from attngen.language.lists import RowLists
from attngen.language.plain import PLAIN
from attngen.language.programs import evaluate, tensor_of
from attngen.language.schedule import Schedule
from attngen.plan.grid import Grid
from attngen.plan.launches import Launch, backward_launches

LOG2E = math.log2(math.e)
TABLES = " tables"  # behind the name of the kernel whose walk reads them
MOST_READY = 4096  # launches that are kept ready; then all are forgotten: they cost some 100 us each


class Sources(Protocol):
    """Where a launcher's kernels come from. What is found has `args`, `grid`, `num_stages` as `attngen.lowering.source.Source`."""

    def find(
        self,
        kernel: str,
        call: Call,
        facts: Facts,
        schedule: Schedule,
        tensors: Mapping[str, Any],
        sites: tuple[CaptureSite, ...] = (),
    ) -> Any:
        """A kernel for such a call. tensors: those that it is launched with; sites: see `attngen.plan.launches.Launch`."""

    def guarded(
        self,
        kernel: str,
        call: Call,
        facts: Facts,
        schedule: Schedule,
        tensors: Mapping[str, Any],
        sites: tuple[CaptureSite, ...] = (),
    ) -> Any | None:
        """What looks after the results of a kernel that are no numbers; None if there can be none."""

    def plain(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> tuple[Schedule, Facts]:
        """How delta is computed, which is the same for every spec."""

    def options(self, source: Any) -> Any:
        """What `start` wants to know besides."""

    def start(self, source: Any, programs: int, arguments: list[Any], options: Any) -> None:
        """One launch, on the device of its tensors, the first of which is the first argument."""


@dataclass(frozen=True, eq=False)
class _Ready:
    """A launch for one set of shapes and strides: what is left to a call is to put in its pointers and numbers. programs: 0 if there is
    nothing to launch. tensors, params: (place, name) of each; offset, scale: where an int q_offset and the scale go.
    """

    source: Any
    programs: int
    arguments: list[Any]
    tensors: tuple[tuple[int, str], ...]
    params: tuple[tuple[int, str], ...]
    offset: int | None
    scale: int | None
    options: dict[str, Any]
    # What looks after results that are no numbers, its programs, and the places of what it takes of the arguments.
    again: tuple[Any, int, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Inputs:
    """The tensors that a launch is given, and what its arguments depend on of them besides pointers. Tensors that are made for
    it depend on these, and rows [B, heads, n_q] are contiguous.
    """

    tensors: Mapping[str, torch.Tensor]
    described: tuple[Any, ...]

    def and_(self, tensors: Mapping[str, torch.Tensor]) -> Inputs:
        """These and others."""
        return Inputs({**self.tensors, **tensors}, self.described + _described(tensors)) if tensors else self


def _described(tensors: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    return tuple([(x.dtype, x.shape, x.stride(), x.data_ptr() & 15) for x in tensors.values()])


def inputs_of(call: Call, **tensors: torch.Tensor) -> Inputs:
    """Some tensors, and what the call captures."""
    given = {**captures_of(call), **tensors} if call.captures else tensors
    return Inputs(given, _described(given))


def captures_of(call: Call) -> dict[str, torch.Tensor]:
    """The captured tensors; those of lists contiguous, and empty ones of a size that a stride can be made from."""
    own = () if call.spec.lists is None else call.spec.lists.names
    return {CAPTURED + name: t.contiguous() if name in own else t for name, t in call.captures.items()}


class Launcher:
    """A backend, see `attngen.backends`, whose kernels come from `sources`."""

    def __init__(self, sources: Sources):
        self.sources = sources
        self._ready: dict[Any, _Ready] = {}
        self._grids: dict[Any, Grid] = {}

    def forward(self, call: Call, facts: Facts, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse, see `attngen.backends`."""
        return self.forward_keeping(call, facts, schedule)[:2]

    def forward_keeping(
        self, call: Call, facts: Facts, schedule: Schedule
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The same, and what a large lse lacks, where there is such (`Facts.restores`). A split forward writes partial states,
        which a second launch merges.
        """
        self._check(call)
        rows = call.q.shape[:3]
        out, lse = call.q.new_empty((*rows, call.v.shape[3])), call.q.new_empty(rows, dtype=torch.float32)
        made: dict[str, torch.Tensor] = {"out": out, "lse": lse}
        if facts.restores(call.q.dtype):
            made["excess"] = torch.empty_like(lse)
        if (
            call.spec.page_size is not None and min(call.k.shape[0], call.n_k) == 0
        ):  # not even a page to load nothing from
            return out.zero_(), lse.fill_(-torch.inf), None
        given = inputs_of(call, q=call.q, k=call.k, v=call.v)
        walk = walk_tables(call, facts, schedule, "forward", self.tables)
        walking = given.and_(walk)
        if schedule.split in (None, 1):
            self._launch("forward", call, facts, schedule, walking, made)
            return out, lse, made.get("excess")
        grid, sizes = self._grid_of(call, facts, schedule, {**given.tensors, **made}), sizes_of(call, schedule)
        if schedule.split == "stream":
            made |= stream_runs(call, facts, schedule, grid, sizes, walk)
        made |= states_of(call, grid, sizes)
        self._launch("forward", call, facts, schedule, walking, made)
        self._launch("merge", call, facts, schedule, given, made)
        return out, lse, made.get("excess")

    def delta(self, out: torch.Tensor, do: torch.Tensor, dlse: torch.Tensor | None = None) -> torch.Tensor:
        """rowsum(dO * O) - dlse, float32 [B, Hq, Nq]; dlse: None for 0."""
        schedule, facts = self.sources.plain(out.device, out.shape[3], out.dtype)
        made = {"delta": out.new_empty(out.shape[:3], dtype=torch.float32)}
        call = Call(PLAIN, out, out, out, {}, {}, 0)
        given = inputs_of(call, out=out, do=do)
        if dlse is None:
            self._launch("delta_of_out", call, facts, schedule, given, made)
        else:
            made["dlse"] = dlse.to(torch.float32).contiguous()
            self._launch("delta", call, facts, schedule, given, made)
        return made["delta"]

    def backward(
        self,
        call: Call,
        facts: Facts,
        schedule: Schedule,
        lse: torch.Tensor,
        delta: torch.Tensor,
        do: torch.Tensor,
        wanted: list[str],
        kept: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Gradients, see `attngen.backends`, by the kernels that `attngen.plan.launches` names; no atomics between them."""
        self._check(call)
        given = inputs_of(call, q=call.q, k=call.k, v=call.v, do=do)
        walks = {
            kernel: given.and_(walk_tables(call, facts, schedule, kernel, self.tables)) for kernel in ("dq", "dkv")
        }
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (call.q, call.k, call.v))
        made = {"lse": lse.contiguous(), "delta": delta.contiguous(), "dq": dq, "dk": dk, "dv": dv}
        made["level"] = torch.empty_like(made["lse"])
        if facts.restores(call.q.dtype):
            made["excess"] = torch.empty_like(made["lse"]) if kept is None else kept.contiguous()
        captured = {name: call.captures[name] for name in wanted}
        gradients = {n: torch.zeros(t.shape, dtype=torch.float32, device=t.device) for n, t in captured.items()}
        own = call.spec.lists, call.q.dtype, schedule, wanted, call.q.shape[0], call.q.shape[1]
        offsets = isinstance(call.q_offset, torch.Tensor)
        for launch in backward_launches(facts, *own, offsets=offsets, kept=kept is not None):
            buffers = {site.buffer: self._buffer(site, call, schedule) for site in launch.sites}
            walking = walks["dkv" if launch.by_keys else "dq"]
            self._launch(launch.kernel, call, facts, schedule, walking, {**made, **buffers}, launch.sites)
            self._collect(launch, buffers, call, gradients)
        for name, total in gradients.items():
            self._add_of_sink(total, name, call, facts, made)
        return dq, dk, dv, gradients

    def tables(self, call: Call, facts: Facts, schedule: Schedule, kernel: str) -> dict[str, torch.Tensor]:
        """Summaries of captured data for the walk of one kernel: int32 [B or 1, H or 1, tiles] each."""
        walk = facts.walk_of(kernel)
        by_batch, by_head = walk.differ(isinstance(call.q_offset, torch.Tensor))
        leading = call.q.shape[0] if by_batch else 1, call.q.shape[1] if by_head else 1
        shape, device = (len(walk.symbols), *leading, table_tiles(call, schedule, kernel)), call.q.device
        if min(call.q.shape[2], call.n_k) == 0:  # nothing to visit, whatever the bounds
            made = torch.zeros(shape, dtype=torch.int32, device=device)
        else:
            made = torch.empty(shape, dtype=torch.int32, device=device)
            self._launch(f"{kernel}{TABLES}", call, facts, schedule, inputs_of(call), {"made": made})
        return dict(zip(walk.symbols, made.unbind(0), strict=True))

    @staticmethod
    def table_tiles(call: Call, schedule: Schedule, kernel: str) -> int:
        """How many tiles those tables are of."""
        return table_tiles(call, schedule, kernel)

    @staticmethod
    def _check(call: Call) -> None:
        if call.q.dtype == torch.float64:
            raise InputError(
                "q", "float32, float16 or bfloat16 on this backend", "torch.float64", "use the CPU backend"
            )

    def _grid_of(self, call: Call, facts: Facts, schedule: Schedule, buffers: Mapping[str, Any]) -> Grid:
        """How the forward's programs lie over its outputs: the same whatever the lengths."""
        key = facts, schedule, call.q.shape[3], call.v.shape[3], call.q.dtype
        found = self._grids.get(key)
        if found is None:
            if len(self._grids) >= MOST_READY:
                self._grids.clear()
            found = self._grids[key] = self.sources.find("forward", call, facts, schedule, buffers).grid
        return found

    def _launch(
        self,
        kernel: str,
        call: Call,
        facts: Facts,
        schedule: Schedule,
        given: Inputs,
        made: Mapping[str, torch.Tensor],
        sites: tuple[CaptureSite, ...] = (),
    ) -> None:
        """Launch a kernel on the current stream of the call's device; nothing for an empty grid."""
        offset, q = call.q_offset, call.q
        key = kernel, facts, schedule, sites, type(offset), q.device, q.shape, call.k.shape, given.described
        ready = self._ready.get(key)
        if ready is None:
            if len(self._ready) >= MOST_READY:
                self._ready.clear()
            ready = self._ready[key] = self._made_ready(kernel, call, facts, schedule, {**given.tensors, **made}, sites)
        if not ready.programs:
            return
        tensors = {**given.tensors, **made}
        if ready.again is not None:
            tensors["odd"] = torch.empty(ready.programs, dtype=torch.int32, device=q.device)
        arguments = ready.arguments.copy()
        for place, name in ready.tensors:
            arguments[place] = tensors[name]
        for place, name in ready.params:
            value = call.params[name]
            arguments[place] = value - 2**32 if name == "seed" and value >= 2**31 else value  # an i32
        if ready.offset is not None:
            arguments[ready.offset] = offset.to(torch.int32) if isinstance(offset, torch.Tensor) else offset
        if ready.scale is not None:
            arguments[ready.scale] = call.scale
        self.sources.start(ready.source, ready.programs, arguments, ready.options)
        if ready.again is not None:
            source, programs, places = ready.again
            again = [*[arguments[place] for place in places], ready.programs]
            self.sources.start(source, programs, again, ready.options)

    def _made_ready(
        self,
        kernel: str,
        call: Call,
        facts: Facts,
        schedule: Schedule,
        tensors: Mapping[str, Any],
        sites: tuple[CaptureSite, ...],
    ) -> _Ready:
        """A kernel's arguments from their description."""
        source = self.sources.find(kernel, call, facts, schedule, tensors, sites)
        lengths = sizes_of(call, schedule, source.grid.heads)
        programs = source.grid.programs(lengths)
        arguments: list[Any] = [None] * len(source.args)
        places: dict[str, list[tuple[int, str]]] = {"tensor": [], "table": [], "param": [], "offset": [], "scale": []}
        if programs * lengths["batch"] * lengths["heads"] == 0:
            return _Ready(source, 0, arguments, (), (), None, None, {})
        for place, arg in enumerate(source.args):
            if arg.role in places:
                places[arg.role].append((place, arg.of))
            elif arg.role == "stride":
                tensor = tensors[arg.of]
                arguments[place] = tensor.stride(arg.dim) if tensor.shape[arg.dim] != 1 else 0
            elif arg.role == "size":
                arguments[place] = tensors[arg.of].shape[arg.dim]
            elif arg.role == "length":
                arguments[place] = lengths[arg.of]
            else:
                raise AssertionError(arg)
        offset, scale = (next((place for place, _ in places[role]), None) for role in ("offset", "scale"))
        found = (*places["tensor"], *places["table"])
        again = None
        guarded = self.sources.guarded(kernel, call, facts, schedule, tensors, sites)
        if guarded is not None:
            assert guarded.num_stages == source.num_stages
            again = guarded, guarded.grid.programs(lengths), tuple(source.args.index(arg) for arg in guarded.args[:-1])
        return _Ready(
            source,
            programs,
            arguments,
            found,
            tuple(places["param"]),
            offset,
            scale,
            self.sources.options(source),
            again,
        )

    @staticmethod
    def _buffer(site: CaptureSite, call: Call, schedule: Schedule) -> torch.Tensor:
        """What a kernel leaves there of a captured tensor's gradient, float32."""
        tensor, (batch, heads, n_q, _), lists = call.captures[site.tensor], call.q.shape, call.spec.lists
        if site.kind == "edges":
            heads = heads if isinstance(lists, RowLists) and lists.by_query_head else call.k.shape[1]
        block_m = 1 if isinstance(lists, RowLists) else schedule.tile("dq").block_m
        *outer, length = site.buffer_shape(batch, heads, n_q, call.n_k, block_m, tuple(tensor.shape))
        make = torch.zeros if site.zeroed or 0 in call.q.shape else torch.empty
        if site.kind != "pairs":
            return make((*outer, length), dtype=torch.float32, device=tensor.device)
        # Rows begin at multiples of 16, so that they are stored in whole vectors.
        return make((*outer, -(-length // 16) * 16), dtype=torch.float32, device=tensor.device)[..., :length]

    @staticmethod
    def _collect(
        launch: Launch, buffers: Mapping[str, torch.Tensor], call: Call, totals: Mapping[str, torch.Tensor]
    ) -> None:
        """Adds what a kernel left to gradients, float32 and of their tensors' (expanded) shapes."""
        if not launch.sites:
            return
        env, shifted = dense_environment(call), isinstance(call.q_offset, torch.Tensor) or call.q_offset != 0
        for site in launch.sites:
            totals[site.tensor].add_(collect(site, buffers[site.buffer], call.captures[site.tensor], env, shifted))

    @staticmethod
    def _add_of_sink(
        total: torch.Tensor, name: str, call: Call, facts: Facts, made: Mapping[str, torch.Tensor]
    ) -> None:
        """What the sink adds to a captured tensor's gradient. It is a key with value 0: its dS is P * (0 - delta)."""
        loads = facts.slopes.get(name, ())
        if not loads:
            return
        env, rows = dense_environment(call), (*call.q.shape[:3], 1)
        sink = tensor_of(evaluate(call.spec.sink, env), total.device).to(torch.float32)
        lse, excess = made["lse"][..., None], made["excess"][..., None] if "excess" in made else 0.0
        # One exponent: where logits are huge so is excess, and 2^-excess alone would be inf, or 0.
        p = torch.where(lse > -torch.inf, torch.exp2((sink - lse) * LOG2E - excess), 0.0)  # [B, Hq, Nq, 1]
        ds = -p * made["delta"][..., None]
        for load in loads:
            share = (ds * evaluate(load.slope, env)).expand(rows)
            if not load.indices:
                total += share.sum()
                continue
            places = [tensor_of(evaluate(index, env), total.device).long() for index in load.indices]
            total.index_put_(tuple(place.expand(share.shape) for place in places), share, accumulate=True)


def dense_environment(call: Call) -> dict[str, Any]:
    """What indices of loads read, to broadcast over [B, H, Nq, Nk]."""
    (batch, heads, n_q, _), device = call.q.shape, call.q.device
    offset = tensor_of(call.q_offset, device).reshape(-1, 1, 1, 1)
    return {
        **call.captures,
        **call.params,
        "b": torch.arange(batch, device=device).view(-1, 1, 1, 1),
        "h": torch.arange(heads, device=device).view(1, -1, 1, 1),
        "i": torch.arange(n_q, device=device).view(1, 1, -1, 1) + offset,
        "j": torch.arange(call.n_k, device=device).view(1, 1, 1, -1),
        "q_offset": offset,
    }


def is_aligned(tensor: torch.Tensor) -> bool:
    """Unit stride along the head dim and every other stride a multiple of 16, so that rows load in whole vectors; that between rows
    even where there is one, since a tensor descriptor has it.
    """
    *outer, rows, last = tensor.stride()
    steps = [stride for stride, size in zip(outer, tensor.shape, strict=False) if size > 1]
    return (
        (last == 1 or tensor.shape[-1] == 1)
        and all(s % 16 == 0 for s in (*steps, rows))
        and tensor.data_ptr() % 16 == 0
    )
