"""Call the attentions of a pack where nothing of a compiler can be imported: `python by_pack.py PACK CALLS`.

CALLS: a JSON file that is written: [kernel's file in the pack, programs, stream, values] of every launch, in order. Tensors are the CPU's,
and pass for a GPU's: the driver of these tests looks at no memory. Prints, of each attention, what was launched.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

COMPILER = ("triton", "sympy", "jinja2", "optuna", "networkx", "sqlalchemy")
for name in COMPILER:
    sys.modules[name] = None  # type: ignore[assignment]

import torch  # noqa: E402

import attngen as ag  # noqa: E402
from attngen.packs import driver  # noqa: E402

STREAM = 0x5EED0
SCRATCH = 0x7F00_0000_0000  # as in by_triton.py
BATCH, HEADS, HEADS_KV, N, DIM = 2, 8, 2, 512, 128

launches: list[Any] = []
kernels: list[str] = []
launch, load = driver.Launch.__call__, driver.Launch.__init__


def recorded(self: driver.Launch, programs: int, stream: int, values: Any) -> None:
    kernel = self.function.kernel
    launches.append([kernel.file, programs, stream, list(values)])
    collects = any(argument.of.startswith("gradient ") for argument in kernel.arguments)
    kernels.append(Path(kernel.file).name.partition("-")[0] + " + gradient" * collects)
    launch(self, programs, stream, values)


def loaded(self: driver.Launch, function: Any, device: int) -> None:
    load(self, function, device, lambda size: SimpleNamespace(data_ptr=lambda: SCRATCH))


def captures(name: str) -> dict[str, Any]:
    made = {
        "window": {"width": 100},
        "documents": {"doc": torch.arange(N).div(200, rounding_mode="floor").int().repeat(BATCH, 1)},
        "cap and slopes": {"slope": torch.rand(HEADS, requires_grad=True)},
        "block-sparse": {"layout": torch.eye(N // 128, dtype=torch.bool)[None, None]},
    }
    return made.get(name, {})


def main(pack: str, calls: str) -> None:
    driver.Launch.__call__, driver.Launch.__init__ = recorded, loaded  # type: ignore[method-assign, assignment]
    driver.launches_on, driver.index_of = (lambda device: True), (lambda device: 0)
    driver.current_stream = lambda device: STREAM
    for name, attention in ag.load(pack).items():
        first = len(launches)
        q, k, v = (
            torch.randn(BATCH, heads, N, DIM, dtype=torch.bfloat16, requires_grad=attention.contents.backward)
            for heads in (HEADS, HEADS_KV, HEADS_KV)
        )
        named = captures(name)
        out = attention(q, k, v, **named)
        if attention.contents.backward:
            out.sum().backward()  # of a tensor's own gradient torch would import sympy
            out, lse = attention(q, k, v, return_lse=True, **named)
            (out.sum() + lse.sum()).backward()
            assert all(x.grad is not None for x in (q, k, v, *named.values()) if getattr(x, "requires_grad", False))
        print(json.dumps([name, kernels[first:]]))
    Path(calls).write_text(json.dumps(launches))
    assert not [own for own in sys.modules if own.partition(".")[0] in COMPILER and sys.modules[own] is not None]


if __name__ == "__main__":
    main(*sys.argv[1:])
