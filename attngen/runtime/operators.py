"""attngen as torch operators: what torch.compile, autograd, opcheck and autocast see.

Two operators, `attngen::forward` and `attngen::backward`. A spec's captures travel as lists in the order of
`spec.tensors` and `spec.params`; the compiled attention they belong to is found by its handle, a string that is the same
in every process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attngen.errors import InputError
from attngen.language.call import Call, bind, check_offset, number_of

if TYPE_CHECKING:
    from attngen.runtime.attention import CompiledAttention

_registry: dict[str, CompiledAttention] = {}


def register(handle: str, attention: CompiledAttention) -> None:
    """Make a compiled attention reachable from the operators."""
    _registry[handle] = attention


def _call(
    attention: CompiledAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: list[torch.Tensor],
    ints: list[int],
    floats: list[float],
    q_offset: int,
    q_offsets: torch.Tensor | None,
    values: bool = False,
) -> Call:
    spec = attention.spec
    captures: dict[str, Any] = dict(zip(spec.tensors, tensors, strict=True))
    ints_left, floats_left = iter(ints), iter(floats)
    for name, param in spec.params.items():
        captures[name] = next(ints_left if param.number_kind == "int" else floats_left)
    offset = q_offset if q_offsets is None else q_offsets
    return bind(spec, q, k, v, q_offset=offset, captures=captures, values=values)


# Defined on the library, not with custom_op: that imports all of torch._dynamo at the first call (0.6 s) and costs twice
# as much at every other one.
_library = torch.library.Library("attngen", "DEF")
_COMMON = (
    "Tensor q, Tensor k, Tensor v, Tensor[] tensors, SymInt[] ints, float[] floats, SymInt q_offset, Tensor? q_offsets, "
    "str handle"
)
# `store`: also the weights P, for a backward that shall not compute them again; else that result is empty.
_library.define(f"forward({_COMMON}, bool store) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"backward({_COMMON}, Tensor out, Tensor lse, Tensor weights, Tensor grad_out, Tensor grad_lse, int[] wanted) "
    "-> Tensor[]"
)


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: list[torch.Tensor],
    ints: list[int],
    floats: list[float],
    q_offset: int,
    q_offsets: torch.Tensor | None,
    handle: str,
    store: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    attention = _registry[handle]
    call = _call(attention, q, k, v, tensors, ints, floats, q_offset, q_offsets, values=True)
    if store:
        return attention.run_storing(call)
    return *attention.run_forward(call), q.new_empty(0)


@torch.library.register_fake("attngen::forward", lib=_library)
def _(q, k, v, tensors, ints, floats, q_offset, q_offsets, handle, store):  # type: ignore[no-untyped-def]
    call = _call(_registry[handle], q, k, v, tensors, ints, floats, q_offset, q_offsets)
    out = call.q.new_empty((*call.q.shape[:3], call.v.shape[3]))
    lse = call.q.new_empty(call.q.shape[:3], dtype=lse_dtype(call.q.dtype))
    return out, lse, lse.new_empty((*call.q.shape[:3], call.n_k)) if store else q.new_empty(0)


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: list[torch.Tensor],
    ints: list[int],
    floats: list[float],
    q_offset: int,
    q_offsets: torch.Tensor | None,
    handle: str,
    out: torch.Tensor,
    lse: torch.Tensor,
    weights: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    wanted: list[int],
) -> list[torch.Tensor]:
    """Gradients of q, k, v, and of the captured tensors whose positions are in `wanted`."""
    attention = _registry[handle]
    call = _call(attention, q, k, v, tensors, ints, floats, q_offset, q_offsets)
    names = [list(attention.spec.tensors)[place] for place in wanted]
    dq, dk, dv, captured = attention.run_backward(
        call, out, lse, grad_out, grad_lse, names, weights if weights.dim() == 4 else None
    )
    grads = [captured[name].sum_to_size(tensors[place].shape) for name, place in zip(names, wanted, strict=True)]
    grads = [g.to(tensors[place].dtype) for g, place in zip(grads, wanted, strict=True)]
    return [dq, dk, dv, *(g.clone() if g._is_view() else g for g in grads)]


@torch.library.register_fake("attngen::backward", lib=_library)
def _(q, k, v, tensors, ints, floats, q_offset, q_offsets, handle, out, lse, weights, grad_out, grad_lse, wanted):  # type: ignore[no-untyped-def]
    like = [q, k, v, *(tensors[place] for place in wanted)]
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, tensors, ints, floats, q_offset, q_offsets, handle, _ = inputs
    out, lse, weights = output
    ctx.mark_non_differentiable(weights)
    ctx.save_for_backward(q, k, v, *tensors, *([] if q_offsets is None else [q_offsets]), out, lse, weights)
    ctx.tensor_count, ctx.ints, ctx.floats = len(tensors), ints, floats
    ctx.q_offset, ctx.has_offsets, ctx.handle = q_offset, q_offsets is not None, handle


def _backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None, _: Any) -> Any:
    q, k, v, *rest = ctx.saved_tensors
    tensors, rest = rest[: ctx.tensor_count], rest[ctx.tensor_count :]
    q_offsets = rest.pop(0) if ctx.has_offsets else None
    out, lse, weights = rest
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    wanted = [place for place, t in enumerate(tensors) if ctx.needs_input_grad[3][place] and t.is_floating_point()]
    dq, dk, dv, *captured = torch.ops.attngen.backward(
        q,
        k,
        v,
        tensors,
        ctx.ints,
        ctx.floats,
        ctx.q_offset,
        q_offsets,
        ctx.handle,
        out,
        lse,
        weights,
        grad_out,
        grad_lse,
        wanted,
    )
    grads: list[torch.Tensor | None] = [None] * len(tensors)
    for place, grad in zip(wanted, captured, strict=True):
        grads[place] = grad
    # torch takes an empty list for a list of tensors, and wants one back.
    ints, floats = (None if numbers else list[None]() for numbers in (ctx.ints, ctx.floats))
    return dq, dk, dv, grads, ints, floats, None, None, None, None


def _no_second_derivative(ctx: Any, grads: Any) -> Any:
    raise NotImplementedError(
        "attngen has first derivatives only: do not differentiate through a gradient (create_graph)"
    )


torch.library.register_autograd("attngen::backward", _no_second_derivative, lib=_library)
torch.library.register_autograd("attngen::forward", _backward, setup_context=_setup_context, lib=_library)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse: float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def apply(
    attention: CompiledAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captures: dict[str, Any],
    q_offset: int | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the captures into the operator's lists and call it. InputError for unknown or missing names."""
    spec = attention.spec
    for name in captures:
        if name not in spec.tensors and name not in spec.params:
            names = ", ".join([*spec.tensors, *spec.params]) or "it has none"
            raise InputError(name, f"one of this spec's captures ({names})", "an unknown name")
    for name in [*spec.tensors, *spec.params]:
        if captures.get(name) is None:
            text = spec.tensors[name].text() if name in spec.tensors else f"param {name}"
            raise InputError(name, text, "nothing", f"pass {name}=... at the call")
    for name, value in [("q", q), ("k", k), ("v", v), *((n, captures[n]) for n in spec.tensors)]:
        if not isinstance(value, torch.Tensor):
            raise InputError(name, "a torch.Tensor", type(value).__name__)
    ints: list[int] = []
    floats: list[float] = []
    for name, param in spec.params.items():
        numbers: list[Any] = ints if param.number_kind == "int" else floats
        numbers.append(number_of(param, captures[name]))
    per_batch = isinstance(q_offset, torch.Tensor)
    if not per_batch:
        q_offset = check_offset(q_offset, q)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t.to(dtype) if t.dtype == torch.float32 else t for t in (q, k, v))
    store = bool(attention.pins.store) and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    out, lse, _ = torch.ops.attngen.forward(
        q,
        k,
        v,
        [captures[name] for name in spec.tensors],
        ints,
        floats,
        0 if per_batch else q_offset,
        q_offset if per_batch else None,
        attention.handle,
        store,
    )
    return out, lse
