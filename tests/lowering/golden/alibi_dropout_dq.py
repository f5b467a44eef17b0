"""attngen backward: a query tile walks its keys and sums dQ, and the gradient of slope.

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


@triton.jit
def mix(x):
    # lowbias32, on uint32
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def uniform(x):
    # 24 random bits as a number in [0, 1)
    return (mix(x) >> 8).to(tl.float32) * 5.960464477539063e-08


@triton.jit(
    do_not_specialize=[
        "heads",
        "n_q",
        "group",
        "n_k",
        "scale",
        "q_offset",
        "seed",
    ]
)
def dq(
    q,  # [B, heads, n_q, D]
    do,  # [B, heads, n_q, Dv]
    k,  # [B, heads // group, n_k, D]
    v,  # [B, heads // group, n_k, Dv]
    dq,  # [B, heads, n_q, D]
    lse,  # [B, heads, n_q]
    delta,  # [B, heads, n_q]
    level,  # [B, heads, n_q]: lse as P needs it
    excess,  # [B, heads, n_q]
    odd,  # [programs]: what is not finite there
    grad_slope,  # [B, heads, tiles]
    q_stride_b,
    q_stride_h,
    q_stride_n,
    do_stride_b,
    do_stride_h,
    do_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    dq_stride_b,
    dq_stride_h,
    dq_stride_n,
    heads,
    n_q,
    group,
    n_k,
    scale,
    q_offset,
    seed,
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
    hash = mix(seed.to(tl.uint32))
    hash_2 = mix(hash ^ b.to(tl.uint32))
    hash_3 = mix(hash_2 ^ h.to(tl.uint32))
    hash_4 = mix(hash_3 ^ i.to(tl.uint32))  # [BLOCK_M]
    d_0 = tl.arange(0, 64)  # [64]
    q_head = q + b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h
    do_head = do + b.to(tl.int64) * do_stride_b + h.to(tl.int64) * do_stride_h
    q_rows = q_head + row.to(tl.int64)[:, None] * q_stride_n
    q_0 = tl.load(q_rows + d_0[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 64]
    do_rows = do_head + row.to(tl.int64)[:, None] * do_stride_n
    do_0 = tl.load(do_rows + d_0[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 64]
    k_head = k + b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_head = v + b.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    dq_0 = tl.zeros([BLOCK_M, 64], tl.float32)
    lse_head = lse + (b.to(tl.int64) * heads + h) * n_q
    delta_head = delta + (b.to(tl.int64) * heads + h) * n_q
    level_head = level + (b.to(tl.int64) * heads + h) * n_q
    excess_head = excess + (b.to(tl.int64) * heads + h) * n_q
    lse_row = tl.load(lse_head + row, mask=row_in, other=float("-inf"))  # [BLOCK_M]
    level_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row)
    tl.store(level_head + row, level_row, mask=row_in)  # for the kernels behind this one
    delta_row = tl.load(delta_head + row, mask=row_in, other=0.0)  # [BLOCK_M]
    excess_row = tl.load(excess_head + row, mask=row_in, other=0.0)  # [BLOCK_M]
    total_slope = tl.zeros([BLOCK_M], tl.float32)

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
        keep = uniform(hash_4[:, None] ^ j[None, :].to(tl.uint32)) >= 0.1
        x = slope_h * (j[None, :] - i[:, None]).to(tl.float32) + scale * s
        exponent = (x - level_row[:, None]) * LOG2E - excess_row[:, None]
        p = tl.exp2(exponent)
        v_0 = tl.load(v_head + rows * v_stride_n + d_0[None, :])
        dp = tl.dot(do_0, tl.trans(v_0))  # [BLOCK_M, BLOCK_N]
        dp = tl.where(keep, dp * 1.1111111111111112, 0.0)
        ds = p * (dp - delta_row[:, None])
        share_slope = ds * (j[None, :] - i[:, None])
        total_slope += tl.sum(share_slope, 1)
        dq_0 = tl.dot(ds.to(k_0.dtype), k_0, dq_0)

    # partial key tiles: only some pairs attend
    for step in tl.range(partial_count, num_stages=1):
        tile = unmasked_stop + step
        j = tile * BLOCK_N + lane_n  # [BLOCK_N]
        rows = j.to(tl.int64)[:, None]
        inside = j < n_k  # [BLOCK_N]
        k_0 = tl.load(k_head + rows * k_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
        s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
        valid = (i[:, None] >= j[None, :]) & inside[None, :]
        keep = uniform(hash_4[:, None] ^ j[None, :].to(tl.uint32)) >= 0.1
        x = slope_h * (j[None, :] - i[:, None]).to(tl.float32) + scale * s
        exponent = (x - level_row[:, None]) * LOG2E - excess_row[:, None]
        exponent = tl.where(valid, exponent, float("-inf"))
        p = tl.exp2(exponent)
        v_0 = tl.load(v_head + rows * v_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
        dp = tl.dot(do_0, tl.trans(v_0))  # [BLOCK_M, BLOCK_N]
        dp = tl.where(keep, dp * 1.1111111111111112, 0.0)
        ds = p * (dp - delta_row[:, None])
        ds = tl.where(valid, ds, 0.0)
        share_slope = ds * (j[None, :] - i[:, None])
        share_slope = tl.where(valid, share_slope, 0.0)
        total_slope += tl.sum(share_slope, 1)
        dq_0 = tl.dot(ds.to(k_0.dtype), k_0, dq_0)

    total_slope = tl.where(row_in, total_slope, 0.0)
    tl.store(grad_slope + (b.to(tl.int64) * heads + h) * tiles + query_tile, tl.sum(total_slope, 0))

    # not a number, maybe by 0 * inf of a pair that does not attend: the guarded kernel does it again
    zero = tl.sum(dq_0 - dq_0)
    tl.store(odd + program, (zero != 0.0).to(tl.int32))

    dq_head = dq + b.to(tl.int64) * dq_stride_b + h.to(tl.int64) * dq_stride_h
    dq_rows = dq_head + row.to(tl.int64)[:, None] * dq_stride_n
    dq_0 = dq_0 * scale
    tl.store(dq_rows + d_0[None, :], dq_0.to(dq.dtype.element_ty), mask=row_in[:, None])
