"""attngen backward, where the forward did not leave it: what a large lse lacks.

spec 99dfc587a8cf28a7
    tensor slope: float[1]
    mask: i >= j
    score: s + (j - i) * slope[h]
    dropout: 0.1
head dims 64 and 64, bfloat16
schedule block_m=64, block_n=32, num_warps=4, num_stages=2
"""

import triton
import triton.language as tl

BLOCK_M = tl.constexpr(64)  # query rows of a tile
BLOCK_N = tl.constexpr(32)  # keys of a tile
LOG2E = tl.constexpr(1.4426950408889634)
LARGE = tl.constexpr(8192.0)  # the size of an lse from which on what it lacks shows


@triton.jit(
    do_not_specialize=[
        "heads",
        "n_q",
        "group",
        "n_k",
        "scale",
        "q_offset",
    ]
)
def excess(
    q,  # [B, heads, n_q, D]
    k,  # [B, heads // group, n_k, D]
    lse,  # [B, heads, n_q]
    excess,  # [B, heads, n_q]
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    heads,
    n_q,
    group,
    n_k,
    scale,
    q_offset,
    slope,
    slope_stride_0,
):
    # program -> (batch, head, query tile)
    tiles = tl.cdiv(n_q, BLOCK_M)
    program = tl.program_id(0)
    query_tile = program % tiles
    h = program // tiles % heads
    b = program // tiles // heads
    kv_head = h // group

    row = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_in = row < n_q  # [BLOCK_M]
    i = row + q_offset  # [BLOCK_M]
    lane_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    slope_h = tl.load(slope + h.to(tl.int64) * slope_stride_0).to(tl.float32)
    d_0 = tl.arange(0, 64)  # [64]

    # P summed again for rows whose lse is large
    rows_at = (b.to(tl.int64) * heads + h) * n_q + row
    lse_row = tl.load(lse + rows_at, mask=row_in, other=0.0)  # [BLOCK_M]
    large = (tl.abs(lse_row) >= LARGE) & (tl.abs(lse_row) < float("inf"))
    total = tl.zeros([BLOCK_M], tl.float32)
    if tl.max(large.to(tl.int32), 0) > 0:
        q_head = q + b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h
        k_head = k + b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
        q_rows = q_head + row.to(tl.int64)[:, None] * q_stride_n
        q_0 = tl.load(q_rows + d_0[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 64]

        # this tile's first and last row, as positions
        first = query_tile * BLOCK_M + q_offset
        last = tl.minimum(query_tile * BLOCK_M + BLOCK_M, n_q) - 1 + q_offset

        # key tiles that some row of this query tile attends
        live_stop = tl.cdiv(tl.maximum(0, tl.minimum(n_k, last + 1)), BLOCK_N)

        # of those, the ones every row attends fully
        unmasked_stop = tl.maximum(0, tl.minimum(n_k, first + 1)) // BLOCK_N

        # the partial tiles beside them
        partial_count = live_stop - unmasked_stop

        # full key tiles: every pair attends, so no mask
        for tile in range(unmasked_stop):
            j = tile * BLOCK_N + lane_n  # [BLOCK_N]
            rows = j.to(tl.int64)[:, None]
            k_0 = tl.load(k_head + rows * k_stride_n + d_0[None, :])
            s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
            x = slope_h * (j[None, :] - i[:, None]).to(tl.float32) + scale * s
            total += tl.sum(tl.exp2((x - lse_row[:, None]) * LOG2E), 1)

        # partial key tiles: only some pairs attend
        for step in tl.range(partial_count, num_stages=1):
            tile = unmasked_stop + step
            j = tile * BLOCK_N + lane_n  # [BLOCK_N]
            rows = j.to(tl.int64)[:, None]
            inside = j < n_k  # [BLOCK_N]
            k_0 = tl.load(k_head + rows * k_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
            s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
            valid = (i[:, None] >= j[None, :]) & inside[None, :]
            x = slope_h * (j[None, :] - i[:, None]).to(tl.float32) + scale * s
            x = tl.where(valid, x, float("-inf"))
            total += tl.sum(tl.exp2((x - lse_row[:, None]) * LOG2E), 1)

    # less than 1 is the sum of a part of the keys, or of all where lse was rounded up
    excess_row = tl.log2(total)
    rounding = tl.abs(lse_row) * 2.0**-24 * LOG2E
    beyond = excess_row > -tl.where(tl.abs(lse_row) < 2.0**28, rounding, 0.0)
    excess_row = tl.where(large & beyond, excess_row, 0.0)
    tl.store(excess + rows_at, excess_row, mask=row_in)
