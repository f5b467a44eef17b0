"""attngen forward: a query tile walks its keys with the online softmax.

spec 257fb393d8f8f8fe
    tensor bias: float[3]
    tensor sink: float[1]
    mask: i >= j and (j + 8 >= i and i + 8 >= j or 2 >= i or 2 >= j)
    score: s + bias[h, i, j]
    sink: sink[h]
head dims 40 and 24, float16
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
        "q_stride_b",
        "q_stride_h",
        "q_stride_n",
        "q_stride_d",
        "k_stride_b",
        "k_stride_h",
        "k_stride_n",
        "k_stride_d",
        "v_stride_b",
        "v_stride_h",
        "v_stride_n",
        "v_stride_d",
        "out_stride_b",
        "out_stride_h",
        "out_stride_n",
        "out_stride_d",
        "heads",
        "n_q",
        "group",
        "n_k",
        "scale",
        "q_offset",
    ]
)
def forward(
    q,  # [B, heads, n_q, D]
    k,  # [B, heads // group, n_k, D]
    v,  # [B, heads // group, n_k, Dv]
    out,  # [B, heads, n_q, Dv]
    lse,  # [B, heads, n_q]
    excess,  # [B, heads, n_q]
    odd,  # [programs]: what is not finite there
    q_stride_b,
    q_stride_h,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    out_stride_d,
    heads,
    n_q,
    group,
    n_k,
    scale,
    q_offset,
    bias,
    bias_stride_0,
    bias_stride_1,
    bias_stride_2,
    user_sink,
    user_sink_stride_0,
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
    bias_base = bias + h.to(tl.int64) * bias_stride_0
    bias_at = bias_base + i_safe.to(tl.int64) * bias_stride_1  # [BLOCK_M]
    query_ok = i <= 2  # [BLOCK_M]
    first_key = i - 8  # [BLOCK_M]
    last_key = i + 8  # [BLOCK_M]
    user_sink_h = tl.load(user_sink + h.to(tl.int64) * user_sink_stride_0).to(tl.float32)
    d_0 = tl.arange(0, 32)  # [32]
    d_1 = 32 + tl.arange(0, 16)  # [16]
    d_in_1 = d_1 < 40
    e_0 = tl.arange(0, 16)  # [16]
    e_1 = 16 + tl.arange(0, 16)  # [16]
    e_in_1 = e_1 < 24
    q_head = q + b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h
    q_columns_0 = d_0[None, :] * q_stride_d
    q_columns_1 = d_1[None, :] * q_stride_d
    k_head = k + b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    k_columns_0 = d_0[None, :] * k_stride_d
    k_columns_1 = d_1[None, :] * k_stride_d
    v_head = v + b.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    v_columns_0 = e_0[None, :] * v_stride_d
    v_columns_1 = e_1[None, :] * v_stride_d
    q_rows = q_head + row.to(tl.int64)[:, None] * q_stride_n
    q_0 = tl.load(q_rows + q_columns_0, mask=row_in[:, None], other=0.0)  # [BLOCK_M, 32]
    q_in_1 = row_in[:, None] & d_in_1[None, :]
    q_1 = tl.load(q_rows + q_columns_1, mask=q_in_1, other=0.0)  # [BLOCK_M, 16]
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc_0 = tl.zeros([BLOCK_M, 16], tl.float32)
    acc_1 = tl.zeros([BLOCK_M, 16], tl.float32)

    # this tile's first and last row, as positions
    first = query_tile * BLOCK_M + q_offset
    last = tl.minimum(query_tile * BLOCK_M + BLOCK_M, n_q) - 1 + q_offset

    # key tiles that some row of this query tile attends
    live1_stop = tl.cdiv(tl.maximum(0, tl.minimum(tl.minimum(3, n_k), last + 1)), BLOCK_N)
    live2_start = tl.maximum(0, first - 8)
    live2_end = tl.minimum(n_k, last + 1)
    live2_first = live2_start // BLOCK_N
    live2_stop = tl.where(live2_end > live2_start, tl.cdiv(live2_end, BLOCK_N), live2_first)
    live2_first_ = tl.maximum(live1_stop, live2_first)

    # of those, the ones every row attends fully
    hole1_end = last - 8
    hole1_first = 3 // BLOCK_N
    hole1_stop = tl.where((last >= 3) & (hole1_end > 3), tl.cdiv(hole1_end, BLOCK_N), hole1_first)
    hole1_from = tl.minimum(hole1_first, tl.maximum(0, tl.minimum(n_k, first + 1)) // BLOCK_N)
    hole2_first = tl.maximum(hole1_stop, tl.maximum(0, tl.minimum(n_k, first + 1)) // BLOCK_N)
    full1_stop = tl.minimum(hole1_from, live1_stop)
    full2_first = tl.maximum(hole1_from, hole1_stop)
    full2_stop = tl.minimum(hole2_first, live1_stop)
    full2_count = tl.maximum(0, full2_stop - full2_first)
    full3_stop = tl.minimum(hole1_from, live2_stop)
    full3_count = tl.maximum(0, full3_stop - live2_first_)
    full4_first = tl.maximum(tl.maximum(hole1_from, hole1_stop), live2_first_)
    full4_stop = tl.minimum(hole2_first, live2_stop)
    full4_count = tl.maximum(0, full4_stop - full4_first)

    # the partial tiles beside them
    partial1_stop = tl.minimum(hole1_stop, live1_stop)
    partial1_count = tl.maximum(0, partial1_stop - hole1_from)
    partial2_count = tl.maximum(0, live1_stop - hole2_first)
    partial3_first = tl.maximum(hole1_from, live2_first_)
    partial3_stop = tl.minimum(hole1_stop, live2_stop)
    partial3_count = tl.maximum(0, partial3_stop - partial3_first)
    partial4_first = tl.maximum(hole2_first, live2_first_)
    partial4_count = tl.maximum(0, live2_stop - partial4_first)

    # those full tiles, one interval behind the other
    full_skip2 = full2_first - full1_stop
    full_count2 = full1_stop + full2_count
    full_skip3 = live2_first_ - full_count2
    full_count3 = full3_count + full_count2
    full_skip4 = full4_first - full_count3
    full_count = full4_count + full_count3

    # those partial tiles, one interval behind the other
    partial_skip2 = hole2_first - partial1_count
    partial_count2 = partial1_count + partial2_count
    partial_skip3 = partial3_first - partial_count2
    partial_count3 = partial3_count + partial_count2
    partial_skip4 = partial4_first - partial_count3
    partial_count = partial4_count + partial_count3

    # full key tiles: every pair attends, so no mask
    for step in range(full_count):
        tile = step
        tile = tl.where(step < full1_stop, tile, full_skip2 + step)
        tile = tl.where(step < full_count2, tile, full_skip3 + step)
        tile = tl.where(step < full_count3, tile, full_skip4 + step)
        j = tile * BLOCK_N + lane_n  # [BLOCK_N]
        rows = j.to(tl.int64)[:, None]
        k_0 = tl.load(k_head + rows * k_stride_n + k_columns_0)
        k_1 = tl.load(k_head + rows * k_stride_n + k_columns_1, mask=d_in_1[None, :], other=0.0)
        s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_1, tl.trans(k_1), s)
        bias_at_at = bias_at[:, None] + j[None, :].to(tl.int64) * bias_stride_2  # [BLOCK_M, BLOCK_N]
        bias_h_i_j = tl.load(bias_at_at).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        x = bias_h_i_j + scale * s
        m_new = tl.maximum(m, tl.max(x, 1))
        p = tl.exp2((x - m_new[:, None]) * LOG2E)
        alpha = tl.exp2((m - m_new) * LOG2E)
        m = m_new
        l = l * alpha + tl.sum(p, 1)
        v_0 = tl.load(v_head + rows * v_stride_n + v_columns_0)
        v_1 = tl.load(v_head + rows * v_stride_n + v_columns_1, mask=e_in_1[None, :], other=0.0)
        acc_0 = tl.dot(p.to(v_0.dtype), v_0, acc_0 * alpha[:, None])
        acc_1 = tl.dot(p.to(v_1.dtype), v_1, acc_1 * alpha[:, None])

    # partial key tiles: only some pairs attend
    for step in tl.range(partial_count, num_stages=1):
        tile = hole1_from + step
        tile = tl.where(step < partial1_count, tile, partial_skip2 + step)
        tile = tl.where(step < partial_count2, tile, partial_skip3 + step)
        tile = tl.where(step < partial_count3, tile, partial_skip4 + step)
        j = tile * BLOCK_N + lane_n  # [BLOCK_N]
        rows = j.to(tl.int64)[:, None]
        inside = j < n_k  # [BLOCK_N]
        j_safe = tl.minimum(j, n_k - 1)  # [BLOCK_N]
        k_0 = tl.load(k_head + rows * k_stride_n + k_columns_0, mask=inside[:, None], other=0.0)
        k_in_1 = inside[:, None] & d_in_1[None, :]
        k_1 = tl.load(k_head + rows * k_stride_n + k_columns_1, mask=k_in_1, other=0.0)
        s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_1, tl.trans(k_1), s)
        key_ok = j <= 2  # [BLOCK_N]
        pair_ok = (first_key[:, None] <= j[None, :]) & (last_key[:, None] >= j[None, :])
        pair_ok_2 = (i[:, None] >= j[None, :]) & (query_ok[:, None] | key_ok[None, :] | pair_ok)
        valid = pair_ok_2 & inside[None, :]
        bias_at_at = bias_at[:, None] + j_safe[None, :].to(tl.int64) * bias_stride_2
        bias_h_i_j = tl.load(bias_at_at).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        x = bias_h_i_j + scale * s
        x = tl.where(valid, x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        p = tl.exp2((x - m_new[:, None]) * LOG2E)
        alpha = tl.exp2((m - m_new) * LOG2E)
        m = m_new
        l = l * alpha + tl.sum(p, 1)
        v_0 = tl.load(v_head + rows * v_stride_n + v_columns_0, mask=inside[:, None], other=0.0)
        v_in_1 = inside[:, None] & e_in_1[None, :]
        v_1 = tl.load(v_head + rows * v_stride_n + v_columns_1, mask=v_in_1, other=0.0)
        acc_0 = tl.dot(p.to(v_0.dtype), v_0, acc_0 * alpha[:, None])
        acc_1 = tl.dot(p.to(v_1.dtype), v_1, acc_1 * alpha[:, None])

    # not a number, maybe by 0 * inf of a pair that does not attend: the guarded kernel does it again
    zero = tl.sum(acc_0 - acc_0)
    zero += tl.sum(acc_1 - acc_1)
    tl.store(odd + program, (zero != 0.0).to(tl.int32))

    # the sink: one more key, with value 0
    m_new = tl.maximum(m, user_sink_h)
    alpha = tl.exp2((m - m_new) * LOG2E)
    l = l * alpha + tl.exp2((user_sink_h - m_new) * LOG2E)
    m = m_new
    acc_0 = acc_0 * alpha[:, None]
    acc_1 = acc_1 * alpha[:, None]

    # rows without a key: out = 0, lse = -inf
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    rows_at = (b.to(tl.int64) * heads + h) * n_q + row
    lse_row = tl.where(empty, float("-inf"), m + tl.log2(l) * LN2)
    tl.store(lse + rows_at, lse_row, mask=row_in)

    # log2 of what P = exp(x - lse) sums to: beside a large logit lse has no room for the log of a sum
    excess_row = (m - lse_row) * LOG2E + tl.log2(l)
    excess_row = tl.where(tl.abs(lse_row) < float("inf"), excess_row, 0.0)
    tl.store(excess + rows_at, excess_row, mask=row_in)
    out_head = out + b.to(tl.int64) * out_stride_b + h.to(tl.int64) * out_stride_h
    out_columns_0 = e_0[None, :] * out_stride_d
    out_columns_1 = e_1[None, :] * out_stride_d

    norm = 1.0 / l
    out_rows = out_head + row.to(tl.int64)[:, None] * out_stride_n
    acc_0 = acc_0 * norm[:, None]
    tl.store(out_rows + out_columns_0, acc_0.to(out.dtype.element_ty), mask=row_in[:, None])
    out_in_1 = row_in[:, None] & e_in_1[None, :]
    acc_1 = acc_1 * norm[:, None]
    tl.store(out_rows + out_columns_1, acc_1.to(out.dtype.element_ty), mask=out_in_1)
