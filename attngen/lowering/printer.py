"""From sympy expressions to Triton text.

Every expression has axes: the subset of b, h, i, j that it depends on. Without i and j it is a scalar, with one of
them a vector, with both a tile. The printer keeps a value in the smallest shape it has and names it at the outermost
place of the kernel where its axes are known, so that a load of `slope[h]` stands in front of every loop and `doc[b, i]`
in front of the loop over keys. Which of i and j lies along the rows of a tile is a choice of the kernel: the backward
for keys works on transposed tiles.

Integers are int32 (captured int64 tensors stay int64) and round towards minus infinity as in Python; reals are float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
from sympy.core.relational import Relational

from attngen.language.expression import (
    Q_OFFSET,
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

# Binding strength in Python, loosest first; an operand that binds looser than its place needs is put in parentheses.
COMPARE, OR, AND, XOR, SUM, PRODUCT, UNARY, ATOM = range(8)

WIDTH = 72  # a longer expression is cut into named steps, so that no line needs to be wrapped
LINE = 96  # a line with its comment, without the indentation

Axes = frozenset[str]
TILE: Axes = frozenset("ij")

SMALLEST_FLOAT, LARGEST_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal float32 numbers

BLOCKS = ("BLOCK_M", "BLOCK_N")  # what a walk divides by them is never negative

_SIGNS = {sympy.Ge: ">=", sympy.Gt: ">", sympy.Eq: "==", sympy.Ne: "!="}
_FLIPPED = {">=": "<=", ">": "<", "==": "==", "!=": "!="}
# Function -> its text and the helpers that stand in front of the kernel for it.
_CALLS: dict[Any, tuple[str, tuple[str, ...]]] = {
    sympy.exp: ("tl.exp({})", ()),
    sympy.log: ("tl.log({})", ()),
    sympy.tanh: ("tanh({})", ("tanh",)),
    sympy.sin: ("tl.sin({})", ()),
    sympy.cos: ("tl.cos({})", ()),
    Sigmoid: ("tl.sigmoid({})", ()),
    Absolute: ("tl.abs({})", ()),
    Erf: ("tl.erf({})", ()),
    Exp2: ("tl.exp2({})", ()),
    Power: ("power({}, {})", ("power",)),
    Floor: ("whole(tl.floor({}))", ("whole",)),
    Round: ("whole(nearest({}))", ("nearest", "whole")),
}
# Operators on integers: they bind in Python as in Triton, but are put in parentheses, since few know how strongly.
_BITS = {BitAnd: "&", BitOr: "|", BitXor: "^"}
_SHIFTS = {ShiftLeft: "<<", ShiftRight: ">>"}


class Mix(sympy.Function):
    """Mix(u) or Mix(u, x): one round of the counter hash on u ^ x, as uint32. Uniform is a chain of them."""


class Pointer(sympy.Function):
    """Pointer(tensor, dim, index, ...): a captured tensor's address with these indices; a key for names, never printed."""


@dataclass(frozen=True)
class Text:
    """Printed expression: its text, how strongly it binds, the axes it depends on and its kind."""

    text: str
    strength: int
    axes: Axes
    kind: str

    def at(self, strength: int) -> str:
        return f"({self.text})" if self.strength < strength else self.text


@dataclass
class Place:
    """A point of the kernel that statements can be put at: the axes that are known there, and the statements."""

    axes: Axes
    lines: list[str] = field(default_factory=list)


class Printer:
    """Prints expressions into statements at `places` (outermost first) and returns the names of the results.

    `rows` is the axis ("i" or "j") along the rows of a tile. `symbols` maps symbols to variables of the kernel.
    `trusted` are the plain indices that the runtime has checked against the captured tensors' extents; `tensor_names`
    maps captured tensors to the kernel's arguments. `used` collects the variables that expressions read. A printer made
    by `inside` adds a place within a loop; what it names is not seen by its siblings.
    """

    def __init__(
        self,
        places: Iterable[Place],
        rows: str = "i",
        symbols: Mapping[Any, str] | None = None,
        trusted: Iterable[Any] = (B, H, I, J),
        tensor_names: Mapping[str, str] | None = None,
    ) -> None:
        self.places = list(places)
        self.rows = rows
        self.trusted = frozenset(trusted)
        self.tensor_names = dict(tensor_names or {})
        self.symbols = {B: "b", H: "h", I: "i", J: "j", S: "s", Q_OFFSET: "q_offset", **(symbols or {})}
        self.wide = False  # whether integers are computed in 64 bits, see `needs_64_bits`
        self.helpers: set[str] = set()
        self.used: set[str] = set()
        self.exists: str | None = None
        self.placed: dict[Any, Axes] = {}  # symbols that a statement defines, and where
        self.loaded: set[str] = set()  # captured tensors that some expression reads
        self.bounded: set[tuple[str, int]] = set()  # (tensor, dimension): extents needed for bounds checks
        self._names: dict[Any, Text] = {}
        self._taken: Counter[str] = Counter()
        self._shared: Counter[Any] = Counter()
        self._outer: Printer | None = None

    def inside(self, axes: Axes, exists: str | None = None) -> Printer:
        """A printer for the body of a loop, in which `axes` are known. `exists`: an axis all of whose lanes exist there."""
        child = Printer([*self.places, Place(axes)], self.rows, self.symbols, self.trusted, self.tensor_names)
        child.helpers, child.loaded, child.bounded = self.helpers, self.loaded, self.bounded
        child.placed, child.exists, child.wide = self.placed, exists, self.wide
        child._taken, child._shared, child._outer = self._taken, self._shared, self
        child._names = dict(self._names)
        return child

    # -- naming -------------------------------------------------------------------------------------------------------

    def define(self, symbol: Any, expr: Any) -> None:
        """Put `symbol = expr` at the innermost place; what depends on it then stays behind it."""
        self.places[-1].lines.append(f"{symbol.name} = {self._print(expr).text}")
        self.placed[symbol] = frozenset({"walk"})

    def share(self, *roots: Any) -> None:
        """Count the subexpressions of `roots`, so that what occurs more than once is computed once."""
        for root in roots:
            for node in sympy.preorder_traversal(root):
                if isinstance(node, (Load, Uniform)) or (type(node) in _CALLS and not isinstance(node, Absolute)):
                    self._shared[node] += 1

    def name(self, expr: Any, stem: str = "", value: Text | None = None) -> Text:
        """Put `stem = expr` at the outermost place where the axes of `expr` are known; once."""
        known = self._names.get(expr)
        if known is not None:
            return known
        value = self._print(expr) if value is None else value
        return self._assign(expr, value, stem or self._stem(value))

    def _assign(self, expr: Any, value: Text, stem: str) -> Text:
        index = next((n for n, place in enumerate(self.places) if value.axes <= place.axes), None)
        if index is None:
            raise AssertionError(f"no place of this kernel knows all of {sorted(value.axes)}, needed by {expr}")
        name = self._fresh(stem)
        line, comment = f"{name} = {value.text}", self._shape_comment(value.axes)
        self.places[index].lines.append(line + comment if len(line + comment) <= LINE else line)
        result = Text(name, ATOM, value.axes, value.kind)
        self._remember(expr, result, index)
        return result

    def _remember(self, expr: Any, result: Text, index: int) -> None:
        if expr is None:
            return
        self._names[expr] = result
        if self._outer is not None and index < len(self._outer.places):
            self._outer._remember(expr, result, index)

    def _fresh(self, stem: str) -> str:
        self._taken[stem] += 1
        return stem if self._taken[stem] == 1 else f"{stem}_{self._taken[stem]}"

    def _shape_comment(self, axes: Axes) -> str:
        blocks = {"i": "BLOCK_M", "j": "BLOCK_N"}
        order = (self.rows, *(TILE - {self.rows}))
        shape = ", ".join(blocks[axis] for axis in order if axis in axes)
        return f"  # [{shape}]" if shape else ""

    # -- shapes -------------------------------------------------------------------------------------------------------

    def spread(self, value: Text) -> Text:
        """A vector as a row or a column of the tile; scalars and tiles as they are."""
        inner = value.axes & TILE
        if len(inner) != 1:
            return value
        index = "[:, None]" if inner == {self.rows} else "[None, :]"
        return Text(value.at(ATOM) + index, ATOM, value.axes, value.kind)

    def vector(self, variable: str, axis: str) -> str:
        """A kernel variable that is a vector along `axis`, spread to broadcast against a tile."""
        return self.spread(Text(variable, ATOM, frozenset(axis), "int")).text

    def operand(self, expr: Any, strength: int = ATOM) -> str:
        """`expr` as an operand of at least that binding strength, which broadcasts to a tile."""
        value = self.value(expr)
        if len(value.axes & TILE) == 1 and not value.text.isidentifier():
            value = self._assign(expr, value, self._stem(value))
        value = self.spread(value)
        return value.at(strength)

    def value(self, expr: Any) -> Text:
        """The printed expression, named when that saves work or keeps the line short."""
        known = self._names.get(expr)
        if known is not None:
            return known
        value = self._print(expr)
        if isinstance(expr, Load):
            return self._assign(expr, value, self._load_stem(expr))
        if self._shared[expr] > 1 or len(value.text) > WIDTH:
            return self._assign(expr, value, self._stem(value))
        return value

    def _stem(self, value: Text) -> str:
        inner = value.axes & TILE
        base = "at" if not inner else "tile" if inner == TILE else "row" if "i" in inner else "key"
        return f"{base}_{'ok' if value.kind == 'bool' else 'x'}" if base != "at" else "scalar"

    def _load_stem(self, load: Load) -> str:
        plain = [index.name for index in load.indices if index.is_Symbol]
        name = self.tensor_names.get(load.name, load.name)
        return "_".join([name, *plain]) if 0 < len(plain) == len(load.indices) else f"{name}_value"

    def _operands(self, args: Iterable[Any], axes: Axes) -> list[Text]:
        """Operands of a node with `axes`: vectors under a tile are named where they are known, then spread."""
        out = []
        for arg in args:
            value = self.value(arg)
            if axes & TILE == TILE and len(value.axes & TILE) == 1:
                if not value.text.isidentifier():
                    value = self._assign(arg, value, self._stem(value))
                value = self.spread(value)
            out.append(value)
        return out

    def axes(self, expr: Any) -> Axes:
        """What `expr` depends on: of b, h, i, j, and "walk" for what is defined by the walk's program."""
        names: set[str] = set()
        for symbol in expr.free_symbols:
            names |= self.placed.get(symbol, frozenset())
            if symbol == S:
                names |= TILE
            elif symbol in (B, H, I, J):
                names.add(symbol.name)
        return frozenset(names)

    # -- expressions --------------------------------------------------------------------------------------------------

    def _print(self, expr: Any) -> Text:
        if expr.is_Symbol:
            variable = self.symbols.get(expr, expr.name)
            self.used.add(variable)
            if self.wide and kind(expr) == "int" and expr not in (B, H) and not variable.startswith("BLOCK_"):
                variable = f"{variable}.to(tl.int64)"
            return Text(variable, ATOM, self.axes(expr), kind(expr))
        if expr.is_Rational or expr.is_infinite:
            return self._number(expr)
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
        return self._call(expr)

    def _cost(self, expr: Any) -> tuple[int, str]:
        return len(self.axes(expr) & TILE), sympy.srepr(expr)

    def _reading(self, term: Any) -> tuple[bool, bool, int, str]:
        """Order of the terms of a sum: positive before negative, what varies most first, numbers last."""
        return term.is_Rational, term.could_extract_minus_sign(), -len(self.axes(term) & TILE), sympy.srepr(term)

    def _number(self, value: Any) -> Text:
        if value.is_infinite:
            return Text('float("-inf")' if value < 0 else 'float("inf")', ATOM, frozenset(), "float")
        if kind(value) == "int":
            return Text(str(value), UNARY if value < 0 else ATOM, frozenset(), "int")
        number = float(value)
        if abs(number) > LARGEST_FLOAT:  # Triton would compute in float64
            return self._number(sympy.oo if number > 0 else -sympy.oo)
        if abs(number) < SMALLEST_FLOAT:
            number = 0.0
        return Text(repr(number), UNARY if number < 0 else ATOM, frozenset(), "float")

    def _joined(self, expr: Any, args: list[Any], sign: str, strength: int) -> Text:
        """An associative operator; operands of a smaller shape are joined among themselves first."""
        axes = self.axes(expr)
        groups: dict[Axes, list[Any]] = {}
        for arg in args:
            groups.setdefault(self.axes(arg) & TILE, []).append(arg)
        scalars = groups.pop(frozenset(), []) if len(groups) > 2 else []
        if len(groups) > 1:
            smallest = min(groups, key=len)
            groups[smallest] += scalars  # a scalar joins a vector rather than the tile
            args = [g[0] if len(g) == 1 else expr.func(*g, evaluate=False) for g in groups.values()]
        return self._chain([(sign, t, strength + 1) for t in self._operands(args, axes)], strength, kind(expr))

    def _chain(self, operands: list[tuple[str, Text, int]], strength: int, kind_: str) -> Text:
        """`a + b - c`: (sign, operand, strength it needs) triples joined from the left, cut into names when long."""
        _, text, needed = operands[0]
        for sign, operand, operand_needs in operands[1:]:
            if len(text.text) + len(operand.text) > WIDTH:
                if len(operand.text) > len(text.text) and operand.strength != ATOM:
                    operand = self._assign(None, operand, self._stem(operand))
                elif text.strength != ATOM:
                    text = self._assign(None, text, self._stem(text))
            joined = text.at(needed) + sign + operand.at(operand_needs)
            text, needed = Text(joined, strength, text.axes | operand.axes, kind_), strength
        return text

    def _comparison(self, expr: Relational) -> Text:
        """`e >= 0` with the terms on two sides: rows against columns where the sum separates, so a tile needs one
        comparison per element and no arithmetic; else positive against negative terms."""
        sign = next(sign for relation, sign in _SIGNS.items() if isinstance(expr, relation))
        left, right = expr.lhs - expr.rhs if expr.rhs != 0 else expr.lhs, sympy.Integer(0)
        terms, constant = linear_terms(left)
        parts = [c * t for t, c in terms.items()]
        axes = self.axes(expr)
        exact = kind(left) == "int" or len(parts) + (constant != 0) == 2  # else the order of the sum would matter
        if exact and axes & TILE == TILE and all(self.axes(p) & TILE != TILE for p in parts):
            columns = [p for p in parts if (self.axes(p) & TILE) - {self.rows}]
            left = sympy.Add(*[p for p in parts if p not in columns], constant)
            right = -sympy.Add(*columns)
            if right.could_extract_minus_sign():
                left, right, sign = -left, -right, _FLIPPED[sign]
        elif exact:
            left = sympy.Add(*[p for p in parts if not p.could_extract_minus_sign()], max(constant, 0))
            right = -sympy.Add(*[p for p in parts if p.could_extract_minus_sign()], min(constant, 0))
            if left.is_Rational:  # j <= 3, not 3 >= j
                left, right, sign = right, left, _FLIPPED[sign]
        a, b = self._operands([left, right], axes)
        return Text(f"{a.at(OR)} {sign} {b.at(OR)}", COMPARE, axes, "bool")

    def _sum(self, expr: Any) -> Text:
        axes = self.axes(expr)
        terms = sorted(expr.args, key=self._reading)
        if axes & TILE == TILE:
            terms = self._grouped(terms)
        to_float = kind(expr) == "float"
        chain: list[tuple[str, Text, int]] = []
        for term in terms:
            negative = bool(chain) and term.could_extract_minus_sign()
            (value,) = self._operands([-term if negative else term], axes)
            chain.append((" - ", self._as(value, to_float), PRODUCT) if negative
                         else (" + ", self._as(value, to_float), SUM))  # fmt: skip
        return self._chain(chain, SUM, kind(expr))

    def _grouped(self, terms: list[Any]) -> list[Any]:
        """Terms of a tile-shaped sum with those of one vector shape, and the scalars with one of them, added first."""
        groups: dict[tuple[Axes, bool], list[Any]] = {}
        for term in terms:
            groups.setdefault((self.axes(term) & TILE, kind(term) == "int"), []).append(term)
        for integer in (True, False):
            scalars = groups.get((frozenset(), integer))
            home = next((key for key in groups if len(key[0]) == 1 and key[1] == integer), None)
            if scalars and home is not None:
                groups[home] = [*groups[home], *groups.pop((frozenset(), integer))]
        # Integer parts are added as integers (exact), and converted once.
        tiles = [t for (axes, _), group in groups.items() if axes == TILE for t in group]
        rest = [sympy.Add(*group) for (axes, _), group in groups.items() if axes != TILE]
        if any(kind(term) == "float" for term in terms):
            whole = [t for t in tiles + rest if kind(t) == "int"]
            if len(whole) > 1:
                return [t for t in tiles + rest if kind(t) != "int"] + [sympy.Add(*whole)]
        return sorted(rest + tiles, key=lambda t: (t.could_extract_minus_sign(), self._cost(t)))

    def _as(self, value: Text, to_float: bool) -> Text:
        if not to_float or value.kind == "float":
            return value
        if value.text.lstrip("-").isdigit():
            return Text(f"{value.text}.0", value.strength, value.axes, "float")
        return Text(f"{value.at(ATOM)}.to(tl.float32)", ATOM, value.axes, "float")

    def _product(self, expr: Any) -> Text:
        coefficient, rest = expr.as_coeff_Mul()
        axes, to_float = self.axes(expr), kind(expr) == "float"
        if coefficient == -1:
            inner = self._operands([-expr], axes)[0]
            return Text(f"-{inner.at(UNARY)}", UNARY, axes, inner.kind)
        factors = sorted(sympy.Mul.make_args(rest), key=self._cost)
        above = [f for f in factors if not _is_reciprocal(f)]
        below = [sympy.Pow(f.base, -f.exp) for f in factors if _is_reciprocal(f)]
        if coefficient != 1 or not above:
            above.insert(0, coefficient)
        chain = [(" * ", self._as(t, to_float), UNARY) for t in self._operands(above, axes)]
        chain += [(" / ", self._as(t, True), UNARY) for t in self._operands(below, axes)]
        return self._chain(chain, PRODUCT, kind(expr))

    def _power(self, expr: Any) -> Text:
        base, exponent = expr.args
        axes = self.axes(expr)
        if exponent.is_Rational and exponent < 0:
            (below,) = self._operands([sympy.Pow(base, -exponent)], axes)
            return Text(f"1.0 / {self._as(below, True).at(UNARY)}", PRODUCT, axes, "float")
        (value,) = self._operands([base], axes)
        if exponent.is_Rational and exponent.q == 2:
            root = f"tl.sqrt({self._as(value, True).text})"
            return Text(" * ".join([root] * int(exponent.p)), ATOM if exponent.p == 1 else PRODUCT, axes, "float")
        if not exponent.is_Integer:
            raise AssertionError(f"no Triton text for {expr}")
        if value.strength != ATOM:
            value = self._assign(base, self._print(base), self._stem(value))
        return Text(" * ".join([value.text] * int(exponent)), PRODUCT, axes, value.kind)

    def _call(self, expr: Any) -> Text:
        axes = self.axes(expr)
        if isinstance(expr, Uniform):
            return self._uniform(expr)
        if isinstance(expr, Mix):
            words = [
                t.at(ATOM) if isinstance(arg, Mix) else f"{t.at(ATOM)}.to(tl.uint32)"
                for arg, t in zip(expr.args, self._operands(expr.args, axes), strict=True)
            ]
            return Text(f"mix({' ^ '.join(words)})", ATOM, axes, "int")
        if isinstance(expr, (FloorDiv, PyMod)):
            return self._division(expr, axes)
        to_float = kind(expr) == "float"
        texts = self._operands(expr.args, axes)
        if sum(len(t.text) for t in texts) > WIDTH:
            texts = [t if len(t.text) < WIDTH // 4 else self._assign(None, t, self._stem(t)) for t in texts]
        if isinstance(expr, (Minimum, Maximum)):
            call = "tl.minimum" if isinstance(expr, Minimum) else "tl.maximum"
            text = self._as(texts[0], to_float).text
            for operand in texts[1:]:
                text = f"{call}({text}, {self._as(operand, to_float).text})"
            return Text(text, ATOM, axes, kind(expr))
        if isinstance(expr, Where):
            yes, no = (self._as(t, to_float).text for t in texts[1:])
            return Text(f"tl.where({texts[0].text}, {yes}, {no})", ATOM, axes, kind(expr))
        if type(expr) in _BITS:
            return Text(f"({f' {_BITS[type(expr)]} '.join(t.at(ATOM) for t in texts)})", ATOM, axes, "int")
        if type(expr) in _SHIFTS:
            self.helpers.add("steps")
            left = texts[0].at(ATOM)
            if isinstance(expr, ShiftLeft):
                left = f"tl.full([], {left}, tl.int64)" if expr.args[0].is_Integer else f"{left}.to(tl.int64)"
            return Text(f"({left} {_SHIFTS[type(expr)]} steps({texts[1].text}))", ATOM, axes, "int")
        if type(expr) not in _CALLS:
            raise AssertionError(f"no Triton text for {type(expr).__name__}")
        call, helpers = _CALLS[type(expr)]
        self.helpers |= set(helpers)
        return Text(
            call.format(*(self._as(t, not isinstance(expr, Absolute) or to_float).text for t in texts)),
            ATOM,
            axes,
            kind(expr),
        )

    def _division(self, expr: Any, axes: Axes) -> Text:
        a, b = (self._as(t, kind(expr) == "float") for t in self._operands(expr.args, axes))
        call = "floor_div" if isinstance(expr, FloorDiv) else "floor_mod"
        if kind(expr) == "float" or kind(expr.args[0]) == "float":
            call += "_real"
        elif str(expr.args[1]) in BLOCKS or (
            _nonnegative(expr.args[0]) and expr.args[1].is_Integer and expr.args[1] > 0
        ):
            sign = "//" if isinstance(expr, FloorDiv) else "%"  # Triton's truncates, which is the same here
            return Text(f"{a.at(PRODUCT)} {sign} {b.at(UNARY)}", PRODUCT, axes, "int")
        self.helpers.add(call)
        return Text(f"{call}({a.text}, {b.text})", ATOM, axes, kind(expr))

    def _uniform(self, expr: Uniform) -> Text:
        """Uniform as its chain of rounds, each in the smallest shape it has: only the last is as large as a tile."""
        self.helpers.add("mix")
        seed, *counters = expr.args
        chain = Mix(seed)
        for counter in counters:
            self.name(chain, "hash")
            chain = Mix(chain, counter)
        text = self._print(chain).text.replace("mix(", "uniform(", 1)
        return Text(text, ATOM, self.axes(chain), "float")

    # -- loads --------------------------------------------------------------------------------------------------------

    def _load(self, expr: Load) -> Text:
        """A gather from a captured tensor. No lane reads out of range: a plain index of `trusted` is in range by the
        runtime's check of the shapes, any other is clamped (as in `expression.evaluate`).
        """
        axes, tensor = self.axes(expr), self.tensor_names.get(expr.name, expr.name)
        self.loaded.add(expr.name)
        by_shape: dict[Axes, list[tuple[int, Any]]] = {}
        for dim, index in enumerate(expr.indices):
            by_shape.setdefault(self.axes(index) & TILE, []).append((dim, index))
        pointer, path = Text(tensor, ATOM, frozenset(), "pointer"), Pointer(expr.args[0])
        for shape in sorted(by_shape, key=lambda shape: (len(shape), self.rows not in shape)):
            if pointer.strength != ATOM:  # what is known earlier, or has a smaller shape, is added up on its own
                pointer = self.name(path, f"{tensor}_at" if pointer.axes & TILE else f"{tensor}_base", pointer)
            path = Pointer(*path.args, *[part for item in by_shape[shape] for part in item])
            if path in self._names:
                pointer = self._names[path]
                continue
            for dim, index in by_shape[shape]:
                value = self._inside(expr.name, tensor, dim, index)
                text = f" + {value.at(ATOM)}.to(tl.int64) * {tensor}_stride_{dim}"
                if value.axes & TILE != pointer.axes & TILE and (pointer.axes | value.axes) & TILE == TILE:
                    pointer, value = self.spread(pointer), self.spread(value)
                    text = f" + {value.at(ATOM)}.to(tl.int64) * {tensor}_stride_{dim}"
                if len(pointer.text) + len(text) > WIDTH and pointer.strength != ATOM:
                    pointer = self._assign(None, pointer, f"{tensor}_base")
                pointer = Text(pointer.text + text, SUM, pointer.axes | value.axes, "pointer")
        if len(pointer.text) > WIDTH - 2 * len(tensor) - 8:
            pointer = self.name(path, f"{tensor}_at", pointer)
        text = pointer.text
        # Integers keep their width: an id of 64 bits must not be cut to 32.
        whole = ".to(tl.int64)" if self.wide else ""
        to = ".to(tl.float32)" if kind(expr) == "float" else ".to(tl.int32)" if is_flag(expr) else whole
        return Text(f"tl.load({text}){to}", ATOM, axes, kind(expr))

    def flat(self, load: Load, dims: Iterable[int]) -> str:
        """The place of a load within these dimensions of its tensor, counted row by row."""
        text = Text("0", ATOM, frozenset(), "int")
        tensor = self.tensor_names.get(load.name, load.name)
        for number, dim in enumerate(dims):
            self.bounded.add((load.name, dim))
            value = self._inside(load.name, tensor, dim, load.indices[dim])
            if number == 0:
                text = value
                continue
            joined = f"{self.spread(text).at(PRODUCT)} * {tensor}_size_{dim} + {self.spread(value).at(SUM)}"
            text = Text(joined, SUM, text.axes | value.axes, "int")
        return text.text

    def _inside(self, name: str, tensor: str, dim: int, index: Any) -> Text:
        """An index that is in range, also on the lanes past the end of a tile that reaches beyond it."""
        value = self.value(index)
        if index == ROW:  # as long as the call has rows: the runtime's check
            if self.exists == "i":
                return value
            self.used |= {"i_safe", "q_offset"}
            return Text("i_safe - q_offset", SUM, value.axes, "int")
        if index in self.trusted:
            if index not in (I, J) or index.name == self.exists:
                return value
            variable = f"{index.name}_safe"
            self.used.add(variable)
            return Text(variable, ATOM, value.axes, "int")
        key = Pointer(sympy.Symbol(name), dim, index)
        self.bounded.add((name, dim))
        inside = f"tl.minimum({value.text}, {tensor}_size_{dim} - 1)"
        if not _nonnegative(index):
            inside = f"tl.maximum({inside}, 0)"
        return self.name(key, f"{tensor}_index", Text(inside, ATOM, value.axes, "int"))


def _is_reciprocal(factor: Any) -> bool:
    return bool(factor.is_Pow and factor.exp.is_Rational and factor.exp < 0)


def _nonnegative(expr: Any) -> bool:
    if expr.is_Rational:
        return bool(expr >= 0)
    if expr.is_Symbol:
        return expr in (B, H, J)
    return bool(expr.is_Add or expr.is_Mul) and all(_nonnegative(arg) for arg in expr.args)
