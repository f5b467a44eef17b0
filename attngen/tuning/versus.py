"""attngen beside SDPA and FlexAttention on one call: each checked against the oracle, then timed in turns in one run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attngen.errors import InputError
from attngen.language.spec import Spec
from attngen.schedule.choice import device_identity
from attngen.store import Shape
from attngen.tuning.attends import check_names, example
from attngen.tuning.bench import Inputs
from attngen.tuning.check import Reference, WrongResult
from attngen.tuning.peers import PEERS, Built, Problem, Unavailable
from attngen.tuning.race import Race, Timing, race
from attngen.tuning.stopwatch import Candidate, Clock, stopwatch_for

OK, WRONG, FAILED, UNAVAILABLE = "ok", "wrong", "failed", "not available"
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Row:
    """What came of one peer. error: its error over what the rule allows; ratio: its median over attngen's; note: how it does it, or why
    it has no time.
    """

    peer: str
    status: str
    note: str = ""
    error: float | None = None
    timing: Timing | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Peers on one call. made_up: captures that nobody gave."""

    spec: str
    shape: str
    dtype: str
    direction: str
    device: str
    rows: tuple[Row, ...]
    made_up: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; seconds."""
        return asdict(self)


def compare(
    spec: Spec,
    shape: Shape,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    direction: str = "forward",
    captures: Mapping[str, Any] | None = None,
    seconds: float = 2.0,
    db: str | None = None,
    peers: Sequence[str] = tuple(PEERS),
    starting: Callable[[str], None] = lambda peer: None,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Comparison:
    """Time attngen and its peers on random inputs of a shape.

    direction: "forward", or "backward" alone, whose forward is not timed. captures: as of `ag.tune`; others are made up. seconds: of the
    race in which all take turns, after a warm-up that does not count. A peer whose result is not the oracle's, by the rules of
    `attngen.tuning.check`, is not timed. starting: called with the name of what is prepared, "" for the race. InputError.
    """
    if direction not in DIRECTIONS:
        raise InputError("direction", f"one of {', '.join(DIRECTIONS)}", repr(direction))
    if spec.keys is not None or spec.page_size is not None or spec.dropout is not None:
        what = "keys" if spec.keys is not None else "pages" if spec.page_size is not None else "dropout"
        raise InputError("spec", "a mask and a score, which SDPA or FlexAttention can compute too", f"one with {what}")
    check_names(spec, captures or {})
    device, backward = torch.device(device), direction == "backward"
    problem, made_up = _problem(spec, shape, dtype, device, captures, backward, seed)
    reference, found = Reference(problem), dict[str, Row]()
    ready: dict[str, Candidate] = {}
    torch._dynamo.reset()  # recompiles of earlier calls would end in the eager path
    for peer in peers:
        starting(peer)
        try:
            built = PEERS[peer](problem, db)
            found[peer] = Row(peer, OK, built.note, error=reference.error(*_results(built, problem)))
            ready[peer] = _candidate(built, problem)
        except Exception as error:  # a peer may fail in any way it likes
            found[peer] = _failure(peer, error)
    starting("")
    raced = race(ready, stopwatch_for(device, clock), seconds, clock=clock)
    rows = [_timed(found[peer], raced) for peer in found]
    return Comparison(
        spec.text, str(shape), str(dtype).removeprefix("torch."), direction, device_identity(device).name,
        tuple(rows), tuple(made_up),
    )  # fmt: skip


def _problem(
    spec: Spec,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    captures: Mapping[str, Any] | None,
    backward: bool,
    seed: int,
) -> tuple[Problem, list[str]]:
    (q, k, v), named, _ = example(spec, shape, dtype, captures, device=device, seed=seed)
    made_up = [name for name in (*spec.params, *spec.tensors) if name not in (captures or {})]
    offset = named.pop("q_offset")
    d_out = torch.randn(
        *q.shape[:3], v.shape[3], generator=torch.Generator(device).manual_seed(seed + 1), device=device
    )
    for tensor in (q, k, v):
        tensor.requires_grad_(backward)
    return Problem(spec, Inputs(q, k, v, d_out.to(dtype), named, offset), backward), made_up


def _results(built: Built, problem: Problem) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """out, and for a backward the gradients by name."""
    with torch.set_grad_enabled(problem.backward):
        out = built.run()
        if not problem.backward:
            return out, {}
        leaves = {"q": problem.q, "k": problem.k, "v": problem.v}
        grads = torch.autograd.grad(out, list(leaves.values()), problem.d_out)
    return out.detach(), dict(zip(leaves, grads, strict=True))


def _candidate(built: Built, problem: Problem) -> Candidate:
    """What is timed."""
    if problem.backward:
        leaves = [problem.q, problem.k, problem.v]
        return Candidate(built.run, lambda out: torch.autograd.grad(out, leaves, problem.d_out))

    def forward(_: Any) -> torch.Tensor:
        with torch.no_grad():
            return built.run()

    return Candidate(lambda: None, forward)


def _failure(peer: str, error: Exception) -> Row:
    if isinstance(error, WrongResult):
        known = error.error if error.error < torch.inf else None
        return Row(peer, WRONG, str(error), error=known)
    if isinstance(error, Unavailable):
        return Row(peer, UNAVAILABLE, str(error))
    return Row(peer, FAILED, _one_line(f"{type(error).__name__}: {error}"))


def _timed(row: Row, raced: Race) -> Row:
    if row.peer in raced.failed:
        return Row(row.peer, FAILED, _one_line(raced.failed[row.peer]), error=row.error)
    if row.peer not in raced.times:
        return row
    compared = "attngen" in raced.times and row.peer != "attngen"
    ratio = raced.ratio(row.peer, "attngen") if compared else None
    return Row(row.peer, row.status, row.note, row.error, raced.timings[row.peer], ratio)


def _one_line(text: str) -> str:
    """Short, and without the paths of this machine."""
    return re.sub(r"(?<![\w.])(?:/[\w.+@~-]+)+/([\w.+@~-]+)", r"\1", " ".join(text.split()))[:300]


# -- the chart --------------------------------------------------------------------------------------------------------

COLOURS = {"attngen": "#d6336c", "SDPA": "#2f9e44", "FlexAttention": "#1971c2"}


def chart(comparisons: Sequence[Comparison], path: Path) -> bool:
    """Bars of the times with 20th and 80th percentile, a group for each comparison, as a PNG. False if nothing was timed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [(one, [row for row in one.rows if row.timing is not None]) for one in comparisons]
    lines = sum(len(rows) + 1 for _, rows in timed)
    if not any(rows for _, rows in timed):
        return False
    figure, panel = plt.subplots(figsize=(9, 1.2 + 0.32 * lines), layout="constrained")
    place, places, names = 0, list[int](), list[str]()
    for one, rows in timed:
        panel.text(0, place, f"{one.shape} {one.dtype} {one.direction}", fontsize=8, va="center")
        for row in rows:
            place, timing = place + 1, row.timing
            assert timing is not None
            spread = [[1e3 * (timing.median - timing.p20)], [1e3 * (timing.p80 - timing.median)]]
            panel.barh(place, 1e3 * timing.median, xerr=spread, color=COLOURS[row.peer], height=0.7, capsize=2)
            label = "" if row.ratio is None else f"  {row.ratio:.2f}x"
            panel.text(1e3 * timing.p80, place, label, fontsize=8, va="center")
            places.append(place)
            names.append(row.peer)
        place += 1
    panel.set_yticks(places, names, fontsize=8)
    panel.set_ylim(place, -0.8)
    panel.margins(x=0.12)
    panel.set_xlabel("milliseconds; beside a bar its time over attngen's", fontsize=8)
    first = comparisons[0]
    panel.set_title(f"{' '.join(first.spec.split())[:90]}\n{first.device}, torch {torch.__version__}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
