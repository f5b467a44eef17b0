"""From a program of torch operations to the spec that it means.

A score of minus infinity is no number to attngen: a key is excluded by the mask. So a value carries the condition under which
it is minus infinity as far as `where` and sums hand it on, and what the score ends with is taken from the mask.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from attngen.errors import SpecError
from attngen.integrations.flex.trace import Operand, Program
from attngen.integrations.flex.vocabulary import CONSTANTS, OPERATIONS, cast, condition, constant, number
from attngen.language.expression import Expr, Param, Tensor
from attngen.language.expression.builder import wrap
from attngen.language.expression.functions import B, H, I, J, S
from attngen.language.keysets.tiles import Block, block_sparse
from attngen.language.spec import Spec


class StepError(Exception):
    """A step that has no meaning. step: its place in the program."""

    def __init__(self, step: int, error: SpecError):
        super().__init__(str(error))
        self.step, self.error = step, error


class Value(NamedTuple):
    """A number or truth value; excluded: where it is minus infinity instead, None for nowhere."""

    expr: Expr
    excluded: Expr | None = None


@lru_cache(maxsize=1024)
def spec_of(program: Program, block: Block | None = None) -> Spec:
    """The spec of a program, whose captured tensors are t0, t1, ... in its order, its numbers p0, p1, ... block: of the tiles that
    are given at the call. StepError, SpecError.
    """
    tensors = [Tensor(f"t{n}", ndim, kind) for n, (ndim, kind) in enumerate(program.tensors)]
    symbols = {"s": S, "b": B, "h": H, "i": I, "j": J}
    known: dict[Any, Value] = {name: Value(Expr(symbol)) for name, symbol in symbols.items()}
    for n, kind in enumerate(program.params):
        known["param", n] = Value(Param(f"p{n}", int if kind == "int" else float))
    for place, (name, args, named) in enumerate(program.steps):
        try:
            if name == "load":
                (_, n), *indices = args
                known[place] = Value(tensors[n][tuple(_read(x, known).expr for x in indices)])
            else:
                given = [_read(x, known) for x in args]
                known[place] = _step(name, given, {key: _read(x, known) for key, x in named})
        except SpecError as error:
            raise StepError(place, error) from error
        except TypeError:
            raise StepError(place, SpecError(f"torch's {name} with these arguments has no counterpart")) from None
    mask = None if program.mask is None else _read(program.mask, known).expr
    score = None if program.score is None else _read(program.score, known)
    if mask is not None and mask.kind != "bool":
        problem = SpecError(f"mask_mod returns a number ({mask.kind})", fix="compare it, or convert it with .bool()")
        made = program.mask[1] if program.mask is not None else None
        raise StepError(made, problem) if isinstance(made, int) else problem
    if score is not None and score.excluded is not None:
        mask = ~score.excluded if mask is None else mask & ~score.excluded
    keys = None if block is None else block_sparse(block)
    return Spec(mask, None if score is None else number(score.expr), keys=keys)


def _read(operand: Operand, known: dict[Any, Value]) -> Any:
    """An operand's value; for what is no number (a dtype's kind, a size, a word) the plain thing."""
    kind, *rest = operand
    if kind == "ref":
        return known[rest[0]]
    if kind == "param":
        return known[operand]
    if kind == "tuple":
        return tuple(_read(x, known) for x in rest)
    if kind == "none":
        return None
    if kind == "float" and rest[0] == -math.inf:
        return Value(wrap(0), wrap(True))
    if kind in ("bool", "int", "float"):
        return Value(wrap(rest[0]))
    return _Word(rest[0]) if kind == "kind" else rest[0]


class _Word(str):
    """The kind of a dtype."""


def _step(name: str, args: list[Any], named: dict[str, Any]) -> Value:
    values = [x for x in (*args, *named.values()) if isinstance(x, Value)]
    if name in ("to", "type", "type_as"):
        kinds = [x for x in (*args, *named.values()) if isinstance(x, _Word)]
        kind = kinds[0] if kinds else values[1].expr.kind if len(values) > 1 else values[0].expr.kind
        return _cast(values[0], kind)
    if any(x.excluded is not None for x in values):
        return _infinite(name, args, named)
    plain = [x.expr if isinstance(x, Value) else x for x in args]
    options = {key: x.expr if isinstance(x, Value) else x for key, x in named.items()}
    if name in CONSTANTS:
        return Value(constant(name, plain, options))
    return Value(
        OPERATIONS[name](*plain, **{("x" if key in ("input", "self") else key): x for key, x in options.items()})
    )


def _cast(x: Value, kind: str) -> Value:
    if x.excluded is not None and kind != "float":
        raise _no_number(f"conversion to {kind}")
    return Value(cast(x.expr, kind), x.excluded)


def _infinite(name: str, args: list[Any], named: dict[str, Any]) -> Value:
    """An operation, one of whose operands may be minus infinity."""
    if named.keys() - {"dtype", "device", "requires_grad"}:
        raise _no_number(name)
    if (
        name in CONSTANTS
        and isinstance(args[-1], Value)
        and not name.endswith(("zeros", "ones", "zeros_like", "ones_like"))
    ):
        return args[-1]  # torch.tensor(-inf), torch.full_like(score, -inf)
    if name in ("where", "masked_fill") and len(args) == 3:
        test, yes, no = args if name == "where" else (args[1], args[2], args[0])
        if test.excluded is None:
            return _chosen(condition(test.expr), yes, no)
    if name in ("pos", "positive", "clone", "contiguous", "float", "double", "half", "bfloat16") and len(args) == 1:
        return Value(number(args[0].expr), args[0].excluded)
    if len(args) == 2:
        a, b = args
        if name in ("add", "minimum", "min"):
            return Value(OPERATIONS[name](a.expr, b.expr), _either(a.excluded, b.excluded))
        if name in ("sub", "subtract") and b.excluded is None:
            return Value(OPERATIONS[name](a.expr, b.expr), a.excluded)
        if name in ("mul", "multiply") and a.excluded is None:
            a, b = b, a
        if name in ("mul", "multiply", "div", "divide", "truediv", "true_divide") and b.excluded is None:
            factor = number(b.expr).sym
            if factor.is_number and factor > 0:
                return Value(OPERATIONS[name](a.expr, b.expr), a.excluded)
    raise _no_number(name)


def _chosen(test: Expr, yes: Value, no: Value) -> Value:
    """where(test, yes, no). Where one of them is excluded, the other may stand for it: the mask takes it away."""
    everywhere = [x.excluded is not None and x.excluded.sym == True for x in (yes, no)]  # noqa: E712 (a sympy value)
    if everywhere[1]:
        return Value(number(yes.expr), _either(yes.excluded, ~test))
    if everywhere[0]:
        return Value(number(no.expr), _either(no.excluded, test))
    parts = [None if x.excluded is None else x.excluded & t for x, t in ((yes, test), (no, ~test))]
    return Value(OPERATIONS["where"](test, yes.expr, no.expr), _either(*parts))


def _either(a: Expr | None, b: Expr | None) -> Expr | None:
    return b if a is None else a if b is None else a | b


def _no_number(name: str) -> SpecError:
    return SpecError(
        f"{name} of a score of minus infinity: it has to be what the mod returns, chosen by torch.where or added",
        fix="choose it last, as in torch.where(keep, score, -float('inf')), or exclude keys in a mask_mod",
    )
