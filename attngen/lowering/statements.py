"""What the varying part of a kernel is made of: values, and statements over them. `str()` of a value is its Triton text.

A value knows its axes (which of the query axis "i" and the key axis "j" it varies along: none is a scalar, one a vector,
both a tile), its kind ("int", "float", "bool" or "pointer") and the variables it reads. Values compare by what they are, so that
equal ones can be computed once. Operators on them build expressions: `program // tiles % heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

# Binding strength in Python, loosest first; an operand that binds looser than its place needs is put in parentheses.
COMPARE, OR, AND, XOR, SUM, PRODUCT, UNARY, ATOM = range(8)
_STRENGTHS = {"<": COMPARE, "&": AND, "^": XOR, "+": SUM, "-": SUM} | dict.fromkeys(("*", "/", "//", "%"), PRODUCT)
_KINDS = dict.fromkeys(("<", "&"), "bool")

LINE = 96  # a line with its comment, without the indentation

Axes = frozenset[str]
SCALAR: Axes = frozenset()
TILE: Axes = frozenset("ij")
BLOCKS = {"i": "BLOCK_M", "j": "BLOCK_N"}


class Value:
    """The part that all values share. `parts`: the values directly inside."""

    kind: str
    strength: int

    @property
    def parts(self) -> tuple[Value, ...]:
        return ()

    def with_parts(self, parts: tuple[Value, ...]) -> Value:
        """The same operation on other values."""
        return self

    @cached_property
    def axes(self) -> Axes:
        return frozenset().union(*(part.axes for part in self.parts))

    @cached_property
    def reads(self) -> frozenset[str]:
        """The variables in it."""
        return frozenset().union(*(part.reads for part in self.parts))

    def at(self, strength: int) -> str:
        """Its text as an operand of at least that strength."""
        return f"({self})" if self.strength < strength else str(self)

    @property
    def factor(self) -> str:
        """Its text as a factor of a product."""
        return self.at(UNARY)

    def walk(self) -> Iterator[Value]:
        """Itself and all values in it, as often as they stand there."""
        yield self
        for part in self.parts:
            yield from part.walk()

    def _joined(self, sign: str, other: Any, swapped: bool = False) -> Chain:
        left, right = (value_of(other), self) if swapped else (self, value_of(other))
        strength = _STRENGTHS[sign]
        kind = _KINDS.get(sign, left.kind)
        return Chain(((sign, left, strength), (f" {sign} ", right, strength + 1)), strength, kind)

    def __add__(self, other: Any) -> Chain:
        return self._joined("+", other)

    def __sub__(self, other: Any) -> Chain:
        return self._joined("-", other)

    def __mul__(self, other: Any) -> Chain:
        return self._joined("*", other)

    def __rmul__(self, other: Any) -> Chain:
        return self._joined("*", other, swapped=True)

    def __floordiv__(self, other: Any) -> Chain:
        return self._joined("//", other)

    def __mod__(self, other: Any) -> Chain:
        return self._joined("%", other)

    def __and__(self, other: Any) -> Chain:
        return self._joined("&", other)

    def less(self, other: Any) -> Chain:
        """`self < other` in the kernel."""
        return self._joined("<", other)

    def to(self, dtype: str) -> Cast:
        """`self.to(tl.int64)` for "int64"."""
        return Cast(self, f"tl.{dtype}", "float" if dtype.startswith("float") else self.kind)


@dataclass(frozen=True)
class Name(Value):
    """A variable of the kernel. `along`: its axes."""

    name: str
    along: Axes = SCALAR
    kind: str = "int"
    strength = ATOM

    @property
    def axes(self) -> Axes:  # type: ignore[override]
        return self.along

    @cached_property
    def reads(self) -> frozenset[str]:
        return frozenset({self.name})

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Number(Value):
    """A constant, as the kernel spells it."""

    text: str
    kind: str = "int"

    @property
    def strength(self) -> int:  # type: ignore[override]
        return UNARY if self.text.startswith("-") else ATOM

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Chain(Value):
    """Operands joined from the left: `a + b - c`. Each has the sign in front of it and the strength that it needs; the first
    one's sign is not printed, unless it is the only one: `-a`."""

    operands: tuple[tuple[str, Value, int], ...]
    strength: int
    kind: str

    @property
    def parts(self) -> tuple[Value, ...]:
        return tuple(operand for _, operand, _ in self.operands)

    def with_parts(self, parts: tuple[Value, ...]) -> Value:
        joined = zip(self.operands, parts, strict=True)
        return replace(self, operands=tuple((sign, part, needed) for (sign, _, needed), part in joined))

    def __str__(self) -> str:
        first, *rest = [operand.at(needed) for _, operand, needed in self.operands]
        signs = [sign for sign, _, _ in self.operands]
        if not rest:
            return signs[0] + first
        return first + "".join(sign + text for sign, text in zip(signs[1:], rest, strict=True))


@dataclass(frozen=True)
class Call(Value):
    """`function(args, name=value)`; a function without "tl." is a helper of `templates/helpers`, and without a name these are just
    parentheses."""

    function: str
    args: tuple[Value, ...]
    kind: str = "int"
    named: tuple[tuple[str, Value], ...] = ()
    strength = ATOM

    @property
    def parts(self) -> tuple[Value, ...]:
        return (*self.args, *(value for _, value in self.named))

    def with_parts(self, parts: tuple[Value, ...]) -> Value:
        own = len(self.args)
        named = tuple((name, part) for (name, _), part in zip(self.named, parts[own:], strict=True))
        return replace(self, args=parts[:own], named=named)

    def __str__(self) -> str:
        return f"{self.function}({', '.join([*map(str, self.args), *(f'{n}={v}' for n, v in self.named)])})"


@dataclass(frozen=True)
class Around(Value):
    """A value that is one other value in another form."""

    value: Value
    strength = ATOM

    @property
    def parts(self) -> tuple[Value, ...]:
        return (self.value,)

    def with_parts(self, parts: tuple[Value, ...]) -> Value:
        return replace(self, value=parts[0])


@dataclass(frozen=True)
class Cast(Around):
    """`value.to(dtype)`."""

    dtype: str
    kind: str

    def __str__(self) -> str:
        return f"{self.value.at(ATOM)}.to({self.dtype})"


@dataclass(frozen=True)
class Spread(Around):
    """A vector as a column of the tile ("[:, None]", it varies along the rows) or as a row ("[None, :]")."""

    index: str

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.value.kind

    def __str__(self) -> str:
        return self.value.at(ATOM) + self.index


@dataclass(frozen=True)
class Named(Around):
    """A value that shall have a variable of its own, called `stem` or, where that is taken, `stem_2` (`passes.unnest`)."""

    stem: str

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.value.kind

    def with_parts(self, parts: tuple[Value, ...]) -> Value:
        inner = parts[0]
        return replace(self, value=inner.value if isinstance(inner, Named) else inner)

    def __str__(self) -> str:
        return self.stem


def value_of(value: Any) -> Value:
    """A number as a value; a value as it is."""
    return (
        Number(str(value), "int" if isinstance(value, int) else "float") if isinstance(value, (int, float)) else value
    )


def name(text: str, axes: Iterable[str] = (), kind: str = "int") -> Name:
    """A variable that varies along these axes."""
    return Name(text, frozenset(axes), kind)


def call(function: str, *args: Any, kind: str = "int", **named: Any) -> Call:
    """A call of plain arguments."""
    pairs = tuple((key, value_of(value)) for key, value in named.items())
    return Call(function, tuple(map(value_of, args)), kind, pairs)


def unhoisted(*bounds: Any) -> Call:
    """A range around a kernel's loops from which the compiler moves nothing out: what one turn has in common with the next would
    take registers from them.
    """
    return call("tl.range", *bounds, disable_licm=True)


def arange(block: str) -> Call:
    """`tl.arange(0, block)`."""
    return call("tl.arange", 0, name(block))


def rebuilt(value: Value, change: Callable[[Value], Value]) -> Value:
    """`value` with `change` applied to every value in it, innermost first."""
    parts = tuple(rebuilt(part, change) for part in value.parts)
    return change(value.with_parts(parts) if parts != value.parts else value)


# -- statements -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assign:
    """`target = value`. reason: the comment above the group of statements that begins here. inline: not a line of its own; the
    outline puts the value where it needs it. parts: what a number and a condition in it are called if they need lines of their
    own."""

    target: Name
    value: Value
    reason: str = ""
    inline: bool = False
    parts: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Loop:
    """`for variable in range:`, whose body begins with `body`; the outline goes on with it."""

    variable: str
    range: Value
    body: tuple[Assign, ...]
    reason: str


Statements = tuple[Assign, ...]


def assign(target: str, value: Any, axes: Iterable[str] = (), reason: str = "") -> Assign:
    """A statement that gives a variable of the outline its value."""
    value = value_of(value)
    return Assign(Name(target, frozenset(axes), value.kind), value, reason)


def lines(statements: Iterable[Assign], rows: str, blocks: Mapping[str, str] = BLOCKS) -> list[str]:
    """The statements as text. `rows`: the axis along the rows of a tile; blocks: how long a vector along an axis is."""
    out: list[str] = []
    for statement in statements:
        if statement.inline:
            continue
        if statement.reason:
            out += ["", f"# {statement.reason}"]
        line = f"{statement.target} = {statement.value}"
        comment = _shape(statement.target.axes, rows, blocks)
        out.append(line + comment if len(line + comment) <= LINE else line)
    return out


def _shape(axes: Axes, rows: str, blocks: Mapping[str, str]) -> str:
    shape = ", ".join(blocks[axis] for axis in (rows, *(TILE - {rows})) if axis in axes)
    return f"  # [{shape}]" if shape else ""
