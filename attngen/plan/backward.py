"""The plan of a backward call, derived from the forward's.

Every part of a union has the same P = exp(s - lse) and dS = P (dP - delta) with the lse and the delta of the whole, so that
nothing is merged on the way back: a part takes the rows of dO, lse and delta that it has, and the parts' gradients add up.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attngen.analysis import facts
from attngen.language.call import Call
from attngen.plan.moves import Move, Rows
from attngen.plan.plan import Plan
from attngen.plan.planner import tables_of
from attngen.plan.steps import (
    Attend,
    CaptureGradient,
    Delta,
    Derive,
    Difference,
    Given,
    Merge,
    Put,
    Step,
    Take,
)

FILLS = (0.0, -torch.inf, 0.0)  # of dO, lse and delta in rows that are not there: P is 0


def backward_plan(forward: Plan, wanted: frozenset[str], backend: str) -> Plan:
    """The gradients of the inputs in `wanted` (q, k, v, captures): buffers "d NAME". Besides inputs and what was prepared it
    reads out, lse, do, dlse, and the forward's `saved` buffers. Rows are taken again, not kept.
    """
    return _Backward(forward, wanted, backend).plan()


def saved_by(forward: Plan, backward: Plan) -> tuple[str, ...]:
    """Buffers that a forward has to keep for the backward, besides its preparation and results."""
    kept = {*forward.prepared, *forward.results, "out", "lse"}
    return tuple(buffer for buffer in backward.inputs if buffer in forward.made and buffer not in kept)


class _Backward:
    def __init__(self, forward: Plan, wanted: frozenset[str], backend: str):
        self.forward, self.wanted, self.backend = forward, wanted, backend
        # What depends on a wanted input, so that its gradient leads somewhere.
        self.reached = set(wanted)
        for step in forward.steps:
            if isinstance(step, (Take, Derive)) and self.reached & {*step.reads}:
                self.reached |= {*step.writes}
        self.steps: list[Step] = []
        self.given: dict[str, Given] = {}  # by a result's out buffer

    def plan(self) -> Plan:
        again = [s for s in self.forward.steps if not isinstance(s, (Attend, Merge, Put, Difference))]
        self.steps += again
        self.steps.append(Delta("delta", ("out", "do", "dlse"), ("delta",)))
        self.given[self.forward.results[0]] = Given("do", "lse", "delta")
        for step in reversed(self.forward.steps):
            match step:
                case Merge():
                    self._merge(step)
                case Put():
                    self._put(step)
                case Difference():
                    self._difference(step)
                case Attend():
                    self._attend(step)
                case Take():
                    self._take(step)
                case Derive():
                    self._derive(step)
        results = tuple(f"d {name}" for name in sorted(self.wanted))
        return Plan.ordered(self.forward.spec, self.forward.sizes, self.steps, results)

    def _merge(self, step: Merge) -> None:
        given = self.given[step.writes[0]]
        for number, part in enumerate(step.parts):
            own = given
            if part.rows is not None:
                own = self._taken(f"{step.name}, part {number}", given, Rows(), part.rows)
            if part.shift is not None:
                shifted = f"{own.lse} less {part.shift}"
                self.steps.append(Derive(shifted, (own.lse, part.shift), (shifted,), make=_less))
                own = own._replace(lse=shifted)
            self.given[part.result.out] = own
        if step.sink is not None and step.sink in self.reached:
            self.steps.append(
                CaptureGradient("gradient of the sink", (step.sink, given.lse, given.delta), (f"d {step.sink}",))
            )

    def _put(self, step: Put) -> None:
        given = self.given[step.writes[0]]
        self.given[step.reads[0]] = self._taken(step.name, given, step.move, step.index)

    def _taken(self, name: str, given: Given, move: Move, index: str | None) -> Given:
        """The rows of dO, lse and delta that a result has."""
        own = Given(*(f"{name}: {buffer}" for buffer in ("do", "lse", "delta")))
        reads = (*given,) if index is None else (*given, index)
        self.steps.append(Take(f"take for {name}", reads, own, move=move, fills=FILLS))
        return own

    def _difference(self, step: Difference) -> None:
        """out = first - factor * second: dO of the second is -factor * dO, and dfactor = -rowsum(P-weighted second * dO)."""
        given = self.given[step.writes[0]]
        *firsts, factor, lse = step.reads
        negated = f"{step.name}: do of the second"
        name = f"{step.name}: do"
        if len(firsts) == 1:
            self.steps.append(Derive(name, (given.do, factor), (name,), make=_both_sides))
            self.given[firsts[0]] = given._replace(do=name)
        else:
            nothing = f"{step.name}: no delta"  # it is in the first's dS already
            self.steps.append(Derive(negated, (given.do, factor), (negated,), make=_times_minus))
            self.steps.append(Derive(nothing, (given.delta,), (nothing,), make=_zeros))
            self.given[firsts[0]] = given
            self.given[firsts[1]] = Given(negated, given.lse, nothing)
        if factor in self.reached:
            reads = (firsts[-1], lse, given.do, given.lse)
            self.steps.append(Derive(f"d {factor}", reads, (f"d {factor}",), make=_factor_gradient))

    def _attend(self, step: Attend) -> None:
        given = self.given[step.writes[0]]
        known = facts(step.spec)
        learned = {**known.load_grads, **known.sink_grads}
        weighted = {"edge_weight"} if step.spec.lists is not None and "edge_weight" in step.spec.lists.names else set()
        buffers = dict(step.captures)
        wanted = tuple(n for n in step.spec.tensors if (n in learned or n in weighted) and buffers[n] in self.reached)
        if not wanted and not {*step.operands} & self.reached:
            return
        own = [b for b in step.reads if b not in tables_buffers(step)]
        reads = [*own, *given]
        named = []
        for kernel in ("dq",) if self.backend == "cpu" else ("dq", "dkv"):  # the CPU makes one pass
            tables = tables_of(step.name, step.spec, step.captures, kernel, self._each_call, step.operands)
            if tables is not None:
                self.steps.append(tables)
                reads += tables.writes
                named.append(tables.named)
        writes = (*(f"d {x}" for x in step.operands), *(f"d {buffers[name]}" for name in wanted))
        self.steps.append(
            replace(
                step,
                name=f"{step.name}, backward",
                reads=tuple(dict.fromkeys(reads)),
                writes=writes,
                direction="backward",
                wanted=wanted,
                given=given,
                tables=tuple(named),
            )
        )

    @property
    def _each_call(self) -> set[str]:
        kept = {*self.forward.prepared, *self.forward.inputs}
        return {b for step in self.forward.steps for b in step.writes if b not in kept}

    def _take(self, step: Take) -> None:
        (x,) = step.moved
        if x not in self.reached:
            return
        own = f"d {step.writes[0]}"
        reads = (own,) if step.index is None else (own, step.index)
        self.steps.append(Put(f"add {own}", (*reads, x), (f"d {x}",), move=step.move, into=x))

    def _derive(self, step: Derive) -> None:
        wanted = tuple(read for read in step.reads if read in self.reached)
        made = {b for s in self.steps for b in s.writes}
        grads = [write for write in step.writes if f"d {write}" in made]
        if not wanted or not grads:
            return
        self.steps.append(
            CaptureGradient(
                f"gradient through {step.name}",
                (*(f"d {write}" for write in grads), *step.reads),
                tuple(f"d {read}" for read in wanted),
                derive=step,
                made=tuple(grads),
                wanted=wanted,
            )
        )


def tables_buffers(step: Attend) -> set[str]:
    """The buffers of the forward's tables among what a step reads."""
    return {read for read in step.reads if read.startswith(f"{step.name}: ")}


def _less(call: Call, lse: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor]:
    return (lse - shift,)


def _zeros(call: Call, delta: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.zeros_like(delta),)


def _times_minus(call: Call, do: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor]:
    return ((do * -factor.unsqueeze(-1)).to(do.dtype),)


def _both_sides(call: Call, do: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.cat([do, *_times_minus(call, do, factor)], -1),)


def _factor_gradient(
    call: Call, second: torch.Tensor, own: torch.Tensor, do: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor]:
    """second: the second's own out, or both side by side; own: its lse; lse: that of the whole attention."""
    second = second[..., -do.shape[-1] :]
    share = torch.exp(own - torch.where(lse == -torch.inf, torch.inf, lse))
    return (-share * (do * second).sum(-1, dtype=lse.dtype),)
