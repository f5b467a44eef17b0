"""Key sets: which keys a query sees, where that is found at run time and not from a closed form.

A key set turns one call into a few calls of ordinary specs on moved rows: take rows by index, attend, merge the results
by lse, put rows back. The mask and the score stay written on original positions: the pieces read those from captured
tensors, so that the analysis of masks finds the live ranges in whatever order the rows now have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attngen.errors import InputError, SpecError
from attngen.language.call import offset_column as offset_column
from attngen.language.checks import check_range as check_range
from attngen.language.checks import check_tensor as check_tensor
from attngen.language.expression import (
    Q_OFFSET,
    B,
    Expr,
    H,
    I,
    J,
    S,
    Tensor,
    conjunction,
    disjunction,
    equal,
    greater,
    greater_equal,
    not_equal,
)
from attngen.language.indices import trusted_indices

if TYPE_CHECKING:
    from attngen.language.call import Call
    from attngen.language.spec import Spec
    from attngen.runtime.attention import CompiledAttention

Result = tuple[torch.Tensor, torch.Tensor]
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class KeySet:
    """Base of key sets. A subclass is a frozen dataclass whose fields, in order, are its canonical text.

    `prepared` names the captures that `prepare` reads (with a plan they need not be given again), `used` those that `run`
    reads at every call; `optional` those among them that may be left out.
    """

    name: ClassVar[str] = ""
    prepared: ClassVar[tuple[str, ...]] = ()
    used: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()

    @property
    def text(self) -> str:
        """`name(field=value, ...)` with values as JSON: `parse` of `attngen.plan.keysets` reads it back."""
        values = ", ".join(f"{f.name}={json.dumps(getattr(self, f.name))}" for f in fields(self))
        return f"{self.name}({values})"

    def __str__(self) -> str:
        return self.text

    def captures(self) -> tuple[str, ...]:
        """Names of its captures at the call."""
        return tuple(dict.fromkeys((*self.prepared, *self.used)))

    def declared(self) -> dict[str, Any]:
        """Tensors and params that the key set itself mentions, by name."""
        return {}

    def check_spec(self, spec: Spec) -> None:
        """SpecError if the rest of the spec does not go with this key set."""
        if spec.dropout is not None:
            raise SpecError(f"{self.name}: dropout goes with closed-form keys only", fix="leave out keys= or dropout=")
        for name in self.captures():
            if name in spec.tensors or name in spec.params:
                raise SpecError(
                    f"{name!r} is a capture of {self.name}()", fix="give the spec's own tensor another name"
                )

    def bind(
        self, spec: Spec, q: Any, k: Any, v: Any, q_offset: Any, captures: Mapping[str, Any], given: Mapping[str, Any]
    ) -> Call:
        """The checked call; a key set whose k and v have a layout of their own has its own. `given`: the key set's captures.
        InputError.
        """
        from attngen.language.call import bind

        return bind(spec, q, k, v, q_offset=q_offset, captures=captures)

    def prepare(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
        """Sort, hash, sample: index tensors for `run`, without waiting for the device where that is not the CPU. `call` has
        q, k, v and q_offset; no gradient is recorded. Where `call.wants_grad` is False, lists that only a backward walks may
        be empty. Raises InputError.
        """
        return {}

    def run(self, pieces: Pieces, plan: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
        """out and lse, differentiable. The spec's sink is not part of it."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class KeyPlan:
    """What `attn.plan(q, k, v, ...)` prepared: to be reused for calls of the same sizes, in other layers and steps."""

    keys: str
    mask: str
    sizes: tuple[Any, ...]
    q_offset: int | torch.Tensor
    values: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, spec: Spec, call: Call, values: Mapping[str, Any]) -> KeyPlan:
        """What a spec's key set prepared for a call."""
        from attngen.language.expression import to_text

        assert spec.keys is not None
        return cls(spec.keys.text, to_text(spec.mask), sizes_of(call), call.q_offset, values)

    def check(self, spec: Spec, call: Call) -> None:
        """InputError unless it was made for this key set and mask, and for such a call. On a GPU offsets are compared there."""
        from attngen.language.expression import to_text

        assert spec.keys is not None
        for what, own, wanted in (
            ("", self.keys, spec.keys.text),
            ("the mask ", self.mask, to_text(spec.mask)),
            ("(B, Hq, Nq, Hkv, Nk, q_offset, device) = ", self.sizes, sizes_of(call)),
        ):
            if own != wanted:
                raise InputError("plan", f"a plan for {what}{wanted}", f"one for {own}", "make a new plan")
        if isinstance(self.q_offset, torch.Tensor):
            same = (self.q_offset == call.q_offset).all()
            if same.device.type == "cpu" and not same:
                raise InputError(
                    "plan", f"a plan for q_offset {call.q_offset}", f"one for {self.q_offset}", "make a new plan"
                )
            if same.is_cuda:
                torch._assert_async(same, "plan: made for another q_offset")

    @property
    def nbytes(self) -> int:
        """Memory of its tensors."""
        tensors = (t.numel() * t.element_size() for t in self.values.values() if isinstance(t, torch.Tensor))
        return sum(tensors) + sum(plan.nbytes for plan in self.values.values() if isinstance(plan, KeyPlan))


def sizes_of(call: Call) -> tuple[Any, ...]:
    """What a plan depends on apart from values."""
    offset = "tensor" if isinstance(call.q_offset, torch.Tensor) else call.q_offset
    batch, heads, n_q, _ = call.q.shape
    return batch, heads, n_q, call.k.shape[1], call.k.shape[2], offset, str(call.q.device)


# -- pieces -----------------------------------------------------------------------------------------------------------


class Pieces:
    """Compiles and runs the ordinary attentions that one call with a key set is made of. `trusted`: rows may be moved or made
    up, so that indices are not looked at.
    """

    def __init__(self, attention: CompiledAttention, call: Call, trusted: bool = True):
        self.attention, self.call, self.spec, self.trusted = attention, call, attention.spec, trusted
        self._taken = {*self.spec.tensors, *self.spec.params}

    def tensor(self, name: str, ndim: int, dtype: torch.dtype | None = torch.int32) -> Tensor:
        """Declare a captured tensor of a piece, renamed if the spec has that name."""
        return Tensor(self._free(name), ndim, dtype)

    def _free(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        return name

    def attend(
        self,
        role: Any,
        build: Callable[[], dict[str, Any]],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_offset: int | torch.Tensor = 0,
        **given: Any,
    ) -> Result:
        """out and lse of a piece. `build` makes the mask and the score of its spec, and if it has them `lists` and `page_size`,
        once per `role` (a hashable that says everything that `build` depends on); `given`: the captures it declared with
        `tensor`, and the tensors of its lists.
        """
        found = self.attention.pieces.get(role)
        if found is None:
            found = self.attention.pieces[role] = self._compile(**build())
        captures = {
            **self.call.captures,
            **self.call.params,
            **{self._free(name): value for name, value in given.items()},
        }
        named = {n: captures[n] for n in (*found.spec.tensors, *found.spec.params)}
        if RECORD is not None:
            RECORD.append((role, found, q, k, v, q_offset, named))
        with trusted_indices(self.trusted):
            return found(q, k, v, return_lse=True, q_offset=q_offset, **named)

    def _compile(self, mask: Any, score: Any, **more: Any) -> CompiledAttention:
        from attngen.language.spec import Spec
        from attngen.runtime.attention import compile

        spec = self.spec
        declared = {**spec.tensors, **spec.params}
        parts: dict[str, Any] = {
            "mask": Expr(mask.sym, {**declared, **mask.declared}),
            "score": Expr(score.sym, {**declared, **score.declared}),
        }
        inner = Spec(**parts, **more, scale=spec.scale, schedule=spec.schedule, name=spec.name)
        attention = self.attention
        return compile(inner, schedule=attention.pins, backend=attention.backend, db=attention.db)

    @property
    def mask(self) -> Expr:
        return Expr(self.spec.mask, {**self.spec.tensors, **self.spec.params})

    @property
    def score(self) -> Expr:
        return Expr(self.spec.score, {**self.spec.tensors, **self.spec.params})


# What `record_pieces` collects: (role, compiled piece, q, k, v, q_offset, captures) of each piece that runs.
RECORD: list[Any] | None = None


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


# -- checks -----------------------------------------------------------------------------------------------------------


def positive(place: str, value: Any, least: int = 1) -> int:
    """SpecError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SpecError(f"{place}: expected an int of at least {least}, got {value!r}")
    return value


def to_query_heads(x: torch.Tensor, call: Call) -> torch.Tensor:
    """[B, Hkv, ...] -> [B, Hq, ...]."""
    return x if call.group == 1 else x.repeat_interleave(call.group, 1)
