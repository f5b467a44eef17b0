"""What a mask_mod or score_mod does with one pair, written down as a program.

A mod runs once per call, with symbols in the place of its tensors. Nothing is computed and nothing is remembered: what it closes
over, numbers and tensors, is read anew each time, so a program is never out of date. It costs some microseconds per operation;
what it means is worked out once per program (`attngen.integrations.flex.meaning`).

torch.compile traces this very module: only what Dynamo knows may stand on the way of a mod that is accepted.
"""

from __future__ import annotations

import linecache
import numbers
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from attngen.errors import SpecError
from attngen.integrations.flex.vocabulary import (
    CONDITIONS,
    CONSTANTS,
    FLOATS,
    INTEGERS,
    KNOWN,
    OPERATIONS,
    VALUES,
    name_of,
)

Mod = Callable[..., Any]
Operand = tuple[
    Any, ...
]  # ("ref", what a symbol refers to), or (type's name, value): 1, 1.0 and True are equal, these are not

_KINDS = ("bool", "int", "float")  # in the order of promotion


class Program(NamedTuple):
    """steps: (operation, operands, named operands) in order; a number in a reference is the place of a step. tensors: dimensions
    and kind of each captured tensor. score, mask: what the mods return, None for no mod.
    """

    steps: tuple[tuple[str, tuple[Operand, ...], tuple[tuple[str, Operand], ...]], ...]
    tensors: tuple[tuple[int, str], ...]
    score: Operand | None
    mask: Operand | None


class Symbol:
    """A number or a truth value of one pair (b, h, q_idx, kv_idx): what a mod computes with."""

    __hash__ = None  # type: ignore[assignment]  # == is recorded
    shape = torch.Size(())
    ndim = 0
    requires_grad = False

    def __init__(self, tracer: Tracer, ref: Any, kind: str):
        self.tracer, self.ref, self.kind = tracer, ref, kind

    @property
    def dtype(self) -> torch.dtype:
        return {"bool": torch.bool, "int": torch.int32}.get(self.kind, self.tracer.dtype)

    @property
    def device(self) -> torch.device:
        return self.tracer.device

    def dim(self) -> int:
        return 0

    def size(self) -> torch.Size:
        return self.shape

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or (name not in OPERATIONS and name not in CONSTANTS):
            raise AttributeError(f"a symbol has no {name}")

        def method(*args: Any, **kwargs: Any) -> Any:
            if name == "where":  # x.where(condition, other)
                return self.tracer.record(name, (args[0], self, *args[1:]), kwargs)
            return self.tracer.record(name, (self, *args), kwargs)

        return method

    def __bool__(self) -> bool:
        raise SpecError(
            "the mod branches on a value that is known only in the kernel (`if`, `and`, `or`, `not`, `a < b < c`, min, max)",
            fix="write torch.where(condition, a, b), and combine conditions with & | ~",
        )

    def _number(self) -> Any:
        raise SpecError(
            "the mod wants a Python number of a value that is known only in the kernel",
            fix="compute with torch functions",
        )

    __int__ = __float__ = __index__ = __complex__ = item = tolist = numpy = _number

    def __iter__(self) -> Any:
        raise SpecError("a value of one pair is a single number and cannot be iterated")

    def __len__(self) -> int:
        raise SpecError("a value of one pair is a single number and has no length")

    def __getitem__(self, index: Any) -> Any:
        raise SpecError("a value of one pair is a single number and cannot be indexed")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        symbols = [x for x in _flat((*args, *(kwargs or {}).values())) if isinstance(x, (Symbol, Rows))]
        return symbols[0].tracer.call(func, args, kwargs or {})


def _recorded(name: str, swapped: bool = False) -> Any:
    def method(self: Symbol, *others: Any) -> Any:
        return self.tracer.record(name, (*others, self) if swapped else (self, *others), {})

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(Symbol, f"__{_name}__", _recorded(_name))
    setattr(Symbol, f"__r{_name}__", _recorded(_name, swapped=True))
for _name in ("neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Symbol, f"__{_name}__", _recorded(_name))


class Rows:
    """A captured tensor of which some dimensions are indexed: `bias[h]`, before `[q_idx]`. indices: None for one that is open."""

    def __init__(self, tracer: Tracer, tensor: torch.Tensor, indices: tuple[Any, ...]):
        self.tracer, self.tensor, self.indices = tracer, tensor, indices

    def __getitem__(self, index: Any) -> Any:
        return self.tracer.load(self.tensor, self.indices, index)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"rows of a captured tensor can be indexed down to a number only, there is no {name} of them"
        )

    def __iter__(self) -> Any:
        raise _rows("iteration")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _rows(name_of(func))


def _rows(name: str) -> SpecError:
    return SpecError(
        f"{name} of rows of a captured tensor: a kernel reads single elements of it",
        fix="index it down to a number, or do this once, outside of the mod, to the whole tensor",
    )


class Tracer(TorchFunctionMode):
    """Writes down what is done with symbols. dtype, device: what the score says of itself."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, stop: int | None = None, error: SpecError | None = None
    ):
        super().__init__()
        self.dtype, self.device, self.stop, self.error = dtype, device, stop, error
        self.steps: list[Any] = []
        self.tensors: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A torch function: recorded if a symbol takes part, else run."""
        name = name_of(func)
        operands = _flat((*args, *kwargs.values()))
        if not any(isinstance(x, (Symbol, Rows)) for x in operands):
            if name in VALUES and any(isinstance(x, torch.Tensor) for x in operands):
                raise SpecError(
                    f"the mod takes a Python value out of a captured tensor ({name}), which would wait for the device",
                    fix="use the tensor itself: one without dimensions is a number; or take the value outside of the mod",
                )
            if name in CONSTANTS and not any(isinstance(x, torch.Tensor) for x in operands):
                size = args[0] if args else kwargs.get("size", 0)
                if name in ("tensor", "scalar_tensor", "as_tensor") and isinstance(size, (bool, int, float)):
                    return self.record(name, args, kwargs)
                if name in ("zeros", "ones", "full") and isinstance(size, (tuple, list)) and len(size) == 0:
                    return self.record(name, args, kwargs)
            return func(*args, **kwargs)
        if name == "getitem" and isinstance(args[0], torch.Tensor):
            return self.load(args[0], (None,) * args[0].dim(), args[1])
        if any(isinstance(x, Rows) for x in operands):
            raise _rows(name)
        if name == "where" and len(args) == 3 and func is torch.Tensor.where:
            args = (args[1], args[0], args[2])
        swapped = {"radd", "rsub", "rmul", "rtruediv", "rdiv", "rfloordiv", "rmod", "rpow"}
        swapped |= {"rand", "ror", "rxor", "rlshift", "rrshift"}
        if name in swapped:
            name, args = name[1:], (args[1], args[0], *args[2:])
        return self.record(name, args, kwargs)

    def record(self, name: str, args: Any, kwargs: Any) -> Symbol:
        """One operation. SpecError if the language has no counterpart."""
        if name not in OPERATIONS and name not in CONSTANTS:
            raise SpecError(f"torch's {name} has no counterpart in a kernel's score or mask", fix=KNOWN)
        if name in ("max", "min") and not (len(args) == 2 and isinstance(args[1], (Symbol, torch.Tensor))):
            raise SpecError(
                f"{name} of one value is a reduction", fix="torch.maximum and torch.minimum take two values"
            )
        operands = tuple([self.operand(x) for x in args])
        named = tuple([(key, self.operand(kwargs[key])) for key in sorted(kwargs)])
        if self.stop is not None and len(self.steps) == self.stop and self.error is not None:
            raise self.error
        self.steps.append((name, operands, named))
        return Symbol(self, len(self.steps) - 1, _kind_of(name, [*args, *kwargs.values()], self.dtype))

    def operand(self, x: Any) -> Operand:
        """How an argument stands in a program. SpecError for what can't."""
        if isinstance(x, Symbol):
            return ("ref", x.ref)
        if isinstance(x, torch.Tensor):
            if x.dim() > 0:
                raise SpecError(
                    f"a captured tensor of shape {list(x.shape)} meets a single value",
                    fix="index it: one that is a number has no dimensions, t[0] or t.squeeze()",
                )
            return ("ref", self.load(x, (), ()).ref)
        if isinstance(x, torch.dtype):
            return ("kind", "float" if x.is_floating_point else "bool" if x == torch.bool else "int")
        if isinstance(x, (tuple, list, torch.Size)):
            return ("tuple", *[self.operand(part) for part in x])
        if x is None or isinstance(x, (torch.device, torch.layout, torch.memory_format)):
            return ("none",)
        if isinstance(x, (bool, str)):
            return (type(x).__name__, x)
        if isinstance(x, (int, numbers.Integral)):
            return ("int", int(x))
        if isinstance(x, (float, numbers.Real)):
            return ("float", float(x))
        raise SpecError(f"a mod computes with tensors and Python numbers, got {type(x).__name__}")

    def load(self, tensor: torch.Tensor, indices: tuple[Any, ...], index: Any) -> Any:
        """tensor with its open dimensions, in order, indexed by `index`; rows as long as one is open."""
        given = list(index) if isinstance(index, tuple) else [index]
        open_dims = [dim for dim in range(len(indices)) if indices[dim] is None]
        if any(x is Ellipsis for x in given):
            place = [x is Ellipsis for x in given].index(True)
            given = given[:place] + [slice(None)] * (len(open_dims) - len(given) + 1) + given[place + 1 :]
        if len(given) > len(open_dims):
            raise SpecError(f"{len(given)} indices for the {len(open_dims)} dimensions of a captured tensor")
        found = list(indices)
        for dim, x in zip(open_dims, given, strict=False):
            if isinstance(x, slice) and x == slice(None):
                continue
            if isinstance(x, Rows) or not isinstance(x, (int, Symbol, torch.Tensor)) or isinstance(x, bool):
                raise SpecError(
                    "a captured tensor is indexed by single positions", fix="cut and reshape it outside of the mod"
                )
            found[dim] = x + tensor.shape[dim] if isinstance(x, int) and x < 0 else x
        if any(x is None for x in found):
            return Rows(self, tensor, tuple(found))
        number = len(self.tensors)
        for place in range(len(self.tensors)):
            if self.tensors[place] is tensor:
                number = place
        if number == len(self.tensors):
            self.tensors.append(tensor)
        places = tuple([self.operand(x) for x in found])
        if self.stop is not None and len(self.steps) == self.stop and self.error is not None:
            raise self.error
        self.steps.append(("load", (("int", number), *places), ()))
        return Symbol(self, len(self.steps) - 1, _kind(tensor.dtype))


def record(
    mask_mod: Mod | None,
    score_mod: Mod | None,
    dtype: torch.dtype,
    device: torch.device,
    stop: int | None = None,
    error: SpecError | None = None,
) -> tuple[Program, list[torch.Tensor]]:
    """What the mods do, and the tensors that they read. stop: raise `error` at that step, to find its line. SpecError."""
    tracer = Tracer(dtype, device, stop, error)
    s = Symbol(tracer, "s", "float")
    b, h, i, j = (
        Symbol(tracer, "b", "int"),
        Symbol(tracer, "h", "int"),
        Symbol(tracer, "i", "int"),
        Symbol(tracer, "j", "int"),
    )
    score = mask = None
    with tracer:
        if mask_mod is not None:
            mask = mask_mod(b, h, i, j)
        if score_mod is not None:
            score = score_mod(s, b, h, i, j)
    mask = None if mask_mod is None else tracer.operand(mask)
    score = None if score_mod is None else tracer.operand(score)
    tensors = tuple([(t.dim(), _kind(t.dtype)) for t in tracer.tensors])
    return Program(tuple(tracer.steps), tensors, score, mask), tracer.tensors


def located(error: Exception) -> SpecError:
    """The error of a mod, with the line of the mod that it comes from."""
    problem = (
        error.problem
        if isinstance(error, SpecError)
        else f"the mod fails with symbols: {type(error).__name__}: {error}"
    )
    fix = error.fix if isinstance(error, SpecError) else KNOWN
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if not frame.f_globals.get("__name__", "").startswith(("attngen.", "torch.")):
            file = frame.f_code.co_filename
            text = linecache.getline(file, line).strip()
            where = f"{file}:{line}, in {frame.f_code.co_name}: {problem}"
            return SpecError(where, text=text or None, width=len(text), fix=fix)
    return SpecError(problem, fix=fix)


def _flat(values: Any) -> list[Any]:
    found: list[Any] = []
    for x in values:
        if isinstance(x, (tuple, list)):
            found += _flat(x)
        else:
            found.append(x)
    return found


def _kind(dtype: torch.dtype) -> str:
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int"


def _kind_of(name: str, operands: list[Any], dtype: torch.dtype) -> str:
    """The kind of a result: what torch's promotion makes of the operands'."""
    if name in CONDITIONS:
        return "bool"
    if name in FLOATS:
        return "float"
    if name in INTEGERS:
        return "int"
    for x in operands:
        if isinstance(x, torch.dtype):
            return _kind(x)
    kinds = [0]
    for x in operands[1:] if name == "where" else operands:
        if isinstance(x, Symbol):
            kinds.append(_KINDS.index(x.kind))
        elif isinstance(x, torch.Tensor):
            kinds.append(_KINDS.index(_kind(x.dtype)))
        elif isinstance(x, float):
            kinds.append(2)
        elif isinstance(x, int) and not isinstance(x, bool):
            kinds.append(1)
    return _KINDS[max(kinds)]
