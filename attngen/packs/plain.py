"""Specs and their facts as JSON and back. Read with suspicion: what is malformed is a PackError, and nothing is evaluated.

Programs share parts, so that all nodes of a spec stand in one table, in which each names its arguments by their places.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from attngen.analysis import summaries
from attngen.analysis.call_facts import CallFacts, WalkFacts
from attngen.analysis.capture_sites import CaptureSite, SinkSlope
from attngen.analysis.scalars import BEGIN, BLOCK, END, FIRST, LAST
from attngen.analysis.summaries import Summary
from attngen.analysis.tile_program import TileProgram
from attngen.errors import PackError, SpecError
from attngen.language import keyset, lists
from attngen.language.indices import Doubtful
from attngen.language.keysets.union import Union
from attngen.language.plain import PlainParam, PlainSpec, PlainTensor
from attngen.language.programs import OPERATIONS, Node, names_in, takes


class Missing(PackError):
    """A call that the pack has nothing for."""


class Inner(dict[str, PlainSpec]):
    """The specs that a key set's calls are made of, by role."""

    def __missing__(self, role: str) -> PlainSpec:
        known = ", ".join(self) or "none"
        raise Missing(
            f"such a call needs an attention {role}, and the pack has {known}: sizes and captures of a call decide; build it with "
            f"a shape and captures like these"
        )


LEAVES = {"bool": bool, "int": int, "real": float, "integer": str, "number": str}
MOST_NODES = 100_000
DEEPEST = 200  # what walks programs, and hashes what holds them, calls itself
LARGEST, LARGEST_POWER = 2**62, 64  # of a whole number in a program, and of an exponent
KINDS = ("float", "int", "bool")


class Codec:
    """How values of one kind become JSON and come back. put(table, value), get(table, data)."""

    def __init__(self, put: Callable[[Any, Any], Any], get: Callable[[Any, Any], Any]):
        self.put, self.get = put, get


def _checked(kind: type, words: str) -> Codec:
    def get(table: Any, data: Any) -> Any:
        if type(data) is not kind:
            raise PackError(f"expected {words}, got {data!r:.60}")
        return data

    return Codec(lambda table, value: value, get)


def _many(own: Codec, make: Callable[[Any], Any] = tuple) -> Codec:
    def get(table: Any, data: Any) -> Any:
        if not isinstance(data, list):
            raise PackError(f"expected a list, got {data!r:.60}")
        return make(own.get(table, item) for item in data)

    def put(table: Any, value: Any) -> Any:
        items = sorted(value) if isinstance(value, frozenset) else value
        return [own.put(table, item) for item in items]

    return Codec(put, get)


def _fixed(*own: Codec) -> Codec:
    """A tuple with a kind for each place."""

    def get(table: Any, data: Any) -> Any:
        if not isinstance(data, list) or len(data) != len(own):
            raise PackError(f"expected a list of {len(own)}, got {data!r:.60}")
        return tuple(codec.get(table, item) for codec, item in zip(own, data, strict=True))

    return Codec(lambda table, value: [c.put(table, x) for c, x in zip(own, value, strict=True)], get)


def _named(own: Codec, make: Callable[[Any], Any] = dict) -> Codec:
    def get(table: Any, data: Any) -> Any:
        if not isinstance(data, dict):
            raise PackError(f"expected an object, got {data!r:.60}")
        return make({name: own.get(table, item) for name, item in data.items()})

    return Codec(lambda table, value: {name: own.put(table, item) for name, item in value.items()}, get)


def _maybe(own: Codec) -> Codec:
    return Codec(
        lambda table, value: None if value is None else own.put(table, value),
        lambda table, data: None if data is None else own.get(table, data),
    )


def _record(made: Any, /, **own: Codec) -> Codec:
    """A dataclass, by its fields."""

    def get(table: Any, data: Any) -> Any:
        if not isinstance(data, dict) or set(data) != set(own):
            raise PackError(f"expected {made.__name__} with {', '.join(own)}, got {data!r:.60}")
        return made(**{name: codec.get(table, data[name]) for name, codec in own.items()})

    assert set(own) == {field.name for field in fields(made)}, made
    return Codec(lambda table, value: {name: c.put(table, getattr(value, name)) for name, c in own.items()}, get)


TEXT, NUMBER, TRUTH = _checked(str, "text"), _checked(int, "a whole number"), _checked(bool, "true or false")
REAL = Codec(lambda table, value: float(value), lambda table, data: float(_checked(float, "a number").get(table, data)))
TEXTS = _many(TEXT)


def _one_of(*texts: str) -> Codec:
    def get(table: Any, data: Any) -> str:
        if data not in texts:
            raise PackError(f"expected one of {', '.join(texts)}, got {data!r:.60}")
        return str(data)

    return Codec(lambda table, value: value, get)


class Table:
    """The nodes of a spec, each after its arguments."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self.places: dict[Node, int] = {}
        self.nodes: list[Node] = []
        self.depths: list[int] = []

    def put(self, node: Node) -> int:
        """The place of a node, entered if it is not there."""
        found = self.places.get(node)
        if found is None:
            row = [node.op, node.value, node.kind, [self.put(arg) for arg in node.args]]
            found = self.places[node] = len(self.rows)
            self.rows.append(row)
        return found

    @classmethod
    def read(cls, rows: Any) -> Table:
        """The nodes of a table. PackError."""
        table = cls()
        if not isinstance(rows, list) or len(rows) > MOST_NODES:
            raise PackError(f"nodes: expected a list of at most {MOST_NODES}")
        for row in rows:
            table.nodes.append(table._node(row))
        return table

    def _node(self, row: Any) -> Node:
        if not (isinstance(row, list) and len(row) == 4 and isinstance(row[0], str) and isinstance(row[3], list)):
            raise PackError(f"nodes: expected [operation, value, kind, arguments], got {row!r:.60}")
        op, value, kind, places = row
        args = tuple(self.get(place) for place in places)
        self.depths.append(1 + max((self.depths[place] for place in places), default=0))
        if op in LEAVES:
            right = type(value) is LEAVES[op] and not args and kind == ""
            right = right and (op != "int" or abs(value) <= LARGEST)
        elif op == "load":
            right = isinstance(value, str) and kind in KINDS
        elif op == "power":
            right = type(value) in (int, float) and abs(value) <= LARGEST_POWER and kind == ""
        else:
            right = op in OPERATIONS and value is None and kind == ""
        if not right or (op in OPERATIONS and not takes(op, len(args))):
            raise PackError(f"nodes: expected an operation of a program, got {row!r:.60}")
        if self.depths[-1] > DEEPEST:
            raise PackError(f"nodes: expected programs at most {DEEPEST} deep")
        return Node(op, args, value, kind)

    def get(self, place: Any) -> Node:
        """The node at a place. PackError."""
        if type(place) is not int or not 0 <= place < len(self.nodes):
            raise PackError(f"nodes: expected a place before {len(self.nodes)}, got {place!r:.60}")
        return self.nodes[place]


NODE = Codec(lambda table, value: table.put(value), lambda table, data: table.get(data))
SPANS = _many(_fixed(NODE, NODE))
PROGRAM = _record(TileProgram, lines=_many(_fixed(TEXT, NODE)), full=SPANS, partial=SPANS, summarised=TRUTH)
SUMMARY = _record(
    Summary, kind=_one_of(*summaries.KINDS), tile=NODE, walked=NODE, strict=TRUTH, real=TRUTH, symbols=TEXTS
)
WALK = _record(WalkFacts, summaries=_many(SUMMARY), divisors=_many(TEXT, frozenset), by_batch=TRUTH, by_head=TRUTH)
SITES = _named(
    _many(
        _record(
            CaptureSite,
            tensor=TEXT,
            number=NUMBER,
            deterministic=TRUTH,
            kind=_one_of("total", "rows", "keys", "bins", "atomic", "pairs"),
            dims=_many(NUMBER),
            indices=_many(NODE),
            by_batch=TRUTH,
            by_head=TRUTH,
        )
    )
)
FACTS = _record(
    CallFacts,
    walk_keys=WALK,
    walk_queries=WALK,
    program_keys=PROGRAM,
    program_queries=PROGRAM,
    positive=_many(TEXT, frozenset),
    natural=TRUTH,
    paged=TRUTH,
    sites=SITES,
    atomic_sites=SITES,
    slopes=_named(_many(_record(SinkSlope, indices=_many(NODE), slope=NODE))),
)
DOUBTFUL = _record(Doubtful, name=TEXT, indices=_many(NODE), texts=TEXTS, used=NODE)


def _put_keys(table: Any, keys: keyset.KeySet) -> Any:
    if isinstance(keys, Union):
        return ["union", list(keys.pieces), [put_spec(spec) for spec in keys.specs]]  # type: ignore[arg-type]
    return [type(keys).__module__.rpartition(".")[2], keys.text, []]


def _get_keys(table: Any, data: Any) -> keyset.KeySet:
    if isinstance(data, list) and len(data) == 3 and data[0] == "union":
        pieces, specs = TEXTS.get(table, data[1]), _many(_INNER).get(table, data[2])
        return Union.of(pieces, specs)
    module, text, _ = _fixed(TEXT, TEXT, _many(TEXT)).get(table, data)
    if module not in keyset.MODULES:
        raise PackError(f"keys: expected one of {', '.join(keyset.MODULES)}, got {module!r:.60}")
    importlib.import_module(f"{keyset.__package__}.keysets.{module}")  # it registers itself
    return _parsed(keyset.parse, text)


def _parsed(read: Callable[[str], Any], text: Any) -> Any:
    try:
        return read(TEXT.get(None, text))
    except SpecError as error:
        raise PackError(f"expected a declaration of attngen, got {text!r:.60}: {error}") from None


def _put_ranges(table: Any, ranges: Mapping[tuple[bool, bool], Any]) -> Any:
    return [[*key, _many(DOUBTFUL).put(table, found)] for key, found in sorted(ranges.items())]


def _get_ranges(table: Any, data: Any) -> Any:
    return {(a, b): found for a, b, found in _many(_fixed(TRUTH, TRUTH, _many(DOUBTFUL))).get(table, data)}


_INNER = Codec(lambda table, spec: put_spec(spec), lambda table, data: get_spec(data))
SPEC = _record(
    PlainSpec,
    key=TEXT,
    text=TEXT,
    tensors=_named(_record(PlainTensor, name=TEXT, ndim=NUMBER, kind=_one_of(*KINDS))),
    params=_named(_record(PlainParam, name=TEXT, number_kind=_one_of("int", "float"))),
    scale=_maybe(REAL),
    mask=NODE,
    mask_text=TEXT,
    is_causal=TRUTH,
    sink=_maybe(NODE),
    dropout_param=_maybe(TEXT),
    seeded=TRUTH,
    keys=_maybe(Codec(_put_keys, _get_keys)),
    lists=_maybe(Codec(lambda table, value: value.text, lambda table, data: _parsed(lists.parse, data))),
    page_size=_maybe(NUMBER),
    plain_dims=_named(_many(_fixed(NUMBER, _one_of(*"bhijr")))),
    mask_reads=TEXTS,
    sink_reads=TEXTS,
    mask_params=TEXTS,
    ranges=Codec(_put_ranges, _get_ranges),
    known=FACTS,
    inner=_named(_INNER, Inner),
    name=TEXT,
)


def put_spec(spec: PlainSpec) -> dict[str, Any]:
    """As plain JSON."""
    table = Table()
    found = SPEC.put(table, spec)
    return {"nodes": table.rows, "spec": found}


def get_spec(data: Any) -> PlainSpec:
    """What `put_spec` gave. PackError."""
    if not isinstance(data, dict) or set(data) != {"nodes", "spec"}:
        raise PackError(f"expected a spec with its nodes, got {data!r:.60}")
    table = Table.read(data["nodes"])
    found: PlainSpec = SPEC.get(table, data["spec"])
    check_names(found, table.nodes)
    return found


def check_names(spec: PlainSpec, nodes: Sequence[Node]) -> None:
    """PackError unless all that a spec's programs name is declared, and all its declarations fit each other."""
    tensors, params, known = spec.tensors, {*spec.params}, spec.known
    for node in nodes:
        if node.op == "load" and (node.value not in tensors or tensors[node.value].ndim != len(node.args)):
            raise PackError(f"nodes: expected a load of a declared tensor, got {node!r:.60}")
    own = [(x.name, name) for declared in (tensors, spec.params) for name, x in declared.items()]
    own += [(x.name, x.name) for ranges in spec.ranges.values() for x in ranges]
    sites = [site for found in (known.sites, known.atomic_sites) for own_sites in found.values() for site in own_sites]
    learned = [*known.sites, *known.atomic_sites, *known.slopes, *(site.tensor for site in sites)]
    read = {*spec.mask_reads, *spec.sink_reads, *learned, *(x.name for ranges in spec.ranges.values() for x in ranges)}
    numbers = {*spec.mask_params, *known.positive, *([] if spec.dropout_param is None else [spec.dropout_param])}
    dims = [(name, dim) for name, own_dims in spec.plain_dims.items() for dim, _ in own_dims]
    dims += [(site.tensor, dim) for site in sites for dim in site.dims]
    if (
        any(name != called for name, called in own)
        or not read <= {*tensors}
        or not numbers <= params
        or {*spec.plain_dims} != {*tensors}
        or any(not 0 <= dim < tensors[name].ndim for name, dim in dims)
    ):
        raise PackError(f"specs: expected declarations of all that {spec.text!r:.60} reads")
    places = {"b", "h", "i", "j", "q_offset"} | params
    _check_scope([spec.mask, *([] if spec.sink is None else [spec.sink])], places)
    _check_scope([x for ranges in spec.ranges.values() for d in ranges for x in (*d.indices, d.used)], places)
    _check_scope([index for site in sites for index in site.indices], places)
    _check_scope([x for loads in known.slopes.values() for load in loads for x in (*load.indices, load.slope)], places)
    for walk, program in ((known.walk_keys, known.program_keys), (known.walk_queries, known.program_queries)):
        _check_scope([x for summary in walk.summaries for x in (summary.tile, summary.walked)], places)
        scope = {"b", "h", "q_offset", FIRST, LAST, BEGIN, END, BLOCK} | params | {*walk.symbols}
        for name, node in program.lines:
            _check_scope([node], scope)
            scope.add(name)
        _check_scope([node for both in (*program.full, *program.partial) for node in both], scope)


def _check_scope(programs: Iterable[Node], names: Collection[str]) -> None:
    for node in programs:
        unknown = names_in(node) - {*names}
        if unknown:
            raise PackError(
                f"nodes: expected a program of {', '.join(sorted(names))}, got {', '.join(sorted(unknown))}"
            )
