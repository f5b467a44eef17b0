"""Compile and launch kernels by Triton itself, without attngen: `python by_triton.py JOBS`, a file of JSON.

A job: file, symbol (a generated source), signature, divisible and ones (places of arguments), options, arch; programs, stream, values.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SCRATCH = 0x7F00_0000_0000  # where the memory lies that kernels are given as scratch


def compiled(job: dict[str, Any]) -> Any:
    """Triton's CompiledKernel."""
    spec = importlib.util.spec_from_file_location(f"job_{Path(job['file']).stem}", job["file"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    attributes = {(place,): [["tt.divisibility", 16]] for place in job["divisible"]}
    constants = {(place,): 1 for place in job.get("ones", ())}
    kinds = {
        name: "constexpr" if (place,) in constants else kind
        for place, (name, kind) in enumerate(job["signature"].items())
    }
    source = ASTSource(getattr(module, job["symbol"]), kinds, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", job["arch"], 32), options=job["options"])


def main() -> None:
    from triton.backends.nvidia.driver import CudaDriver

    active = CudaDriver()
    # Triton 3.6 would ask torch, which may be built for the CPU alone.
    active.get_current_device, active.get_device_capability = lambda: 0, lambda device: (9, 0)
    triton.runtime.driver.set_active(active)
    asked = []
    triton.set_allocator(lambda size, alignment, stream: asked.append((size, alignment)) or SCRATCH)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        compiled(job)[(job["programs"], 1, 1)](*job["values"], stream=job["stream"])
    print(json.dumps(asked))


if __name__ == "__main__":
    main()
