"""Masks and scores with other expressions in the place of b, h, i and j: what key sets write on moved rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attngen.errors import SpecError
from attngen.language.expression import (
    Q_OFFSET,
    B,
    Expr,
    H,
    I,
    J,
    S,
    conjunction,
    disjunction,
    equal,
    greater,
    greater_equal,
    not_equal,
)

b, h, i, j, s = Expr(B), Expr(H), Expr(I), Expr(J), Expr(S)


def moved(expr: Expr, **places: Expr) -> Expr:
    """A mask or a score with other expressions in the place of b, h, i, j, q_offset, in canonical form."""
    return moved_by(expr, lambda _: places)


def moved_by(expr: Expr, choose: Callable[[Any], Mapping[str, Expr]]) -> Expr:
    """The same, the new expressions chosen for each atom of a mask."""
    used: dict[str, Any] = dict(expr.declared)

    def apply(sym: Any) -> Any:
        places = choose(sym)
        for place in places.values():
            used.update(place.declared)
        if Q_OFFSET in sym.free_symbols and "i" in places and "q_offset" not in places:
            raise SpecError(
                "i - q_offset, the query's row, may not stand here: the key set or the layout of the call moves rows",
                fix="index by the position i",
            )
        known = (B, H, I, J, Q_OFFSET)
        return sym.xreplace({symbol: places[symbol.name].sym for symbol in known if symbol.name in places})

    def condition(sym: Any) -> Any:
        kind = type(sym).__name__
        if kind in ("And", "Or"):
            return (conjunction if kind == "And" else disjunction)([condition(arg) for arg in sym.args])
        if kind not in _ATOMS:
            return sym  # true, false
        return _ATOMS[kind](apply(sym.args[0]), 0 * I)

    return Expr(condition(expr.sym) if expr.kind == "bool" else apply(expr.sym), used)


_ATOMS: dict[str, Callable[[Any, Any], Any]] = {
    "GreaterThan": greater_equal,
    "StrictGreaterThan": greater,
    "Equality": equal,
    "Unequality": not_equal,
}


def by_distance(sym: Any) -> bool:
    """Whether an expression stays the same when query and key move by one amount."""
    return bool(sym.xreplace({I: I + 1, J: J + 1}).expand() == sym)


def split_causal(mask: Any) -> Any:
    """If the mask asks for i >= j or i > j: what it asks besides. None if it does not."""
    atoms = mask.args if type(mask).__name__ == "And" else (mask,)
    for shift in (0, 1):
        causal = greater_equal(I - J, shift)
        if causal in atoms:
            return conjunction([atom for atom in atoms if atom != causal])
    return None
