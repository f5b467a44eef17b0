"""Check a call against its spec, once, for every backend: after this, stages may trust shapes, dtypes and devices."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from attngen.errors import InputError
from attngen.language.indices import check_indices
from attngen.language.programs import fold_seed

if TYPE_CHECKING:
    from attngen.language.expression import Param, Tensor
    from attngen.language.spec import Spec


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
LARGEST_POSITION = 2**28
LARGEST_PARAM = 2**30 - 2**16  # below these, sums of a few positions and twice a param fit 32 bits


@dataclass(eq=False, slots=True)
class Call:
    """A checked call: q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] (with pages: [pages, Hkv, page size, *]);
    captures by name, broadcast dims expanded; params by name, "scale" among them if the call gives one; q_offset an int or an
    int tensor [B]. wants_grad: False if nobody can ask for gradients of it, so that what only a backward reads need not be
    prepared. tables: of the walk of each kernel, if somebody made them already. patient: whether anybody may look at values to
    decide sizes. known: what the runtime remembers of calls like this one.
    """

    spec: Spec
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    captures: dict[str, torch.Tensor]
    params: dict[str, int | float]
    q_offset: int | torch.Tensor
    wants_grad: bool = True
    tables: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    patient: bool = True
    known: dict[Any, Any] = field(default_factory=dict)

    def of(self, spec: Spec) -> Call:
        """The same call of another spec, such as a piece of a union."""
        return self if spec is self.spec else replace(self, spec=spec)

    @property
    def scale(self) -> float:
        """The factor on q.k: this call's own, else the spec's."""
        given = self.params.get("scale")
        return self.spec.scale_for(self.q.shape[3]) if given is None else given

    def params_of(self, spec: Spec) -> dict[str, int | float]:
        """The numbers of this call that an attention of it, of another spec, takes."""
        return {name: self.params[name] for name in spec.call_params if name in self.params}

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def offset_column(self) -> Any:
        """q_offset so that it adds to [B, H, N]."""
        return self.q_offset.view(-1, 1, 1) if isinstance(self.q_offset, torch.Tensor) else self.q_offset

    @property
    def waits(self) -> bool:
        """Whether sizes may depend on values: where looking at one is free, and nobody traces the call."""
        return (
            self.patient
            and self.q.device.type == "cpu"
            and type(self.q) is torch.Tensor
            and not torch.compiler.is_compiling()
        )

    @property
    def n_k(self) -> int:
        """Keys per batch: of a paged cache as many as the page table has room for."""
        if self.spec.page_size is None:
            return self.k.shape[2]
        return self.captures["page_table"].shape[1] * self.spec.page_size


def for_all_batches(spec: Spec, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """k and v with the batch of q, where both have a batch of 1: one cache that serves every sequence. Pages have no batch."""
    paged = spec.page_size is not None or (spec.keys is not None and spec.keys.name == "paged")
    if paged or not all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in (q, k, v)) or q.shape[0] == 1:
        return k, v
    if k.shape[0] == 1 == v.shape[0]:
        return k.expand(q.shape[0], -1, -1, -1), v.expand(q.shape[0], -1, -1, -1)
    return k, v


def bind(
    spec: Spec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_offset: int | torch.Tensor = 0,
    captures: Mapping[str, Any],
    values: bool = True,
) -> Call:
    """Check everything and expand broadcast captures. InputError names the argument, what was expected and what came.
    `values`: look at the values of indices too, where shapes do not tell that they are in range.
    """
    _check_qkv(q, k, v, spec.page_size)
    known = {**spec.tensors, **spec.params}
    unknown = [name for name in captures if name not in known and name not in spec.call_params]
    if unknown:
        raise InputError(
            unknown[0], f"one of this spec's captures ({', '.join(known) or 'it has none'})", "an unknown name"
        )
    missing = [name for name in known if captures.get(name) is None]
    if missing:
        wanted = known[missing[0]]
        what = f"a tensor, {wanted.text()}" if missing[0] in spec.tensors else f"a number, {wanted.text()}"
        raise InputError(missing[0], what, "nothing", f"pass {missing[0]}=... at the call")
    q_offset = check_offset(q_offset, q)
    n_k = k.shape[2] if spec.page_size is None else _room(captures["page_table"], q, spec.page_size)
    for name, length in (("q", q.shape[2]), ("k", n_k)):
        if length >= LARGEST_POSITION:
            raise InputError(name, f"a length below {LARGEST_POSITION}", length)
    # Positions i reach q_offset + n_q; with an offset per batch that is on the device, and loads by i check themselves.
    positions = q.shape[2] + (q_offset if not isinstance(q_offset, torch.Tensor) else 0)
    extents = {"b": q.shape[0], "h": q.shape[1], "i": positions, "r": q.shape[2], "j": n_k}
    tensors = {
        name: _check_capture(spec, d, captures[name], extents, q_offset, q.device) for name, d in spec.tensors.items()
    }
    call = Call(spec, q, k, v, tensors, numbers_of(spec, captures), q_offset)
    if values:
        check_indices(call)
    return call


def _room(page_table: Any, q: torch.Tensor, page_size: int) -> int:
    """How many keys a page table int [B, pages] has room for."""
    if not isinstance(page_table, torch.Tensor) or page_table.dim() != 2 or page_table.shape[0] != q.shape[0]:
        got = f"shape {list(page_table.shape)}" if isinstance(page_table, torch.Tensor) else type(page_table).__name__
        raise InputError("page_table", f"int [B = {q.shape[0]}, pages]", got)
    return page_table.shape[1] * page_size


def _check_qkv(q: Any, k: Any, v: Any, page_size: int | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise InputError(name, "a torch.Tensor", type(tensor).__name__)
        if tensor.dim() != 4:
            raise InputError(name, "4 dimensions [batch, heads, length, head dim]", f"shape {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise InputError(name, "float16, bfloat16, float32 or float64", tensor.dtype)
        if tensor.dtype != q.dtype:
            raise InputError(name, f"{q.dtype} like q", tensor.dtype)
        if tensor.device != q.device:
            raise InputError(name, f"device {q.device} like q", tensor.device)
        if page_size is not None and name != "q":
            if tensor.shape[2] != page_size or tensor.shape[0] != k.shape[0]:
                raise InputError(name, f"[pages, heads, page size = {page_size}, *]", f"shape {list(tensor.shape)}")
        elif tensor.shape[0] != q.shape[0]:
            raise InputError(name, f"batch {q.shape[0]} like q", f"shape {list(tensor.shape)}")
        if not 1 <= tensor.shape[3] <= MAX_HEAD_DIM:
            raise InputError(name, f"a head dim from 1 to {MAX_HEAD_DIM}", tensor.shape[3])
    if k.shape[3] != q.shape[3]:
        raise InputError("k", f"head dim {q.shape[3]} like q", f"shape {list(k.shape)}")
    if v.shape[1:3] != k.shape[1:3]:
        raise InputError("v", f"[*, {k.shape[1]}, {k.shape[2]}, *] like k", f"shape {list(v.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise InputError("k", f"a head count that divides q's {q.shape[1]}", k.shape[1])


def _check_capture(
    spec: Spec,
    declared: Tensor,
    value: Any,
    extents: Mapping[str, int],
    q_offset: int | torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    name = declared.name
    if not isinstance(value, torch.Tensor):
        fix = "a number of the host is declared as ag.Param" if isinstance(value, numbers.Real) else ""
        raise InputError(name, f"a torch.Tensor, {declared.text()}", type(value).__name__, fix)
    if value.dim() != declared.ndim:
        raise InputError(name, f"{declared.ndim} dimensions", f"shape {list(value.shape)}")
    given = "float" if value.is_floating_point() else "bool" if value.dtype == torch.bool else "int"
    if given != declared.kind or value.dtype in _NO_NUMBERS:
        wanted = {"float": "a floating dtype", "int": "an integer dtype, int32 or int64 at best", "bool": "torch.bool"}[
            declared.kind
        ]
        raise InputError(name, wanted, value.dtype)
    value = value.to(_WIDER.get(value.dtype, value.dtype))
    if value.device != device:
        raise InputError(name, f"device {device} like q", value.device)
    sizes = list(value.shape)
    for dim, axis in spec.plain_dims[name]:
        extent = extents[axis]
        if axis == "i" and isinstance(q_offset, int) and q_offset < 0:
            raise InputError("q_offset", f"0 or more, since `{name}` is indexed by the position i", q_offset)
        if value.shape[dim] == 1 and extent != 1:
            sizes[dim] = extent
        elif value.shape[dim] < extent:
            raise InputError(
                name,
                f"at least {extent} (or 1) along dimension {dim}, indexed by {_AXES[axis]}",
                f"shape {list(value.shape)}",
            )
        elif axis in "bh" and value.shape[dim] > extent:  # of another call, or of other ranks: the first ones are wrong
            raise InputError(
                name,
                f"{extent} (or 1) along dimension {dim}, indexed by {_AXES[axis]}",
                f"shape {list(value.shape)}",
                f"pass the part that belongs to this call's {'batch' if axis == 'b' else 'heads'}",
            )
    return value if sizes == list(value.shape) else value.expand(sizes)


_AXES = {"b": "b", "h": "h", "i": "i", "j": "j", "r": "the row i - q_offset"}
# Kernels compute with integers of 32 or 64 bits.
_WIDER = {
    torch.int8: torch.int32, torch.uint8: torch.int32, torch.int16: torch.int32, torch.uint16: torch.int32,
    torch.uint32: torch.int64,
}  # fmt: skip
_NO_NUMBERS = {torch.uint64, torch.complex32, torch.complex64, torch.complex128}


def numbers_of(spec: Spec, captures: Mapping[str, Any]) -> dict[str, int | float]:
    """The params of a call, and its scale if it gives one. InputError."""
    given = {name: param for name, param in spec.call_params.items() if captures.get(name) is not None}
    params = {name: number_of(param, captures[name]) for name, param in given.items()}
    probability = spec.dropout_param
    if probability is not None and not 0 <= params[probability] < 1:
        raise InputError(probability, "a probability in [0, 1)", params[probability])
    if "scale" in params and not 0 < params["scale"] < float(
        "inf"
    ):  # kernels scale a row's maximum instead of its logits
        fix = "a factor of another sign belongs to the spec: Spec(scale=...)"
        raise InputError("scale", "a finite number above 0", params["scale"], fix)
    return params


def number_of(param: Param, value: Any) -> Any:
    """The value of a Param as a Python (or symbolic) number. InputError."""
    name, kind = param.name, param.number_kind
    number: Any = value
    if isinstance(value, torch.Tensor) and name == "scale":
        fix = 'for one on the device declare heat = ag.Tensor("heat", 0) and write score=lambda s, b, h, i, j: s * heat[()]'
        raise InputError(name, "a Python float", f"a tensor of shape {list(value.shape)}", fix)
    if isinstance(value, torch.Tensor):
        raise InputError(
            name,
            f"a Python {kind}",
            f"a tensor of shape {list(value.shape)}",
            f"for a number on the device declare ag.Tensor({name!r}, 0{', dtype=torch.int32' if kind == 'int' else ''})"
            f" instead of the Param, and write {name}[()]{': it may be learned' if kind == 'float' else ''}",
        )
    symbolic = (torch.SymInt,) if kind == "int" else (torch.SymInt, torch.SymFloat)
    if isinstance(value, symbolic):
        return value if kind == "int" else float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind == "int" else numbers.Real):
        raise InputError(name, f"a Python {kind}", f"{type(value).__name__} {value!r}"[:120])
    if kind == "float":
        return float(number)
    if name == "seed":  # dropout's: no position is added to it
        return fold_seed(int(number))
    if not -LARGEST_PARAM < number < LARGEST_PARAM:
        raise InputError(name, f"an int below {LARGEST_PARAM}, so that sums with positions fit 32 bits", value)
    return int(number)


def check_offset(q_offset: Any, q: torch.Tensor) -> Any:
    """q_offset as a number or an int tensor [B]. InputError."""
    if isinstance(q_offset, torch.Tensor):
        whole = not (q_offset.is_floating_point() or q_offset.dtype in (torch.bool, *_NO_NUMBERS))
        if not whole or q_offset.shape not in (q.shape[:1], ()) or q_offset.device != q.device:
            raise InputError(
                "q_offset",
                f"an int, or an int tensor [{q.shape[0]}] or [] on {q.device}",
                f"{q_offset.dtype} {list(q_offset.shape)} on {q_offset.device}",
            )
        # Kernels read it by its address, one element after the other.
        return q_offset.to(_WIDER.get(q_offset.dtype, q_offset.dtype)).expand(q.shape[:1]).contiguous()
    if isinstance(q_offset, torch.SymInt):
        return q_offset
    if isinstance(q_offset, bool) or not isinstance(q_offset, numbers.Integral):
        raise InputError("q_offset", "an int or an int tensor [B]", type(q_offset).__name__)
    if not -LARGEST_POSITION < int(q_offset) < LARGEST_POSITION:
        raise InputError("q_offset", "an int of at most 28 bits", q_offset)
    return int(q_offset)
