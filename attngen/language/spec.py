"""A spec: which keys a query sees, how scores change, and nothing about how it is computed.

Three ways to write one (combinators, Python functions of (b, h, i, j), text) end in one canonical sympy form with one
key. `str(spec)` is that form as text, and `Spec.from_text(str(spec))` reads it back.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sympy
import torch

from attngen.errors import SpecError
from attngen.language import keyset as keysets
from attngen.language.expression import Q_OFFSET, ROW, B, H, I, J, Load, S, loads, to_text
from attngen.language.expression.builder import Declaration, Expr, Param, Tensor, wrap
from attngen.language.expression.doubtful import doubtful_loads
from attngen.language.expression.parse import parse
from attngen.language.indices import Doubtful
from attngen.language.lists import Lists
from attngen.language.lists import read as read_lists
from attngen.language.moved import split_causal
from attngen.language.schedule import Schedule

LANGUAGE = 1  # goes into every key: raise it when the meaning of an expression changes
MAX_NODES = 4000

Condition = Expr | bool | str | Callable[..., Any] | None
Score = Expr | str | Callable[..., Any] | Sequence[Any] | None


class Spec:
    """An attention, described.

    mask: which pairs (i, j) count: a condition, a function of (b, h, i, j), or text. None: all.
    score: what becomes of the scaled logit s: an expression in s, a function of (s, b, h, i, j), text, or a sequence of
        these applied in order. None: s itself.
    scale: factor on q.k; None is 1 / sqrt(head dim). A call may give another: `scale=`.
    sink: a logit per (b, h, i) that joins the softmax's denominator with value 0 (attention sinks), e.g. `sink[h]`; a
        function takes (b, h, i).
    dropout: probability in [0, 1) that a weight is zeroed after the softmax, a number or a float Param; the call then
        takes `seed=`: any int, or an int tensor [] on the device.
    keys: which keys a query sees where that is found at run time (`ag.qk_sparse()`, `ag.hyper()`, ...), before the mask
        takes some away; its own captures are given at the call.
    lists: what the kernels' loops visit in the place of the mask's intervals (`attngen.language.lists`), page_size: k and v are pages
        (`attngen.plan.keysets.paged`): what key sets are made of, seldom written by hand.
    schedule: a `Schedule` that pins what the tuner may not change; no part of the key.
    params, tensors: declarations for the names in textual expressions.

    b batch, h query head, i the query's original position (row + q_offset), j the key's position. `i - q_offset` is the
    query's row, for what is captured for the rows of one call only.
    Raises SpecError, with a caret under the offending part for text.
    """

    known: Any = None  # what is known of it, where that came with it: `attngen.analysis.call_facts.CallFacts`
    inner: dict[str, Spec] | None = None  # the specs that its calls are made of, where it came with them

    def __init__(
        self,
        mask: Condition = None,
        score: Score = None,
        *,
        scale: float | None = None,
        sink: Expr | str | Callable[..., Any] | None = None,
        dropout: float | Expr | str | None = None,
        keys: keysets.KeySet | str | None = None,
        lists: Lists | str | None = None,
        page_size: int | str | None = None,
        schedule: Schedule | None = None,
        name: str = "",
        params: Iterable[Param] = (),
        tensors: Iterable[Tensor] = (),
    ):
        declared = _declarations(params, tensors)
        mask_expr = _read("mask", True if mask is None else mask, "bhij", declared)
        score_expr = _read_score(score, declared)
        sink_expr = None if sink is None else _read("sink", sink, "bhi", declared)
        dropout_expr = None if dropout is None else _read("dropout", dropout, "", declared)
        _check_kind("mask", mask_expr, "bool")
        _check_symbols(
            "mask", mask_expr, (B, H, I, J, Q_OFFSET), "the mask decides before the score is known: it cannot use s"
        )
        _check_kind("score", score_expr, "number")
        if sink_expr is not None:
            _check_kind("sink", sink_expr, "number")
            _check_symbols(
                "sink", sink_expr, (B, H, I, Q_OFFSET), "a sink stands for a key of its own: it has no j and no s"
            )
        if dropout_expr is not None:
            _check_kind("dropout", dropout_expr, "number")
            _check_symbols("dropout", dropout_expr, (), "the probability is a number or a float Param")
            if dropout_expr.sym.has(Load):
                raise SpecError("dropout: the probability is a number or a float Param", fix="declare it as ag.Param")
            if dropout_expr.sym.is_number and not 0 <= dropout_expr.sym < 1:
                raise SpecError(f"dropout: a probability in [0, 1), got {to_text(dropout_expr.sym)}")
        if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
            raise SpecError(f"scale: a finite number or None, got {scale!r}")

        self.mask: Any = mask_expr.sym
        self.score: Any = score_expr.sym
        self.scale: float | None = None if scale is None else float(scale)
        self.sink: Any = None if sink_expr is None else sink_expr.sym
        self.dropout: Any = None if dropout_expr is None else dropout_expr.sym
        self.schedule = schedule
        self.name = name
        parts = [e for e in (mask_expr, score_expr, sink_expr, dropout_expr) if e is not None]
        used = {d.name: d for part in parts for d in part.declared.values() if _mentions(part.sym, d)}
        self.keys = _read_keys(keys)
        if self.keys is not None:
            used |= self.keys.declared()
        self.lists = read_lists(lists)
        self.page_size = _read_page_size(page_size)
        own = {} if self.lists is None else {n: Tensor(n, *what) for n, what in self.lists.declared.items()}
        own |= {} if self.page_size is None else {"page_table": Tensor("page_table", 2, "int")}
        for taken in own.keys() & used.keys():
            raise SpecError(f"{taken!r} is the name of a list", fix="give the spec's own tensor another name")
        used |= own
        for part in parts:
            for known in part.declared.values():
                if known.name in used and used[known.name].text() != known.text():
                    raise SpecError(
                        f"{known.name!r} is declared twice: `{used[known.name].text()}` and `{known.text()}`"
                    )
        if sum(len(list(sympy.preorder_traversal(part.sym))) for part in parts) > MAX_NODES:
            raise SpecError(f"the spec has more than {MAX_NODES} nodes", fix="put what varies into a captured tensor")
        self.tensors = {n: d for n, d in sorted(used.items()) if isinstance(d, Tensor)}
        self.params = {n: d for n, d in sorted(used.items()) if isinstance(d, Param)}
        if declared.get("seed") is _SEED_ON_DEVICE and self.dropout is None:
            raise SpecError("seed: only dropout draws numbers", fix="leave out the tensor seed")
        if self.dropout is not None and "seed" in declared:
            self.tensors["seed"] = _SEED_ON_DEVICE
        elif self.dropout is not None:
            self.params["seed"] = _SEED
        # The numbers that a call may give by name. An attribute: whoever traces a call cannot read a cached property.
        self.call_params: dict[str, Param] = {**self.params, "scale": _SCALE}
        if self.keys is not None:
            self.keys.check_spec(self)

    @cached_property
    def text(self) -> str:
        """The canonical text, one `name: value` a line."""
        own = set() if self.lists is None else set(self.lists.names)
        own |= set() if self.page_size is None else {"page_table"}
        declared = [*self.params.values(), *self.tensors.values()]
        lines = [d.text() for d in declared if d is not _SEED and d.name not in own]
        lines.append(f"mask: {to_text(self.mask)}")
        if self.score != S:
            lines.append(f"score: {to_text(self.score)}")
        if self.scale is not None:
            lines.append(f"scale: {self.scale!r}")
        if self.sink is not None:
            lines.append(f"sink: {to_text(self.sink)}")
        if self.dropout is not None:
            lines.append(f"dropout: {to_text(self.dropout)}")
        if self.keys is not None:
            lines.append(f"keys: {self.keys.text}")
        if self.lists is not None:
            lines.append(f"lists: {self.lists.text}")
        if self.page_size is not None:
            lines.append(f"page_size: {self.page_size}")
        return "\n".join(lines)

    @cached_property
    def key(self) -> str:
        """Hash of the canonical text: equal for equal attentions, whatever way they were written."""
        return hashlib.sha256(f"attngen {LANGUAGE}\n{self.text}".encode()).hexdigest()

    @cached_property
    def expressions(self) -> Any:
        """All of the spec's expressions as one sympy tuple, to search them together."""
        return sympy.Tuple(*[part for part in (self.mask, self.score, self.sink, self.dropout) if part is not None])

    @property
    def seed(self) -> Any:
        """What dropout draws its numbers from: a param, or an element of a tensor on the device."""
        return _SEED_ON_DEVICE[()].sym if "seed" in self.tensors else _SEED.sym

    @cached_property
    def with_seed_on_device(self) -> Spec:
        """The same for calls whose seed= is an int tensor: a captured CUDA graph then draws other numbers at each replay."""
        if self.dropout is None or "seed" in self.tensors:
            return self
        return Spec.from_text(f"{_SEED_ON_DEVICE.text()}\n{self.text}", schedule=self.schedule, name=self.name)

    @cached_property
    def dropout_param(self) -> str | None:
        """The name of the param that is the probability of dropout."""
        return str(self.dropout.name) if self.dropout is not None and self.dropout.is_Symbol else None

    @cached_property
    def is_causal(self) -> bool:
        """Whether the mask says, besides other things, that a query sees no later key."""
        return split_causal(self.mask) is not None

    @cached_property
    def mask_text(self) -> str:
        """The mask's canonical text."""
        return to_text(self.mask)

    @cached_property
    def mask_reads(self) -> tuple[str, ...]:
        """Names of the captured tensors that the mask reads."""
        return _read_by(self.mask)

    @cached_property
    def sink_reads(self) -> tuple[str, ...]:
        """Names of the captured tensors that the sink reads."""
        return () if self.sink is None else _read_by(self.sink)

    @cached_property
    def mask_params(self) -> tuple[str, ...]:
        """Names of the params that the mask reads."""
        return tuple(p.name for p in self.params.values() if p.sym in self.mask.free_symbols)

    def doubtful(self, by_offset: bool, sink: bool = True) -> tuple[Doubtful, ...]:
        """The loads whose range a call's shapes do not tell, see `attngen.language.indices`. by_offset: q_offset is a tensor."""
        return doubtful_loads(self.mask, self.score, self.sink if sink else None, by_offset)

    @property
    def reads_rows(self) -> bool:
        """Whether it depends on where the call's rows begin, and so on how a sequence is cut into calls."""
        return Q_OFFSET in self.expressions.free_symbols

    @cached_property
    def plain_dims(self) -> dict[str, tuple[tuple[int, str], ...]]:
        """For each captured tensor its dimensions that a plain b, h, i, j or row indexes, as (dimension, "b" .. "j", "r")."""
        dims: dict[str, set[tuple[int, str]]] = {name: set() for name in self.tensors}
        for load in loads(self.expressions):
            for dim, index in enumerate(load.indices):
                if index in (B, H, I, J, ROW):
                    dims[load.name].add((dim, "r" if index == ROW else index.name))
        return {name: tuple(sorted(found)) for name, found in dims.items()}

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        keys = "" if self.keys is None else f", keys: {self.keys.text}"
        return f"<Spec {self.name or self.key[:12]}: {to_text(self.mask)}{keys}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> Any:
        return _rebuild, (self.text, self.schedule, self.name)

    def scale_for(self, head_dim: int) -> float:
        """The factor on q.k for this head dim."""
        return 1.0 / math.sqrt(head_dim) if self.scale is None else self.scale

    @classmethod
    def from_text(cls, text: str, *, schedule: Schedule | None = None, name: str = "") -> Spec:
        """Read a spec from text: a bare mask expression, or lines (or `;`) of

            param NAME: int|float
            tensor NAME: float|int|bool[NDIM]
            mask|score|scale|sink|dropout|keys|lists|page_size: VALUE

        Raises SpecError.
        """
        return cls(**_read_lines(text), schedule=schedule, name=name)

    @classmethod
    def from_toml(cls, path: str | Path) -> Spec:
        """Read a named spec from a TOML file: keys name, mask, score, scale, sink, dropout, keys,
        lists, page_size; tables [params] (name = "int"
        or "float"), [tensors] (name = "float[1]"), [schedule]. Raises SpecError.
        """
        return cls.from_table(read_toml(path), str(path), Path(path).stem)

    @classmethod
    def from_table(cls, data: dict[str, Any], where: str, name: str = "") -> Spec:
        """The same from what such a file holds. where: said by errors; name: unless it has its own. Raises SpecError."""
        unknown = set(data) - {"name", "params", "tensors", "schedule", *_FIELDS}
        if unknown:
            raise SpecError(
                f"{where}: unknown keys {sorted(unknown)}",
                fix=f"the keys are name, params, tensors, schedule, {', '.join(_FIELDS)}",
            )
        params, tensors, schedule = (_table(where, data, table) for table in ("params", "tensors", "schedule"))
        return cls(
            **{field: data[field] for field in _FIELDS if field in data},
            params=[_declare_param(n, k) for n, k in params.items()],
            tensors=[_declare_tensor(n, k) for n, k in tensors.items()],
            schedule=Schedule(**schedule) if schedule else None,
            name=str(data.get("name", name)),
        )


def read_toml(path: str | Path) -> dict[str, Any]:
    """What a TOML file holds. SpecError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path}: not a readable TOML file: {error}") from None


_FIELDS = ("mask", "score", "scale", "sink", "dropout", "keys", "lists", "page_size")
_SEED = object.__new__(Param)  # "seed" is a reserved name: only dropout declares it
_SEED.name, _SEED.number_kind = "seed", "int"
Expr.__init__(_SEED, sympy.Symbol("seed", integer=True))
_SCALE = object.__new__(Param)  # reserved too: every call may give it
_SCALE.name, _SCALE.number_kind = "scale", "float"
Expr.__init__(_SCALE, sympy.Symbol("scale", real=True))
_SEED_ON_DEVICE = object.__new__(Tensor)
_SEED_ON_DEVICE.name, _SEED_ON_DEVICE.ndim, _SEED_ON_DEVICE.kind = "seed", 0, "int"


def _rebuild(text: str, schedule: Schedule | None, name: str) -> Spec:
    return Spec.from_text(text, schedule=schedule, name=name)


def _read(place: str, value: Any, symbols: str, declared: dict[str, Declaration]) -> Expr:
    if isinstance(value, str):
        return parse(value, declared)
    if isinstance(value, Expr):
        return value
    if callable(value) and not isinstance(value, Tensor):
        value = _call(place, value, symbols)
    try:
        return wrap(value)
    except SpecError as error:
        raise SpecError(f"{place}: {error.problem}", fix=error.fix) from None


def _call(place: str, function: Callable[..., Any], symbols: str) -> Any:
    """What a user's function makes of the symbols. SpecError if it does not take them, or wants values of them."""
    known = {"s": S, "b": B, "h": H, "i": I, "j": J}
    try:
        inspect.signature(function).bind(*symbols)
    except TypeError as error:
        raise SpecError(f"{place}: the function takes ({', '.join(symbols)}), this one does not: {error}") from None
    except ValueError:  # a built-in function, which has no signature to look at
        pass
    try:
        return function(*[Expr(known[symbol]) for symbol in symbols])
    except SpecError as error:
        raise SpecError(f"{place}: {error.problem}", fix=error.fix) from error
    except (TypeError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        raise SpecError(
            f"{place}: the function is called once, with symbolic values, and fails with them: {type(error).__name__}: {error}",
            fix=_hint(function),
        ) from error


def _hint(function: Callable[..., Any]) -> str:
    """What to write in the place of what a function does with tensors."""
    names: list[str] = []
    try:
        seen = inspect.getclosurevars(function)  # type: ignore[arg-type]
        names = [n for n, value in {**seen.nonlocals, **seen.globals}.items() if isinstance(value, torch.Tensor)]
    except (TypeError, ValueError):  # not a Python function
        pass
    functions = "its functions are ag.where, ag.minimum, ag.tanh, ..., its conditions combine with & | ~"
    if not names:
        return f"torch's functions and methods take no symbolic values: {functions}; tensors are captured as ag.Tensor"
    return (
        f"{', '.join(f'`{n}`' for n in names)}: capture torch tensors, as in {names[0]} = ag.Tensor({names[0]!r}, ndim), "
        f"{names[0]}[...] in the function and {names[0]}=... at the call; {functions}"
    )


def _read_keys(keys: keysets.KeySet | str | None) -> keysets.KeySet | None:
    if keys is None:
        return None
    if isinstance(keys, str):
        return keysets.parse(keys)
    if isinstance(keys, Spec):
        raise SpecError(
            "keys: expected a key set such as ag.qk_sparse(), got a Spec",
            fix="ag.union(...) already is a Spec: compile it as it is",
        )
    if not isinstance(keys, keysets.KeySet):
        raise SpecError(f"keys: expected a key set such as ag.qk_sparse(), got {type(keys).__name__}")
    return keys


def _read_page_size(page_size: int | str | None) -> int | None:
    if isinstance(page_size, str) and page_size.strip().isdecimal():
        page_size = int(page_size)
    if page_size is None or (type(page_size) is int and 1 <= page_size <= 256):
        return page_size
    raise SpecError(f"page_size: an int from 1 to 256, got {page_size!r}")


def _declarations(params: Iterable[Param], tensors: Iterable[Tensor]) -> dict[str, Declaration]:
    """What text may name. SpecError for what is no declaration."""
    found: dict[str, Declaration] = {}
    for argument, given, kind, example in (
        ("params", params, Param, '("width")'),
        ("tensors", tensors, Tensor, '("bias", 4)'),
    ):
        for declaration in [given] if isinstance(given, (str, Param, Tensor)) else given:
            if not isinstance(declaration, kind):
                fix = f"declare it: {argument}=[ag.{kind.__name__}{example}]"
                raise SpecError(f"{argument}: expected an ag.{kind.__name__}, got {declaration!r}", fix=fix)
            found[declaration.name] = declaration
    return found


def _read_score(score: Score, declared: dict[str, Declaration]) -> Expr:
    steps = [score] if score is None or isinstance(score, (str, Expr)) or callable(score) else list(score)
    total = Expr(S)
    for step in steps:
        if step is None:
            continue
        expr = _read("score", step, "sbhij", declared)
        _check_kind("score", expr, "number")
        total = Expr(expr.sym.xreplace({S: total.sym}), {**total.declared, **expr.declared})
    return total


def _check_kind(place: str, expr: Expr, expected: str) -> None:
    if (expr.kind == "bool") != (expected == "bool"):
        need = "a condition such as i >= j" if expected == "bool" else "a number"
        raise SpecError(f"{place}: expected {need}, got `{to_text(expr.sym)}` ({expr.kind})")


def _check_symbols(place: str, expr: Expr, allowed: tuple[Any, ...], why: str) -> None:
    for symbol in (S, B, H, I, J, Q_OFFSET):
        if symbol in expr.sym.free_symbols and symbol not in allowed:
            text = to_text(expr.sym)
            match = re.search(rf"\b{symbol.name}\b", text)
            raise SpecError(
                f"{place}: `{symbol.name}` may not stand here: {why}", text=text, column=match.start() if match else 0
            )


def _read_by(expr: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(load.name for load in sorted(expr.atoms(Load), key=str)))


def _mentions(expr: Any, declaration: Declaration) -> bool:
    if isinstance(declaration, Param):
        return declaration.sym in expr.free_symbols
    return any(load.name == declaration.name for load in expr.atoms(Load))


def _read_lines(text: str) -> dict[str, Any]:
    if not isinstance(text, str):
        raise SpecError(f"expected text, got {type(text).__name__}")
    if len(text) > 20_000:
        raise SpecError(f"the spec has {len(text)} characters, the limit is 20000")
    fields: dict[str, Any] = {}
    params, tensors = [], []
    lines = [line.strip() for line in re.split(r"[;\n]", text) if line.strip()]
    if not any(":" in line for line in lines):
        return {"mask": text}
    for line in lines:
        head, colon, value = line.partition(":")
        words, value = head.split(), value.strip()
        if len(words) == 2 and words[0] == "param":
            params.append(_declare_param(words[1], value))
        elif len(words) == 2 and words[0] == "tensor":
            tensors.append(_declare_tensor(words[1], value))
        elif colon and len(words) == 1 and words[0] in _FIELDS and words[0] not in fields:
            fields[words[0]] = value
        else:
            raise SpecError(
                "not a line of a spec",
                text=line,
                width=max(1, len(head)),
                fix="a line is `param NAME: int`, `tensor NAME: float[1]`, or one each of `mask:`, `score:`, `scale:`, "
                "`sink:`, `dropout:`, `keys:`, `lists:`, `page_size:`",
            )
    if "scale" in fields:
        try:
            fields["scale"] = float(fields["scale"])
        except ValueError:
            raise SpecError("scale: expected a number", text=fields["scale"]) from None
    return {**fields, "params": params, "tensors": tensors}


def _declare_param(name: str, kind: Any) -> Param:
    if kind not in ("int", "float"):
        raise SpecError(f"param {str(name)[:64]}: expected int or float, got {str(kind)[:64]!r}")
    return Param(name, int if kind == "int" else float)


def _declare_tensor(name: str, kind: Any) -> Tensor:
    match = re.fullmatch(r"(float|int|bool)\[([0-4])\]", str(kind).replace(" ", ""))
    if not match:
        raise SpecError(f"tensor {str(name)[:64]}: expected float[0] to bool[4], got {str(kind)[:64]!r}")
    if name == "seed" and match[0] == "int[0]":
        return _SEED_ON_DEVICE
    return Tensor(name, int(match[2]), match[1])


def _table(where: str, data: dict[str, Any], name: str) -> dict[str, Any]:
    table = data.get(name, {})
    if not isinstance(table, dict):
        raise SpecError(f"{where}: [{name}] is a table, got {type(table).__name__}")
    return table
