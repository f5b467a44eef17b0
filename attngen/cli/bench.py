"""`attngen bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table

from attngen.cli.options import Database, Set, SpecArg, console, given_captures, read_dtype
from attngen.language.files import read_spec
from attngen.store import Shape, time_text
from attngen.tuning.versus import Comparison, Row, chart, compare

EXAMPLE = "Example: [b]attngen bench 'i >= j and i - j < 512' --shape 'B1 H8 N4096 D64' --png window.png[/b]"


def bench(
    spec: SpecArg,
    shape: Annotated[
        list[str] | None, typer.Option(help="Sizes; give it several times. Default: 'B1 H8 N4096 D64'.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16. Default: bfloat16 on a GPU, float32 on the CPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, or cuda. Default: the GPU, if there is one.")] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Time the backward in the place of the forward.")
    ] = False,
    set_: Set = None,
    seconds: Annotated[float, typer.Option(help="How long all take turns, for each shape.")] = 2.0,
    db: Database = None,
    png: Annotated[Path | None, typer.Option(help="Also draw the times into this PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, one shape a line, times in seconds.")] = False,
) -> None:
    """Time attngen beside SDPA and FlexAttention on this machine, each checked against the oracle first. All take turns in one run.

    A dense mask for SDPA and the block mask of FlexAttention, which is compiled for exactly these sizes, are made beforehand.
    """
    value = read_spec(spec)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    element = read_dtype(dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    found = []
    for text in shape or ["B1 H8 N4096 D64"]:
        with console.status("") as status:
            one = compare(
                value,
                Shape.of(text),
                dtype=element,
                device=where,
                direction="backward" if backward else "forward",
                captures=given_captures(value, set_),
                seconds=seconds,
                db=db,
                starting=lambda peer: status.update(f"preparing {peer}" if peer else "all in turns"),
            )
        found.append(one)
        if as_json:
            typer.echo(json.dumps(one.as_dict()))
        else:
            _print(one)
    if png is not None and chart(found, png) and not as_json:
        console.print(f"written: {png}")


def _print(one: Comparison) -> None:
    console.print(f"{one.shape} {one.dtype}, {one.direction}, on {one.device}", markup=False)
    if one.made_up:
        console.print(f"[dim]made up: {', '.join(one.made_up)} (give them with --set NAME=VALUE)[/dim]")
    table = Table("", "time", "20% to 80%", "attngen is", "error", box=None, pad_edge=False)
    for row in one.rows:
        table.add_row(row.peer, *_figures(row))
    console.print(table)
    for row in one.rows:
        if row.note:
            console.print(f"[dim]{row.peer}: {escape(row.note)}[/dim]")
    console.print()


def _figures(row: Row) -> list[str]:
    """Time, spread, ratio, and the error as a part of what is allowed."""
    error = "" if row.error is None else f"{row.error:.0%} of allowed"
    if row.timing is None:
        return [row.status, "", "", error]
    spread = f"{time_text(row.timing.p20)} to {time_text(row.timing.p80)}"
    return [time_text(row.timing.median), spread, "" if row.ratio is None else _ratio(row.ratio), error]


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
