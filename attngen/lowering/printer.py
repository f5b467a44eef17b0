"""From sympy expressions to values.

The printer keeps a value in the smallest shape it has: what varies along one axis is computed as a vector and only then
spread over the tile. So a load of `slope[h]` may stand in front of every loop and `doc[b, i]` in front of the loop over keys;
where things stand is decided by `passes`. Which of i and j lies along the rows of a tile is a choice of the kernel: the
backward for keys works on transposed tiles.

Integers are int32 (captured int64 tensors stay int64) and round towards minus infinity as in Python; reals are float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
from sympy.core.relational import Relational

from attngen.language.expression import (
    ROW,
    Absolute,
    B,
    BitAnd,
    BitOr,
    BitXor,
    Erf,
    Exp2,
    Floor,
    FloorDiv,
    H,
    I,
    J,
    Load,
    Maximum,
    Minimum,
    Power,
    PyMod,
    Round,
    S,
    ShiftLeft,
    ShiftRight,
    Sigmoid,
    Uniform,
    Where,
    is_flag,
    kind,
    linear_terms,
)
from attngen.lowering.passes import stem
from attngen.lowering.statements import (
    AND,
    ATOM,
    COMPARE,
    OR,
    PRODUCT,
    SCALAR,
    SUM,
    TILE,
    UNARY,
    XOR,
    Axes,
    Call,
    Cast,
    Chain,
    Name,
    Named,
    Number,
    Spread,
    Value,
    value_of,
)

BLOCKS = ("BLOCK_M", "BLOCK_N")  # what a walk divides by them is never negative

_SIGNS = {sympy.Ge: ">=", sympy.Gt: ">", sympy.Eq: "==", sympy.Ne: "!="}
_FLIPPED = {">=": "<=", ">": "<", "<=": ">=", "<": ">", "==": "==", "!=": "!="}
# Functions from the inside out: `whole(tl.floor(x))`. Those without "tl." are helpers.
_CALLS: dict[Any, tuple[str, ...]] = {
    sympy.exp: ("tl.exp",),
    sympy.log: ("tl.log",),
    sympy.tanh: ("tanh",),
    sympy.sin: ("tl.sin",),
    sympy.cos: ("tl.cos",),
    Sigmoid: ("tl.sigmoid",),
    Absolute: ("tl.abs",),
    Erf: ("tl.erf",),
    Exp2: ("tl.exp2",),
    Power: ("power",),
    Floor: ("tl.floor", "whole"),
    Round: ("nearest", "whole"),
}
# Operators on integers: they bind in Python as in Triton, but are put in parentheses, since few know how strongly.
_BITS = {BitAnd: "&", BitOr: "|", BitXor: "^"}
_SHIFTS = {ShiftLeft: "<<", ShiftRight: ">>"}
# What a vector is called that the other axis' positions are compared with, by the sign between it and them.
_THRESHOLDS = {"<=": "first", "<": "before", ">=": "last", ">": "stop", "==": "same", "!=": "other"}
SMALLEST_FLOAT, LARGEST_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal float32 numbers


@dataclass
class Printer:
    """Prints expressions for one place of a kernel.

    rows: the axis ("i" or "j") along the rows of a tile. symbols: variables of the kernel by symbol. names: what it calls
    captured tensors. trusted: the plain indices that the runtime has checked against the captured tensors' extents. along: the
    axes of symbols that stand for vectors. exists: an axis all of whose lanes exist here. wide: whether integers are computed
    in 64 bits, see `width.needs_64_bits`.
    """

    rows: str = "i"
    symbols: Mapping[Any, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    trusted: frozenset[Any] = frozenset({B, H, I, J})
    along: Mapping[Any, Axes] = field(default_factory=dict)
    exists: str | None = None
    wide: bool = False
    _known: dict[Any, Value] = field(default_factory=dict, repr=False)

    def value(self, expr: Any) -> Value:
        """The expression in its smallest shape."""
        if expr not in self._known:
            value = self._print(expr)
            self._known[expr] = Named(value, self._load_stem(expr)) if isinstance(expr, Load) else value
        return self._known[expr]

    def operand(self, expr: Any) -> Value:
        """The expression as an operand that broadcasts to a tile."""
        return self.spread(self.value(expr))

    def spread(self, value: Value, stem_: str = "") -> Value:
        """A vector as a row or a column of the tile; scalars and tiles as they are."""
        if len(value.axes) != 1:
            return value
        if not isinstance(value, (Name, Named)):
            value = Named(value, stem_ or stem(value))
        return Spread(value, "[:, None]" if value.axes == {self.rows} else "[None, :]")

    def axes(self, expr: Any) -> Axes:
        """Which of i and j an expression varies along."""
        axes: Axes = SCALAR
        for symbol in expr.free_symbols:
            if symbol in self.along:
                axes |= self.along[symbol]
            elif symbol == S:
                axes |= TILE
            elif symbol in (I, J):
                axes |= {symbol.name}
        return axes

    # -- shapes -------------------------------------------------------------------------------------------------------

    def _operands(self, args: Iterable[Any], axes: Axes) -> list[Value]:
        """Operands of a node with these axes: under a tile vectors are spread."""
        return [self.operand(arg) if axes == TILE else self.value(arg) for arg in args]

    def _load_stem(self, load: Load) -> str:
        plain = [index.name for index in load.indices if index.is_Symbol]
        name = self.names.get(load.name, load.name)
        return "_".join([name, *plain]) if 0 < len(plain) == len(load.indices) else f"{name}_value"

    def _cost(self, expr: Any) -> tuple[int, str]:
        return len(self.axes(expr)), sympy.srepr(expr)

    def _reading(self, term: Any) -> tuple[bool, bool, int, str]:
        """Order of the terms of a sum: positive before negative, what varies most first, numbers last."""
        return term.is_Number, term.could_extract_minus_sign(), -len(self.axes(term)), sympy.srepr(term)

    # -- expressions --------------------------------------------------------------------------------------------------

    def _print(self, expr: Any) -> Value:
        if expr.is_Symbol:
            return self._symbol(expr)
        if expr.is_Number or expr.is_infinite:
            return number(expr)
        if isinstance(expr, Relational):
            return self._comparison(expr)
        if isinstance(expr, (sympy.And, sympy.Or)):
            sign, strength = (" & ", AND) if isinstance(expr, sympy.And) else (" | ", OR)
            return self._joined(expr, sorted(expr.args, key=self._cost), sign, strength)
        if isinstance(expr, Load):
            return self._load(expr)
        if expr.is_Add:
            return self._sum(expr)
        if expr.is_Mul:
            return self._product(expr)
        if expr.is_Pow:
            return self._power(expr)
        if isinstance(expr, Uniform):
            return self._uniform(expr)
        if isinstance(expr, (FloorDiv, PyMod)):
            return self._division(expr)
        return self._call(expr)

    def _symbol(self, symbol: Any) -> Value:
        variable = Name(self.symbols.get(symbol, symbol.name), self.axes(symbol), kind(symbol))
        narrow = symbol in (B, H) or variable.name in BLOCKS
        return variable.to("int64") if self.wide and variable.kind == "int" and not narrow else variable

    def _joined(self, expr: Any, args: list[Any], sign: str, strength: int) -> Value:
        """An associative operator; operands of a smaller shape are joined among themselves first."""
        axes = self.axes(expr)
        groups: dict[Axes, list[Any]] = {}
        for arg in args:
            groups.setdefault(self.axes(arg), []).append(arg)
        scalars = groups.pop(SCALAR, []) if len(groups) > 2 else []
        if len(groups) > 1:
            smallest = min(groups, key=len)
            groups[smallest] += scalars  # a scalar joins a vector rather than the tile
            args = [g[0] if len(g) == 1 else expr.func(*g, evaluate=False) for g in groups.values()]
        return chain([(sign, value, strength + 1) for value in self._operands(args, axes)], strength, kind(expr))

    def _comparison(self, expr: Relational) -> Value:
        """`e >= 0` with the terms on two sides: rows against columns where the sum separates, so a tile needs one
        comparison per element and no arithmetic; else positive against negative terms."""
        sign = next(sign for relation, sign in _SIGNS.items() if isinstance(expr, relation))
        left, right = expr.lhs - expr.rhs if expr.rhs != 0 else expr.lhs, sympy.Integer(0)
        terms, constant = linear_terms(left)
        parts = [c * t for t, c in terms.items()]
        axes = self.axes(expr)
        exact = kind(left) == "int" or len(parts) + (constant != 0) == 2  # else the order of the sum would matter
        if exact and axes == TILE and all(self.axes(p) != TILE for p in parts):
            columns = [p for p in parts if self.axes(p) - {self.rows}]
            left = sympy.Add(*[p for p in parts if p not in columns], constant)
            right = -sympy.Add(*columns)
            if right.could_extract_minus_sign():
                left, right, sign = -left, -right, _FLIPPED[sign]
        elif exact:
            left = sympy.Add(*[p for p in parts if not p.could_extract_minus_sign()], max(constant, 0))
            right = -sympy.Add(*[p for p in parts if p.could_extract_minus_sign()], min(constant, 0))
            if left.is_Number:  # j <= 3, not 3 >= j
                left, right, sign = right, left, _FLIPPED[sign]
        a, b = self.value(left), self.value(right)
        if axes == TILE:
            a, b = self.spread(a, _threshold(sign, right)), self.spread(b, _threshold(_FLIPPED[sign], left))
        return chain([("", a, OR), (f" {sign} ", b, OR)], COMPARE, "bool")

    def _sum(self, expr: Any) -> Value:
        axes = self.axes(expr)
        terms = sorted(expr.args, key=self._reading)
        if axes == TILE:
            terms = self._grouped(terms)
        to_float = kind(expr) == "float"
        operands: list[tuple[str, Value, int]] = []
        for term in terms:
            negative = bool(operands) and term.could_extract_minus_sign()
            (value,) = self._operands([-term if negative else term], axes)
            sign, needed = (" - ", PRODUCT) if negative else (" + ", SUM)
            operands.append((sign, as_float(value) if to_float else value, needed))
        return chain(operands, SUM, kind(expr))

    def _grouped(self, terms: list[Any]) -> list[Any]:
        """Terms of a tile-shaped sum with those of one vector shape, and the scalars with one of them, added first."""
        groups: dict[tuple[Axes, bool], list[Any]] = {}
        for term in terms:
            groups.setdefault((self.axes(term), kind(term) == "int"), []).append(term)
        for integer in (True, False):
            scalars = groups.get((SCALAR, integer))
            home = next((key for key in groups if len(key[0]) == 1 and key[1] == integer), None)
            if scalars and home is not None:
                groups[home] = [*groups[home], *groups.pop((SCALAR, integer))]
        # Integer parts are added as integers (exact), and converted once.
        tiles = [t for (axes, _), group in groups.items() if axes == TILE for t in group]
        rest = [sympy.Add(*group) for (axes, _), group in groups.items() if axes != TILE]
        if any(kind(term) == "float" for term in terms):
            whole = [t for t in tiles + rest if kind(t) == "int"]
            if len(whole) > 1:
                return [t for t in tiles + rest if kind(t) != "int"] + [sympy.Add(*whole)]
        return sorted(rest + tiles, key=lambda t: (t.could_extract_minus_sign(), self._cost(t)))

    def _product(self, expr: Any) -> Value:
        coefficient, rest = expr.as_coeff_Mul()
        axes, to_float = self.axes(expr), kind(expr) == "float"
        if coefficient == -1:
            (inner,) = self._operands([-expr], axes)
            return Chain((("-", inner, UNARY),), UNARY, inner.kind)
        factors = sorted(sympy.Mul.make_args(rest), key=self._cost)
        above = [f for f in factors if not _is_reciprocal(f)]
        below = [sympy.Pow(f.base, -f.exp) for f in factors if _is_reciprocal(f)]
        if coefficient != 1 or not above:
            above.insert(0, coefficient)
        operands = [(" * ", as_float(v) if to_float else v, UNARY) for v in self._operands(above, axes)]
        operands += [(" / ", as_float(v), UNARY) for v in self._operands(below, axes)]
        return chain(operands, PRODUCT, kind(expr))

    def _power(self, expr: Any) -> Value:
        base, exponent = expr.args
        axes = self.axes(expr)
        if exponent.is_Rational and exponent < 0:
            (below,) = self._operands([sympy.Pow(base, -exponent)], axes)
            return chain([("", Number("1.0", "float"), UNARY), (" / ", as_float(below), UNARY)], PRODUCT, "float")
        (value,) = self._operands([base], axes)
        if exponent.is_Rational and exponent.q == 2:
            root = Call("tl.sqrt", (as_float(value),), "float")
            return chain([(" * ", root, UNARY)] * int(exponent.p), PRODUCT, "float")
        if not exponent.is_Integer:
            raise AssertionError(f"no Triton text for {expr}")
        if value.strength != ATOM:
            value = Named(value, stem(value))
        return chain([(" * ", value, UNARY)] * int(exponent), PRODUCT, value.kind)

    def _call(self, expr: Any) -> Value:
        to_float = kind(expr) == "float"
        operands = self._operands(expr.args, self.axes(expr))
        if isinstance(expr, Where):
            yes, no = (as_float(value) if to_float else value for value in operands[1:])
            return Call("tl.where", (operands[0], yes, no), kind(expr))
        operands = [as_float(value) if to_float else value for value in operands]
        if isinstance(expr, (Minimum, Maximum)):
            function = "tl.minimum" if isinstance(expr, Minimum) else "tl.maximum"
            value = operands[0]
            for other in operands[1:]:
                value = Call(function, (value, other), kind(expr))
            return value
        if type(expr) in _BITS:
            sign = f" {_BITS[type(expr)]} "
            return Call("", (chain([(sign, operand, ATOM) for operand in operands], OR, "int"),))
        if type(expr) in _SHIFTS:
            left: Value = operands[0]
            if isinstance(expr, ShiftLeft):
                number_ = isinstance(left, Number)
                left = Call("tl.full", (Name("[]"), left, Name("tl.int64"))) if number_ else left.to("int64")
            shifted = [("", left, ATOM), (f" {_SHIFTS[type(expr)]} ", Call("steps", (operands[1],)), ATOM)]
            return Call("", (chain(shifted, OR, "int"),))
        if type(expr) not in _CALLS:
            raise AssertionError(f"no Triton text for {type(expr).__name__}")
        if not isinstance(expr, Absolute):
            operands = [as_float(value) for value in operands]
        first, *outer = ("tanh_exact",) if _is_near_0(expr) else _CALLS[type(expr)]
        value = Call(first, tuple(operands), kind(expr) if not outer else "float")
        for function in outer:
            value = Call(function, (value,), kind(expr))
        return value

    def _division(self, expr: Any) -> Value:
        a, b = expr.args
        function, sign = ("floor_div", "//") if isinstance(expr, FloorDiv) else ("floor_mod", "%")
        if sign == "//" and str(b) in BLOCKS and b in a.free_symbols:  # the analysis rounds up with a + block - 1
            return Call("tl.cdiv", (self.value(a - b + 1), self.value(b)))
        left, right = self._operands(expr.args, self.axes(expr))
        if kind(expr) == "float" or kind(a) == "float":
            operands = (as_float(left), as_float(right)) if kind(expr) == "float" else (left, right)
            return Call(f"{function}_real", operands, kind(expr))
        if str(b) in BLOCKS or (_nonnegative(a) and b.is_Integer and b > 0):
            # Triton's // and % truncate, which is the same here.
            return chain([("", left, PRODUCT), (f" {sign} ", right, UNARY)], PRODUCT, "int")
        return Call(function, (left, right))

    def _uniform(self, expr: Uniform) -> Value:
        """Uniform as its chain of rounds, each in the smallest shape it has: only the last is as large as a tile."""
        seed, *counters = expr.args
        word: Value = self.value(seed).to("uint32")
        if isinstance(seed, Load):  # of up to 64 bits; a param's are folded before the launch
            whole = Named(self.value(seed).to("int64"), "seed_word")
            high = Call("", (chain([("", whole, ATOM), (" >> ", value_of(32), ATOM)], OR, "int"),)).to("uint32")
            low = whole.to("uint32")
            word = chain([("", low, XOR + 1), (" ^ ", Call("mix", (high,)), XOR + 1)], XOR, "int")
        rounds = Call("mix", (word,))
        for counter in counters:
            state, word = Named(rounds, "hash"), self.value(counter)
            both = [self.spread(v) if state.axes | word.axes == TILE else v for v in (state, word)]
            mixed = chain([(" ^ ", both[0], XOR + 1), (" ^ ", both[1].to("uint32"), XOR + 1)], XOR, "int")
            last = counter == counters[-1]
            rounds = Call("uniform", (mixed,), "float") if last else Call("mix", (mixed,))
        return rounds

    # -- loads --------------------------------------------------------------------------------------------------------

    def _load(self, expr: Load) -> Value:
        """A gather from a captured tensor. No lane reads out of range: a plain index of `trusted` is in range by the
        runtime's check of the shapes, any other is clamped (as in `programs.evaluate`).
        """
        tensor = self.names.get(expr.name, expr.name)
        by_shape: dict[Axes, list[tuple[int, Any]]] = {}
        for dim, index in enumerate(expr.indices):
            by_shape.setdefault(self.axes(index), []).append((dim, index))
        pointer: Value = Name(tensor, kind="pointer")
        for shape in sorted(by_shape, key=lambda shape: (len(shape), self.rows not in shape)):
            if isinstance(pointer, Chain):  # what is known earlier, or has a smaller shape, is added up on its own
                pointer = Named(pointer, f"{tensor}_at" if pointer.axes else f"{tensor}_base")
            for dim, index in by_shape[shape]:
                value = self._inside(tensor, dim, index)
                if value.axes != pointer.axes and pointer.axes | value.axes == TILE:
                    pointer, value = self.spread(pointer), self.spread(value)
                offset = value.to("int64") * Name(f"{tensor}_stride_{dim}")
                pointer = chain([*_terms(pointer), (" + ", offset, PRODUCT)], SUM, "pointer")
        # Integers keep their width: an id of 64 bits must not be cut to 32.
        loaded: Value = Call("tl.load", (pointer,), kind(expr))
        if kind(expr) == "float":
            return loaded.to("float32")
        return loaded.to("int32") if is_flag(expr) else loaded.to("int64") if self.wide else loaded

    def flat(self, load: Load, dims: Iterable[int]) -> Value:
        """The place of a load within these dimensions of its tensor, counted row by row."""
        tensor = self.names.get(load.name, load.name)
        first, *rest = dims
        place = self._inside(tensor, first, load.indices[first])
        for dim in rest:
            index = self.spread(self._inside(tensor, dim, load.indices[dim]))
            place = self.spread(place) * Name(f"{tensor}_size_{dim}") + index
        return place

    def _inside(self, tensor: str, dim: int, index: Any) -> Value:
        """An index that is in range, also on the lanes past the end of a tile that reaches beyond it."""
        value = self.value(index)
        if index == ROW:  # as long as the call has rows: the runtime's check
            return value if self.exists == "i" else Name("i_safe", value.axes) - Name("q_offset")
        if index in self.trusted:
            plain = index not in (I, J) or index.name == self.exists
            return value if plain else Name(f"{index.name}_safe", value.axes)
        inside = Call("tl.minimum", (value, Name(f"{tensor}_size_{dim}") - Number("1")))
        if not _nonnegative(index):
            inside = Call("tl.maximum", (inside, Number("0")))
        return Named(inside, f"{tensor}_index")


def number(value: Any) -> Number:
    """A constant: an integer, or a float that float32 can hold; with others Triton would compute in float64."""
    if not value.is_infinite and kind(value) == "int":
        return Number(str(value), "int")
    real = float(value)
    if abs(real) > LARGEST_FLOAT:
        return Number('float("-inf")' if real < 0 else 'float("inf")', "float")
    return Number(repr(real if abs(real) >= SMALLEST_FLOAT else 0.0), "float")


def as_float(value: Value) -> Value:
    """A value as float32."""
    if value.kind == "float":
        return value
    return Number(f"{value}.0", "float") if isinstance(value, Number) else Cast(value, "tl.float32", "float")


def chain(operands: list[tuple[str, Value, int]], strength: int, kind_: str) -> Value:
    """`a + b - c` from (sign, operand, strength it needs) triples; what stands alone stays as it is."""
    return Chain(tuple(operands), strength, kind_) if len(operands) > 1 else operands[0][1]


def _terms(pointer: Value) -> tuple[tuple[str, Value, int], ...]:
    return pointer.operands if isinstance(pointer, Chain) else (("", pointer, SUM),)


def _threshold(sign: str, other: Any) -> str:
    """The name of what is compared with `other`, the positions of an axis: `first_key <= j`."""
    nouns = {I: "query", J: "key"}
    return f"{_THRESHOLDS[sign]}_{nouns[other]}" if other in nouns else ""


def _is_near_0(expr: Any) -> bool:
    """Whether this is a tanh whose relative error may matter near 0. Of a soft cap by a moderate number it does not: what is
    capped is off by at most the cap times float32's step."""
    factor, rest = expr.args[0].as_coeff_Mul()
    return isinstance(expr, sympy.tanh) and not (rest == S and abs(factor) >= 2.0**-10)


def _is_reciprocal(factor: Any) -> bool:
    return bool(factor.is_Pow and factor.exp.is_Rational and factor.exp < 0)


def _nonnegative(expr: Any) -> bool:
    if expr.is_Rational:
        return bool(expr >= 0)
    if expr.is_Symbol:
        return expr in (B, H, J)
    return bool(expr.is_Add or expr.is_Mul) and all(_nonnegative(arg) for arg in expr.args)
