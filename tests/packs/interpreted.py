"""Packs without a GPU and without machine code: a built pack's kernels are run by Triton's interpreter, from the very files that would
have been compiled. All else is as it is: the folder is written, read and checked, and calls go the way that they go on a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import attngen as ag
from attngen.backends.interpret import interpreting
from attngen.backends.triton.launch import _start
from attngen.language.call import Call
from attngen.lowering import Source
from attngen.packs import build, driver, kernels
from attngen.packs.record import Argument, Kernel

SMALL = ag.Schedule(block_m=32, block_n=32, num_warps=4, num_stages=1)


class Interpreted:
    """What is known of the kernels of the packs that were built within `interpreted_packs`."""

    def __init__(self) -> None:
        self.sources: dict[
            str, tuple[Source, set[str]]
        ] = {}  # by a kernel's file in its pack: and arguments that are 1
        self.started: list[str] = []

    def record(self, builder: Any, attend: Any, source: Source) -> str:
        """In the place of `_Builder._record`, which compiles."""
        dtype, target = attend.call.q.dtype, attend.target
        kinds = {arg.name: build._kind(arg, dtype, attend.kinds) for arg in source.args}
        ones = {arg.name for arg in source.args if arg.unit}
        name = f"{source.name}-{hashlib.sha256(repr((source.text, kinds)).encode()).hexdigest()[:12]}"
        arguments = [
            Argument(arg.name, kinds[arg.name], arg.role, arg.of, arg.dim, build._is_divisible(arg))
            for arg in source.args
            if arg.name not in ones
        ]
        content = name.encode()
        kernel = Kernel(
            symbol=source.name,
            file=f"kernels/{name}.cubin",
            sha256=hashlib.sha256(content).hexdigest(),
            size=len(content),
            target=target.name,
            arguments=tuple(arguments),
            grid=asdict(source.grid),
            num_warps=source.num_warps,
            num_stages=source.num_stages,
            shared=0,
            toolkit="13.0",
            abi=8,
        )
        builder.kernels[name], builder.files[kernel.file] = kernel, content
        self.sources[kernel.file] = source, ones
        return name

    def start(
        self, packed: Any, found: kernels.PackedKernel, programs: int, arguments: list[Any], options: Any
    ) -> None:
        """In the place of `Packed.start`, which launches."""
        source, ones = self.sources[found.launch.function.kernel.file]
        given = dict(zip((arg.name for arg in found.args), arguments, strict=True))
        whole = [1 if arg.name in ones else given[arg.name] for arg in source.args]
        self.started.append(source.name)
        options = {"num_warps": source.num_warps, "num_stages": source.num_stages, "enable_fp_fusion": True}
        with interpreting():
            _start(source, programs, whole, options)


class _Function:
    """A kernel that no driver has."""

    def __init__(self, kernel: Kernel, cubin: bytes, where: str):
        self.kernel = kernel


class _Launch:
    def __init__(self, function: _Function, device: int):
        self.function = function


@contextmanager
def interpreted_packs() -> Iterator[Interpreted]:
    """Within it, packs are built without a compiler, and CPU tensors are a GPU's."""
    found = Interpreted()
    with ExitStack() as stack:

        def put(where: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(where, name, value))

        put(build._Builder, "_record", lambda builder, attend, source: found.record(builder, attend, source))
        put(Kernel, "check", lambda kernel, cubin, where: None)
        put(driver, "launches_on", lambda device: True)
        put(driver, "index_of", lambda device: 0)
        put(driver, "capability", lambda device: (9, 0))
        put(driver, "Function", _Function)
        put(driver, "Launch", _Launch)
        put(kernels.Packed, "start", lambda packed, *given: found.start(packed, *given))
        put(Call, "waits", False)  # as on a GPU: nobody looks at values to decide sizes
        yield found


def pack_of(folder: Path, spec: ag.Spec, shapes: Sequence[str] = ("B1 Hq2 Hkv1 N64 D16 Dv32",), **more: Any) -> Any:
    """The attention of a pack that was written there and read again."""
    more = {"targets": ["sm_90"], "shapes": shapes, "dtypes": [torch.float32], "schedule": SMALL} | more
    ag.save({"it": spec}, folder, **more)
    return ag.load(folder)["it"]
