"""Servers that are not there, drivers that are not installed, and passwords, which are not printed."""

from __future__ import annotations

import pickle
import time
import warnings
from dataclasses import replace

import pytest
import torch

import attngen as ag
from attngen.errors import StoreError
from attngen.store import Store, StoreWarning, engine_url, open_store, shown, url
from tests.store.test_store import KEY, SHAPE, record

NOBODY = "postgresql://me:secret@127.0.0.1:1/attngen"  # a port that nothing listens at


def test_a_call_goes_on_without_the_server():
    """One warning and the model's choice; the server is then left alone for a while."""
    attention, q = ag.compile(ag.Spec(mask=ag.causal()), db=NOBODY), torch.randn(1, 2, 64, 16)
    with pytest.warns(StoreWarning, match="127.0.0.1") as caught:
        out = attention(q, q, q)
    assert len(caught) == 1 and "secret" not in str(caught[0].message)
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True), atol=1e-5)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n_q in range(1, 20):
            attention(q[:, :, :n_q], q, q)
            assert open_store(NOBODY).lookup(replace(KEY, n_q=1, n_k=2**n_q)) is None
    assert time.perf_counter() - started < 10


def test_who_asks_for_it_is_told():
    store = Store(NOBODY)
    requests = (store.records, store.put, lambda: ag.tune(ag.Spec(mask=ag.causal()), [SHAPE], db=NOBODY))
    for request in requests:
        with pytest.raises(
            StoreError, match=r"me:\*\*\*@127\.0\.0\.1:1/attngen: .*failed: Connection refused"
        ) as caught:
            request()
        assert "secret" not in str(caught.value)
    assert "refused" in store.verify()[0] and "secret" not in repr(store)
    with pytest.raises(StoreError, match="is no file"):
        _ = store.path


@pytest.mark.parametrize(
    ("missing", "place", "says"),
    [
        (("psycopg", "psycopg2"), NOBODY, r"needs the driver psycopg, .*: pip install 'attngen\[fleet\]'"),
        (("psycopg2",), NOBODY.replace(":", "+psycopg2:", 1), r"needs the driver psycopg2, .*attngen\[fleet\]"),
        ((), "mysql://me:secret@host/db", "a postgresql:// URL, not at mysql://"),
        ((), "postgresql://me:secret@host:port/db", r"postgresql://\S+: is no URL; expected postgresql://USER"),
    ],
)
def test_what_is_missing_is_named_with_the_fix(missing, place, says, monkeypatch):
    monkeypatch.setattr(url, "find_spec", lambda name: None if name in missing else name)
    with pytest.raises(StoreError, match=says) as caught:
        Store(place).put(record())
    assert "secret" not in str(caught.value)
    with pytest.warns(StoreWarning, match=says):
        assert Store(place).lookup(KEY) is None


def test_a_plain_url_takes_the_driver_that_is_installed(monkeypatch):
    """SQLAlchemy 2.0 and 2.1 differ in which one they mean."""
    for installed, expected in ((("psycopg", "psycopg2"), "psycopg"), (("psycopg2",), "psycopg2")):
        monkeypatch.setattr(url, "find_spec", lambda name, installed=installed: name in installed or None)
        for scheme in ("postgresql", "postgres"):
            assert engine_url(f"{scheme}://h/d").drivername == f"postgresql+{expected}"
    assert engine_url("postgresql+psycopg2://h/d").drivername == "postgresql+psycopg2"
    assert engine_url("sqlite:///x.db").drivername == "sqlite"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("records.db", "records.db"),
        ("postgresql://h/d", "postgresql://h/d"),
        ("postgresql+psycopg://me:a%40b@h:5/d?host=/tmp/x", "postgresql+psycopg://me:***@h:5/d?host=/tmp/x"),
        ("postgresql://me@h/d?password=secret&sslmode=require", "postgresql://me@h/d?password=***&sslmode=require"),
        ("postgresql://me:se@cret@h/d", "postgresql://me:***@h/d"),
        ("postgresql://me:secret@[h/d", "postgresql://***"),
    ],
)
def test_passwords_are_not_shown(place, expected):
    assert shown(place) == expected


def test_a_store_travels_to_another_process():
    assert pickle.loads(pickle.dumps(Store(NOBODY))).place == NOBODY
