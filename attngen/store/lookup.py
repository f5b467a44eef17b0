"""Which record to use for a key: the exact one, else the nearest that is about the same kernel and device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attngen.store.record import KEY_FIELDS, VERSIONS, Key, Record, best_of, better


@dataclass(frozen=True, slots=True)
class Found:
    """A record, and in words how near it is to what was asked ("exact", "nearest bucket ...", "other versions ...")."""

    record: Record
    how: str

    @property
    def exact(self) -> bool:
        return self.how.startswith("exact")


def choose(key: Key, own: Iterable[Record], shipped: Iterable[Record] = ()) -> Found | None:
    """The record of one family to use for `key` (see `Store.lookup`); a user's own stands over a shipped one."""
    best = best_of(shipped)
    shipped_by_key = dict(best)
    for record in own:
        under = best.get(record.key)
        if under is None or record.kind == under.kind or better(record, under):
            best[record.key] = record
    if not best:
        return None
    record = best.get(key) or min(best.values(), key=lambda record: _rank(key, record))
    how = _how(key, record)
    if shipped_by_key.get(record.key) is record:
        how += ", shipped with attngen"
    return Found(record, how)


def _rank(key: Key, record: Record) -> tuple[object, ...]:
    """Smaller is nearer: the same versions first, then shape, then measured, then time; last by key, to be definite."""
    differ = sum(a != b for a, b in zip(key.versions, record.key.versions, strict=True))
    order = [str(getattr(record.key, name)) for name in KEY_FIELDS]
    return (differ > 0, key.distance(record.key), differ, record.kind != "measured", record.seconds, order)


def _how(key: Key, record: Record) -> str:
    words = []
    if record.key.buckets != key.buckets:
        words.append(f"nearest bucket {record.key.shape_text()}")
    different = [
        f"{name} {getattr(record.key, name)[:12] or 'unknown'}"
        for name in VERSIONS
        if getattr(record.key, name) != getattr(key, name)
    ]
    if different:
        words.append(f"other versions ({', '.join(different)})")
    return ", ".join(words) or "exact"
