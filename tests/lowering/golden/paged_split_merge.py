"""attngen forward, second step: merge the partial softmax states of each output.

spec a6a372efb7e8ee2d
    tensor sink: float[1]
    mask: i >= j and j + 511 >= i
    sink: sink[h]
    page_size: 16
head dims 128 and 128, bfloat16
schedule block_m=64, block_n=32, num_warps=4, num_stages=2
"""

import triton
import triton.language as tl

BLOCK_M = tl.constexpr(64)  # query rows of a tile
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # no logit is lower, and LOWEST - LOWEST is 0
HEAD_DIM_V = tl.constexpr(128)


@triton.jit(
    do_not_specialize=[
        "heads",
        "n_q",
        "splits",
    ]
)
def merge(
    out,  # [B, heads, n_q, Dv]
    lse,  # [B, heads, n_q]
    states,  # [slots, BLOCK_M, Dv]: unnormalised sums
    maxima,  # [slots, 2, BLOCK_M]: m and l
    out_stride_b,
    out_stride_h,
    out_stride_n,
    heads,
    n_q,
    splits,
    user_sink,
    user_sink_stride_0,
):
    # program -> (batch, head, query tile)
    tiles = tl.cdiv(n_q, BLOCK_M)
    program = tl.program_id(0)
    query_tile = program % tiles
    h = program // tiles % heads
    b = program // tiles // heads

    row = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_in = row < n_q  # [BLOCK_M]
    user_sink_h = tl.load(user_sink + h.to(tl.int64) * user_sink_stride_0).to(tl.float32)
    d_0 = tl.arange(0, 128)  # [128]
    lane = tl.arange(0, BLOCK_M)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc_0 = tl.zeros([BLOCK_M, 128], tl.float32)

    for number in range(program * splits, program * splits + splits):
        place = tl.full([], number, tl.int64)
        maxima_at = maxima + place * (2 * BLOCK_M) + lane
        state_rows = states + place * (BLOCK_M * HEAD_DIM_V) + lane[:, None] * HEAD_DIM_V
        m_part = tl.load(maxima_at)
        m_new = tl.maximum(m, m_part)
        alpha = tl.exp2(m - m_new)
        beta = tl.exp2(m_part - m_new)
        l = l * alpha + tl.load(maxima_at + BLOCK_M) * beta
        m = m_new
        part_0 = tl.load(state_rows + d_0[None, :])
        acc_0 = acc_0 * alpha[:, None] + part_0 * beta[:, None]

    # the sink: one more key, with value 0
    m = tl.where(l > 0.0, m * LN2, LOWEST)
    m_new = tl.maximum(m, user_sink_h)
    alpha = tl.exp2((m - m_new) * LOG2E)
    l = l * alpha + tl.exp2((user_sink_h - m_new) * LOG2E)
    m = m_new
    acc_0 = acc_0 * alpha[:, None]

    # rows without a key: out = 0, lse = -inf
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    rows_at = (b.to(tl.int64) * heads + h) * n_q + row
    lse_row = tl.where(empty, float("-inf"), m + tl.log2(l) * LN2)
    tl.store(lse + rows_at, lse_row, mask=row_in)
    out_head = out + b.to(tl.int64) * out_stride_b + h.to(tl.int64) * out_stride_h

    norm = 1.0 / l
    out_rows = out_head + row.to(tl.int64)[:, None] * out_stride_n
    acc_0 = acc_0 * norm[:, None]
    tl.store(out_rows + d_0[None, :], acc_0.to(out.dtype.element_ty), mask=row_in[:, None])
