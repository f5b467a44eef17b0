"""What a mask_mod or score_mod does with one pair, written down as a program.

A mod runs once per call, on tensors that have a dtype and no value, under a mode that writes down what is done with them. Nothing
is remembered: what it closes over, numbers and tensors, is read anew each time, so a program is never out of date. That costs some
microseconds per operation; what a program means is worked out once (`attngen.integrations.flex.meaning`).

torch.compile traces this very module, so it keeps to what Dynamo knows.
"""

from __future__ import annotations

import linecache
import numbers
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.overrides import TorchFunctionMode

from attngen.errors import SpecError
from attngen.integrations.flex.vocabulary import (
    CONDITIONS,
    CONSTANTS,
    FLOATS,
    INTEGERS,
    KNOWN,
    METADATA,
    OPERATIONS,
    RANDOM,
    REVERSED,
    VALUES,
    in_place,
    name_of,
)

Mod = Callable[..., Any]
# What an operation reads: ("ref", place of a step or name of an argument), ("param", place), or (type's name, value), since 1,
# 1.0 and True are equal.
Operand = tuple[Any, ...]


class Program(NamedTuple):
    """steps: (operation, operands, named operands) in order. tensors: dimensions and kind of each captured tensor; params: kind of
    each number that torch.compile does not know. mask, score: what the mods return, None for no mod.
    """

    steps: tuple[tuple[str, tuple[Operand, ...], tuple[tuple[str, Operand], ...]], ...]
    tensors: tuple[tuple[int, str], ...]
    params: tuple[str, ...]
    mask: Operand | None
    score: Operand | None


class Rows:
    """A captured tensor of which some dimensions are indexed: `bias[h]`, before `[q_idx]`. indices: None for one that is open."""

    def __init__(self, tracer: Tracer, tensor: torch.Tensor, indices: tuple[Any, ...]):
        self.tracer, self.tensor, self.indices = tracer, tensor, indices

    def __getitem__(self, index: Any) -> Any:
        return self.tracer.load(self.tensor, self.indices, index)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else _rows(name)

    def __iter__(self) -> Any:
        raise _rows("iteration")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _rows(name_of(func))


def _no_operator(name: str) -> Any:
    def operator(self: Rows, *others: Any) -> Any:
        raise _rows(name)

    return operator


for _name in "add sub mul truediv floordiv mod pow and or xor lt le gt ge eq ne neg abs invert".split():  # noqa: SIM905
    setattr(Rows, f"__{_name}__", _no_operator(_name))
    setattr(Rows, f"__r{_name}__", _no_operator(_name))


def _rows(name: str) -> SpecError:
    return refused(
        f"{name} of rows of a captured tensor: a kernel reads single elements of it",
        fix="index it down to a number, or do this outside of the mod, to the whole tensor",
    )


class Tracer(TorchFunctionMode):
    """Writes down what is done with symbols: tensors without dimensions that stand for a value of one pair.

    dtype: of floating-point symbols; device: what symbols say that they are on. stop, error: raise `error` instead of writing down
    that step.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, stop: int | None = None, error: SpecError | None = None
    ):
        super().__init__()
        self.dtype, self.device, self.stop, self.error = dtype, device, stop, error
        self.refs: dict[torch.Tensor, Any] = {}  # what each symbol is by now: a step's place, or an argument's name
        self.steps: list[Any] = []
        self.tensors: list[torch.Tensor] = []
        self.params: list[Any] = []

    def symbol(self, ref: Any, kind: str) -> torch.Tensor:
        """A new symbol of a kind. It has no data, so that nothing is computed on any device."""
        dtype = {"bool": torch.bool, "int": torch.int32}.get(kind, self.dtype)
        made = torch.empty((), dtype=dtype, device=self.device if torch.compiler.is_compiling() else "meta")
        self.refs[made] = ref
        return made

    def is_symbol(self, x: Any) -> bool:
        return isinstance(x, torch.Tensor) and x in self.refs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        captured = symbols = False
        for x in _flat((*args, *kwargs.values())):
            if isinstance(x, torch.Tensor):
                captured, symbols = True, symbols or x in self.refs
            elif isinstance(x, Rows):
                raise _rows(name)
        if name in VALUES and captured:
            raise _value(name, symbols)
        if name in RANDOM:
            raise refused(
                f"{name} draws one number for all pairs", fix="dropout is a part of a spec: ag.Spec(dropout=...)"
            )
        if not symbols:
            if name in CONSTANTS and not captured and _is_number(name, args, kwargs):
                return self.record(func, name, args, kwargs)
            return func(*args, **kwargs)
        if name in METADATA:
            return self.device if func == torch.Tensor.device.__get__ else func(*args, **kwargs)  # type: ignore[attr-defined]
        if name == "getitem" and not self.is_symbol(args[0]):
            return self.load(args[0], (None,) * args[0].dim(), args[1])
        return self.record(func, name, args, kwargs)

    def record(self, func: Any, name: str, args: Any, kwargs: Any) -> torch.Tensor:
        """One operation with symbols. SpecError if the language has no counterpart."""
        reverse = name in REVERSED  # x.__rsub__(y) is y - x
        name = name[1:] if reverse else name
        if name not in OPERATIONS and name not in CONSTANTS:
            raise refused(f"torch's {name} has no counterpart in a kernel's score or mask", fix=KNOWN)
        if name in ("max", "min") and not (len(args) == 2 and isinstance(args[1], torch.Tensor)):
            raise refused(f"{name} of one value is a reduction", fix="torch.maximum and torch.minimum take two values")
        if in_place(func) and not self.is_symbol(args[0]):
            raise refused(f"the mod changes a captured tensor ({name})", fix="change it outside of the mod")
        if name == "where" and func is torch.Tensor.where:  # x.where(condition, other)
            args = (args[1], args[0], *args[2:])
        operands = [self.operand(x) for x in (reversed(args) if reverse else args)]
        named = tuple([(key, self.operand(kwargs[key])) for key in sorted(kwargs)])
        step = self.step(name, tuple(operands), named)
        if in_place(func):
            self.refs[args[0]] = step  # whoever holds the symbol sees the change
            return args[0]
        return self.symbol(step, _kind_of(name, [*args, *kwargs.values()]))

    def step(self, name: str, operands: tuple[Operand, ...], named: tuple[tuple[str, Operand], ...]) -> int:
        """Write down a step; its place."""
        if self.error is not None and len(self.steps) == self.stop:
            raise self.error
        self.steps.append((name, operands, named))
        return len(self.steps) - 1

    def operand(self, x: Any) -> Operand:
        """How an argument stands in a program. SpecError for what can't."""
        if isinstance(x, torch.Tensor):
            if x.dim() > 0:
                raise refused(
                    f"a captured tensor of shape {list(x.shape)} meets a single value",
                    fix="index it: one that is a number has no dimensions, t[0] or t.squeeze()",
                )
            return ("ref", self.refs[x if x in self.refs else self.load(x, (), ())])
        if isinstance(x, torch.dtype):
            if x in (torch.uint8, torch.int8, torch.int16, torch.uint16):
                raise refused(f"conversion to {x}, which may overflow", fix="convert to torch.int32 or torch.int64")
            return ("kind", kind(x))
        if isinstance(x, (tuple, list, torch.Size)):
            return ("tuple", *[self.operand(part) for part in x])
        if x is None or isinstance(x, (torch.device, torch.layout, torch.memory_format)):
            return ("none",)
        if torch.compiler.is_compiling() and isinstance(x, (int, float)) and not has_static_value(x):
            return ("param", self.param(x))
        if isinstance(x, (bool, str)):
            return (type(x).__name__, x)
        if isinstance(x, (int, numbers.Integral)):
            return ("int", int(x))
        if isinstance(x, (float, numbers.Real)):
            return ("float", float(x))
        raise refused(f"a mod computes with tensors and Python numbers, got {type(x).__name__}")

    def result(self, place: str, x: Any) -> Operand:
        """What a mod returns."""
        if not isinstance(x, (torch.Tensor, numbers.Real)):
            raise refused(f"{place} returns {type(x).__name__}", fix="return a number, or in a mask_mod a truth value")
        return self.operand(x)

    def param(self, x: Any) -> int:
        """The place of a number that torch.compile does not know: a run-time value of the kernel."""
        for n in range(len(self.params)):
            if self.params[n] is x:
                return n
        self.params.append(x)
        return len(self.params) - 1

    def load(self, tensor: torch.Tensor, indices: tuple[Any, ...], index: Any) -> Any:
        """tensor with its open dimensions, in order, indexed by `index`; rows as long as one is open."""
        if tensor.dim() > 4:
            fix = "a kernel reads tensors of up to 4: join some by .flatten(), outside of the mod"
            raise refused(f"a captured tensor of {tensor.dim()} dimensions", fix=fix)
        given = list(index) if isinstance(index, tuple) else [index]
        open_dims = [dim for dim in range(len(indices)) if indices[dim] is None]
        if any(x is Ellipsis for x in given):
            place = [x is Ellipsis for x in given].index(True)
            given = given[:place] + [slice(None)] * (len(open_dims) - len(given) + 1) + given[place + 1 :]
        if len(given) > len(open_dims):
            raise refused(f"{len(given)} indices for the {len(open_dims)} dimensions of a captured tensor")
        found = list(indices)
        for dim, x in zip(open_dims, given, strict=False):
            if isinstance(x, slice) and x == slice(None):
                continue
            if isinstance(x, bool) or not isinstance(x, (int, torch.Tensor)):
                raise refused(
                    "a captured tensor is indexed by single positions", fix="cut and reshape it outside of the mod"
                )
            found[dim] = x + tensor.shape[dim] if isinstance(x, int) and x < 0 else x
        if any(x is None for x in found):
            return Rows(self, tensor, tuple(found))
        number = len(self.tensors)
        for n in range(len(self.tensors)):
            if self.tensors[n] is tensor:
                number = n
        if number == len(self.tensors):
            self.tensors.append(tensor)
        operands = (("int", number), *[self.operand(x) for x in found])
        return self.symbol(self.step("load", operands, ()), kind(tensor.dtype))


def record(
    mask_mod: Mod | None,
    score_mod: Mod | None,
    dtype: torch.dtype,
    device: torch.device,
    stop: int | None = None,
    error: SpecError | None = None,
) -> tuple[Program, dict[str, Any]]:
    """What the mods do, and the tensors t0, t1, ... and numbers p0, p1, ... that they read. dtype: of the score. stop: raise `error`
    at that step, to find its line. SpecError.
    """
    tracer = Tracer(dtype, device, stop, error)
    mask = score = None
    with tracer:
        if mask_mod is not None:
            mask = tracer.result("mask_mod", mask_mod(*[tracer.symbol(name, "int") for name in "bhij"]))
        if score_mod is not None:
            places = [tracer.symbol(name, "int") for name in "bhij"]
            score = tracer.result("score_mod", score_mod(tracer.symbol("s", "float"), *places))
    tensors = tuple([(t.dim(), kind(t.dtype)) for t in tracer.tensors])
    params = tuple(["int" if isinstance(x, int) else "float" for x in tracer.params])
    captures: dict[str, Any] = {f"t{n}": tensor for n, tensor in enumerate(tracer.tensors)}
    captures |= {f"p{n}": number for n, number in enumerate(tracer.params)}
    return Program(tuple(tracer.steps), tensors, params, mask, score), captures


def refused(problem: str, fix: str = "") -> SpecError:
    """What to raise. Dynamo shows no exception's text: it is told to give up, and why."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=problem)
    return SpecError(problem, fix=fix)


def located(error: Exception) -> SpecError:
    """The error of a mod, with the line of the mod that it comes from."""
    problem, fix = f"the mod fails on symbols: {type(error).__name__}: {error}", KNOWN
    if isinstance(error, SpecError):
        problem, fix = error.problem, error.fix
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if not frame.f_globals.get("__name__", "").startswith(("attngen.", "torch.")):
            file = frame.f_code.co_filename
            text = linecache.getline(file, line).strip()
            where = f"{file}:{line}, in {frame.f_code.co_name}: {problem}"
            return SpecError(where, text=text or None, width=len(text), fix=fix)
    return SpecError(problem, fix=fix)


def kind(dtype: torch.dtype) -> str:
    """What the language calls it: "float", "int" or "bool"."""
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int"


def _value(name: str, symbol: bool) -> SpecError:
    """A mod takes a value out of a tensor."""
    if not symbol:
        return refused(
            f"the mod takes a Python value out of a captured tensor ({name}), which would wait for the device",
            fix="use the tensor itself: one without dimensions is a number; or take the value outside of the mod",
        )
    if name == "__bool__":
        return refused(
            "the mod branches on a value that is known only in the kernel (`if`, `and`, `or`, `not`, `a < b < c`, min, max)",
            fix="write torch.where(condition, a, b), and combine conditions with & | ~",
        )
    return refused(
        f"the mod wants a Python number of a value that is known only in the kernel ({name})",
        fix="compute with torch functions",
    )


def _is_number(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a function that makes tensors makes a number here."""
    size = args[0] if args else kwargs.get("size", None)
    if name in ("tensor", "scalar_tensor", "as_tensor"):
        return isinstance(size, (bool, int, float))
    return isinstance(size, (tuple, list)) and len(size) == 0


def _flat(values: Any) -> list[Any]:
    found: list[Any] = []
    for x in values:
        if isinstance(x, (tuple, list)):
            found += _flat(x)
        elif isinstance(x, slice):
            found += _flat((x.start, x.stop, x.step))
        else:
            found.append(x)
    return found


def _kind_of(name: str, operands: list[Any]) -> str:
    """The kind of a result: what torch's promotion makes of the operands'."""
    if name in CONDITIONS:
        return "bool"
    if name in FLOATS:
        return "float"
    if name in INTEGERS:
        return "int"
    kinds = []
    for x in operands[1:] if name == "where" else operands:
        if isinstance(x, torch.dtype):
            return kind(x)
        if isinstance(x, torch.Tensor):
            kinds.append(kind(x.dtype))
        elif isinstance(x, (bool, int, float)):
            kinds.append("bool" if isinstance(x, bool) else "int" if isinstance(x, int) else "float")
    return "float" if "float" in kinds else "int" if "int" in kinds else "bool"
