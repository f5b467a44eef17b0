"""attngen backward: a key tile walks its queries and sums dK and dV, and the gradient of bias.

spec 2036e41e7b74a312
    tensor bias: float[2]
    mask: true
    score: s + bias[b, j]
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
        "scale",
        "bias_stride_0",
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
    grad_bias,  # [B, heads, n_k]
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
    bias,
    bias_stride_0,
    bias_stride_1,
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
    bias_base = bias + b.to(tl.int64) * bias_stride_0
    bias_b_j = tl.load(bias_base + j_safe.to(tl.int64) * bias_stride_1).to(tl.float32)  # [BLOCK_N]
    d_0 = tl.arange(0, 64)  # [64]
    k_head = k + b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_head = v + b.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    k_rows = k_head + j.to(tl.int64)[:, None] * k_stride_n
    k_0 = tl.load(k_rows + d_0[None, :], mask=key_in[:, None], other=0.0)  # [BLOCK_N, 64]
    v_rows = v_head + j.to(tl.int64)[:, None] * v_stride_n
    v_0 = tl.load(v_rows + d_0[None, :], mask=key_in[:, None], other=0.0)  # [BLOCK_N, 64]
    dk_0 = tl.zeros([BLOCK_N, 64], tl.float32)
    dv_0 = tl.zeros([BLOCK_N, 64], tl.float32)

    # every query head that reads this key head
    for g in range(group):
        h = kv_head * group + g
        q_head = q + b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h
        do_head = do + b.to(tl.int64) * do_stride_b + h.to(tl.int64) * do_stride_h
        level_head = level + (b.to(tl.int64) * heads + h) * n_q
        delta_head = delta + (b.to(tl.int64) * heads + h) * n_q
        excess_head = excess + (b.to(tl.int64) * heads + h) * n_q
        total_bias = tl.zeros([BLOCK_N], tl.float32)

        # query tiles with a row that attends some key of this tile
        live_stop = tl.cdiv(n_q, BLOCK_M)

        # of those, the ones whose rows attend all keys of this tile
        unmasked_stop = n_q // BLOCK_M

        # the partial tiles beside them
        partial_count = live_stop - unmasked_stop

        # full query tiles: every pair attends, so no mask
        for tile in range(unmasked_stop):
            row = tile * BLOCK_M + lane_m  # [BLOCK_M]
            rows = row.to(tl.int64)[:, None]
            level_row = tl.load(level_head + row)  # [BLOCK_M]
            delta_row = tl.load(delta_head + row)  # [BLOCK_M]
            excess_row = tl.load(excess_head + row)  # [BLOCK_M]
            q_0 = tl.load(q_head + rows * q_stride_n + d_0[None, :])
            s = tl.dot(k_0, tl.trans(q_0))  # [BLOCK_N, BLOCK_M]
            x = bias_b_j[:, None] + scale * s
            exponent = (x - level_row[None, :]) * LOG2E - excess_row[None, :]
            p = tl.exp2(exponent)
            do_0 = tl.load(do_head + rows * do_stride_n + d_0[None, :])
            dp = tl.dot(v_0, tl.trans(do_0))  # [BLOCK_N, BLOCK_M]
            ds = p * (dp - delta_row[None, :])
            total_bias += tl.sum(ds, 1)
            dv_0 = tl.dot(p.to(do_0.dtype), do_0, dv_0)
            dk_0 = tl.dot(ds.to(q_0.dtype), q_0, dk_0)

        # partial query tiles: it reaches past the end
        for step in tl.range(partial_count, num_stages=1):
            tile = unmasked_stop + step
            row = tile * BLOCK_M + lane_m  # [BLOCK_M]
            rows = row.to(tl.int64)[:, None]
            inside = row < n_q  # [BLOCK_M]
            level_row = tl.load(level_head + row, mask=inside, other=0.0)  # [BLOCK_M]
            delta_row = tl.load(delta_head + row, mask=inside, other=0.0)  # [BLOCK_M]
            excess_row = tl.load(excess_head + row, mask=inside, other=0.0)  # [BLOCK_M]
            q_0 = tl.load(q_head + rows * q_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
            s = tl.dot(k_0, tl.trans(q_0))  # [BLOCK_N, BLOCK_M]
            x = bias_b_j[:, None] + scale * s
            exponent = (x - level_row[None, :]) * LOG2E - excess_row[None, :]
            exponent = tl.where(inside[None, :], exponent, float("-inf"))
            p = tl.exp2(exponent)
            do_0 = tl.load(do_head + rows * do_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
            dp = tl.dot(v_0, tl.trans(do_0))  # [BLOCK_N, BLOCK_M]
            ds = p * (dp - delta_row[None, :])
            ds = tl.where(inside[None, :], ds, 0.0)
            total_bias += tl.sum(ds, 1)
            dv_0 = tl.dot(p.to(do_0.dtype), do_0, dv_0)
            dk_0 = tl.dot(ds.to(q_0.dtype), q_0, dk_0)

        tl.store(grad_bias + (b.to(tl.int64) * heads + h) * n_k + j, total_bias, mask=key_in)

    dk_head = dk + b.to(tl.int64) * dk_stride_b + kv_head.to(tl.int64) * dk_stride_h
    dv_head = dv + b.to(tl.int64) * dv_stride_b + kv_head.to(tl.int64) * dv_stride_h
    dk_rows = dk_head + j.to(tl.int64)[:, None] * dk_stride_n
    dk_0 = dk_0 * scale
    tl.store(dk_rows + d_0[None, :], dk_0.to(dk.dtype.element_ty), mask=key_in[:, None])
    dv_rows = dv_head + j.to(tl.int64)[:, None] * dv_stride_n
    tl.store(dv_rows + d_0[None, :], dv_0.to(dv.dtype.element_ty), mask=key_in[:, None])
