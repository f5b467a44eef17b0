"""attngen as torch sees it: autograd, torch.func, torch.compile, opcheck, autocast.

In eager mode a call is one `torch.autograd.Function`, or nothing at all where no gradient is asked for. Whoever traces
(torch.compile, a fake or other tensor subclass, a dispatch mode) sees two operators, `attngen::forward` and
`attngen::backward`; a call's captures travel as lists, whose names stand in its handle: a string that is the same in every
process. Both end in the same `Executable`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from attngen.errors import InputError
from attngen.language.call import Call
from attngen.runtime.executable import Executable, tensors_of
from attngen.runtime.preparation import Preparation

if TYPE_CHECKING:
    from attngen.runtime.attention import CompiledAttention

Result = tuple[torch.Tensor, torch.Tensor]

_registry: dict[str, CompiledAttention] = {}


def register(handle: str, attention: CompiledAttention) -> None:
    """Make a compiled attention reachable from the operators."""
    _registry[handle] = attention


def apply(
    attention: CompiledAttention,
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
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t.to(dtype) if t.dtype == torch.float32 else t for t in (q, k, v))
    if torch.compiler.is_compiling() or _traced(q):
        return _through_operator(attention, q, k, v, q_offset, preparation, captures)
    call, given, executable = attention.checked(q, k, v, q_offset, captures, preparation)
    prepared = {} if preparation is None else preparation.values
    run = _Run(call, given, executable, prepared)
    if _transformed() or run.wants_grad:
        out, lse, *_ = _Attention.apply(run, *run.tensors)
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


class _Run:
    """One call on its way: what autograd does not need to see."""

    def __init__(self, call: Call, given: Mapping[str, Any], executable: Executable, prepared: Mapping[str, Any]):
        self.call, self.given, self.executable, self.kept = call, given, executable, prepared
        named = dict(tensors_of(call, given))
        self.names, self.tensors = tuple(named), tuple(named.values())
        enabled = torch.is_grad_enabled()
        self.wanted = frozenset(n for n, t in named.items() if t.requires_grad) if enabled else frozenset()

    @property
    def wants_grad(self) -> bool:
        return bool(self.wanted)

    def of(self, tensors: tuple[torch.Tensor, ...]) -> tuple[Call, dict[str, Any]]:
        """The call with these tensors in the place of its own."""
        named = dict(zip(self.names, tensors, strict=True))
        call, given = self.call, {**self.given}
        captures = {name: named.get(name, value) for name, value in call.captures.items()}
        given |= {name: named[name] for name in given if name in named}
        q, k, v = tensors[:3]
        return Call(call.spec, q, k, v, captures, call.params, call.q_offset, True), given


class _Attention(torch.autograd.Function):
    """out and lse from a run and its floating-point tensors."""

    @staticmethod
    def forward(run: _Run, *tensors: torch.Tensor) -> Result:
        call, given = run.of(tensors)
        out, lse, run.kept = run.executable.forward_keeping(call, given, run.kept, run.wanted or _all(run))
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        run, *tensors = inputs
        ctx.run = run
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        do, dlse = (torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, (out, lse), strict=True))
        needed = tuple(ctx.needs_input_grad[1:])
        found = _Gradients.apply(ctx.run, needed, out, lse, do, dlse, *tensors)
        found = iter(found if isinstance(found, tuple) else (found,))
        return None, *(next(found) if need else None for need in needed)

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


class _Gradients(torch.autograd.Function):
    """The gradients that are needed; none of them has one itself."""

    @staticmethod
    def forward(run: _Run, needed: tuple[bool, ...], out: Any, lse: Any, do: Any, dlse: Any, *tensors: Any) -> Any:
        call, given = run.of(tensors)
        wanted = tuple(name for name, need in zip(run.names, needed, strict=True) if need)
        found = run.executable.backward(call, given, run.kept, out, lse, do, dlse, frozenset(wanted))
        own = dict(zip(run.names, tensors, strict=True))
        return tuple(_like(found[name], own[name]) for name in wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "attngen has first derivatives only: do not differentiate through a gradient (create_graph)"
        )

    jvp = _Attention.jvp
    vmap = _Attention.vmap


def _all(run: _Run) -> frozenset[str]:
    """Under a transform nobody says beforehand what gets a gradient."""
    return frozenset(run.names)


def _like(gradient: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A gradient in its tensor's shape and dtype."""
    if gradient.shape != tensor.shape:
        gradient = gradient.sum_to_size(tensor.shape)
    return gradient.to(tensor.dtype)


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
_library.define(f"forward({_COMMON}) -> (Tensor, Tensor)")
_library.define(
    f"backward({_COMMON}, Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse, int[] wanted) -> Tensor[]"
)


def _through_operator(
    attention: CompiledAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offset: int | torch.Tensor,
    preparation: Preparation | None,
    captures: Mapping[str, Any],
) -> Result:
    """Sort the captures into the operator's lists. InputError for unknown or missing names."""
    named = attention.unfolded(captures, q, k, preparation)
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    numbers = {name: value for name, value in named.items() if name not in tensors}
    ints = {n: x for n, x in numbers.items() if isinstance(x, (int, torch.SymInt)) and not attention.is_float(n)}
    floats = {name: float(value) for name, value in numbers.items() if name not in ints}
    values = {} if preparation is None else preparation.values
    per_batch = isinstance(q_offset, torch.Tensor)
    if not per_batch and (isinstance(q_offset, bool) or not isinstance(q_offset, (int, torch.SymInt))):
        raise InputError("q_offset", "an int or an int tensor [B]", type(q_offset).__name__)
    names = ";".join(",".join(part) for part in (tensors, ints, floats, values))
    out, lse = torch.ops.attngen.forward(
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
    return out, lse


class _Names:
    """What a handle says: the attention, and the names of what is in the operator's lists."""

    def __init__(self, handle: str):
        key, *parts = handle.split(";")
        self.attention = _registry[key]
        self.tensors, self.ints, self.floats, self.prepared = ([n for n in part.split(",") if n] for part in parts)

    def call(
        self, q: Any, k: Any, v: Any, tensors: Any, ints: Any, floats: Any, q_offset: Any, q_offsets: Any, prepared: Any
    ) -> tuple[Call, dict[str, Any], Executable, dict[str, torch.Tensor]]:
        """The checked call, its key set's captures, what runs it, and what was prepared."""
        named = dict(zip((*self.tensors, *self.ints, *self.floats), (*tensors, *ints, *floats), strict=True))
        offset = q_offset if q_offsets is None else q_offsets
        values = dict(zip(self.prepared, prepared, strict=True))
        call, given, executable = self.attention.checked_unfolded(q, k, v, offset, named, values)
        return call, given, executable, values


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def forward(q, k, v, tensors, ints, floats, q_offset, q_offsets, prepared, handle):  # type: ignore[no-untyped-def]
    call, given, executable, values = _Names(handle).call(q, k, v, tensors, ints, floats, q_offset, q_offsets, prepared)
    return executable.forward(call, given, values)


@torch.library.register_fake("attngen::forward", lib=_library)
def _(q, k, v, tensors, ints, floats, q_offset, q_offsets, prepared, handle):  # type: ignore[no-untyped-def]
    names = _Names(handle)
    names.attention.check_shapes(q, k, v, names, tensors, q_offset, q_offsets, ints, floats)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))


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
    grad_out,
    grad_lse,
    wanted,
):
    """Gradients of q, k, v, and of the tensors whose positions are in `wanted`. What the forward prepared is prepared again
    unless the caller gave it.
    """
    names = _Names(handle)
    call, given, executable, values = names.call(q, k, v, tensors, ints, floats, q_offset, q_offsets, prepared)
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


def _backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> Any:
    q, k, v, *rest = ctx.saved_tensors
    many, made = ctx.counts
    tensors, prepared, rest = rest[:many], rest[many : many + made], rest[many + made :]
    q_offsets = rest.pop(0) if ctx.has_offsets else None
    out, lse = rest
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    wanted = [place for place, t in enumerate(tensors) if ctx.needs_input_grad[3][place] and t.is_floating_point()]
    common = (q, k, v, tensors, ctx.ints, ctx.floats, ctx.q_offset, q_offsets, prepared, ctx.handle)
    dq, dk, dv, *captured = torch.ops.attngen.backward(*common, out, lse, grad_out, grad_lse, wanted)
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
