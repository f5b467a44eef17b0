"""Block-sparse FlashAttention (arXiv 2205.14135): butterfly attention against dense attention on this machine, forward and
backward, with the preparation of the lists of tiles at every call. Dense time grows with N^2, butterfly with N log N.

    python examples/block_sparse.py [--n 1024 2048 4096 8192]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from verdict import FLOAT16, FLOAT32, here, relative, timed, verdict

import attngen as ag


def main(lengths: list[int]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    attn = ag.compile(ag.Spec(keys=ag.butterfly((128, 128))))
    print(f"B1 H8 D64 {dtype} on {device}, forward + backward, not causal")
    errors, fewer, slower = [], [], []
    for n in lengths:
        torch.manual_seed(0)
        q, k, v = leaves = [torch.randn(1, 8, n, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        plan = attn.plan(q, k, v)
        live = int(plan.values["query_runs"][..., 1:].sum())  # one list, shared by all heads
        _, dense = timed(lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), leaves), 3)  # noqa: B023
        _, sparse = timed(lambda: torch.autograd.grad(attn(q, k, v).sum(), leaves), 3)  # noqa: B023
        tile = torch.arange(min(n, 1024), device=device) // 128  # the first rows, from the definition
        apart = torch.arange(-(-n // 128), device=device)[:, None] ^ torch.arange(-(-n // 128), device=device)
        seen = ((apart & (apart - 1)) == 0)[tile].repeat_interleave(128, 1)[:, :n]
        want = F.scaled_dot_product_attention(q[:, :, : len(tile)].double(), k.double(), v.double(), attn_mask=seen)
        errors.append(relative(attn(q, k, v)[:, :, : len(tile)], want))
        fewer.append((-(-n // 128)) ** 2 / live)
        slower.append(sparse / dense)
        print(
            f"  N {n:6}: {live / (-(-n // 128)) ** 2:6.1%} of the tiles live, dense {dense * 1e3:8.1f} ms, "
            f"butterfly {sparse * 1e3:8.1f} ms, {dense / sparse:.1f}x; lists {plan.nbytes / 1024:.0f} KiB"
        )
    verdict(
        "matches dense attention over the butterfly's tiles",
        max(errors),
        FLOAT32 if dtype == torch.float32 else FLOAT16,
        f"{fewer[-1]:.1f}x fewer pairs at N {lengths[-1]}",
        f"{slower[-1]:.2f}x SDPA's time on {here()}",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="lengths")
    main(parser.parse_args().n)
