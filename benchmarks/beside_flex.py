"""attngen's kernels beside FlexAttention's own, both cross-compiled for one GPU and counted: modelled, never measured.

For each case both have the loops over full and partial tiles that a whole call runs, each loop the cycles of every part of a
multiprocessor (`Loop.pipes`). `overlap` is the largest of them, `serial` matrix work plus the largest of the rest: a GPU is
between. What stands before and behind the loops, latency, memory and launches are in neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import attngen as ag
from attngen.analysis import facts
from attngen.backends.triton.machine_code import Loop, MachineCode
from attngen.inspect.cross import cross_compile
from attngen.language.schedule import Tile
from attngen.runtime.first_tiles import Search
from attngen.schedule import Schedule, Target
from attngen.schedule.choice import on_gpu
from attngen.schedule.identities import IDENTITIES, gpu_named
from attngen.schedule.shipped import family_of, shipped_tile
from benchmarks import flex_kernels
from benchmarks.flex_kernels import BLOCK, Options, Problem
from benchmarks.workload import LENGTH, document_ids, tile_counts

HEADS, BATCH = 16, 4
DENSITY = 0.25  # of the live blocks of the block-sparse case
CACHE = 16384  # keys that a decoded token sees


@dataclass(frozen=True, eq=False)
class Case:
    """One attention. captures: of the spec, sized and without values where those don't decide tiles; gradient: the captured
    tensor that wants one; layout: live blocks.
    """

    name: str
    spec: ag.Spec
    problem: Problem
    captures: Mapping[str, Any] = field(default_factory=dict)
    gradient: str = ""
    layout: torch.Tensor | None = None

    @property
    def title(self) -> str:
        """The name with the head dim."""
        return f"{self.name} d{self.problem.head_dim}"

    @property
    def decodes(self) -> bool:
        """Whether it is a token over a cache."""
        return self.problem.n_q == 1

    @property
    def directions(self) -> tuple[str, ...]:
        """What is compared."""
        return ("forward",) if self.decodes else ("forward", "backward")

    def tiles(self, block_m: int, block_n: int, by_keys: bool = False) -> tuple[int, int]:
        """(full, partial) tiles of a head; of a group of heads where one token decodes."""
        if self.decodes:
            return -(-self.problem.n_k // block_n), 0
        if self.layout is not None:
            return int(self.layout.sum()) * (BLOCK // block_m) * (BLOCK // block_n), 0
        return tile_counts(self.spec, block_m, block_n, by_keys)

    def blocks(self, block_m: int, block_n: int) -> tuple[int, int]:
        """The same as FlexAttention visits them: a tile is what its block of 128 x 128 is."""
        if self.decodes:
            return self.tiles(block_m, block_n)
        full, partial = self.tiles(BLOCK, BLOCK)
        inside = (BLOCK // block_m) * (BLOCK // block_n)
        return full * inside, partial * inside


def cases() -> Iterator[Case]:
    """Every case, at its head dims."""
    ids, slope = document_ids()[None].expand(BATCH, LENGTH), torch.empty(HEADS)
    bias = torch.empty((), requires_grad=True).expand(HEADS, LENGTH, LENGTH)
    layout = torch.rand(1, 1, *[LENGTH // BLOCK] * 2, generator=torch.Generator().manual_seed(0)) < DENSITY
    prefix = 512

    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i >= j

    def window(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (i - j < 1024)

    def documents(b: Any, h: Any, i: Any, j: Any, doc: Any) -> Any:
        return (doc[b, i] == doc[b, j]) & (i >= j)

    def prefix_lm(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) | (j < prefix)

    def capped(s: Any, b: Any, h: Any, i: Any, j: Any, slope: Any) -> Any:
        return 30 * torch.tanh(s / 30) + slope[h] * (j - i)

    def biased(s: Any, b: Any, h: Any, i: Any, j: Any, bias: Any) -> Any:
        return s + bias[h, i, j]

    for d in (64, 128, 192, 256):
        yield Case("causal", ag.Spec(mask=ag.causal()), Problem(d, causal))
    for d in (64, 128):
        yield Case("window 1024", ag.Spec(mask=ag.causal() & ag.window(1024)), Problem(d, window))
        spec = ag.Spec(mask=ag.documents() & ag.causal())
        yield Case("documents", spec, Problem(d, documents, mask_captures=(ids,)), {"doc": ids})
        spec = ag.Spec(mask=ag.causal(), score=[ag.soft_cap(30.0), ag.alibi()])
        yield Case("soft cap, ALiBi", spec, Problem(d, causal, capped, (), (slope,)), {"slope": slope})
    yield Case("causal, GQA 8", ag.Spec(mask=ag.causal()), Problem(128, causal, heads=32, heads_kv=4))
    for d in (64, 128):
        spec = ag.Spec(score="s + bias[h, i, j]", tensors=[ag.Tensor("bias", 3)])
        yield Case("bias with gradient", spec, Problem(d, score=biased, score_captures=(bias,)), {"bias": bias}, "bias")
    spec = ag.Spec(mask=f"i >= j or j < {prefix}")
    yield Case("prefix-LM", spec, Problem(128, prefix_lm))
    spec = ag.Spec(keys=ag.block_sparse((BLOCK, BLOCK)))
    yield Case("block-sparse 25%", spec, Problem(128), {"layout": layout}, layout=layout)
    for d in (64, 128):
        yield Case("decode, GQA 8", ag.Spec(), Problem(d, batch=8, heads=32, heads_kv=4, n_q=1, n_k=CACHE))


@dataclass(frozen=True)
class Part:
    """A kernel of a call: its name, its loops over full and partial tiles, of each of the programs that share an output, how often
    each runs for a head, and its tile.
    """

    name: str
    made: MachineCode
    loops: tuple[Loop, ...]
    counts: tuple[int, ...]
    tile: Tile

    @property
    def num_warps(self) -> int:
        """Of a program."""
        assert self.tile.num_warps is not None
        return self.tile.num_warps

    @property
    def by_keys(self) -> bool:
        """Whether a program has a tile of keys and walks queries."""
        return self.name == "dkv"

    def __str__(self) -> str:
        tile = self.tile
        return f"{self.name} {tile.block_m} x {tile.block_n}, {tile.num_warps} warps, stages {tile.num_stages}"

    def busy(self) -> Counter[str]:
        """Cycles of each pipe."""
        total: Counter[str] = Counter()
        for loop, count in zip(self.loops, self.counts, strict=True):
            for pipe, cycles in loop.pipes(self.num_warps).items():
                total[pipe] += count * cycles  # type: ignore[assignment]
        return total

    def cycles(self, how: str) -> float:
        """ "overlap" or "serial" of all its tiles."""
        pairs = zip(self.loops, self.counts, strict=True)
        return sum(count * getattr(loop.cycles(self.num_warps), how) for loop, count in pairs)

    def opcodes(self) -> Counter[str]:
        """Instructions that a scheduler issues, by opcode."""
        total: Counter[str] = Counter()
        for loop, count in zip(self.loops, self.counts, strict=True):
            for opcode, number in loop.opcodes.items():
                total[opcode] += count * number * self.num_warps // 4
        return total


@dataclass(frozen=True)
class Side:
    """All kernels of one direction."""

    parts: tuple[Part, ...]
    note: str = ""

    def cycles(self, how: str) -> float:
        return sum(part.cycles(how) for part in self.parts)

    @cached_property
    def busy(self) -> Counter[str]:
        return sum((part.busy() for part in self.parts), Counter())

    @cached_property
    def opcodes(self) -> Counter[str]:
        return sum((part.opcodes() for part in self.parts), Counter())

    @property
    def spills(self) -> int:
        return max(part.made.spills for part in self.parts)


# -- attngen ----------------------------------------------------------------------------------------------------------


def sized(*size: int) -> torch.Tensor:
    """A tensor of that size without memory."""
    return torch.empty((), dtype=torch.bfloat16).expand(size)


def ours(case: Case, direction: str, gpu: str, search: float = 0.0) -> Side:
    """attngen's kernels with the schedule that a call gets on a GPU without records, if its first call searches for so many seconds."""
    p, target = case.problem, Target.named(gpu)
    q, k = sized(p.batch, p.heads, p.n_q, p.head_dim), sized(p.batch, p.heads_kv, p.n_k, p.head_dim)
    ((step, call),) = ag.compile(case.spec).attends(q, k, k, patient=False, **case.captures)
    spec, known = step.spec, facts(step.spec)
    units = IDENTITIES[gpu_named(gpu).name].units
    chosen = on_gpu(call, known, target, units, Schedule())
    kernels = ("forward",) if direction == "forward" else ("dq", "dkv")
    bare = [
        k for k in kernels if shipped_tile(spec, family_of(target.name), k, p.head_dim) is None and not case.decodes
    ]
    if bare and search:
        found, _ = Search(call, known, target, units, chosen, Schedule(), bare).run(search)
        for kernel, (tile, _) in found.items():
            chosen = chosen.with_tile(kernel, tile.over(chosen.tile(kernel)))
    parts = []
    wanted = (case.gradient,) if case.gradient else ()
    for made in cross_compile(
        spec, target.name, head_dim=p.head_dim, schedule=chosen, passes=(direction,), gradients=wanted
    ):
        if made.name in ("merge", "delta"):  # they have no products
            continue
        tile = chosen.tile("dq" if made.name in ("capture", "excess") else made.name)
        counts = case.tiles(tile.block_m, tile.block_n, made.name == "dkv") * tile.parts
        parts.append(Part(made.name, made, _loops(made, tile.parts), counts, tile))
    return Side(tuple(parts))


def _loops(made: MachineCode, parts: int = 1) -> tuple[Loop, ...]:
    """The loops over full and over partial tiles of each of the programs that share an output."""
    if len(made.loops) not in (parts, 2 * parts):
        raise ValueError(f"{made.name}: expected {parts} or {2 * parts} loops with products, got {len(made.loops)}")
    return tuple(loop for pair in made.walks(parts) for loop in pair)


# -- FlexAttention ----------------------------------------------------------------------------------------------------


def flex(case: Case, direction: str, gpu: str) -> Side:
    """FlexAttention's kernel with its default tile; where that doesn't fit, the best by this model of those that autotuning tries."""
    kind = "decode" if case.decodes else direction
    target, d = Target.named(gpu), case.problem.head_dim
    options = flex_kernels.default(kind, d, target)
    try:
        return flex_with(case, kind, options, gpu)
    except ag.ScheduleError:
        note = "its default tile does not fit; the best that does"
    fitting = [side for options in flex_kernels.every(kind, d, target) if (side := _fits(case, kind, options, gpu))]
    best = min(fitting, key=lambda side: side.cycles("overlap") + side.cycles("serial"))
    return Side(best.parts, note)


def _fits(case: Case, kind: str, options: Options, gpu: str) -> Side | None:
    try:
        side = flex_with(case, kind, options, gpu)
    except ag.ScheduleError:
        return None
    return side if not side.spills else None


def flex_with(case: Case, kind: str, options: Options, gpu: str) -> Side:
    """FlexAttention's kernel with some tile. ScheduleError where it doesn't fit."""
    splits = flex_kernels.decode_splits(case.problem, IDENTITIES[gpu_named(gpu).name].units)
    made = flex_kernels.compiled(kind, case.problem, options, Target.named(gpu), splits)
    blocks = options.blocks
    if kind != "backward":
        sizes = [("forward", made.loops, blocks.get("BLOCK_M", 16), blocks["BLOCK_N"])]
    else:  # one kernel does dq, then dk and dv
        if len(made.loops) != 4:
            raise ValueError(f"{made.name}: expected four loops with products, got {len(made.loops)}")
        sizes = [
            ("dq", made.loops[:2], blocks["BLOCK_M2"], blocks["BLOCK_N2"]),
            ("dkv", made.loops[2:], blocks["BLOCK_M1"], blocks["BLOCK_N1"]),
        ]
    return Side(
        tuple(
            Part(
                name, made, (loops[-1], loops[0]), case.blocks(m, n), Tile(m, n, options.num_warps, options.num_stages)
            )
            for name, loops, m, n in sizes
        )
    )


# -- side by side -----------------------------------------------------------------------------------------------------


def compare(case: Case, direction: str, gpu: str, search: float = 0.0) -> dict[str, Any]:
    """One line of the table, as JSON: ratios attngen / FlexAttention, above 1 attngen is slower, and what costs it there."""
    mine, other = ours(case, direction, gpu, search), flex(case, direction, gpu)
    ratios = {how: mine.cycles(how) / other.cycles(how) for how in ("overlap", "serial")}
    return {
        "case": case.title,
        "direction": direction,
        "ratios": ratios,
        "costs": costs(mine, other) if max(ratios.values()) > 1.0 else "",
        "attngen": _described(mine),
        "flex": _described(other),
        "note": other.note,
    }


def costs(mine: Side, other: Side) -> str:
    """The pipe that is busiest beyond the peer's, and the opcodes that attngen issues more of."""
    pipes = {pipe: mine.busy[pipe] / other.busy[pipe] for pipe in mine.busy if other.busy[pipe]}
    limit = max(pipes, key=lambda pipe: mine.busy[pipe] - other.busy[pipe])
    more = Counter({name: count - other.opcodes[name] for name, count in mine.opcodes.items()}).most_common(2)
    every = sum(other.opcodes.values())
    words = ", ".join(f"{name} {count / every:.0%}" for name, count in more if count > 0)
    said = f"{limit} x {pipes[limit]:.2f}"
    return f"{said}; instructions beyond FlexAttention's, of all of its: {words}" if words else said


def _described(side: Side) -> dict[str, Any]:
    return {
        "cycles": {how: side.cycles(how) for how in ("overlap", "serial")},
        "busy": dict(side.busy),
        "kernels": [
            {
                "tile": str(part),
                "registers": part.made.registers,
                "spills": part.made.spills,
                "shared": part.made.shared,
                "tiles": {"full": part.counts[0], "partial": part.counts[1]},
                "instructions": {
                    "full": sum(loop.instructions for loop in part.loops[::2]),
                    "partial": sum(loop.instructions for loop in part.loops[1::2]),
                },
            }
            for part in side.parts
        ],
    }


# -- the table and the chart ------------------------------------------------------------------------------------------

HEADER = (
    "Modelled, not measured: machine code of attngen and of the installed torch's FlexAttention for {gpu}, counted and turned into "
    "cycles of a multiprocessor (`benchmarks/beside_flex.py`). Ratios are attngen / FlexAttention, above 1 attngen is slower: if "
    "matrix work and the rest overlap wholly / not at all. Latency, memory, what is outside of the loops and launches are not in it."
)


def table(results: Mapping[str, Any]) -> str:
    """The lines as Markdown."""
    lines = [
        "# Machine code beside FlexAttention's: modelled",
        HEADER.format(gpu=results["setting"]["gpu"]),
        ", ".join(f"{name} {value}" for name, value in results["setting"].items()),
        "![ratios](machine_code.png)",
    ]
    rows = [
        "| case | direction | overlap | serial | spills | attngen's tiles | FlexAttention's | what costs it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in results["lines"]:
        tiles = {who: "; ".join(kernel["tile"] for kernel in line[who]["kernels"]) for who in ("attngen", "flex")}
        spills = [str(max(kernel["spills"] for kernel in line[who]["kernels"])) for who in ("attngen", "flex")]
        theirs = f"{tiles['flex']} ({line['note']})" if line["note"] else tiles["flex"]
        ratios = [f"{line['ratios'][how]:.2f}" for how in ("overlap", "serial")]
        cells = [line["case"], line["direction"], *ratios, " / ".join(spills), tiles["attngen"], theirs, line["costs"]]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n\n".join([*lines, "\n".join(rows)]) + "\n"


def chart(results: Mapping[str, Any], path: Path) -> None:
    """Both ratios of every line, forward and backward apart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    directions = ("forward", "backward")
    figure, panels = plt.subplots(1, 2, figsize=(11, 6), sharex=True, layout="constrained")
    for panel, direction in zip(panels, directions, strict=True):
        lines = [line for line in results["lines"] if line["direction"] == direction]
        places = range(len(lines))
        for how, colour in (("overlap", "#d6336c"), ("serial", "#1971c2")):
            panel.plot([line["ratios"][how] for line in lines], places, "o", color=colour, label=how)
        panel.axvline(1.0, color="#868e96", linewidth=1)
        panel.set_yticks(places, [line["case"] for line in lines], fontsize=8)
        panel.set_ylim(max(len(lines), 1) - 0.5, -0.5)
        panel.set_title(direction, fontsize=9)
        panel.set_xlabel("cycles, attngen / FlexAttention; left of 1 attngen is faster", fontsize=8)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    about = results["setting"]
    figure.suptitle(
        f"modelled from machine code, not measured: {about['gpu']}, torch {about['torch']}, triton {about['triton']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


Say = Callable[[str], None]


def setting(gpus: str) -> dict[str, Any]:
    """What modelled results depend on."""
    import triton

    return {"gpu": gpus, "torch": str(torch.__version__), "triton": triton.__version__}


def run(gpu: str, only: str, search: float, say: Say) -> dict[str, Any]:
    """Every line, with what it depends on."""
    lines = []
    for case in cases():
        if only in case.title:
            for direction in case.directions:
                line = compare(case, direction, gpu, search)
                lines.append(line)
                ratios = " / ".join(f"{ratio:.2f}" for ratio in line["ratios"].values())
                say(f"{case.title:24} {direction:8} {ratios} {line['costs']}")
    about = setting(gpu) | {"seconds of search for tiles that don't ship": search}
    return {"modelled": True, "setting": about, "lines": lines}
