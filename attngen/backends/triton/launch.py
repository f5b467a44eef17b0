"""Generated kernels on a GPU: rendered when a call first needs one, compiled and launched by Triton."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import copy_context
from functools import lru_cache
from typing import Any

import torch

from attngen import debug
from attngen.analysis import Facts
from attngen.analysis import facts as analyse
from attngen.analysis.capture_sites import CaptureSite
from attngen.analysis.sites import Site, site_of
from attngen.backends.launcher import TABLES, Launcher, is_aligned
from attngen.backends.work import table_tiles
from attngen.errors import ScheduleError
from attngen.language.call import Call
from attngen.language.spec import Spec
from attngen.lowering import Source, render
from attngen.lowering.render import GUARDED, may_need_guard
from attngen.lowering.signature import takes
from attngen.lowering.tables import render_tables
from attngen.schedule import KERNELS, Schedule, Target
from attngen.schedule.choice import complete_for

_PLAIN = Spec()


class Rendered:
    """Sources that are generated, see `attngen.backends.launcher.Sources`."""

    def find(
        self,
        kernel: str,
        call: Call,
        facts: Facts,
        schedule: Schedule,
        tensors: Mapping[str, Any],
        sites: tuple[CaptureSite, ...] = (),
    ) -> Source:
        """The kernel's file."""
        by_offset = isinstance(call.q_offset, torch.Tensor)
        if kernel.endswith(TABLES):
            return _tables_source(call.spec, facts, kernel.removesuffix(TABLES), schedule, by_offset)
        aligned = all(is_aligned(tensors[name]) for name in takes(kernel.removesuffix(GUARDED)).tensors)
        dims = call.q.shape[3], call.v.shape[3]
        own = tuple(site_of(facts.load_grads, site) for site in sites)
        spec = call.spec if isinstance(call.spec, Spec) else _PLAIN
        return _source(spec, facts, kernel, *dims, call.q.dtype, schedule, aligned, by_offset, own)

    def guarded(
        self,
        kernel: str,
        call: Call,
        facts: Facts,
        schedule: Schedule,
        tensors: Mapping[str, Any],
        sites: tuple[CaptureSite, ...] = (),
    ) -> Source | None:
        """What redoes tiles of the forward, dq and dkv that are no numbers."""
        if kernel not in KERNELS or not may_need_guard(call.spec):
            return None
        return self.find(kernel + GUARDED, call, facts, schedule, tensors, sites)

    def plain(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> tuple[Schedule, Facts]:
        """The schedule and facts of delta."""
        return _plain(device, head_dim, dtype)

    def options(self, source: Source) -> dict[str, Any]:
        """Triton's options."""
        return {"num_warps": source.num_warps, "num_stages": source.num_stages, "enable_fp_fusion": True}

    def start(self, source: Source, programs: int, arguments: list[Any], options: dict[str, Any]) -> None:
        """One launch. ScheduleError if it needs more than a program can have."""
        try:
            with torch.cuda.device_of(arguments[0]):  # Triton takes the current device, whichever the pointers are of
                _start(source, programs, arguments, options)
        except Exception as error:
            if type(error).__name__ == "OutOfResources":
                raise ScheduleError(f"{source.name}: {error}; choose smaller blocks or fewer stages") from error
            raise


@lru_cache(maxsize=256)
def _plain(device: torch.device, head_dim: int, dtype: torch.dtype) -> tuple[Schedule, Facts]:
    return complete_for(_PLAIN, target_of(device), head_dim, head_dim, dtype, Schedule()), analyse(_PLAIN)


def target_of(device: torch.device) -> str:
    """The name of a device's target; on a CPU it is the interpreter's."""
    return Target.of_device(device).name if device.type == "cuda" else "interpreter"


def _start(source: Source, programs: int, arguments: list[Any], options: dict[str, Any]) -> None:
    """One launch, on the current device."""
    kernel = source.load()[(programs,)]
    if source.makes_descriptors:
        # They live in memory that an allocator gives, which Triton keeps per context: a backward has its thread's.
        copy_context().run(_allocating, kernel, arguments, options)
    else:
        kernel(*arguments, **options)


def _allocating(kernel: Any, arguments: list[Any], options: dict[str, Any]) -> None:
    import triton

    triton.set_allocator(_allocate)
    kernel(*arguments, **options)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


@lru_cache(maxsize=1024)
def _tables_source(spec: Spec, facts: Facts, kernel: str, schedule: Schedule, offset_tensor: bool) -> Source:
    tile = schedule.tile(kernel)
    with debug.timed(f"rendering the tables of {kernel}"):
        source = render_tables(spec, facts, kernel, tile.block_n if kernel == "dkv" else tile.block_m, offset_tensor)
    debug.say(4, "source", source.text)
    return source


@lru_cache(maxsize=1024)
def _source(
    spec: Spec,
    facts: Facts,
    kernel: str,
    head_dim: int,
    head_dim_v: int,
    dtype: torch.dtype,
    schedule: Schedule,
    aligned: bool,
    offset_tensor: bool,
    sites: tuple[Site, ...],
) -> Source:
    with debug.timed(f"rendering {kernel}"):
        source = render(
            spec,
            facts,
            kernel,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=dtype,
            schedule=schedule,
            aligned=aligned,
            offset_tensor=offset_tensor,
            sites=sites,
        )
    debug.say(4, "source", source.text)
    return source


_launcher = Launcher(Rendered())
forward, forward_keeping, backward = _launcher.forward, _launcher.forward_keeping, _launcher.backward
delta, tables = _launcher.delta, _launcher.tables

__all__ = ["backward", "delta", "forward", "forward_keeping", "table_tiles", "tables"]
