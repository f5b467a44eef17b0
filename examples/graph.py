"""Graph-processing attention (arXiv 2502.01659): near, dilated and global tokens as the edges of a graph, in CSR or networkx,
against dense attention on this machine, forward and backward with 4 heads (theirs: forward, one head); and the bytes of a
token, which say how many fit: theirs are 516 (D64, float16, a pattern without lists) and 160M tokens on an A100.

    python examples/graph.py [--n 1024 4096 16384]
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import networkx
import torch
import torch.nn.functional as F
from verdict import GRADIENT, here, verdict

import attngen as ag

REACH, APART, GLOBAL = 16, 32, 2  # neighbours on each side, next to each other and so far apart; tokens that see all
DENSE = 4096  # the longest length for dense attention


def edges(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Who sees whom, each pair once, row by row: rows and columns."""
    near, every, few = torch.arange(-REACH, REACH + 1), torch.arange(n)[:, None], torch.arange(GLOBAL)
    pairs = [(every, every + near), (every, every + APART * near), (every, few), (few, every)]
    code = torch.cat([(i * n + j)[(j >= 0) & (j < n) & (i >= 0)] for i, j in pairs]).unique()
    return code // n, code % n


def seen(i: torch.Tensor, n: int) -> torch.Tensor:
    """The same as a mask [rows i, n], from its definition."""
    i, j = i[:, None], torch.arange(n, device=i.device)
    far = (i - j).abs()
    return (far <= REACH) | ((far % APART == 0) & (far <= APART * REACH)) | (i < GLOBAL) | (j < GLOBAL)


def timed(run: Any, leaves: list[torch.Tensor], d_out: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    """out and the gradients of q, k and v; seconds, the better of two."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        out = run(*leaves)
        results = [out.detach(), *torch.autograd.grad(out, leaves, d_out)]
        if out.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return results, min(times)


def main(lengths: list[int]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    graph = ag.compile(ag.Spec(keys=ag.graph()))
    closed = ag.window(REACH + 1) | ag.dilated_window(REACH + 1, APART) | ag.global_tokens(GLOBAL)
    masked = ag.compile(ag.Spec(mask=closed))
    errors: list[float] = []
    same, compared = True, ""
    print(f"B1 H4 D64 float32 on {device}, forward + backward; error: the largest of out and gradients, to float64")
    for n in lengths:
        torch.manual_seed(0)
        leaves = [torch.randn(1, 4, n, 64, device=device, requires_grad=True) for _ in range(3)]
        # The gradient comes from a few rows: the exact attention is theirs only, at any length.
        rows = torch.linspace(0, n - 1, 64, device=device).long().unique()
        d_out = torch.zeros_like(leaves[0])
        d_out[:, :, rows] = torch.randn(1, 4, len(rows), 64, device=device)
        q, k, v = exact = [x.detach().double().requires_grad_() for x in leaves]
        out = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=seen(rows, n))
        want = [out, *torch.autograd.grad(out, exact, d_out[:, :, rows].double())]

        i, j = edges(n)
        csr = dict(crow=F.pad(i.bincount(minlength=n).cumsum(0), (1, 0)).to(device), col=j.to(device))
        runs = {"graph": partial(graph, **csr), "as a mask": masked}
        if n <= DENSE:
            mask = seen(torch.arange(n, device=device), n)
            runs["dense SDPA"] = partial(F.scaled_dot_product_attention, attn_mask=mask)
        print(f"  N {n}, {len(j) / n:.1f} edges a token")
        times: dict[str, float] = {}
        for name, run in runs.items():
            got, taken = timed(run, leaves, d_out)
            got[0] = got[0][:, :, rows]
            worst = max(((x - y).norm() / y.norm()).item() for x, y in zip(got, want, strict=True))
            errors.append(worst)
            times[name] = taken
            print(f"    {name:10} {taken * 1e3:8.1f} ms, {taken / n * 1e6:6.1f} us a token, error {worst:.1e}")

        plan = graph.plan(*leaves, **csr).values  # of both directions; a forward reads the lists of queries
        lists = sum(x.nbytes for name, x in plan.items() if name.startswith("query_")) / n
        if n == lengths[0]:
            nodes = networkx.DiGraph(zip(i.tolist(), j.tolist(), strict=True))
            same = torch.equal(graph(*leaves, graph=nodes), graph(*leaves, **csr))
            print(f"    from networkx, the same result: {same}")
        if "dense SDPA" in times:
            compared = f"{times['graph'] / times['dense SDPA']:.2f}x SDPA's time at N {n} on {here()}"
    for name, size in (("graph", 516 + lists), ("as a mask", 516)):
        print(
            f"forward of one head, D64, float16, {name}: {size:.0f} bytes a token, {80 * 2**30 / size / 1e6:.0f}M in 80 GiB"
        )
    verdict(
        "matches dense attention over the edges, gradients included; from networkx as from CSR",
        max(errors) if same else float("inf"),
        GRADIENT,
        f"{n * n / len(j):.1f}x fewer pairs at N {n}",
        *filter(None, [compared]),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[1024, 4096, 16384], help="lengths")
    main(parser.parse_args().n)
