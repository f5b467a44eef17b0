"""Unions of disjoint pieces, each a spec with its own keys, mask and score."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from attngen.errors import SpecError
from attngen.language.keyset import Described, KeySet

if TYPE_CHECKING:
    from attngen.language.spec import Spec


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
        from attngen.language.spec import Spec  # the symbolic language: a union of a pack has its pieces already

        return tuple(Spec.from_text(text) for text in self.pieces)

    @classmethod
    def of(cls, pieces: tuple[str, ...], specs: tuple[Any, ...]) -> Union:
        """A union whose pieces are there as plain data, `attngen.language.plain.PlainSpec`; it was checked when it was made."""
        union = object.__new__(cls)
        object.__setattr__(union, "pieces", pieces)
        union.__dict__["specs"] = specs
        return union

    def declared(self) -> dict[str, Any]:
        return {name: d for spec in self.specs for name, d in {**spec.tensors, **spec.params}.items()}

    def captures(self) -> tuple[str, ...]:
        names = [name for spec in self.specs if spec.keys is not None for name in spec.keys.captures()]
        return tuple(dict.fromkeys(names))

    def check_spec(self, spec: Described) -> None:
        from attngen.language.expression import S

        if spec.mask != True or spec.score != S or spec.scale is not None:  # noqa: E712  a sympy condition
            raise SpecError("union: mask, score and scale belong to the pieces")
        super().check_spec(spec)
        if any(piece.dropout is not None for piece in self.specs):
            raise SpecError("union: a piece cannot have dropout")


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
