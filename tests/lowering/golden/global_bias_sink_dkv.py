"""attngen backward: a key tile walks its queries and sums dK and dV.

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


@triton.jit(
    do_not_specialize=[
        "k_stride_b",
        "k_stride_h",
        "k_stride_n",
        "k_stride_d",
        "v_stride_b",
        "v_stride_h",
        "v_stride_n",
        "v_stride_d",
        "q_stride_b",
        "q_stride_h",
        "q_stride_n",
        "q_stride_d",
        "do_stride_b",
        "do_stride_h",
        "do_stride_n",
        "do_stride_d",
        "dk_stride_b",
        "dk_stride_h",
        "dk_stride_n",
        "dk_stride_d",
        "dv_stride_b",
        "dv_stride_h",
        "dv_stride_n",
        "dv_stride_d",
        "heads",
        "n_q",
        "group",
        "n_k",
        "scale",
        "q_offset",
    ]
)
def dkv(
    k,  # [B, heads // group, n_k, D]
    v,  # [B, heads // group, n_k, Dv]
    q,  # [B, heads, n_q, D]
    do,  # [B, heads, n_q, Dv]
    dk,  # [B, heads // group, n_k, D]
    dv,  # [B, heads // group, n_k, Dv]
    level,  # [B, heads, n_q]: lse as P needs it
    delta,  # [B, heads, n_q]
    excess,  # [B, heads, n_q]
    odd,  # [programs]: what is not finite there
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    q_stride_d,
    do_stride_b,
    do_stride_h,
    do_stride_n,
    do_stride_d,
    dk_stride_b,
    dk_stride_h,
    dk_stride_n,
    dk_stride_d,
    dv_stride_b,
    dv_stride_h,
    dv_stride_n,
    dv_stride_d,
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
):
    # program -> (batch, head, key tile)
    tiles = tl.cdiv(n_k, BLOCK_N)
    program = tl.program_id(0)
    key_tile = program % tiles
    kv_heads = heads // group
    kv_head = program // tiles % kv_heads
    b = program // tiles // kv_heads

    j = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    key_in = j < n_k  # [BLOCK_N]
    j_safe = tl.minimum(j, n_k - 1)  # [BLOCK_N]
    lane_m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    key_ok = j <= 2  # [BLOCK_N]
    last_query = j + 8  # [BLOCK_N]
    first_query = j - 8  # [BLOCK_N]
    d_0 = tl.arange(0, 32)  # [32]
    d_1 = 32 + tl.arange(0, 16)  # [16]
    d_in_1 = d_1 < 40
    e_0 = tl.arange(0, 16)  # [16]
    e_1 = 16 + tl.arange(0, 16)  # [16]
    e_in_1 = e_1 < 24
    k_head = k + b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    k_columns_0 = d_0[None, :] * k_stride_d
    k_columns_1 = d_1[None, :] * k_stride_d
    v_head = v + b.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    v_columns_0 = e_0[None, :] * v_stride_d
    v_columns_1 = e_1[None, :] * v_stride_d
    k_rows = k_head + j.to(tl.int64)[:, None] * k_stride_n
    k_0 = tl.load(k_rows + k_columns_0, mask=key_in[:, None], other=0.0)  # [BLOCK_N, 32]
    k_in_1 = key_in[:, None] & d_in_1[None, :]
    k_1 = tl.load(k_rows + k_columns_1, mask=k_in_1, other=0.0)  # [BLOCK_N, 16]
    v_rows = v_head + j.to(tl.int64)[:, None] * v_stride_n
    v_0 = tl.load(v_rows + v_columns_0, mask=key_in[:, None], other=0.0)  # [BLOCK_N, 16]
    v_in_1 = key_in[:, None] & e_in_1[None, :]
    v_1 = tl.load(v_rows + v_columns_1, mask=v_in_1, other=0.0)  # [BLOCK_N, 16]
    dk_0 = tl.zeros([BLOCK_N, 32], tl.float32)
    dk_1 = tl.zeros([BLOCK_N, 16], tl.float32)
    dv_0 = tl.zeros([BLOCK_N, 16], tl.float32)
    dv_1 = tl.zeros([BLOCK_N, 16], tl.float32)

    # every query head that reads this key head
    for g in tl.range(group, disable_licm=True):
        h = kv_head * group + g
        bias_base = bias + h.to(tl.int64) * bias_stride_0
        bias_at = bias_base + j_safe.to(tl.int64) * bias_stride_2  # [BLOCK_N]
        q_head = q + b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h
        q_columns_0 = d_0[None, :] * q_stride_d
        q_columns_1 = d_1[None, :] * q_stride_d
        do_head = do + b.to(tl.int64) * do_stride_b + h.to(tl.int64) * do_stride_h
        do_columns_0 = e_0[None, :] * do_stride_d
        do_columns_1 = e_1[None, :] * do_stride_d
        level_head = level + (b.to(tl.int64) * heads + h) * n_q
        delta_head = delta + (b.to(tl.int64) * heads + h) * n_q
        excess_head = excess + (b.to(tl.int64) * heads + h) * n_q

        # this tile's first and last key, as positions
        first = key_tile * BLOCK_N
        last = tl.minimum(key_tile * BLOCK_N + BLOCK_N, n_k) - 1

        # query tiles with a row that attends some key of this tile
        live1_start = tl.maximum(0, first - q_offset)
        live1_end = tl.minimum(n_q, -q_offset + 3)
        live1_first = live1_start // BLOCK_M
        live1_stop = tl.where(live1_end > live1_start, tl.cdiv(live1_end, BLOCK_M), live1_first)
        live2_end = tl.minimum(n_q, last - q_offset + 9)
        live2_stop = tl.where(live2_end > live1_start, tl.cdiv(live2_end, BLOCK_M), live1_first)
        live3_end = n_q
        any_live3 = (first <= 2) & (live3_end > live1_start)
        live3_stop = tl.where(any_live3, tl.cdiv(live3_end, BLOCK_M), live1_first)
        live2_reached = tl.maximum(live1_stop, live2_stop)
        live3_first = tl.maximum(live1_first, live2_reached)

        # of those, the ones whose rows attend all keys of this tile
        hole1_stop = tl.cdiv(tl.maximum(0, last - q_offset), BLOCK_M)
        bound = tl.where(last >= 3, tl.maximum(-q_offset + 12, first - q_offset + 9), n_q)
        hole2_first = tl.maximum(hole1_stop, tl.maximum(0, tl.minimum(n_q, bound)) // BLOCK_M)
        full1_stop = tl.minimum(hole2_first, live1_stop)
        full1_count = tl.maximum(0, full1_stop - hole1_stop)
        full2_first = tl.maximum(hole1_stop, live1_stop)
        full2_stop = tl.minimum(hole2_first, live2_stop)
        full2_count = tl.maximum(0, full2_stop - full2_first)
        full3_first = tl.maximum(hole1_stop, live3_first)
        full3_stop = tl.minimum(hole2_first, live3_stop)
        full3_count = tl.maximum(0, full3_stop - full3_first)

        # the partial tiles beside them
        partial1_stop = tl.minimum(hole1_stop, live1_stop)
        partial1_count = tl.maximum(0, partial1_stop - live1_first)
        partial2_count = tl.maximum(0, live1_stop - hole2_first)
        partial3_stop = tl.minimum(hole1_stop, live2_stop)
        partial3_count = tl.maximum(0, partial3_stop - live1_stop)
        partial4_first = tl.maximum(hole2_first, live1_stop)
        partial4_count = tl.maximum(0, live2_stop - partial4_first)
        partial5_stop = tl.minimum(hole1_stop, live3_stop)
        partial5_count = tl.maximum(0, partial5_stop - live3_first)
        partial6_first = tl.maximum(hole2_first, live3_first)
        partial6_count = tl.maximum(0, live3_stop - partial6_first)

        # those full tiles, one interval behind the other
        full_skip2 = full2_first - full1_count
        full_count2 = full1_count + full2_count
        full_skip3 = full3_first - full_count2
        full_count = full3_count + full_count2

        # those partial tiles, one interval behind the other
        partial_skip2 = hole2_first - partial1_count
        partial_count2 = partial1_count + partial2_count
        partial_skip3 = live1_stop - partial_count2
        partial_count3 = partial3_count + partial_count2
        partial_skip4 = partial4_first - partial_count3
        partial_count4 = partial4_count + partial_count3
        partial_skip5 = live3_first - partial_count4
        partial_count5 = partial5_count + partial_count4
        partial_skip6 = partial6_first - partial_count5
        partial_count = partial6_count + partial_count5

        # full query tiles: every pair attends, so no mask
        for step in range(full_count):
            tile = hole1_stop + step
            tile = tl.where(step < full1_count, tile, full_skip2 + step)
            tile = tl.where(step < full_count2, tile, full_skip3 + step)
            row = tile * BLOCK_M + lane_m  # [BLOCK_M]
            rows = row.to(tl.int64)[:, None]
            i = row + q_offset  # [BLOCK_M]
            level_row = tl.load(level_head + row)  # [BLOCK_M]
            delta_row = tl.load(delta_head + row)  # [BLOCK_M]
            excess_row = tl.load(excess_head + row)  # [BLOCK_M]
            q_0 = tl.load(q_head + rows * q_stride_n + q_columns_0)
            q_1 = tl.load(q_head + rows * q_stride_n + q_columns_1, mask=d_in_1[None, :], other=0.0)
            s = tl.dot(k_0, tl.trans(q_0))  # [BLOCK_N, BLOCK_M]
            s = tl.dot(k_1, tl.trans(q_1), s)
            bias_at_at = bias_at[:, None] + i[None, :].to(tl.int64) * bias_stride_1  # [BLOCK_N, BLOCK_M]
            bias_h_i_j = tl.load(bias_at_at).to(tl.float32)  # [BLOCK_N, BLOCK_M]
            x = bias_h_i_j + scale * s
            exponent = (x - level_row[None, :]) * LOG2E - excess_row[None, :]
            p = tl.exp2(exponent)
            do_0 = tl.load(do_head + rows * do_stride_n + do_columns_0)
            do_1 = tl.load(do_head + rows * do_stride_n + do_columns_1, mask=e_in_1[None, :], other=0.0)
            dp = tl.dot(v_0, tl.trans(do_0))  # [BLOCK_N, BLOCK_M]
            dp = tl.dot(v_1, tl.trans(do_1), dp)
            ds = p * (dp - delta_row[None, :])
            dv_0 = tl.dot(p.to(do_0.dtype), do_0, dv_0)
            dv_1 = tl.dot(p.to(do_1.dtype), do_1, dv_1)
            dk_0 = tl.dot(ds.to(q_0.dtype), q_0, dk_0)
            dk_1 = tl.dot(ds.to(q_1.dtype), q_1, dk_1)

        # partial query tiles: only some pairs attend
        for step in tl.range(partial_count, num_stages=1):
            tile = live1_first + step
            tile = tl.where(step < partial1_count, tile, partial_skip2 + step)
            tile = tl.where(step < partial_count2, tile, partial_skip3 + step)
            tile = tl.where(step < partial_count3, tile, partial_skip4 + step)
            tile = tl.where(step < partial_count4, tile, partial_skip5 + step)
            tile = tl.where(step < partial_count5, tile, partial_skip6 + step)
            row = tile * BLOCK_M + lane_m  # [BLOCK_M]
            rows = row.to(tl.int64)[:, None]
            inside = row < n_q  # [BLOCK_M]
            i = row + q_offset  # [BLOCK_M]
            i_safe = tl.minimum(row, n_q - 1) + q_offset  # [BLOCK_M]
            level_row = tl.load(level_head + row, mask=inside, other=0.0)  # [BLOCK_M]
            delta_row = tl.load(delta_head + row, mask=inside, other=0.0)  # [BLOCK_M]
            excess_row = tl.load(excess_head + row, mask=inside, other=0.0)  # [BLOCK_M]
            q_0 = tl.load(q_head + rows * q_stride_n + q_columns_0, mask=inside[:, None], other=0.0)
            q_in_1 = inside[:, None] & d_in_1[None, :]
            q_1 = tl.load(q_head + rows * q_stride_n + q_columns_1, mask=q_in_1, other=0.0)
            s = tl.dot(k_0, tl.trans(q_0))  # [BLOCK_N, BLOCK_M]
            s = tl.dot(k_1, tl.trans(q_1), s)
            query_ok = i <= 2  # [BLOCK_M]
            pair_ok = (last_query[:, None] >= i[None, :]) & (first_query[:, None] <= i[None, :])
            pair_ok_2 = (j[:, None] <= i[None, :]) & (query_ok[None, :] | key_ok[:, None] | pair_ok)
            valid = pair_ok_2 & inside[None, :]
            bias_at_at = bias_at[:, None] + i_safe[None, :].to(tl.int64) * bias_stride_1
            bias_h_i_j = tl.load(bias_at_at).to(tl.float32)  # [BLOCK_N, BLOCK_M]
            x = bias_h_i_j + scale * s
            exponent = (x - level_row[None, :]) * LOG2E - excess_row[None, :]
            exponent = tl.where(valid, exponent, float("-inf"))
            p = tl.exp2(exponent)
            do_0 = tl.load(do_head + rows * do_stride_n + do_columns_0, mask=inside[:, None], other=0.0)
            do_in_1 = inside[:, None] & e_in_1[None, :]
            do_1 = tl.load(do_head + rows * do_stride_n + do_columns_1, mask=do_in_1, other=0.0)
            dp = tl.dot(v_0, tl.trans(do_0))  # [BLOCK_N, BLOCK_M]
            dp = tl.dot(v_1, tl.trans(do_1), dp)
            ds = p * (dp - delta_row[None, :])
            dv_0 = tl.dot(p.to(do_0.dtype), do_0, dv_0)
            dv_1 = tl.dot(p.to(do_1.dtype), do_1, dv_1)
            dk_0 = tl.dot(ds.to(q_0.dtype), q_0, dk_0)
            dk_1 = tl.dot(ds.to(q_1.dtype), q_1, dk_1)

    # not a number, maybe by 0 * inf of a pair that does not attend: the guarded kernel does it again
    zero = tl.sum(dk_0 - dk_0)
    zero += tl.sum(dk_1 - dk_1)
    zero += tl.sum(dv_0 - dv_0)
    zero += tl.sum(dv_1 - dv_1)
    tl.store(odd + program, (zero != 0.0).to(tl.int32))

    dk_head = dk + b.to(tl.int64) * dk_stride_b + kv_head.to(tl.int64) * dk_stride_h
    dk_columns_0 = d_0[None, :] * dk_stride_d
    dk_columns_1 = d_1[None, :] * dk_stride_d
    dv_head = dv + b.to(tl.int64) * dv_stride_b + kv_head.to(tl.int64) * dv_stride_h
    dv_columns_0 = e_0[None, :] * dv_stride_d
    dv_columns_1 = e_1[None, :] * dv_stride_d
    dk_rows = dk_head + j.to(tl.int64)[:, None] * dk_stride_n
    dk_0 = dk_0 * scale
    tl.store(dk_rows + dk_columns_0, dk_0.to(dk.dtype.element_ty), mask=key_in[:, None])
    dk_in_1 = key_in[:, None] & d_in_1[None, :]
    dk_1 = dk_1 * scale
    tl.store(dk_rows + dk_columns_1, dk_1.to(dk.dtype.element_ty), mask=dk_in_1)
    dv_rows = dv_head + j.to(tl.int64)[:, None] * dv_stride_n
    tl.store(dv_rows + dv_columns_0, dv_0.to(dv.dtype.element_ty), mask=key_in[:, None])
    dv_in_1 = key_in[:, None] & e_in_1[None, :]
    tl.store(dv_rows + dv_columns_1, dv_1.to(dv.dtype.element_ty), mask=dv_in_1)
