"""Text to expressions, through a whitelist of syntax nodes: nothing is evaluated.

Python's own parser gives the tree and the columns; every node that is not listed here is refused with a caret.
Limits on length, operators and nesting keep hostile texts cheap.
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from attngen.errors import SpecError
from attngen.language.expression.builder import FUNCTIONS, PARENTHESES, Declaration, Expr, Param, Tensor, where, wrap
from attngen.language.expression.functions import Q_OFFSET, B, H, I, J, S

MAX_LENGTH, MAX_TOKENS, MAX_DEPTH, MAX_DIGITS = 8000, 2400, 48, 24

_ALLOWED = re.compile(r"[A-Za-z0-9_ \t\n()\[\],.+\-*/%<>=!&|~^]*")
_SYMBOLS = {"b": B, "h": H, "i": I, "j": J, "s": S, "q_offset": Q_OFFSET}
_CONSTANTS = {"true": True, "false": False}

# What other languages write: the pattern, and what it is here.
_ELSEWHERE = (
    (re.compile("=>"), ">="),
    (re.compile("=<"), "<="),
    (re.compile("<>"), "!="),
    (re.compile("&&"), "and"),
    (re.compile(r"\|\|"), "or"),
    (re.compile("!(?!=)"), "not"),
)

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a**b,
    ast.BitAnd: lambda a, b: a & b,
    ast.BitOr: lambda a, b: a | b,
    ast.BitXor: lambda a, b: a ^ b,
    ast.LShift: lambda a, b: a << b,
    ast.RShift: lambda a, b: a >> b,
}
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: lambda a: -a,
    ast.UAdd: lambda a: +a,
    ast.Not: lambda a: ~a,
    ast.Invert: lambda a: ~a,
}


def parse(text: str, declared: Mapping[str, Declaration]) -> Expr:
    """Parse one expression in b, h, i, j, s and the declared tensors and params. SpecError with a caret otherwise."""
    _check_surface(text)
    flat = text.replace("\n", " ").replace("\t", " ")
    stripped = flat.strip()
    offset = len(flat) - len(flat.lstrip())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "1if x" and the like: the tree decides
            tree = ast.parse(stripped, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column = (getattr(error, "offset", None) or 1) - 1
        reason = getattr(error, "msg", None) or "too deeply nested"
        raise SpecError(f"not an expression: {reason}", text=flat, column=column + offset) from None
    return _Reader(flat, offset, declared).read(tree)


def _check_surface(text: str) -> None:
    if not isinstance(text, str):
        raise SpecError(f"expected text, got {type(text).__name__}")
    if len(text) > MAX_LENGTH:
        raise SpecError(f"the text has {len(text)} characters, the limit is {MAX_LENGTH}")
    match = _ALLOWED.match(text)
    end = match.end() if match else 0
    if end < len(text):
        raise SpecError(f"the character {text[end]!r} is not part of the language", text=text, column=end)
    for pattern, here in _ELSEWHERE:
        if found := pattern.search(text):
            message = f"`{found[0]}` is not part of the language"
            raise SpecError(
                message, text=text, column=found.start(), width=len(found[0]), fix=f"did you mean `{here}`?"
            )
    depth = 0
    for column, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth > MAX_DEPTH:
            raise SpecError(f"nested deeper than {MAX_DEPTH}", text=text, column=column)
    tokens = re.findall(r"\w+|[^\w\s]", text)
    if len(tokens) > MAX_TOKENS:
        raise SpecError(f"the text has {len(tokens)} tokens, the limit is {MAX_TOKENS}")
    long = re.search(rf"\d{{{MAX_DIGITS + 1},}}", text)
    if long:
        raise SpecError(f"a number has more than {MAX_DIGITS} digits", text=text, column=long.start())


class _Reader:
    def __init__(self, text: str, offset: int, declared: Mapping[str, Declaration]):
        self.text, self.offset, self.declared, self.depth = text, offset, declared, 0

    def read(self, node: ast.AST) -> Expr:
        self.depth += 1
        if self.depth > 2 * MAX_DEPTH:
            raise self._error(node, "nested too deeply")
        method = getattr(self, f"_read_{type(node).__name__}", None)
        if method is None:
            raise self._error(node, f"{type(node).__name__} is not part of the language")
        try:
            value = wrap(method(node))
        except SpecError as error:
            raise error if error_has_text(error) else self._error(node, error.problem, error.fix) from None
        self.depth -= 1
        return value

    def _error(self, node: ast.AST, problem: str, fix: str = "") -> SpecError:
        column = getattr(node, "col_offset", 0) + self.offset
        width = getattr(node, "end_col_offset", column + 1) + self.offset - column
        error = SpecError(problem, text=self.text, column=column, width=width, fix=fix)
        error.has_text = True  # type: ignore[attr-defined]
        return error

    def _read_Constant(self, node: ast.Constant) -> Any:
        if not isinstance(node.value, (bool, int, float)):
            raise SpecError(f"a {type(node.value).__name__} constant is not part of the language")
        return node.value

    def _read_Name(self, node: ast.Name) -> Any:
        if node.id in _SYMBOLS:
            return Expr(_SYMBOLS[node.id])
        if node.id in _CONSTANTS:
            return _CONSTANTS[node.id]
        declaration = self.declared.get(node.id)
        if isinstance(declaration, Param):
            return declaration
        if isinstance(declaration, Tensor):
            if declaration.ndim == 0:
                return declaration[()]
            raise SpecError(f"`{node.id}` is a tensor", fix=f"index it: {node.id}[...]")
        if node.id in FUNCTIONS:
            raise SpecError(f"`{node.id}` is a function", fix=f"call it: {node.id}(...)")
        raise SpecError(
            f"`{node.id[:64]}` is not known",
            fix="declare it: params=[ag.Param(NAME)] or tensors=[ag.Tensor(NAME, ndim)] beside a textual mask; in a whole spec "
            "(Spec.from_text, the command line) `param NAME: int` or `tensor NAME: float[1]` on a line of its own",
        )

    def _read_Subscript(self, node: ast.Subscript) -> Any:
        if not isinstance(node.value, ast.Name):
            raise SpecError("only a captured tensor can be indexed")
        tensor = self.declared.get(node.value.id)
        if not isinstance(tensor, Tensor):
            raise SpecError(
                f"the tensor `{node.value.id[:64]}` is not declared",
                fix="declare it: tensors=[ag.Tensor(NAME, 2, dtype=torch.int32)] beside a textual mask; in a whole spec "
                "(Spec.from_text, the command line) `tensor NAME: int[2]` on a line of its own",
            )
        places = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return tensor[tuple(self.read(place) for place in places)]

    def _read_Call(self, node: ast.Call) -> Any:
        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
            raise SpecError("unknown function", fix=f"the functions are {', '.join(FUNCTIONS)}")
        if node.keywords:
            raise SpecError(f"{node.func.id} takes no keyword arguments")
        function, args = FUNCTIONS[node.func.id], [self.read(arg) for arg in node.args]
        wanted = inspect.signature(function).parameters.values()
        if all(p.kind is not p.VAR_POSITIONAL for p in wanted) and len(args) != len(wanted):
            raise SpecError(f"{node.func.id} takes {len(wanted)} arguments, got {len(args)}")
        return function(*args)

    def _read_BinOp(self, node: ast.BinOp) -> Any:
        if type(node.op) not in _BINARY:
            raise SpecError(f"the operator {type(node.op).__name__} is not part of the language")
        return _BINARY[type(node.op)](self.read(node.left), self.read(node.right))

    def _read_UnaryOp(self, node: ast.UnaryOp) -> Any:
        return _UNARY[type(node.op)](self.read(node.operand))

    def _read_BoolOp(self, node: ast.BoolOp) -> Any:
        apply = _BINARY[ast.BitAnd if isinstance(node.op, ast.And) else ast.BitOr]
        value = self.read(node.values[0])
        for operand in node.values[1:]:
            value = apply(value, self.read(operand))
        return value

    def _read_Compare(self, node: ast.Compare) -> Any:
        for part in (node.left, *node.comparators) if len(node.ops) > 1 else ():
            bits = isinstance(part, ast.BinOp) and isinstance(part.op, (ast.BitAnd, ast.BitOr))
            if bits and not self.text[: part.col_offset + self.offset].rstrip().endswith("("):
                raise self._error(part, "an & or | between two comparisons", PARENTHESES)  # i >= j & i - j < 5
        operands = [self.read(part) for part in (node.left, *node.comparators)]
        links = []
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            if type(op) not in _COMPARE:
                raise SpecError(f"the comparison {type(op).__name__} is not part of the language")
            links.append(_COMPARE[type(op)](left, right))
        value = links[0]
        for link in links[1:]:
            value = value & link
        return value

    def _read_IfExp(self, node: ast.IfExp) -> Any:
        return where(self.read(node.test), self.read(node.body), self.read(node.orelse))


def error_has_text(error: SpecError) -> bool:
    """Whether the error already shows where in the text it happened."""
    return bool(getattr(error, "has_text", False))
