"""attngen forward: a query tile walks its keys with the online softmax.

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
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # no logit is lower, and LOWEST - LOWEST is 0


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
def forward(
    q,  # [B, heads, n_q, D]
    k,  # [B, heads // group, n_k, D]
    v,  # [B, heads // group, n_k, Dv]
    out,  # [B, heads, n_q, Dv]
    lse,  # [B, heads, n_q]
    odd,  # [programs]: what is not finite there
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    out_stride_b,
    out_stride_h,
    out_stride_n,
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
    k_head = k + b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_head = v + b.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    q_rows = q_head + row.to(tl.int64)[:, None] * q_stride_n
    q_0 = tl.load(q_rows + d_0[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 128]
    scale2 = scale * LOG2E
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc_0 = tl.zeros([BLOCK_M, 128], tl.float32)

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
        m_new = tl.maximum(m, tl.max(s, 1) * scale2)
        p = tl.exp2(s * scale2 - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        m = m_new
        l = l * alpha + tl.sum(p, 1)
        v_0 = tl.load(v_head + rows * v_stride_n + d_0[None, :])
        acc_0 = tl.dot(p.to(v_0.dtype), v_0, acc_0 * alpha[:, None])

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
        s = tl.where(valid, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale2)
        p = tl.exp2(s * scale2 - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        m = m_new
        l = l * alpha + tl.sum(p, 1)
        v_0 = tl.load(v_head + rows * v_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
        acc_0 = tl.dot(p.to(v_0.dtype), v_0, acc_0 * alpha[:, None])

    # not a number, maybe by 0 * inf of a pair that does not attend: the guarded kernel does it again
    zero = tl.sum(acc_0 - acc_0)
    tl.store(odd + program, (zero != 0.0).to(tl.int32))

    # rows without a key: out = 0, lse = -inf
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    rows_at = (b.to(tl.int64) * heads + h) * n_q + row
    lse_row = tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2)
    tl.store(lse + rows_at, lse_row, mask=row_in)
    out_head = out + b.to(tl.int64) * out_stride_b + h.to(tl.int64) * out_stride_h

    norm = 1.0 / l
    out_rows = out_head + row.to(tl.int64)[:, None] * out_stride_n
    acc_0 = acc_0 * norm[:, None]
    tl.store(out_rows + d_0[None, :], acc_0.to(out.dtype.element_ty), mask=row_in[:, None])
