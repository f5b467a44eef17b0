"""What is known of a schedule without running it: compiled resources, a bound, and a rough time.

The bound is the speed-of-light time of the pairs rounded out to tiles, which no schedule with these tiles beats.
The guess adds what portable Triton pays on top: softmax that does not overlap the products, latency that too few
resident warps do not hide, and the last wave of programs. The estimate reads that in the compiled kernel's machine code
(`backends/triton/modelled.py`, which says what it leaves out), on NVIDIA GPUs but sm_100. They rank schedules; none predicts a clock.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attngen.backends.triton.modelled import LAUNCH, Resources, Work, cycles
from attngen.backends.worker import WorkerDied
from attngen.language.device import programs_at_once
from attngen.language.schedule import PREFIXES
from attngen.schedule import Target
from attngen.store import Shape
from attngen.tuning.measure import Outcome
from attngen.tuning.space import PIECES, Point

SAFETY = 0.9  # of the bound: rates are partly measured, and a cache may help
TILE_OVERHEAD = 400  # cycles of one step that do not shrink with the tile: barriers, the row maximum's exchange
LATENCY = 1e-6  # seconds from asking memory to having it, under load
HOPELESS = 2.0  # times the best modelled seconds: not measured, however far the model is off
CLOCK = 1.7e9  # Hz, only to turn those cycles into time

# Products over pairs of a tile, in units of 2 * m * n * d operations: forward 2, dq pass 3, dkv pass 4.
PRODUCTS = {"": 2, "dq_": 3, "dkv_": 4}


@dataclass(frozen=True)
class Rates:
    """A GPU's speeds: matrix operations, bytes and exponentials a second, and its multiprocessors."""

    matrix: float
    bandwidth: float
    exps: float
    units: int


class GpuModel:
    """Implements `search.Modeller` for a GPU, present or not.

    pairs: (block_m, block_n) -> attended pairs per batch and head, rounded out to tiles; masked: those of partial tiles.
    compiled: point -> {prefix: Resources}, by cross-compiling; None leaves resources unknown (only arithmetic).
    bounded: whether the rates are this very GPU's, so that a bound by them may refuse a schedule.
    prunes: whether what survives is measured, so that a schedule whose machine code is far slower than another's is refused.
    """

    def __init__(
        self,
        piece: str,
        shape: Shape,
        element: int,
        target: Target,
        rates: Rates,
        pairs: Callable[[int, int], float],
        compiled: Callable[[Point], Mapping[str, Resources]] | None = None,
        bounded: bool = True,
        masked: Callable[[int, int], float] = lambda m, n: 0.0,
        prunes: bool = False,
    ):
        self.prefixes, self.shape, self.element = PIECES[piece], shape, element
        self.target, self.rates, self.compiled, self.bounded = target, rates, compiled, bounded
        self._pairs_of, self._pairs, self._masked = pairs, dict[tuple[int, int], float](), masked
        self._resources: dict[str, Mapping[str, Resources]] = {}
        self.prunes, self._least = prunes, math.inf

    def guess(self, point: Point) -> float:
        """Seconds, without compiling: resources as far as arithmetic knows them."""
        return sum(self._seconds(prefix, point, None) for prefix in self.prefixes)

    def bound(self, point: Point) -> float:
        return SAFETY * sum(self._bound(prefix, point) for prefix in self.prefixes) if self.bounded else 0.0

    def refuse(self, point: Point) -> str | None:
        if self.compiled is None:
            return None
        try:
            resources = self.resources(point)
        except Uncompilable as problem:
            return str(problem)
        for prefix, used in resources.items():
            if reason := used.problem(self.target):
                return f"{prefix.rstrip('_') or 'forward'} {reason}"
        if not self.prunes or any(used.full is None for used in resources.values()):
            return None
        seconds = self.estimate(point)
        self._least = min(self._least, seconds)
        if seconds > HOPELESS * self._least:
            return f"its machine code is modelled at {seconds / self._least:.1f} times the best one's time"
        return None

    def estimate(self, point: Point) -> float:
        """Seconds, with the compiled resources where there is a compiler."""
        resources = self.resources(point) if self.compiled is not None else {}
        return sum(self._seconds(prefix, point, resources.get(prefix)) for prefix in self.prefixes)

    def resources(self, point: Point) -> Mapping[str, Resources]:
        """Compiled once per point. Raises Uncompilable."""
        assert self.compiled is not None
        name = json.dumps(point, sort_keys=True)
        if name not in self._resources:
            self._resources[name] = self.compiled(point)
        return self._resources[name]

    def pairs(self, m: int, n: int) -> float:
        """Pairs per batch and head of the tiles that are visited."""
        if (m, n) not in self._pairs:
            self._pairs[m, n] = self._pairs_of(m, n)
        return self._pairs[m, n]

    def _work(self, prefix: str, point: Point) -> tuple[float, float, float]:
        """Operations, exponentials and least bytes of a kernel with these tiles."""
        shape, m, n = self.shape, point[prefix + "block_m"], point[prefix + "block_n"]
        positions = -(-m // self._group(prefix, point))  # a tile's query positions; its other rows are heads
        pairs = shape.batch * shape.heads_q * self.pairs(positions, n)
        dims = {"": (shape.head_dim + shape.head_dim_v) / 2}.get(prefix, max(shape.head_dim, shape.head_dim_v))
        q_side = shape.batch * shape.heads_q * shape.n_q * (shape.head_dim + shape.head_dim_v)
        k_side = shape.batch * shape.heads_kv * shape.n_k * (shape.head_dim + shape.head_dim_v)
        products = PRODUCTS[prefix] + bool(point.get(prefix + "separate_sums"))  # the logits again
        return products * 2 * pairs * dims, pairs, self.element * (q_side + k_side)

    def _bound(self, prefix: str, point: Point) -> float:
        operations, exps, size = self._work(prefix, point)
        return max(operations / self.rates.matrix, exps / self.rates.exps, size / self.rates.bandwidth)

    def _seconds(self, prefix: str, point: Point, used: Resources | None) -> float:
        shape, rates = self.shape, self.rates
        m, n, warps, stages = (point[prefix + x] for x in ("block_m", "block_n", "num_warps", "num_stages"))
        operations, exps, size = self._work(prefix, point)
        group = self._group(prefix, point)
        rows = shape.n_q * group
        padding = (m / min(m, rows)) * (n / min(n, shape.n_k))  # a tile beyond the whole length
        operations, exps = operations * padding, exps * padding
        if prefix == "dkv_":
            programs = shape.batch * shape.heads_kv * math.ceil(shape.n_k / n)
        else:
            programs = shape.batch * (shape.heads_q // group) * math.ceil(rows / m)
        programs, merging = self._split(point, programs) if prefix == "" else (programs, 0.0)
        # Small tiles feed the matrix units badly: an operand is read again for each of them.
        feed = (m / (m + 16)) * (n / (n + 16)) * (1.0 if m >= 16 * warps or warps <= 4 else 0.8)
        busy = operations / (rates.matrix * feed) + exps / rates.exps
        resident = used.resident(self.target) if used is not None else self._resident(prefix, m, n, warps, stages)
        hidden = min(1.0, (0.4 + 0.15 * min(stages, 4)) * (0.85 + 0.15 * min(resident, 3)))
        steps = exps / (m * n) / rates.units
        waiting = steps * TILE_OVERHEAD / CLOCK / max(1, resident)
        slots = rates.units * max(1, resident)
        waves = math.ceil(programs / slots) * slots / programs if programs > slots else max(1.0, rates.units / programs)
        spilled = 1.0 + (used.spills / 64 if used is not None else 0.0)
        computing = (busy / hidden + waiting) * waves * spilled
        if used is not None and used.full is not None:
            computing = self._cycles(prefix, point, used, exps / (m * n), programs) / (rates.exps / (16 * rates.units))
        return (
            LAUNCH
            + merging
            + max(
                computing,
                size / rates.bandwidth,
                self._streaming(prefix, m, n, stages, exps, programs, resident),
            )
        )

    def _cycles(self, prefix: str, point: Point, used: Resources, tiles: float, programs: int) -> float:
        """Of a multiprocessor, by the machine code."""
        m, n = point[prefix + "block_m"], point[prefix + "block_n"]
        positions = -(-m // self._group(prefix, point))
        partial = tiles * self._masked(positions, n) / max(self.pairs(positions, n), 1.0)
        walked = (m if prefix == "dkv_" else n) * (self.shape.head_dim + self.shape.head_dim_v) * self.element
        walked *= 2 if point.get(prefix + "separate_sums") else 1
        return cycles(used, Work(tiles - partial, partial, programs, walked), self.target, self.rates.units)

    def _group(self, prefix: str, point: Point) -> int:
        """Heads whose rows share a tile."""
        return self.shape.heads_q // max(self.shape.heads_kv, 1) if prefix == "" and point.get("pack") else 1

    def _split(self, point: Point, outputs: int) -> tuple[int, float]:
        """Programs when so many outputs' keys are cut, and seconds of the launch that merges their states."""
        split, m = point.get("split", 1), point["block_m"]
        if split == 1:
            return outputs, 0.0
        tiles, most = (
            math.ceil(self.shape.n_k / point["block_n"]),
            programs_at_once(self.rates.units, point["num_warps"]),
        )
        programs = min(most, outputs * tiles) if split == "stream" else outputs * min(int(split), tiles)
        states = programs + outputs if split == "stream" else programs
        moved = 2 * 4 * states * m * (self.shape.head_dim_v + 2)  # float32, written and read
        return programs, LAUNCH + moved / self.rates.bandwidth

    def _streaming(self, prefix: str, m: int, n: int, stages: int, exps: float, programs: int, resident: int) -> float:
        """Seconds to read the walked tiles, by Little's law: what is under way at once over the latency.

        Sets the time of decoding, where few programs read much.
        """
        walked, still = (m, n) if prefix == "dkv_" else (n, m)
        tile = walked * (self.shape.head_dim + self.shape.head_dim_v) * self.element
        units = min(self.rates.units, programs)
        together = min(max(1, resident), math.ceil(programs / self.rates.units))
        underway = units * together * max(1, stages - 1) * tile
        return exps / (walked * still) * tile * LATENCY / underway

    def _resident(self, prefix: str, m: int, n: int, warps: int, stages: int) -> int:
        held = m * self.shape.head_dim_v + m * n if prefix == "" else 2 * m * n + m * self.shape.head_dim
        registers = min(255, 40 + held // (warps * self.target.warp_size))
        walked = (m if prefix == "dkv_" else n) * (self.shape.head_dim + self.shape.head_dim_v)
        still = (n if prefix == "dkv_" else m) * (self.shape.head_dim + self.shape.head_dim_v * (prefix != ""))
        shared = self.element * (walked * max(1, stages - 1) + still)
        return Resources(registers, 0, shared, warps).resident(self.target)


class Uncompilable(Exception):
    """The compiler refused a schedule, crashed or took too long."""


class ModelMeasurer:
    """ "Measures" by the model, for a GPU that is not here. Its records say modelled."""

    kind = "modelled"

    def __init__(self, model: GpuModel, close: Callable[[], None] = lambda: None):
        self.model, self.close = model, close

    def measure(self, points: Sequence[Point], patience: float = 1.0) -> list[Outcome]:
        return [self._one(point) for point in points]

    def _one(self, point: Point) -> Outcome:
        try:
            if reason := self.model.refuse(point):
                return Outcome("failed", reason=reason)
            return Outcome("ok", self.model.estimate(point))
        except Uncompilable as problem:
            return Outcome("failed", reason=str(problem))


def compiled_by(worker: Any, prefixes: Sequence[str]) -> Callable[[Point], dict[str, Resources]]:
    """Cross-compile in a worker process: a compiler may crash or hang as well as a kernel."""

    def compiled(point: Point) -> dict[str, Resources]:
        try:
            answer = worker.ask({"op": "resources", "point": point})
        except WorkerDied as death:
            raise Uncompilable(f"cross-compiling {death.status}: {death.reason}") from death
        if answer["status"] != "ok":
            raise Uncompilable(f"does not compile: {answer['reason']}")
        found: dict[str, Resources] = {}
        for kernel in answer["kernels"]:
            prefix = PREFIXES.get(kernel["name"], "none")
            if prefix in prefixes:
                found[prefix] = Resources.from_json(kernel["resources"])
        return found

    return compiled
