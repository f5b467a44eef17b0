"""The user's own records: a file of this machine or a server's database, with the shipped records underneath.

A lookup never raises; anything wrong gives one warning and no record. A write that cannot be done raises StoreError.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from attngen.errors import StoreError
from attngen.store.lookup import Found, choose
from attngen.store.record import FAMILY, Key, Record, StoreWarning
from attngen.store.server import PostgresServer
from attngen.store.sql import EVERY, OF_FAMILY, Database, Execute, Fresh, Statements, Unusable, record_of, row_of
from attngen.store.sqlite import SqliteFile
from attngen.store.text import SHIPPED, read_records, shipped_records, write_records
from attngen.store.url import is_url


def cache_folder() -> Path:
    """ATTNGEN_CACHE_DIR, or attngen's place in the user's cache folder. Not created here."""
    return Path(os.environ.get("ATTNGEN_CACHE_DIR") or platformdirs.user_cache_dir("attngen", appauthor=False))


def default_path() -> Path | str:
    """ATTNGEN_DB, a path or a postgresql:// URL, or records.db in the cache folder."""
    named = os.environ.get("ATTNGEN_DB")
    if named and is_url(named):
        return named
    return Path(named or cache_folder() / "records.db")


def open_store(path: str | Path | None = None) -> Store:
    """The store at `path`, a file or a postgresql:// URL, or the default one; one object per place and process. Opens and
    connects nothing yet."""
    expected = path is not None or bool(os.environ.get("ATTNGEN_DB"))
    place = path if path is not None else default_path()
    return _open(str(place) if is_url(place) else Path(place).absolute(), expected)


@cache
def _open(place: Path | str, expected: bool) -> Store:
    return Store(place, expected=expected)


class Store:
    """Best records of a SQLite file or of a PostgreSQL server, with the shipped records underneath.

    `expected`: the user named this place, so that it is missing deserves a warning. Safe in threads and across fork.
    """

    def __init__(self, place: str | Path, *, shipped: Path = SHIPPED, expected: bool = True):
        self.place = str(place) if is_url(place) else Path(place).absolute()
        self.shipped, self.expected = Path(shipped), expected
        self._database: Database = PostgresServer(self.place) if isinstance(self.place, str) else SqliteFile(self.place)
        self._lock = threading.RLock()  # a warning may run code of the user that asks again
        self._families: dict[tuple[str | int | bool, ...], list[Record]] = {}
        self._stamp: object = None
        self._warned = False

    @property
    def name(self) -> str:
        """The file's path, or the URL without its password."""
        return self._database.name

    @property
    def path(self) -> Path:
        """The file. Raises StoreError for a server's."""
        if isinstance(self.place, str):
            raise StoreError(f"{self.name}: is no file")
        return self.place

    def __repr__(self) -> str:
        return f"Store({self.name!r})"

    def __reduce__(self) -> tuple[Callable[[str], Store], tuple[str]]:
        return open_store, (str(self.place),)

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
            own = self._read(EVERY, {}, patient=True)
        except Fresh:
            own = []
        except Unusable as problem:
            raise StoreError(str(problem)) from problem
        files = sorted(self.shipped.glob("*.jsonl")) if shipped else []
        return [*own, *(record for file in files for record in read_records(file))]

    def _family(self, key: Key) -> list[Record]:
        with self._lock:
            stamp = self._database.stamp()
            if stamp is None or stamp != self._stamp:
                self._families.clear()
            self._stamp = stamp
            if key.family not in self._families:
                try:
                    values = {name: getattr(key, name) for name in FAMILY} | {"fp_fusion": int(key.fp_fusion)}
                    self._families[key.family] = self._read(OF_FAMILY, values, patient=False)
                except Fresh as nothing:
                    if self.expected:
                        self._warn(str(nothing))
                    return []
                except Unusable as problem:
                    self._warn(str(problem))
                    return []
                if reason := self._database.why_not_kept():
                    self._warn(reason)
            return self._families[key.family]

    def _read(self, which: str, values: Mapping[str, Any], *, patient: bool) -> list[Record]:
        records = []
        for row in self._database.read(which, values, patient):
            try:
                records.append(record_of(row))
            except StoreError as problem:  # one damaged row does not cost the others
                self._warn(f"{self.name}: a record is skipped: {problem}")
        return records

    # Writing ---------------------------------------------------------------------------------------------------------

    def put(self, *records: Record, supersede: Record | None = None) -> int:
        """Keep each record that is better than the one there; all or none. Returns how many were kept.

        `supersede`: a record that was measured again beside these and lost: it goes even if its old time reads better,
        unless it has been replaced meanwhile. Raises StoreError if the database cannot be written; `put()` only tries that.
        """
        rows = [row_of(record) for record in records]
        old = None if supersede is None else row_of(supersede)
        with self._write() as (execute, statements):
            if old is not None:
                execute(statements.supersede, old)
            return sum(execute(statements.upsert, row) for row in rows)

    def remove(self, records: Iterable[Record]) -> int:
        """Forget these of the user's records; all or none. Returns how many went. Raises StoreError as `put` does."""
        rows = [row_of(record) for record in records]
        with self._write() as (execute, statements):
            return sum(execute(statements.remove, row) for row in rows)

    @contextmanager
    def _write(self) -> Iterator[tuple[Execute, Statements]]:
        try:
            with self._database.write() as execute:
                yield execute, self._database.statements
        except Unusable as problem:
            raise StoreError(f"cannot write: {problem}") from problem
        with self._lock:
            self._stamp = None

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

        Checks the database's integrity, its schema, every value, and with `legal` (record -> reason or None) each schedule.
        """
        problems: list[str] = []
        try:
            problems += self._database.problems()
            rows = self._database.read(EVERY, {}, patient=True)
        except Unusable as problem:
            return [*problems, str(problem)]
        for row in rows:
            where = f"{self.name}: record {row[0]!s:.12} {row[1]}"
            try:
                record = record_of(row)
            except StoreError as problem:
                problems.append(f"{where}: {problem}")
                continue
            if legal is not None and (reason := legal(record)):
                problems.append(f"{where}: {record.schedule}: {reason}")
        return problems

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(StoreWarning(f"tuned records: {problem}"), stacklevel=4)
