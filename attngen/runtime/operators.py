"""attngen as torch sees it: autograd, torch.func, torch.compile, opcheck, autocast.

In eager mode a call is one `torch.autograd.Function`, or nothing at all where no gradient is asked for. Whoever traces
(torch.compile, a fake or other tensor subclass, a dispatch mode) sees two operators, `attngen::forward` and
`attngen::backward`; a call's captures travel as lists, whose names stand in its handle: a string that is the same in every
process. Both end in the same `Executable`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch.autograd import forward_ad

from attngen.errors import InputError
from attngen.language.call import Call, check_offset
from attngen.runtime.executable import Executable, tensors_of
from attngen.runtime.preparation import Preparation

Result = tuple[torch.Tensor, torch.Tensor]


class Attention(Protocol):
    """What operators ask of a compiled attention (`attngen.runtime.attention.CompiledAttention`)."""

    handle: str

    def cast(self, dtype: torch.dtype, q: Any, k: Any, v: Any, captures: Mapping[str, Any]) -> tuple[Any, ...]: ...

    def checked(
        self, q: Any, k: Any, v: Any, q_offset: Any, captures: Mapping[str, Any], preparation: Preparation | None
    ) -> tuple[Call, dict[str, Any], Executable]: ...

    def unfolded(
        self, captures: Mapping[str, Any], q: Any, k: Any, preparation: Preparation | None
    ) -> dict[str, Any]: ...

    def bound_unfolded(
        self, q: Any, k: Any, v: Any, q_offset: Any, named: Mapping[str, Any]
    ) -> tuple[Any, Call, dict[str, Any]]: ...

    def checked_unfolded(
        self, q: Any, k: Any, v: Any, q_offset: Any, named: Mapping[str, Any]
    ) -> tuple[Call, dict[str, Any], Executable]: ...

    def is_float(self, name: str) -> bool: ...

    def keeps(self, keys: Any, call: Call) -> bool: ...


# By handle the attentions that are alive: a traced graph names its own, and whoever can run it holds one.
_registry: dict[str, WeakSet[Any]] = {}


def register(handle: str, attention: Attention) -> None:
    """Make a compiled attention reachable from the operators, as long as it lives."""
    _registry.setdefault(handle, WeakSet()).add(attention)


def apply(
    attention: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offset: int | torch.Tensor,
    preparation: Preparation | None,
    captures: Mapping[str, Any],
) -> Result:
    """out and lse of a call. InputError."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, torch.Tensor):
            raise InputError(name, "a torch.Tensor", type(value).__name__)
    kind = q.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        q, k, v, captures = attention.cast(torch.get_autocast_dtype(kind), q, k, v, captures)
    if torch.compiler.is_compiling() or _traced(q):
        out, lse, _ = torch.ops.attngen.forward(*arguments(attention, q, k, v, q_offset, preparation, captures))
        return out, lse
    call, given, executable = attention.checked(q, k, v, q_offset, captures, preparation)
    prepared = {} if preparation is None else preparation.values
    run = _Run(call, given, executable, prepared)
    if _transformed():
        out, lse, *_ = _Transformed.apply(run, *run.tensors)
        return out, lse
    if run.wants_grad:
        out, lse = _Attention.apply(run, *run.tensors)
        return out, lse
    call.wants_grad = False
    return executable.forward(call, given, prepared)


def _traced(q: torch.Tensor) -> bool:
    """Whether somebody watches operators: a tensor subclass, or a dispatch mode."""
    return type(q) not in (torch.Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack() > 0


def _transformed() -> bool:
    """Whether the call is inside a torch.func transform, or a level of forward-mode AD."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# -- eager ------------------------------------------------------------------------------------------------------------


_ROWS: tuple[str, ...] = ("q", "k", "v")
_NONE: frozenset[str] = frozenset()


class _Run:
    """One call on its way: what autograd does not need to see."""

    def __init__(self, call: Call, given: Mapping[str, Any], executable: Executable, prepared: Mapping[str, Any]):
        self.call, self.given, self.executable, self.kept = call, given, executable, prepared
        if call.captures or given:
            named = tensors_of(call, given)
            self.names, self.tensors = tuple(named), tuple(named.values())
        else:
            self.names, self.tensors = _ROWS, (call.q, call.k, call.v)
        self.wanted = _NONE
        if torch.is_grad_enabled():
            self.wanted = frozenset([n for n, t in zip(self.names, self.tensors, strict=True) if t.requires_grad])

    @property
    def wants_grad(self) -> bool:
        return bool(self.wanted)

    def of(self, tensors: tuple[torch.Tensor, ...]) -> tuple[Call, dict[str, Any]]:
        """The call with these tensors in the place of its own."""
        named, call = dict(zip(self.names, tensors, strict=True)), self.call
        captures = {name: named.get(name, value) for name, value in call.captures.items()}
        given = {name: named.get(name, value) for name, value in self.given.items()}
        q, k, v = tensors[:3]
        return Call(call.spec, q, k, v, captures, call.params, call.q_offset, known=call.known), given


class _Packed:
    """A run without its tensors, which autograd keeps: so it notices changes in place, and checkpoints and offloading reach them."""

    def __init__(self, run: _Run, places: tuple[tuple[str, str], ...]):
        call, self.names, self.places = run.call, run.names, places
        self.spec, self.params, self.known, self.executable = call.spec, call.params, call.known, run.executable
        self.offset = 0 if isinstance(call.q_offset, torch.Tensor) else call.q_offset
        self.captures = tuple(call.captures)
        self.given = {n: None if isinstance(x, torch.Tensor) else x for n, x in run.given.items()}
        self.kept = {n: None if isinstance(x, torch.Tensor) else x for n, x in run.kept.items()}

    @classmethod
    def of(cls, run: _Run) -> tuple[_Packed, list[torch.Tensor]]:
        """The run, and its tensors besides `run.tensors`."""
        found = {}
        if isinstance(run.call.q_offset, torch.Tensor):
            found["offset", ""] = run.call.q_offset
        for kind, values in (("captures", run.call.captures), ("given", run.given), ("kept", run.kept)):
            for name, x in values.items() if values else ():
                if isinstance(x, torch.Tensor) and (kind == "kept" or name not in run.names):
                    found[kind, name] = x
        return cls(run, tuple(found)), list(found.values())

    def run(self, saved: Sequence[torch.Tensor]) -> _Run:
        """The run again. saved: its tensors, then the others."""
        count = len(self.names)
        own, others = dict(zip(self.names, saved, strict=False)), dict(zip(self.places, saved[count:], strict=True))

        def again(kind: str, name: str, value: Any = None) -> Any:
            return own[name] if name in own and kind != "kept" else others.get((kind, name), value)

        captures = {name: again("captures", name) for name in self.captures}
        offset, (q, k, v) = again("offset", "", self.offset), saved[:3]
        call = Call(self.spec, q, k, v, captures, self.params, offset, known=self.known)
        given = {name: again("given", name, value) for name, value in self.given.items()}
        run = _Run(call, given, self.executable, {n: again("kept", n, value) for n, value in self.kept.items()})
        run.names, run.tensors = self.names, tuple(saved[:count])
        return run


class _Attention(torch.autograd.Function):
    """out and lse from a run and its floating-point tensors."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: torch.Tensor) -> Result:  # type: ignore[override]
        out, lse, run.kept = run.executable.forward_keeping(run.call, run.given, run.kept, run.wanted)
        ctx.packed, others = _Packed.of(run)
        ctx.save_for_backward(out, lse, *tensors, *others)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        out, lse, *saved = ctx.saved_tensors
        run = ctx.packed.run(saved)
        return _differentiated(ctx, run, out, lse, run.tensors, grads)


class _Transformed(torch.autograd.Function):
    """The same as torch.func wants it, which costs 30 us more."""

    @staticmethod
    def forward(run: _Run, *tensors: torch.Tensor) -> Result:
        call, given = run.of(tensors)
        out, lse, run.kept = run.executable.forward_keeping(call, given, run.kept, run.wanted or frozenset(run.names))
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        run, *tensors = inputs
        ctx.run = run
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        return _differentiated(ctx, ctx.run, out, lse, tensors, grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "attngen has no forward-mode AD (torch.func.jvp, torch.autograd.forward_ad): use reverse mode, torch.func.vjp "
            "or backward()"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        raise NotImplementedError(
            "attngen does not vmap: fold the mapped dimension into the batch of q, k and v (q.flatten(0, 1)), which is what "
            "vmap would do"
        )


def _differentiated(ctx: Any, run: _Run, out: Any, lse: Any, tensors: Sequence[Any], grads: Sequence[Any]) -> Any:
    """What autograd wants of a run's tensors."""
    do, dlse = grads
    if do is None:
        if dlse is None:  # nobody has come this way
            return None, *(None for _ in tensors)
        do = torch.zeros_like(out)
    needed = tuple(ctx.needs_input_grad[1:])
    # With create_graph somebody may differentiate once more, and is told that nobody can.
    derive = _Gradients.apply if torch.is_grad_enabled() or _transformed() else _gradients
    found = derive(run, needed, out, lse, do, dlse, *tensors)
    found = iter(found if isinstance(found, tuple) else (found,))
    return None, *(next(found) if need else None for need in needed)


def _gradients(run: _Run, needed: tuple[bool, ...], out: Any, lse: Any, do: Any, dlse: Any, *tensors: Any) -> Any:
    same = all(map(operator.is_, tensors, run.tensors))
    call, given = (run.call, run.given) if same else run.of(tensors)
    wanted = [name for name, need in zip(run.names, needed, strict=True) if need]
    found = run.executable.backward(call, given, run.kept, out, lse, do, dlse, frozenset(wanted))
    own = dict(zip(run.names, tensors, strict=True))
    return tuple(_like(found[name], own[name]) for name in wanted)


class _Gradients(torch.autograd.Function):
    """The gradients that are needed; none of them has one itself."""

    forward = staticmethod(_gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "attngen has first derivatives only: do not differentiate through a gradient (create_graph)"
        )

    jvp = _Transformed.jvp
    vmap = _Transformed.vmap


def _like(gradient: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A gradient in its tensor's shape and dtype."""
    if gradient.shape != tensor.shape:
        gradient = gradient.sum_to_size(tensor.shape)
    return gradient if gradient.dtype == tensor.dtype else gradient.to(tensor.dtype)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse: float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# -- traced -----------------------------------------------------------------------------------------------------------

# Defined on the library, not with custom_op: that imports all of torch._dynamo at the first call (0.6 s).
_library = torch.library.Library("attngen", "DEF")
_COMMON = (
    "Tensor q, Tensor k, Tensor v, Tensor[] tensors, SymInt[] ints, float[] floats, SymInt q_offset, Tensor? q_offsets, "
    "Tensor[] prepared, str handle"
)
# kept: what the backward makes use of (`Attention.keeps`), or nothing, [0]
_library.define(f"forward({_COMMON}) -> (Tensor out, Tensor lse, Tensor kept)")
_library.define(
    f"backward({_COMMON}, Tensor out, Tensor lse, Tensor kept, Tensor grad_out, Tensor grad_lse, int[] wanted) -> Tensor[]"
)


def arguments(
    attention: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offset: int | torch.Tensor,
    preparation: Preparation | None,
    captures: Mapping[str, Any],
) -> tuple[Any, ...]:
    """A call as `attngen::forward` takes it: captures sorted into lists. InputError for unknown or missing names."""
    named = attention.unfolded(captures, q, k, preparation)
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    numbers = {name: value for name, value in named.items() if name not in tensors}
    ints = {n: x for n, x in numbers.items() if isinstance(x, (int, torch.SymInt)) and not attention.is_float(n)}
    floats = {name: float(value) for name, value in numbers.items() if name not in ints}
    values = {} if preparation is None else preparation.values
    per_batch = isinstance(q_offset, torch.Tensor)
    if not per_batch:
        q_offset = check_offset(q_offset, q)
    names = ";".join(",".join(part) for part in (tensors, ints, floats, values))
    return (
        q,
        k,
        v,
        list(tensors.values()),
        list(ints.values()),
        list(floats.values()),
        0 if per_batch else q_offset,
        q_offset if per_batch else None,
        list(values.values()),
        f"{attention.handle};{names}",
    )


class _Names:
    """What a handle says: the attention, and the names of what is in the operator's lists."""

    def __init__(self, handle: str):
        key, *parts = handle.split(";")
        self.attention: Attention = next(iter(_registry[key]))
        self.tensors, self.ints, self.floats, self.prepared = ([n for n in part.split(",") if n] for part in parts)

    def check(
        self, q: Any, k: Any, v: Any, tensors: Any, ints: Any, floats: Any, q_offset: Any, q_offsets: Any
    ) -> bool:
        """InputError for tensors that do not fit together; nobody looks at values. Whether the backward gets what was kept."""
        offset = q_offset if q_offsets is None else q_offsets
        keys, call, _ = self.attention.bound_unfolded(q, k, v, offset, self._named(tensors, ints, floats))
        return self.attention.keeps(keys, call)

    def call(
        self, q: Any, k: Any, v: Any, tensors: Any, ints: Any, floats: Any, q_offset: Any, q_offsets: Any, prepared: Any
    ) -> tuple[Call, dict[str, Any], Executable, dict[str, torch.Tensor]]:
        """The checked call, its key set's captures, what runs it, and what was prepared."""
        offset = q_offset if q_offsets is None else q_offsets
        named = self._named(tensors, ints, floats)
        call, given, executable = self.attention.checked_unfolded(q, k, v, offset, named)
        return call, given, executable, dict(zip(self.prepared, prepared, strict=True))

    def _named(self, tensors: Any, ints: Any, floats: Any) -> dict[str, Any]:
        return dict(zip((*self.tensors, *self.ints, *self.floats), (*tensors, *ints, *floats), strict=True))


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def forward(q, k, v, tensors, ints, floats, q_offset, q_offsets, prepared, handle):  # type: ignore[no-untyped-def]
    names = _Names(handle)
    call, given, executable, values = names.call(q, k, v, tensors, ints, floats, q_offset, q_offsets, prepared)
    # The backward gets nothing else of this call, and makes the rest again.
    call.wants_grad = keeps = names.attention.keeps(executable.keys, call)
    out, lse, kept = executable.forward_and_kept(call, given, values)
    return out, lse, kept if keeps else lse.new_empty(0)


@torch.library.register_fake("attngen::forward", lib=_library)
def _(q, k, v, tensors, ints, floats, q_offset, q_offsets, prepared, handle):  # type: ignore[no-untyped-def]
    keeps = _Names(handle).check(q, k, v, tensors, ints, floats, q_offset, q_offsets)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    return out, lse, torch.empty_like(lse) if keeps else lse.new_empty(0)


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def backward(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    tensors,
    ints,
    floats,
    q_offset,
    q_offsets,
    prepared,
    handle,
    out,
    lse,
    kept,
    grad_out,
    grad_lse,
    wanted,
):
    """Gradients of q, k, v, and of the tensors whose positions are in `wanted`. What the forward prepared is prepared again
    unless the caller gave it.
    """
    names = _Names(handle)
    call, given, executable, values = names.call(q, k, v, tensors, ints, floats, q_offset, q_offsets, prepared)
    if names.attention.keeps(executable.keys, call):
        values[executable.kept_name] = kept
    own = ["q", "k", "v", *(names.tensors[place] for place in wanted)]
    found = executable.backward(call, given, values, out, lse, grad_out, grad_lse, frozenset(own))
    like = [q, k, v, *(tensors[place] for place in wanted)]
    grads = [_like(found[name], tensor) for name, tensor in zip(own, like, strict=True)]
    return [g.clone() if g._is_view() else g for g in grads]


@torch.library.register_fake("attngen::backward", lib=_library)
def _(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    tensors,
    ints,
    floats,
    q_offset,
    q_offsets,
    prepared,
    handle,
    out,
    lse,
    kept,
    grad_out,
    grad_lse,
    wanted,
):
    like = [q, k, v, *(tensors[place] for place in wanted)]
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, tensors, ints, floats, q_offset, q_offsets, prepared, handle = inputs
    ctx.save_for_backward(q, k, v, *tensors, *prepared, *([] if q_offsets is None else [q_offsets]), *output)
    ctx.counts = len(tensors), len(prepared)
    ctx.ints, ctx.floats = ints, floats
    ctx.q_offset, ctx.has_offsets, ctx.handle = q_offset, q_offsets is not None, handle
    ctx.attention = _Names(handle).attention  # alive until the backward, whoever else forgets it


def _backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None, _: Any) -> Any:
    q, k, v, *rest = ctx.saved_tensors
    many, made = ctx.counts
    tensors, prepared, rest = rest[:many], rest[many : many + made], rest[many + made :]
    q_offsets = rest.pop(0) if ctx.has_offsets else None
    out, lse, kept = rest
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    wanted = [place for place, t in enumerate(tensors) if ctx.needs_input_grad[3][place] and t.is_floating_point()]
    common = (q, k, v, tensors, ctx.ints, ctx.floats, ctx.q_offset, q_offsets, prepared, ctx.handle)
    dq, dk, dv, *captured = torch.ops.attngen.backward(*common, out, lse, kept, grad_out, grad_lse, wanted)
    grads: list[torch.Tensor | None] = [None] * len(tensors)
    for place, grad in zip(wanted, captured, strict=True):
        grads[place] = grad
    # torch takes an empty list for a list of tensors, and wants one back.
    ints, floats = (None if numbers else list[None]() for numbers in (ctx.ints, ctx.floats))
    return dq, dk, dv, grads, ints, floats, None, None, [None] * made, None


def _no_second_derivative(ctx: Any, grads: Any) -> Any:
    raise NotImplementedError(
        "attngen has first derivatives only: do not differentiate through a gradient (create_graph)"
    )


torch.library.register_autograd("attngen::backward", _no_second_derivative, lib=_library)
torch.library.register_autograd("attngen::forward", _backward, setup_context=_setup_context, lib=_library)
