"""`attngen db coverage`, and what it prints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.text import Text

from attngen.cli.options import Database, Set, console
from attngen.cli.workloads import Batch, Context, DtypeOr, Model, Padded, Shapes, Source, Training, gathered
from attngen.store import open_store
from attngen.tuning.coverage import EXACT, NEAR, NONE, Covered, coverage, devices_of, known_workloads
from attngen.tuning.target_device import find_target_device

EXAMPLE = (
    "Example: [b]attngen db coverage --model config.json --context 8192 --target H100[/b]; [b]attngen db coverage[/b]"
)
_STYLE = {EXACT: "green", NEAR: "yellow", NONE: "red"}


def db_coverage(
    spec: Source = None,
    model: Model = None,
    batch: Batch = None,
    context: Context = None,
    training: Training = False,
    padded: Padded = False,
    shape: Shapes = None,
    dtype: DtypeOr = None,
    set_: Set = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="On this GPU (H100, sm_90); several times. Default: here, and wherever records are from."),
    ] = None,
    db: Database = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, one attention and direction a line.")] = False,
) -> None:
    """Say what the database has for calls, and what it lacks: of a spec, a list, a model, or of all that it knows."""
    records = open_store(db).records(shipped=True)
    if spec is None and model is None:
        calls = known_workloads(records)
    else:
        calls = gathered(spec, model, batch, context, training, padded, shape, dtype, set_, quiet=as_json)
    keys = {one.spec.key for one in calls}
    devices = [find_target_device(name, None) for name in target or []]
    devices = devices or devices_of(record for record in records if record.key.spec_key in keys)
    found = coverage(calls, devices, db=db)
    if as_json:
        for one in found:
            typer.echo(json.dumps(one.as_dict()))
        return
    print_coverage(found)


def print_coverage(found: Sequence[Covered]) -> None:
    """A line for each attention and direction, by device and attention."""
    device = attention = ""
    for one in found:
        key = one.job.key
        if key.device != device:
            device, attention = key.device, ""
            console.print(Text(f"{device} ({key.units} units)", style="bold"))
        name = one.job.name or " ".join(one.job.spec.text.split("\n")[-1:])
        if name != attention:
            attention = name
            console.print(Text(f"  {name}"))
        part = f"{one.job.part.name}, " if one.job.part.name else ""
        console.print(Text(f"    {part}{one.job.piece} {one.job.shape} {key.dtype}"))
        console.print(Text(f"      {one.words}", style=_STYLE[one.status]))
    counts = Counter(one.status for one in found)
    told = f"{counts[EXACT]} exact, {counts[NEAR]} by the nearest record, {counts[NONE]} without a record"
    console.print(f"covered: {told}" if found else "the database has no records; `attngen tune` makes some")
