"""A case's inputs, the work it has to do, and the least time that work could take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attngen.analysis import GPUS
from benchmarks.case import BACKWARD, FORWARD, Case
from benchmarks.patterns import PATTERNS, Captures, Pattern, Span


@dataclass(frozen=True, eq=False)
class Inputs:
    """q [B, Hq, Nq, D], k and v [B, Hkv, Nk, D], d_out like q; captures by name; leaves: what gets a gradient, by name."""

    case: Case
    pattern: Pattern
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor
    captures: Captures
    leaves: dict[str, torch.Tensor]

    @classmethod
    def make(cls, case: Case, device: torch.device | str, seed: int = 0) -> Inputs:
        """Random normal values, the same for one seed and device."""
        pattern, dtype = PATTERNS[case.pattern], getattr(torch, case.dtype)
        generator = torch.Generator(device).manual_seed(seed)
        backward = case.direction != FORWARD

        def random(heads: int, length: int) -> torch.Tensor:
            size = (case.batch, heads, length, case.head_dim)
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        q, d_out = random(case.heads_q, case.n_q), random(case.heads_q, case.n_q)
        k, v = random(case.heads_kv, case.n_k), random(case.heads_kv, case.n_k)
        captures = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in pattern.captures(case, torch.Generator().manual_seed(seed)).items()
        }
        captures |= {name: captures[name].to(dtype) for name in pattern.learned}
        leaves = {"q": q, "k": k, "v": v, **{name: captures[name] for name in pattern.learned}}
        for tensor in leaves.values():
            tensor.requires_grad_(backward)
        return cls(case, pattern, q, k, v, d_out, captures, leaves if backward else {})

    q_offset = 0

    @property
    def spec(self) -> Any:
        return self.pattern.spec

    @property
    def learned(self) -> tuple[str, ...]:
        """Captures that get a gradient."""
        return self.pattern.learned

    @property
    def backward(self) -> bool:
        """Whether gradients are looked at."""
        return self.case.direction != FORWARD

    @property
    def span(self) -> Span:
        """First key and one past the last that each query sees."""
        return self.pattern.span(self.case, self.captures)


@dataclass(frozen=True)
class Work:
    """pairs: attended (query, key) pairs over batches and query heads, counted exactly. flops: by the usual convention,
    4 pairs D forward and 10 backward. bytes: every live tensor moved once. exps: one a pair and pass.
    """

    pairs: int
    flops: float
    bytes: float
    exps: float


def work(inputs: Inputs) -> Work:
    """The work of one call in the case's direction."""
    case = inputs.case
    low, high = inputs.span
    pairs = int((high - low).clamp(min=0).sum()) * case.heads_q * (case.batch // low.shape[0])
    live = int((high.amax(1) - low.amin(1)).clamp(min=0).sum()) * (case.batch // low.shape[0])  # keys, over batches
    size = torch.finfo(getattr(torch, case.dtype)).bits // 8
    queries, keys = case.batch * case.heads_q * case.n_q, case.heads_kv * live
    tensors = [t for t in inputs.captures.values() if isinstance(t, torch.Tensor)]
    captured = sum(t.numel() * t.element_size() for t in tensors)
    learned = sum(inputs.captures[name].numel() * size for name in inputs.pattern.learned)
    flops = bytes_moved = exps = 0.0
    if case.direction != BACKWARD:
        flops, exps = flops + 4 * pairs * case.head_dim, exps + pairs
        bytes_moved += 2 * size * case.head_dim * (queries + keys) + 4 * queries + captured
    if case.direction != FORWARD:  # reads q, k, v, out, d_out, lse; writes dq, dk, dv and the captures' gradients
        flops, exps = flops + 10 * pairs * case.head_dim, exps + pairs
        bytes_moved += 4 * size * case.head_dim * (queries + keys) + 4 * queries + captured + learned
    return Work(pairs, float(flops), float(bytes_moved), float(exps))


@dataclass(frozen=True)
class Rates:
    """What the device can do, per second: matrix products of a dtype and a large copy, both measured in this run; exp2
    from attngen's table of GPUs, None where it has no such device.
    """

    flops: float
    bytes: float
    exps: float | None

    def bound(self, done: Work) -> tuple[float, str]:
        """The modelled bound: seconds that the work takes at these rates if all of it overlaps, and what sets it."""
        times = {"matrix": done.flops / self.flops, "bytes": done.bytes / self.bytes}
        if self.exps is not None:
            times["exp"] = done.exps / self.exps
        limit = max(times, key=times.__getitem__)
        return times[limit], limit


def measure_rates(device: torch.device, dtype: str, stopwatch: Any, runs: int = 12) -> Rates:
    """A large matrix product and a large copy on random data, the best of a few runs each."""
    cuda = device.type == "cuda"
    n, elements = (8192, 2**30) if cuda else (2048, 2**25)
    left, right = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    product = min(stopwatch(lambda: None, lambda _: left @ right) for _ in range(runs))
    source = torch.randn(elements, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    copied = min(stopwatch(lambda: None, lambda _: target.copy_(source)) for _ in range(runs))
    name = torch.cuda.get_device_name(device) if cuda else ""
    exps = next((gpu.exp for gpu in GPUS.values() if gpu.name in name), None)
    return Rates(2 * n**3 / product, 8 * elements / copied, exps)
