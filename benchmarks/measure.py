"""Measuring one case: every peer built, checked, then timed in mirrored laps. One record per peer, whatever came of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch

from benchmarks import seeds
from benchmarks.case import BACKWARD, FORWARD, Case
from benchmarks.check import Reference, WrongResult
from benchmarks.memory import peak_memory
from benchmarks.peers import PEERS, VARIANTS, Attention, Build, Built, Unavailable, forget_compiled
from benchmarks.timing import Candidate, Clock, DeviceStopwatch, HostStopwatch, Race, Stopwatch, Timing, race
from benchmarks.work import Inputs, Rates, Work, measure_rates, work

OK, WRONG, FAILED, UNAVAILABLE = "ok", "wrong", "failed", "not available"


@dataclass(frozen=True)
class Record:
    """What came of one peer in one case. figure: the case's headline number, in `unit`.

    error: the check's error over what is allowed. bound_fraction: the modelled bound's time over the median. ratio, of
    attngen and of sparse systems: the time of the best right dense peer over this one's, the median over pairs of laps
    of their race; where they were no race's, of their medians.
    """

    case: str
    peer: str
    status: str
    reason: str = ""
    error: float | None = None
    timing: Timing | None = None
    figure: float | None = None
    unit: str = ""
    bound_seconds: float | None = None
    bound_limit: str = ""
    bound_fraction: float | None = None
    ratio: float | None = None
    best_peer: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    described: Mapping[str, Any] = field(default_factory=dict)  # the case, for tables and charts

    def to_json(self) -> dict[str, Any]:
        """Plain values; those that say nothing are left out."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "", {})}


@dataclass(frozen=True)
class Context:
    """Where and how cases are measured. seconds: of timing per case. starting: told (peer, what) before anything that
    could take the process down.
    """

    device: torch.device
    stopwatch: Stopwatch
    clock: Clock
    seconds: float = 1.0
    peers: Mapping[str, Build] = field(default_factory=lambda: PEERS)
    starting: Callable[[str], None] = lambda peer: None

    @property
    def rates(self) -> Callable[[str], Rates]:
        """The device's rates for a dtype, measured when first asked for."""
        return lambda dtype: _rates(self.device, dtype, self.stopwatch)


@cache
def _rates(device: torch.device, dtype: str, stopwatch: Stopwatch) -> Rates:
    return measure_rates(device, dtype, stopwatch)


def attention(case: Case, peers: tuple[str, ...], context: Context) -> Iterator[Record]:
    """Attention itself: TFLOP/s on attended pairs, or GB/s where there is one query a sequence; of sparse systems, which attend
    others, milliseconds.
    """
    forget_compiled()
    inputs = Inputs.make(case, context.device)
    systems = {system.name: system for system in case.systems}
    reference = Reference(inputs) if set(peers) - set(systems) else None
    ready: dict[str, tuple[Candidate, float, dict[str, Any]]] = {}
    for peer in peers:
        context.starting(peer)
        try:
            if peer in systems:
                error = seeds.check(systems[peer], case, context.device)
                run, own, notes = seeds.build(systems[peer], inputs)
                seeds.check_finite(*results(run, own))
            else:
                assert reference is not None
                built = named(context.peers, peer)(inputs)
                run, own, notes = built.run, inputs, built.notes
                error = reference.error(*results(run, own))
            ready[peer] = candidate(run, own), error, notes | _peak(run, own)
        except Exception as problem:
            yield failure(case, peer, problem)
    raced = _race(case, {peer: action for peer, (action, _, _) in ready.items()}, context)
    for peer, reason in raced.failed.items():
        yield Record(case.id, peer, FAILED, clean(reason), described=describe(case))
    done, rates = work(inputs), context.rates(case.dtype)
    bound, limit = rates.bound(done)
    unit, figure = throughput(case, done, context.device)
    counted = {"pairs": done.pairs, "flops": done.flops, "bytes": done.bytes}
    records = []
    for peer, timing in raced.timings.items():
        _, relative, notes = ready[peer]
        record = Record(case.id, peer, OK, error=relative, timing=timing, notes=notes, described=describe(case))
        if peer in systems:
            record = replace(record, figure=1e3 * timing.median, unit="ms")
        else:
            record = replace(
                record, figure=figure / timing.median, unit=unit, bound_seconds=bound, bound_limit=limit,
                bound_fraction=bound / timing.median, described=describe(case) | counted,
            )  # fmt: skip
        records.append(record)
    yield from with_ratio(records, tuple(systems), raced)


def _peak(run: Attention, inputs: Inputs) -> dict[str, Any]:
    """A note of what a call takes on a GPU at its peak; on a CPU the process's growth would say little of so small a call."""
    if inputs.q.device.type != "cuda":
        return {}
    return {"peak bytes": peak_memory(lambda: results(run, inputs), inputs.q.device)}


def overhead(case: Case, peers: tuple[str, ...], context: Context) -> Iterator[Record]:
    """Microseconds of a call that has next to nothing to compute, on the host's clock, over many calls. On a CPU with one
    thread: handing work to more of them would be most of the time.
    """
    threads = torch.get_num_threads()
    if context.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield from _overhead(case, peers, context)
    finally:
        torch.set_num_threads(threads)


def _overhead(case: Case, peers: tuple[str, ...], context: Context, calls: int = 50) -> Iterator[Record]:
    forget_compiled()
    inputs = Inputs.make(case, context.device)
    reference = Reference(inputs)
    ready: dict[str, Built] = {}
    for peer in peers:
        context.starting(peer)
        try:
            built = named(context.peers, peer)(inputs)
            reference.error(*results(built.run, inputs))
            ready[peer] = built
        except Exception as error:
            yield failure(case, peer, error)

    def many(built: Built) -> Candidate:
        one = candidate(built.run, inputs)

        def run(_: Any) -> None:
            for _ in range(calls):
                one.run(one.prepare())
            synchronize(context.device)

        return Candidate(lambda: synchronize(context.device), run)

    host = replace(context, stopwatch=on_host(context))
    raced = _race(case, {peer: many(built) for peer, built in ready.items()}, host)
    for peer, reason in raced.failed.items():
        yield Record(case.id, peer, FAILED, clean(reason), described=describe(case))
    records = [
        Record(
            case.id, peer, OK, timing=_scaled(timing, 1 / calls), figure=1e6 * timing.median / calls, unit="us",
            notes=ready[peer].notes, described=describe(case),
        )
        for peer, timing in raced.timings.items()
    ]  # fmt: skip
    yield from with_ratio(records, raced=raced)


def on_host(context: Context) -> Stopwatch:
    """The stopwatch for what the host does, on a GPU too."""
    return HostStopwatch(context.clock) if isinstance(context.stopwatch, DeviceStopwatch) else context.stopwatch


def _race(case: Case, candidates: dict[str, Candidate], context: Context) -> Race:
    context.starting("")
    return race(candidates, context.stopwatch, context.seconds, clock=context.clock)


def throughput(case: Case, done: Work, device: torch.device) -> tuple[str, float]:
    """The unit of a case's figure, and how much of it one run does."""
    if case.n_q == 1:
        return "GB/s", done.bytes / 1e9
    return ("TFLOP/s", done.flops / 1e12) if device.type == "cuda" else ("GFLOP/s", done.flops / 1e9)


# -- parts that the suites share --------------------------------------------------------------------------------------


def results(run: Attention, inputs: Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """out, and the gradients by name if the case asks for them."""
    with torch.set_grad_enabled(inputs.case.direction != FORWARD):
        out = run()
        if not inputs.leaves:
            return out, {}
        grads = torch.autograd.grad(out, list(inputs.leaves.values()), inputs.d_out)
    return out.detach(), dict(zip(inputs.leaves, grads, strict=True))


def candidate(run: Attention, inputs: Inputs) -> Candidate:
    """What is timed of an implementation, by the case's direction."""
    leaves = list(inputs.leaves.values())
    if inputs.case.direction == FORWARD:

        def forward(_: Any) -> torch.Tensor:
            with torch.no_grad():
                return run()

        return Candidate(lambda: None, forward)
    if inputs.case.direction == BACKWARD:
        return Candidate(run, lambda out: torch.autograd.grad(out, leaves, inputs.d_out))
    return Candidate(lambda: None, lambda _: torch.autograd.grad(run(), leaves, inputs.d_out))


def with_ratio(records: Iterable[Record], systems: tuple[str, ...] = (), raced: Race | None = None) -> Iterator[Record]:
    """How attngen stands to the best peer, its own variants left out, and a sparse system to the best dense attention; the
    others pass. raced: what timed them; None where they were no race's, whose medians are compared then.
    """
    records = list(records)
    dense = {r.peer: r.timing.median for r in records if r.peer not in {*systems, *VARIANTS} and r.timing}
    for record in records:
        rivals = {peer: median for peer, median in dense.items() if peer != record.peer}
        if record.peer in ("attngen", *systems) and rivals and record.timing:
            best = min(rivals, key=rivals.__getitem__)
            ratio = rivals[best] / record.timing.median if raced is None else raced.ratio(best, record.peer)
            yield replace(record, ratio=ratio, best_peer=best)
        else:
            yield record


def failure(case: Case, peer: str, error: Exception) -> Record:
    """The record of a peer that is wrong, can't or broke."""
    described = describe(case)
    if isinstance(error, WrongResult):
        known = error.error if error.error < torch.inf else None
        return Record(case.id, peer, WRONG, clean(str(error)), error=known, described=described)
    if isinstance(error, Unavailable):
        return Record(case.id, peer, UNAVAILABLE, clean(str(error)), described=described)
    return Record(case.id, peer, FAILED, clean(f"{type(error).__name__}: {error}"), described=described)


def named(table: Mapping[str, Any], peer: str) -> Any:
    """The table's entry. Unavailable for a peer that this suite does not have."""
    if peer not in table:
        raise Unavailable("it has no part in this suite")
    return table[peer]


def describe(case: Case) -> dict[str, Any]:
    """The case for tables and charts."""
    kept = asdict(replace(case, systems=()))
    values = {n: v for n, v in kept.items() if n not in ("peers", "suite", "settings", "systems") and v != ""}
    return {**values, "group": case.group, **dict(case.settings)}


def clean(text: str) -> str:
    """One line without the paths of this machine."""
    text = re.sub(r"(?<![\w.])(?:/[\w.+@~-]+)+/([\w.+@~-]+)", r"\1", " ".join(text.split()))
    return text[:300]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _scaled(timing: Timing, factor: float) -> Timing:
    return Timing(timing.median * factor, timing.p20 * factor, timing.p80 * factor, timing.best * factor, timing.runs)
