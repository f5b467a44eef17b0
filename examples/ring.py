"""Sequence parallel attention (Ring Attention, arXiv 2310.01889): four processes with a shard of the sequence each, on the CPU
over gloo; on GPUs it is the same with NCCL. Checks out and gradients against one process and shows how the work is shared.

    python examples/ring.py [--n 4096]
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from verdict import GRADIENT, verdict

import attngen as ag

WORLD = 4
MASKS = {"causal": ag.Spec(mask=ag.causal()), "causal, window 512": ag.Spec(mask=ag.causal() & ag.window(512))}


def work(rank: int, folder: str, n: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    q, k, v = whole = [torch.randn(1, heads, n, 64, requires_grad=True) for heads in (8, 2, 2)]
    errors, balances = [], {}
    for name, spec in MASKS.items():
        attn = ag.compile(spec)
        want = attn(q, k, v)
        want_grads = torch.autograd.grad(want.square().sum(), whole)
        for layout in ("contiguous", "paired"):
            own = [ag.shard(x.detach(), rank, WORLD, layout).requires_grad_() for x in whole]
            ring = ag.ring(attn, layout=layout)
            shards = ring.shards(*own)  # once for all layers and steps of these lengths
            out = ring(*own, shards=shards)
            grads = torch.autograd.grad(out.square().sum(), own)

            # Without the graph, which has hold of the process group: gloo's thread lets go of what it reduced in its own time.
            pairs = zip([out.detach(), *grads], [want.detach(), *want_grads], strict=True)
            worst = max((got - ag.shard(x, rank, WORLD, layout)).norm() / x.norm() for got, x in pairs)
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            errors.append(worst.item())
            balances[f"{name}, {layout}"] = shards.balance
            if rank == 0:
                tiles = shards.tiles.sum(1).tolist()
                print(f"{name}, {layout} shards of {n // WORLD}: largest relative error {worst:.1e}")
                print(
                    f"    tiles of each rank {tiles}: balance {shards.balance:.0%}; hops of each rank's keys {shards.hops}"
                )
    dist.destroy_process_group()
    if rank == 0:
        shared = "; ".join(f"{name}: {balance:.0%}" for name, balance in balances.items())
        claim = "matches attention in one process, gradients included"
        verdict(claim, max(errors), GRADIENT, f"{WORLD} processes, work balanced {shared}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096, help="length of the whole sequence")
    n = parser.parse_args().n
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (folder, n), WORLD, start_method="spawn")
