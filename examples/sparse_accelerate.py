"""SparseAccelerate (arXiv 2412.06198): the attention of a prompt, each head in the pattern that an estimate finds for it at run
time, against dense causal attention on this machine: forward only, what the first token waits for. The heads have structure
to find: the first keys and the nearest, some columns, tiles that belong together. Theirs: 1.04x at 32k, of a whole model.

    python examples/sparse_accelerate.py [--n 8192 32768]
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F
from verdict import FLOAT32, here, relative, timed, verdict

import attngen as ag
from attngen.plan.keysets.estimate import KINDS

BLOCK = 64


def inputs(n: int, budget: int, dim: int = 64) -> tuple[torch.Tensor, ...]:
    """Three heads, of which each kind suits one."""
    random = torch.Generator().manual_seed(0)
    q, k = torch.zeros(2, 1, 3, n, dim)
    angle = torch.arange(n)[:, None] * 2.5 / budget * torch.rand(dim // 2 - 1, generator=random)
    q[0, 0, :, 2:] = k[0, 0, :, 2:] = 2 * torch.cat([angle.cos(), angle.sin()], -1)  # alike where near
    q[0, 0, :, 0] = k[0, 0, :4, 0] = 11.0
    q[0, 1, :, 0] = 8.0
    k[0, 1, torch.randperm(n, generator=random)[: budget // 4], 0] = k[0, 1, 0, 0] = 14.0
    tiles = -(-n // BLOCK)
    topic = torch.randperm(tiles, generator=random) // (budget // (2 * BLOCK))
    names = 10 * F.normalize(torch.randn(tiles, dim, generator=random), dim=-1)
    q[0, 2] = k[0, 2] = names[topic].repeat_interleave(BLOCK, 0)[:n]
    return q, k, torch.randn(1, 3, n, dim, generator=random)


def main(lengths: list[int], budget: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attn = ag.compile(ag.Spec(keys=ag.adaptive(BLOCK), mask=ag.causal()))
    print(f"{attn.spec}, {budget} keys a query\nB1 H3 D64 float32 on {device}, forward")
    for n in lengths:
        q, k, v = (x.to(device) for x in inputs(n, budget))

        def estimate(q: torch.Tensor = q, k: torch.Tensor = k) -> ag.Estimate:
            return ag.estimate(q, k, block=BLOCK, budget=budget)

        def error(out: torch.Tensor) -> list[float]:
            return ((out - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3)))[0].tolist()  # noqa: B023

        exact, dense = timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), 2)  # noqa: B023
        out, taken = timed(lambda: attn(q, k, v, estimate=estimate()), 2)  # noqa: B023
        print(f"  N {n}: dense {dense * 1e3:.1f} ms, estimate and attention {taken * 1e3:.1f} ms, {dense / taken:.2f}x")
        found = estimate()
        for head, (kind, own) in enumerate(zip(found.kind[0].tolist(), error(out), strict=True)):
            print(f"    head {head}: {KINDS[kind]:14} covers {found.mass[0, head, kind]:6.1%}, error {own:.1e}")
        for kind, name in enumerate(KINDS):
            forced = replace(found, kind=torch.full_like(found.kind, kind))
            errors = " ".join(f"{own:.1e}" for own in error(attn(q, k, v, estimate=forced)))
            print(f"    all heads {name:14}: error {errors}")
    # What is left out is a choice; the attention over the rest is exact.
    few = [x[:, :, : 8 * BLOCK] for x in (q, k, v)]
    chosen = ag.estimate(*few[:2], block=BLOCK, budget=4 * BLOCK)
    want, _ = ag.oracle(attn.spec, *few, estimate=chosen)
    verdict(
        "matches the definition of the patterns chosen",
        relative(attn(*few, estimate=chosen), want),
        FLOAT32,
        f"off dense attention by at most {max(error(out)):.1e} in a head",
        f"about {n / (2 * budget):.1f}x fewer pairs at N {n}",
        f"{taken / dense:.2f}x SDPA's time on {here()}, with the estimate",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[8192, 32768], help="lengths")
    parser.add_argument("--budget", type=int, default=1024, help="keys that a query visits")
    args = parser.parse_args()
    main(args.n, args.budget)
