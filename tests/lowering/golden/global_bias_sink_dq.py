"""attngen backward: a query tile walks its keys and sums dQ, and the gradient of bias.

spec 257fb393d8f8f8fe
    tensor bias: float[3]
    tensor sink: float[1]
    mask: i >= j and (j + 8 >= i and i + 8 >= j or 2 >= i or 2 >= j)
    score: s + bias[h, i, j]
    sink: sink[h]
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
    dq_stride_b,
    dq_stride_h,
    dq_stride_n,
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
    bias_stride_2,
):
    # program -> (batch, head, query tile)
    tiles = tl.cdiv(n_q, BLOCK_M)
    program = tl.program_id(0)
    strange = tl.zeros([], tl.int32)  # outputs that are not numbers

    # the batch, which shares a result
    for output in tl.range(program, tiles * heads * batch, tl.num_programs(0), disable_licm=True):
        query_tile = output % tiles
        h = output // tiles % heads
        b = output // tiles // heads
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
        grad_bias_head = grad_bias + b.to(tl.int64) * grad_bias_stride_b
        grad_bias_head += h.to(tl.int64) * grad_bias_stride_h
        grad_bias_rows = grad_bias_head + row.to(tl.int64)[:, None] * grad_bias_stride_n

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
            k_0 = tl.load(k_head + rows * k_stride_n + d_0[None, :])
            s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
            bias_at_at = bias_at[:, None] + j[None, :].to(tl.int64) * bias_stride_2  # [BLOCK_M, BLOCK_N]
            bias_h_i_j = tl.load(bias_at_at).to(tl.float32)  # [BLOCK_M, BLOCK_N]
            x = bias_h_i_j + scale * s
            exponent = (x - level_row[:, None]) * LOG2E - excess_row[:, None]
            p = tl.exp2(exponent)
            v_0 = tl.load(v_head + rows * v_stride_n + d_0[None, :])
            dp = tl.dot(do_0, tl.trans(v_0))  # [BLOCK_M, BLOCK_N]
            ds = p * (dp - delta_row[:, None])
            grad_bias_at = grad_bias_rows + j[None, :]
            tl.atomic_add(grad_bias_at, ds, mask=row_in[:, None], sem="relaxed")
            dq_0 = tl.dot(ds.to(k_0.dtype), k_0, dq_0)

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
            k_0 = tl.load(k_head + rows * k_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
            s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
            key_ok = j <= 2  # [BLOCK_N]
            pair_ok = (first_key[:, None] <= j[None, :]) & (last_key[:, None] >= j[None, :])
            pair_ok_2 = (i[:, None] >= j[None, :]) & (query_ok[:, None] | key_ok[None, :] | pair_ok)
            valid = pair_ok_2 & inside[None, :]
            bias_at_at = bias_at[:, None] + j_safe[None, :].to(tl.int64) * bias_stride_2
            bias_h_i_j = tl.load(bias_at_at).to(tl.float32)  # [BLOCK_M, BLOCK_N]
            x = bias_h_i_j + scale * s
            exponent = (x - level_row[:, None]) * LOG2E - excess_row[:, None]
            exponent = tl.where(valid, exponent, float("-inf"))
            p = tl.exp2(exponent)
            v_0 = tl.load(v_head + rows * v_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
            dp = tl.dot(do_0, tl.trans(v_0))  # [BLOCK_M, BLOCK_N]
            ds = p * (dp - delta_row[:, None])
            ds = tl.where(valid, ds, 0.0)
            grad_bias_at = grad_bias_rows + j[None, :]
            tl.atomic_add(grad_bias_at, ds, mask=row_in[:, None] & inside[None, :], sem="relaxed")
            dq_0 = tl.dot(ds.to(k_0.dtype), k_0, dq_0)

        # the next output adds to the same elements, maybe from other threads: in this order
        tl.debug_barrier()

        # not a number, maybe by 0 * inf of a pair that does not attend: the guarded kernel does it again
        zero = tl.sum(dq_0 - dq_0)
        strange += (zero != 0.0).to(tl.int32)

        dq_head = dq + b.to(tl.int64) * dq_stride_b + h.to(tl.int64) * dq_stride_h
        dq_rows = dq_head + row.to(tl.int64)[:, None] * dq_stride_n
        dq_0 = dq_0 * scale
        tl.store(dq_rows + d_0[None, :], dq_0.to(dq.dtype.element_ty), mask=row_in[:, None])

    tl.store(odd + program, strange)
