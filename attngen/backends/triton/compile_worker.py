"""Compiling by Triton, and the process that compiles candidates: JSON requests in, JSON answers out.

Run as a file, it imports nothing of attngen and no torch, so that it starts at once; a compiler that hangs is killed with it.
{}                          -> {"status"}: it is ready
{"path", "name", ...}       -> {"status", "shared", "binary"}: `compiled` of the function of that name in a file, in base64
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import sys
from collections.abc import Collection, Mapping
from typing import Any


def compiled(
    function: Any,
    signature: Mapping[str, str],
    divisible: Collection[str],
    num_warps: int,
    num_stages: int,
    target: tuple[str, int | str, int],
    ones: Collection[str] = (),
) -> Any:
    """A triton.jit function compiled. signature: Triton's types of its arguments, in their order; divisible: those that are
    multiples of 16; target: Triton's backend, architecture and warp size; ones: arguments that are 1, which the machine code does not
    take.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attrs = {(place,): [["tt.divisibility", 16]] for place, arg in enumerate(signature) if arg in divisible}
    constants = {(place,): 1 for place, arg in enumerate(signature) if arg in ones}
    kinds = {name: "constexpr" if name in ones else kind for name, kind in signature.items()}
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    source = ASTSource(function, kinds, constants, attrs)
    return triton.compile(source, target=GPUTarget(*target), options=options)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """To one request."""
    if not request:
        import triton.compiler  # noqa: F401  what takes long before the first candidate

        return {}
    path, name, target = request.pop("path"), request.pop("name"), request.pop("target")
    described = importlib.util.spec_from_file_location("attngen_candidate", path)
    assert described is not None and described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[described.name] = module  # triton looks its functions up by module
    described.loader.exec_module(module)
    kernel = compiled(getattr(module, name), target=tuple(target), **request)
    binary = kernel.asm.get("cubin") or kernel.asm["hsaco"]
    return {"shared": int(kernel.metadata.shared), "binary": base64.b64encode(binary).decode("ascii")}


def main() -> None:
    """Until the input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what compilers print must not be taken for answers
    for line in sys.stdin:
        try:
            result = {"status": "ok"} | answer(json.loads(line))
        except Exception as problem:  # a compiler may fail in any way it likes
            result = {"status": "failed", "reason": f"{type(problem).__name__}: {problem}"[:500]}
        print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
