"""Tuned records: one SQLite file of the user's own, or a fleet's PostgreSQL database, over text records shipped per GPU.

    key = Key.of(spec.key, "forward", "bfloat16", shape, device, versions)
    found = open_store().lookup(key)          # Found(record, how) or None, never an exception
    open_store("my.db").put(record)           # keeps the better of old and new

Imports neither Optuna nor, for a file, SQLAlchemy, and torch only to ask for a device's name.
"""

from attngen.store.database import Store, cache_folder, default_path, open_store
from attngen.store.device import Device, device_of
from attngen.store.lookup import Found, choose
from attngen.store.record import (
    MAX_SPEC,
    NOISY,
    Key,
    Record,
    Shape,
    StoreWarning,
    Versions,
    better,
    bucket,
    time_text,
    utc_now,
)
from attngen.store.text import parse_records, read_records, write_records
from attngen.store.url import engine_url, is_url, shown
from attngen.store.workload import Workload

__all__ = [
    "MAX_SPEC",
    "NOISY",
    "Device",
    "Found",
    "Key",
    "Record",
    "Shape",
    "Store",
    "StoreWarning",
    "Versions",
    "Workload",
    "better",
    "bucket",
    "cache_folder",
    "choose",
    "default_path",
    "device_of",
    "engine_url",
    "is_url",
    "open_store",
    "parse_records",
    "read_records",
    "shown",
    "time_text",
    "utc_now",
    "write_records",
]
