"""The generated Triton source, run by Triton's interpreter on numpy: how kernels are tested without a GPU.

Slow, and silently wrong for bfloat16 (its arithmetic works on bit patterns), so that dtype is refused.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from attngen.backends.triton import launch as gpu
from attngen.errors import InputError
from attngen.language.call import Call
from attngen.schedule import Schedule, Target

TARGET = Target("interpreter", "cuda", 80, 32, shared_limit=2**31)

_interpreted: dict[int, Any] = {}


def forward(call: Call, facts: Any, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, see `attngen.backends`."""
    _check(call)
    with interpreting():
        return gpu.forward(call, facts, schedule)


def forward_keeping(
    call: Call, facts: Any, schedule: Schedule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """out, lse, and what the backward makes use of, see `attngen.backends`."""
    _check(call)
    with interpreting():
        return gpu.forward_keeping(call, facts, schedule)


def delta(out: torch.Tensor, do: torch.Tensor, dlse: torch.Tensor | None = None) -> torch.Tensor:
    """rowsum(dO * O) - dlse, see `attngen.backends`."""
    with interpreting():
        return gpu.delta(out, do, dlse)


def backward(
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
    _check(call)
    with interpreting():
        return gpu.backward(call, facts, schedule, lse, delta, do, wanted, kept)


def tables(call: Call, facts: Any, schedule: Schedule, kernel: str) -> dict[str, torch.Tensor]:
    """Summaries of captured data for a kernel's walk, see `attngen.backends`."""
    with interpreting():
        return gpu.tables(call, facts, schedule, kernel)


table_tiles = gpu.table_tiles


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Within it, kernels that are loaded are interpreted ones, and so are Triton's own library functions, which were made
    for the compiler when triton was imported. The interpreter also patches triton.language and leaves some of that behind;
    afterwards everything is as before, so that one process can interpret and compile.
    """
    import triton
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    before = {holder: dict(vars(holder)) for holder in _holders()}
    variable, knob = os.environ.get("TRITON_INTERPRET"), triton.knobs.runtime.interpret
    os.environ["TRITON_INTERPRET"] = "1"
    triton.knobs.runtime.interpret = True
    for holder, names in before.items():
        for name, value in names.items():
            if isinstance(value, JITFunction):
                # by id: hashing a JITFunction would read its source; these live as long as their modules
                if id(value) not in _interpreted:
                    _interpreted[id(value)] = InterpretedFunction(value.fn)
                setattr(holder, name, _interpreted[id(value)])
    try:
        yield
    finally:
        for holder, names in before.items():
            for name, value in dict(vars(holder)).items():
                if name not in names:
                    if isinstance(holder, type) and callable(value):  # anything else was imported meanwhile
                        delattr(holder, name)
                elif names[name] is not value:
                    setattr(holder, name, names[name])
        triton.knobs.runtime.interpret = knob
        if variable is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = variable


def _holders() -> list[Any]:
    """The modules of triton.language and the classes in its core: where the interpreter sets attributes."""
    import triton.language as tl

    modules = [m for name, m in sys.modules.items() if name.startswith("triton.language") and m is not None]
    return [
        *modules,
        *{
            value
            for value in vars(tl.core).values()
            if isinstance(value, type) and value.__module__ == tl.core.__name__
        },
    ]


def _check(call: Call) -> None:
    if call.q.dtype == torch.bfloat16:
        raise InputError(
            "q", "float32 or float16 for backend='interpret'", "torch.bfloat16, which Triton's interpreter gets wrong"
        )
