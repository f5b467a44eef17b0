"""attngen forward, second step: merge the partial softmax states of each output.

spec fe73eeec0df43730
    param width: int
    mask: i >= j and j + width >= i + 1 and i + width >= j + 1
head dims 80 and 80, bfloat16
schedule block_m=64, block_n=32, num_warps=4, num_stages=2
"""

import triton
import triton.language as tl

BLOCK_M = tl.constexpr(64)  # query rows of a tile
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # no logit is lower, and LOWEST - LOWEST is 0
HEAD_DIM_V = tl.constexpr(80)


@triton.jit(
    do_not_specialize=[
        "heads",
        "n_q",
        "group",
    ]
)
def merge(
    out,  # [B, heads, n_q, Dv]
    lse,  # [B, heads, n_q]
    states,  # [slots, BLOCK_M, Dv]: unnormalised sums
    maxima,  # [slots, 2, BLOCK_M]: m and l
    owners,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    heads,
    n_q,
    group,
):
    # program -> (batch, head, query tile)
    tiles = tl.cdiv(n_q * group, BLOCK_M)
    program = tl.program_id(0)
    query_tile = program % tiles
    kv_heads = heads // group
    kv_head = program // tiles % kv_heads
    b = program // tiles // kv_heads
    first_slot = tl.load(owners + 2 * program)
    last_slot = tl.load(owners + (2 * program + 1))

    slot = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row = slot // group  # [BLOCK_M]
    h = kv_head * group + slot % group  # [BLOCK_M]
    row_in = row < n_q  # [BLOCK_M]
    d_0 = tl.arange(0, 64)  # [64]
    d_1 = 64 + tl.arange(0, 16)  # [16]
    written = first_slot == last_slot  # by the only program that has it
    row_in = tl.where(written, False, row_in)
    lane = tl.arange(0, BLOCK_M)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc_0 = tl.zeros([BLOCK_M, 64], tl.float32)
    acc_1 = tl.zeros([BLOCK_M, 16], tl.float32)

    for number in range(program + first_slot, tl.where(written, 0, program + last_slot + 1)):
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
        part_1 = tl.load(state_rows + d_1[None, :])
        acc_1 = acc_1 * alpha[:, None] + part_1 * beta[:, None]

    # rows without a key: out = 0, lse = -inf
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    rows_at = (b.to(tl.int64) * heads + h) * n_q + row
    lse_row = tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2)
    tl.store(lse + rows_at, lse_row, mask=row_in)
    out_head = out + b.to(tl.int64) * out_stride_b + h.to(tl.int64) * out_stride_h

    norm = 1.0 / l
    out_rows = out_head[:, None] + row.to(tl.int64)[:, None] * out_stride_n
    acc_0 = acc_0 * norm[:, None]
    tl.store(out_rows + d_0[None, :], acc_0.to(out.dtype.element_ty), mask=row_in[:, None])
    acc_1 = acc_1 * norm[:, None]
    tl.store(out_rows + d_1[None, :], acc_1.to(out.dtype.element_ty), mask=row_in[:, None])
