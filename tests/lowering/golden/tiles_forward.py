"""attngen forward: a query tile walks its keys with the online softmax.

spec 4a135cdf4c3dfc50
    mask: i >= j
    lists: tiles(128, 64)
head dims 64 and 64, bfloat16
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
        "query_tiles_stride_b",
        "query_tiles_stride_h",
        "query_runs_stride_b",
        "query_runs_stride_h",
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
    query_tiles,  # [B or 1, heads or 1, listed]
    query_tiles_stride_b,
    query_tiles_stride_h,
    query_runs,  # [B or 1, heads or 1, query tiles, 3]
    query_runs_stride_b,
    query_runs_stride_h,
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
    d_0 = tl.arange(0, 64)  # [64]
    q_head = q + b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h
    k_head = k + b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_head = v + b.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    q_rows = q_head + row.to(tl.int64)[:, None] * q_stride_n
    q_0 = tl.load(q_rows + d_0[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 64]
    scale2 = scale * LOG2E
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc_0 = tl.zeros([BLOCK_M, 64], tl.float32)

    # where this tile's list of key tiles starts, and how long it is
    run = query_runs + b.to(tl.int64) * query_runs_stride_b
    run = run + h.to(tl.int64) * query_runs_stride_h
    run = run + query_tile // 2 * 3
    listed = query_tiles + b.to(tl.int64) * query_tiles_stride_b
    listed = listed + h.to(tl.int64) * query_tiles_stride_h
    listed = listed + tl.load(run)
    full_count = tl.load(run + 1).to(tl.int32) * 2
    partial_count = tl.load(run + 2).to(tl.int32) * 2
    listed_partial = listed + tl.load(run + 1)

    # full key tiles: every pair attends, so no mask
    for step in range(full_count):
        tile = tl.load(listed + step // 2).to(tl.int32) * 2 + step % 2
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
    for step in range(partial_count):
        tile = tl.load(listed_partial + step // 2).to(tl.int32) * 2 + step % 2
        j = tile * BLOCK_N + lane_n  # [BLOCK_N]
        rows = j.to(tl.int64)[:, None]
        inside = j < n_k  # [BLOCK_N]
        k_0 = tl.load(k_head + rows * k_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
        s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
        valid = (i[:, None] >= j[None, :]) & inside[None, :]
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
