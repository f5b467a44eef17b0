"""What a key set declares: its fields, its text, its captures, and what the rest of the spec may not be.

A key set says which keys a query sees where that is found at run time and not from a closed form. It is a declaration: how
a call with one is computed is a planner's word (`attngen.plan.keysets`), joined to it by name.
"""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

from attngen.errors import SpecError

MODULES = ("cached", "listed", "sorted", "tiles", "union")  # of `attngen.language.keysets`
KINDS: dict[str, type[KeySet]] = {}  # by name in text
_HEAD = re.compile(r"([a-z_][a-z0-9_]{0,63})\s*\(")
_FIELD = re.compile(r"\s*([a-z_][a-z0-9_]{0,63})\s*=\s*")


class Described(Protocol):
    """What a key set looks at of the `Spec` that it is a part of."""

    mask: Any
    score: Any
    scale: float | None
    dropout: Any
    tensors: dict[str, Any]
    params: dict[str, Any]


@dataclass(frozen=True)
class KeySet:
    """Base of key sets. A subclass is a frozen dataclass whose fields, in order, are its canonical text.

    `prepared` names the captures that the preparation reads (with a given one they need not be given again), `used` those
    that every call reads; `optional` those among them that may be left out; `rows` those that
    are rows of k or v, in their dtype.
    """

    name: ClassVar[str] = ""
    prepared: ClassVar[tuple[str, ...]] = ()
    used: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.name:
            KINDS[cls.name] = cls

    @property
    def text(self) -> str:
        """`name(field=value, ...)` with values as JSON: `parse` reads it back."""
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

    def check_spec(self, spec: Described) -> None:
        """SpecError if the rest of the spec does not go with this key set."""
        if spec.dropout is not None:
            raise SpecError(f"{self.name}: dropout goes with closed-form keys only", fix="leave out keys= or dropout=")
        for name in self.captures():
            if name in spec.tensors or name in spec.params:
                raise SpecError(
                    f"{name!r} is a capture of {self.name}()", fix="give the spec's own tensor another name"
                )


def parse(text: str) -> KeySet:
    """Read `KeySet.text`: a known name, and fields of that key set with JSON values. Nothing is evaluated. SpecError."""
    head = _HEAD.match(text.strip())
    if head and head[1] not in KINDS:
        for module in MODULES:  # they register themselves
            importlib.import_module(f"{__package__}.keysets.{module}")
    if not head or head[1] not in KINDS:
        raise SpecError("not a key set", text=text, fix=f"the key sets are {', '.join(KINDS)}")
    kind = KINDS[head[1]]
    known = {f.name for f in fields(kind)}
    body, place, values = text.strip(), head.end(), dict[str, Any]()
    while body[place:].strip() != ")":
        found = _FIELD.match(body, place)
        if not found or found[1] not in known or found[1] in values:
            raise SpecError(
                f"{head[1]}: expected one of {', '.join(sorted(known))}, once each", text=text, column=place
            )
        try:
            value, place = json.JSONDecoder().raw_decode(body, found.end())
        except (json.JSONDecodeError, RecursionError):
            raise SpecError(f"{head[1]}: {found[1]} takes a JSON value", text=text, column=found.end()) from None
        values[found[1]] = tuple(value) if isinstance(value, list) else value
        rest = body[place:].lstrip()
        if rest.startswith(","):
            place = len(body) - len(rest) + 1
        elif rest != ")":
            raise SpecError(f"{head[1]}: expected `,` or `)`", text=text, column=place)
    missing = [f.name for f in fields(kind) if f.name not in values and f.default is f.default_factory]
    if missing:
        raise SpecError(f"{head[1]}: {missing[0]} is missing", text=text)
    return kind(**values)


def positive(place: str, value: Any, least: int = 1) -> int:
    """SpecError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SpecError(f"{place}: expected an int of at least {least}, got {value!r}")
    return value
