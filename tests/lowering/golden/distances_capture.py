"""attngen backward: the gradient of a captured tensor.

spec c4fab48bfdf3ddee
    tensor bias: float[2]
    tensor slope: float[2]
    mask: i >= j
    score: s + bias[i, j] + slope[h, min(31, i - j)]
head dims 64 and 64, bfloat16
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
        "batch",
        "scale",
        "q_offset",
        "slope_size_1",
    ]
)
def capture(
    q,  # [B, heads, n_q, D]
    do,  # [B, heads, n_q, Dv]
    k,  # [B, heads // group, n_k, D]
    v,  # [B, heads // group, n_k, Dv]
    level,  # [B, heads, n_q]: lse as P needs it
    delta,  # [B, heads, n_q]
    excess,  # [B, heads, n_q]
    grad_bias,  # [B or 1, heads or 1, n_q, n_k]
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
    grad_bias_stride_b,
    grad_bias_stride_h,
    grad_bias_stride_n,
    heads,
    n_q,
    group,
    n_k,
    batch,
    scale,
    q_offset,
    bias,
    bias_stride_0,
    bias_stride_1,
    slope,
    slope_stride_0,
    slope_stride_1,
    slope_size_1,
):
    # program -> (batch, head, query tile)
    tiles = tl.cdiv(n_q, BLOCK_M)
    program = tl.program_id(0)
    query_tile = program % tiles

    # batch and heads, which share the result
    for g in range(batch * heads):
        pair = tl.full([], g, tl.int32)
        b = pair // heads
        h = pair % heads
        kv_head = h // group

        row = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row_in = row < n_q  # [BLOCK_M]
        i = row + q_offset  # [BLOCK_M]
        i_safe = tl.minimum(row, n_q - 1) + q_offset  # [BLOCK_M]
        lane_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
        bias_at = bias + i_safe.to(tl.int64) * bias_stride_0  # [BLOCK_M]
        slope_base = slope + h.to(tl.int64) * slope_stride_0
        d_0 = tl.arange(0, 64)  # [64]
        q_head = q + b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h
        do_head = do + b.to(tl.int64) * do_stride_b + h.to(tl.int64) * do_stride_h
        q_rows = q_head + row.to(tl.int64)[:, None] * q_stride_n
        q_0 = tl.load(q_rows + d_0[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 64]
        do_rows = do_head + row.to(tl.int64)[:, None] * do_stride_n
        do_0 = tl.load(do_rows + d_0[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 64]
        k_head = k + b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
        v_head = v + b.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
        level_head = level + (b.to(tl.int64) * heads + h) * n_q
        delta_head = delta + (b.to(tl.int64) * heads + h) * n_q
        excess_head = excess + (b.to(tl.int64) * heads + h) * n_q
        level_row = tl.load(level_head + row, mask=row_in, other=float("inf"))  # [BLOCK_M]
        delta_row = tl.load(delta_head + row, mask=row_in, other=0.0)  # [BLOCK_M]
        excess_row = tl.load(excess_head + row, mask=row_in, other=0.0)  # [BLOCK_M]
        grad_bias_head = grad_bias + b.to(tl.int64) * grad_bias_stride_b
        grad_bias_head += h.to(tl.int64) * grad_bias_stride_h
        grad_bias_rows = grad_bias_head + row.to(tl.int64)[:, None] * grad_bias_stride_n

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
            bias_at_at = bias_at[:, None] + j[None, :].to(tl.int64) * bias_stride_1  # [BLOCK_M, BLOCK_N]
            bias_i_j = tl.load(bias_at_at).to(tl.float32)  # [BLOCK_M, BLOCK_N]
            slope_index = tl.maximum(tl.minimum(tl.minimum(31, i[:, None] - j[None, :]), slope_size_1 - 1), 0)
            slope_value = tl.load(slope_base + slope_index.to(tl.int64) * slope_stride_1).to(tl.float32)
            x = bias_i_j + slope_value + scale * s
            exponent = (x - level_row[:, None]) * LOG2E - excess_row[:, None]
            p = tl.exp2(exponent)
            v_0 = tl.load(v_head + rows * v_stride_n + d_0[None, :])
            dp = tl.dot(do_0, tl.trans(v_0))  # [BLOCK_M, BLOCK_N]
            ds = p * (dp - delta_row[:, None])
            grad_bias_at = grad_bias_rows + j[None, :]
            tl.atomic_add(grad_bias_at, ds, mask=row_in[:, None], sem="relaxed")

        # partial key tiles: only some pairs attend
        for step in tl.range(partial_count, num_stages=1):
            tile = unmasked_stop + step
            j = tile * BLOCK_N + lane_n  # [BLOCK_N]
            rows = j.to(tl.int64)[:, None]
            inside = j < n_k  # [BLOCK_N]
            j_safe = tl.minimum(j, n_k - 1)  # [BLOCK_N]
            k_0 = tl.load(k_head + rows * k_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
            s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
            valid = (i[:, None] >= j[None, :]) & inside[None, :]
            bias_at_at = bias_at[:, None] + j_safe[None, :].to(tl.int64) * bias_stride_1
            bias_i_j = tl.load(bias_at_at).to(tl.float32)  # [BLOCK_M, BLOCK_N]
            slope_index = tl.maximum(tl.minimum(tl.minimum(31, i[:, None] - j[None, :]), slope_size_1 - 1), 0)
            slope_value = tl.load(slope_base + slope_index.to(tl.int64) * slope_stride_1).to(tl.float32)
            x = bias_i_j + slope_value + scale * s
            exponent = (x - level_row[:, None]) * LOG2E - excess_row[:, None]
            exponent = tl.where(valid, exponent, float("-inf"))
            p = tl.exp2(exponent)
            v_0 = tl.load(v_head + rows * v_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
            dp = tl.dot(do_0, tl.trans(v_0))  # [BLOCK_M, BLOCK_N]
            ds = p * (dp - delta_row[:, None])
            ds = tl.where(valid, ds, 0.0)
            grad_bias_at = grad_bias_rows + j[None, :]
            tl.atomic_add(grad_bias_at, ds, mask=row_in[:, None] & inside[None, :], sem="relaxed")

        # the next output adds to the same elements, maybe from other threads: in this order
        tl.debug_barrier()
