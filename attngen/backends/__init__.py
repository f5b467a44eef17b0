"""Where a plan runs. A backend is a module with

forward(call, facts, schedule) -> (out, lse)
backward(call, facts, schedule, out, lse, grad_out, grad_lse, wanted) -> (dq, dk, dv, {capture name: gradient})
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from attngen.errors import InputError

_MODULES = {
    "triton": "attngen.backends.triton.launch",
    "interpret": "attngen.backends.interpret",
    "cpu": "attngen.backends.cpu.passes",
}


def pick(backend: str, device: torch.device) -> str:
    """The backend for tensors on `device`. InputError if the asked one can't run there."""
    kind = device.type
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


def module(name: str) -> ModuleType:
    """The backend's module, imported when first used."""
    return importlib.import_module(_MODULES[name])
