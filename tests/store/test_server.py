"""Records in a fleet's PostgreSQL database: the same store as a file's, on a real server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import pytest
import sqlalchemy
from typer.testing import CliRunner

import attngen as ag
from attngen.cli.main import app
from attngen.cli.options import console
from attngen.errors import StoreError
from attngen.store import Store, StoreWarning, better, engine_url, open_store
from tests.postgres import empty_database, running_server  # noqa: F401  (fixtures)
from tests.store.test_store import KEY, record

pytestmark = pytest.mark.slow


def execute(database: str, *statements: str) -> None:
    engine = sqlalchemy.create_engine(engine_url(database))
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(sqlalchemy.text(statement))
    engine.dispose()


@pytest.fixture
def store(database, tmp_path) -> Store:
    return Store(database, shipped=tmp_path / "shipped")


def test_the_better_record_stays_and_is_found(store):
    assert store.put(record(seconds=2.0)) == 1
    assert store.put(record(seconds=3.0)) == 0
    assert store.put(record(seconds=0.1, kind="modelled")) == 0
    best = record(seconds=1.0, schedule={"block_n": 64, "tma": True, "split": "stream"}, spec="mask: i >= j")
    assert store.put(best, record(replace(KEY, n_q=8192, fp_fusion=False))) == 2
    assert store.lookup(KEY).record == best and store.lookup(KEY).exact
    assert store.lookup(replace(KEY, n_k=8192)).how.startswith("nearest bucket")
    assert store.lookup(replace(KEY, dtype="float16")) is None
    assert store.put(record(seconds=1.5), supersede=best) == 1
    assert store.lookup(KEY).record == record(seconds=1.5)  # its own writes are seen at once
    assert store.remove([best]) == 1 and store.remove([best]) == 0
    assert store.lookup(KEY) is None and len(store.records()) == 1 and store.verify() == []


def test_server_and_python_agree_on_better(store):
    times = [(kind, seconds) for seconds in (3.0, 1e-9, 2.0, 0.1 + 0.2, 0.3) for kind in ("measured", "modelled")]
    pairs = list(product(times, times))
    keys = [replace(KEY, spec_key=f"{number:03d}") for number in range(len(pairs))]
    old, new = (
        [record(key, seconds=pair[which][1], kind=pair[which][0]) for key, pair in zip(keys, pairs, strict=True)]
        for which in (0, 1)
    )
    store.put(*old)
    store.put(*new)
    assert store.records() == [
        second if better(second, first) else first for first, second in zip(old, new, strict=True)
    ]


def test_records_travel_between_a_file_and_a_server(store, tmp_path):
    file = Store(tmp_path / "records.db")
    file.put(*(record(replace(KEY, n_k=2**e, spec_key=key)) for e in range(5) for key in ("a_b", "aB", "Ab")))
    file.export_to(tmp_path / "a.jsonl")
    assert store.import_from(tmp_path / "a.jsonl") == 15 and store.import_from(tmp_path / "a.jsonl") == 0
    assert store.records() == file.records()  # in one order, whatever the server's language
    assert store.export_to(tmp_path / "b.jsonl") == 15
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def test_many_make_the_tables_at_once(store):
    with ThreadPoolExecutor(8) as pool:
        kept = pool.map(lambda n: Store(store.place).put(record(seconds=1.0 + n)), range(8))
    assert sum(kept) >= 1 and store.records() == [record(seconds=1.0)]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("UPDATE attngen_schema SET version = 99", "newer attngen"),
        ("ALTER TABLE attngen_records DROP COLUMN seconds", "seconds"),
        ("DROP TABLE attngen_schema", "not of attngen"),
    ],
)
def test_another_schema_is_left_alone(store, spoil, says):
    store.put(record())
    execute(store.place, spoil)
    with pytest.warns(StoreWarning, match=says):
        assert store.lookup(KEY) is None
    for request in (store.records, lambda: store.put(record(seconds=1e-9))):
        with pytest.raises(StoreError, match=says):
            request()
    assert says in store.verify()[0]


def test_an_empty_database_warns_and_one_bad_row_does_not_cost_the_others(store):
    with pytest.warns(StoreWarning, match="no attngen records yet"):
        assert store.lookup(KEY) is None
    assert store.records() == []
    store.put(record(), record(replace(KEY, n_k=64)))
    execute(store.place, "UPDATE attngen_records SET schedule = 'import os' WHERE n_k = 64")
    (problem,) = store.verify()
    assert "not JSON" in problem and [r.key for r in store.records()] == [KEY]


def test_commands(database, tmp_path, monkeypatch):
    """With --db, and with ATTNGEN_DB; the password is nowhere."""
    named = database.replace("postgres:@", "postgres:secret@")
    spec = ag.Spec(mask=ag.causal())
    open_store(named).put(record(replace(KEY, spec_key=spec.key), spec=spec.text))
    shown = []

    def run(*words: str, **options) -> str:
        result = CliRunner().invoke(app, words, **options)
        shown.append(result.output)
        assert result.exit_code == 0, result.output
        return result.output

    assert "1 records" in run("db", "ls", "--db", named, "--device", "H200")
    assert "a fleet" not in run("db", "show", "i >= j", "--db", named)
    run("db", "export", "--db", named, str(tmp_path / "a.jsonl"))
    assert "sound" in run("db", "verify", "--db", named)
    assert "1 records removed" in run("db", "rm", "--db", named, "--spec", "i >= j", "--yes")
    assert "1 records merged" in run("db", "import", "--db", named, str(tmp_path / "a.jsonl"))
    monkeypatch.setenv("ATTNGEN_DB", named)
    monkeypatch.setattr(console, "_width", 400)  # whatever the terminal
    assert "1 records in postgresql://postgres:***@" in run("doctor")
    assert not any("secret" in text for text in shown)
