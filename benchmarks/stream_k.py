"""Decode schedules against each other: no split, fixed split-K, stream-K, on LeanAttention's cases (arXiv 2405.10480).

    python -m benchmarks.stream_k                          modelled for an H200: tiles over 132 SMs
    python -m benchmarks.stream_k --measure                and measured on this machine's GPU (on a CPU, at small sizes)
    python -m benchmarks.stream_k --json F --markdown F    write the results to files

The model counts bytes and nothing else: a program on each SM reads at its share of the bandwidth, or where fewer run at up to
--sm-rate, by default the same; the next program starts when one ends; a merge costs a launch and the bytes of the partial
states. It shows what balance is worth, not how good a kernel is.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attngen.balance import shared, stream_k
from attngen.reductions import even_splits
from benchmarks import report
from benchmarks.papers_beside import LEAN
from benchmarks.timing import Candidate, race, stopwatch_for

HEAD_DIM, ELEMENT, BLOCK_N = 128, 2, 64
TILE_BYTES = 2 * BLOCK_N * HEAD_DIM * ELEMENT  # k and v
SMS = 132
BANDWIDTH = 4.3e12  # bytes/s of an H200, measured by a copy
SHARE = BANDWIDTH / SMS  # bytes/s of an SM when all are busy; alone it draws more, by how much depends on the kernel
LAUNCH = 2.5e-6  # seconds of a second, dependent launch
FIXED = 16  # splits of the column that fixes them whatever the batch


@dataclass(frozen=True)
class Case:
    """One token for each sequence of a batch."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    heads_kv: int

    @property
    def group(self) -> int:
        """Query heads per kv head: the rows of an output."""
        return self.heads // self.heads_kv

    def smaller(self, factor: int) -> Case:
        """The same shape of batch, shorter."""
        lengths = tuple(max(1, n // factor) for n in self.lengths)
        return Case(f"{self.name}, lengths / {factor}", lengths, self.heads, self.heads_kv)

    def counts(self) -> list[int]:
        """Key tiles of each output, one output for each sequence and kv head."""
        return [-(-n // BLOCK_N) for n in self.lengths for _ in range(self.heads_kv)]


CASES = [
    Case(f"{name} H{heads}/{heads_kv}", lengths, heads, heads_kv)
    for (name, lengths), heads in zip(LEAN.items(), (64, 64, 32), strict=True)
    for heads_kv in (heads, 8)
]


# -- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Modelled:
    """One schedule of one case. seconds: of both launches; used: share of the bandwidth in the first; partials: bytes."""

    programs: int
    seconds: float
    used: float
    partials: int


def model(case: Case, split: int | str | None, sm_rate: float = SHARE) -> Modelled:
    """Seconds of a schedule on an H200, modelled. split: None, a number, or "stream" for stream-K over 132 programs."""
    counts = case.counts()
    state = case.group * (HEAD_DIM + 2) * 4
    if split == "stream":
        runs = stream_k(torch.tensor(counts), SMS)
        loads = (runs.begin[1:] - runs.begin[:-1]).tolist()
        several = shared(runs)
        states = int((runs.owners[:, 1] - runs.owners[:, 0] + 1)[several].sum())
    else:
        parts = 1 if split is None else int(split)
        loads = [share for count in counts for share in _shares(count, parts)]
        states = 0 if parts == 1 else len(loads)
    first = makespan([load * TILE_BYTES for load in loads], sm_rate)
    merge = LAUNCH + 2 * states * state / BANDWIDTH if states else 0.0
    used = sum(counts) * TILE_BYTES / BANDWIDTH / first if first else 1.0
    return Modelled(len(loads), first + merge, used, states * state)


def makespan(programs: Iterable[float], sm_rate: float = SHARE, slots: int = SMS) -> float:
    """Seconds until programs of so many bytes are done, started in their order as places come free."""
    waiting = [work for work in programs if work > 0][::-1]
    running: list[float] = []  # what every running program has read when this one ends
    time = read = 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            heapq.heappush(running, read + waiting.pop())
        ends = heapq.heappop(running)
        time += (ends - read) / min(sm_rate, BANDWIDTH / (len(running) + 1))
        read = ends
    return time


def schedules(case: Case) -> dict[str, int | str | None]:
    """The schedules that are compared, by name."""
    chosen = even_splits(len(case.counts()), max(case.counts()), SMS)
    return {"no split": None, "split-K, chosen": chosen, f"split-K, {FIXED}": FIXED, "stream-K": "stream"}


def _shares(count: int, parts: int) -> list[int]:
    each = -(-count // parts)
    return [max(0, min(each, count - n * each)) for n in range(parts)]


# -- on this machine --------------------------------------------------------------------------------------------------


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """Timings of the schedules and of SDPA on the padded batch, in turn, each checked against the oracle first."""
    import attngen as ag

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    longest = max(case.lengths)

    def draw(heads: int, length: int) -> torch.Tensor:
        shape = len(case.lengths), heads, length, HEAD_DIM
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    q, k, v = draw(case.heads, 1), draw(case.heads_kv, longest), draw(case.heads_kv, longest)
    length = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    spec = ag.Spec(mask="j < length[b]", tensors=[ag.Tensor("length", 1, torch.int32)])
    padding = (torch.arange(longest, device=device) < length.view(-1, 1)).view(-1, 1, 1, longest)
    want, _ = ag.oracle(spec, q[:, : case.group], k[:, :1], v[:, :1], length=length)

    def attngen(split: int | str | None) -> Any:
        attn = ag.compile(spec, schedule=ag.Schedule(split=split))
        return lambda _: attn(q, k, v, length=length)

    def sdpa(_: Any) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=padding, enable_gqa=True)

    runs = {"SDPA, padded": sdpa, **{name: attngen(split) for name, split in schedules(case).items()}}
    failed: dict[str, str] = {}
    with torch.no_grad():
        for name, run in runs.items():
            try:
                error = float((run(None)[:, : case.group].double() - want).abs().max())
            except Exception as problem:
                failed[name] = f"{type(problem).__name__}: {problem}"
                continue
            if not error <= (2e-3 if dtype == torch.float16 else 1e-5):
                failed[name] = f"wrong: largest error {error:.1e}"
        right = {name: Candidate(lambda: None, run) for name, run in runs.items() if name not in failed}
        timings, broken = race(right, stopwatch_for(device), seconds)
    found: dict[str, Any] = {name: asdict(timing) for name, timing in timings.items()}
    return {"case": case.name, "dtype": str(dtype), "timings": found, "failed": {**failed, **broken}}


# -- tables -----------------------------------------------------------------------------------------------------------


def modelled_table(cases: Sequence[Case], sm_rate: float = SHARE) -> tuple[str, list[dict[str, Any]]]:
    """As Markdown and as records."""
    records: list[dict[str, Any]] = []
    lines = [
        "| decode, fp16, d128, one query | tiles | bound | no split | split-K, chosen | split-K, 16 | stream-K "
        "| gain on chosen | gain on no split |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        tiles = sum(case.counts())
        bound = tiles * TILE_BYTES / BANDWIDTH
        found = {name: model(case, split, sm_rate) for name, split in schedules(case).items()}
        splits = {name: split for name, split in schedules(case).items() if isinstance(split, int)}
        each = [
            f"{1e6 * x.seconds:.0f} us ({x.used:.0%}{f', {splits[name]} splits' if 'chosen' in name else ''})"
            for name, x in found.items()
        ]
        stream = found["stream-K"].seconds
        gains = [f"{found[name].seconds / stream:.2f}x" for name in ("split-K, chosen", "no split")]
        lines.append("| " + " | ".join([case.name, f"{tiles:,}", f"{1e6 * bound:.0f} us", *each, *gains]) + " |")
        records.append(
            {"case": case.name, "tiles": tiles, "bound": bound, "splits": splits}
            | {"modelled": {name: asdict(x) for name, x in found.items()}}
        )
    title = (
        f"Modelled for an H200 (no measurement): {SMS} SMs, {BANDWIDTH / 1e12:.1f} TB/s, an SM at most "
        f"{sm_rate / 1e9:.0f} GB/s; in brackets the share of the bandwidth "
        "that the first launch uses. H is query heads / kv heads.\n\n"
    )
    return title + "\n".join(lines) + "\n", records


def measured_table(records: Sequence[dict[str, Any]], device: str) -> str:
    """As Markdown."""
    names = list(dict.fromkeys(name for record in records for name in [*record["timings"], *record["failed"]]))
    lines = [
        f"Measured on {device}, medians.\n",
        "| case | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for record in records:
        cells = [
            f"{1e6 * record['timings'][name]['median']:.0f} us"
            if name in record["timings"]
            else record["failed"][name][:60]
            for name in names
        ]
        lines.append(f"| {record['case']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; 1 if a measurement failed."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.stream_k", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure too")
    parser.add_argument("--sm-rate", type=float, default=SHARE / 1e9, metavar="GB/s", help="of one SM in the model")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--smaller", type=int, metavar="K", help="measure with lengths / K (default 1, on a CPU 32)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each case (default 1)")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--markdown", help="write the tables to this file")
    given = parser.parse_args(arguments)
    page, records = modelled_table(CASES, 1e9 * given.sm_rate)
    results: dict[str, Any] = {"modelled for": "NVIDIA H200", "sm rate": 1e9 * given.sm_rate, "modelled": records}
    print(page)
    failed = False
    if given.measure:
        name = given.device if given.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)
        smaller = given.smaller or (1 if name == "cuda" else 32)
        cases = [case if smaller == 1 else case.smaller(smaller) for case in CASES]
        measured = [measure(case, device, given.seconds) for case in cases]
        results |= {"setting": report.setting(device), "measured": measured}
        table = measured_table(measured, results["setting"]["device"])
        print(table)
        page += "\n" + table
        failed = any(record["failed"] for record in measured)
    if given.json:
        Path(given.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if given.markdown:
        Path(given.markdown).write_text(page, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
