"""`compile`: from a spec to something to call, lazily specialised per dtype, head dims, shape bucket and device."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attngen import debug
from attngen.analysis import Facts, facts
from attngen.errors import InputError, SpecError
from attngen.language.call import Call
from attngen.language.spec import Spec
from attngen.runtime import operators
from attngen.schedule import Schedule

if TYPE_CHECKING:
    from attngen.plan.keysets import KeyPlan

LENGTHS = ("k_len", "cu_q", "cu_k")  # of ragged batches, unless the spec has a tensor of that name
BACKENDS = ("auto", "triton", "interpret", "cpu")


@dataclass(frozen=True, eq=False)
class Specialised:
    """What the stages made of a spec for one dtype, head dims, shape bucket and device."""

    facts: Facts
    schedule: Schedule
    origin: str  # where the schedule came from, in words
    backend: Any  # the module that runs it: forward(call, specialised), backward(call, specialised, ...)


def compile(
    spec: Spec | str,
    *,
    schedule: Schedule | None = None,
    backend: str = "auto",
    db: str | None = None,
) -> CompiledAttention:
    """A callable attention for this spec.

    schedule: decisions the tuner and the database may not change (over those in the spec).
    backend: "auto" picks by the tensors' device ("triton" on a GPU, "cpu" on a CPU); "interpret" runs the generated
        Triton source in Triton's interpreter, for tests. db: path of the record database, None for the user's.
    Nothing is compiled before the first call. Raises SpecError, ScheduleError, InputError.
    """
    if isinstance(spec, str):
        spec = Spec.from_text(spec)
    if not isinstance(spec, Spec):
        raise SpecError(f"compile: expected a Spec or its text, got {type(spec).__name__}")
    if backend not in BACKENDS:
        raise InputError("backend", f"one of {', '.join(BACKENDS)}", repr(backend))
    pins = (schedule or Schedule()).over(spec.schedule)
    return CompiledAttention(spec, pins, backend, db)


class CompiledAttention:
    """attn(q, k, v, *, return_lse=False, q_offset=0, plan=None, group=None, **captures) -> out, or (out, lse).

    q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] of one dtype and device, Hkv dividing Hq; any strides. out
    [B, Hq, Nq, Dv] in that dtype; lse [B, Hq, Nq] float32, natural log, -inf for a row that sees no key (whose out is 0).
    q_offset: what is added to a query's row to get its position, an int or an int tensor [B]. captures: the spec's tensors
    and params by name, and those of its key set; plan: see `plan`. Ragged batches, without a key set: k_len int [B], keys
    j >= k_len[b] are not there; or cu_q, cu_k int [S + 1], the ends of S sequences packed into a batch of 1 (b, i and j
    then are a sequence's number and positions in it, q_offset an int or [S], captures [S, ...] along b). group: a process
    group whose ranks hold a contiguous part of the sequence each, see `attngen.ring`. Differentiable in q, k, v and float
    captured tensors. Raises InputError.
    """

    def __init__(self, spec: Spec, pins: Schedule, backend: str, db: str | None):
        self.spec, self.pins, self.backend, self.db = spec, pins, backend, db
        identity = json.dumps([spec.key, pins.decided(), backend, db], sort_keys=True)
        self.handle = hashlib.sha256(identity.encode()).hexdigest()[:32]
        self._specialised: dict[Any, Specialised] = {}
        self.pieces: dict[Any, CompiledAttention] = {}  # of a key set, by their role in it
        operators.register(self.handle, self)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        return_lse: bool = False,
        q_offset: int | torch.Tensor = 0,
        plan: KeyPlan | None = None,
        group: Any = None,
        **captures: Any,
    ) -> Any:
        if group is not None:
            from attngen.distributed.ring import ring

            return ring(self, group)(q, k, v, return_lse=return_lse, q_offset=q_offset, **captures)
        if self.spec.keys is not None:
            from attngen.plan.keysets import call

            out, lse = call.run(self, q, k, v, q_offset, plan, captures)
        elif plan is not None:
            raise InputError("plan", "nothing, for a spec without keys=", "a plan")
        elif any(name in captures and name not in self.spec.tensors for name in LENGTHS):
            from attngen.plan.keysets import ragged

            lengths = {
                name: captures.pop(name) for name in LENGTHS if name not in self.spec.tensors and name in captures
            }
            if all(value is None for value in lengths.values()):
                out, lse = operators.apply(self, q, k, v, captures, q_offset)
            else:
                out, lse = ragged.run(self, q, k, v, q_offset, lengths, captures)
        else:
            out, lse = operators.apply(self, q, k, v, captures, q_offset)
        return (out, lse) if return_lse else out

    def plan(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, q_offset: int | torch.Tensor = 0, **captures: Any
    ) -> KeyPlan:
        """What the spec's key set prepares (sorting, hashing, sampling) for such a call: pass it as `plan=` to calls of the
        same sizes, in other layers and steps, and leave out the captures that only the preparation reads. Captured tensors
        that the mask reads have to be the same then: lists of tiles tell which of them it leaves whole.
        """
        from attngen.plan.keysets import call

        return call.plan(self, q, k, v, q_offset, captures)

    def __reduce__(self) -> Any:
        return CompiledAttention, (self.spec, self.pins, self.backend, self.db)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledAttention:
        return self  # immutable but for caches

    def __repr__(self) -> str:
        return f"<attngen.compile({self.spec!r}, backend={self.backend!r}, schedule: {self.pins})>"

    def specialise(self, call: Call) -> Specialised:
        """The stages after the spec, in order; cached by everything that may change their outcome."""
        from attngen import backends
        from attngen.schedule.choice import choose, shape_bucket

        name = backends.pick(self.backend, call.q.device)
        key = (name, call.q.device, call.q.dtype, call.q.shape[3], call.v.shape[3], shape_bucket(call))
        found = self._specialised.get(key)
        if found is None:
            known = facts(self.spec)
            with debug.timed("choosing a schedule"):
                schedule, origin = choose(call, known, name, self.pins, self.db)
            debug.say(1, "choice", f"backend {name}; {origin}")
            debug.say(3, "schedule", schedule)
            debug.say(3, "facts", known)
            debug.say(5, "spec", self.spec)
            found = self._specialised[key] = Specialised(known, schedule, origin, backends.module(name))
        return found

    def run_forward(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of a checked call."""
        stages = self.specialise(call)
        for name in stages.facts.positive:
            if call.params[name] < 1:
                raise InputError(name, "at least 1, since the mask divides by it", call.params[name])
        return stages.backend.forward(call, stages.facts, stages.schedule)

    def run_storing(self, call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """out, lse, and the weights P [B, Hq, Nq, Nk] in lse's dtype."""
        stages = self.specialise(call)
        return stages.backend.forward_storing(call, stages.facts, stages.schedule)

    def run_backward(
        self,
        call: Call,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor,
        wanted: list[str],
        weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """dq, dk, dv and the wanted captures' gradients, each of its tensor's shape. weights: from `run_storing`."""
        stages = self.specialise(call)
        if weights is not None:
            return stages.backend.backward_stored(call, stages.facts, stages.schedule, out, weights, grad_out, grad_lse)
        return stages.backend.backward(call, stages.facts, stages.schedule, out, lse, grad_out, grad_lse, wanted)

    def explain(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, q_offset: Any = 0, **captures: Any) -> str:
        """Text: the mask's picture, tile counts, cost bound, the schedule and where it came from, alternatives."""
        from attngen.inspect.explain import explain
        from attngen.language.call import bind

        if self.spec.keys is not None:
            from attngen.plan.keysets import call

            return call.explain(self, q, k, v, q_offset, captures)
        return explain(self, bind(self.spec, q, k, v, q_offset=q_offset, captures=captures))

    def source(
        self,
        kernel: str = "forward",
        *,
        head_dim: int,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        target: str = "sm_90",
    ) -> str:
        """The generated Triton file of a kernel: "forward", or of the backward "delta", "dq", "dkv"."""
        from attngen.lowering import render
        from attngen.schedule.choice import complete_for

        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        schedule = complete_for(self.spec, target, head_dim, head_dim_v, dtype, self.pins)
        known = facts(self.spec)
        return render(
            self.spec, known, kernel, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, schedule=schedule
        ).text
