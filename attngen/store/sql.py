"""What the stores have in common: the table's columns, and statements that both SQLite and PostgreSQL take."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from attngen.errors import StoreError
from attngen.store.record import BUCKETS, FAMILY, KEY_FIELDS, VERSIONS, Record
from attngen.store.text import ADDED, VALUE_FIELDS, record_from_dict, record_to_dict

SCHEMA = 1  # a database with a larger one belongs to a newer attngen
COLUMNS = (*KEY_FIELDS, *VALUE_FIELDS)
Row = tuple[Any, ...]
Execute = Callable[[str, Mapping[str, Any]], int]  # a statement and its values -> how many rows it changed

# The primary key begins with the family, so a lookup is one range of the index.
_ORDER = (*FAMILY, *VERSIONS, *BUCKETS)
_REALS = {"seconds", "spread", "error"}
_INTEGERS = {"head_dim", "head_dim_v", "units", "memory", "fp_fusion", *BUCKETS}


class Unusable(Exception):
    """Why a database cannot be used; becomes a warning for a lookup, a StoreError for an explicit request."""


class Fresh(Unusable):
    """There is nothing there yet: fine to write, nothing to read."""


class Database(Protocol):
    """Where rows are kept. Every method raises Unusable, and no connection outlives one.

    name: what messages call it, without a password; statements: of its table.
    """

    @property
    def name(self) -> str: ...

    @property
    def statements(self) -> Statements: ...

    def stamp(self) -> object:
        """Changes when some process may have committed; None when that can't be told."""
        ...

    def read(self, which: str, values: Mapping[str, Any], patient: bool) -> list[Row]:
        """The rows (COLUMNS) that a clause of `Statements` picks. patient: wait as long as an explicit request may; a call must
        not hang for a record."""
        ...

    def why_not_kept(self) -> str:
        """Why new records can't be kept, where that can be told without trying."""
        ...

    def write(self) -> AbstractContextManager[Execute]:
        """A transaction: what is executed inside is kept whole or not at all. Makes the table if there is none."""
        ...

    def problems(self) -> list[str]:
        """What is wrong below the level of rows."""
        ...


@dataclass(frozen=True)
class Statements:
    """Of a table. Values go by the columns' names."""

    table: str

    def create(self, text: str = "TEXT", integer: str = "INTEGER", real: str = "REAL") -> str:
        """With the database's names for the three types."""
        columns = [self.declared(name, text, integer, real) for name in COLUMNS]
        return f"CREATE TABLE {self.table} ({', '.join(columns)}, PRIMARY KEY ({', '.join(_ORDER)}))"

    def declared(self, name: str, text: str = "TEXT", integer: str = "INTEGER", real: str = "REAL") -> str:
        """A column's declaration."""
        kind = real if name in _REALS else integer if name in _INTEGERS else text
        return f"{name} {kind} NOT NULL" + (" DEFAULT ''" if name in ADDED else "")

    @property
    def upsert(self) -> str:
        """One statement decides, inside the database: a measured record beats a modelled one, then the smaller time (`better`)."""
        return (
            f"INSERT INTO {self.table} ({', '.join(COLUMNS)}) VALUES ({', '.join(f':{name}' for name in COLUMNS)}) "
            f"ON CONFLICT ({', '.join(_ORDER)}) DO UPDATE SET "
            + ", ".join(f"{name} = excluded.{name}" for name in VALUE_FIELDS)
            + f" WHERE CASE WHEN excluded.kind = {self.table}.kind THEN excluded.seconds < {self.table}.seconds"
            " ELSE excluded.kind = 'measured' END"
        )

    @property
    def remove(self) -> str:
        """The record of a key."""
        return f"DELETE FROM {self.table} WHERE {_equal(_ORDER)}"

    @property
    def supersede(self) -> str:
        """A record, unless it has been replaced meanwhile."""
        return f"{self.remove} AND {_equal(('schedule', 'seconds', 'kind'))}"


def _equal(names: Iterable[str]) -> str:
    return " AND ".join(f"{name} = :{name}" for name in names)


EVERY = f"ORDER BY {', '.join(_ORDER)}"
OF_FAMILY = f"WHERE {_equal(FAMILY)}"


def too_new(name: str, version: int) -> Unusable:
    return Unusable(f"{name}: was written by a newer attngen (schema {version}, this one reads {SCHEMA})")


def row_of(record: Record) -> dict[str, Any]:
    """A record as a statement's values. Raises StoreError if its schedule is no JSON."""
    try:
        schedule = json.dumps(record.schedule, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise StoreError(f"record: schedule is not plain JSON: {record.schedule!r}: {problem}") from problem
    return record_to_dict(record) | {"schedule": schedule, "fp_fusion": int(record.key.fp_fusion)}


def record_of(row: Row) -> Record:
    """Raises StoreError naming what a damaged row has wrong."""
    values = dict(zip(COLUMNS, row, strict=True))
    try:
        values["schedule"] = json.loads(str(values["schedule"]))
    except (ValueError, RecursionError) as problem:
        raise StoreError(f"schedule is not JSON: {problem}") from problem
    if values["fp_fusion"] in (0, 1):
        values["fp_fusion"] = bool(values["fp_fusion"])
    return record_from_dict(values)
