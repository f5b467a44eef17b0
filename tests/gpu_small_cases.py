"""Small cases with every kind of access, forward and backward: what compute-sanitizer is run over.

python -m tests.gpu_small_cases [cuda triton|cpu interpret [bfloat16|float16]]
"""

from __future__ import annotations

import sys
from typing import Any

import torch

import attngen as ag
from tests.backends.test_backends import HEADS, MASKS, SCORES, qkv
from tests.check import check

CASES = ("causal", "window", "prefix per batch", "causal documents", "tree", "key padding")


def on(device: str, captures: dict[str, Any]) -> dict[str, Any]:
    """The tensors among captures, moved."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in captures.items()}


def main(device: str = "cuda", backend: str = "triton", dtype_name: str = "") -> None:
    """Raises where a result is wrong; what the sanitizer finds, it reports."""
    dtype = getattr(torch, dtype_name or ("bfloat16" if backend == "triton" else "float16"))
    q, k, v = (t.to(device) for t in qkv(dtype))
    for name in CASES:
        mask, captures = MASKS[name]
        spec = mask if isinstance(mask, ag.Spec) else ag.Spec(mask=mask)
        check(spec, ag.compile(spec, backend=backend), q, k, v, on(device, captures))
    for name in ("several", "t5", "bias bhij"):
        score, captures = SCORES[name]
        spec = ag.Spec(mask=ag.causal(), score=score)
        check(spec, ag.compile(spec, backend=backend), q, k, v, on(device, captures))
    q, k, v = (t.to(device) for t in qkv(dtype, d=40, dv=24, n_q=33, n_k=50))
    spec = ag.Spec(mask=ag.causal(), sink=ag.sink(), dropout=0.2)
    check(
        spec,
        ag.compile(spec, backend=backend),
        q,
        k,
        v,
        dict(sink=torch.ones(HEADS, device=device), seed=3),
        q_offset=9,
    )
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
