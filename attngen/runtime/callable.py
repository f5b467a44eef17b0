"""What is called: from the arguments of a call to the executable that runs it. Whoever brings a spec and an executor has an attention:
`attngen.compile` from the symbolic language, a pack from plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from attngen.analysis.call_facts import facts_of
from attngen.errors import InputError
from attngen.language.call import Call, for_all_batches, number_of
from attngen.language.keyset import KeySet
from attngen.language.plain import PLAIN
from attngen.plan.forward import bound, family_of, forward_plan
from attngen.plan.keysets.ragged import LENGTHS, ragged_of
from attngen.plan.plan import Sizes
from attngen.plan.planner import register_families
from attngen.runtime import operators
from attngen.runtime.executable import Executable
from attngen.runtime.executor import Executor
from attngen.runtime.preparation import Preparation
from attngen.runtime.signature import MOST, Known, signature_of

if TYPE_CHECKING:
    from attngen.language.spec import Spec

MOST_EXECUTABLES = 256  # sizes of a key set's calls that are kept planned


class Attention:
    """An attention to call, see `attngen.runtime.attention.CompiledAttention`.

    handle: by which traced graphs find it, the same in every process.
    """

    def __init__(self, spec: Spec, executor: Executor, handle: str):
        self.spec, self.handle = spec, handle
        self._executor = executor
        self._executables: dict[Any, Executable] = {}
        self._known: dict[Any, Known] = {}
        operators.register(handle, self)
        if spec.keys is not None:
            register_families()

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        return_lse: bool = False,
        q_offset: int | torch.Tensor = 0,
        plan: Preparation | None = None,
        **captures: Any,
    ) -> Any:
        k, v = self.for_all_batches(q, k, v)
        result = operators.apply(self, q, k, v, q_offset, plan, captures)
        return result if return_lse else result[0]

    def prepare(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, q_offset: int | torch.Tensor = 0, **captures: Any
    ) -> Preparation:
        """What such a call prepares (sorting, hashing, sampling, lists and tables of tiles). Pass it as `plan=` to calls of the
        same sizes, in other layers and steps, and leave out the captures that only the preparation reads. Captured tensors
        that the mask reads have to be the same then; an InputError names one that is not. Raises InputError for a call that
        prepares nothing.
        """
        k, v = self.for_all_batches(q, k, v)
        keys, own, rest = self.split(captures)
        if keys is None and not self._walks_tables():
            raise InputError("plan", "a spec with keys=, or a mask of captured data", "neither", "nothing is prepared")
        call, given = self._prepared_call(keys, q, k, v, q_offset, own, rest)
        executable, sizes = self.executable(keys, call, given)
        with torch.no_grad():
            return executable.prepare(call, given, sizes)

    plan = prepare

    def backend_of(self, device: torch.device) -> str:
        """The name of the backend that runs calls on a device. InputError."""
        raise NotImplementedError

    def keeps(self, keys: KeySet | None, call: Call) -> bool:
        """Whether a traced forward's third result is what a large lse lacks: for kernels, where a call is one attention; else it
        is empty.
        """
        if keys is not None or self.backend_of(call.q.device) in ("cpu", "meta"):
            return False
        return bool(facts_of(self.spec).restores(call.q.dtype))

    def looks_twice(self, keys: KeySet | None) -> bool:
        """Whether every call is looked at once more, by `look`."""
        return False

    def look(self, keys: KeySet | None, call: Call, given: Mapping[str, Any]) -> None:
        """InputError for what only a slow look finds."""

    def _bind(self, keys: KeySet | None, sizes: Sizes, backend: str) -> Executable:
        return Executable(self.spec, keys, forward_plan(self.spec, keys, sizes, backend), self._executor, backend)

    def cast(
        self, dtype: torch.dtype, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Mapping[str, Any]]:
        """q, k, v, and captures that are rows of k or v, as autocast wants them: float32 ones in `dtype`."""

        def low(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x

        rows = () if self.spec.keys is None else self.spec.keys.rows
        changed = {name: tree_map(low, captures[name]) for name in rows if name in captures}
        return low(q), low(k), low(v), {**captures, **changed} if changed else captures

    def for_all_batches(self, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        """k and v of a batch of 1 serve every batch of q, see `attngen.language.call.for_all_batches`. InputError for nested
        tensors.
        """
        for name, x in (("q", q), ("k", k), ("v", v)):
            if isinstance(x, torch.Tensor) and x.is_nested:
                fix = "pack it: x.values() as [1, H, total, D], with cu_q= and cu_k= the offsets()"
                raise InputError(name, "a tensor [B, H, N, D]", "a nested tensor", fix)
        return for_all_batches(self.spec, q, k, v)

    def split(self, captures: Mapping[str, Any]) -> tuple[KeySet | None, dict[str, Any], dict[str, Any]]:
        """The key set that a call has (the spec's, or the lengths of a ragged one), its captures, and the spec's. InputError for
        a name that neither has.
        """
        spec = self.spec
        present = [name for name, value in captures.items() if value is not None or name not in (*LENGTHS, "scale")]
        keys = spec.keys if spec.keys is not None else ragged_of(spec, present)
        own = () if keys is None else keys.captures()
        for name in present:
            if name not in own and name not in spec.tensors and name not in spec.call_params:
                names = ", ".join(sorted({*own, *spec.tensors, *spec.params})) or "it has none"
                raise InputError(name, f"one of this spec's captures ({names})", "an unknown name")
        given = {name: value for name, value in captures.items() if name in own}
        return keys, given, {name: captures[name] for name in present if name not in own}

    def checked(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_offset: Any,
        captures: Mapping[str, Any],
        preparation: Preparation | None = None,
    ) -> tuple[Call, dict[str, Any], Executable]:
        """The checked call, the key set's captures, and what runs it. InputError."""
        key = signature_of(q, k, v, q_offset, captures, preparation)
        known = None if key is None else self._known.get(key)
        if known is not None and not self.looks_twice(known.keys):
            call = known.call(self.spec, q, k, v, q_offset, captures)
            if call is not None:
                given = {} if known.keys is None else self._read(known.keys, known.own(captures), q, k, preparation)
                if preparation is not None:
                    preparation.check_values(call, given)
                return call, given, known.executable
        keys, given, rest = self.split(captures)
        if preparation is not None and not isinstance(preparation, Preparation):
            raise InputError("plan", "what attn.plan(...) returns", type(preparation).__name__)
        if preparation is not None and keys is None and not self._walks_tables():
            raise InputError("plan", "nothing, for a spec without keys= that prepares nothing", "a plan")
        if keys is not None:
            given = self._read(keys, given, q, k, preparation)
        call = bound(self.spec, keys, q, k, v, q_offset, rest, given)
        executable, sizes = self.executable(keys, call, given, preparation)
        if self.looks_twice(keys):
            self.look(keys, call, given)
        if preparation is not None:
            preparation.check(self.spec, keys, sizes, call, given)
        if key is not None and (keys is None or family_of(keys).bind is None):
            found = Known.of(call, captures, keys, executable)
            if found is not None:
                if len(self._known) >= MOST:
                    self._known.clear()
                self._known[key] = found
        return call, given, executable

    def executable(
        self, keys: KeySet | None, call: Call, given: Mapping[str, Any], preparation: Preparation | None = None
    ) -> tuple[Executable, Sizes]:
        """The plans for a call of these sizes, and the sizes. A closed-form mask has one plan for all."""
        backend = self.backend_of(call.q.device)
        sizes = _sizes(call, given)
        if preparation is not None:  # what is not given now was then
            now = dict(sizes.given)
            sizes = replace(sizes, given=tuple(sorted({**dict(preparation.sizes.given), **now}.items())))
        key = backend if keys is None else (backend, keys, sizes)
        found = self._executables.get(key)
        if found is None:
            found = self._executables[key] = self._bind(keys, sizes, backend)
            if len(self._executables) > MOST_EXECUTABLES:
                self._executables.pop(next(iter(self._executables)), None)
        return found, sizes

    def _read(
        self, keys: KeySet, given: dict[str, Any], q: Any, k: Any, preparation: Preparation | None
    ) -> dict[str, Any]:
        """The key set's captures as tensors and numbers; with a preparation only those that every call reads."""
        if preparation is not None:
            for name in given:
                if name in keys.prepared and name not in keys.used and given[name] is not None:
                    raise InputError(name, "nothing next to a plan, which holds what was made from it", "a value")
            if not set(given) & set(keys.used):
                return {}
        read = family_of(keys).read
        found = dict(given) if read is None else read(keys, given, q, k)
        return {name: value for name, value in found.items() if value is not None}

    def _prepared_call(
        self, keys: KeySet | None, q: Any, k: Any, v: Any, q_offset: Any, own: dict[str, Any], rest: dict[str, Any]
    ) -> tuple[Call, dict[str, Any]]:
        """The call as far as a preparation needs it: captures that only the score reads may be missing."""
        given = {} if keys is None else self._read(keys, own, q, k, None)
        named = {name: value for name, value in rest.items() if value is not None}
        missing = [name for name in (*self.spec.tensors, *self.spec.params) if name not in named]
        if not missing:
            return bound(self.spec, keys, q, k, v, q_offset, named, given), given
        call = bound(PLAIN, keys, q, k, v, q_offset, {}, given)
        tensors = {name: value for name, value in named.items() if name in self.spec.tensors}
        params = {name: value for name, value in named.items() if name in self.spec.call_params}
        return replace(call, spec=self.spec, captures=tensors, params=params), given

    def _walks_tables(self) -> bool:
        """Whether tiles are found by summaries of captured data."""
        return self.spec.lists is None and facts_of(self.spec).walk_keys.needs_tables

    # -- what traced calls go through, with captures as tensors and numbers --------------------------------------------

    def unfolded(self, captures: Mapping[str, Any], q: Any, k: Any, preparation: Preparation | None) -> dict[str, Any]:
        """The captures of a call as tensors and numbers, and checked by name. InputError."""
        keys, given, rest = self.split(captures)
        if preparation is not None and not isinstance(preparation, Preparation):
            raise InputError("plan", "what attn.plan(...) returns", type(preparation).__name__)
        given = {} if keys is None else self._read(keys, given, q, k, preparation)
        for name in (*self.spec.tensors, *self.spec.params):
            if rest.get(name) is None:
                text = self.spec.tensors[name].text() if name in self.spec.tensors else f"param {name}"
                raise InputError(name, text, "nothing", f"pass {name}=... at the call")
        for name, param in self.spec.call_params.items():
            if name in rest:
                rest[name] = number_of(param, rest[name])
        for name in self.spec.tensors:
            if not isinstance(rest[name], torch.Tensor):
                raise InputError(name, "a torch.Tensor", type(rest[name]).__name__)
        return {**rest, **given}

    def is_float(self, name: str) -> bool:
        """Whether a number is a float by declaration."""
        return name in self.spec.call_params and self.spec.call_params[name].number_kind == "float"

    def bound_unfolded(
        self, q: Any, k: Any, v: Any, q_offset: Any, named: Mapping[str, Any], values: bool = False
    ) -> tuple[KeySet | None, Call, dict[str, Any]]:
        """The call's key set, the checked call and the key set's captures, from what `unfolded` made. values: look at the values
        of indices too. InputError.
        """
        own = [name for name in named if name not in self.spec.tensors and name not in self.spec.call_params]
        keys = self.spec.keys if self.spec.keys is not None else ragged_of(self.spec, own)
        given = {name: named[name] for name in own}
        rest = {name: value for name, value in named.items() if name not in given}
        return keys, bound(self.spec, keys, q, k, v, q_offset, rest, given, values), given

    def checked_unfolded(
        self, q: Any, k: Any, v: Any, q_offset: Any, named: Mapping[str, Any], values: bool = True
    ) -> tuple[Call, dict[str, Any], Executable]:
        """`checked`, of what `unfolded` made."""
        keys, call, given = self.bound_unfolded(q, k, v, q_offset, named, values)
        return call, given, self.executable(keys, call, given)[0]


def _sizes(call: Call, given: Mapping[str, Any]) -> Sizes:
    batch, heads, n_q, head_dim = call.q.shape
    shapes = {name: tuple(value.shape) if isinstance(value, torch.Tensor) else () for name, value in given.items()}
    return Sizes(
        int(batch),
        int(heads),
        int(call.k.shape[1]),
        int(n_q),
        int(call.k.shape[2]),
        int(head_dim),
        int(call.v.shape[3]),
        "tensor" if isinstance(call.q_offset, torch.Tensor) else "int",
        tuple(sorted(shapes.items())),
    )
