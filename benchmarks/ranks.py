"""Whether the model ranks tiles as the clock does: Spearman's correlation of modelled cycles and measured times.

python -m benchmarks.ranks --out FILE.json      on a GPU; used by `python -m benchmarks gpu_day`
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import attngen as ag
from attngen.language.schedule import Tile
from attngen.schedule import Target
from attngen.schedule.choice import generator_hash
from attngen.tuning.stopwatch import Candidate
from benchmarks import machine_code
from benchmarks.suite import write_json
from benchmarks.timing import race, stopwatch_for
from benchmarks.workload import captures as workload_captures

CASES = (("causal", 128), ("causal", 64), ("causal documents", 128), ("window", 128))
SHAPE = (2, 16, 4096)  # batch, heads, length


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Of two lists of one length: Pearson's correlation of their ranks, equal values sharing one; nan where all are equal."""
    ranked = torch.tensor([_ranks(a), _ranks(b)], dtype=torch.float64)
    return float(torch.corrcoef(ranked)[0, 1]) if len(a) > 1 else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(x < value for x in values) + (sum(x == value for x in values) - 1) / 2 for value in values]


def tiles(name: str, head_dim: int, target: str, most: int) -> dict[Tile, float]:
    """Forward tiles of a spec without spills, with their modelled cycles."""
    found: dict[Tile, float] = {}
    for tile in machine_code.candidates("forward", head_dim, Target.named(target)):
        made = machine_code.tried(name, "forward", tile, target, head_dim)
        if made and not made["spills"] and len(found) < most:
            found[tile] = machine_code.cycles(name, "forward", tile, made, target, head_dim)
    return found


def measured(name: str, head_dim: int, found: Sequence[Tile], device: torch.device, seconds: float) -> list[float]:
    """Medians of the forward, in the laps of one race."""
    batch, heads, n = SHAPE if device.type == "cuda" else (1, 1, 256)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(batch, heads, n, head_dim, device=device, dtype=dtype) for _ in range(3))
    spec = machine_code.SPECS[name]
    captures = {key: value[:, :n].to(device) if isinstance(value, torch.Tensor) else value
                for key, value in workload_captures(spec).items()}  # fmt: skip
    backend = "auto" if device.type == "cuda" else "interpret"
    runs = {}
    for number, tile in enumerate(found):
        attn = ag.compile(spec, backend=backend, schedule=ag.Schedule(forward=tile))
        runs[str(number)] = Candidate(lambda: None, lambda _, attn=attn: attn(q, k, v, **captures))
    raced = race(runs, stopwatch_for(device), seconds)
    for number, reason in raced.failed.items():
        print(f"{found[int(number)]}: {reason}", flush=True)
    return [raced.timings[number].median if number in raced.times else math.inf for number in runs]


def main(arguments: list[str] | None = None) -> int:
    """Writes one entry a case as it goes, behind those that are there: 0 when all cases have one of this device and these kernels, 1 when
    some are left.
    """
    parser = argparse.ArgumentParser("python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--rehearse", action="store_true", help="interpreted, on a CPU, two tiles of one case")
    given = parser.parse_args(arguments)
    device = torch.device("cpu" if given.rehearse else "cuda")
    target = "sm_90" if given.rehearse else Target.of_device(device).name
    begun, entries = time.monotonic(), list[dict[str, Any]]()
    if given.out.is_file():
        entries = json.loads(given.out.read_text(encoding="utf-8"))
    made_by = {"target": target, "kernels": generator_hash("interpret" if given.rehearse else "triton")}
    known = {(entry["case"], entry["head_dim"]) for entry in entries if made_by.items() <= entry.items()}
    for name, head_dim in CASES[: 1 if given.rehearse else len(CASES)]:
        if (name, head_dim) in known:
            continue
        if time.monotonic() - begun > given.seconds:
            return 1
        modelled = tiles(name, head_dim, target, 2 if given.rehearse else 12)
        times = measured(name, head_dim, list(modelled), device, 0.1 if given.rehearse else 3.0)
        entry = {
            "case": name,
            "head_dim": head_dim,
            **made_by,
            "spearman": spearman(list(modelled.values()), times),
            "tiles": [
                [str(tile), cycles, seconds] for (tile, cycles), seconds in zip(modelled.items(), times, strict=True)
            ],
        }
        entries.append(entry)
        write_json(given.out, entries)
        print(f"{name} d{head_dim}: Spearman {entry['spearman']:.2f} of {len(times)} tiles", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
