"""Hybrid Dynamic Pruning (arXiv 2407.12893): a cheap score of averaged rows, in 8-bit integers, keeps the best tiles of each row
of tiles and gates whole heads at run time, against dense causal attention on this machine. Forward, with the scoring at every
call. 6 heads see tiles that belong together, scattered over the sequence; 2 see everything alike, and are the ones to gate.

    python examples/pruning.py [--n 8192]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from verdict import FLOAT32, here, relative, timed, verdict

import attngen as ag

BLOCK, HEADS, FLAT = 64, 8, 2


def inputs(n: int, dim: int = 64) -> tuple[torch.Tensor, ...]:
    """Each tile of a head has one of 16 topics, in q, k and v; the last heads have none, and small rows."""
    random = torch.Generator().manual_seed(0)
    topics = 10 * F.normalize(torch.randn(16, dim, generator=random), dim=-1)
    topic = torch.randint(0, 16, (1, HEADS, -(-n // BLOCK)), generator=random).repeat_interleave(BLOCK, -1)[..., :n]
    q, k, v = torch.randn(3, 1, HEADS, n, dim, generator=random)
    real = (torch.arange(HEADS) < HEADS - FLAT).float()[:, None, None]
    return real * (topics[topic] + q / 4), real * (topics[topic] + k / 4), real * topics[topic] / 4 + v


def main(n: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (x.to(device) for x in inputs(n))
    exact, dense = timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), 3)
    print(f"dense causal, N {n}, B1 H{HEADS} D64 float32, {device}: {dense * 1e3:.1f} ms")
    tiles = -(-n // BLOCK)
    whole = float("nan")
    for keep, heads in ((1.0, 1.0), (0.5, 1.0), (0.25, 1.0), (0.125, 1.0), (0.25, 1 - FLAT / HEADS)):
        attn = ag.compile(ag.Spec(keys=ag.pruned(keep, (BLOCK, BLOCK), heads), mask=ag.causal()))
        live = attn.plan(q, k, v).values["query_runs"][..., 1:].sum((2, 3)).expand(1, HEADS)  # tiles of each head
        out, taken = timed(lambda: attn(q, k, v), 3)  # noqa: B023
        whole = relative(out, exact) if keep == heads == 1.0 else whole
        share = int(live.sum()) / (HEADS * tiles * (tiles + 1) / 2)
        print(
            f"  keep {keep:5.1%}: {share:6.1%} of the tiles, {int((live == 0).sum())} heads gated, {taken * 1e3:7.1f} ms, "
            f"{dense / taken:4.1f}x, error {((out - exact).norm() / exact.norm()).item():.1e}"
        )
    # What is kept is a choice; the attention over it is exact.
    few = [x[:, :, :512] for x in (q, k, v)]
    want, _ = ag.oracle(attn.spec, *few)
    error = relative(attn(*few), want)
    print(f"the last of these, over the first {few[0].shape[2]} rows, to its definition in float64: error {error:.1e}")
    verdict(
        "matches dense attention where all is kept, and its definition where not",
        max(whole, error),
        FLOAT32,
        f"{1 / share:.1f}x fewer pairs with {keep:.0%} of the tiles and {FLAT} heads gated",
        f"{taken / dense:.2f}x SDPA's time on {here()}",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=8192, help="length")
    main(parser.parse_args().n)
