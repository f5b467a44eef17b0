"""`compile`: from a spec to something to call, lazily specialised per dtype, head dims, shape bucket and device."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from attngen import backends, debug
from attngen.errors import InputError, SpecError
from attngen.language.call import Call
from attngen.language.keyset import KeySet
from attngen.language.keysets.union import Union
from attngen.language.spec import Spec
from attngen.plan.plan import Sizes
from attngen.plan.steps import Attend
from attngen.reference.disjoint import check_disjoint
from attngen.runtime import pipeline
from attngen.runtime.callable import Attention
from attngen.runtime.executable import Executable, tensors_of
from attngen.runtime.executor import Executor
from attngen.runtime.preparation import Preparation
from attngen.runtime.specialise import Specialiser
from attngen.schedule import Schedule

BACKENDS = ("auto", "triton", "interpret", "cpu")
MOST_EXECUTABLES = 256  # sizes of a key set's calls that are kept planned


def compile(
    spec: Spec | str,
    *,
    schedule: Schedule | None = None,
    backend: str = "auto",
    db: str | None = None,
) -> CompiledAttention:
    """A callable attention for this spec.

    spec: a `Spec`, or its text.
    schedule: decisions the tuner and the database may not change (over those in the spec).
    backend: "auto" picks by the tensors' device ("triton" on a GPU, "cpu" on a CPU); "interpret" runs the generated
        Triton source in Triton's interpreter, for tests.
    db: path of the record database, None for the user's.

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


class CompiledAttention(Attention):
    """attn(q, k, v, *, return_lse=False, q_offset=0, plan=None, group=None, scale=None, **captures) -> out, or (out, lse).

    q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] of one dtype and device, Hkv dividing Hq; any strides. out
    [B, Hq, Nq, Dv] in that dtype; lse [B, Hq, Nq] float32, natural log, -inf for a row that sees no key (whose out is 0). k and
    v of batch 1 serve every batch.

    q_offset: what is added to a query's row to get its position, an int or an int tensor [B].
    captures: the spec's tensors and params by name, and those of its key set.
    plan: what `prepare` made.
    scale: a float above 0 in the place of the spec's factor on q.k (of a union, of every piece's); another value compiles no
        kernel (under torch.compile a float that changes is a new graph, as for SDPA).
    group: a process group whose ranks hold a contiguous part of the sequence each, see `attngen.ring`.

    Ragged batches, without a key set:

    k_len: int [B], rows of k from k_len[b] on are not there.
    k_offset: the position of k's first row, an int or int [B], as in a sliding cache.
    cu_q, cu_k: int [S + 1], the ends of S sequences packed into a batch of 1; b, i and j then are a sequence's number and
        positions in it, q_offset an int or [S], captures [S, ...] along b.

    Differentiable in q, k, v and float captured tensors. Raises InputError.
    """

    def __init__(self, spec: Spec, pins: Schedule, backend: str, db: str | None):
        self.pins, self.backend, self.db = pins, backend, db
        identity = json.dumps([spec.key, pins.decided(), backend, db], sort_keys=True)
        self.specialiser = Specialiser(pins, backend, db)
        super().__init__(spec, Executor(self.specialiser), hashlib.sha256(identity.encode()).hexdigest()[:32])
        # For calls whose seed= is a tensor. Made here: whoever traces a call cannot.
        seeded = spec.with_seed_on_device
        self._seeded = CompiledAttention(seeded, pins, backend, db) if seeded is not spec else None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        return_lse: bool = False,
        q_offset: int | torch.Tensor = 0,
        plan: Preparation | None = None,
        group: Any = None,
        **captures: Any,
    ) -> Any:
        if group is not None:
            return _above("attngen.distributed.ring").ring(self, group)(
                q, k, v, return_lse=return_lse, q_offset=q_offset, **captures
            )
        if (seeded := self._with_seed(captures)) is not None:
            return seeded(q, k, v, return_lse=return_lse, q_offset=q_offset, plan=plan, **captures)
        return super().__call__(q, k, v, return_lse=return_lse, q_offset=q_offset, plan=plan, **captures)

    def prepare(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, q_offset: int | torch.Tensor = 0, **captures: Any
    ) -> Preparation:
        """What such a call prepares (sorting, hashing, sampling, lists and tables of tiles). Pass it as `plan=` to calls of the
        same sizes, in other layers and steps, and leave out the captures that only the preparation reads. Captured tensors
        that the mask reads have to be the same then; an InputError names one that is not. Raises InputError for a call that
        prepares nothing.
        """
        prepare = super().prepare if (seeded := self._with_seed(captures)) is None else seeded.prepare
        return prepare(q, k, v, q_offset=q_offset, **captures)

    plan = prepare

    def __reduce__(self) -> Any:
        return CompiledAttention, (self.spec, self.pins, self.backend, self.db)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledAttention:
        return self  # immutable but for caches

    def __repr__(self) -> str:
        return f"<attngen.compile({self.spec!r}, backend={self.backend!r}, schedule: {self.pins})>"

    def _with_seed(self, captures: Mapping[str, Any]) -> CompiledAttention | None:
        """What serves a call whose seed= is a tensor; None for other calls."""
        return self._seeded if isinstance(captures.get("seed"), torch.Tensor) else None

    def backend_of(self, device: torch.device) -> str:
        """The name of the backend that runs calls on a device. InputError."""
        return backends.pick(self.backend, device)

    def looks_twice(self, keys: KeySet | None) -> bool:
        """Whether pieces of a union are checked for pairs that two of them have: while debugging."""
        return isinstance(keys, Union) and debug.level() >= 1

    def look(self, keys: KeySet | None, call: Call, given: Mapping[str, Any]) -> None:
        """InputError for pairs that two pieces of a union have."""
        assert isinstance(keys, Union)
        check_disjoint(keys.specs, call, given)

    def _bind(self, keys: KeySet | None, sizes: Sizes, backend: str) -> Executable:
        return pipeline.bind(self.spec, keys, sizes, self._executor, backend)

    # -- looking inside -----------------------------------------------------------------------------------------------

    def attends(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        q_offset: Any = 0,
        patient: bool = True,
        **captures: Any,
    ) -> list[tuple[Attend, Call]]:
        """The ordinary attentions that such a call is made of, each with the call that it gets: what tuning, `explain` and
        counting bytes look at. Prepares and moves rows, and runs no attention. patient: whether sizes may depend on values where
        a call would let them (on a CPU); False plans as on a GPU. InputError.
        """
        if (seeded := self._with_seed(captures)) is not None:
            return seeded.attends(q, k, v, q_offset=q_offset, patient=patient, **captures)
        k, v = self.for_all_batches(q, k, v)
        call, given, executable = self.checked(q, k, v, q_offset, captures)
        call.patient = patient
        call.wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(call, given).values())
        return executable.attends(call, given)[0]

    def explain(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        q_offset: Any = 0,
        png: str | Path | None = None,
        html: str | Path | None = None,
        **captures: Any,
    ) -> str:
        """Text: the plan of both directions, and of each attention in it the mask's picture, tile counts, cost bound, the schedule
        and where it came from, alternatives.

        png: a file to draw the plan into.
        html: a file for the same as one page that loads nothing else, with live intervals and the generated sources.
        """
        own = self._with_seed(captures) or self
        return _above("attngen.inspect.explain").explain(own, q, k, v, q_offset, captures, png, html)

    def source(
        self,
        kernel: str = "forward",
        *,
        head_dim: int,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        target: str = "sm_90",
    ) -> str:
        """The generated Triton file of a kernel: "forward", or of the backward "delta", "dq", "dkv"; with a mask also
        "forward_guarded", "dq_guarded", "dkv_guarded", and where captured data decide the tiles "tables". target: an architecture
        or a GPU ("H100"). InputError names the kernels, ScheduleError the targets.
        """
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        return pipeline.source_of(self.spec, kernel, head_dim, head_dim_v, dtype, target, self.pins).text


def _above(module: str) -> Any:
    """A layer above this one, which plugs in by name: nothing here depends on it, and it loads when it is asked for."""
    return importlib.import_module(module)
