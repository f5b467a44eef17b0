"""Building packs: the kernels of specs, compiled ahead for GPUs that are not here, with all that a call needs to know.

The specs are planned for sample calls as they run on a GPU. Each attention of a plan gets the schedule that a call there would choose, and
its kernels are rendered and compiled; what is the same for several specs stands in a pack once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from attngen import __version__
from attngen.analysis import Facts, facts
from attngen.analysis.capture_sites import CAPTURED, CaptureSite
from attngen.analysis.sites import site_of
from attngen.backends.launcher import TABLES
from attngen.backends.triton.compiling import compile_function
from attngen.errors import InputError, PackError
from attngen.language.call import Call
from attngen.language.keyset import KeySet
from attngen.language.keysets.cached import Paged
from attngen.language.keysets.union import Union
from attngen.language.plain import PLAIN, PlainParam, PlainSpec, PlainTensor
from attngen.language.programs import program_of
from attngen.language.spec import Spec
from attngen.lowering import Source, render
from attngen.lowering.render import GUARDED, may_need_guard
from attngen.lowering.signature import Arg
from attngen.lowering.tables import render_tables
from attngen.packs import format
from attngen.packs.contents import POINTERS, dtype_name
from attngen.packs.elf import read_cubin
from attngen.packs.plain import put_spec
from attngen.packs.record import SHARED_LIMITS, Argument, Kernel
from attngen.plan.keysets.ragged import LENGTHS
from attngen.plan.launches import Launch, every_backward_launch, forward_launches
from attngen.plan.planner import forget_inner, inner_specs
from attngen.runtime import first_tiles
from attngen.runtime.attention import compile as compile_spec
from attngen.schedule import KERNELS, Schedule, Target
from attngen.schedule.choice import Finder, choose_elsewhere, complete_for, on_gpu, shape_bucket
from attngen.schedule.identities import find_gpu
from attngen.store import Shape
from attngen.store.workload import DIRECTIONS, Workload
from attngen.tuning.attends import example

PROCESSORS = 128  # of a GPU that is known by its architecture alone
Specs = Spec | str | Mapping[str, Spec | str] | Sequence[Spec]


def save(
    specs: Specs,
    folder: Path | str,
    *,
    targets: Sequence[str],
    shapes: Sequence[Any] | str | Shape,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    head_dims: Sequence[int] = (),
    schedule: Schedule | None = None,
    db: str | None = None,
    captures: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    backward: bool = True,
    offset_tensors: bool = False,
    search: float | None = None,
) -> Path:
    """Build a pack: a folder of compiled kernels, which `ag.load` runs without a compiler. No GPU is needed.

    specs: a spec, several of which each has a name of its own (`Spec(name=...)`), or specs by name.
    targets: NVIDIA architectures ("sm_80" to "sm_120") or GPUs ("H100"); from sm_90 on a kernel runs on exactly its architecture.
    shapes: sizes of calls, as for `ag.tune`: each a text "B1 Hq8 Hkv2 N4096 D64", (B, H, N, D), or a `Shape`. Calls of other sizes run
        too, with the schedule of the nearest one; of a key set, sizes may decide which kernels there are.
    dtypes: of q, k and v. head_dims: instead of those of the shapes.
    schedule: decisions over the specs', the records' and the model's. db: path of the record database, None for the user's.
    captures: by name, where made-up ones would not do: their dtypes are those that the kernels take, and lengths (k_len, k_offset, cu_q
        and cu_k) are never made up. Several of them are several calls: [{}, {"k_len": lengths}] for batches with padding or without.
    backward: kernels of gradients too. offset_tensors: kernels also for calls whose q_offset is a tensor.
    search: seconds in which tiles may be found by compiling, for each attention that has no record and none that ships; 0 takes safe
        ones. None: as at a first call on a GPU, ATTNGEN_SEARCH_SECONDS or 2. The database remembers what was found.

    Two builds of the same, by the same records, are equal to the byte. Returns the folder. Raises PackError, SpecError, InputError,
    ScheduleError.
    """
    several = [captures or {}] if captures is None or isinstance(captures, Mapping) else captures
    directions = DIRECTIONS if backward else DIRECTIONS[:1]
    calls = [
        Workload(name, spec, shape, dtype_name(dtype), {n: x for n, x in given.items() if _takes(spec, n)}, directions)
        for name, spec in _named(specs).items()
        for shape in _shapes(shapes, head_dims)
        for dtype in dtypes
        for given in several
    ]
    how: dict[str, Any] = {"schedule": schedule, "db": db, "offset_tensors": offset_tensors, "search": search}
    return save_workloads(calls, folder, targets=targets, **how)


def save_workloads(
    calls: Iterable[Workload],
    folder: Path | str,
    *,
    targets: Sequence[str],
    schedule: Schedule | None = None,
    db: str | None = None,
    offset_tensors: bool = False,
    search: float | None = None,
) -> Path:
    """The same from calls, each with a spec, a shape, a dtype and captures of its own; calls of one name have one spec."""
    if isinstance(targets, str) or not targets:
        raise PackError(f"targets: expected a list such as ['sm_90'], got {targets!r}")
    for target in targets:
        if _architecture(target) not in SHARED_LIMITS:
            raise PackError(
                f"targets: expected NVIDIA architectures ({', '.join(SHARED_LIMITS)}) or GPUs, got {target!r}"
            )
    finder = partial(first_tiles.search, allowed=search)
    builder = _Builder(schedule or Schedule(), db, offset_tensors, finder)
    for call in calls:
        builder.add(call, targets)
    return format.write(folder, builder.manifest, builder.kernels, builder.files, attngen=__version__)


def _named(specs: Specs) -> dict[str, Spec]:
    if isinstance(specs, (Spec, str)):
        specs = [specs if isinstance(specs, Spec) else Spec.from_text(specs)]
    if isinstance(specs, Mapping):
        found = {name: Spec.from_text(spec) if isinstance(spec, str) else spec for name, spec in specs.items()}
    else:
        names = [spec.name or ("attention" if len(specs) == 1 else "") for spec in specs]
        for name in names:
            if not name or names.count(name) > 1:
                fix = 'give each a name of its own, Spec(..., name="local"), or pass {"local": spec}'
                raise PackError(f"specs: expected names that differ, got {', '.join(map(repr, names))}; {fix}")
        found = dict(zip(names, specs, strict=True))
    if not found:
        raise PackError("specs: expected at least one")
    return found


def _shapes(shapes: Any, head_dims: Sequence[int]) -> list[Shape]:
    found = [Shape.of(shapes)] if isinstance(shapes, (Shape, str)) else [Shape.of(shape) for shape in shapes]
    if not found:
        raise InputError("shapes", "at least one shape", "none", "e.g. shapes=['B1 H8 N4096 D64']")
    if not head_dims:
        return found
    return [replace(shape, head_dim=d, head_dim_v=d) for shape in found for d in head_dims]


def _takes(spec: Spec, name: str) -> bool:
    if spec.keys is None and name in LENGTHS:
        return True
    return name in spec.tensors or name in spec.params or (spec.keys is not None and name in spec.keys.captures())


def _architecture(target: str) -> str:
    gpu = find_gpu(target)
    return target if gpu is None else gpu.target


# -- what a pack knows ------------------------------------------------------------------------------------------------


def plain_spec(spec: Spec, inner: Mapping[str, PlainSpec] | None = None) -> PlainSpec:
    """A spec as plain data. inner: by role those that its calls are made of."""
    ranges = {
        (by_offset, sink): found
        for by_offset in (False, True)
        for sink in (False, True)
        if (found := spec.doubtful(by_offset, sink))
    }
    return PlainSpec(
        key=spec.key,
        text=spec.text,
        tensors={name: PlainTensor(name, x.ndim, x.kind) for name, x in spec.tensors.items()},
        params={name: PlainParam(name, x.number_kind) for name, x in spec.params.items()},
        scale=spec.scale,
        mask=program_of(spec.mask),
        mask_text=spec.mask_text,
        is_causal=spec.is_causal,
        sink=None if spec.sink is None else program_of(spec.sink),
        dropout_param=spec.dropout_param,
        seeded=spec.dropout is not None,
        keys=_plain_keys(spec.keys),
        lists=spec.lists,
        page_size=spec.page_size,
        plain_dims=spec.plain_dims,
        mask_reads=spec.mask_reads,
        sink_reads=spec.sink_reads,
        mask_params=spec.mask_params,
        ranges=ranges,
        known=facts(spec).call,
        inner=inner or {},
        name=spec.name,
    )


def with_inner(spec: Spec) -> PlainSpec:
    """A spec as plain data, with the specs that its calls so far were made of."""
    return plain_spec(spec, {role: plain_spec(own) for role, own in sorted(inner_specs(spec).items())})


def _forget_inner(spec: Spec) -> None:
    forget_inner(spec)
    for own in spec.keys.specs if isinstance(spec.keys, Union) else ():
        _forget_inner(own)


def _plain_keys(keys: KeySet | None) -> KeySet | None:
    """A key set whose own specs, if it has some, are plain data."""
    return Union.of(keys.pieces, tuple(map(with_inner, keys.specs))) if isinstance(keys, Union) else keys


@dataclass(frozen=True)
class _Attend:
    """One attention of a call, for one target."""

    call: Call
    facts: Facts
    schedule: Schedule
    target: Target
    by_offset: bool

    @property
    def spec(self) -> Spec:
        return self.call.spec

    @property
    def dims(self) -> tuple[int, int]:
        return int(self.call.q.shape[3]), int(self.call.v.shape[3])

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Of each captured tensor the type of the pointer to it."""
        found = {}
        for name, tensor in self.call.captures.items():
            if tensor.dtype not in POINTERS:
                raise PackError(f"{name}: expected one of {', '.join(map(str, POINTERS))}, got {tensor.dtype}")
            found[name] = POINTERS[tensor.dtype]
        return dict(sorted(found.items()))

    def sources(self, backward: bool) -> Iterator[tuple[str, tuple[CaptureSite, ...], Source]]:
        """Every kernel that its calls may launch: its name, which gradients of captured tensors it adds up, and its file."""
        launches = [Launch(name) for name in forward_launches(self.schedule)]
        if backward and self.spec.page_size is None:
            launches += every_backward_launch(self.facts, self.spec.lists, self.call.q.dtype, self.schedule)
        for launch in launches:
            name, found = launch.kernel, launch.sites
            if (
                not found
                and name in ("forward", "dq", "dkv")
                and self.spec.lists is None
                and self.facts.walk_of(name).needs_tables
            ):
                tile = self.schedule.tile(name)
                block = tile.block_n if name == "dkv" else tile.block_m
                yield f"{name}{TABLES}", (), render_tables(self.spec, self.facts, name, block, self.by_offset)
            yield name, found, self._render(name, found)
            if name in KERNELS and may_need_guard(self.spec):
                yield name + GUARDED, found, self._render(name + GUARDED, found)

    def _render(self, kernel: str, found: tuple[CaptureSite, ...] = ()) -> Source:
        head_dim, head_dim_v = self.dims
        aligned = all(dim % 16 == 0 for dim in self.dims)  # else not even contiguous rows are; see `is_aligned`
        return render(
            self.spec,
            self.facts,
            kernel,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=self.call.q.dtype,
            schedule=self.schedule,
            aligned=aligned,
            offset_tensor=self.by_offset,
            sites=tuple(site_of(self.facts.load_grads, site) for site in found),
        )


@dataclass
class _Builder:
    """Collects kernels, and what leads to them."""

    pins: Schedule
    db: str | None
    offset_tensors: bool
    find: Finder
    backward: bool = False  # whether some call has one
    kernels: dict[str, Kernel] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    specs: dict[str, Spec] = field(default_factory=dict)
    plain: dict[str, PlainSpec] = field(default_factory=dict)
    schedules: list[dict[str, Any]] = field(default_factory=list)
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    launches: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, workload: Workload, targets: Iterable[str]) -> None:
        """The kernels of such calls."""
        spec, shape = workload.spec, workload.shape
        if workload.name not in self.specs:  # a pack has what its own calls need, whatever else this process has called
            _forget_inner(spec)
        if self.specs.setdefault(workload.name, spec).key != spec.key:
            raise PackError(f"specs: expected a name for each, got two specs called {workload.name!r}")
        dtype = getattr(torch, workload.dtype or "bfloat16")
        (q, k, v), named, _ = example(spec, shape, dtype, workload.captures)
        backward = "backward" in workload.directions and spec.page_size is None and not isinstance(spec.keys, Paged)
        self.backward |= backward
        offset = named.pop("q_offset")
        offsets = [offset, torch.full((shape.batch,), offset)] if self.offset_tensors else [offset]
        attention = compile_spec(spec, schedule=self.pins, db=self.db)
        for q_offset in offsets:
            attends = attention.attends(q.requires_grad_(backward), k, v, q_offset=q_offset, patient=False, **named)
            for target in targets:
                for _, call in attends:
                    self._attend(call, target, isinstance(call.q_offset, torch.Tensor), backward)
                if backward:
                    self._delta(q, v, target)
        self.plain[workload.name] = with_inner(spec)

    @property
    def manifest(self) -> dict[str, Any]:
        """All but the kernels' records."""
        found = {}
        for name, spec in sorted(self.specs.items()):
            found[name] = {"text": spec.text, "plain": put_spec(self.plain[name])}
        return {
            "specs": found,
            "plain": put_spec(replace(PLAIN, known=facts(Spec()).call)),
            "backward": self.backward,
            "schedules": self.schedules,
            "choices": [choice for _, choice in sorted(self.choices.items())],
            "launches": [launch for _, launch in sorted(self.launches.items())],
        }

    def _attend(self, call: Call, target: str, by_offset: bool, backward: bool) -> None:
        known, gpu, architecture = facts(call.spec), find_gpu(target), _architecture(target)
        if gpu is None:
            schedule = on_gpu(call, known, Target.named(target), PROCESSORS, self.pins)
            origin = f"modelled for {target}"
        else:
            schedule, origin = choose_elsewhere(call, known, target, self.pins, self.db, self.find)
        attend = _Attend(call, known, schedule, Target.named(architecture), by_offset)
        self._choose(call.spec.key, attend.target, call.q.dtype, attend.dims, schedule, shape_bucket(call), origin)
        for kernel, sites, source in attend.sources(backward):
            self._compiled(call.spec.key, kernel, attend, source, sites)

    def _delta(self, q: torch.Tensor, v: torch.Tensor, target: str) -> None:
        """The kernels that every spec shares."""
        spec, head_dim, architecture = Spec(), int(v.shape[3]), _architecture(target)
        schedule = complete_for(spec, architecture, head_dim, head_dim, q.dtype, Schedule())
        out = q.new_empty((*q.shape[:3], head_dim))
        attend = _Attend(Call(spec, out, out, out, {}, {}, 0), facts(spec), schedule, Target.named(architecture), False)
        self._choose(PLAIN.key, attend.target, q.dtype, attend.dims, schedule, shape_bucket(attend.call), "of delta")
        for kernel in ("delta", "delta_of_out"):
            self._compiled(PLAIN.key, kernel, attend, attend._render(kernel), ())

    def _choose(
        self,
        key: str,
        target: Target,
        dtype: torch.dtype,
        dims: tuple[int, int],
        schedule: Schedule,
        bucket: tuple[int, ...],
        origin: str,
    ) -> None:
        choice = {
            "spec": key,
            "target": target.name,
            "dtype": dtype_name(dtype),
            "dims": [*dims],
            "bucket": [*bucket],
            "schedule": self._schedule(schedule),
            "origin": origin,
        }
        self.choices[json.dumps([key, target.name, dtype_name(dtype), dims, bucket])] = choice

    def _schedule(self, schedule: Schedule) -> int:
        decided = schedule.decided()
        if decided not in self.schedules:
            self.schedules.append(decided)
        return self.schedules.index(decided)

    def _compiled(self, key: str, kernel: str, attend: _Attend, source: Source, sites: tuple[CaptureSite, ...]) -> None:
        where = [key, kernel, attend.target.name, dtype_name(attend.call.q.dtype), [*attend.dims]]
        rest = [self._schedule(attend.schedule), attend.by_offset, attend.kinds, _identity(sites)]
        identity = json.dumps([*where, *rest])
        if identity in self.launches:
            return
        names = ("spec", "kernel", "target", "dtype", "dims", "schedule", "offset", "kinds", "sites")
        name = self._record(attend, source)
        self.launches[identity] = dict(zip((*names, "name"), (*where, *rest, name), strict=True))

    def _record(self, attend: _Attend, source: Source) -> str:
        """Compile a file for a target, unless it is there. Returns the kernel's name in the pack."""
        dtype, target = attend.call.q.dtype, attend.target
        kinds = {arg.name: _kind(arg, dtype, attend.kinds) for arg in source.args}
        ones = [arg.name for arg in source.args if arg.unit]
        divisible = [arg.name for arg in source.args if _is_divisible(arg)]
        text = json.dumps([source.text, kinds, ones, divisible, target.name])
        name = f"{source.name}-{target.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if name in self.kernels:
            return name
        import triton

        with triton.knobs.compilation.scope():
            triton.knobs.compilation.disable_line_info = True  # which would have paths of this machine in it
            code = compile_function(
                source.name, source.load(), kinds, divisible, source.num_warps, source.num_stages, target, ones
            )
        found, said = read_cubin(code.binary, name), code.metadata
        self.kernels[name] = Kernel(
            symbol=said["name"],
            file=f"{format.KERNELS}/{name}.cubin",
            sha256=hashlib.sha256(code.binary).hexdigest(),
            size=len(code.binary),
            target=target.name,
            arguments=tuple(
                Argument(arg.name, kinds[arg.name], arg.role, arg.of, arg.dim, arg.name in divisible)
                for arg in source.args
                if arg.name not in ones
            ),
            grid=asdict(source.grid),
            num_warps=said["num_warps"],
            num_stages=source.num_stages,
            shared=code.shared,
            toolkit=found.kernels[said["name"]].toolkit,
            abi=found.abi,
            num_ctas=said["num_ctas"],
            scratch=said["global_scratch_size"],
            scratch_alignment=max(said["global_scratch_align"], 1),
            profile_scratch=said["profile_scratch_size"],
            profile_scratch_alignment=max(said["profile_scratch_align"], 1),
        )
        self.files[self.kernels[name].file] = code.binary
        return name


def _kind(arg: Arg, dtype: torch.dtype, captured: Mapping[str, str]) -> str:
    if arg.type == "*capture":
        return captured[arg.of.removeprefix(CAPTURED)]
    return arg.triton_type(dtype, {})


def _is_divisible(arg: Arg) -> bool:
    """What is always so: strides of captured tensors may be anything."""
    return arg.divisible and (arg.type.startswith("*") or not arg.of.startswith(CAPTURED))


def _identity(sites: tuple[CaptureSite, ...]) -> Any:
    return [[site.tensor, site.number, site.deterministic, site.by_batch, site.by_head] for site in sites]
