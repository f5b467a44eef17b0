"""Tiles for a spec that nobody tuned and that none ships for: found at a first call, by compiling candidates within a time limit.

Worker processes compile candidates side by side, the likeliest first; of those without spills the one with the fewest modelled
cycles is taken (`backends/triton/modelled.py`). The limit is `ATTNGEN_SEARCH_SECONDS`, 2 by default; 0 searches nothing.
"""

from __future__ import annotations

import base64
import itertools
import math
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attngen import debug
from attngen.analysis import GPUS, Facts
from attngen.analysis.cost import visited_pairs
from attngen.analysis.sites import site_of
from attngen.backends.triton import compile_worker
from attngen.backends.triton.machine_code import MachineCode, nvidia_resources
from attngen.backends.triton.modelled import Resources, Work, seconds
from attngen.backends.worker import Worker, WorkerDied
from attngen.errors import AttngenError, AttngenWarning, InputError, ScheduleError
from attngen.language.call import Call
from attngen.language.lists import TileLists
from attngen.language.schedule import Schedule, Tile
from attngen.lowering import Source, render
from attngen.plan.launches import backward_launches, learned_of
from attngen.schedule.legality import WIDE, registers_held, why_not_listed
from attngen.schedule.shipped import family_of, forms_of, shipped_tiles
from attngen.schedule.target import Target

VARIABLE = "ATTNGEN_SEARCH_SECONDS"
SECONDS = 2.0  # by default
READING = 0.3  # of them, to read what was compiled last
MOST_WORKERS = 8
MOST_HELD = 200  # registers a thread for sums: addresses and loops need the rest
LENGTH, HEADS = 4096, 64  # of the call whose tiles are counted: which tile is best hardly depends on it
COMMAND = [sys.executable, "-P", str(Path(compile_worker.__file__))]  # -P: the folder's modules are not Triton's


def limit() -> float:
    """Seconds that a search may take. InputError for what is no number."""
    text = os.environ.get(VARIABLE, "")
    try:
        found = float(text) if text else SECONDS
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise InputError(VARIABLE, "seconds, 0 or more", repr(text), "unset it for 2 s; 0 searches nothing")
    return found


@dataclass(frozen=True)
class Tried:
    """What came of a candidate. made: None if it didn't compile, for that reason; hung: it was still compiling at the limit."""

    kernel: str
    tile: Tile
    made: MachineCode | None = None
    reason: str = ""
    hung: bool = False
    seconds: float = float("inf")  # modelled, where nothing spills

    @property
    def spills(self) -> int:
        """Registers a thread."""
        return self.made.spills if self.made is not None else 0


@dataclass
class Search:
    """For one spec, dtype, head dims and target. base: a complete schedule; pins: what the candidates must not change."""

    call: Call
    facts: Facts
    target: Target
    units: int
    base: Schedule
    pins: Schedule
    kernels: Sequence[str]
    command: Sequence[str] = field(default_factory=lambda: COMMAND)

    def run(self, allowed: float) -> tuple[dict[str, tuple[Tile, float]], str]:
        """The tile of each kernel, with its modelled seconds, and what there is to say. Kernels without one are left out.
        ScheduleError where every candidate needs more shared memory than the target has.
        """
        self._deadline = time.monotonic() + max(allowed - READING, allowed / 2)
        self._every = list(self._ordered())
        self._left = iter(self._every)
        count = min(MOST_WORKERS, len(os.sched_getaffinity(0)), len(self._every))
        with ThreadPoolExecutor(max(1, count)) as pool:
            tried = [one for found in pool.map(lambda _: list(self._work()), range(count)) for one in found]
        made = sum(one.made is not None for one in tried)
        found, words = {}, [f"{made} of {len(self._every)} candidates compiled within {allowed:g} s"]
        for kernel in self.kernels:
            best = self._best(kernel, [one for one in tried if one.kernel == kernel], words)
            if best is not None:
                found[kernel] = (best.tile, best.seconds)
        if late := [kernel for kernel in self.kernels if kernel not in found]:
            first = next((one for one in sorted(tried, key=lambda one: not one.hung) if one.reason), None)
            why = f" ({first.kernel} {_bare(first.tile)}: {first.reason})" if first is not None else ""
            _say(
                f"{self._where(', '.join(late))}: no tile was found within {allowed:g} s{why}: a safe one runs; give it longer "
                f"({VARIABLE}=30), or attngen.tune finds a better one",
                words,
            )
        return found, "; ".join(words)

    def _where(self, kernels: str) -> str:
        return f"{kernels}, head dim {max(self.call.q.shape[3], self.call.v.shape[3])} on {self.target.name}"

    def _ordered(self) -> Iterator[tuple[str, Tile]]:
        """Each kernel's first candidate, then each one's second, and so on."""
        d = max(self.call.q.shape[3], self.call.v.shape[3])
        every = [self._candidates(kernel, d) for kernel in self.kernels]
        for turn in itertools.zip_longest(*every):
            yield from (one for one in turn if one is not None)

    def _candidates(self, kernel: str, head_dim: int) -> list[tuple[str, Tile]]:
        pinned, safe = getattr(self.pins, kernel), getattr(self.base, kernel)
        return [(kernel, tile) for tile in candidates(kernel, head_dim, self.target, pinned, safe) if self._legal(tile)]

    def _legal(self, tile: Tile) -> bool:
        lists = self.call.spec.lists
        if not isinstance(lists, TileLists):
            return True
        return not any(why_not_listed(n, getattr(tile, n), getattr(lists, n)) for n in ("block_m", "block_n"))

    def _work(self) -> Iterator[Tried]:
        """One worker's share, until the time is over."""
        allowed = self._rest()
        worker = Worker({}, allowed, self.command, VARIABLE, allowed, "searching tiles")
        try:
            worker.start()
            for kernel, tile in self._left:
                if not self._rest():
                    return
                yield self._try(worker, kernel, tile)
        finally:
            worker.close()

    def _rest(self) -> float:
        """Seconds that are left, in tenths: messages show them."""
        return max(0.0, math.floor(10 * (self._deadline - time.monotonic())) / 10)

    def _try(self, worker: Worker, kernel: str, tile: Tile) -> Tried:
        try:
            source = self._source(kernel, tile)
            worker.ready()  # which takes time that the answer has no more
            answer = worker.ask(self._request(source), self._rest())
        except WorkerDied as death:
            return Tried(kernel, tile, reason=death.reason, hung=death.status == "timeout")
        except AttngenError as problem:  # a tile that this spec or target can't have
            return Tried(kernel, tile, reason=str(problem))
        if answer["status"] != "ok":
            return Tried(kernel, tile, reason=answer["reason"])
        binary, shared = base64.b64decode(answer["binary"]), answer["shared"]
        registers, stack = nvidia_resources(binary)
        made = MachineCode(kernel, self.target.name, registers, stack // 4, shared, stack, "", binary)
        plain = Resources(registers, made.spills, shared, tile.num_warps or 4)
        if reason := plain.problem(self.target, spills=0):
            return Tried(kernel, tile, made, reason)
        return Tried(kernel, tile, made, seconds=self._seconds(kernel, tile, made))

    def _source(self, kernel: str, tile: Tile) -> Source:
        """With all gradients that the kernel may add up: the tile serves calls that want them, and those that don't."""
        call, base = self.call, self.base
        lists, dtype = call.spec.lists, call.q.dtype
        launches = backward_launches(self.facts, lists, dtype, base, learned_of(self.facts, lists))
        sites = next((launch.sites for launch in launches if launch.kernel == kernel), ())
        return render(
            call.spec,
            self.facts,
            kernel,
            head_dim=call.q.shape[3],
            head_dim_v=call.v.shape[3],
            dtype=dtype,
            schedule=base.with_tile(kernel, tile.over(getattr(base, kernel))),
            sites=tuple(site_of(self.facts.load_grads, site) for site in sites),
        )

    def _request(self, source: Source) -> dict[str, Any]:
        kinds = {name: tensor.kind for name, tensor in self.call.spec.tensors.items()}
        return {
            "path": str(source.write()),
            "name": source.name,
            "signature": {arg.name: arg.triton_type(self.call.q.dtype, kinds) for arg in source.args},
            "divisible": [arg.name for arg in source.args if arg.divisible],
            "ones": [arg.name for arg in source.args if arg.unit],
            "num_warps": source.num_warps,
            "num_stages": source.num_stages,
            "target": [self.target.backend, self.target.arch, self.target.warp_size],
        }

    def _seconds(self, kernel: str, tile: Tile, made: MachineCode) -> float:
        """Of a call of `LENGTH` and `HEADS`, modelled."""
        used = Resources.of(made, tile.num_warps or 4, tile.parts)
        block_m, block_n = tile.block_m or 1, tile.block_n or 1
        found = visited_pairs(self.facts, 1, 1, LENGTH, LENGTH, block_m, block_n, 0, self.call.params)
        full, partial = found if found is not None else (LENGTH * LENGTH / 2, LENGTH * LENGTH / 2)
        resident, walked = (block_n, block_m) if kernel == "dkv" else (block_m, block_n)
        row = (self.call.q.shape[3] + self.call.v.shape[3]) * self.call.q.dtype.itemsize
        tiles = HEADS / (block_m * block_n)
        work = Work(tiles * full, tiles * partial, HEADS * LENGTH / resident, walked * row * tile.parts)
        gpu = next(gpu for gpu in GPUS.values() if family_of(gpu.target) == family_of(self.target.name))
        return seconds(used, work, self.target, gpu, self.units)

    def _best(self, kernel: str, tried: list[Tried], words: list[str]) -> Tried | None:
        good = [one for one in tried if one.seconds < float("inf")]
        if good:
            return min(good, key=lambda one: one.seconds)
        where = self._where(kernel)
        whole = len(tried) == sum(other == kernel for other, _ in self._every) and not any(one.hung for one in tried)
        compiled = [(one, one.made) for one in tried if one.made is not None]
        fitting = [(one, made) for one, made in compiled if made.shared <= self.target.shared_limit]
        if whole and fitting:
            least, made = min(fitting, key=lambda pair: pair[1].spills)
            said = f"{where}: {_bare(least.tile)} needs {made.registers} registers a thread and spills {made.spills}"
            _say(f"{said}, the fewest of {len(fitting)} tiles; it runs, slower for it", words)
            return Tried(kernel, least.tile, made, seconds=self._seconds(kernel, least.tile, made))
        if whole and compiled:
            need, most = min(made.shared for _, made in compiled), self.target.shared_limit
            raise ScheduleError(
                f"{where}: no tile fits: the smallest of {len(compiled)} needs {need} bytes of shared memory, {need - most} more "
                f"than the limit of {most}; use a smaller head dim"
            )
        return None


def candidates(kernel: str, head_dim: int, target: Target, pinned: Tile, safe: Tile) -> list[Tile]:
    """Tiles that may be good and agree with what is pinned: those that ship for other specs, the most frequent first; the one that
    would run without a search; then others. A group of four warps has 64 resident rows, as Hopper's products have, or 16 rows a
    warp elsewhere.
    """
    shipped = Counter(shipped_tiles(family_of(target.name), kernel, head_dim))
    grid = [tile for sizes in _grid(kernel, head_dim) if (tile := sparing(kernel, Tile(*sizes), target, head_dim))]
    every = dict.fromkeys([*(tile for tile, _ in shipped.most_common()), _bare(safe), *grid])
    found = dict.fromkeys(pinned.over(tile) for tile in every)
    return list(found)


def sparing(kernel: str, tile: Tile, target: Target, head_dim: int) -> Tile | None:
    """The tile, for wide heads' backward in a form that spares registers; None where it holds too many even so."""

    def held(separate: bool) -> int:
        threads = tile.num_warps * target.warp_size
        return registers_held(kernel, tile.block_m, tile.block_n, threads, head_dim, head_dim, separate)

    if kernel == "forward" or head_dim <= WIDE:
        return tile if held(False) <= MOST_HELD else None
    separate = kernel == "dkv" and held(False) > MOST_HELD
    return replace(tile, disable_licm=True, separate_sums=separate) if held(separate) <= MOST_HELD else None


def _bare(tile: Tile) -> Tile:
    """With its sizes and the special forms that it has: the others are left open, as in candidates."""
    wanted = ("block_m", "block_n", "num_warps", "num_stages", *forms_of(tile))
    return Tile(**{name: getattr(tile, name) for name in wanted})


def _grid(kernel: str, head_dim: int) -> Iterator[tuple[int, int, int, int]]:
    """Sizes, warps and stages, wide ones first for small head dims and narrow ones for large."""
    walked = (64, 32, 128, 16) if head_dim <= 64 else (64, 32, 16) if head_dim <= 128 else (32, 16, 64)
    for (resident, warps), other, stages in itertools.product(((128, 8), (64, 4), (64, 8), (32, 8)), walked, (2, 3, 1)):
        if other > resident:
            continue
        yield (other, resident, warps, stages) if kernel == "dkv" else (resident, other, warps, stages)


_said: set[str] = set()


def _say(text: str, words: list[str]) -> None:
    """Once in a process, and in the schedule's origin."""
    words.append(text)
    if text not in _said:
        _said.add(text)
        warnings.warn(AttngenWarning(text), stacklevel=2)
    debug.say(1, "choice", text)


def search(
    call: Call,
    facts: Facts,
    target: Target,
    units: int,
    base: Schedule,
    pins: Schedule,
    kernels: Collection[str],
    allowed: float | None = None,
) -> tuple[dict[str, tuple[Tile, float]], str]:
    """What `schedule.choice` asks for kernels that have no tile: see `Search.run`. Nothing where the target's machine code is not
    read, or if it may take 0 s. allowed: seconds, None for `limit()`.
    """
    allowed = limit() if allowed is None else allowed
    if not allowed or target.backend != "cuda":
        return {}, ""
    with debug.timed("searching tiles"):
        return Search(call, facts, target, units, base, pins, tuple(kernels)).run(allowed)
