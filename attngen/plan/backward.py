"""The plan of a backward call, derived from the forward's.

A part of a union has weights of its own, P = exp(s - lse) with its own lse, of which the whole takes a share w (what the merge
weighs it with). So a part is differentiated like any attention: by its lse, w dO and w delta, where delta = rowsum(dO * O) - dlse
is the whole's: dV = (w P)^T dO = P^T (w dO) and dS = w P (dP - delta) = P ((w dO) V^T - w delta). Weights then sum to 1 however
large the logits are, which exp(s - lse of the whole) would not. The parts' gradients add up.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from attngen.analysis.call_facts import facts_of
from attngen.language.call import Call
from attngen.plan.merging import weigh
from attngen.plan.moves import Rows
from attngen.plan.plan import Plan
from attngen.plan.planner import tables_of
from attngen.plan.steps import (
    DELTA,
    DLSE,
    DO,
    LSE,
    OUT,
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


def backward_plan(forward: Plan, wanted: frozenset[str], backend: str) -> Plan:
    """The gradients of the inputs in `wanted` (q, k, v, captures): buffers "d NAME". Besides inputs and what was prepared it
    reads `OUT`, `LSE`, `DO`, `DLSE`, and the forward's `saved` buffers. Rows are taken again, not kept.
    """
    return _Backward(forward, wanted, backend).plan()


def saved_by(forward: Plan, backward: Plan) -> tuple[str, ...]:
    """Buffers that a forward has to keep for the backward, besides its preparation and results."""
    kept = {*forward.prepared, *forward.results, OUT, LSE}
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
        self.steps.append(Delta("delta", (OUT, DO, DLSE), (DELTA,)))
        self.given[self.forward.results[0]] = Given(DO, LSE, DELTA)
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
        names = tuple(f"{step.name}: share of {part.result.out.removesuffix('.out')}" for part in step.parts)
        sunk = () if step.sink is None else (f"{step.name}: share of the sink",)
        lses = tuple(
            buffer for part in step.parts for buffer in (part.result.lse, part.rows, part.shift) if buffer is not None
        )
        reads = (*lses, given.lse, *(() if step.sink is None else (step.sink,)))
        self.steps.append(Derive(f"{step.name}: shares", reads, (*names, *sunk), make=partial(_shares, step)))
        for part, share in zip(step.parts, names, strict=True):
            do, delta = (f"{buffer}, {share}" for buffer in (given.do, given.delta))
            reads = (given.do, given.delta, share, *(() if part.rows is None else (part.rows,)))
            part_name = part.result.out.removesuffix(".out")
            self.steps.append(Derive(f"{part_name}: its share of do", reads, (do, delta), make=_shared))
            self.given[part.result.out] = Given(do, part.result.lse, delta)
        if step.sink is not None and step.sink in self.reached:
            self.steps.append(CaptureGradient("gradient of the sink", (*sunk, given.delta), (f"d {step.sink}",)))

    def _put(self, step: Put) -> None:
        given = self.given[step.writes[0]]
        do, delta = (f"{step.name}: {buffer}" for buffer in (given.do, given.delta))
        reads = (given.do, given.delta, *(() if step.index is None else (step.index,)))
        self.steps.append(Take(f"take for {step.name}", reads, (do, delta), move=step.move, fills=(0.0, 0.0)))
        self.given[step.reads[0]] = Given(do, step.reads[1], delta)

    def _difference(self, step: Difference) -> None:
        """out = first - factor * second: dO of the second is -factor * dO, and dfactor = -rowsum(dO * second)."""
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
            self.given[firsts[1]] = Given(negated, lse, nothing)
        if factor in self.reached:
            reads = (firsts[-1], given.do)
            self.steps.append(Derive(f"d {factor}", reads, (f"d {factor}",), make=_factor_gradient))

    def _attend(self, step: Attend) -> None:
        given = self.given[step.writes[0]]
        known = facts_of(step.spec)
        learned = known.learned
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


def _shares(step: Merge, call: Call, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """How much of each row of the whole is a part's, [B, H, rows of the part], and the sink's. values: of each part its lse, and
    if it has them its rows and shift; the whole's lse; the sink.
    """
    left, parts = iter(values), []
    for part in step.parts:
        lse = next(left)
        rows = None if part.rows is None else next(left)
        parts.append((lse if part.shift is None else lse + next(left), rows))
    whole = next(left)
    found = weigh([(lse.reshape(-1), rows) for lse, rows in parts], whole.numel(), next(left, None))
    shares = tuple(share.view(lse.shape) for share, (lse, _) in zip(found.parts, parts, strict=True))
    return shares if found.sink is None else (*shares, found.sink.view(whole.shape))


def _shared(
    call: Call, do: torch.Tensor, delta: torch.Tensor, share: torch.Tensor, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A part's rows of dO and delta, times its share."""
    if rows is None:
        return (do * share.unsqueeze(-1)).to(do.dtype), delta * share
    taken = Rows().apply(do, rows)
    own = taken.mul_(share.unsqueeze(-1)) if do.dtype == share.dtype else (taken * share.unsqueeze(-1)).to(do.dtype)
    return own, Rows().apply(delta, rows).mul_(share)


def _zeros(call: Call, delta: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.zeros_like(delta),)


def _times_minus(call: Call, do: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor]:
    return ((do * -factor.unsqueeze(-1)).to(do.dtype),)


def _both_sides(call: Call, do: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.cat([do, *_times_minus(call, do, factor)], -1),)


def _factor_gradient(call: Call, second: torch.Tensor, do: torch.Tensor) -> tuple[torch.Tensor]:
    """second: the second's own out, or both side by side."""
    real = torch.promote_types(do.dtype, torch.float32)
    return (-(do * second[..., -do.shape[-1] :]).sum(-1, dtype=real),)
