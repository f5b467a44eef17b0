"""How one attention is computed on one device: facts, schedule and backend, decided once per dtype, head dims and shape bucket."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from attngen import backends, debug
from attngen.analysis import Facts, facts
from attngen.language.call import Call
from attngen.runtime import first_tiles
from attngen.runtime.executor import check_positive_params
from attngen.schedule import Schedule
from attngen.schedule.choice import choose, shape_bucket


@dataclass(frozen=True, eq=False)
class Specialised:
    """What the stages made of a spec for one dtype, head dims, shape bucket and device."""

    facts: Facts
    schedule: Schedule
    origin: str  # where the schedule came from, in words
    backend: ModuleType


class Specialiser:
    """Decides for every attention that a compiled one is made of. pins, backend, db: as for `attngen.compile`."""

    def __init__(self, pins: Schedule, backend: str, db: str | None):
        self.pins, self.backend_name, self.db = pins, backend, db
        self.known: dict[Any, Specialised] = {}

    def backend(self, device: torch.device) -> ModuleType:
        """The module that runs attention on a device."""
        return backends.module(backends.pick(self.backend_name, device))

    def of(self, call: Call) -> Specialised:
        """Cached by everything that may change the outcome."""
        q = call.q
        key = call.spec.key, q.device, q.dtype, q.shape[3], call.v.shape[3], shape_bucket(call), call.wants_grad
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = self._decide(call)
        check_positive_params(found.facts, call)
        return found

    def _decide(self, call: Call) -> Specialised:
        known, name = facts(call.spec), backends.pick(self.backend_name, call.q.device)
        with debug.timed("choosing a schedule"):
            schedule, origin = choose(
                call, known, name, self.pins.over(call.spec.schedule), self.db, first_tiles.search
            )
        debug.say(1, "choice", f"backend {name}; {origin}")
        debug.say(3, "schedule", schedule)
        debug.say(3, "facts", known)
        debug.say(5, "spec", call.spec)
        return Specialised(known, schedule, origin, backends.module(name))
