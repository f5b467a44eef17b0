"""The cost of a call and the least time a GPU could take for it.

Modelled: matrix work on the visited tiles (pairs rounded out to tiles), one exponential per visited pair and pass, and
each tensor moved once per pass; the time is the largest of the three (they overlap in a perfect kernel). Not modelled:
mask and score arithmetic, gathers, launch overheads, idle SMs at small grids, caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from attngen.analysis.listed import listed_pairs
from attngen.analysis.summaries import Axis
from attngen.analysis.tiles import check_positive, run
from attngen.analysis.walk import Walk, WalkProgram
from attngen.errors import InputError
from attngen.language.spec import Spec


class Walked(Protocol):
    """What the cost reads of a spec's `Facts`: how a tile of queries walks the keys."""

    @property
    def spec(self) -> Spec: ...

    @property
    def walk_keys(self) -> Walk: ...

    @property
    def program_keys(self) -> WalkProgram: ...


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU, per second, and where they come from."""

    name: str
    target: str  # what `cross_compile` calls it
    matrix_half: float  # bf16 or fp16 FLOPs with float32 accumulation
    matrix_float: float  # float32 FLOPs, TF32 off
    bandwidth: float  # bytes
    exp: float  # exp2 operations
    source: str


def _derived(units: int, gigahertz: float) -> str:
    return f"exp2 derived: {units} x 16 per clock at {gigahertz} GHz"


_TABLE = (
    # name, target, bf16, float32, bytes, exp2, source
    Gpu("H200", "sm_90", 790e12, 67e12, 4.3e12, 3.7e12, "bf16 and copy rates measured; " + _derived(132, 1.755)),
    Gpu("H100", "sm_90", 989e12, 67e12, 3.35e12, 3.9e12, "SXM5 data sheet, dense; exp2 from arXiv 2407.08608"),
    Gpu("A100", "sm_80", 312e12, 19.5e12, 2.04e12, 2.4e12, "SXM 80 GB data sheet, dense; " + _derived(108, 1.41)),
    Gpu("B200", "sm_100", 2250e12, 75e12, 8.0e12, 4.4e12, "HGX data sheet, dense; " + _derived(148, 1.85)),
    Gpu("MI300X", "gfx942", 1307e12, 163e12, 5.3e12, 10.2e12, "data sheet, dense; " + _derived(304, 2.1)),
)
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _TABLE}


@dataclass(frozen=True)
class Pass:
    """Work of one direction. `seconds` is the bound, `limit` what sets it: "matrix", "bytes" or "exp"."""

    flops: float  # done by the kernels
    counted: float  # by the usual convention, for TFLOP/s figures: forward 4 A d, backward 10 A d
    exps: float
    bytes: float
    seconds: float
    limit: str


@dataclass(frozen=True)
class Cost:
    """`pairs`: visited (query, key) pairs over all batches and heads. `known`: False if the mask or lists read captures that
    were not given, so that all pairs are counted.
    """

    gpu: Gpu
    pairs: int
    dense_pairs: int
    known: bool
    forward: Pass
    backward: Pass

    def __str__(self) -> str:
        lines = [
            f"{self.pairs:,} of {self.dense_pairs:,} pairs visited"
            + ("" if self.known else " (captures not given: all counted)")
        ]
        for name, part in (("forward", self.forward), ("backward", self.backward)):
            lines.append(
                f"{name}: {part.flops / 1e9:,.2f} GFLOP, {part.exps / 1e6:,.1f} M exp, {part.bytes / 1e6:,.1f} MB; "
                f"at least {part.seconds * 1e6:,.1f} us on {self.gpu.name} (limit: {part.limit})"
            )
        return "\n".join(lines)


def cost(
    facts: Walked,
    *,
    batch: int,
    heads_q: int,
    heads_kv: int,
    n_q: int,
    n_k: int,
    head_dim: int,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    block_m: int = 128,
    block_n: int = 64,
    gpu: str | Gpu = "H200",
    q_offset: int | torch.Tensor = 0,
    captures: Mapping[str, Any] | None = None,
) -> Cost:
    """Cost of one call. `captures`: params and tensors of the mask and of lists by name, already checked. InputError for an unknown
    GPU.
    """
    device = GPUS.get(gpu) if isinstance(gpu, str) else gpu
    if device is None:
        raise InputError("gpu", f"one of {', '.join(GPUS)} or a Gpu", gpu)
    d, dv, e = head_dim, head_dim if head_dim_v is None else head_dim_v, dtype.itemsize
    dense = batch * heads_q * n_q * n_k
    found = visited_pairs(facts, batch, heads_q, n_q, n_k, block_m, block_n, q_offset, captures or {})
    pairs = dense if found is None else sum(found)
    queries, keys = batch * heads_q * n_q, batch * heads_kv * n_k
    forward_bytes = e * (queries + keys) * (d + dv) + 4 * queries
    # Two passes read q, k, v and dout; delta reads out and dout; dq, dk, dv are written; lse and delta are float32.
    backward_bytes = (
        e * (2 * (queries + keys) * (d + dv) + 2 * queries * dv + queries * d + keys * (d + dv)) + 20 * queries
    )
    return Cost(
        gpu=device,
        pairs=pairs,
        dense_pairs=dense,
        known=found is not None,
        forward=_pass(device, dtype, 2 * pairs * (d + dv), 2 * pairs * (d + dv), pairs, forward_bytes),
        backward=_pass(
            device, dtype, 2 * pairs * (4 * d + 3 * dv), 2 * pairs * (3 * d + 2 * dv), 2 * pairs, backward_bytes
        ),
    )


def visited_pairs(
    facts: Walked,
    batch: int,
    heads: int,
    n_q: int,
    n_k: int,
    block_m: int,
    block_n: int,
    q_offset: int | torch.Tensor,
    captures: Mapping[str, Any],
) -> tuple[int, int] | None:
    """Pairs in the full and in the partial tiles that the forward visits, over all batches and heads: those of the mask's walk, or
    of the spec's lists, whatever the tile and all of them as full. None if captures that decide it are not given.
    """
    spec = facts.spec
    if spec.lists is not None:
        known = {*spec.lists.names} <= set(captures)
        return (listed_pairs(spec.lists, captures, batch, heads, n_q, n_k), 0) if known else None
    needed = {s.name for s in spec.mask.free_symbols} & {*spec.tensors, *spec.params}
    if not needed <= set(captures):
        return None
    if n_q == 0 or n_k == 0 or batch == 0:
        return 0, 0
    env: dict[str, Any] = {
        name: captures[name].detach().cpu() if isinstance(captures[name], torch.Tensor) else captures[name]
        for name in needed
    }
    check_positive(facts.walk_keys, env)
    env |= {"b": torch.arange(batch).view(-1, 1, 1), "h": torch.arange(heads).view(1, -1, 1)}
    offset = q_offset.cpu().view(-1, 1, 1) if isinstance(q_offset, torch.Tensor) else q_offset
    env["q_offset"] = offset
    block_m, block_n = min(block_m, n_q), min(block_n, n_k)
    full, partial = run(
        facts.walk_keys, facts.program_keys, env, Axis("i", offset, n_q), Axis("j", 0, n_k), block_m, block_n
    )
    rows = torch.full((-(-n_q // block_m),), block_m)
    rows[-1] = n_q - (len(rows) - 1) * block_m
    most, found = batch * heads * n_q * n_k, list[int]()
    for segments in (full, partial):
        total = 0
        for _, count in segments:
            repeat = batch * heads // (count.shape[0] * count.shape[1])
            total += int((count * rows).expand(*count.shape[:2], len(rows)).sum()) * block_n * repeat
        found.append(min(total, most - sum(found)))
    return found[0], found[1]


def _pass(gpu: Gpu, dtype: torch.dtype, flops: float, counted: float, exps: float, moved: float) -> Pass:
    matrix = gpu.matrix_half if dtype.itemsize <= 2 else gpu.matrix_float
    times = {"matrix": flops / matrix, "bytes": moved / gpu.bandwidth, "exp": exps / gpu.exp}
    limit = max(times, key=lambda name: times[name])
    return Pass(float(flops), float(counted), float(exps), float(moved), times[limit], limit)
