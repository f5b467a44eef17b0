"""The record database: what wins, what is found, and that a bad file neither breaks a call nor costs records."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attngen.errors import StoreError
from attngen.store import (
    Device,
    Key,
    Record,
    Shape,
    Store,
    StoreWarning,
    Versions,
    better,
    bucket,
    default_path,
    device_of,
    open_store,
    parse_records,
)
from attngen.store.record import BUCKETS, KEY_FIELDS, VERSIONS
from attngen.store.text import SHIPPED, VALUE_FIELDS, device_file, read_records

H200 = Device("NVIDIA H200", 132, 140, "570.86.15")
SHAPE = Shape(1, 64, 8, 4096, 4096, 128, 128)
KEY = Key.of("a" * 64, "forward", "bfloat16", SHAPE, H200, Versions("gen1", "3.9.0"))


def record(key: Key = KEY, seconds: float = 1e-3, kind: str = "measured", **fields) -> Record:
    values = {
        "schedule": {"block_m": 128},
        "spread": 0.02,
        "error": 0.5,
        "made_at": "2026-01-01T00:00:00Z",
        "source": "t",
    }
    return Record(key=key, seconds=seconds, kind=kind, **(values | fields))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "records.db", shipped=tmp_path / "shipped")


def test_put_keeps_the_better(store):
    assert store.put(record(seconds=2.0)) == 1
    assert store.put(record(seconds=3.0)) == 0
    assert store.put(record(seconds=1.0, schedule={"block_m": 64})) == 1
    assert store.put(record(seconds=0.1, kind="modelled")) == 0
    (kept,) = store.records()
    assert kept == record(seconds=1.0, schedule={"block_m": 64})


def test_measured_beats_modelled(store):
    store.put(record(seconds=0.1, kind="modelled"))
    assert store.put(record(seconds=0.05, kind="modelled")) == 1
    assert store.put(record(seconds=9.0)) == 1
    assert store.records()[0].kind == "measured"


def test_supersede_replaces_a_time_that_did_not_hold(store):
    lucky = record(seconds=1.0)
    store.put(lucky)
    honest = record(seconds=1.2, schedule={"block_m": 64})
    store.put(honest, supersede=lucky)
    assert store.records() == [honest]
    store.put(record(seconds=1.3), supersede=lucky)  # no longer there: the ordinary rule
    assert store.records() == [honest]


def test_put_is_all_or_none(store):
    with pytest.raises(StoreError, match="plain JSON"):
        store.put(record(), record(schedule={"x": object()}))
    assert store.records() == []


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["measured", "modelled"]), st.floats(1e-6, 1.0)), min_size=1, max_size=12))
def test_sql_and_python_agree_on_better(times):
    expected: Record | None = None
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "r.db")
        for kind, seconds in times:
            new = record(seconds=seconds, kind=kind)
            store.put(new)
            if expected is None or better(new, expected):
                expected = new
        assert store.records() == [expected]


def test_lookup_exact_then_nearest_bucket_then_versions(store):
    near = replace(KEY, n_q=8192, n_k=8192)
    far = replace(KEY, n_q=65536, n_k=65536)
    older = replace(KEY, triton="3.6.0", driver="")
    store.put(record(far), record(near), record(older))
    found = store.lookup(KEY)
    assert found.record.key == near and found.how == "nearest bucket B1 Hq64 Hkv8 Nq8192 Nk8192"
    store.put(record())
    found = store.lookup(KEY)
    assert found.record.key == KEY and found.how == "exact" and found.exact
    asked = replace(KEY, triton="3.10.0", generator="gen2")
    found = store.lookup(asked)
    assert found.record.key == KEY and "triton 3.9.0" in found.how and "generator gen1" in found.how
    for name, other in {
        "spec_key": "b" * 64,
        "piece": "backward",
        "dtype": "float16",
        "head_dim": 64,
    }.items():
        assert store.lookup(replace(KEY, **{name: other})) is None
    for name, other in {"device": "NVIDIA H100", "units": 114, "memory": 80, "fp_fusion": False}.items():
        assert store.lookup(replace(KEY, **{name: other})) is None


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=2, max_size=6, unique=True), st.integers(0, 20))
def test_nearest_bucket_is_nearest_in_log_space(exponents, asked):
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "r.db")
        store.put(*(record(replace(KEY, n_k=2**e)) for e in exponents))
        found = store.lookup(replace(KEY, n_k=2**asked))
        assert abs(found.record.key.n_k.bit_length() - 1 - asked) == min(abs(e - asked) for e in exponents)


@given(st.integers(0, 2**40))
def test_bucket_is_the_next_power_of_two(size):
    assert bucket(size) >= size and bucket(size) & max(0, bucket(size) - 1) == 0
    assert size == 0 or bucket(size) < 2 * size


def test_lookup_sees_other_writers_at_once(store):
    store.put(record(seconds=2.0))
    assert store.lookup(KEY).record.seconds == 2.0
    for seconds in (1.0, 0.5, 0.25):
        Store(store.path).put(record(seconds=seconds))
        assert store.lookup(KEY).record.seconds == seconds


def test_a_database_that_is_being_made_is_not_taken_for_another_programs(store, monkeypatch):
    """Another process makes it while this one asks whose it is."""
    connect, maker = sqlite3.connect, Store(store.path)

    class Meanwhile(sqlite3.Connection):
        def execute(self, *statement):
            result = super().execute(*statement)
            if "application_id" in statement[0]:
                monkeypatch.setattr(sqlite3, "connect", connect)
                maker.put(record())
            return result

    connect(store.path).execute("PRAGMA journal_mode = WAL").connection.close()  # not empty, and nobody's
    assert store.path.stat().st_size
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Meanwhile))
    assert store.records() == []
    assert store.records() == [record()]


def test_lookup_is_cached(store, monkeypatch):
    store.put(record())
    past = time.time() - 60
    os.utime(store.path, (past, past))
    store.lookup(KEY)
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: pytest.fail("the database was opened again"))
    started = time.perf_counter()
    for _ in range(100):
        assert store.lookup(KEY)
    assert time.perf_counter() - started < 0.5


def test_shipped_records_lie_underneath(tmp_path):
    own, shipped = Store(tmp_path / "own.db", shipped=tmp_path), Store(tmp_path / "maker.db")
    shipped.put(record(seconds=1.0), record(replace(KEY, n_k=64), seconds=1.0))
    shipped.export_to(tmp_path / device_file(H200.name))
    own.put(record(seconds=2.0), record(replace(KEY, n_k=64), seconds=0.1, kind="modelled"))
    assert len(own.records()) == 2 and len(own.records(shipped=True)) == 4
    assert own.lookup(KEY).record.seconds == 2.0  # the user's own measurement stands
    found = own.lookup(replace(KEY, n_k=64))  # but a model's guess does not stand over a measurement
    assert found.record.kind == "measured" and found.how == "exact, shipped with attngen"


def test_a_damaged_shipped_file_gives_one_warning(tmp_path):
    (tmp_path / device_file(H200.name)).write_text('{"attngen_records": 1}\nnonsense\n')
    store = Store(tmp_path / "own.db", shipped=tmp_path, expected=False)
    with pytest.warns(StoreWarning, match="nvidia-h200.jsonl:2"):
        assert store.lookup(KEY) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.lookup(KEY) is None


def test_every_shipped_file_is_well_formed():
    for path in SHIPPED.glob("*.jsonl"):
        for one in read_records(path):
            assert device_file(one.key.device) == path.name and one.kind == "measured"


# What can be wrong with the file --------------------------------------------------------------------------------------


def bad_missing(path: Path) -> None:
    pass


def bad_empty(path: Path) -> None:
    path.touch()


def bad_not_sqlite(path: Path) -> None:
    path.write_bytes(b"dear diary " * 1000)


def bad_short(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0")


def bad_foreign(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE records (mine)")
        db.execute("INSERT INTO records VALUES (1)")
    db.close()


def bad_foreign_application(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA application_id = 17")
        db.execute("CREATE TABLE notes (mine)")
    db.close()


def bad_newer(path: Path) -> None:
    Store(path).put(record())
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()


def bad_truncated(path: Path) -> None:
    Store(path).put(*(record(replace(KEY, n_k=2**e, n_q=2**f)) for e in range(20) for f in range(20)))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size // 2 - 100)


def bad_columns(path: Path) -> None:
    Store(path).put(record())
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE records DROP COLUMN seconds")
    db.close()


def bad_folder(path: Path) -> None:
    path.mkdir()


BAD = [
    bad_missing,
    bad_empty,
    bad_not_sqlite,
    bad_short,
    bad_foreign,
    bad_foreign_application,
    bad_newer,
    bad_truncated,
    bad_columns,
    bad_folder,
]


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_a_bad_database_gives_one_warning_and_no_record(tmp_path, spoil):
    path = tmp_path / "records.db"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    store = Store(path, shipped=tmp_path / "none")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert store.lookup(KEY) is None
            assert store.lookup(replace(KEY, dtype="float16")) is None
    assert [w.category for w in caught] == [StoreWarning]
    assert str(path) in str(caught[0].message)
    assert store.verify()
    if spoil in (bad_missing, bad_empty):
        assert store.put(record()) == 1
        assert store.lookup(KEY).exact
        return
    with pytest.raises(StoreError, match=r"records\.db"):
        store.put(record())
    with pytest.raises(StoreError):
        store.records()
    assert before is None or path.read_bytes() == before  # never overwritten by a failed open


def test_a_default_database_that_is_not_there_yet_is_no_trouble(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ATTNGEN_DB", raising=False)
    assert default_path() == tmp_path / "cache" / "records.db"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_store().lookup(KEY) is None
    assert not (tmp_path / "cache").exists()  # a lookup makes nothing
    monkeypatch.setenv("ATTNGEN_DB", str(tmp_path / "elsewhere.db"))
    with pytest.warns(StoreWarning, match="no such database"):
        assert open_store().lookup(KEY) is None


def test_one_bad_row_does_not_cost_the_others(store):
    store.put(record(), record(replace(KEY, n_k=64)))
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE records SET schedule = 'import os' WHERE n_k = 64")
    db.close()
    with pytest.warns(StoreWarning, match="skipped"):
        assert store.lookup(replace(KEY, n_k=64)).record.key == KEY
    assert ["not JSON" in problem for problem in store.verify()] == [True]


def test_locked_database(store):
    store.put(record())
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    other.execute("UPDATE records SET seconds = 7")
    started = time.perf_counter()
    with pytest.warns(StoreWarning, match="locked"):
        assert store.lookup(KEY) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.lookup(KEY) is None
    assert time.perf_counter() - started < 2
    other.execute("ROLLBACK")
    other.close()
    assert store.lookup(KEY).exact


def test_a_writer_at_work_does_not_stop_readers(store):
    store.put(record())
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("UPDATE records SET seconds = 7")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.lookup(KEY).record.seconds == 1e-3
    other.execute("ROLLBACK")
    other.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX permissions")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("folder_too", [False, True])
def test_read_only_database_is_read(folder_too):
    folder = Path(tempfile.mkdtemp())  # not tmp_path: root's is closed to others, and root may write anywhere
    try:
        store = Store(folder / "records.db")
        store.put(record())
        store.path.chmod(0o444)
        folder.chmod(0o555 if folder_too else 0o777)
        child = os.fork()
        if child == 0:
            os._exit(_read_only_child(store.path))
        assert os.waitpid(child, 0)[1] == 0
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def _read_only_child(path: Path) -> int:
    try:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setuid(65534)
        store = Store(path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert store.lookup(KEY).exact
            assert store.lookup(KEY).exact
        assert ["read-only" in str(w.message) for w in caught] == [True], [str(w.message) for w in caught]
        with pytest.raises(StoreError):
            store.put(record(seconds=1e-9))
        return 0
    except BaseException as problem:
        print(repr(problem), file=sys.stderr)
        return 1


# Moving records -------------------------------------------------------------------------------------------------------


def test_export_is_sorted_text_and_import_merges(tmp_path):
    here, there = Store(tmp_path / "here.db"), Store(tmp_path / "there.db")
    records = [record(replace(KEY, n_k=2**e), seconds=1.0 + e) for e in range(5)]
    random.Random(0).shuffle(records)
    here.put(*records)
    there.put(record(replace(KEY, n_k=1), seconds=0.5), record(replace(KEY, n_k=2), seconds=50.0))
    assert here.export_to(tmp_path / "out.jsonl") == 5
    assert there.import_from(tmp_path / "out.jsonl") == 4
    assert there.import_from(tmp_path / "out.jsonl") == 0
    assert {r.key.n_k: r.seconds for r in there.records()} == {1: 0.5, 2: 2.0, 4: 3.0, 8: 4.0, 16: 5.0}
    assert here.import_from(tmp_path / "there.db") == 1
    assert here.records() == there.records()
    here.export_to(tmp_path / "a.jsonl")
    there.export_to(tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def lines(*values: object) -> str:
    return "\n".join(v if isinstance(v, str) else json.dumps(v) for v in values)


GOOD = {name: getattr(KEY, name) for name in KEY_FIELDS} | {
    "schedule": {"block_m": 64},
    "seconds": 1.0,
    "spread": 0.0,
    "kind": "measured",
    "error": 0.1,
    "made_at": "2026-01-01T00:00:00Z",
    "source": "x",
}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "empty"),
        (lines(GOOD), ":1: expected the header"),
        (lines({"attngen_records": 99}), "newer attngen"),
        (lines({"attngen_records": 1}, "{"), ":2: not JSON"),
        (lines({"attngen_records": 1}, "[" * 60000), ":2: not JSON"),
        (lines({"attngen_records": 1}, "x" * 70000), ":2: a line of 70000"),
        (lines({"attngen_records": 1}, GOOD, {"seconds": 1.0}), ":3: record: batch"),
        (lines({"attngen_records": 1}, GOOD | {"extra": 1}), "unknown field 'extra'"),
        (lines({"attngen_records": 1}, GOOD | {"seconds": "1"}), "seconds must be"),
        (lines({"attngen_records": 1}, GOOD | {"seconds": 0}), "seconds must be positive"),
        (lines({"attngen_records": 1}, json.dumps(GOOD).replace("1.0", "NaN")), "seconds must be a finite"),
        (lines({"attngen_records": 1}, GOOD | {"n_k": 100}), "n_k must be a power of two"),
        (lines({"attngen_records": 1}, GOOD | {"head_dim": True}), "head_dim must be int"),
        (lines({"attngen_records": 1}, GOOD | {"device": "x" * 5000}), "longer than"),
        (lines({"attngen_records": 1}, GOOD | {"head_dim": 2**70}), "head_dim must be between"),
        (lines({"attngen_records": 1}, GOOD | {"kind": "guessed"}), "kind must be"),
        (lines({"attngen_records": 1}, GOOD | {"schedule": [1]}), "schedule must be"),
    ],
)
def test_bad_text_is_refused_whole_and_named(tmp_path, text, named):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    store = Store(tmp_path / "records.db")
    with pytest.raises(StoreError, match="bad.jsonl.*" + named):
        store.import_from(path)
    assert store.records() == []


def test_good_text_is_read():
    (one,) = parse_records(lines({"attngen_records": 1}, GOOD, ""))
    assert one.key == KEY and one.schedule == {"block_m": 64}


def test_a_record_keeps_its_specs_text(store, tmp_path):
    store.put(record(spec="mask: i >= j"))
    assert store.records()[0].spec == "mask: i >= j" and store.lookup(KEY).record.spec == "mask: i >= j"
    store.export_to(tmp_path / "a.jsonl")
    (moved,) = read_records(tmp_path / "a.jsonl")
    assert moved.spec == "mask: i >= j"
    with pytest.raises(StoreError, match="spec must be text of at most"):
        record(spec="x" * 40000)


def test_a_database_from_before_records_had_a_spec(store):
    """It is read as it is, even read-only; the first write adds the column, and an older attngen can still write."""
    store.put(record(spec="mask: i >= j"))
    with sqlite3.connect(store.path) as connection:
        connection.execute("ALTER TABLE records DROP COLUMN spec")
    old = Store(store.path)
    assert old.records() == [record()] and old.lookup(KEY).record == record() and old.verify() == []
    newer = record(replace(KEY, n_k=64), spec="mask: i < j")
    old.put(newer)
    assert {r.spec for r in old.records()} == {"", "mask: i < j"}
    with sqlite3.connect(store.path) as connection:
        names = [name for name in (*KEY_FIELDS, *VALUE_FIELDS) if name != "spec"]
        copied = ", ".join("128" if name == "n_q" else name for name in names)
        connection.execute(f"INSERT INTO records ({', '.join(names)}) SELECT {copied} FROM records WHERE n_k = 64")
    assert [r.spec for r in old.records() if r.key.n_q == 128] == [""]


def test_verify_asks_for_legality(store):
    store.put(record(), record(replace(KEY, n_k=64), schedule={"block_m": 3}))
    assert store.verify() == []
    problems = store.verify(lambda r: "block_m must be a power of two" if r.schedule["block_m"] == 3 else None)
    assert len(problems) == 1 and "block_m must be a power of two" in problems[0]


# Keys and shapes ------------------------------------------------------------------------------------------------------


def test_key_holds_everything_the_design_asks_for():
    groups = {*BUCKETS, *VERSIONS}
    assert groups < set(KEY_FIELDS)
    assert {
        "spec_key",
        "piece",
        "dtype",
        "head_dim",
        "head_dim_v",
        "device",
        "units",
        "memory",
        "fp_fusion",
    } == set(KEY_FIELDS) - groups
    h100 = Device("NVIDIA H100 80GB HBM3", 132, 80, H200.driver)
    assert Key.of("a", "forward", "bfloat16", SHAPE, h100, Versions()).family != KEY.family


@pytest.mark.parametrize(
    "given",
    [
        "B2 Hq8 Hkv2 Nq100 Nk200 D64 Dv32",
        "b2,hq8,hkv2,nq100,nk200,d64,dv32",
        {"b": 2, "hq": 8, "hkv": 2, "nq": 100, "nk": 200, "d": 64, "dv": 32},
        ((2, 8, 100, 64), (2, 2, 200, 64), (2, 2, 200, 32)),
        Shape(2, 8, 2, 100, 200, 64, 32),
    ],
)
def test_shapes_are_read(given):
    shape = Shape.of(given)
    assert shape == Shape(2, 8, 2, 100, 200, 64, 32)
    assert Shape.of(str(shape)) == shape


def test_short_shapes():
    assert Shape.of((1, 8, 4096, 64)) == Shape.of("H8 N4096 D64") == Shape(1, 8, 8, 4096, 4096, 64, 64)


@pytest.mark.parametrize(
    "given", ["", "B1 H8", "B1 H8 N0 D64", "B1 X8 N4 D64", "B1 Hq8 Hkv3 N4 D64", (1, 2, 3), 7, "H8 N4 D-4"]
)
def test_bad_shapes_are_refused(given):
    with pytest.raises(StoreError, match="shape"):
        Shape.of(given)


def test_the_cpu_has_a_name():
    device = device_of("cpu")
    assert device.name and device.units >= 1 and device.memory == 0


def test_the_store_loads_neither_optuna_nor_sqlalchemy():
    code = "import sys, attngen.store; print([m for m in ('optuna', 'sqlalchemy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Many writers ---------------------------------------------------------------------------------------------------------

WRITERS, RECORDS, KILLS = 8, 500, 20


def attempt(writer: int, number: int) -> tuple[Record, Record]:
    """A record that only this writer makes, and one that all writers fight for."""
    mine = replace(KEY, spec_key=f"writer {writer} record {number}")
    ours = replace(KEY, spec_key=f"record {number}")
    seconds = 1.0 + random.Random(f"{writer} {number}").random()
    return record(mine, schedule={"writer": writer}), record(ours, seconds=seconds, schedule={"writer": writer})


def write_records(path: str, log: str, writer: int, first: int) -> None:
    """Commit records from `first` on, noting each in the log only after its commit."""
    store = Store(path)
    with open(log, "a", buffering=1) as done:
        for number in range(first, RECORDS):
            store.put(*attempt(writer, number))
            done.write(f"{number}\n")


def logged(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_eight_writers_one_killed_twenty_times(tmp_path):
    path = tmp_path / "records.db"
    start = multiprocessing.get_context("spawn").Process
    logs = [tmp_path / f"{writer}.log" for writer in range(WRITERS)]
    steady = [start(target=write_records, args=(str(path), str(logs[w]), w, 0)) for w in range(1, WRITERS)]
    for process in steady:
        process.start()
    chance = random.Random(1)
    for kill in range(KILLS + 1):
        reached = len(logged(logs[0]))
        victim = start(target=write_records, args=(str(path), str(logs[0]), 0, reached))
        victim.start()
        if kill == KILLS:
            break
        goal = reached + chance.randint(1, RECORDS // (KILLS + 5))
        while len(logged(logs[0])) < goal and victim.is_alive():
            time.sleep(0.001)
        time.sleep(chance.random() * 0.01)  # anywhere inside the next write
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
    for process in [*steady, victim]:
        process.join(timeout=300)
        assert process.exitcode == 0

    stored = {r.key.spec_key: r for r in Store(path).records()}
    for writer, log in enumerate(logs):
        assert sorted(set(logged(log))) == list(range(RECORDS))
        for number in range(RECORDS):
            assert stored[f"writer {writer} record {number}"].schedule == {"writer": writer}
    for number in range(RECORDS):
        best = min(attempt(writer, number)[1].seconds for writer in range(WRITERS))
        assert stored[f"record {number}"].seconds == best
    assert len(stored) == (WRITERS + 1) * RECORDS
    assert Store(path).verify() == []
