"""Unions of disjoint pieces, each a spec with its own keys, mask and score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attngen import debug
from attngen.errors import InputError, SpecError
from attngen.plan.keysets import base
from attngen.plan.keysets.base import KeyPlan, KeySet, Pieces, Result
from attngen.state.merging import merge

if TYPE_CHECKING:
    from attngen.language.call import Call
    from attngen.language.spec import Spec

SMALL = 2**22  # pairs up to which the debug mode looks for overlaps


@dataclass(frozen=True)
class Union(KeySet):
    """`pieces`: the specs' canonical texts."""

    pieces: tuple[str, ...]

    name: ClassVar[str] = "union"

    def __post_init__(self) -> None:
        if not self.pieces or not all(isinstance(piece, str) for piece in self.pieces):
            raise SpecError("union: pieces is a list of specs' texts, at least one")
        names = [name for spec in self.specs if spec.keys is not None for name in spec.keys.captures()]
        for name in names:
            if names.count(name) > 1 and name != "seed":
                raise SpecError(
                    f"union: two pieces read the capture {name!r}",
                    fix="captures go to the pieces by name: call the two apart, and ag.merge what they return",
                )
        declared: dict[str, Any] = {}
        for spec in self.specs:
            for name, declaration in {**spec.tensors, **spec.params}.items():
                if name in names:
                    raise SpecError(
                        f"union: {name!r} is a capture of a key set, and declared as `{declaration.text()}`"
                    )
                if declared.setdefault(name, declaration).text() != declaration.text():
                    raise SpecError(f"{name!r} is declared twice: `{declared[name].text()}` and `{declaration.text()}`")

    @cached_property
    def specs(self) -> tuple[Spec, ...]:
        """The pieces."""
        from attngen.language.spec import Spec

        return tuple(Spec.from_text(text) for text in self.pieces)

    def declared(self) -> dict[str, Any]:
        return {name: d for spec in self.specs for name, d in {**spec.tensors, **spec.params}.items()}

    def captures(self) -> tuple[str, ...]:
        names = [name for spec in self.specs if spec.keys is not None for name in spec.keys.captures()]
        return tuple(dict.fromkeys(names))

    def check_spec(self, spec: Spec) -> None:
        from attngen.language.expression import S

        if spec.mask != True or spec.score != S or spec.scale is not None:  # noqa: E712  a sympy condition
            raise SpecError("union: mask, score and scale belong to the pieces")
        super().check_spec(spec)
        if any(piece.dropout is not None for piece in self.specs):
            raise SpecError("union: a piece cannot have dropout")

    def prepare(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
        plans: dict[str, Any] = {}
        for number, piece in enumerate(self.specs):
            if piece.keys is not None:
                values = piece.keys.prepare(piece, call, given)
                plans[f"piece {number}"] = KeyPlan.of(piece, call, values)
        return plans

    def run(self, pieces: Pieces, plan: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
        call, attention = pieces.call, pieces.attention
        captures = {**call.captures, **call.params}
        if debug.level() >= 1 and call.q.shape[2] * call.k.shape[2] <= SMALL:
            _check_disjoint(self.specs, call, captures, given)
        results = []
        for number, spec in enumerate(self.specs):
            found = attention.pieces.get(number)
            if found is None:
                from attngen.runtime.attention import compile

                found = attention.pieces[number] = compile(
                    spec, schedule=attention.pins, backend=attention.backend, db=attention.db
                )
            named = {name: captures[name] for name in (*spec.tensors, *spec.params)}
            if spec.keys is None and base.RECORD is not None:
                base.RECORD.append((number, found, call.q, call.k, call.v, call.q_offset, dict(named)))
            own = () if spec.keys is None else spec.keys.used
            named |= {name: given[name] for name in own if name in given}
            made = plan.get(f"piece {number}")
            results.append(found(call.q, call.k, call.v, return_lse=True, q_offset=call.q_offset, plan=made, **named))
        return merge(*results)


def _check_disjoint(specs: tuple[Spec, ...], call: Call, captures: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """InputError naming two pieces and a pair that both attend."""
    from attngen.reference.keysets import attended

    with torch.no_grad():
        seen = torch.zeros((*call.q.shape[:3], call.k.shape[2]), dtype=torch.int64, device=call.q.device)
        for number, spec in enumerate(specs):
            names = {*spec.tensors, *spec.params, *(() if spec.keys is None else spec.keys.captures())}
            both = {n: value for n, value in {**captures, **given}.items() if n in names}
            if spec.keys is not None and set(spec.keys.captures()) - set(spec.keys.optional) - set(given):
                continue  # a plan came in the place of what it was made from
            mask = attended(spec, call.q, call.k, call.v, call.q_offset, both)
            twice = (seen > 0) & mask
            if twice.any():
                at = twice.nonzero()[0].tolist()
                first = int(seen[tuple(at)]) - 1
                raise InputError(
                    "union", "disjoint pieces", f"pieces {first} and {number} both attend (b, h, i, j) = {at}"
                )
            seen = torch.where(mask & (seen == 0), number + 1, seen)


def union(*pieces: Any, sink: Any = None) -> Spec:
    """One spec from several: `ag.union(Spec(keys=..., mask=...), Spec(mask=...))`. Each piece has its own mask and score; a
    sink (of the union, or of one piece) joins once.

    Captures go to the pieces by name, so that two key sets which take one of the same name are not possible (two of
    `ag.qk_sparse()`, say, or `ag.gather()` next to `ag.block_cluster()`: call them apart and `ag.merge` what they return);
    only seed= may be for several.

    The pieces should be disjoint: a pair (i, j) that is in two of them counts twice in the softmax. With ATTNGEN_DEBUG at
    least 1, calls of up to 2**22 pairs per head are checked for that and raise InputError. Raises SpecError.
    """
    from attngen.language.spec import Spec

    for number, piece in enumerate(pieces):
        if not isinstance(piece, Spec):
            raise SpecError(f"union: piece {number} is not a Spec, got {type(piece).__name__}")
    return Spec(keys=Union(tuple(piece.text for piece in pieces)), sink=sink)
