"""Inside the worker: inputs, the check against the oracle, and timing. One Bench per spec, shape, dtype and piece."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from attngen.language.spec import Spec
from attngen.reference.dense import plain
from attngen.reference.oracle import oracle
from attngen.runtime.attention import compile as compile_spec
from attngen.schedule import Schedule
from attngen.store import Shape
from attngen.tuning.captures import make_captures
from attngen.tuning.check import WrongResult
from attngen.tuning.race import race
from attngen.tuning.sizes import offset_of, small_shape
from attngen.tuning.space import Point
from attngen.tuning.stopwatch import Candidate, Clock, Stopwatch, stopwatch_for

CHECK_ROWS = 16  # rows in each sample at full length
LAPS = (5, 2000)
LATE = 20.0  # times the patience: then even fewer laps must do
HOPELESS = 3.0  # times slower than the fastest after two laps: not worth more of them

Attention = Callable[..., torch.Tensor]
Build = Callable[[Schedule], Attention]


class Bench:
    """Builds, checks and times schedules.

    build: schedule -> attention; given only in tests, otherwise `attngen.compile` for the device.
    point values override `base`, the complete schedule that pins and the model's choice make.
    whole: the spec is one that users call. Else it is a part of a call (`attngen.tuning.attends`) whose captures fit this size
    alone; small: the same part of a smaller call, with its captures, to compare with the oracle. At its own size a part is
    compared with what the untuned schedule gives.
    """

    def __init__(
        self,
        spec: Spec,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device | str,
        piece: str,
        *,
        base: Schedule | None = None,
        captures: Mapping[str, Any] | None = None,
        small: tuple[Shape, Mapping[str, Any]] | None = None,
        whole: bool = True,
        seed: int = 0,
        build: Build | None = None,
        clock: Clock = time.perf_counter,
    ):
        self.spec, self.shape, self.dtype, self.piece = spec, shape, dtype, piece
        self.device, self.base, self.clock = torch.device(device), base or Schedule(), clock
        self.build = build or self._compile
        self.backward = piece == "backward"
        self.inputs = Inputs.make(spec, shape, dtype, self.device, captures, seed, self.backward)
        self._checks: list[Check] = []
        if whole:
            small = small_shape(shape), captures or {}
        if small is not None:
            given = small[1]
            self._checks.append(Check.dense(spec, small[0], dtype, self.device, given, seed, self.backward))
        by_rows = whole and not spec.reads_rows  # a few rows of a call are other rows of a call of their own
        if by_rows and small_shape(shape) != shape:
            self._checks.append(Check.rows(spec, self.inputs))
        elif not by_rows and (small is None or small[0] != shape):
            self._checks.append(Check.like(self.build(self.base), self.inputs, self.backward))
        self._ready: dict[str, Attention] = {}

    @cached_property
    def stopwatch(self) -> Stopwatch:
        """Made when first needed: on a GPU it holds memory."""
        return stopwatch_for(self.device, self.clock)

    def prepare(self, point: Point) -> float:
        """Compile, check, keep ready for races. Returns the check's error over the allowed; raises WrongResult."""
        attention = self.build(Schedule(**point).over(self.base))
        error = max(check.error(attention) for check in self._checks)
        self._ready[_name(point)] = attention
        return error

    def race(self, points: Sequence[Point], patience: float) -> list[list[float]]:
        """Times of the prepared points by lap, in a `race` of `patience` seconds; the hopeless drop out early."""
        candidates = {str(place): self._candidate(self._ready[_name(point)]) for place, point in enumerate(points)}
        limits = {"late": LATE * patience, "hopeless": HOPELESS}
        found = race(candidates, self.stopwatch, patience, LAPS, self.clock, **limits, strict=True)
        return [list(times) for times in found.times.values()]

    def _compile(self, schedule: Schedule) -> Attention:
        return compile_spec(self.spec, schedule=schedule, backend="cpu" if self.device.type == "cpu" else "triton")

    def _candidate(self, attention: Attention) -> Candidate:
        """A backward's graph is made for each run and gone after it: candidates that wait hold no memory."""
        given = self.inputs
        if not self.backward:

            def forward(_: Any) -> Any:
                with torch.no_grad():
                    return given.run(attention)

            return Candidate(lambda: None, forward)
        leaves = given.leaves()
        return Candidate(lambda: given.run(attention), lambda out: torch.autograd.grad(out, leaves, given.d_out))


class Inputs:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv], d_out [B, Hq, Nq, Dv], captures by name."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        d_out: torch.Tensor,
        captures: dict[str, Any],
        q_offset: int | torch.Tensor = 0,
    ):
        self.q, self.k, self.v, self.d_out = q, k, v, d_out
        self.captures, self.q_offset = captures, q_offset

    @classmethod
    def make(
        cls,
        spec: Spec,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        captures: Mapping[str, Any] | None,
        seed: int,
        grads: bool,
    ) -> Inputs:
        generator = torch.Generator(device=device).manual_seed(seed)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device).to(dtype).requires_grad_(grads)

        named = make_captures(spec, shape, device, captures, seed)
        offset = (captures or {}).get("q_offset", offset_of(shape))
        q, d_out = (random(shape.batch, shape.heads_q, shape.n_q, dim) for dim in (shape.head_dim, shape.head_dim_v))
        keys = shape.batch, shape.heads_kv, shape.n_k
        if spec.page_size is not None:
            keys = int(named["page_table"].max()) + 1, shape.heads_kv, spec.page_size
        k, v = (random(*keys, dim) for dim in (shape.head_dim, shape.head_dim_v))
        return cls(q, k, v, d_out.detach(), named, offset.to(device) if isinstance(offset, torch.Tensor) else offset)

    def double(self) -> Inputs:
        """The same values in float64, as leaves of their own."""
        q, k, v = (t.detach().double().requires_grad_(t.requires_grad) for t in (self.q, self.k, self.v))
        return Inputs(q, k, v, self.d_out.double(), self.captures, self.q_offset)

    def leaves(self) -> list[torch.Tensor]:
        """What gradients are asked for: a float capture that has none is a constant while tuning."""
        return [self.q, self.k, self.v]

    def run(self, attention: Attention) -> torch.Tensor:
        moved = isinstance(self.q_offset, torch.Tensor) or self.q_offset != 0
        extra = {"q_offset": self.q_offset} if moved else {}
        return attention(self.q, self.k, self.v, **extra, **self.captures)

    def single(self) -> Inputs:
        """The same values in float32, as leaves of their own."""
        q, k, v = (t.detach().float().requires_grad_(t.requires_grad) for t in (self.q, self.k, self.v))
        return Inputs(q, k, v, self.d_out.float(), self.captures, self.q_offset)


class Check:
    """Reference results, made once; `error` compares a candidate with them by the design's rule.

    float32: relative Frobenius error, at most 1e-5 for out and 1e-4 for gradients. Half types: largest error at most
    twice (gradients three times) that of plain PyTorch in the same dtype on the same inputs.
    """

    def __init__(self, inputs: Inputs, backward: bool, window: tuple[slice, slice, list[slice]] | None = None):
        self.inputs, self.backward, self.window = inputs, backward, window
        self.names = ["out", "q gradient", "k gradient", "v gradient"] if backward else ["out"]
        self.expected: list[torch.Tensor] = []
        self.allowed: list[float] = []

    @classmethod
    def dense(
        cls,
        spec: Spec,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        captures: Mapping[str, Any] | None,
        seed: int,
        backward: bool,
    ) -> Check:
        """Everything, at a small size."""
        given = _cut(spec, captures or {}, shape.batch, shape.heads_q)
        check = cls(Inputs.make(spec, shape, dtype, device, given, seed + 1, backward), backward)
        exact = cls(check.inputs.double(), backward)  # so that the expected gradients are not rounded
        check.expected = exact._results(lambda *a, **c: oracle(spec, *a, **c)[0])
        plain_results = check._results(lambda *a, **c: plain(spec, *a, **c)[0]) if _is_half(dtype) else check.expected
        check._allow(plain_results, dtype)
        return check

    @classmethod
    def rows(cls, spec: Spec, inputs: Inputs) -> Check:
        """A few rows of the first heads at the size that is timed, each against all its keys; forward only."""
        group, n_q = inputs.q.shape[1] // inputs.k.shape[1], inputs.q.shape[2]
        starts = sorted({0, max(0, n_q // 2 - 5), max(0, n_q - CHECK_ROWS)})
        spans = [slice(start, min(n_q, start + CHECK_ROWS)) for start in starts]
        check = cls(inputs, False, (slice(0, 1), slice(0, group), spans))
        dtype, expected, plains = inputs.q.dtype, [], []
        captures = _cut(spec, inputs.captures, 1, group)
        with torch.no_grad():
            for span in spans:
                args = inputs.q[:1, :group, span], inputs.k[:1, :1], inputs.v[:1, :1]
                first = inputs.q_offset + span.start
                expected.append(oracle(spec, *args, q_offset=first, **captures)[0])
                if _is_half(dtype):
                    plains.append(plain(spec, *args, q_offset=first, **captures)[0])
        check.expected = [torch.cat(expected, dim=2)]
        check._allow([torch.cat(plains, dim=2)] if plains else check.expected, dtype)
        return check

    @classmethod
    def like(cls, attention: Attention, inputs: Inputs, backward: bool) -> Check:
        """What a trusted attention gives: of half types in float32, with the rule's allowance over what it loses in them."""
        check, dtype = cls(inputs, backward), inputs.q.dtype
        exact = cls(inputs.single(), backward) if _is_half(dtype) else check
        check.expected = exact._results(attention)
        check._allow(check._results(attention) if _is_half(dtype) else check.expected, dtype)
        return check

    def error(self, attention: Attention) -> float:
        """The largest error over its allowance; at most 1. Raises WrongResult beyond that."""
        worst = 0.0
        for name, got, expected, allowed in zip(
            self.names, self._results(attention), self.expected, self.allowed, strict=True
        ):
            if got.shape != expected.shape:
                raise WrongResult(f"{name} of shape {list(got.shape)}", float("inf"))
            relative = _difference(got, expected, got.dtype) / allowed
            if not relative <= 1.0:  # nan too
                raise WrongResult(name, relative)
            worst = max(worst, relative)
        return worst

    def _results(self, attention: Attention) -> list[torch.Tensor]:
        with torch.set_grad_enabled(self.backward):
            out = self.inputs.run(attention)
            if not self.backward:
                if self.window is None or out.shape[2] != self.inputs.q.shape[2]:
                    return [out]
                batch, heads, spans = self.window
                return [torch.cat([out[batch, heads, span] for span in spans], dim=2)]
            grads = torch.autograd.grad(out, self.inputs.leaves(), self.inputs.d_out.to(out.dtype))
            return [out.detach(), *grads]

    def _allow(self, plains: list[torch.Tensor], dtype: torch.dtype) -> None:
        for name, expected, plain_result in zip(self.names, self.expected, plains, strict=True):
            if not _is_half(dtype):
                self.allowed.append(1e-5 if name == "out" else 1e-4)
                continue
            factor = 2.0 if name == "out" else 3.0
            self.allowed.append(max(factor * _difference(plain_result, expected, dtype), torch.finfo(dtype).tiny))


def _cut(spec: Spec, captures: Mapping[str, Any], batch: int, heads: int) -> dict[str, Any]:
    """Captures for a call of the first batches and heads alone."""
    found, lengths = dict(captures), {"b": batch, "h": heads}
    for name, dims in spec.plain_dims.items():
        for dim, axis in dims if name in found else ():
            if axis in lengths:
                found[name] = found[name].narrow(dim, 0, min(found[name].shape[dim], lengths[axis]))
    return found


def _difference(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    difference = got.double() - expected.double()
    if _is_half(dtype):
        return float(difference.abs().max()) if difference.numel() else 0.0
    norm = float(torch.linalg.vector_norm(expected.double()))
    return float(torch.linalg.vector_norm(difference)) / norm if norm else float(difference.abs().sum())


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def _name(point: Point) -> str:
    return json.dumps(point, sort_keys=True)
