"""Running a suite: case by case, within a budget, written as it goes, resumed where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from benchmarks import expected, measure, prepare
from benchmarks.case import Case
from benchmarks.measure import FAILED, OK, UNAVAILABLE, Context, Record, describe, failure

Measure = Callable[[Case, tuple[str, ...], Context], Iterator[Record]]

MEASURES: Mapping[str, Measure] = {
    "planning": prepare.planning,
    "first_call": prepare.first_call,
    "overhead": measure.overhead,
}  # every other suite measures attention itself

SCHEMA = 1


class Mixed(Exception):
    """Results in the file are from another machine, version or size."""


class DeviceLost(Exception):
    """The device answers no more: a new process has to go on."""


def write_json(path: Path, data: Any) -> None:
    """The whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _drivers(had: str | None, now: str | None) -> str | None:
    """All that a file's records were measured with: machines of one kind that are lent one after the other differ in that alone."""
    return ", ".join(dict.fromkeys(name for name in (*(had or "").split(", "), now) if name)) or now


class Results:
    """One suite's file. Everything is on disk after each `add`, and a write never leaves half a file."""

    def __init__(self, path: Path, setting: Mapping[str, Any], resume: bool):
        self.path = path
        self.data: dict[str, Any] = {"schema": SCHEMA, "suite": path.stem, "setting": dict(setting), "records": []}
        if resume and path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))
            had = {**self.data["setting"], "schema": self.data["schema"]}
            changed = {**setting, "schema": SCHEMA, "driver": _drivers(had.get("driver"), setting.get("driver"))}
            self.data["setting"]["driver"] = had["driver"] = changed["driver"]
            differing = [name for name in changed if had.get(name) != changed[name]]
            if differing:
                raise Mixed(
                    f"{path.name} was measured with {', '.join(f'{n} {had.get(n)} (now {changed[n]})' for n in differing)}: "
                    "run without --resume to start over, or choose another --out"
                )

    def of(self, case: str) -> dict[str, dict[str, Any]]:
        """The case's records by peer."""
        return {record["peer"]: record for record in self.data["records"] if record["case"] == case}

    def add(self, record: Record) -> None:
        """Keep it in place of an older one of the same case and peer."""
        name = (record.case, record.peer)
        self.data["records"] = [r for r in self.data["records"] if (r["case"], r["peer"]) != name]
        self.data["records"].append(record.to_json())
        self.write()

    def forget(self, case: str, peers: Iterable[str]) -> None:
        """Drop the records of that case and these peers, to be measured again."""
        dropped = {(case, peer) for peer in peers}
        self.data["records"] = [r for r in self.data["records"] if (r["case"], r["peer"]) not in dropped]
        self.write()

    def start(self, case: str, peer: str) -> None:
        """Note what is about to run: if the process ends there, the next one knows."""
        self.data["running"] = [case, peer]
        self.write()

    def lost(self) -> tuple[str, str] | None:
        """The case and peer during which earlier processes ended, twice: once may have been a time limit. A race (peer "")
        is nobody's fault.
        """
        case, peer = self.data.pop("running", None) or ("", "")
        if not peer:
            return None
        ends = self.data.setdefault("ended", [])
        ends.append([case, peer])
        return (case, peer) if ends.count([case, peer]) > 1 else None

    def write(self) -> None:
        """Atomically."""
        write_json(self.path, self.data)


def run(
    cases: Sequence[Case],
    results: Results,
    context: Context,
    budget: float,
    say: Callable[[str], None] = print,
) -> bool:
    """Measure what is missing; True when nothing is left. Stops before a case that is likely to exceed `budget` seconds. Raises
    DeviceLost.
    """
    by_id = {case.id: case for case in cases}
    if len(by_id) != len(cases):
        raise ValueError("two cases of one suite have the same id")
    if (lost := results.lost()) and lost[0] in by_id:
        results.add(failure(by_id[lost[0]], lost[1], RuntimeError("the process ended or was killed meanwhile, twice")))
    begun, pace = context.clock(), 0.0  # the most seconds that a case took of each modelled one
    for number, case in enumerate(cases, 1):
        known = results.of(case.id)
        if all(peer in known for peer in case.peers):
            continue
        started = context.clock()
        modelled = expected.seconds(case, context.seconds)
        if pace and started - begun + pace * modelled > budget:
            say(f"stopped at case {number} of {len(cases)} after {started - begun:.0f} s: run again with --resume")
            return False
        # A case is timed in one race or not at all: those that already failed stay out, all others run (again).
        peers = tuple(peer for peer in case.peers if peer not in known or known[peer]["status"] == OK)
        _case(case, peers, results, context, say, f"[{number}/{len(cases)}]")
        pace = max(pace, (context.clock() - started) / modelled)
    for name in ("running", "ended"):
        results.data.pop(name, None)
    results.write()
    return True


def so_far(cases: Sequence[Case], results: Results) -> str:
    """How many cases have records, and how attngen stands to the best peer in them."""
    known = [results.of(case.id) for case in cases]
    done = sum(set(case.peers) <= set(found) for case, found in zip(cases, known, strict=True))
    records = [record for found in known for record in found.values()]
    ratios = [r["ratio"] for r in records if r["peer"] == "attngen" and r.get("ratio")]
    text = f"{done} of {len(cases)} cases"
    if ratios:
        text += (
            f", attngen {geometric_mean(ratios):.2f}x the best peer's speed ({min(ratios):.2f} .. {max(ratios):.2f})"
        )
    bad = [f"{r['peer']} {r['status']} in {r['case']}" for r in records if r["status"] not in (OK, UNAVAILABLE)]
    return text + (f"; {len(bad)} NOT ok: {'; '.join(bad[:3])}" if bad else "")


def _case(
    case: Case, peers: tuple[str, ...], results: Results, context: Context, say: Callable[[str], None], place: str
) -> None:
    say(f"{place} {case.id}")
    told = replace(context, starting=lambda peer: results.start(case.id, peer))
    action = MEASURES.get(case.suite, measure.attention)
    statuses: dict[str, str] = {}
    try:
        for record in action(case, peers, told):
            results.add(record)
            statuses[record.peer] = record.status
            say(f"      {line(record)}")
    except Exception as error:  # of the harness or its reference, not of one peer
        for peer in peers:
            if peer not in statuses:
                results.add(Record(case.id, peer, FAILED, failure(case, peer, error).reason, described=describe(case)))
                statuses[peer] = FAILED
        say(f"      {failure(case, '', error).reason}")
    try:
        measure.synchronize(context.device)
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
    except Exception as error:
        # Once the device is lost everything fails: only the first to do so may be the reason.
        failed = [peer for peer, status in statuses.items() if status == FAILED]
        results.forget(case.id, failed[1:])
        raise DeviceLost(f"the device is lost ({failure(case, '', error).reason}): run again with --resume") from error


def line(record: Record) -> str:
    """A record for the terminal."""
    if record.status != OK or record.timing is None:
        return f"{record.peer:<18} {record.status}: {record.reason}"
    t = record.timing
    parts = [f"{record.peer:<18} {1e3 * t.median:10.4g} ms ({1e3 * t.p20:.4g} .. {1e3 * t.p80:.4g}, {t.runs} runs)"]
    if record.unit not in ("ms", "s"):
        parts.append(f"{record.figure:.4g} {record.unit}")
    if record.bound_fraction is not None:
        parts.append(f"{record.bound_fraction:.0%} of the modelled bound ({record.bound_limit})")
    if record.ratio is not None:
        parts.append(f"{record.ratio:.2f}x {record.best_peer}")
    return ", ".join(parts)
