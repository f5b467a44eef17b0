"""`tune`: for each shape and each piece of the plan a search, its result in the database, and a report."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attngen.backends.worker import Worker
from attngen.errors import AttngenWarning, InputError, StoreError
from attngen.language.spec import Spec
from attngen.store import (
    MAX_SPEC,
    Found,
    Key,
    Record,
    Shape,
    Store,
    Workload,
    cache_folder,
    is_url,
    open_store,
    time_text,
    utc_now,
)
from attngen.tuning.attends import check_names
from attngen.tuning.effort import effort_named
from attngen.tuning.jobs import Job, jobs_of
from attngen.tuning.measure import Measurer, Outcome, WorkerMeasurer
from attngen.tuning.model import ModelMeasurer
from attngen.tuning.progress import Bars, shown
from attngen.tuning.search import NoModel, Result, Search, count
from attngen.tuning.space import PIECES, Point, Space
from attngen.tuning.study import Tried
from attngen.tuning.target_device import find_target_device
from attngen.tuning.trials import Trials

FEW = 4  # searches whose results the report's last line tells one by one
Shapes = Iterable[Shape | str | Mapping[str, int] | Sequence[Any]]


@dataclass(frozen=True)
class Tuned:
    """What became of one attention and direction. name: of the workload; part: its step in the plan, "" for a plain call. record: the best
    schedule, now in the database, or None if nothing worked; start: the untuned schedule's time in the same final race, if it
    ran.
    """

    name: str
    part: str
    piece: str
    shape: Shape
    record: Record | None
    start: float | None
    result: Result
    seconds: float  # that the search took

    @property
    def skipped(self) -> bool:
        """Whether an earlier call had finished it."""
        return self.seconds == 0 and self.record is not None

    @property
    def title(self) -> str:
        return ", ".join(filter(None, [self.name, self.part, self.piece]))

    @property
    def gain(self) -> float | None:
        """How many times as fast as the untuned schedule the best one was in the final race; None where they did not race."""
        return self.start / self.record.seconds if self.start and self.record is not None else None

    @property
    def won(self) -> str:
        """In a few words: "forward 1.23 ms, 1.18x the untuned speed"."""
        if self.record is None:
            return f"{self.title}: no schedule worked"
        gain = f"{self.gain:.2f}x the untuned speed" if self.gain is not None else ""
        doubts = ["too noisy"] * self.record.noisy
        return ", ".join(filter(None, [f"{self.title} {time_text(self.record.seconds)}", gain, *doubts]))

    def __str__(self) -> str:
        progress = self.result.progress
        counts = f"{progress.done} trials, {progress.failed} failed, {progress.pruned} pruned by the model"
        if progress.resumed:
            counts = f"resumed at {progress.resumed}; " + counts
        if self.skipped:
            return f"{self.title} {self.shape}: finished before, {self.record.time_text}"  # type: ignore[union-attr]
        lines = [f"{self.title} {self.shape}: {counts}; {self.seconds:.1f} s, ended by {_ENDED[self.result.ended]}"]
        if self.record is None:
            reasons = {tried.outcome.reason for tried in self.result.failures}
            lines.append("  no schedule worked" + "".join(f"\n  - {reason}" for reason in sorted(reasons)[:5]))
            return "\n".join(lines)
        record = self.record
        schedule = ", ".join(f"{name}={value}" for name, value in record.schedule.items())
        gain = f", {self.gain:.2f}x the untuned schedule's speed" if self.gain is not None else ""
        lines.append(f"  {record.time_text}{gain}")
        lines.append(f"  {schedule}")
        return "\n".join(lines)


_ENDED = {
    "trials": "the number of trials",
    "exhausted": "running out of schedules",
    "timeout": "the time limit",
    "interrupted": "Ctrl-C; what was learned is kept",
}


@dataclass(frozen=True)
class TuneReport:
    """The results in the order of the shapes; `str()` is for people."""

    results: tuple[Tuned, ...]
    device: str
    kind: str
    database: str  # the file, or the URL without its password
    interrupted: bool
    made_up: tuple[str, ...]  # captures that the caller did not give

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(tuned.record for tuned in self.results if tuned.record is not None)

    def __str__(self) -> str:
        return self._text(self.results)

    @property
    def brief(self) -> str:
        """The same of many calls: in full only those for which nothing worked, or that were broken off."""
        return self._text(
            one for one in self.results if one.record is None or one.result.ended in ("timeout", "interrupted")
        )

    def _text(self, results: Iterable[Tuned]) -> str:
        lines = [f"{self.kind} on {self.device}" if self.kind == "measured" else f"modelled for {self.device}"]
        if self.made_up:
            lines.append(f"made-up values for {', '.join(self.made_up)}; give real ones with captures=")
        lines += [str(tuned) for tuned in results]
        lines.append(f"records kept in {self.database}: {len(self.records)}")
        lines.append(self.won)
        return "\n".join(lines)

    @property
    def won(self) -> str:
        """What the tuning was good for, in a line. It stands last, where one looks first."""
        gains = sorted(one.gain for one in self.results if one.gain is not None)
        if len(self.results) <= FEW:
            words = "; ".join(one.won for one in self.results) or "nothing was tuned"
        elif gains:
            middle = statistics.median(gains)
            words = f"{len(gains)} raced: {gains[0]:.2f}x to {gains[-1]:.2f}x the untuned speed, median {middle:.2f}x"
        else:
            words = f"none of {len(self.results)} raced the untuned schedule"
        return f"{self.kind}: {words}"


def tune(
    spec: Spec | str,
    shapes: Shapes,
    *,
    dtype: torch.dtype | None = None,
    effort: str = "standard",
    trials: int | None = None,
    db: str | Path | None = None,
    target: str | None = None,
    device: torch.device | str | None = None,
    timeout: float | None = None,
    candidate_timeout: float = 60.0,
    storage: str | Path | None = None,
    progress: bool = True,
    captures: Mapping[str, Any] | None = None,
    pieces: Sequence[str] = ("forward", "backward"),
    tighten: bool = True,
    patience: float | None = None,
    seed: int = 0,
) -> TuneReport:
    """Search for the fastest schedules and remember them.

    shapes: each a text "B1 Hq8 Hkv2 N4096 D64", (B, H, N, D), the shapes of q, k and v, or a `Shape`.
    dtype: of q, k, v; by default bfloat16 on a GPU and float32 on a CPU.
    effort: "quick" (the model's choice and two guesses: 3 trials), "standard" (40) or "full" (150, in longer races).
    trials: measured or failed candidates that each shape and piece shall have in all, whatever the effort: a second call resumes
        the study and does what is missing. Candidates that the model refuses do not count.
    db: the record database, a file or a fleet's postgresql:// URL; None for the user's.
    storage: the trials, a file or an Optuna URL; by default a file in the cache folder, or the database of `db` if that is a
        URL. With one storage the same call in many processes, on many machines, is one search: they share the trials, and one
        of them runs the final race for all. One that is killed is not waited for.
    target: a GPU to model when it is not here ("H200", "sm_90"); records then say modelled.
    device: where to measure.
    timeout: seconds for the whole call.
    candidate_timeout: seconds for one candidate, then it counts as failed.
    captures: values for the spec's tensors and params, its key set's (layout=, keep_q=, seed=, page_table=, ...), and lengths
        (k_len=, cu_q=, cu_k=); except for lengths what is not given is made up, by the rules of `make_captures` and
        `attngen.reference.samples`, and the report names it.

    A call with a key set, ragged lengths or pages is made of several attentions: each is searched at the sizes and with the
    captures that it really gets, and its record is found by every call that has it. Equal ones are searched once.

    tighten: search near the best when suggesting takes longer than measuring.
    patience: seconds of each race, by default the effort's.

    A final race whose winner's times are more than `attngen.store.NOISY` apart is run again, twice at most and for longer; what is
    noisy even then is kept with an `AttngenWarning`, and marked in the report, `attngen db ls` and `attn.explain`.

    Ctrl-C ends the call early: what was learned is kept and reported. Raises InputError, ScheduleError, StoreError.
    """
    spec = Spec.from_text(spec) if isinstance(spec, str) else spec
    if not isinstance(spec, Spec):
        raise InputError("spec", "a Spec or its text", type(spec).__name__)
    sizes = [Shape.of(shapes)] if isinstance(shapes, (Shape, str)) else [Shape.of(shape) for shape in shapes]
    if not sizes:
        raise InputError("shapes", "at least one shape", "none", "e.g. shapes=['B1 H8 N4096 D64']")
    element = "" if dtype is None else str(dtype).removeprefix("torch.")
    return tune_all(
        [Workload("", spec, shape, element, captures or {}, tuple(pieces)) for shape in sizes],
        effort=effort,
        trials=trials,
        db=db,
        target=target,
        device=device,
        timeout=timeout,
        candidate_timeout=candidate_timeout,
        storage=storage,
        progress=progress,
        tighten=tighten,
        patience=patience,
        seed=seed,
    )


def tune_all(
    workloads: Sequence[Workload],
    *,
    effort: str = "standard",
    trials: int | None = None,
    db: str | Path | None = None,
    target: str | None = None,
    device: torch.device | str | None = None,
    timeout: float | None = None,
    candidate_timeout: float = 60.0,
    storage: str | Path | None = None,
    progress: bool = True,
    tighten: bool = True,
    patience: float | None = None,
    seed: int = 0,
) -> TuneReport:
    """`tune` for calls of many specs, as those of a model. What is finished already is skipped, which its result says. A spec that
    more than one call has is searched once for each exact shape. Raises InputError, ScheduleError, StoreError.
    """
    chosen = effort_named(effort, trials, patience)
    for one in workloads:
        _check_workload(one)
    target_device = find_target_device(target, device)
    store = open_store(db)
    store.put()  # a database that can't be written is said now, and not after the search
    deadline = time.monotonic() + timeout if timeout is not None else float("inf")
    results: list[Tuned] = []
    interrupted, made_up = False, list[str]()
    worker = Worker({}, candidate_timeout)
    searches = sum(len(one.directions) for one in workloads)
    try:
        with shown(searches, chosen.trials, progress) as bars:
            for job in jobs_of(workloads, target_device, seed, candidate_timeout, made_up):
                if interrupted or (results and time.monotonic() >= deadline):
                    break
                tuned = _tune_one(
                    job,
                    store,
                    storage,
                    worker,
                    bars,
                    trials=chosen.trials,
                    deadline=deadline,
                    tighten=tighten,
                    patience=chosen.patience,
                )
                results.append(tuned)
                interrupted = tuned.result.ended == "interrupted"
    except KeyboardInterrupt:  # between two searches
        interrupted = True
    finally:
        worker.close()
    device_name, kind = target_device.device.name, target_device.kind
    return TuneReport(tuple(results), device_name, kind, store.name, interrupted, tuple(made_up))


def _tune_one(
    job: Job,
    store: Store,
    storage: str | Path | None,
    worker: Worker,
    bars: Bars,
    *,
    trials: int,
    deadline: float,
    tighten: bool,
    patience: float,
) -> Tuned:
    started = time.monotonic()
    space, base = job.space
    study = Trials(_storage(storage, store, job), job.study, job.seed, job.about)
    today = _todays(store, job.key)
    if today is not None and today.key == job.key and today.kind == job.target_device.kind:
        finished = count(study.history())
        if finished.done >= min(trials, space.size - finished.pruned):  # the same command again costs nothing
            finished.trials, finished.resumed = trials, finished.done
            finished.kept = Tried(today.schedule, Outcome("ok", today.seconds, today.spread, today.error))
            bars.skipped(job.title, f"finished before, {today.time_text}")
            return Tuned(
                job.name, job.part.name, job.piece, job.shape, today, None, Result(None, (), finished, "trials"), 0.0
            )
    incumbent = _point(today, space)
    folder = Path(tempfile.mkdtemp(prefix="attngen-tune-"))
    worker.begin(job.request(base, folder), job.limit)
    saved: list[Record] = []
    with _removed(folder), bars.search(job.title) as watch:
        model = job.target_device.model(job, worker)
        measurer: Measurer = (
            WorkerMeasurer(worker) if model is None or job.target_device.kind == "measured" else ModelMeasurer(model)
        )
        search = Search(
            space,
            measurer,
            study,
            trials,
            first=[incumbent] if incumbent is not None else [],
            deadline=deadline,
            watch=watch,
            keep=partial(_keep, store, job, saved),
            seed=job.seed,
            model=model or NoModel(),
            tighten=tighten,
            patience=patience,
        )
        result = search.run()
    record = _settle(store, job, result, saved)
    if record is not None and record.noisy:
        fix = "the schedule may be no better than another; tune again when the machine is idle, or with more patience="
        warnings.warn(AttngenWarning(f"{job.piece} {job.shape}: {record.time_text}: {fix}"), stacklevel=4)
    untuned = next((t.outcome.seconds for t in result.final if t.point == space.start and t.outcome.ok), None)
    return Tuned(job.name, job.part.name, job.piece, job.shape, record, untuned, result, time.monotonic() - started)


def _keep(store: Store, job: Job, saved: list[Record], best: Tried) -> None:
    """Write each new best at once: even a killed tuner has taught something."""
    record = _record(job, best)
    try:
        store.put(record)
        saved.append(record)
    except StoreError as problem:
        warnings.warn(AttngenWarning(f"not saved: {problem}"), stacklevel=2)


def _settle(store: Store, job: Job, result: Result, saved: list[Record]) -> Record | None:
    """The final race's word replaces what was written on the way, and the time of a record that lost it."""
    if result.best is None:
        return None
    record = _record(job, result.best)
    if not result.final:  # interrupted: the best so far is written already, unless it is from an earlier call
        _keep(store, job, saved, result.best)
        return record
    raced = {json.dumps(tried.point, sort_keys=True) for tried in result.final}
    try:
        for old in store.records():
            if old.key == record.key and json.dumps(old.schedule, sort_keys=True) in raced:
                store.put(record, supersede=old)
                return record
        store.put(record)
    except StoreError as problem:
        warnings.warn(AttngenWarning(f"not saved: {problem}"), stacklevel=2)
    return record


def _record(job: Job, tried: Tried) -> Record:
    outcome = tried.outcome
    return Record(
        key=job.key,
        schedule=tried.point,
        seconds=_rounded(outcome.seconds),
        spread=_rounded(outcome.spread),
        kind=job.target_device.kind,
        error=_rounded(outcome.error),
        made_at=utc_now(),
        source=f"attngen tune, {job.shape}",
        spec=job.spec.text if len(job.spec.text) <= MAX_SPEC else "",
    )


def _rounded(value: float) -> float:
    """Four digits: more are noise, and records are read by people."""
    return float(f"{value:.4g}")


def _todays(store: Store, key: Key) -> Record | None:
    """The record that a call would use today."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tuning makes the database that may be missing; a bad one is said when writing
        found: Found | None = store.lookup(key)
    return None if found is None else found.record


def _point(record: Record | None, space: Space) -> Point | None:
    """A record's schedule as a point of the space, if it is one."""
    if record is None:
        return None
    point = {name: record.schedule.get(name) for name in space.choices}
    return point if space.holds(point) else None


def _storage(storage: str | Path | None, store: Store, job: Job) -> str | Path:
    """By default where a fleet's records are, else a journal file for each study, in the cache folder."""
    if storage is None and is_url(store.place):
        return str(store.place)
    if storage is not None:
        return storage if is_url(storage) else Path(storage)
    return cache_folder() / "trials" / f"{job.identity}.journal"


def _check_workload(one: Workload) -> None:
    for piece in one.directions:
        if piece not in PIECES:
            raise InputError("pieces", f"some of {', '.join(PIECES)}", repr(piece))
    check_names(one.spec, one.captures)


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    """The folder is gone afterwards."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
