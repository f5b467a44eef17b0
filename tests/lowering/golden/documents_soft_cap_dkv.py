"""attngen backward: a key tile walks its queries and sums dK and dV.

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
def dkv(
    k,  # [B, heads // group, n_k, D]
    v,  # [B, heads // group, n_k, Dv]
    q,  # [B, heads, n_q, D]
    do,  # [B, heads, n_q, Dv]
    dk,  # [B, heads // group, n_k, D]
    dv,  # [B, heads // group, n_k, Dv]
    level,  # [B, heads, n_q]: lse as P needs it
    delta,  # [B, heads, n_q]
    odd,  # [programs]: what is not finite there
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    do_stride_b,
    do_stride_h,
    do_stride_n,
    dk_stride_b,
    dk_stride_h,
    dk_stride_n,
    dv_stride_b,
    dv_stride_h,
    dv_stride_n,
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
    doc_base = doc + b.to(tl.int64) * doc_stride_0
    doc_b_j = tl.load(doc_base + j_safe.to(tl.int64) * doc_stride_1)  # [BLOCK_N]
    d_0 = tl.arange(0, 64)  # [64]
    d_1 = 64 + tl.arange(0, 16)  # [16]
    e_0 = tl.arange(0, 128)  # [128]
    e_1 = 128 + tl.arange(0, 64)  # [64]
    k_head = k + b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_head = v + b.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    k_rows = k_head + j.to(tl.int64)[:, None] * k_stride_n
    k_0 = tl.load(k_rows + d_0[None, :], mask=key_in[:, None], other=0.0)  # [BLOCK_N, 64]
    k_1 = tl.load(k_rows + d_1[None, :], mask=key_in[:, None], other=0.0)  # [BLOCK_N, 16]
    v_rows = v_head + j.to(tl.int64)[:, None] * v_stride_n
    v_0 = tl.load(v_rows + e_0[None, :], mask=key_in[:, None], other=0.0)  # [BLOCK_N, 128]
    v_1 = tl.load(v_rows + e_1[None, :], mask=key_in[:, None], other=0.0)  # [BLOCK_N, 64]
    dk_0 = tl.zeros([BLOCK_N, 64], tl.float32)
    dk_1 = tl.zeros([BLOCK_N, 16], tl.float32)
    dv_0 = tl.zeros([BLOCK_N, 128], tl.float32)
    dv_1 = tl.zeros([BLOCK_N, 64], tl.float32)

    # every query head that reads this key head
    for g in range(group):
        h = kv_head * group + g
        q_head = q + b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h
        do_head = do + b.to(tl.int64) * do_stride_b + h.to(tl.int64) * do_stride_h
        level_head = level + (b.to(tl.int64) * heads + h) * n_q
        delta_head = delta + (b.to(tl.int64) * heads + h) * n_q

        # this tile's first and last key, as positions
        first = key_tile * BLOCK_N
        last = tl.minimum(key_tile * BLOCK_N + BLOCK_N, n_k) - 1

        # what this key tile's captured data allow, found before the launch
        doc_first_row = doc_first_table + b * doc_first_stride_b
        doc_first = tl.load(doc_first_row + h * doc_first_stride_h + key_tile)
        doc_stop_row = doc_stop_table + b * doc_stop_stride_b
        doc_stop = tl.load(doc_stop_row + h * doc_stop_stride_h + key_tile)
        doc_run_first_row = doc_run_first_table + b * doc_run_first_stride_b
        doc_run_first_row_base = doc_run_first_row + h * doc_run_first_stride_h + key_tile
        doc_run_first = tl.load(doc_run_first_row_base)
        doc_run_stop_row = doc_run_stop_table + b * doc_run_stop_stride_b
        doc_run_stop = tl.load(doc_run_stop_row + h * doc_run_stop_stride_h + key_tile)

        # query tiles with a row that attends some key of this tile
        live_start = tl.maximum(tl.maximum(0, doc_first - q_offset), first - q_offset)
        live_end = tl.minimum(n_q, doc_stop - q_offset)
        live_first = live_start // BLOCK_M
        live_stop = tl.where(live_end > live_start, tl.cdiv(live_end, BLOCK_M), live_first)

        # of those, the ones whose rows attend all keys of this tile
        unmasked_start = tl.maximum(tl.maximum(0, doc_run_first - q_offset), last - q_offset)
        unmasked_first = tl.cdiv(unmasked_start, BLOCK_M)
        masked_first = tl.maximum(0, tl.minimum(n_q, doc_run_stop - q_offset)) // BLOCK_M
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

        # full query tiles: every pair attends, so no mask
        for step in range(full_count):
            tile = full_first + step
            row = tile * BLOCK_M + lane_m  # [BLOCK_M]
            rows = row.to(tl.int64)[:, None]
            level_row = tl.load(level_head + row)  # [BLOCK_M]
            delta_row = tl.load(delta_head + row)  # [BLOCK_M]
            q_0 = tl.load(q_head + rows * q_stride_n + d_0[None, :])
            q_1 = tl.load(q_head + rows * q_stride_n + d_1[None, :])
            s = tl.dot(k_0, tl.trans(q_0))  # [BLOCK_N, BLOCK_M]
            s = tl.dot(k_1, tl.trans(q_1), s)
            s = s * scale
            pair_term = tanh(0.03333333333333333 * s)  # [BLOCK_N, BLOCK_M]
            x = 30.0 * LOG2E * pair_term
            exponent = x - level_row[None, :]
            p = tl.exp2(exponent)
            do_0 = tl.load(do_head + rows * do_stride_n + e_0[None, :])
            do_1 = tl.load(do_head + rows * do_stride_n + e_1[None, :])
            dp = tl.dot(v_0, tl.trans(do_0))  # [BLOCK_N, BLOCK_M]
            dp = tl.dot(v_1, tl.trans(do_1), dp)
            ds = p * (dp - delta_row[None, :]) * (1.0 - pair_term * pair_term)
            dv_0 = tl.dot(p.to(do_0.dtype), do_0, dv_0)
            dv_1 = tl.dot(p.to(do_1.dtype), do_1, dv_1)
            dk_0 = tl.dot(ds.to(q_0.dtype), q_0, dk_0)
            dk_1 = tl.dot(ds.to(q_1.dtype), q_1, dk_1)

        # partial query tiles: only some pairs attend
        for step in range(partial_count):
            tile = live_first + step
            tile = tl.where(step < before_full, tile, skip_full + step)
            row = tile * BLOCK_M + lane_m  # [BLOCK_M]
            rows = row.to(tl.int64)[:, None]
            inside = row < n_q  # [BLOCK_M]
            i = row + q_offset  # [BLOCK_M]
            i_safe = tl.minimum(row, n_q - 1) + q_offset  # [BLOCK_M]
            level_row = tl.load(level_head + row, mask=inside, other=0.0)  # [BLOCK_M]
            delta_row = tl.load(delta_head + row, mask=inside, other=0.0)  # [BLOCK_M]
            q_0 = tl.load(q_head + rows * q_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
            q_1 = tl.load(q_head + rows * q_stride_n + d_1[None, :], mask=inside[:, None], other=0.0)
            s = tl.dot(k_0, tl.trans(q_0))  # [BLOCK_N, BLOCK_M]
            s = tl.dot(k_1, tl.trans(q_1), s)
            s = s * scale
            doc_b_i = tl.load(doc_base + i_safe.to(tl.int64) * doc_stride_1)  # [BLOCK_M]
            pair_ok = (doc_b_j[:, None] == doc_b_i[None, :]) & (j[:, None] <= i[None, :])
            valid = pair_ok & inside[None, :]
            pair_term = tanh(0.03333333333333333 * s)  # [BLOCK_N, BLOCK_M]
            x = 30.0 * LOG2E * pair_term
            exponent = x - level_row[None, :]
            exponent = tl.where(valid, exponent, float("-inf"))
            p = tl.exp2(exponent)
            do_0 = tl.load(do_head + rows * do_stride_n + e_0[None, :], mask=inside[:, None], other=0.0)
            do_1 = tl.load(do_head + rows * do_stride_n + e_1[None, :], mask=inside[:, None], other=0.0)
            dp = tl.dot(v_0, tl.trans(do_0))  # [BLOCK_N, BLOCK_M]
            dp = tl.dot(v_1, tl.trans(do_1), dp)
            ds = p * (dp - delta_row[None, :]) * (1.0 - pair_term * pair_term)
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
    dv_head = dv + b.to(tl.int64) * dv_stride_b + kv_head.to(tl.int64) * dv_stride_h
    dk_rows = dk_head + j.to(tl.int64)[:, None] * dk_stride_n
    dk_0 = dk_0 * scale
    tl.store(dk_rows + d_0[None, :], dk_0.to(dk.dtype.element_ty), mask=key_in[:, None])
    dk_1 = dk_1 * scale
    tl.store(dk_rows + d_1[None, :], dk_1.to(dk.dtype.element_ty), mask=key_in[:, None])
    dv_rows = dv_head + j.to(tl.int64)[:, None] * dv_stride_n
    tl.store(dv_rows + e_0[None, :], dv_0.to(dv.dtype.element_ty), mask=key_in[:, None])
    tl.store(dv_rows + e_1[None, :], dv_1.to(dv.dtype.element_ty), mask=key_in[:, None])
