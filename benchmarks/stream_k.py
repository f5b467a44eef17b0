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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import attngen as ag
from attngen.language.call import bind
from attngen.plan.stream_k import shared, stream_k
from attngen.schedule.decode import even_splits
from benchmarks import peers, report
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


def model(case: Case, split: int | str, sm_rate: float = SHARE) -> Modelled:
    """Seconds of a schedule on an H200, modelled. split: how many, 1 for none, or "stream" for stream-K over 132 programs."""
    counts = case.counts()
    state = case.group * (HEAD_DIM + 2) * 4
    if split == "stream":
        runs = stream_k(torch.tensor(counts), SMS)
        loads = (runs.begin[1:] - runs.begin[:-1]).tolist()
        several = shared(runs)
        states = int((runs.owners[:, 1] - runs.owners[:, 0] + 1)[several].sum())
    else:
        parts = int(split)
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


def schedules(case: Case) -> dict[str, int | str]:
    """The splits that are compared, by name. All are pinned: left open, the model decides, and it may be for stream-K."""
    chosen = even_splits(len(case.counts()), max(case.counts()), SMS)
    return {"no split": 1, "split-K, chosen": chosen, f"split-K, {FIXED}": FIXED, "stream-K": "stream"}


def _shares(count: int, parts: int) -> list[int]:
    each = -(-count // parts)
    return [max(0, min(each, count - n * each)) for n in range(parts)]


# -- on this machine --------------------------------------------------------------------------------------------------


SPEC = ag.Spec(mask="j < length[b]", tensors=[ag.Tensor("length", 1, torch.int32)])
LIMITS = {torch.float16: 3e-3, torch.float32: 1e-5}  # relative error allowed
REPEATED = (
    "SDPA's efficient backend takes no groups of heads: keys and values are repeated for them, inside the timing."
)


@dataclass(frozen=True, eq=False)
class Batch:
    """q [B, Hq, 1, D], k and v [B, Hkv, longest, D], length int32 [B]: the case's cache, padded."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    length: torch.Tensor

    @classmethod
    def draw(cls, case: Case, device: torch.device, dtype: torch.dtype) -> Batch:
        """Random normal values."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(heads: int, length: int) -> torch.Tensor:
            shape = len(case.lengths), heads, length, HEAD_DIM
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        longest = max(case.lengths)
        q, k, v = draw(case.heads, 1), draw(case.heads_kv, longest), draw(case.heads_kv, longest)
        return cls(q, k, v, torch.tensor(case.lengths, dtype=torch.int32, device=device))

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def on_gpu(self) -> bool:
        """Whether SDPA has its GPU backends."""
        return self.q.device.type == "cuda"

    @property
    def note(self) -> str:
        """What a reader of the timings has to know."""
        return REPEATED if self.on_gpu and self.group > 1 else ""

    def run(self, attn: ag.CompiledAttention) -> Callable[[Any], torch.Tensor]:
        """attngen on it."""
        return lambda _: attn(self.q, self.k, self.v, length=self.length)

    def expected(self) -> torch.Tensor:
        """float64 [2, B, group, 1, D]: the heads of the first and the last kv head."""
        ends = (slice(0, self.group), slice(0, 1)), (slice(-self.group, None), slice(-1, None))
        of_end = [ag.oracle(SPEC, self.q[:, h], self.k[:, kv], self.v[:, kv], length=self.length)[0] for h, kv in ends]
        return torch.stack(of_end)

    def error(self, out: torch.Tensor, expected: torch.Tensor) -> float:
        """The largest relative error (Frobenius) of any sequence: a long one's values are far smaller than a short's."""
        got = torch.stack([out[:, : self.group], out[:, -self.group :]]).double()
        return float(((got - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)).max())


def pinned(split: int | str) -> ag.CompiledAttention:
    """attngen with that split, whatever it would choose."""
    return ag.compile(SPEC, schedule=ag.Schedule(split=split))


def sdpa(batch: Batch) -> tuple[str, Callable[[Any], torch.Tensor]]:
    """SDPA on the padded batch, its name and its run: on a GPU with a fused backend that takes a mask, since left to itself
    it gives groups of heads with a mask to the unfused one.
    """
    longest = batch.k.shape[2]
    padding = (torch.arange(longest, device=batch.q.device) < batch.length.view(-1, 1)).view(-1, 1, 1, longest)
    if not batch.on_gpu:
        return "SDPA, padded", lambda _: peers.grouped(batch.q, batch.k, batch.v, attn_mask=padding)

    def efficient(_: Any) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return peers.repeated(batch.q, batch.k, batch.v, attn_mask=padding)

    return "SDPA efficient, padded", efficient


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """Timings of the schedules and of SDPA on the padded batch, in turn, each checked against the oracle first."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    batch = Batch.draw(case, device, dtype)
    compiled = {name: pinned(split) for name, split in schedules(case).items()}
    call = bind(SPEC, batch.q, batch.k, batch.v, captures={"length": batch.length})
    splits = {name: attn.specialiser.of(call).schedule.split for name, attn in compiled.items()}
    runs = dict([sdpa(batch), *((name, batch.run(attn)) for name, attn in compiled.items())])
    expected, failed = batch.expected(), dict[str, str]()
    with torch.no_grad():
        for name, run in runs.items():
            try:
                error = batch.error(run(None), expected)
            except Exception as problem:
                failed[name] = f"{type(problem).__name__}: {problem}"
                continue
            if not error <= LIMITS[dtype]:
                failed[name] = f"wrong: relative error {error:.1e}"
        right = {name: Candidate(lambda: None, run) for name, run in runs.items() if name not in failed}
        raced = race(right, stopwatch_for(device), seconds)
    found: dict[str, Any] = {name: asdict(timing) for name, timing in raced.timings.items()}
    return {"case": case.name, "dtype": str(dtype), "note": batch.note, "splits": splits, "timings": found} | {
        "failed": {**failed, **raced.failed}
    }


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
        splits = {name: split for name, split in schedules(case).items() if name.startswith("split-K")}
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
    lines += [f"\n{note}" for note in dict.fromkeys(record["note"] for record in records) if note]
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
