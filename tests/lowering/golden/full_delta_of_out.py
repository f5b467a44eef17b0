"""attngen backward, first step: delta = rowsum(dO * O), where lse has no gradient.

spec 9e38d51ac475f3d1
    mask: true
head dims 64 and 64, bfloat16
schedule block_m=64, block_n=32, num_warps=4, num_stages=2
"""

import triton
import triton.language as tl

BLOCK_M = tl.constexpr(64)  # query rows of a tile


@triton.jit(
    do_not_specialize=[
        "heads",
        "n_q",
    ]
)
def delta_of_out(
    out,  # [B, heads, n_q, Dv]
    do,  # [B, heads, n_q, Dv]
    delta,  # [B, heads, n_q]
    out_stride_b,
    out_stride_h,
    out_stride_n,
    do_stride_b,
    do_stride_h,
    do_stride_n,
    heads,
    n_q,
):
    # program -> (batch, head, query tile)
    tiles = tl.cdiv(n_q, BLOCK_M)
    program = tl.program_id(0)
    query_tile = program % tiles
    h = program // tiles % heads
    b = program // tiles // heads

    row = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_in = row < n_q  # [BLOCK_M]
    d_0 = tl.arange(0, 64)  # [64]
    out_head = out + b.to(tl.int64) * out_stride_b + h.to(tl.int64) * out_stride_h
    do_head = do + b.to(tl.int64) * do_stride_b + h.to(tl.int64) * do_stride_h
    out_rows = out_head + row.to(tl.int64)[:, None] * out_stride_n
    out_0 = tl.load(out_rows + d_0[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 64]
    do_rows = do_head + row.to(tl.int64)[:, None] * do_stride_n
    do_0 = tl.load(do_rows + d_0[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 64]

    rows_at = (b.to(tl.int64) * heads + h) * n_q + row
    total = tl.zeros([BLOCK_M], tl.float32)
    total += tl.sum(out_0.to(tl.float32) * do_0.to(tl.float32), 1)
    tl.store(delta + rows_at, total, mask=row_in)
