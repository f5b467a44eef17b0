"""attngen backward: a query tile walks its keys and sums dQ.

spec fe73eeec0df43730
    param width: int
    mask: i >= j and j + width >= i + 1 and i + width >= j + 1
head dims 128 and 128, bfloat16
schedule block_m=64, block_n=32, num_warps=4, num_stages=2
"""

import triton
import triton.language as tl

BLOCK_M = tl.constexpr(64)  # query rows of a tile
BLOCK_N = tl.constexpr(32)  # keys of a tile
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=[
        "heads",
        "n_q",
        "group",
        "n_k",
        "scale",
        "q_offset",
        "width",
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
    odd,  # [programs]: what is not finite there
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
    width,
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
    first_key = i - width + 1  # [BLOCK_M]
    last_key = i + width - 1  # [BLOCK_M]
    d_0 = tl.arange(0, 128)  # [128]
    q_head = q + b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h
    do_head = do + b.to(tl.int64) * do_stride_b + h.to(tl.int64) * do_stride_h
    q_rows = q_head + row.to(tl.int64)[:, None] * q_stride_n
    q_0 = tl.load(q_rows + d_0[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 128]
    do_rows = do_head + row.to(tl.int64)[:, None] * do_stride_n
    do_0 = tl.load(do_rows + d_0[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 128]
    k_head = k + b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_head = v + b.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    scale2 = scale * LOG2E
    dq_0 = tl.zeros([BLOCK_M, 128], tl.float32)
    lse_head = lse + (b.to(tl.int64) * heads + h) * n_q
    delta_head = delta + (b.to(tl.int64) * heads + h) * n_q
    level_head = level + (b.to(tl.int64) * heads + h) * n_q
    lse_row = tl.load(lse_head + row, mask=row_in, other=float("-inf"))  # [BLOCK_M]
    level_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row * LOG2E)
    tl.store(level_head + row, level_row, mask=row_in)  # for the kernels behind this one
    delta_row = tl.load(delta_head + row, mask=row_in, other=0.0)  # [BLOCK_M]

    # this tile's first and last row, as positions
    first = query_tile * BLOCK_M + q_offset
    last = tl.minimum(query_tile * BLOCK_M + BLOCK_M, n_q) - 1 + q_offset

    # key tiles that some row of this query tile attends
    live_start = tl.maximum(0, first - width + 1)
    live_end = tl.minimum(n_k, last + 1)
    live_first = live_start // BLOCK_N
    any_live = (2 * width >= 2) & (width >= 1) & (live_end > live_start)
    live_stop = tl.where(any_live, tl.cdiv(live_end, BLOCK_N), live_first)

    # of those, the ones every row attends fully
    full_first = tl.cdiv(tl.maximum(0, last - width + 1), BLOCK_N)
    masked_first = tl.maximum(0, tl.minimum(tl.minimum(n_k, first + 1), first + width)) // BLOCK_N
    unmasked_stop = tl.maximum(full_first, masked_first)
    full_stop = tl.minimum(live_stop, unmasked_stop)
    full_count = tl.maximum(0, full_stop - full_first)

    # the partial tiles before and behind them
    before_stop = tl.minimum(full_first, live_stop)
    before_full = tl.maximum(0, before_stop - live_first)
    after_full = tl.maximum(0, live_stop - unmasked_stop)
    skip_full = unmasked_stop - before_full
    partial_count = after_full + before_full

    # full key tiles: every pair attends, so no mask
    for step in range(full_count):
        tile = full_first + step
        j = tile * BLOCK_N + lane_n  # [BLOCK_N]
        rows = j.to(tl.int64)[:, None]
        k_0 = tl.load(k_head + rows * k_stride_n + d_0[None, :])
        s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
        exponent = s * scale2 - level_row[:, None]
        p = tl.exp2(exponent)
        v_0 = tl.load(v_head + rows * v_stride_n + d_0[None, :])
        dp = tl.dot(do_0, tl.trans(v_0))  # [BLOCK_M, BLOCK_N]
        ds = p * (dp - delta_row[:, None])
        dq_0 = tl.dot(ds.to(k_0.dtype), k_0, dq_0)

    # partial key tiles: only some pairs attend
    for step in tl.range(partial_count, num_stages=1):
        tile = live_first + step
        tile = tl.where(step < before_full, tile, skip_full + step)
        j = tile * BLOCK_N + lane_n  # [BLOCK_N]
        rows = j.to(tl.int64)[:, None]
        inside = j < n_k  # [BLOCK_N]
        k_0 = tl.load(k_head + rows * k_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
        s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
        pair_ok = (first_key[:, None] <= j[None, :]) & (i[:, None] >= j[None, :])  # [BLOCK_M, BLOCK_N]
        valid = pair_ok & (last_key[:, None] >= j[None, :]) & inside[None, :]
        exponent = s * scale2 - level_row[:, None]
        exponent = tl.where(valid, exponent, float("-inf"))
        p = tl.exp2(exponent)
        v_0 = tl.load(v_head + rows * v_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
        dp = tl.dot(do_0, tl.trans(v_0))  # [BLOCK_M, BLOCK_N]
        ds = p * (dp - delta_row[:, None])
        dq_0 = tl.dot(ds.to(k_0.dtype), k_0, dq_0)

    # not a number, maybe by 0 * inf of a pair that does not attend: the guarded kernel does it again
    zero = tl.sum(dq_0 - dq_0)
    tl.store(odd + program, (zero != 0.0).to(tl.int32))

    dq_head = dq + b.to(tl.int64) * dq_stride_b + h.to(tl.int64) * dq_stride_h
    dq_rows = dq_head + row.to(tl.int64)[:, None] * dq_stride_n
    dq_0 = dq_0 * scale
    tl.store(dq_rows + d_0[None, :], dq_0.to(dq.dtype.element_ty), mask=row_in[:, None])
