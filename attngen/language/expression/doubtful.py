"""Loads that may leave their captured tensors, and when that matters: what `attngen.language.indices` looks at in a call."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy

from attngen.language.expression import compiled  # programs of expressions
from attngen.language.expression.canonical import conjunction, negate
from attngen.language.expression.functions import ROW, B, H, I, J, Load, Where
from attngen.language.expression.text import to_text
from attngen.language.indices import Doubtful
from attngen.language.programs import program_of

__all__ = ["compiled", "doubtful_loads"]


@lru_cache(maxsize=256)
def doubtful_loads(mask: Any, score: Any, sink: Any, by_offset: bool) -> tuple[Doubtful, ...]:
    """The loads whose range the shapes of a call do not tell, each with the condition under which its value matters. `by_offset`:
    the query's position depends on a tensor.
    """
    plain = {B, H, J, ROW} if by_offset else {B, H, I, J, ROW}
    found: dict[tuple[Load, Any], None] = {}

    def doubtful(node: Any) -> bool:
        return any(index not in plain for load in node.atoms(Load) for index in load.indices)

    def visit(node: Any, used: Any) -> None:
        if not doubtful(node):
            return
        if isinstance(node, Where):
            condition, yes, no = node.args
            visit(condition, used)
            visit(yes, conjunction([used, condition]))
            visit(no, conjunction([used, negate(condition)]))
            return
        if isinstance(node, (sympy.And, sympy.Or)):
            for arg in node.args:
                others = [other for other in node.args if other is not arg]
                visit(arg, conjunction([used, *(others if isinstance(node, sympy.And) else map(negate, others))]))
            return
        if isinstance(node, Load) and any(index not in plain for index in node.indices):
            found[node, used] = None
        for arg in node.args:
            visit(arg, used)

    visit(mask, sympy.true)
    visit(score, mask)
    if sink is not None:
        visit(sink, sympy.true)
    return tuple(
        Doubtful(load.name, tuple(map(program_of, load.indices)), tuple(map(to_text, load.indices)), program_of(used))
        for load, used in found
    )
