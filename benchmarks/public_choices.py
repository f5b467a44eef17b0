"""The model of machine code beside what is public: tiles that were chosen on the devices.

inductor has default tiles of FlexAttention for A100 and H100. Its own kernels are compiled in every tile that its autotuning
searches there, and ranked by the model: the default should be among the first three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from attngen.analysis import GPUS
from attngen.backends.triton.modelled import Resources, Stretch, Work, seconds
from attngen.errors import ScheduleError
from attngen.schedule import Target
from attngen.schedule.identities import IDENTITIES
from benchmarks import flex_kernels
from benchmarks.beside_flex import Case, cases, flex_with, setting
from benchmarks.flex_kernels import Options

GPUS_RANKED = ("A100", "H100")
HEAD_DIMS = (64, 128, 256)
BEST = 3  # ranks that agree
ELEMENT = 2  # bytes


def modelled(case: Case, direction: str, options: Options, gpu: str) -> float:
    """Seconds of FlexAttention's kernel with some tile. ScheduleError where it doesn't fit."""
    side, p, about = flex_with(case, direction, options, gpu), case.problem, GPUS[gpu]
    target, units = Target.named(gpu), IDENTITIES[gpu].units
    total, heads = 0.0, p.batch * p.heads
    outside = Stretch.of(side.parts[0].made.outside, options.num_warps, loops=False)
    share = 1 / len(side.parts)  # of what stands outside of the loops: dq and dkv are branches of one kernel
    for part in side.parts:
        full, partial = (Stretch.of(loop, part.num_warps) for loop in part.loops)
        made = part.made
        used = Resources(made.registers, made.spills, made.shared, part.num_warps, full, partial,
                         replace(outside, busy=share * outside.busy, alone=share * outside.alone))  # fmt: skip
        block_m, block_n = part.tile.block_m or 1, part.tile.block_n or 1
        resident, walked = (block_n, block_m) if part.by_keys else (block_m, block_n)
        programs = heads * (p.n_k if part.by_keys else p.n_q) / resident
        moved = ELEMENT * (2 + 2 * (direction == "backward")) * heads * (p.n_q + p.n_k) * p.head_dim
        work = Work(heads * part.counts[0], heads * part.counts[1], programs, 2 * walked * p.head_dim * ELEMENT, moved)
        total += seconds(used, work, target, about, units)
    return total


def rank(case: Case, direction: str, gpu: str) -> dict[str, Any]:
    """Where the default stands among all tiles that fit, with every tile's modelled seconds."""
    target, found = Target.named(gpu), dict[str, float]()
    for options in flex_kernels.every(direction, case.problem.head_dim, target):
        try:
            found[str(options)] = modelled(case, direction, options, gpu)
        except ScheduleError:
            continue
    default = str(flex_kernels.default(direction, case.problem.head_dim, target))
    order = sorted(found, key=found.__getitem__)
    return {
        "gpu": gpu,
        "direction": direction,
        "head_dim": case.problem.head_dim,
        "default": default,
        "rank": order.index(default) + 1 if default in found else None,
        "best": order[0],
        "modelled seconds": {name: found[name] for name in order},
    }


def run(say: Callable[[str], None], gpus: tuple[str, ...] = GPUS_RANKED) -> dict[str, Any]:
    """Every GPU, head dim and direction, on a causal mask."""
    causal = {case.problem.head_dim: case for case in cases() if case.name == "causal"}
    lines = []
    for gpu in gpus:
        for head_dim in HEAD_DIMS:
            for direction in ("forward", "backward"):
                line = rank(causal[head_dim], direction, gpu)
                lines.append(line)
                say(f"{gpu} d{head_dim:<3} {direction:8} {_said(line)}")
    return {"modelled": True, "setting": setting(", ".join(gpus)), "lines": lines}


def _said(line: Mapping[str, Any]) -> str:
    if line["rank"] is None:
        return f"{line['default']} does not fit"
    every = line["modelled seconds"]
    above = every[line["default"]] / every[line["best"]]
    return f"rank {line['rank']} of {len(every)}, {above:.2f} x the best"


def table(results: Mapping[str, Any]) -> str:
    """As Markdown."""
    met = sum(line["rank"] is not None and line["rank"] <= BEST for line in results["lines"])
    lines = [
        "# inductor's default tiles in the model's order: modelled",
        "FlexAttention's own kernels for a causal mask, B4 H16 N4096, bf16, in every tile that its autotuning searches, ranked by "
        "`attngen/backends/triton/modelled.py`. The defaults were chosen on the devices by torch's authors. "
        f"Among the first {BEST}: {met} of {len(results['lines'])}.",
        ", ".join(f"{name} {value}" for name, value in results["setting"].items()),
        "| GPU | head dim | direction | default | rank | the model's first |\n|---|---|---|---|---|---|",
    ]
    rows = [
        f"| {line['gpu']} | {line['head_dim']} | {line['direction']} | {line['default']} | {_said(line)} | {line['best']} |"
        for line in results["lines"]
    ]
    return "\n\n".join(lines) + "\n" + "\n".join(rows) + "\n"
