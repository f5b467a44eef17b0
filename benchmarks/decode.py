"""Decoding on the CPU against PyTorch's SDPA: a ragged batch in a padded cache, and samples that share a long context.

    python -m benchmarks.decode                                  both figures
    python -m benchmarks.decode --only ragged --rounds 5         one of them
    python -m benchmarks.decode --json decode.json --markdown decode.md

float32, Hq 32, Hkv 8, D 128, one query for each sequence. The candidates run in turn, in one process, and each result is
compared with float64 attention over the sequence's own keys before anything is timed. The ragged batch holds 4.3 GB of keys
and values: where that does not fit twice, the heads are halved until it does, and the figure's name says so.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.papers_beside import CONTEXT, RAGGED, SUFFIX
from benchmarks.report import Line, save
from benchmarks.timing import interleaved, ratio

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SAMPLES = 16
SPARE = 2.0  # times the inputs' bytes that must be free
LIMIT = 1e-5  # relative error allowed

Attention = Callable[[], torch.Tensor]


def ragged(rounds: int, shrink: int = 1) -> Line:
    """One query of each of 8 sequences against its keys in a cache that is padded to the longest."""
    import attngen as ag

    lengths = [max(1, n // shrink) for n in RAGGED]
    heads, kv_heads, note = fitting(len(lengths) * max(lengths))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(lengths), heads, 1, HEAD_DIM, generator=generator)
    k, v = (torch.randn(len(lengths), kv_heads, max(lengths), HEAD_DIM, generator=generator) for _ in "kv")
    length = torch.tensor(lengths, dtype=torch.int32)
    attn = ag.compile(ag.Spec())
    mask = (torch.arange(max(lengths)) < length[:, None])[:, None, None]

    def by_sequence() -> torch.Tensor:
        """What a user can do without attngen and without padding."""
        parts = [
            F.scaled_dot_product_attention(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], enable_gqa=True)
            for b, n in enumerate(lengths)
        ]
        return torch.cat(parts)

    candidates: dict[str, Attention] = {
        "attngen": lambda: attn(q, k, v, k_len=length),
        "SDPA, padded": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
        "SDPA, a call for each sequence": by_sequence,
    }
    expected = torch.stack([exact(q[b], k[b, :, :n], v[b, :, :n]) for b, n in enumerate(lengths)])
    name = f"decode B{len(lengths)} Hq{heads} Hkv{kv_heads} D{HEAD_DIM}, lengths {min(lengths)} to {max(lengths)}{note}"
    return compared(f"{name}: against SDPA on the padded batch", candidates, expected, 2.0, rounds)


def shared(rounds: int, shrink: int = 1) -> Line:
    """One query of each of 16 samples against a context that all share and the tokens each has drawn since."""
    import attngen as ag

    context = CONTEXT // shrink
    suffixes = [max(1, (SUFFIX - 24 + 3 * n) // shrink) for n in range(SAMPLES)]
    heads, kv_heads, note = fitting(SAMPLES * (context + max(suffixes)))
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, HEAD_DIM, generator=generator)

    q = random(SAMPLES, heads, 1)
    prefix_k, prefix_v = random(1, kv_heads, context), random(1, kv_heads, context)
    k, v = random(SAMPLES, kv_heads, max(suffixes)), random(SAMPLES, kv_heads, max(suffixes))
    suffix = torch.tensor(suffixes, dtype=torch.int32)
    whole_k, whole_v = (torch.cat([a.expand(SAMPLES, -1, -1, -1), b], 2) for a, b in ((prefix_k, k), (prefix_v, v)))
    mask = (torch.arange(whole_k.shape[2]) < context + suffix[:, None])[:, None, None]
    attn = ag.compile(ag.Spec(keys=ag.shared_prefix()))
    candidates: dict[str, Attention] = {
        "attngen": lambda: attn(q, k, v, prefix_k=prefix_k, prefix_v=prefix_v, k_len=suffix),
        "SDPA, prefix repeated": lambda: F.scaled_dot_product_attention(
            q, whole_k, whole_v, attn_mask=mask, enable_gqa=True
        ),
    }
    ends = [context + n for n in suffixes]
    expected = torch.stack([exact(q[b], whole_k[b, :, :n], whole_v[b, :, :n]) for b, n in enumerate(ends)])
    name = f"{SAMPLES} samples over {context} shared keys, Hq{heads} Hkv{kv_heads} D{HEAD_DIM}{note}"
    return compared(f"{name}: against SDPA with the prefix repeated", candidates, expected, 3.0, rounds)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One sequence in float64: q [Hq, 1, D], k and v [Hkv, n, D] -> [Hq, 1, D]."""
    rows = q.double().view(k.shape[0], -1, q.shape[2])
    out = torch.empty_like(rows)
    for head, (key, value) in enumerate(zip(k, v, strict=True)):
        out[head] = torch.softmax(rows[head] @ key.double().T * q.shape[2] ** -0.5, -1) @ value.double()
    return out.view(q.shape)


def compared(
    name: str, candidates: Mapping[str, Attention], expected: torch.Tensor, target: float, rounds: int
) -> Line:
    """Check, then time in turns. RuntimeError for a candidate that is wrong. The line has the peak of this process's memory."""
    with torch.no_grad():
        errors = {who: float((run().double() - expected).norm() / expected.norm()) for who, run in candidates.items()}
        for who, error in errors.items():
            if not error <= LIMIT:
                raise RuntimeError(f"{who} is wrong: relative error {error:.1e}, at most {LIMIT:g} is allowed")
        timings = interleaved(candidates, rounds, warmup=1)
    ours, peer = list(candidates)[:2]
    measured: dict[str, Any] = {who: asdict(t) for who, t in timings.items()}
    measured |= {f"error of {who}": error for who, error in errors.items()}
    measured["peak memory, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return Line(name, ratio(timings, ours, peer), "x", target, True, measured)


def fitting(keys: int) -> tuple[int, int, str]:
    """Query and kv heads for which that many keys and values (over the batch) fit, and a remark if they are fewer."""
    heads, kv_heads, free = HEADS, KV_HEADS, free_bytes()
    while kv_heads > 1 and free is not None and SPARE * keys * kv_heads * HEAD_DIM * 8 > free:
        heads, kv_heads = heads // 2, kv_heads // 2
    return heads, kv_heads, "" if kv_heads == KV_HEADS else f" (fewer heads: {free / 1e9:.1f} GB of memory are free)"


def free_bytes() -> int | None:
    """Memory that a process can have now; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


FIGURES: dict[str, Callable[[int], Line]] = {"ragged": ragged, "shared prefix": shared}


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 1 if one misses its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FIGURES, metavar="FIGURE", help=f"some of: {', '.join(FIGURES)}")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each candidate (default 5)")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--markdown", help="write a table to this file")
    given = parser.parse_args(arguments)
    lines = []
    for name in given.only or FIGURES:
        line = FIGURES[name](given.rounds)
        lines.append(line)
        print(line, flush=True)
        for what, value in line.measured.items():
            if isinstance(value, dict):
                shown = f"{1e3 * value['median']:.1f} ms ({1e3 * value['p20']:.1f} .. {1e3 * value['p80']:.1f})"
                print(f"    {what}: {shown}", flush=True)
            else:
                print(f"    {what}: {value:.2g}", flush=True)
    save(lines, given.json, given.markdown)
    return 0 if all(line.met for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
