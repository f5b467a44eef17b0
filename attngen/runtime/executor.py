"""The one executor: runs the steps of a plan over named buffers, on every backend, for every spec."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from attngen import debug
from attngen.errors import InputError
from attngen.language.call import Call
from attngen.language.indices import check_indices
from attngen.language.schedule import Schedule
from attngen.plan.merging import merge_parts
from attngen.plan.plan import Plan
from attngen.plan.steps import (
    Attend,
    CaptureGradient,
    Delta,
    Derive,
    Difference,
    Merge,
    Prepare,
    Put,
    Step,
    Tables,
    Take,
)

Buffers = dict[str, Any]
KEPT = ".kept"  # behind a step's name: what its backend keeps for the backward


class Specialised(Protocol):
    """How one attention is computed, see `attngen.runtime.specialise`."""

    @property
    def facts(self) -> Any: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def backend(self) -> Any: ...


class Specialiser(Protocol):
    """Who decides it."""

    def of(self, call: Call) -> Specialised:
        """For a call of an attention's inner spec."""

    def backend(self, device: torch.device) -> Any:
        """What runs attention on a device, see `attngen.backends`."""


def check_positive_params(known: Any, call: Call) -> None:
    """InputError for a param that the mask divides by and that is below 1."""
    for name in known.positive & call.params.keys() if known.positive else ():
        if call.params[name] < 1:
            raise InputError(name, "at least 1, since the mask divides by it", call.params[name])


MOST_KNOWN = 256  # sizes of the attentions of one signature's calls, where they depend on values


class Executor:
    """Runs plans for one compiled attention. `specialise` decides how each of its `Attend` steps is computed."""

    def __init__(self, specialiser: Specialiser):
        self.specialiser = specialiser

    def run(self, plan: Plan, call: Call, buffers: Buffers) -> None:
        """Run the steps whose writes are not there yet. buffers: inputs and what was prepared; results and the plan's `saved`
        are left in it.
        """
        for step, prepares, released in plan.course:
            if prepares and self._there(plan, step, call, buffers):
                continue
            _RUN[type(step)](self, plan, step, call, buffers)
            for name in released:
                buffers.pop(name, None)

    def look(self, plan: Plan, call: Call, buffers: Buffers) -> list[tuple[Attend, Call]]:
        """Each `Attend` with the call that it would get: what they read is made and left in `buffers`, no attention runs."""
        found, absent = [], set[str]()
        for step in plan.steps:
            if absent & {*step.reads}:
                absent |= {*step.writes}
            elif isinstance(step, Attend):
                found.append((step, self.inner(step, call, buffers)))
                absent |= {*step.writes}
            elif not (isinstance(step, Prepare) and self._there(plan, step, call, buffers)):
                _RUN[type(step)](self, plan, step, call, buffers)
        return found

    def prepare(self, plan: Plan, call: Call, given: Mapping[str, Any], buffers: Buffers) -> None:
        """Run the steps that serve many calls. Tables of captures that are not given are left to the call."""
        with torch.no_grad():
            for step in plan.preparation:
                if self._there(plan, step, call, buffers):
                    continue
                if isinstance(step, Tables):
                    if {*step.reads} <= buffers.keys() and {*step.params} <= call.params.keys():
                        _tables(self, plan, step, call, buffers)
                else:
                    buffers |= step.make(call, given)

    def _there(self, plan: Plan, step: Any, call: Call, buffers: Mapping[str, Any]) -> bool:
        """Whether what a step makes is there already: tables only if they are of the tiles that this call has."""
        if not step.writes or not all(write in buffers for write in step.writes):
            return False
        if not isinstance(step, Tables):
            return True
        tiles = call.known.get(step.name)
        if tiles is None:
            attend = plan.attend(step.attend)
            inner = self.shaped(plan, attend, call, buffers)
            stages = self.stages(attend, inner, call)
            tiles = stages.backend.table_tiles(inner, stages.schedule, step.kernel)
            if attend.operands == ("q", "k", "v"):  # else sizes may depend on values
                call.known[step.name] = tiles
        return all(buffers[write].shape[-1] == tiles for write in step.writes)

    def inner(self, step: Attend, call: Call, buffers: Mapping[str, Any]) -> Call:
        """The call of one `Attend`."""
        spec = step.spec
        if step.operands == ("q", "k", "v") and spec is call.spec and step.offset:
            return call
        captures = {name: _read(step, buffers, buffer) for name, buffer in step.captures}
        q, k, v = (_read(step, buffers, x) for x in step.operands)
        return Call(spec, q, k, v, captures, call.params_of(spec), call.q_offset if step.offset else 0, call.wants_grad)

    def stages(self, step: Attend, inner: Call, call: Call) -> Specialised:
        """How an `Attend` is computed: decided once for calls with one signature, and again where sizes depend on values."""
        key = step.name, inner.q.shape, inner.k.shape, inner.wants_grad
        found: Specialised | None = call.known.get(key)
        if found is None:
            if len(call.known) >= MOST_KNOWN:
                call.known.clear()
            found = call.known[key] = self.specialiser.of(inner)
        elif found.facts.positive:
            check_positive_params(found.facts, inner)
        return found

    def shaped(self, plan: Plan, step: Attend, call: Call, buffers: Mapping[str, Any]) -> Call:
        """The call of an `Attend` whose rows may not have been taken yet: tensors of the right sizes, without values."""

        def sized(buffer: str) -> torch.Tensor:
            if buffer in buffers:
                return buffers[buffer]
            made = plan.made.get(buffer)
            if isinstance(made, Take):
                source = sized(made.reads[0])
                index = None if made.index is None else buffers[made.index].shape
                shape = made.move.shape(source.shape, index)
                return source.new_empty(()).expand(*shape, *source.shape[3:])
            if isinstance(made, Derive):  # scaled rows: as many as there were
                return sized(made.reads[made.writes.index(buffer)])
            raise InputError(buffer, f"a value for the step {step.name!r}", "nothing", "pass it at the call")

        q, k, v = (sized(x) for x in step.operands)
        captures = {name: buffers[buffer] for name, buffer in step.captures if buffer in buffers}
        params = call.params_of(step.spec)
        return Call(step.spec, q, k, v, captures, params, call.q_offset if step.offset else 0, call.wants_grad)


def inputs_of(call: Call, given: Mapping[str, Any]) -> Buffers:
    """The buffers that a call brings."""
    buffers: Buffers = {"q": call.q, "k": call.k, "v": call.v, **call.captures, **given}
    if isinstance(call.q_offset, torch.Tensor):
        buffers["q_offset"] = call.q_offset
    return buffers


def _read(step: Step, buffers: Mapping[str, Any], name: str) -> Any:
    value = buffers.get(name)
    if value is None:
        raise InputError(name, f"a value for the step {step.name!r}", "nothing", f"pass {name}=... at the call")
    return value


# -- how each kind of step is run -------------------------------------------------------------------------------------


def _prepare(executor: Executor, plan: Plan, step: Prepare, call: Call, buffers: Buffers) -> None:
    with torch.no_grad(), debug.timed(step.name):
        buffers |= step.make(call, buffers)


def _tables(executor: Executor, plan: Plan, step: Tables, call: Call, buffers: Buffers) -> None:
    """int32 [B or 1, H or 1, tiles] each, for the tiles that the schedule of the `Attend` has."""
    attend = plan.attend(step.attend)
    inner = executor.shaped(plan, attend, call, buffers)
    stages = executor.stages(attend, inner, call)
    with torch.no_grad(), debug.timed(step.name):
        found = stages.backend.tables(inner, stages.facts, stages.schedule, step.kernel)
    buffers |= {write: found[symbol] for write, symbol in zip(step.writes, step.symbols, strict=True)}


def _derive(executor: Executor, plan: Plan, step: Derive, call: Call, buffers: Buffers) -> None:
    values = step.make(call, *(buffers.get(name) for name in step.reads))
    buffers |= zip(step.writes, values, strict=True)


def _take(executor: Executor, plan: Plan, step: Take, call: Call, buffers: Buffers) -> None:
    index = None if step.index is None else buffers[step.index]
    for name, written, fill in zip(step.moved, step.writes, step.fills, strict=True):
        buffers[written] = step.move.apply(buffers[name], index, fill)


def _attend(executor: Executor, plan: Plan, step: Attend, call: Call, buffers: Buffers) -> None:
    inner = executor.inner(step, call, buffers)
    stages = executor.stages(step, inner, call)
    if step.tables:
        inner.tables = {
            kernel: {symbol: buffers[buffer] for symbol, buffer in named if buffer in buffers}
            for kernel, named in step.tables
        }
    if step.direction == "forward":
        if step.looks:
            check_indices(inner)
        if call.wants_grad:
            *result, kept = stages.backend.forward_keeping(inner, stages.facts, stages.schedule)
            if kept is not None:
                buffers[f"{step.name}{KEPT}"] = kept
        else:
            result = stages.backend.forward(inner, stages.facts, stages.schedule)
        buffers |= zip(step.writes, result, strict=True)
        return
    assert step.given is not None
    do, lse, delta = (buffers[name] for name in step.given)
    kept = buffers.get(f"{step.name.removesuffix(', backward')}{KEPT}")
    differentiate, wanted = stages.backend.backward, list(step.wanted)
    *own, captured = differentiate(inner, stages.facts, stages.schedule, lse, delta, do, wanted, kept)
    for name, value in zip(step.writes, (*own, *(captured[name] for name in step.wanted)), strict=True):
        _add(buffers, name, value)


def _add(buffers: Buffers, name: str, value: torch.Tensor) -> None:
    """Gradients of several steps for one buffer add up."""
    total = buffers.get(name)
    buffers[name] = value if total is None else total + value


def _merge(executor: Executor, plan: Plan, step: Merge, call: Call, buffers: Buffers) -> None:
    parts = []
    for part in step.parts:
        out, lse = buffers[part.result.out], buffers[part.result.lse]
        if part.shift is not None:
            lse = lse + buffers[part.shift]
        parts.append((out, lse, None if part.rows is None else buffers[part.rows]))
    sink = None if step.sink is None else buffers[step.sink]
    shape = parts[0][1].shape if parts[0][2] is None else (*call.q.shape[:2], step.rows)
    buffers |= zip(step.writes, merge_parts(shape, parts, sink), strict=True)


def _put(executor: Executor, plan: Plan, step: Put, call: Call, buffers: Buffers) -> None:
    index = None if step.index is None else buffers[step.index]
    if step.into is None:
        for name, written, fill in zip(step.reads, step.writes, (0.0, -torch.inf), strict=False):
            buffers[written] = step.move.put(buffers[name], index, step.shape, fill)
        return
    (total,) = step.writes
    shape = buffers[step.into].shape[:3]
    buffers[total] = step.move.back(buffers[step.reads[0]], index, shape, buffers.get(total))


def _difference(executor: Executor, plan: Plan, step: Difference, call: Call, buffers: Buffers) -> None:
    *firsts, factor, lse = (buffers[name] for name in step.reads)
    first, second = firsts if len(firsts) == 2 else firsts[0].chunk(2, -1)
    out = (first - factor.unsqueeze(-1) * second).to(first.dtype)
    buffers |= zip(step.writes, (out, lse), strict=True)


def _delta(executor: Executor, plan: Plan, step: Delta, call: Call, buffers: Buffers) -> None:
    out, do, dlse = (buffers[name] for name in step.reads)
    buffers[step.writes[0]] = executor.specialiser.backend(call.q.device).delta(out, do, dlse)


def _capture_gradient(executor: Executor, plan: Plan, step: CaptureGradient, call: Call, buffers: Buffers) -> None:
    if step.derive is None:
        share, delta = (buffers[name] for name in step.reads)
        _add(buffers, step.writes[0], -share * delta)
        return
    derive = step.derive
    with torch.enable_grad(), _above_autograd():
        reads = [buffers.get(name) for name in derive.reads]
        leaves = {
            name: value.detach().requires_grad_()
            for name, value in zip(derive.reads, reads, strict=True)
            if name in step.wanted and value is not None
        }
        made = derive.make(call, *(leaves.get(n, value) for n, value in zip(derive.reads, reads, strict=True)))
        named = dict(zip(derive.writes, made, strict=True))
        # Of what it made some may depend on nothing that is wanted.
        pairs = [(named[name], buffers[f"d {name}"]) for name in step.made if named[name].requires_grad]
        outputs, grads = [x for x, _ in pairs], [grad.to(x.dtype) for x, grad in pairs]
        found: Any = [None] * len(leaves)
        if outputs:
            found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    for name, leaf, gradient in zip(step.writes, leaves.values(), found, strict=True):
        _add(buffers, name, torch.zeros_like(leaf) if gradient is None else gradient)


@contextmanager
def _above_autograd() -> Iterator[None]:
    """An operator of torch.library runs below autograd; what is differentiated here needs it, wherever the call came from."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


_AUTOGRAD = [
    getattr(torch._C.DispatchKey, name)
    for name in ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView")
]

_RUN: dict[type[Step], Callable[..., None]] = {
    Prepare: _prepare,
    Tables: _tables,
    Derive: _derive,
    Take: _take,
    Attend: _attend,
    Merge: _merge,
    Put: _put,
    Difference: _difference,
    Delta: _delta,
    CaptureGradient: _capture_gradient,
}
