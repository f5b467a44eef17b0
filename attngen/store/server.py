"""A PostgreSQL database that a fleet shares, through SQLAlchemy, which is loaded only then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from attngen.errors import StoreError
from attngen.store.sql import COLUMNS, SCHEMA, Execute, Fresh, Row, Statements, Unusable, too_new
from attngen.store.url import NO_SQLALCHEMY, SCHEMES, engine_url, shown

RECORDS = Statements("attngen_records")  # not plain "records": Optuna's tables and others' may be in the same database
VERSION = "attngen_schema"
CALL_WAIT = 2  # seconds that a lookup waits for the server, which is also the least that its client library takes
WAIT = 30  # seconds that an explicit request waits
REFRESH = 60.0  # seconds for which what was read is used, and for which a server that did not answer is left alone
LOCK = 0x4154_4E47  # of those who make the tables: one at a time


class PostgresServer:
    """A `Database` on a server. url: postgresql://USER:PASSWORD@HOST/DATABASE, any form that SQLAlchemy reads.

    The user needs the right to make tables once. Safe in threads and across fork: no connection outlives a method.
    """

    def __init__(self, url: str):
        self.url, self.name, self.statements = url, shown(url), RECORDS
        self._engines: dict[int, Any] = {}
        self._silent: tuple[float, str] = (float("-inf"), "")  # until when the server is left alone, and why

    def _engine(self, wait: int) -> Any:
        """One that gives up after so many seconds. Raises StoreError."""
        if wait not in self._engines:
            from sqlalchemy import create_engine
            from sqlalchemy.pool import NullPool

            url = engine_url(self.url)
            limits = {"connect_timeout": wait, "tcp_user_timeout": 1000 * wait}  # the second: a server that went away
            limits = {name: limit for name, limit in limits.items() if name not in url.query}
            self._engines[wait] = create_engine(url, poolclass=NullPool, connect_args=limits)
        return self._engines[wait]

    # Reading ---------------------------------------------------------------------------------------------------------

    def stamp(self) -> object:
        return int(time.monotonic() // REFRESH)

    def read(self, which: str, values: Mapping[str, Any], patient: bool) -> list[Row]:
        until, why = self._silent
        if not patient and time.monotonic() < until:
            raise Unusable(why)
        try:
            with self._connect(WAIT if patient else CALL_WAIT) as execute:
                if self._is_fresh(execute):
                    raise Fresh(f"{self.name}: has no attngen records yet; `attngen tune` makes them")
                return execute(f"SELECT {', '.join(COLUMNS)} FROM {RECORDS.table} {which}", values).fetchall()
        except Fresh:
            raise
        except Unusable as problem:
            self._silent = time.monotonic() + REFRESH, str(problem)
            raise

    def why_not_kept(self) -> str:
        return ""  # only trying tells

    def problems(self) -> list[str]:
        with self._connect(WAIT) as execute:
            self._is_fresh(execute)
        return []

    # Writing ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def write(self) -> Iterator[Execute]:
        with self._connect(WAIT) as execute:
            fresh = self._is_fresh(execute)
        if fresh:
            self._make()
        with self._connect(WAIT) as execute:
            yield lambda statement, values: execute(statement, values).rowcount

    def _make(self) -> None:
        """The tables, by one process at a time. A connection of its own: one that has looked already would remember that there
        were none."""
        with self._connect(WAIT) as execute:
            execute(f"SELECT pg_advisory_xact_lock({LOCK})")
            if self._is_fresh(execute):
                # By bytes, as SQLite and Python sort; SQLite's own REAL and INTEGER have 8 of them.
                execute(RECORDS.create('TEXT COLLATE "C"', "BIGINT", "DOUBLE PRECISION"))
                execute(f"CREATE TABLE {VERSION} (version INTEGER NOT NULL)")
                execute(f"INSERT INTO {VERSION} VALUES ({SCHEMA})")

    # Trouble ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _connect(self, wait: int) -> Iterator[Any]:
        """What executes statements, in one transaction; all that the driver can say becomes Unusable."""
        if (scheme := self.url.partition(":")[0].partition("+")[0]) not in SCHEMES:
            raise Unusable(f"{self.name}: records are kept in a file or at a postgresql:// URL, not at {scheme}://")
        try:
            from sqlalchemy import text
            from sqlalchemy.exc import SQLAlchemyError
        except ModuleNotFoundError as problem:
            raise Unusable(f"{self.name}: {NO_SQLALCHEMY}") from problem
        try:
            with self._engine(wait).begin() as connection:
                connection.execute(text(f"SET LOCAL statement_timeout = '{wait}s'"))
                yield lambda statement, values=None: connection.execute(text(statement), values or {})
        except StoreError as problem:
            raise Unusable(str(problem)) from problem
        except SQLAlchemyError as problem:
            said = " ".join(str(getattr(problem, "orig", None) or problem).split())  # without the statement
            raise Unusable(f"{self.name}: {said}") from problem

    def _is_fresh(self, execute: Any) -> bool:
        """Whether there are no tables of ours yet. Raises Unusable for those of a newer attngen or of another program."""
        named = ", ".join(f"to_regclass('{table}') IS NOT NULL" for table in (RECORDS.table, VERSION))
        records, version = execute(f"SELECT {named}").one()
        if not records and not version:
            return True
        if not records or not version:
            raise Unusable(f"{self.name}: its {RECORDS.table} is not of attngen")
        (found,) = execute(f"SELECT max(version) FROM {VERSION}").one()
        if found is None or found > SCHEMA:
            raise too_new(self.name, found)
        return False
