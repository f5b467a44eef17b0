"""LeanAttention (arXiv 2405.10480): decoding over contexts of very different lengths. Equal runs of key tiles over all
programs, whatever the lengths, against dense attention on the padded batch, on this machine.

    python examples/lean_decode.py [--longest 16384]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from verdict import FLOAT16, FLOAT32, here, relative, timed, verdict

import attngen as ag
from attngen.plan.stream_k import balance, stream_k


@torch.no_grad()
def main(longest: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    lengths = torch.tensor(
        [longest // part for part in (64, 64, 32, 32, 16, 16, 2, 1)], dtype=torch.int32, device=device
    )
    batch, heads, kv_heads, head_dim = len(lengths), 32, 8, 128
    q = torch.randn(batch, heads, 1, head_dim, device=device, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, longest, head_dim, device=device, dtype=dtype) for _ in range(2))
    there = (torch.arange(longest, device=device) < lengths[:, None])[:, None, None]

    attn = ag.compile(ag.Spec())
    _, padded = timed(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=there, enable_gqa=True))
    print(f"one query each over {lengths.tolist()} keys, H{heads}/{kv_heads} D{head_dim}, {device}")
    print(f"  SDPA on the padded batch: {padded * 1e3:.1f} ms")
    _, taken = timed(lambda: attn(q, k, v, k_len=lengths))
    print(f"  attngen, only the keys that are there: {taken * 1e3:.1f} ms, {padded / taken:.1f}x")

    # What stream-K does on a GPU of 132 multiprocessors, by its own assignment.
    counts = (lengths.cpu().long().repeat_interleave(kv_heads) + 63) // 64
    runs = stream_k(counts, 132)
    loads, tiles = runs.begin.diff(), int(counts.sum())
    print(
        f"  {tiles} key tiles of 64 over 132 programs: {int(loads.min())} to {int(loads.max())} each, {balance(tiles, 132):.0%}"
    )
    each = zip(q.double(), k, v, lengths.tolist(), strict=True)  # in float64, one sequence after the other
    rows = [
        F.scaled_dot_product_attention(one, keys[:, :n].double(), values[:, :n].double(), enable_gqa=True)
        for one, keys, values, n in each
    ]
    alone = tiles / (132 * int(counts.max()))
    print(
        f"  a program per output instead: the longest has {int(counts.max())}, {alone:.0%} of the machine's time is work"
    )
    verdict(
        "matches dense attention on the padded batch",
        relative(attn(q, k, v, k_len=lengths), torch.stack(rows)),
        FLOAT32 if dtype == torch.float32 else FLOAT16,
        f"{batch * longest / int(lengths.sum()):.1f}x fewer keys read",
        f"{taken / padded:.2f}x SDPA's time on {here()}",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=16384, help="keys of the longest context")
    main(parser.parse_args().longest)
