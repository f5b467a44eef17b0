"""`attngen db`: the database of tuned records."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from attngen.cli.options import Database, console
from attngen.errors import InputError, SpecError
from attngen.language.files import read_spec
from attngen.language.spec import Spec
from attngen.schedule.choice import why_not_readable
from attngen.store import Record, open_store, time_text
from attngen.store.text import record_to_dict

db_app = typer.Typer(help="The database of tuned records.", no_args_is_help=True)

OfSpec = Annotated[
    str | None,
    typer.Option("--spec", metavar="SPEC", help="Only of this spec: its text, file, or the start of its key."),
]
OfDevice = Annotated[str | None, typer.Option("--device", help="Only of devices whose name has this text.")]


@db_app.command(epilog="Example: [b]attngen db ls --spec 'i >= j' --device H100[/b]")
def ls(
    db: Database = None,
    spec: OfSpec = None,
    device: OfDevice = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, one record a line.")] = False,
) -> None:
    """List the records: the user's own and the shipped ones."""
    records = _chosen(open_store(db).records(shipped=True), spec, device)
    for record in records:
        if as_json:
            typer.echo(json.dumps(record_to_dict(record)))
            continue
        key = record.key
        head_dim = str(key.head_dim) if key.head_dim == key.head_dim_v else f"{key.head_dim}/{key.head_dim_v}"
        schedule = " ".join(f"{name}={value}" for name, value in record.schedule.items())
        console.print(
            f"{key.spec_key[:12]}  {_computed(record)}\n"
            f"    {key.device} ({key.units} units)  {key.piece}  {key.dtype}  {key.shape_text()} D{head_dim}\n"
            f"    {record.time_text}: {schedule}",
            markup=False,
        )
    if not as_json:
        console.print(f"{len(records)} records")


@db_app.command(epilog="Example: [b]attngen db show 'i >= j'[/b]")
def show(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="The start of a spec's key, as `db ls` prints it, or the spec itself.")
    ],
    db: Database = None,
    device: OfDevice = None,
) -> None:
    """Show all that is known of a spec's records: the spec, where and by which code they were made, and the schedules."""
    records = _chosen(open_store(db).records(shipped=True), key, device)
    if not records:
        raise InputError("KEY", "the start of a record's spec key, or its spec", repr(key), "see `attngen db ls`")
    for record in records:
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in record_to_dict(record).items():
            table.add_row(name, _value(name, value), style="bold" if name == "spec_key" else None)
        console.print(table)
        console.print()
    console.print(f"{len(records)} records")


@db_app.command(epilog="Example: [b]attngen db rm --spec 'i >= j' --device H100[/b]")
def rm(
    db: Database = None,
    spec: OfSpec = None,
    device: OfDevice = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove own records of a spec, of a device, or of both. Shipped ones stay."""
    if spec is None and device is None:
        raise InputError("--spec", "--spec or --device, which say what goes", "neither")
    store = open_store(db)
    records = _chosen(store.records(), spec, device)
    if records and not yes:
        typer.confirm(f"Remove {len(records)} records?", abort=True)
    console.print(f"{store.remove(records)} records removed")


@db_app.command(epilog="Example: [b]attngen db export records.jsonl[/b]")
def export(path: Path, db: Database = None) -> None:
    """Write all own records into a text file, sorted, one a line."""
    console.print(f"{open_store(db).export_to(path)} records written: {path}")


@db_app.command(name="import", epilog="Example: [b]attngen db import records.jsonl[/b]")
def import_(path: Path, db: Database = None) -> None:
    """Merge records from a text file; the better of two records of one key stays."""
    console.print(f"{open_store(db).import_from(path)} records merged from {path}")


@db_app.command(epilog="Example: [b]attngen db verify[/b]")
def verify(db: Database = None) -> None:
    """Check the database: readable, known schema, every record's values in range."""
    problems = open_store(db).verify(legal=_why_not_sound)
    for problem in problems:
        console.print(problem, markup=False)
    console.print("the database is sound" if not problems else f"{len(problems)} problems")
    raise typer.Exit(1 if problems else 0)


def _computed(record: Record) -> str:
    """The spec in one line: what its text says but for declarations, and for a mask that key sets leave out."""
    lines = [line for line in record.spec.splitlines() if not line.startswith(("param ", "tensor "))]
    if len(lines) > 1:
        lines = [line for line in lines if line != "mask: true"]
    return "; ".join(lines) or "(made before records held the spec's text)"


def _value(name: str, value: object) -> Text:
    """A record's field for people."""
    if isinstance(value, dict):
        return Text("\n".join(f"{decision}={chosen}" for decision, chosen in value.items()))
    return Text(time_text(float(value)) if name == "seconds" else str(value))  # type: ignore[arg-type]


def _why_not_sound(record: Record) -> str:
    """Why a record is none that this version can use, empty if it is."""
    if record.spec:
        try:
            key = Spec.from_text(record.spec).key
        except SpecError as error:
            return f"its spec cannot be read: {error.problem}"
        if key != record.key.spec_key:
            return f"its spec has another key, {key[:12]}"
    return why_not_readable(record.schedule)


def _chosen(records: list[Record], spec: str | None, device: str | None) -> list[Record]:
    """Those of a spec and of a device, sorted. InputError, SpecError."""
    if spec is not None:
        key = spec if re.fullmatch("[0-9a-f]{6,64}", spec) else read_spec(spec).key
        records = [r for r in records if r.key.spec_key.startswith(key)]
    if device is not None:
        records = [r for r in records if device.lower() in r.key.device.lower()]
    return sorted(records, key=lambda r: (r.key.device, r.key.spec_key, r.key.piece, r.key.buckets))
