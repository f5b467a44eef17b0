"""attngen forward: a query tile walks its keys with the online softmax.

spec 946a0019e53cd402
    tensor doc: int[2]
    mask: doc[b, i] == doc[b, j] and i >= j
    score: 30 * tanh(s / 30)
head dims 80 and 192, float16
schedule block_m=64, block_n=32, num_warps=4, num_stages=2
"""

import triton
import triton.language as tl

BLOCK_M = tl.constexpr(64)  # query rows of a tile
BLOCK_N = tl.constexpr(32)  # keys of a tile
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # no logit is lower, and LOWEST - LOWEST is 0


@triton.jit
def tanh(x):
    # saturates: exp2 overflows to inf and 2 / inf is 0
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit(
    do_not_specialize=[
        "heads",
        "n_q",
        "group",
        "n_k",
        "scale",
        "q_offset",
        "doc_first_table",
        "doc_first_stride_b",
        "doc_first_stride_h",
        "doc_stop_table",
        "doc_stop_stride_b",
        "doc_stop_stride_h",
        "doc_run_first_table",
        "doc_run_first_stride_b",
        "doc_run_first_stride_h",
        "doc_run_stop_table",
        "doc_run_stop_stride_b",
        "doc_run_stop_stride_h",
        "doc_stride_0",
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
    doc_first_table,  # [B or 1, heads or 1, tiles]
    doc_first_stride_b,
    doc_first_stride_h,
    doc_stop_table,  # [B or 1, heads or 1, tiles]
    doc_stop_stride_b,
    doc_stop_stride_h,
    doc_run_first_table,  # [B or 1, heads or 1, tiles]
    doc_run_first_stride_b,
    doc_run_first_stride_h,
    doc_run_stop_table,  # [B or 1, heads or 1, tiles]
    doc_run_stop_stride_b,
    doc_run_stop_stride_h,
    doc,
    doc_stride_0,
    doc_stride_1,
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
    i_safe = tl.minimum(row, n_q - 1) + q_offset  # [BLOCK_M]
    lane_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    doc_base = doc + b.to(tl.int64) * doc_stride_0
    doc_b_i = tl.load(doc_base + i_safe.to(tl.int64) * doc_stride_1)  # [BLOCK_M]
    d_0 = tl.arange(0, 64)  # [64]
    d_1 = 64 + tl.arange(0, 16)  # [16]
    e_0 = tl.arange(0, 128)  # [128]
    e_1 = 128 + tl.arange(0, 64)  # [64]
    q_head = q + b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h
    k_head = k + b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_head = v + b.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    q_rows = q_head + row.to(tl.int64)[:, None] * q_stride_n
    q_0 = tl.load(q_rows + d_0[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 64]
    q_1 = tl.load(q_rows + d_1[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 16]
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc_0 = tl.zeros([BLOCK_M, 128], tl.float32)
    acc_1 = tl.zeros([BLOCK_M, 64], tl.float32)

    # this tile's first and last row, as positions
    first = query_tile * BLOCK_M + q_offset
    last = tl.minimum(query_tile * BLOCK_M + BLOCK_M, n_q) - 1 + q_offset

    # what this query tile's captured data allow, found before the launch
    doc_first_row = doc_first_table + b * doc_first_stride_b
    doc_first = tl.load(doc_first_row + h * doc_first_stride_h + query_tile)
    doc_stop_row = doc_stop_table + b * doc_stop_stride_b
    doc_stop = tl.load(doc_stop_row + h * doc_stop_stride_h + query_tile)
    doc_run_first_row = doc_run_first_table + b * doc_run_first_stride_b
    doc_run_first_row_base = doc_run_first_row + h * doc_run_first_stride_h + query_tile
    doc_run_first = tl.load(doc_run_first_row_base)
    doc_run_stop_row = doc_run_stop_table + b * doc_run_stop_stride_b
    doc_run_stop_row_base = doc_run_stop_row + h * doc_run_stop_stride_h + query_tile
    doc_run_stop = tl.load(doc_run_stop_row_base)

    # key tiles that some row of this query tile attends
    live_start = tl.maximum(0, doc_first)
    live_end = tl.minimum(tl.minimum(doc_stop, n_k), last + 1)
    live_first = live_start // BLOCK_N
    live_stop = tl.where(live_end > live_start, tl.cdiv(live_end, BLOCK_N), live_first)

    # of those, the ones every row attends fully
    unmasked_first = tl.cdiv(tl.maximum(0, doc_run_first), BLOCK_N)
    masked_first = tl.maximum(0, tl.minimum(tl.minimum(doc_run_stop, n_k), first + 1)) // BLOCK_N
    unmasked_stop = tl.maximum(unmasked_first, masked_first)
    full_first = tl.maximum(live_first, unmasked_first)
    full_stop = tl.minimum(live_stop, unmasked_stop)
    full_count = tl.maximum(0, full_stop - full_first)

    # the partial tiles before and behind them
    before_stop = tl.minimum(live_stop, unmasked_first)
    before_full = tl.maximum(0, before_stop - live_first)
    after_first = tl.maximum(live_first, unmasked_stop)
    after_full = tl.maximum(0, live_stop - after_first)
    skip_full = after_first - before_full
    partial_count = after_full + before_full

    # full key tiles: every pair attends, so no mask
    for step in range(full_count):
        tile = full_first + step
        j = tile * BLOCK_N + lane_n  # [BLOCK_N]
        rows = j.to(tl.int64)[:, None]
        k_0 = tl.load(k_head + rows * k_stride_n + d_0[None, :])
        k_1 = tl.load(k_head + rows * k_stride_n + d_1[None, :])
        s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_1, tl.trans(k_1), s)
        s = s * scale
        x = 30.0 * LOG2E * tanh(0.03333333333333333 * s)
        m_new = tl.maximum(m, tl.max(x, 1))
        p = tl.exp2(x - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        m = m_new
        l = l * alpha + tl.sum(p, 1)
        v_0 = tl.load(v_head + rows * v_stride_n + e_0[None, :])
        v_1 = tl.load(v_head + rows * v_stride_n + e_1[None, :])
        acc_0 = tl.dot(p.to(v_0.dtype), v_0, acc_0 * alpha[:, None])
        acc_1 = tl.dot(p.to(v_1.dtype), v_1, acc_1 * alpha[:, None])

    # partial key tiles: only some pairs attend
    for step in range(partial_count):
        tile = live_first + step
        tile = tl.where(step < before_full, tile, skip_full + step)
        j = tile * BLOCK_N + lane_n  # [BLOCK_N]
        rows = j.to(tl.int64)[:, None]
        inside = j < n_k  # [BLOCK_N]
        j_safe = tl.minimum(j, n_k - 1)  # [BLOCK_N]
        k_0 = tl.load(k_head + rows * k_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
        k_1 = tl.load(k_head + rows * k_stride_n + d_1[None, :], mask=inside[:, None], other=0.0)
        s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_1, tl.trans(k_1), s)
        s = s * scale
        doc_b_j = tl.load(doc_base + j_safe.to(tl.int64) * doc_stride_1)  # [BLOCK_N]
        pair_ok = (doc_b_i[:, None] == doc_b_j[None, :]) & (i[:, None] >= j[None, :])
        valid = pair_ok & inside[None, :]
        x = 30.0 * LOG2E * tanh(0.03333333333333333 * s)
        x = tl.where(valid, x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        p = tl.exp2(x - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        m = m_new
        l = l * alpha + tl.sum(p, 1)
        v_0 = tl.load(v_head + rows * v_stride_n + e_0[None, :], mask=inside[:, None], other=0.0)
        v_1 = tl.load(v_head + rows * v_stride_n + e_1[None, :], mask=inside[:, None], other=0.0)
        acc_0 = tl.dot(p.to(v_0.dtype), v_0, acc_0 * alpha[:, None])
        acc_1 = tl.dot(p.to(v_1.dtype), v_1, acc_1 * alpha[:, None])

    # not a number, maybe by 0 * inf of a pair that does not attend: the guarded kernel does it again
    zero = tl.sum(acc_0 - acc_0)
    zero += tl.sum(acc_1 - acc_1)
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
    tl.store(out_rows + e_0[None, :], acc_0.to(out.dtype.element_ty), mask=row_in[:, None])
    acc_1 = acc_1 * norm[:, None]
    tl.store(out_rows + e_1[None, :], acc_1.to(out.dtype.element_ty), mask=row_in[:, None])
