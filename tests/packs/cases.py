"""Kernels for tests of packs: compiled for sm_90 here, with the records that a pack has of them."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import cache

import torch
from triton import knobs

import attngen as ag
from attngen.inspect.cross import Compiled
from attngen.packs.elf import read_cubin
from attngen.packs.record import Argument, Kernel


@cache
def causal_kernels(target: str = "sm_90") -> dict[str, Compiled]:
    """forward, delta, dq and dkv of a causal mask at head dim 128, bfloat16, without line info as packs have them."""
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        return {kernel.name: kernel for kernel in ag.cross_compile(ag.Spec(mask=ag.causal()), target, head_dim=128)}


def record_of(compiled: Compiled) -> Kernel:
    """What a pack says of a kernel."""
    source, cubin = compiled.source, compiled.cubin
    assert cubin is not None
    found = read_cubin(cubin, compiled.name)
    digest = hashlib.sha256(cubin).hexdigest()
    arguments = tuple(
        Argument(arg.name, arg.triton_type(torch.bfloat16, {}), arg.role, arg.of, arg.dim, arg.divisible)
        for arg in source.args
    )
    return Kernel(
        symbol=compiled.name,
        file=f"kernels/{compiled.name}-{digest[:16]}.cubin",
        sha256=digest,
        size=len(cubin),
        target=compiled.target,
        arguments=arguments,
        grid=asdict(source.grid),
        num_warps=source.num_warps,
        num_stages=source.num_stages,
        shared=compiled.shared,
        toolkit=found.kernels[compiled.name].toolkit,
        abi=found.abi,
    )


@cache
def causal_pack() -> tuple[dict[str, Kernel], dict[str, bytes]]:
    """The records by name, and the cubins by file."""
    compiled = causal_kernels()
    records = {name: record_of(kernel) for name, kernel in compiled.items()}
    return records, {record.file: compiled[name].cubin or b"" for name, record in records.items()}
