"""`attngen db`: the database of tuned records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from attngen.errors import InputError
from attngen.language.files import read_spec
from attngen.schedule.choice import why_not_readable
from attngen.store import Record, open_store
from attngen.store.text import record_to_dict

db_app = typer.Typer(help="The database of tuned records.", no_args_is_help=True)
console = Console(highlight=False, soft_wrap=True)

Database = Annotated[str | None, typer.Option("--db", help="The record database; default: the user's own.")]
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
            f"{key.device} ({key.units} units)  spec {key.spec_key[:12]}  {key.piece}  {key.dtype}  {key.shape_text()} D{head_dim}\n"
            f"    {record.time_text}: {schedule}",
            markup=False,
        )
    if not as_json:
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
    problems = open_store(db).verify(legal=lambda record: why_not_readable(record.schedule))
    for problem in problems:
        console.print(problem, markup=False)
    console.print("the database is sound" if not problems else f"{len(problems)} problems")
    raise typer.Exit(1 if problems else 0)


def _chosen(records: list[Record], spec: str | None, device: str | None) -> list[Record]:
    """Those of a spec and of a device, sorted. InputError, SpecError."""
    if spec is not None:
        known = [r for r in records if len(spec) >= 6 and r.key.spec_key.startswith(spec)]
        key = None if known else read_spec(spec).key
        records = known or [r for r in records if r.key.spec_key == key]
    if device is not None:
        records = [r for r in records if device.lower() in r.key.device.lower()]
    return sorted(records, key=lambda r: (r.key.device, r.key.spec_key, r.key.piece, r.key.buckets))
