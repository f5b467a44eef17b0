"""What the machine code of kernels says where no GPU is: modelled, never measured. `python -m benchmarks.machine_code --help`

`tiles` finds default tiles: it compiles the kernels of common specs in every tile that may be good, leaves out those that
spill registers or don't fit, and keeps for each spec and kernel the one with the fewest modelled cycles, or of those that the
model hardly tells apart the one that keeps a multiprocessor busy shortest.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

import attngen as ag
from attngen.analysis import facts as analyse
from attngen.backends.triton import modelled
from attngen.backends.triton.modelled import Resources, Stretch, Work
from attngen.inspect.cross import Compiled, cross_compile
from attngen.language.schedule import KERNELS, PREFIXES, Tile
from attngen.runtime.first_tiles import HEADS, sparing
from attngen.schedule import TARGETS, Target
from attngen.schedule.legality import WIDE
from attngen.schedule.shipped import (
    FOLDER,
    family_of,
    form_of,
    forms_of,
    read_tiles,
    tile_of,
    triton_version,
    write_tiles,
)
from attngen.tuning.model import PRODUCTS
from benchmarks import beside_flex, orders, public_choices
from benchmarks.suite import write_json
from benchmarks.workload import LENGTH, pairs, tile_counts

Case = tuple[str, str, int]  # a name of SPECS, a kernel, a head dim
Line = tuple[float, Tile, dict[str, Any]]  # modelled cycles of 1,000 pairs, a tile, what compiling it found
FINALISTS = 4  # tiles that are compiled in special forms too
HARDLY = 80  # registers a thread that a finalist may spill: special forms need fewer
EQUAL = 1.01  # times the best tile's modelled cycles, within which the model tells nothing apart
TCGEN05 = (
    4096  # multiply-adds of half types a cycle and multiprocessor of sm_100, whose products don't say their shapes
)
RESULTS = Path(__file__).parent / "results" / "modelled"
app = typer.Typer(add_completion=False)

SPECS: dict[str, ag.Spec] = {
    "full": ag.Spec(),
    "causal": ag.Spec(mask=ag.causal()),
    "window": ag.Spec(mask=ag.causal() & ag.window(1024)),
    "window of a param": ag.Spec(mask=ag.causal() & ag.window(ag.Param("width"))),
    "documents": ag.Spec(mask=ag.documents()),
    "causal documents": ag.Spec(mask=ag.documents() & ag.causal()),
    "prefix": ag.Spec(mask="i >= j or j < prefix", params=[ag.Param("prefix")]),
    "soft cap": ag.Spec(mask=ag.causal(), score=ag.soft_cap(30.0)),
    "window, soft cap": ag.Spec(mask=ag.causal() & ag.window(1024), score=ag.soft_cap(30.0)),
    "ALiBi": ag.Spec(mask=ag.causal(), score=ag.alibi()),
    "soft cap, ALiBi": ag.Spec(mask=ag.causal(), score=[ag.soft_cap(30.0), ag.alibi()]),
    "bias": ag.Spec(score="s + bias[h, i, j]", tensors=[ag.Tensor("bias", 3)]),
    "causal bias": ag.Spec(mask=ag.causal(), score="s + bias[h, i, j]", tensors=[ag.Tensor("bias", 3)]),
}


def candidates(kernel: str, head_dim: int, target: Target) -> Iterator[Tile]:
    """Tiles that may be good: a group of four warps has 64 resident rows, as its products have; in the forward, which holds
    least, twice as many too. Of wide heads only large tiles are worth their operands. None holds more registers than a search at a
    first call would try.
    """
    wide = kernel != "forward" and head_dim > WIDE
    rows, walks = (((128, 8),), (64, 32)) if wide else (((128, 8), (64, 4), (128, 4)), (128, 64, 32, 16))
    for (resident, warps), walked, less in itertools.product(rows, walks, (0, 1)):
        if kernel == "dkv" and resident == 16 * warps and walked <= resident // 2:
            found = Tile(walked, resident, warps, 2 - less)
        elif kernel == "dq" and resident == 16 * warps and 32 <= walked <= resident:
            found = Tile(resident, walked, warps, 2 - less)
        elif kernel == "forward" and 32 <= walked <= 16 * warps:
            found = Tile(resident, walked, warps, 3 - less)
        else:
            continue
        if (spared := sparing(kernel, found, target, head_dim)) is None:
            continue
        yield plainly(spared)
        if wide and target.has_descriptors:
            yield plainly(replace(spared, tma=True))


def plainly(tile: Tile) -> Tile:
    """With every special form decided, and what files of tiles leave open left open: the order of outputs."""
    return tile_of((tile.block_m, tile.block_n, tile.num_warps, tile.num_stages), forms_of(tile))


def search(log: Log, case: Case) -> None:
    """Compile the candidates; the best, and those that hardly spill, also with loops that load ahead at the edges, where that is a
    choice, and with tensor descriptors, which leave registers and shared memory to other loads; loops of gradients, which have fewest
    registers to spare, also without invariants lifted out of them.
    """
    name, kernel, head_dim = case
    target = Target.named(log.target)
    ranked = log.ranked(case, candidates(kernel, head_dim, target), HARDLY)
    edges = not analyse(SPECS[name]).walk_of(kernel).needs_tables  # else all partial loops load ahead
    for _, tile, _ in ranked[:FINALISTS]:
        ahead = [replace(tile, pipeline_edges=True)] if edges and tile.num_stages > 1 else []
        forms = [tile, *ahead]
        if target.has_descriptors:
            forms += [replace(form, tma=True) for form in forms]
        if kernel != "forward":
            forms += [replace(form, disable_licm=True) for form in forms]
        for form in forms:
            log.made(case, form)


def compiled(spec: ag.Spec, kernel: str, tile: Tile, target: str, head_dim: int) -> Compiled:
    """ScheduleError for a tile that does not fit."""
    pinned = ag.Schedule(**{kernel: tile})
    return cross_compile(spec, target, head_dim=head_dim, schedule=pinned, passes=(kernel,))[0]


def cycles(
    name: str, kernel: str, tile: Tile, made: dict[str, Any], target: str, head_dim: int, waits: bool = True
) -> float:
    """Modelled as at a first call (`backends/triton/modelled.py`), of a multiprocessor by 1,000 pairs of a head. waits: as warps
    do for each other; without it what its busiest part does alone.
    """
    counts = tile_counts(SPECS[name], tile.block_m, tile.block_n, kernel == "dkv")
    resident, walked = (tile.block_n, tile.block_m) if kernel == "dkv" else (tile.block_m, tile.block_n)
    full, partial, outside = (Stretch(busy, alone if waits else busy) for busy, alone in made["stretches"])
    used = Resources(made["registers"], made["spills"], made["shared"], tile.num_warps, full, partial, outside)
    full_tiles, partial_tiles = (HEADS * count for count in counts)  # many: the last wave hardly counts
    work = Work(full_tiles, partial_tiles, HEADS * LENGTH / resident, 2 * 2 * walked * head_dim * tile.parts)
    return 1000 * modelled.cycles(used, work, Target.named(target), 1) / (HEADS * pairs(SPECS[name]))


@app.callback(invoke_without_command=True)
def suite(context: typer.Context) -> None:
    """What the machine code of kernels says where no GPU is: modelled, never measured. Without a command: `compare`."""
    if context.invoked_subcommand is None:
        compare()


@app.command()
def compare(
    gpu: Annotated[str, typer.Option(help="to compile for")] = "H100",
    only: Annotated[str, typer.Option(help="cases whose name has this")] = "",
    search: Annotated[
        float, typer.Option(help="seconds for attngen's tiles where none ships, as at a first call; 0: none")
    ] = 60.0,
    out: Annotated[Path, typer.Option(help="folder of the JSON, the table and the chart")] = RESULTS,
) -> None:
    """attngen's kernels beside FlexAttention's, in the same cases."""
    results = beside_flex.run(gpu, only, search, typer.echo)
    write_json(out / "machine_code.json", results)
    (out / "machine_code.md").write_text(beside_flex.table(results), encoding="utf-8")
    beside_flex.chart(results, out / "machine_code.png")


@app.command()
def ranks(
    gpu: Annotated[list[str], typer.Option("--gpu", help="again for each")] = list(public_choices.GPUS_RANKED),  # noqa: B006
    out: Annotated[Path, typer.Option(help="folder of the JSON and the table")] = RESULTS,
) -> None:
    """inductor's default tiles, which were chosen on the devices, in the order of the model."""
    results = public_choices.run(typer.echo, tuple(gpu))
    write_json(out / "ranks.json", results)
    (out / "ranks.md").write_text(public_choices.table(results), encoding="utf-8")


@app.command()
def order(out: Annotated[Path, typer.Option(help="folder of the JSON and the table")] = RESULTS) -> None:
    """What it is worth that the longest tiles of a causal mask come first."""
    results = orders.run(typer.echo)
    write_json(out / "order.json", results)
    (out / "order.md").write_text(orders.table(results), encoding="utf-8")


@app.command()
def tiles(
    target: Annotated[str, typer.Option(help="the architecture")] = "sm_90",
    head_dim: Annotated[list[int], typer.Option("--head-dim", help="again for each")] = [64, 128],  # noqa: B006
    spec: Annotated[list[str], typer.Option("--spec", help=f"of {', '.join(SPECS)}; again for each")] = list(SPECS),  # noqa: B006
    kernel: Annotated[list[str], typer.Option("--kernel", help="forward, dq, dkv; again for each")] = list(KERNELS),  # noqa: B006
    log: Annotated[Path | None, typer.Option(help="keeps what was compiled, to go on from there")] = None,
    beside: Annotated[
        Path | None, typer.Option(help="a log of another Triton: of its tiles the best that spills here neither")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the file to write; else the one that ships")] = None,
) -> None:
    """Find the default tiles of an architecture, and write them to its file in `tuning_db/`; other entries there stay.

    What ships spills under no supported Triton: run it under the newest with --log, then under the oldest with --beside. Where
    the oldest takes another tile, both ship.
    """
    since = ".".join(triton_version().split(".")[:2])
    here, there = Log(log, target), None if beside is None else Log(beside, target)
    work = [(name, own, d) for name in spec for d in head_dim for own in kernel]
    found = []
    for case in track(work, "compiling", console=Console(stderr=True)):
        if there is None:
            search(here, case)
        source = there or here
        best = chosen(source, here, case)
        if best is None:
            typer.echo(f"{' '.join(map(str, case))}: no tile without spills", err=True)
            continue
        cost, tile, made = best
        name, own, d = case
        found.append(((form_of(SPECS[name]), own, d, since), tile, {"modelled": cost, "registers": made["registers"]}))
        typer.echo(f"{name:20} {own:8} {d:4} {cost:7.1f} {made['registers']} {tile}")
    path, searched = out or FOLDER / f"tiles-{target}.json", {(form_of(SPECS[name]), own, d) for name, own, d in work}
    known, oldest = read_tiles(path) if path.is_file() else [], {entry[:3]: tile for entry, tile, _ in found}
    kept = [line for line in known if line[0][:3] not in searched]
    if beside is not None:  # what the newer Triton takes instead
        kept += [
            line
            for line in known
            if line[0][:3] in searched and line[0][3] != since and oldest.get(line[0][:3]) != line[1]
        ]
    write_tiles(path, [*kept, *found])


def chosen(source: Log, here: Log, case: Case) -> Line | None:
    """By the cycles of one log, without spills in the other too: of those within `EQUAL` the one that is busy shortest."""
    ranked = (line for line in source.ranked(case, source.tiles(case)) if here.fits(case, line[1]))
    best = next(ranked, None)
    if best is None:
        return None
    equal = itertools.takewhile(lambda line: line[0] <= EQUAL * best[0], ranked)
    return min([best, *equal], key=lambda line: source.cycles(case, line[1], waits=False))


class Log:
    """What was compiled under one Triton, kept in a file if there is one: a line for each tile."""

    def __init__(self, path: Path | None, target: str):
        self.path, self.target = path, target
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
        self.known: dict[str, dict[str, Any]] = dict(map(json.loads, lines))

    def _place(self, case: Case, tile: Tile) -> str:
        name, kernel, d = case
        own = (tile.block_m, tile.block_n, tile.num_warps, tile.num_stages, forms_of(tile))
        return json.dumps([self.target, name, d, kernel, *own])

    def tiles(self, case: Case) -> list[Tile]:
        """Those that were compiled."""
        places = map(json.loads, self.known)
        return [tile_of(own, forms) for t, n, d, k, *own, forms in places if (t, n, k, d) == (self.target, *case)]

    def made(self, case: Case, tile: Tile) -> dict[str, Any]:
        """What compiling it found, see `tried`."""
        place = self._place(case, tile)
        if place not in self.known:
            name, kernel, d = case
            self.known[place] = tried(name, kernel, tile, self.target, d)
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([place, self.known[place]]) + "\n")
        return self.known[place]

    def fits(self, case: Case, tile: Tile, spills: int = 0) -> bool:
        """Whether it compiles, with so many spills at most, and runs on all of its architecture's family."""
        made = self.made(case, tile)
        most = min(Target.named(name).shared_limit for name in TARGETS if family_of(name) == self.target)
        return bool(made) and made["spills"] <= spills and made["shared"] <= most

    def cycles(self, case: Case, tile: Tile, waits: bool = True) -> float:
        """See the function."""
        name, kernel, d = case
        return round(cycles(name, kernel, tile, self.made(case, tile), self.target, d, waits), 1)

    def ranked(self, case: Case, tiles: Iterable[Tile], spills: int = 0) -> list[Line]:
        """Those that fit, by modelled cycles."""
        fitting = [tile for tile in tiles if self.fits(case, tile, spills)]
        return sorted(
            ((self.cycles(case, tile), tile, self.made(case, tile)) for tile in fitting), key=lambda line: line[0]
        )


def tried(name: str, kernel: str, tile: Tile, target: str, head_dim: int) -> dict[str, Any]:
    """What compiling found: resources, and (busy, alone) cycles of a full and of a partial tile, of all programs that share an
    output, and of what is outside of the loops; nothing where the tile doesn't fit.
    """
    try:
        made = compiled(SPECS[name], kernel, tile, target, head_dim)
    except ag.ScheduleError:
        return {}
    used = Resources.of(made, tile.num_warps, tile.parts)
    stretches = [(part.busy, part.alone) for part in (used.full, used.partial, used.outside) if part is not None]
    if any("UTCHMMA" in loop.opcodes for loop in made.loops):
        products = PRODUCTS[PREFIXES[kernel]] * tile.block_m * tile.block_n * head_dim / TCGEN05
        stretches[:2] = [(max(busy, products), max(alone, products)) for busy, alone in stretches[:2]]
    return {"registers": made.registers, "spills": made.spills, "shared": made.shared, "stretches": stretches}


if __name__ == "__main__":
    app()
