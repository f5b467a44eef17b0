"""Where the kernels of a loaded pack come from, as a launcher asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attngen.analysis.capture_sites import CAPTURED, CaptureSite
from attngen.backends.launcher import Launcher, is_aligned
from attngen.errors import PackError
from attngen.language.call import Call
from attngen.language.schedule import Schedule
from attngen.packs import driver, format
from attngen.packs.contents import POINTERS, Contents, dtype_name
from attngen.packs.plain import Missing
from attngen.packs.record import Argument
from attngen.plan.grid import Grid

GUARDED = "_guarded"


class PackedKernel:
    """A kernel of a pack made ready for a device, as a launcher takes it: `args`, `grid`, `num_stages`."""

    def __init__(self, contents: Contents, name: str, device: torch.device):
        pack = contents.pack
        kernel = pack.kernels[name]
        self.name, self.args, self.num_stages = kernel.symbol, kernel.arguments, kernel.num_stages
        try:
            self.grid = Grid(**kernel.grid)
        except TypeError as error:
            raise PackError(f"{pack.folder / format.MANIFEST}: kernel {name}: grid: {error}") from None
        self.pointers = [place for place, arg in enumerate(self.args) if arg.kind.startswith("*")]
        self.index = driver.index_of(device)
        function = driver.Function(kernel, pack.cubin(name), str(pack.folder / kernel.file))
        self.launch = driver.Launch(function, self.index)

    def check(self, tensors: Mapping[str, Any]) -> None:
        """Missing unless the tensors are laid out as the kernel takes for granted."""
        for arg in self.args:
            if arg.of not in tensors:  # a number, or what the launch itself makes
                continue
            if arg.role in ("tensor", "table") and arg.divisible and tensors[arg.of].data_ptr() % 16:
                raise Missing(
                    f"{_called(arg)} starts at an address that is no multiple of 16 bytes; pass {_called(arg)}.clone()"
                )
            if arg.role == "stride":
                self._check_stride(arg, tensors[arg.of])

    def _check_stride(self, arg: Argument, tensor: torch.Tensor) -> None:
        step = tensor.stride(arg.dim) if tensor.shape[arg.dim] != 1 else 0
        if arg.divisible and step % 16:
            raise Missing(
                f"{_called(arg)} has stride {step} along dimension {arg.dim}, no multiple of 16; pass {_called(arg)}.contiguous()"
            )
        if arg.kind == "i32" and not -(2**31) <= step < 2**31:
            raise Missing(f"{_called(arg)} has stride {step} along dimension {arg.dim}, which does not fit 32 bits")


def _called(arg: Argument) -> str:
    return arg.of.removeprefix(CAPTURED)


class Packed:
    """Sources out of a pack, see `attngen.backends.launcher.Sources`."""

    def __init__(self, contents: Contents):
        self.contents = contents
        self._ready: dict[Any, PackedKernel] = {}

    def find(
        self,
        kernel: str,
        call: Call,
        facts: Any,
        schedule: Schedule,
        tensors: Mapping[str, Any],
        sites: tuple[CaptureSite, ...] = (),
    ) -> PackedKernel:
        """The kernel, loaded on the call's device. Missing."""
        dims, dtype = (int(call.q.shape[3]), int(call.v.shape[3])), dtype_name(call.q.dtype)
        where = call.spec.key, kernel, self.contents.target_of(call.q.device), dtype, dims
        by_offset = isinstance(call.q_offset, torch.Tensor)
        own = tuple((site.tensor, site.number, site.deterministic, site.by_batch, site.by_head) for site in sites)
        found = self.contents.kernels.get((*where, schedule, by_offset, own))
        if found is None:
            offsets = "tensors" if by_offset else "ints"
            raise Missing(f"no kernel {kernel} of {dtype}, head dims {dims}, {where[2]}, for q_offset of {offsets}")
        kinds = tuple(sorted((name, POINTERS.get(x.dtype, str(x.dtype))) for name, x in call.captures.items()))
        name = found.get(kinds)
        if name is None:
            wanted, given = next(iter(found)), dict(kinds)
            wrong = next((own for own, kind in wanted if given.get(own) != kind), "?")
            raise Missing(f"{wrong} is {given.get(wrong)}, and the kernels take {dict(wanted).get(wrong)}")
        ready = self._ready.get((name, call.q.device))
        if ready is None:
            ready = self._ready[name, call.q.device] = PackedKernel(self.contents, name, call.q.device)
        ready.check(tensors)
        for own_name, x in call.captures.items():
            if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
                raise Missing(
                    f"{own_name} has stride {x.stride(-1)} along its last dimension; pass {own_name}.contiguous()"
                )
        return ready

    def guarded(
        self,
        kernel: str,
        call: Call,
        facts: Any,
        schedule: Schedule,
        tensors: Mapping[str, Any],
        sites: tuple[CaptureSite, ...] = (),
    ) -> PackedKernel | None:
        """What looks after the results of a kernel, if the pack has such a one."""
        names = {key[1] for key in self.contents.kernels if key[0] == call.spec.key}
        return self.find(kernel + GUARDED, call, facts, schedule, tensors, sites) if kernel + GUARDED in names else None

    def plain(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> tuple[Schedule, Any]:
        """How delta is computed."""
        plain, short = self.contents.plain, dtype_name(dtype)
        found = self.contents.choices.get((plain.key, self.contents.target_of(device), short, (head_dim, head_dim)))
        if not found:
            raise Missing(f"no kernel of a backward for {short}, head dim {head_dim} of v")
        return found[0].schedule, plain.known

    def options(self, source: PackedKernel) -> int:
        """The device, which gives the stream."""
        return source.index

    def start(self, source: PackedKernel, programs: int, arguments: list[Any], options: int) -> None:
        """One launch on torch's current stream."""
        values = arguments.copy()
        for place in source.pointers:
            values[place] = values[place].data_ptr()
        source.launch(programs, driver.current_stream(options), values)


class PackedLauncher(Launcher):
    """Gradients that come in any layout are made what the kernels take."""

    def delta(self, out: torch.Tensor, do: torch.Tensor, dlse: torch.Tensor | None = None) -> torch.Tensor:
        """rowsum(dO * O) - dlse, see `attngen.backends`."""
        return super().delta(_laid_out(out), _laid_out(do), dlse)

    def backward(
        self,
        call: Call,
        facts: Any,
        schedule: Schedule,
        lse: torch.Tensor,
        delta: torch.Tensor,
        do: torch.Tensor,
        wanted: list[str],
        kept: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Gradients, see `attngen.backends`."""
        return super().backward(call, facts, schedule, lse, delta, _laid_out(do), wanted, kept)


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """With rows of whole vectors, where its head dim is one."""
    any_strides = x.shape[-1] % 16 != 0 and x.data_ptr() % 16 == 0
    return x if any_strides or is_aligned(x) else x.clone(memory_format=torch.contiguous_format)
