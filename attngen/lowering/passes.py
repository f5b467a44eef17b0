"""What happens to a kernel's statements between the printer and the text, one function a pass, in this order:

    repeated   what costs much and stands there twice is computed once
    short      what would not fit a line is cut into steps
    unnest     what shall have a variable gets a statement of its own, once
    place      a statement moves to the outermost place where all it reads is known
    drop       what nobody reads goes
    rename     variables get their last names, short and clear of everything else's

A kernel's places are, outermost first: in front of everything (`decode`), behind the decoded program number (`program`),
the head (`head`, inside the loop over a group's query heads), and its one or two loops over tiles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from attngen.lowering.statements import (
    ATOM,
    SCALAR,
    TILE,
    Assign,
    Call,
    Chain,
    Name,
    Named,
    Statements,
    Value,
    rebuilt,
)

WIDTH = 72  # a longer value is cut into named steps, so that no line needs to be wrapped
POINTER = 56  # the same for what is loaded from: its line has the load's own words too
CHEAP = ("tl.abs", "tl.minimum", "tl.maximum", "tl.where", "tl.load", "tl.cdiv", "tl.full", "")
MARK = "@"  # between the stem and the number of a variable that has no name yet


# -- on values --------------------------------------------------------------------------------------------------------


def repeated(statements: Iterable[Assign]) -> Statements:
    """Names the costly values that stand more than once in these statements."""
    statements = tuple(statements)
    found = Counter(value for statement in statements for value in statement.value.walk() if _is_costly(value))

    def change(value: Value) -> Value:
        return Named(value, stem(value)) if _is_costly(value) and found[value] > 1 else value

    return tuple(replace(statement, value=rebuilt(statement.value, change)) for statement in statements)


def _is_costly(value: Value) -> bool:
    return isinstance(value, Call) and value.function not in CHEAP and value.kind != "int"


def short(statements: Iterable[Assign]) -> Statements:
    """Names parts of the values that would not fit a line."""
    out = []
    for statement in statements:
        value = rebuilt(statement.value, partial(_shorter, parts=statement.parts))
        if isinstance(value, Named) and not isinstance(statement.value, Named):
            value = value.value  # it stands alone already
        out.append(replace(statement, value=value))
    return tuple(out)


def _shorter(value: Value, parts: tuple[str, str]) -> Value:
    if isinstance(value, Named):
        return value
    if isinstance(value, Chain):
        return _shorter_chain(value, parts)
    if isinstance(value, Call):
        inside = list(value.parts)
        width = POINTER if value.function == "tl.load" else WIDTH
        while sum(len(str(part)) for part in inside) > width:
            longest = max(range(len(inside)), key=lambda n: len(str(inside[n])))
            if isinstance(inside[longest], (Name, Named)):
                break
            inside[longest] = _named(inside[longest], parts)
        value = value.with_parts(tuple(inside))
    return _named(value, parts) if len(str(value)) > WIDTH and value.strength == ATOM else value


def _shorter_chain(value: Chain, parts: tuple[str, str]) -> Value:
    """Joined from the left for as long as the line goes; then the longer side gets a name."""
    joined, *rest = value.operands
    left = [joined]
    for sign, operand, needed in rest:
        so_far = replace(value, operands=tuple(left)) if len(left) > 1 else left[0][1]
        if len(str(so_far)) + len(str(operand)) > WIDTH:
            if len(str(operand)) > len(str(so_far)) and operand.strength != ATOM:
                operand = _named(operand, parts)
            elif so_far.strength != ATOM:
                left = [(left[0][0], _named(so_far, parts), value.strength)]
        left.append((sign, operand, needed))
    return replace(value, operands=tuple(left))


def _named(value: Value, parts: tuple[str, str]) -> Value:
    if isinstance(value, (Name, Named)):
        return value
    own = "" if value.kind == "pointer" else parts[value.kind == "bool"]
    return Named(value, own or stem(value))


def stem(value: Value) -> str:
    """What a value without a better name is called: what it belongs to, and whether it allows a pair or adds to a logit."""
    if value.kind == "pointer":
        base = next(part for part in value.walk() if isinstance(part, (Name, Named)) and part.kind == "pointer")
        return f"{base}_at" if value.axes else f"{str(base).removesuffix('_base')}_base"
    whose = {SCALAR: "head", TILE: "pair", frozenset("i"): "query", frozenset("j"): "key"}[value.axes & TILE]
    return f"{whose}_{'ok' if value.kind == 'bool' else 'term'}"


# -- on statements ----------------------------------------------------------------------------------------------------


@dataclass
class Variables:
    """The variables that `unnest` has made: the same value gets the same one, wherever it stands."""

    known: dict[Value, Name] = field(default_factory=dict)

    def of(self, value: Value, stem: str) -> Name:
        if value not in self.known:
            self.known[value] = Name(f"{stem}{MARK}{len(self.known)}", value.axes, value.kind)
        return self.known[value]


def unnest(statements: Iterable[Assign], variables: Variables) -> Statements:
    """Makes a statement of every `Named` value, in front of the one that reads it; of equal ones one."""
    out: list[Assign] = []
    there: set[str] = set()

    def change(value: Value) -> Value:
        if not isinstance(value, Named):
            return value
        if isinstance(value.value, Name):
            return value.value
        made = variables.of(value.value, value.stem)
        if made.name not in there:
            there.add(made.name)
            out.append(Assign(made, value.value))
        return made

    for statement in statements:
        value, before = statement.value, len(out)
        target = statement.target
        value = rebuilt(value, change)
        if statement.reason and len(out) > before:  # the comment stands above the whole group
            out[before] = replace(out[before], reason=statement.reason)
            statement = replace(statement, reason="")
        out.append(replace(statement, target=target, value=value))
    return tuple(out)


def place(
    places: Iterable[Statements],
    nested: Mapping[int, int],
    skipped: frozenset[int],
    inner: frozenset[str],
    outermost: int,
) -> list[Statements]:
    """Moves what `unnest` made to the outermost place where all it reads is known, `outermost` at most.

    places: statements by number. nested: the place that each lies directly in. skipped: places that nothing moves to. inner:
    variables that an outline makes, known only where they are read.
    """
    places = list(places)
    known = [_fixed(statements) for statements in places]
    out: list[list[Assign]] = [[] for _ in places]
    for number, statements in enumerate(places):
        around = _around(number, nested)
        for statement in statements:
            home = number
            if MARK in statement.target.name:
                homes = {number if v in inner else _home(v, around, known) for v in statement.value.reads}
                home = max([min(outermost, number), *homes])
                home = number if home in skipped else home
                if statement.target.name in known[home]:
                    continue
                known[home].add(statement.target.name)
            out[home].append(statement)
    return [tuple(statements) for statements in out]


def _home(variable: str, around: list[int], known: list[set[str]]) -> int:
    """The place, of those around, where a variable is known; an argument of the kernel is everywhere."""
    return next((number for number in around if variable in known[number]), 0)


def _around(number: int, nested: Mapping[int, int]) -> list[int]:
    """The places that a place lies in, outermost first, and itself."""
    return [*(_around(nested[number], nested) if number in nested else []), number]


def _fixed(statements: Iterable[Assign]) -> set[str]:
    return {s.target.name for s in statements if MARK not in s.target.name and not s.inline}


def drop(places: Iterable[Statements], nested: Mapping[int, int], wanted: Iterable[str]) -> list[Statements]:
    """Leaves out what neither the outline (`wanted`) nor another statement reads."""
    places = list(places)
    read = [set(wanted) for _ in places]
    for number in reversed(range(len(places))):
        kept: list[Assign] = []
        for statement in reversed(places[number]):
            if statement.inline or statement.target.name in read[number]:
                read[number] |= statement.value.reads
                kept.append(statement)
            elif statement.reason and kept and not kept[-1].reason:
                kept[-1] = replace(kept[-1], reason=statement.reason)
        places[number] = tuple(reversed(kept))
        if number in nested:
            read[nested[number]] |= read[number]
    return places


def rename(
    places: Iterable[Statements], nested: Mapping[int, int], is_taken: Callable[[str], bool]
) -> list[Statements]:
    """Gives the variables that `unnest` made their last names. Loops that lie beside each other may use the same ones."""
    places = list(places)
    fixed = {name for statements in places for name in _fixed(statements)}
    names: dict[str, str] = {}
    own: dict[int, set[str]] = {}
    out: list[Statements] = []
    for number, statements in enumerate(places):
        used = own[number] = set(own[nested[number]]) if number in nested else set()
        renamed = []
        for statement in statements:
            target = statement.target
            if MARK in target.name:
                wish, count = target.name.partition(MARK)[0], 1
                final = wish
                while final in used or final in fixed or is_taken(final):
                    count += 1
                    final = f"{wish}_{count}"
                used.add(final)
                names[target.name] = final
                target = replace(target, name=final)
            renamed.append(replace(statement, target=target, value=rebuilt(statement.value, _renaming(names))))
        out.append(tuple(renamed))
    return out


def _renaming(names: Mapping[str, str]) -> Callable[[Value], Value]:
    return lambda value: (
        replace(value, name=names[value.name]) if isinstance(value, Name) and value.name in names else value
    )
