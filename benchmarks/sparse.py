"""Sparse key sets on the CPU against dense causal SDPA: forward and backward, preparation included.

    python -m benchmarks.sparse                          all figures at N 16384, B1 H8 D64 float32
    python -m benchmarks.sparse --only hyper --n 65536   one, at another length
    python -m benchmarks.sparse --shares                 time against the live share of pairs

The candidates run in turn, in one process. Targets are those for N 16384 (HyperAttention also has one for 65536).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.report import Line, save
from benchmarks.timing import interleaved, ratio

HEADS, HEAD_DIM, BUCKETS = 8, 64, 16
TARGETS = {"qk 50%": 2.5, "qk 30%": 6.0, "hash": 5.0, "block 10%": 6.0, "hyper": 2.0}
SHARES = (0.5, 0.25, 0.1, 0.05)  # of the causal pairs


def candidates(n: int, leaves: list[torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    """Forward calls by name; what a call needs besides q, k, v is part of it, except for the masks of what to keep."""
    import attngen as ag

    kept = ag.compile(ag.Spec(keys=ag.qk_sparse(), mask=ag.causal()))
    hashed = ag.compile(ag.Spec(keys=ag.hash_sparse(BUCKETS), mask=ag.causal()))
    hyper = ag.compile(ag.Spec(keys=ag.hyper(256, 256, 4096), mask=ag.causal()))
    blocks = ag.compile(ag.Spec(keys=ag.block_sparse((128, 128)), mask=ag.causal()))
    q, k, v = leaves

    def qk(share: float) -> Callable[[], torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        keep_q, keep_k = (torch.rand(1, HEADS, n, generator=generator) < share for _ in range(2))
        return lambda: kept(q, k, v, keep_q=keep_q, keep_k=keep_k)

    def block(share: float) -> Callable[[], torch.Tensor]:
        live = layout(n // 128, share)
        return lambda: blocks(q, k, v, layout=live)

    def by_hash() -> torch.Tensor:
        q_bucket, k_bucket = ag.lsh_buckets(q, k, BUCKETS)
        return hashed(q, k, v, q_bucket=q_bucket, k_bucket=k_bucket)

    return {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "qk 50%": qk(0.5),
        "qk 30%": qk(0.3),
        "hash": by_hash,
        "hyper": lambda: hyper(q, k, v, seed=0),
        "block 10%": block(0.1),
        **{f"qk, {share:.0%} of the pairs": qk(share**0.5) for share in SHARES},
        **{f"block, {share:.0%} of the tiles": block(share) for share in SHARES},
    }


def layout(tiles: int, share: float) -> torch.Tensor:
    """A random share of the causal tiles of each head: bool [1, HEADS, tiles, tiles]."""
    generator = torch.Generator().manual_seed(1)
    live = torch.zeros(1, HEADS, tiles, tiles, dtype=torch.bool)
    below = torch.ones(tiles, tiles).tril().nonzero()
    for head in range(HEADS):
        row, column = below[torch.randperm(len(below), generator=generator)[: round(share * len(below))]].unbind(1)
        live[0, head, row, column] = True
    return live


def measure(n: int, names: list[str], rounds: int) -> dict[str, Any]:
    """Timings of forward and backward, interleaved."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, HEADS, n, HEAD_DIM, generator=generator).requires_grad_() for _ in range(3)]
    seed = torch.randn(1, HEADS, n, HEAD_DIM, generator=generator)
    found = candidates(n, leaves)

    def both(run: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(run(), leaves, seed)

    return interleaved({name: both(found[name]) for name in names}, rounds, warmup=1)


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 1 if one misses its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=TARGETS, metavar="FIGURE", help=f"some of: {', '.join(TARGETS).replace('%', '%%')}"
    )
    parser.add_argument("--n", type=int, default=16384, help="length (default 16384)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each candidate (default 3)")
    parser.add_argument(
        "--shares", action="store_true", help="QK-sparse and block-sparse at 50%% to 5%%, time per live pair"
    )
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--markdown", help="write a table to this file")
    given = parser.parse_args(arguments)
    lines: list[Line] = []
    if given.shares:
        for names in (
            {f"qk, {share:.0%} of the pairs": share for share in SHARES},
            {f"block, {share:.0%} of the tiles": share for share in SHARES},
        ):
            timings = measure(given.n, list(names), given.rounds)
            base = timings[next(iter(names))].median / SHARES[0]
            for name, share in names.items():
                figure, measured = timings[name].median / share / base, {name: asdict(timings[name])}
                what = f"{name}: time per live pair over that at {SHARES[0]:.0%}, N {given.n}"
                lines.append(Line(what, figure, "x", 1.25, False, measured))
    else:
        names = given.only or list(TARGETS)
        timings = measure(given.n, ["dense", *names], given.rounds)
        for name in names:
            target = 6.0 if name == "hyper" and given.n >= 65536 else TARGETS[name]
            measured = {x: asdict(timings[x]) for x in ("dense", name)}
            what = f"{name}, forward + backward, N {given.n}: against dense causal SDPA"
            lines.append(Line(what, ratio(timings, name, "dense"), "x", target, True, measured))
    for line in lines:
        print(line)
        for what, value in line.measured.items():
            print(f"    {what}: {value['median']:.2f} s ({value['best']:.2f} at best)")
    save(lines, given.json, given.markdown)
    return 0 if all(line.met for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
