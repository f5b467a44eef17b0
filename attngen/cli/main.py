"""The `attngen` command."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import attngen
from attngen.analysis import tile_map
from attngen.cli.bench import EXAMPLE as BENCH_EXAMPLE
from attngen.cli.bench import bench
from attngen.cli.build import EXAMPLE as BUILD_EXAMPLE
from attngen.cli.build import build
from attngen.cli.coverage import EXAMPLE as COVERAGE_EXAMPLE
from attngen.cli.coverage import db_coverage
from attngen.cli.db import db_app
from attngen.cli.options import Database, Dtype, Set, Shape, SpecArg, console, given_captures, read_dtype
from attngen.cli.pack import pack_app
from attngen.cli.sizes import bytes_text
from attngen.cli.tune import EXAMPLE as TUNE_EXAMPLE
from attngen.cli.tune import tune
from attngen.errors import AttngenError, AttngenWarning, ScheduleError
from attngen.inspect import picture
from attngen.inspect.cross import FORWARD_ONLY, VARIANTS, cross_compile
from attngen.language.files import read_spec
from attngen.language.patterns import causal
from attngen.language.schedule import Schedule
from attngen.language.spec import Spec
from attngen.reference.oracle import oracle
from attngen.runtime.attention import compile as compile_spec
from attngen.schedule import Target
from attngen.store import Shape as Sizes
from attngen.store import cache_folder, open_store, shown
from attngen.tuning.attends import example
from attngen.tuning.captures import make_captures

app = typer.Typer(
    add_completion=False,
    name="attngen",
    help="Describe an attention; look at it, compile it, tune it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(db_app, name="db")
app.add_typer(pack_app, name="pack")
app.command(epilog=TUNE_EXAMPLE)(tune)
app.command(epilog=BENCH_EXAMPLE)(bench)
app.command(epilog=BUILD_EXAMPLE)(build)
db_app.command(name="coverage", epilog=COVERAGE_EXAMPLE)(db_coverage)


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"attngen {attngen.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it, and stop.")
    ] = False,
) -> None:
    """Describe an attention; look at it, compile it, tune it."""


@app.command(epilog="Example: [b]attngen show 'i >= j and i - j < 1024' -n 8192 --png window.png[/b]")
def show(
    spec: SpecArg,
    n: Annotated[
        int | None, typer.Option("-n", help="Queries and keys. Default: 4096, and 1024 for a spec with keys.")
    ] = None,
    n_k: Annotated[int | None, typer.Option(help="Keys, if not as many as queries.")] = None,
    block_m: Annotated[int | None, typer.Option(help="Query tile. Default: 128, or n / 64 with keys.")] = None,
    block_n: Annotated[int | None, typer.Option(help="Key tile. Default: 64, or n / 64 with keys.")] = None,
    q_offset: Annotated[int, typer.Option(help="Position of the first query.")] = 0,
    set_: Set = None,
    png: Annotated[Path | None, typer.Option(help="Also draw it into this PNG file.")] = None,
) -> None:
    """Show a mask as the kernel will treat it: full, partial and empty tiles, and the density. Of a spec with keys: the pairs
    that batch 0, head 0 attends, with whatever the key set takes at the call made up.
    """
    value = read_spec(spec)
    keyed = value.keys is not None
    n = (1024 if keyed else 4096) if n is None else n
    n_k = n if n_k is None else n_k
    block_m = block_m or (max(1, n // 64) if keyed else 128)
    block_n = block_n or (max(1, n_k // 64) if keyed else 64)
    captures = _captures(value, f"B1 H1 Nq{n} Nk{max(n_k, n + q_offset)} D64", set_)
    if keyed:
        tiles, made = picture.of_keys(value, n, n_k, block_m, block_n, q_offset, captures)
        console.print(f"[dim]made up for this picture: {made}[/dim]")
    else:
        tiles = tile_map(value, n, n_k, block_m, block_n, q_offset=q_offset, **captures)
    console.print(str(value), markup=False)
    console.print(picture.text(tiles), markup=False)
    console.print(f"{picture.LEGEND}   (query tiles of {block_m} down, key tiles of {block_n} across)")
    console.print(picture.summary(tiles))
    if png is not None:
        title = value.name or str(value).splitlines()[-1]
        picture.png(tiles, png, f"{title}\nmade up: {made}" if keyed else title, block_m, block_n)
        console.print(f"written: {png}")


@app.command(epilog="Example: [b]attngen explain 'i >= j' --shape 'B1 H8 N4096 D64' --html causal.html[/b]")
def explain(
    spec: SpecArg,
    shape: Shape = "B1 H8 N4096 D64",
    dtype: Dtype = "float32",
    set_: Set = None,
    db: Database = None,
    png: Annotated[Path | None, typer.Option(help="Also draw the plan into this PNG file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write all of it, with sources, as one page of HTML.")] = None,
) -> None:
    """Say what attngen would do with this attention on this machine, and why. What a key set takes at the call is made up."""
    value = read_spec(spec)
    captures = _captures(value, shape, set_)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, captures, made = example(value, Sizes.of(shape), read_dtype(dtype), captures, device=device)
    if made:
        console.print(f"[dim]made up: {', '.join(made)}[/dim]")
    console.print(compile_spec(value, db=db).explain(*rows, png=png, html=html, **captures), markup=False)
    for written in (png, html):
        if written is not None:
            console.print(f"written: {written}")


@app.command(name="compile", epilog="Example: [b]attngen compile 'i >= j' --target sm_90 --head-dim 128 --source[/b]")
def compile_(
    spec: SpecArg,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A GPU (H100) or an architecture (sm_90, the default); give it several times."),
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Head dim of q and k.")] = 128,
    head_dim_v: Annotated[int | None, typer.Option(help="Head dim of v, if another.")] = None,
    dtype: Dtype = "bfloat16",
    variants: Annotated[
        bool, typer.Option(help="Also other schedules: tensor descriptors, specialised warps, persistent, ...")
    ] = False,
    loops: Annotated[bool, typer.Option(help="Also what kinds of instructions each loop has.")] = False,
    source: Annotated[bool, typer.Option(help="Print the generated Triton source.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write source, PTX and cubin into this folder.")] = None,
) -> None:
    """Compile for GPUs that need not be here: registers and spills of a thread, shared memory of a program, and instructions of
    the loops over full and partial tiles.
    """
    value, element = read_spec(spec), read_dtype(dtype)
    targets = [Target.named(name).name for name in target or ["sm_90"]]
    if source:
        attention = compile_spec(value)
        for part in ("forward", "delta", "dq", "dkv"):
            text = attention.source(part, head_dim=head_dim, head_dim_v=head_dim_v, dtype=element, target=targets[0])
            console.print(text, markup=False)
    columns = ["target", "kernel", "registers", "spills", "shared", "full", "partial"]
    table = Table(*(["schedule"] if variants else []), *columns, title=f"{dtype}, head dim {head_dim}")
    kinds: list[str] = []
    for name in targets:
        for variant, decisions in (VARIANTS if variants else {"": {}}).items():
            label = [variant] if variants else []
            try:
                kernels = cross_compile(
                    value,
                    target=name,
                    dtype=element,
                    head_dim=head_dim,
                    head_dim_v=head_dim_v,
                    schedule=Schedule(**decisions),
                    passes=("forward",) if variant in FORWARD_ONLY else ("forward", "backward"),
                )
            except ScheduleError as error:
                if not variants:
                    raise
                table.add_row(*label, name, "not here", *[""] * 5)
                kinds.append(f"{variant} on {name}: {error}")
                continue
            for kernel in kernels:
                found = kernel.loops[:2]
                counts = [str(loop.instructions) for loop in found]
                counts = ["", *counts] if len(counts) == 1 and "partial" not in kernel.source.text else counts
                sizes = [str(kernel.registers), str(kernel.spills), bytes_text(kernel.shared)]
                table.add_row(*label, name, kernel.name, *sizes, *[*counts, "", ""][:2])
                if loops:
                    where = " ".join([*label, name, kernel.name])
                    kinds += [f"{where}, loop {number}: {loop}" for number, loop in enumerate(found, 1)]
                if out is not None:
                    _write_kernel(out / name / variant.replace(" ", "_"), kernel)
    console.print(table)
    for line in kinds:
        console.print(line, markup=False)
    if out is not None:
        console.print(f"written: {out}")


@app.command(epilog="Example: [b]attngen doctor[/b]")
def doctor() -> None:
    """Versions, devices, folders, and what works on this machine."""
    table = Table(show_header=False, box=None)
    table.add_row("attngen", attngen.__version__)
    table.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    for package in ("torch", "triton", "sympy", "networkx", "optuna", "numpy"):
        try:
            table.add_row(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            table.add_row(package, "[red]not installed[/red]")
    for name, value in _folders().items():
        table.add_row(name, escape(value))
    for name in sorted(name for name in os.environ if name.startswith("ATTNGEN_")):
        table.add_row(name, escape(shown(os.environ[name])))
    console.print(table)
    checks = Table("check", "result")
    failed = False
    for name, check in (
        ("GPU", _check_gpu),
        ("CPU backend", lambda: _check_backend("cpu")),
        ("Triton interpreter", lambda: _check_backend("interpret")),
        ("cross-compile for sm_90", _check_cross),
        ("record database", _check_store),
    ):
        try:
            checks.add_row(name, check())
        except Exception as error:  # the doctor reports whatever is broken, and goes on
            failed = True
            checks.add_row(
                name, f"[red]{type(error).__name__}[/red]: {escape(str(error).splitlines()[0]) if str(error) else ''}"
            )
    console.print(checks)
    raise typer.Exit(1 if failed else 0)


def main() -> None:
    """Entry point: errors and warnings of attngen are messages, not tracebacks and lines of source."""
    elsewhere = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, AttngenWarning):
            said = f"[yellow]warning[/yellow] {escape(str(message))}"
            return Console(stderr=True, highlight=False, soft_wrap=True).print(said)
        return elsewhere(message, category, *place, **more)

    warnings.showwarning = show
    try:
        app()
    except AttngenError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]{type(error).__name__}[/red]", end=" ")
        Console(stderr=True, highlight=False, soft_wrap=True).print(str(error), markup=False)
        sys.exit(2)


# -- helpers ----------------------------------------------------------------------------------------------------------


def _captures(spec: Any, shape: str, assignments: list[str] | None) -> dict[str, Any]:
    """The spec's captures: those given by --set, and made-up ones, which is said."""
    given = given_captures(spec, assignments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    captures: dict[str, Any] = {}
    for part in _parts(spec):
        captures |= make_captures(part, Sizes.of(shape), device, {**captures, **given})
    made = [name for name in captures if name not in given]
    if made:
        console.print(f"[dim]made up for this picture: {', '.join(made)} (give them with --set NAME=VALUE)[/dim]")
    return captures


def _parts(spec: Any) -> tuple[Any, ...]:
    """The pieces of a union, or the spec itself."""
    return spec.keys.specs if getattr(spec.keys, "name", "") == "union" else (spec,)


def _write_kernel(folder: Path, kernel: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if kernel.ptx:
        (folder / f"{kernel.name}.ptx").write_text(kernel.ptx)
    if kernel.cubin:
        (folder / f"{kernel.name}.cubin").write_bytes(kernel.cubin)


def _folders() -> dict[str, str]:
    return {"cache folder": str(cache_folder()), "database": open_store().name}


def _check_gpu() -> str:
    if not torch.cuda.is_available():
        return "none here: the CPU backend runs, kernels are cross-compiled"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"


def _check_backend(backend: str) -> str:
    spec = Spec(mask=causal())
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    error = (compile_spec(spec, backend=backend)(q, k, v) - oracle(spec, q, k, v)[0]).abs().max().item()
    if not error < 1e-4:
        raise RuntimeError(f"wrong by {error:.1e}")
    return f"works (largest error against the oracle {error:.1e})"


def _check_cross() -> str:
    kernels = cross_compile(Spec(mask=causal()), target="sm_90", dtype=torch.float16, head_dim=64, passes=("forward",))
    return f"works ({kernels[0].registers} registers, {kernels[0].spills} spills)"


def _check_store() -> str:
    store = open_store()
    return f"{len(store.records())} records in {escape(store.name)}"
