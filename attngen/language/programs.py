"""Programs: expressions as plain data, and their values on torch tensors.

A `Node` is a tree of a few dozen operations with numbers, names and loads at its leaves. `program_of` makes one of whatever knows
how (the symbolic language registers itself, `attngen.language.expression.compiled`); `evaluate` walks it. No code is generated or
executed as text, and nothing here needs sympy: what a call evaluates, in a pack too, goes through here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, singledispatch
from typing import Any
from weakref import WeakValueDictionary

import torch

Value = Any  # a torch.Tensor or a Python number
LARGEST_ROUNDED = 2**30  # what floor and round give at most
LARGEST_SHIFT = 31
_MASK32 = 0xFFFFFFFF


class Node:
    """An operation on other nodes. Equal ones are one object, so that comparing and hashing costs nothing.

    op: "bool", "int" and "real" (value: the number), "integer" and "number" (value: a symbol's name, by its kind), "load" (value:
    the captured tensor's name; args: its indices), "power" (value: the exponent), or a key of `OPERATIONS`.
    """

    __slots__ = ("__weakref__", "args", "kind", "op", "value")

    op: str
    args: tuple[Node, ...]
    value: Any
    kind: str  # of a load's values: "float", "int" or "bool"

    def __new__(cls, op: str, args: tuple[Node, ...] = (), value: Any = None, kind: str = "") -> Node:
        key = op, args, type(value), value, kind
        found = _NODES.get(key)
        if found is None:
            found = super().__new__(cls)
            found.op, found.args, found.value, found.kind = op, args, value, kind
            found = _NODES.setdefault(key, found)
        return found

    def __reduce__(self) -> Any:
        return Node, (self.op, self.args, self.value, self.kind)

    def __repr__(self) -> str:
        inner = [] if self.value is None else [repr(self.value)]
        return f"{self.op}({', '.join([*inner, *map(repr, self.args)])})"


_NODES: WeakValueDictionary[Any, Node] = WeakValueDictionary()


def negative(node: Node) -> Node:
    """-node."""
    return Node("mul", (Node("int", (), -1), node))


INDEX = {name: Node("integer", (), name) for name in ("b", "h", "i", "j")}
ROW = Node("add", (Node("integer", (), "i"), negative(Node("integer", (), "q_offset"))))


@singledispatch
def program_of(expr: Any) -> Node:
    """The program of an expression: of a `Node` itself."""
    raise TypeError(f"no program of {type(expr).__name__}")


@program_of.register
def _(expr: Node) -> Node:
    return expr


@lru_cache(maxsize=8192)
def names_in(node: Node) -> frozenset[str]:
    """Names of the symbols in a program; captured tensors are none."""
    own = {node.value} if node.op in ("integer", "number") else set()
    return frozenset(own.union(*map(names_in, node.args)))


def evaluate(
    expr: Any, env: Mapping[str, Value], cache: dict[Any, Value] | None = None, real: torch.dtype = torch.float32
) -> Value:
    """The value of `expr`, a program or what has one, broadcast over the tensors in `env` (symbol or captured-tensor name ->
    value).

    `cache` keeps values of parts between calls on one env. `real` is the dtype that integers become where they meet fractions;
    floating tensors keep their own.

    Indices of loads outside the tensor are clamped, so that pairs a mask removes are harmless; whether an attended
    pair loads out of range is the caller's check.
    """
    return _value(program_of(expr), env, {} if cache is None else cache, real)


def _value(node: Node, env: Mapping[str, Value], cache: dict[Any, Value], real: torch.dtype) -> Value:
    if node in cache:
        return cache[node]
    apply = _operation(node)
    value = cache[node] = apply([_value(child, env, cache, real) for child in node.args], env, real)
    return value


def tensor_of(value: Value, device: torch.device) -> torch.Tensor:
    """A value as a tensor there. A number is made on the device: copying it there would wait for it."""
    if isinstance(value, torch.Tensor):
        if value.device == device or value.dim() or value.device.type != "cpu":
            return value.to(device)
        return torch.full((), value.item(), dtype=value.dtype, device=device)
    return torch.full((), value, device=device)


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape that tensors of these shapes broadcast to. (torch.broadcast_shapes loads sympy.)"""
    rank = max(map(len, shapes), default=0)
    sizes = zip(*[(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes], strict=True)
    return tuple(next((size for size in own if size != 1), 1) for own in sizes)


def uniform(seed: Value, b: Value, h: Value, i: Value, j: Value) -> Value:
    """The counter-based random number of `Uniform` as float32; arguments broadcast, integers of any width."""
    state, *counters = _tensors(seed, b, h, i, j)
    state = state.to(torch.int64)
    state = _mix(state ^ _mix(state >> 32))  # the high bits of a seed of 64; `fold_seed` does the same to a number
    for counter in counters:
        state = _mix(state ^ (counter.to(torch.int64) & _MASK32))
    return (state >> 8).to(torch.float32) * 2.0**-24


def fold_seed(seed: int) -> int:
    """Any int as one of 32 bits that draws the same numbers: below 2**32 itself."""
    word = seed & (2**64 - 1)
    return (word ^ int(_mix(torch.tensor(word >> 32)))) & _MASK32 if word >> 32 else word


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = x.to(torch.int64) & _MASK32  # 64-bit products of 32-bit words wrap, and their low 32 bits stay exact
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


Apply = Callable[[list[Value], Mapping[str, Value], torch.dtype], Value]


@lru_cache(maxsize=8192)
def _operation(node: Node) -> Apply:
    """How a node's value comes from those of its arguments: told once, not at every tile."""
    value = node.value
    if node.op in ("bool", "int"):
        return lambda args, env, real: value
    if node.op == "real":  # zero-dimensional: takes part in dtype promotion only by kind
        return lambda args, env, real: torch.tensor(value, dtype=real)
    if node.op in ("integer", "number"):

        def symbol(args: list[Value], env: Mapping[str, Value], real: torch.dtype) -> Value:
            found = env[value]
            return torch.tensor(found, dtype=real) if isinstance(found, float) else found

        return symbol
    if node.op == "load":
        return lambda args, env, real: _load(env[value], args)
    if node.op == "power":
        return _power(value)
    if node.op == "real mul":  # a product that may leave 64 bits
        return lambda args, env, real: _fold([torch.as_tensor(a).to(real) for a in args], operator.mul)
    if node.op in _REAL_FUNCTIONS:
        real_function = _REAL_FUNCTIONS[node.op]

        def apply(args: list[Value], env: Mapping[str, Value], real: torch.dtype) -> Value:
            tensors = [torch.as_tensor(arg) for arg in args]
            return real_function(*[t if t.is_floating_point() else t.to(real) for t in tensors])

        return apply
    function = _FUNCTIONS[node.op]
    return lambda args, env, real: function(*args)


def _power(exponent: int | float) -> Apply:
    if isinstance(exponent, int):
        return lambda args, env, real: args[0] ** exponent

    def apply(args: list[Value], env: Mapping[str, Value], real: torch.dtype) -> Value:
        tensor = torch.as_tensor(args[0])
        return torch.pow(tensor if tensor.is_floating_point() else tensor.to(real), exponent)

    return apply


def _fold(args: list[Value], combine: Any) -> Value:
    # Scalars first, then the small operands: a row and a scalar meet before either meets a tile.
    args = sorted(args, key=lambda a: a.numel() if isinstance(a, torch.Tensor) else 0)
    value = args[0]
    for arg in args[1:]:
        value = combine(value, arg)
    return value


def _load(tensor: torch.Tensor, indices: list[Value]) -> torch.Tensor:
    if 0 in tensor.shape:
        shapes = [index.shape for index in indices if isinstance(index, torch.Tensor)]
        return torch.zeros(broadcast(*shapes), dtype=tensor.dtype, device=tensor.device)
    placed: list[torch.Tensor] = []
    for index in indices:
        dim = len(placed)
        if isinstance(index, torch.Tensor):
            placed.append(index.long().clamp(0, tensor.shape[dim] - 1))
        else:  # a view costs less than one more index
            tensor = tensor.select(dim, min(max(int(index), 0), tensor.shape[dim] - 1))
    value = tensor[tuple(placed)] if placed else tensor
    return value.to(torch.int32) if value.dtype == torch.bool else value


def _tensors(*args: Value) -> list[torch.Tensor]:
    """All on the device of those that aren't on the CPU: fractions and float params are numbers there."""
    devices = [a.device for a in args if isinstance(a, torch.Tensor)]
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    return [tensor_of(a, device) for a in args]


def _lattice(function: Any) -> Any:
    def apply(*args: Value) -> Value:
        if not any(isinstance(arg, torch.Tensor) for arg in args):
            return min(args) if function is torch.minimum else max(args)
        return _fold(list(args), lambda a, b: function(*_tensors(a, b)))

    return apply


def _where(condition: Value, a: Value, b: Value) -> Value:
    if isinstance(condition, bool):
        return a if condition else b
    return torch.where(condition, a, b)


def _whole(x: torch.Tensor) -> torch.Tensor:
    """A rounded number as an integer; nan is the smallest."""
    x = x.float() if x.itemsize == 2 else x
    return x.nan_to_num(nan=-torch.inf).clamp(-LARGEST_ROUNDED, LARGEST_ROUNDED).to(torch.int64)


def _constant(a: Value) -> Value:
    """What a step function takes: it has no slope, and torch no derivative of it."""
    return a.detach() if isinstance(a, torch.Tensor) else a


def _steps(n: Value) -> Value:
    """How far to shift, in 0 .. 31."""
    return n.clamp(0, LARGEST_SHIFT) if isinstance(n, torch.Tensor) else min(max(n, 0), LARGEST_SHIFT)


def _long(a: Value) -> Value:
    return a.long() if isinstance(a, torch.Tensor) else a


_REAL_FUNCTIONS: dict[str, Any] = {
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp2": torch.exp2,
    "raise": torch.pow,
    "floor": lambda x: _whole(torch.floor(x)),
    "round": lambda x: _whole(torch.round(x)),
}
_FUNCTIONS: dict[str, Any] = {
    "add": lambda *args: _fold(list(args), operator.add),
    "mul": lambda *args: _fold(list(args), operator.mul),
    "and": lambda *args: _fold(list(args), operator.and_),
    "or": lambda *args: _fold(list(args), operator.or_),
    "abs": abs,
    "floordiv": lambda a, b: _constant(a) // _constant(b),
    "mod": lambda a, b: a % b,
    "min": _lattice(torch.minimum),
    "max": _lattice(torch.maximum),
    "where": _where,
    "uniform": uniform,
    "bit and": lambda *args: _fold(list(args), operator.and_),
    "bit or": lambda *args: _fold(list(args), operator.or_),
    "bit xor": lambda *args: _fold(list(args), operator.xor),
    "shift left": lambda a, n: _long(a) << _steps(n),
    "shift right": lambda a, n: a >> _steps(n),
    ">=": lambda a, b: a >= b,
    ">": lambda a, b: a > b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}
OPERATIONS = frozenset({"power", "real mul", *_REAL_FUNCTIONS, *_FUNCTIONS})
_ANY_NUMBER = {"add", "mul", "real mul", "and", "or", "min", "max", "bit and", "bit or", "bit xor"}
_ONE = {"power", "abs", *_REAL_FUNCTIONS} - {"raise"}
_OTHERS = {"where": 3, "uniform": 5}


def takes(op: str, count: int) -> bool:
    """Whether an operation takes so many arguments."""
    return count >= 1 if op in _ANY_NUMBER else count == (1 if op in _ONE else _OTHERS.get(op, 2))
