"""Where attention runs. A backend is a module with

forward(call, facts, schedule) -> (out, lse)
forward_keeping(call, facts, schedule) -> (out, lse, a tensor that `backward` makes use of, or None)
delta(out, do, dlse) -> rowsum(dO * O) - dlse of the whole attention; dlse may be None, for 0
backward(call, facts, schedule, lse, delta, do, wanted, kept=None) -> (dq, dk, dv, {capture name: gradient}), from the lse and delta of
    the whole attention that the call is a part of; kept: what the forward left, without which it is found again
tables(call, facts, schedule, kernel), table_tiles(call, schedule, kernel): summaries of captured data for a kernel's walk
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch

from attngen.errors import InputError

_MODULES = {
    "triton": "attngen.backends.triton.launch",
    "interpret": "attngen.backends.interpret",
    "cpu": "attngen.backends.cpu.passes",
    "meta": "attngen.backends.meta",
}


def pick(backend: str, device: torch.device) -> str:
    """The backend for tensors on `device`. InputError if the asked one can't run there."""
    kind = device.type
    if kind == "meta":
        return "meta"
    if backend == "auto":
        backend = {"cuda": "triton", "cpu": "cpu"}.get(kind, "")
        if not backend:
            raise InputError("q", "a tensor on a GPU or a CPU", f"device {device}", "move the inputs to cuda or cpu")
    if backend == "triton" and kind != "cuda":
        raise InputError(
            "q",
            "a CUDA or ROCm tensor for backend='triton'",
            f"device {device}",
            "use backend='auto', 'cpu' or 'interpret'",
        )
    if backend == "cpu" and kind != "cpu":
        raise InputError("q", "a CPU tensor for backend='cpu'", f"device {device}", "use backend='auto'")
    return backend


@cache
def module(name: str) -> ModuleType:
    """The backend's module, imported when first used."""
    return importlib.import_module(_MODULES[name])
