"""`attngen pack`: folders of compiled kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from attngen.cli.sizes import bytes_text
from attngen.errors import PackError
from attngen.packs.format import Pack, read

pack_app = typer.Typer(help="Packs: folders of compiled kernels.", no_args_is_help=True)
console = Console(highlight=False, soft_wrap=True)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a pack.")]
Links = Annotated[
    bool, typer.Option("--links", help="Take files that are symbolic links, as caches of downloads have.")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, on one line.")]


@pack_app.command(epilog="Example: [b]attngen pack ls pack/[/b]")
def ls(folder: Folder, links: Links = False, as_json: AsJson = False) -> None:
    """List what a pack holds: its specs, and its kernels with their targets and sizes. It is verified first."""
    pack = read(folder, links=links)
    specs = _specs(pack)
    if as_json:
        return typer.echo(
            json.dumps(_summary(pack) | {"specs": specs, "kernels": [_row(pack, name) for name in pack.kernels]})
        )
    for name, text in specs.items():
        console.print(f"{name}: {text}", markup=False)
    table = Table("kernel", "target", "warps", "shared", "size")
    for name, kernel in pack.kernels.items():
        table.add_row(name, kernel.target, str(kernel.num_warps), bytes_text(kernel.shared), bytes_text(kernel.size))
    console.print(table)
    console.print(summarise(pack), markup=False)


@pack_app.command(epilog="Example: [b]attngen pack verify pack/[/b]")
def verify(folder: Folder, links: Links = False, as_json: AsJson = False) -> None:
    """Check a pack: its schema, its digest, every file's sha256, and what it says of every kernel against the machine code."""
    try:
        pack = read(folder, links=links)
    except PackError as error:
        if as_json:
            typer.echo(json.dumps({"sound": False, "problem": str(error)}))
        else:
            console.print(str(error), markup=False)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps({"sound": True, "problem": None} | _summary(pack)))
    else:
        console.print(f"the pack is sound: {summarise(pack)}", markup=False)


def _specs(pack: Pack) -> dict[str, str]:
    """The names of the specs, and their texts where they have one, each on one line."""
    specs = pack.manifest.get("specs")
    if not isinstance(specs, dict):
        return {}
    texts = {name: spec.get("text") if isinstance(spec, dict) else None for name, spec in specs.items()}
    return {_one_line(name): _one_line(text) if isinstance(text, str) else "" for name, text in texts.items()}


def _one_line(text: str) -> str:
    """Without what a terminal would take for a command: the text may come from anybody."""
    lines = (line for line in text.splitlines() if line)
    return "".join(letter if letter.isprintable() else "?" for letter in "; ".join(lines))


def _row(pack: Pack, name: str) -> dict[str, Any]:
    """A kernel, but for its arguments."""
    return {"name": name} | {key: value for key, value in pack.kernels[name].to_json().items() if key != "arguments"}


def _summary(pack: Pack) -> dict[str, Any]:
    targets = sorted({kernel.target for kernel in pack.kernels.values()})
    size = sum(map(len, pack.files.values()))
    return {"attngen": pack.attngen, "digest": pack.digest, "targets": targets, "files": len(pack.files), "size": size}


def summarise(pack: Pack) -> str:
    """A pack in a sentence."""
    summary = _summary(pack)
    return (
        f"{len(pack.kernels)} kernels for {', '.join(summary['targets']) or 'nothing'} in {summary['files']} files of "
        f"{bytes_text(summary['size'])}, made by attngen {pack.attngen}, digest {pack.digest[:16]}"
    )
