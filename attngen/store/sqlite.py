"""One SQLite file that many processes read and write at once. A file that is not an attngen database of this version is never
touched, and reading changes nothing."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from attngen.store.sql import COLUMNS, EVERY, SCHEMA, Execute, Fresh, Row, Statements, Unusable, too_new
from attngen.store.text import ADDED

APPLICATION = 0x4154_4E47  # "ATNG" in the file's header says whose database it is
READ_WAIT = 0.25  # seconds a lookup waits for a lock: a call must not hang for a record
WRITE_WAIT = 30.0
RACY = 0.1  # a file changed this recently may change again within one tick of its clock
RECORDS = Statements("records")

T = TypeVar("T")


class SqliteFile:
    """A `Database` in a file. Safe in threads and across fork: no connection outlives a method."""

    def __init__(self, path: Path):
        self.path, self.name, self.statements = path, str(path), RECORDS
        self._checked = False

    # Reading ---------------------------------------------------------------------------------------------------------

    def stamp(self) -> object:
        """Changes whenever some process commits; None when that cannot be relied on."""
        stamps: list[object] = []
        for path in (self.path, Path(f"{self.path}-wal")):
            try:
                info = path.stat()
            except OSError:
                info = None
            if info is None or info.st_size == 0:  # readers make an empty WAL; it says no more than none
                stamps.append(None)
                continue
            if abs(time.time() - info.st_mtime) < RACY:
                return None
            stamps.append((info.st_mtime_ns, info.st_size, info.st_ino))
        return tuple(stamps)

    def read(self, which: str, values: Mapping[str, Any], patient: bool) -> list[Row]:
        def run() -> list[Row]:
            with closing(self._connect_to_read(WRITE_WAIT if patient else READ_WAIT)) as connection:
                self._identify(connection)
                return connection.execute(f"{_select(connection)} {which}", values).fetchall()

        return self._guard(run)

    def problems(self) -> list[str]:
        def run() -> list[str]:
            with closing(self._connect_to_read(WRITE_WAIT)) as connection:
                self._identify(connection)
                connection.execute(f"{_select(connection)} {EVERY}")
                return [line for (line,) in connection.execute("PRAGMA integrity_check(20)") if line != "ok"]

        return [f"{self.path}: {line}" for line in self._guard(run)]

    def why_not_kept(self) -> str:
        writable = os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)
        return "" if writable else f"{self.path}: is read-only; its records are used, new ones cannot be kept"

    def _connect_to_read(self, wait: float) -> sqlite3.Connection:
        if not self.path.exists():
            raise Fresh(f"{self.path}: no such database; `attngen tune` makes one")
        if self.path.is_file() and self.path.stat().st_size == 0:
            raise Fresh(f"{self.path}: is an empty file")
        uri = self.path.as_uri()
        connection = sqlite3.connect(f"{uri}?mode=ro", timeout=wait, uri=True, isolation_level=None)
        try:
            connection.execute("PRAGMA schema_version").fetchone()
        except sqlite3.OperationalError as problem:
            connection.close()
            # In a folder that cannot be written SQLite cannot make the files a WAL reader needs. With no WAL left
            # behind the file is complete by itself and is read as one that does not change.
            if "unable to open" not in str(problem) and "readonly" not in str(problem):
                raise
            wal = Path(f"{self.path}-wal")
            if (wal.exists() and wal.stat().st_size) or not self.path.is_file():
                raise
            return sqlite3.connect(f"{uri}?mode=ro&immutable=1", timeout=wait, uri=True, isolation_level=None)
        return connection

    # Writing ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def write(self) -> Iterator[Execute]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise Unusable(f"{self.path}: {problem}") from problem
        with closing(self._guard(self._connect_to_write)) as connection:
            try:
                yield lambda statement, values: connection.execute(statement, values).rowcount
                connection.execute("COMMIT")
            except sqlite3.Error as problem:
                raise Unusable(f"{self.path}: {problem}") from problem

    def _connect_to_write(self) -> sqlite3.Connection:
        """A connection inside a BEGIN IMMEDIATE of a database known to be ours."""
        if self.path.is_dir():
            raise Unusable(f"{self.path}: is a folder")
        connection = sqlite3.connect(self.path.as_uri(), timeout=WRITE_WAIT, uri=True, isolation_level=None)
        try:
            try:  # before anything is changed: whose file is it?
                self._identify(connection)
            except Fresh:
                pass
            else:
                if not self._checked and connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                    raise Unusable(f"{self.path}: is damaged; move it away, `attngen db export` may save parts of it")
            _patiently(lambda: connection.execute("PRAGMA journal_mode = WAL").fetchone())
            connection.execute("PRAGMA synchronous = FULL")  # a commit is kept even when the power goes
            _patiently(lambda: connection.execute("BEGIN IMMEDIATE"))
            try:
                self._identify(connection)
            except Fresh:
                connection.execute(f"{RECORDS.create()} WITHOUT ROWID")
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {SCHEMA}")
            for name in _lacking(connection):
                connection.execute(f"ALTER TABLE {RECORDS.table} ADD COLUMN {RECORDS.declared(name)}")
            self._checked = True
            return connection
        except BaseException:
            connection.close()
            raise

    # Trouble ---------------------------------------------------------------------------------------------------------

    def _guard(self, run: Callable[[], T]) -> T:
        """Run, with everything SQLite and the system can say turned into Unusable."""
        try:
            return run()
        except sqlite3.Error as problem:
            said = str(problem)
            if "locked" in said or "busy" in said:
                said = "is locked by another process"
            elif self.path.is_dir():
                said = "is a folder"
            elif "malformed" in said or "not a database" in said:
                said = f"is damaged or no SQLite file ({said})"
            raise Unusable(f"{self.path}: {said}") from problem
        except (OSError, OverflowError, UnicodeDecodeError) as problem:
            raise Unusable(f"{self.path}: {problem}") from problem

    def _identify(self, connection: sqlite3.Connection) -> None:
        """Raises Fresh for an empty database, Unusable for another program's or a newer attngen's."""
        # In one statement, which sees one state: another process may be making the database.
        application, version, tables = connection.execute(
            "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master) "
            "FROM pragma_application_id, pragma_user_version"
        ).fetchone()
        if application == 0 and version == 0 and tables == 0:
            raise Fresh(f"{self.path}: is an empty database")
        if application != APPLICATION:
            raise Unusable(f"{self.path}: is a database of another program, not of attngen")
        if version > SCHEMA:
            raise too_new(self.name, version)


def _lacking(connection: sqlite3.Connection) -> list[str]:
    """Columns that came after this database was made. An older attngen reads and writes it with them all the same."""
    there = {name for (name,) in connection.execute(f"SELECT name FROM pragma_table_info('{RECORDS.table}')")}
    return [name for name in ADDED if name not in there]


def _select(connection: sqlite3.Connection) -> str:
    """Every column of the records, those that the database lacks as they are by default."""
    lacking = _lacking(connection)
    columns = ["''" if name in lacking else name for name in COLUMNS]
    return f"SELECT {', '.join(columns)} FROM {RECORDS.table}"


def _patiently(run: Callable[[], object]) -> None:
    """SQLite does not wait by itself everywhere (changing to WAL, recovering a WAL): wait and try again."""
    deadline = time.monotonic() + WRITE_WAIT
    pause = 0.001
    while True:
        try:
            run()
            return
        except sqlite3.OperationalError as problem:
            busy = "locked" in str(problem) or "busy" in str(problem)
            if not busy or time.monotonic() > deadline:
                raise
        time.sleep(pause)
        pause = min(pause * 2, 0.1)
