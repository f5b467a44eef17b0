"""Records as text that a person can review and git can merge: one JSON object a line, sorted by key.

The first line is a header with the format's version. Used by export and import and by the shipped records.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from attngen.errors import StoreError
from attngen.store.record import KEY_FIELDS, Key, Record, StoreWarning, best_of

FORMAT = 2  # 1: the same without ADDED
ADDED = ("spec",)  # fields that older records may lack
VALUE_FIELDS = ("schedule", "seconds", "spread", "kind", "error", "made_at", "source", *ADDED)
MAX_LINE = 64 * 1024
SHIPPED = Path(__file__).parent.parent / "tuning_db"


def record_to_dict(record: Record) -> dict[str, object]:
    """Key fields first, then the values: the order of the columns and of the lines."""
    fields: dict[str, object] = {name: getattr(record.key, name) for name in KEY_FIELDS}
    return fields | {name: getattr(record, name) for name in VALUE_FIELDS}


def record_from_dict(given: object) -> Record:
    """Raises StoreError naming the field that is missing, unknown or of the wrong kind."""
    if not isinstance(given, dict):
        raise StoreError(f"record: expected an object, got {type(given).__name__}")
    names = {*KEY_FIELDS, *VALUE_FIELDS}
    if missing := sorted(names - {*ADDED} - given.keys()):
        raise StoreError(f"record: {', '.join(missing)} missing")
    if unknown := sorted(given.keys() - names):
        raise StoreError(f"record: unknown field {unknown[0]!r}")
    key = Key(**{name: given[name] for name in KEY_FIELDS})
    return Record(key=key, **{name: given[name] for name in VALUE_FIELDS if name in given})


def write_records(records: Iterable[Record], path: str | Path) -> int:
    """Write the best record of each key, sorted, and return how many; the file appears whole or not at all."""
    path = Path(path)
    best = best_of(records).values()
    ordered = sorted(best, key=lambda record: [str(getattr(record.key, name)) for name in KEY_FIELDS])
    lines = [json.dumps({"attngen_records": FORMAT})]
    lines += [json.dumps(record_to_dict(record), allow_nan=False) for record in ordered]
    scratch = path.with_name(path.name + ".writing")
    try:
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError as problem:
        raise StoreError(f"{path}: cannot write records: {problem}") from problem
    return len(lines) - 1


def read_records(path: str | Path) -> list[Record]:
    """Every record of a text file. Raises StoreError naming the file and line of the first problem."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise StoreError(f"{path}: cannot read records: {problem}") from problem
    return parse_records(text, str(path))


def parse_records(text: str, name: str = "records") -> list[Record]:
    """As `read_records`, from text; `name` stands in the messages."""
    lines = text.splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        if len(line) > MAX_LINE:
            raise StoreError(f"{where}: a line of {len(line)} characters is no record")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise StoreError(f"{where}: not JSON: {problem}") from problem
        if number == 1:
            _check_header(value, where)
            continue
        try:
            records.append(record_from_dict(value))
        except StoreError as problem:
            raise StoreError(f"{where}: {problem}") from problem
    if not lines:
        raise StoreError(f"{name}: empty, expected a header line {json.dumps({'attngen_records': FORMAT})}")
    return records


def _check_header(value: object, where: str) -> None:
    version = value.get("attngen_records") if isinstance(value, dict) else None
    if type(version) is not int:
        raise StoreError(f'{where}: expected the header {{"attngen_records": {FORMAT}}}, got {value!r:.80}')
    if version > FORMAT:
        raise StoreError(f"{where}: written by a newer attngen (format {version}, this one reads {FORMAT})")


def device_file(device: str) -> str:
    """Name of the shipped file for a device: "NVIDIA H200" -> "nvidia-h200.jsonl"."""
    return (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device") + ".jsonl"


@cache
def shipped_records(device: str, folder: Path = SHIPPED) -> tuple[Record, ...]:
    """The records that come with attngen for a device; a damaged file gives none, and one warning."""
    path = folder / device_file(device)
    if not path.is_file():
        return ()
    try:
        return tuple(read_records(path))
    except StoreError as problem:
        warnings.warn(StoreWarning(f"attngen's own tuned records are unusable: {problem}"), stacklevel=2)
        return ()
