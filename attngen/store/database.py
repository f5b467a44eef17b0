"""The user's own records: one SQLite file that many processes read and write at once.

A lookup never raises and never changes the file; anything wrong gives one warning and no record. A write that cannot
be done raises StoreError, and never touches a file that is not an attngen database of this version.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import platformdirs

from attngen.errors import StoreError
from attngen.store.lookup import Found, choose
from attngen.store.record import BUCKETS, FAMILY, KEY_FIELDS, VERSIONS, Key, Record, StoreWarning
from attngen.store.text import (
    ADDED,
    SHIPPED,
    VALUE_FIELDS,
    read_records,
    record_from_dict,
    record_to_dict,
    shipped_records,
    write_records,
)

APPLICATION = 0x4154_4E47  # "ATNG" in the file's header says whose database it is
SCHEMA = 1  # user_version; a larger one belongs to a newer attngen
READ_WAIT = 0.25  # seconds a lookup waits for a lock: a call must not hang for a record
WRITE_WAIT = 30.0
RACY = 0.1  # a file changed this recently may change again within one tick of its clock

# The primary key begins with the family, so a lookup is one range of the index.
_ORDER = (*FAMILY, *VERSIONS, *BUCKETS)
_COLUMNS = (*KEY_FIELDS, *VALUE_FIELDS)
_TYPES = {"seconds": "REAL", "spread": "REAL", "error": "REAL"}
_INTEGERS = {"head_dim", "head_dim_v", "units", "memory", "fp_fusion", *BUCKETS}
_DEFAULTS = dict.fromkeys(ADDED, " DEFAULT ''")
_DECLARED = {
    name: f"{name} {_TYPES.get(name, 'INTEGER' if name in _INTEGERS else 'TEXT')} NOT NULL{_DEFAULTS.get(name, '')}"
    for name in _COLUMNS
}
_CREATE = f"CREATE TABLE records ({', '.join(_DECLARED.values())}, PRIMARY KEY ({', '.join(_ORDER)})) WITHOUT ROWID"
# One statement decides, inside SQLite: a measured record beats a modelled one, then the smaller time wins (`better`).
_UPSERT = (
    f"INSERT INTO records ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))}) "
    f"ON CONFLICT ({', '.join(_ORDER)}) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in VALUE_FIELDS)
    + " WHERE CASE WHEN excluded.kind = records.kind THEN excluded.seconds < records.seconds"
    " ELSE excluded.kind = 'measured' END"
)
_ORDERED = f"ORDER BY {', '.join(_ORDER)}"
_FAMILY = f"WHERE {' AND '.join(f'{name} = ?' for name in FAMILY)}"
_REMOVE = f"DELETE FROM records WHERE {' AND '.join(f'{name} = ?' for name in _ORDER)}"
_SUPERSEDE = f"{_REMOVE} AND schedule = ? AND seconds = ? AND kind = ?"

T = TypeVar("T")


def cache_folder() -> Path:
    """ATTNGEN_CACHE_DIR, or attngen's place in the user's cache folder. Not created here."""
    return Path(os.environ.get("ATTNGEN_CACHE_DIR") or platformdirs.user_cache_dir("attngen", appauthor=False))


def default_path() -> Path:
    """ATTNGEN_DB, or records.db in the cache folder."""
    return Path(os.environ.get("ATTNGEN_DB") or cache_folder() / "records.db")


def open_store(path: str | Path | None = None) -> Store:
    """The store at `path`, or the default one; one object per path and process. Opens no file yet."""
    expected = path is not None or bool(os.environ.get("ATTNGEN_DB"))
    return _open(Path(path if path is not None else default_path()).absolute(), expected)


@cache
def _open(path: Path, expected: bool) -> Store:
    return Store(path, expected=expected)


class _Unusable(Exception):
    """Why a database cannot be used; becomes a warning for a lookup, a StoreError for an explicit request."""


class _Fresh(_Unusable):
    """There is nothing there yet: fine to write, nothing to read."""


class Store:
    """Best records over a SQLite file, with the shipped records underneath.

    `expected`: the user named this file, so that it is missing deserves a warning. Safe in threads and across fork:
    no connection outlives a method.
    """

    def __init__(self, path: str | Path, *, shipped: Path = SHIPPED, expected: bool = True):
        self.path = Path(path).absolute()
        self.shipped, self.expected = Path(shipped), expected
        self._lock = threading.RLock()  # a warning may run code of the user that asks again
        self._families: dict[tuple[str | int | bool, ...], list[Record]] = {}
        self._stamp: object = None
        self._warned = self._checked = False

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def __reduce__(self) -> tuple[Callable[[str], Store], tuple[str]]:
        return open_store, (str(self.path),)

    # Reading ---------------------------------------------------------------------------------------------------------

    def lookup(self, key: Key) -> Found | None:
        """The record to use for `key`: exact, else the nearest shape bucket, else the same kernel and device under
        other versions (driver, triton, torch, generator), else None. Never raises for the database's sake."""
        own = self._family(key)
        others = [record for record in shipped_records(key.device, self.shipped) if record.key.family == key.family]
        return choose(key, own, others)

    def records(self, *, shipped: bool = False) -> list[Record]:
        """Every record of the user's own, sorted; `shipped`: then those that come with attngen.

        Raises StoreError if the database cannot be read.
        """
        try:
            own = self._read(_ORDERED, (), WRITE_WAIT)
        except _Fresh:
            own = []
        except _Unusable as problem:
            raise StoreError(str(problem)) from problem
        files = sorted(self.shipped.glob("*.jsonl")) if shipped else []
        return [*own, *(record for file in files for record in read_records(file))]

    def _family(self, key: Key) -> list[Record]:
        with self._lock:
            stamp = self._file_stamp()
            if stamp is None or stamp != self._stamp:
                self._families.clear()
            self._stamp = stamp
            if key.family not in self._families:
                try:
                    self._families[key.family] = self._read(_FAMILY, key.family, READ_WAIT)
                except _Fresh as nothing:
                    if self.expected:
                        self._warn(str(nothing))
                    return []
                except _Unusable as problem:
                    self._warn(str(problem))
                    return []
                if not _writable(self.path):
                    self._warn(f"{self.path}: is read-only; its records are used, new ones cannot be kept")
            return self._families[key.family]

    def _file_stamp(self) -> object:
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

    def _read(self, which: str, arguments: Iterable[object], wait: float) -> list[Record]:
        def run() -> list[tuple[object, ...]]:
            with closing(self._connect_to_read(wait)) as connection:
                _identify(connection, self.path)
                return connection.execute(f"{_select(connection)} {which}", tuple(arguments)).fetchall()

        records = []
        for row in self._guard(run):
            try:
                records.append(_record_of(row))
            except StoreError as problem:  # one damaged row does not cost the others
                self._warn(f"{self.path}: a record is skipped: {problem}")
        return records

    def _connect_to_read(self, wait: float) -> sqlite3.Connection:
        if not self.path.exists():
            raise _Fresh(f"{self.path}: no such database; `attngen tune` makes one")
        if self.path.is_file() and self.path.stat().st_size == 0:
            raise _Fresh(f"{self.path}: is an empty file")
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

    def put(self, *records: Record, supersede: Record | None = None) -> int:
        """Keep each record that is better than the one there; all or none. Returns how many were kept.

        `supersede`: a record that was measured again beside these and lost: it goes even if its old time reads better,
        unless it has been replaced meanwhile. Raises StoreError if the database cannot be written.
        """
        rows = [_row_of(record) for record in records]
        with self._write() as connection:
            before = connection.total_changes
            if supersede is not None:
                old = record_to_dict(supersede)
                identity = (
                    *(old[name] for name in _ORDER),
                    _json(supersede.schedule),
                    supersede.seconds,
                    supersede.kind,
                )
                connection.execute(_SUPERSEDE, identity)
                before = connection.total_changes
            for row in rows:
                connection.execute(_UPSERT, row)
            return connection.total_changes - before

    def remove(self, records: Iterable[Record]) -> int:
        """Forget these of the user's records; all or none. Returns how many went. Raises StoreError as `put` does."""
        with self._write() as connection:
            before = connection.total_changes
            for record in records:
                values = record_to_dict(record)
                connection.execute(_REMOVE, tuple(values[name] for name in _ORDER))
            return connection.total_changes - before

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = self._guard(self._connect_to_write)
        except (_Unusable, OSError) as problem:
            raise StoreError(f"cannot write: {problem}") from problem
        with closing(connection):
            try:
                yield connection
                connection.execute("COMMIT")
            except sqlite3.Error as problem:
                raise StoreError(f"{self.path}: cannot write: {problem}") from problem
        with self._lock:
            self._stamp = None

    def _connect_to_write(self) -> sqlite3.Connection:
        """A connection inside a BEGIN IMMEDIATE of a database known to be ours."""
        if self.path.is_dir():
            raise _Unusable(f"{self.path}: is a folder")
        connection = sqlite3.connect(self.path.as_uri(), timeout=WRITE_WAIT, uri=True, isolation_level=None)
        try:
            try:  # before anything is changed: whose file is it?
                _identify(connection, self.path)
            except _Fresh:
                pass
            else:
                if not self._checked and connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                    raise _Unusable(f"{self.path}: is damaged; move it away, `attngen db export` may save parts of it")
            _patiently(lambda: connection.execute("PRAGMA journal_mode = WAL").fetchone())
            connection.execute("PRAGMA synchronous = FULL")  # a commit is kept even when the power goes
            _patiently(lambda: connection.execute("BEGIN IMMEDIATE"))
            try:
                _identify(connection, self.path)
            except _Fresh:
                connection.execute(_CREATE)
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {SCHEMA}")
            for name in _lacking(connection):
                connection.execute(f"ALTER TABLE records ADD COLUMN {_DECLARED[name]}")
            self._checked = True
            return connection
        except BaseException:
            connection.close()
            raise

    # Moving ----------------------------------------------------------------------------------------------------------

    def export_to(self, path: str | Path) -> int:
        """Write the user's records as text (see store/text.py); returns how many."""
        return write_records(self.records(), path)

    def import_from(self, path: str | Path) -> int:
        """Merge a text file or another database: the better record of each key stays. Returns how many came in.

        Nothing is taken from a file with a problem; it is named with its line.
        """
        source = Path(path)
        if source.is_file() and source.read_bytes()[:16].startswith(b"SQLite format 3"):
            return self.put(*Store(source).records())
        return self.put(*read_records(source))

    def verify(self, legal: Callable[[Record], str | None] | None = None) -> list[str]:
        """What is wrong with the database, in words; empty when all is well.

        Checks the file's integrity, its schema, every value, and with `legal` (record -> reason or None) each schedule.
        """

        def run() -> list[tuple[object, ...]]:
            with closing(self._connect_to_read(WRITE_WAIT)) as connection:
                _identify(connection, self.path)
                for (line,) in connection.execute("PRAGMA integrity_check(20)"):
                    if line != "ok":
                        problems.append(f"{self.path}: {line}")
                return connection.execute(f"{_select(connection)} {_ORDERED}").fetchall()

        problems: list[str] = []
        try:
            rows = self._guard(run)
        except _Fresh as problem:
            return [str(problem)]
        except _Unusable as problem:
            return [*problems, str(problem)]
        for row in rows:
            where = f"{self.path}: record {row[0]!s:.12} {row[1]}"
            try:
                record = _record_of(row)
            except StoreError as problem:
                problems.append(f"{where}: {problem}")
                continue
            if legal is not None and (reason := legal(record)):
                problems.append(f"{where}: {record.schedule}: {reason}")
        return problems

    # Trouble ---------------------------------------------------------------------------------------------------------

    def _guard(self, run: Callable[[], T]) -> T:
        """Run, with everything SQLite and the system can say turned into _Unusable."""
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
            raise _Unusable(f"{self.path}: {said}") from problem
        except (OSError, OverflowError, UnicodeDecodeError) as problem:
            raise _Unusable(f"{self.path}: {problem}") from problem

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(StoreWarning(f"tuned records: {problem}"), stacklevel=4)


def _identify(connection: sqlite3.Connection, path: Path) -> None:
    """Raises _Fresh for an empty database, _Unusable for another program's or a newer attngen's."""
    # In one statement, which sees one state: another process may be making the database.
    application, version, tables = connection.execute(
        "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master) "
        "FROM pragma_application_id, pragma_user_version"
    ).fetchone()
    if application == 0 and version == 0 and tables == 0:
        raise _Fresh(f"{path}: is an empty database")
    if application != APPLICATION:
        raise _Unusable(f"{path}: is a database of another program, not of attngen")
    if version > SCHEMA:
        raise _Unusable(f"{path}: was written by a newer attngen (schema {version}, this one reads {SCHEMA})")


def _lacking(connection: sqlite3.Connection) -> list[str]:
    """Columns that came after this database was made. An older attngen reads and writes it with them all the same."""
    there = {name for (name,) in connection.execute("SELECT name FROM pragma_table_info('records')")}
    return [name for name in ADDED if name not in there]


def _select(connection: sqlite3.Connection) -> str:
    """Every column of the records, those that the database lacks as they are by default."""
    lacking = _lacking(connection)
    columns = ["''" if name in lacking else name for name in _COLUMNS]
    return f"SELECT {', '.join(columns)} FROM records"


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


def _writable(path: Path) -> bool:
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def _json(schedule: dict[str, object]) -> str:
    return json.dumps(schedule, sort_keys=True, allow_nan=False)


def _row_of(record: Record) -> tuple[object, ...]:
    try:
        values = record_to_dict(record) | {"schedule": _json(record.schedule)}
    except (TypeError, ValueError) as problem:
        raise StoreError(f"record: schedule is not plain JSON: {record.schedule!r}: {problem}") from problem
    return tuple(values[name] for name in _COLUMNS)


def _record_of(row: Iterable[object]) -> Record:
    values = dict(zip(_COLUMNS, row, strict=True))
    try:
        values["schedule"] = json.loads(str(values["schedule"]))
    except (ValueError, RecursionError) as problem:
        raise StoreError(f"schedule is not JSON: {problem}") from problem
    if values["fp_fusion"] in (0, 1):
        values["fp_fusion"] = bool(values["fp_fusion"])
    return record_from_dict(values)
