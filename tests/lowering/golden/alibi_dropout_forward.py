"""attngen forward: a query tile walks its keys with the online softmax.

spec 99dfc587a8cf28a7
    tensor slope: float[1]
    mask: i >= j
    score: s + (j - i) * slope[h]
    dropout: 0.1
head dims 64 and 64, float32
schedule block_m=64, block_n=32, num_warps=4, num_stages=2
"""

import triton
import triton.language as tl

BLOCK_M = tl.constexpr(64)  # query rows of a tile
BLOCK_N = tl.constexpr(32)  # keys of a tile
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # no logit is lower, and LOWEST - LOWEST is 0
PRECISION = tl.constexpr("ieee")


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
        "seed",
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
    q_offsets,  # [B]
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

    q_offset = tl.load(q_offsets + b).to(tl.int32)
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
    k_head = k + b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_head = v + b.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    q_rows = q_head + row.to(tl.int64)[:, None] * q_stride_n
    q_0 = tl.load(q_rows + d_0[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 64]
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc_0 = tl.zeros([BLOCK_M, 64], tl.float32)

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
        s = tl.dot(q_0, tl.trans(k_0), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        keep = uniform(hash_4[:, None] ^ j[None, :].to(tl.uint32)) >= 0.1
        x = slope_h * (j[None, :] - i[:, None]).to(tl.float32) + scale * s
        m_new = tl.maximum(m, tl.max(x, 1))
        p = tl.exp2((x - m_new[:, None]) * LOG2E)
        alpha = tl.exp2((m - m_new) * LOG2E)
        m = m_new
        l = l * alpha + tl.sum(p, 1)
        p = tl.where(keep, p * 1.1111111111111112, 0.0)
        v_0 = tl.load(v_head + rows * v_stride_n + d_0[None, :])
        acc_0 = tl.dot(p.to(v_0.dtype), v_0, acc_0 * alpha[:, None], input_precision=PRECISION)

    # partial key tiles: only some pairs attend
    for step in tl.range(partial_count, num_stages=1):
        tile = unmasked_stop + step
        j = tile * BLOCK_N + lane_n  # [BLOCK_N]
        rows = j.to(tl.int64)[:, None]
        inside = j < n_k  # [BLOCK_N]
        k_0 = tl.load(k_head + rows * k_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
        s = tl.dot(q_0, tl.trans(k_0), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        valid = (i[:, None] >= j[None, :]) & inside[None, :]
        keep = uniform(hash_4[:, None] ^ j[None, :].to(tl.uint32)) >= 0.1
        x = slope_h * (j[None, :] - i[:, None]).to(tl.float32) + scale * s
        x = tl.where(valid, x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        p = tl.exp2((x - m_new[:, None]) * LOG2E)
        alpha = tl.exp2((m - m_new) * LOG2E)
        m = m_new
        l = l * alpha + tl.sum(p, 1)
        p = tl.where(keep, p * 1.1111111111111112, 0.0)
        v_0 = tl.load(v_head + rows * v_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
        acc_0 = tl.dot(p.to(v_0.dtype), v_0, acc_0 * alpha[:, None], input_precision=PRECISION)

    # not a number, maybe by 0 * inf of a pair that does not attend: the guarded kernel does it again
    zero = tl.sum(acc_0 - acc_0)
    tl.store(odd + program, (zero != 0.0).to(tl.int32))

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

    norm = 1.0 / l
    out_rows = out_head + row.to(tl.int64)[:, None] * out_stride_n
    acc_0 = acc_0 * norm[:, None]
    tl.store(out_rows + d_0[None, :], acc_0.to(out.dtype.element_ty), mask=row_in[:, None])
