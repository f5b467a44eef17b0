"""attngen backward: a key tile walks its queries and sums dK and dV.

spec 1dc2518f2451e059
    mask: i >= j
    lists: rows(weighted)
head dims 64 and 64, bfloat16
schedule block_m=64, block_n=16, num_warps=4, num_stages=2
"""

import triton
import triton.language as tl

BLOCK_M = tl.constexpr(64)  # query rows of a tile
BLOCK_N = tl.constexpr(16)  # keys of a tile
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=[
        "heads",
        "n_q",
        "group",
        "n_k",
        "scale",
        "q_offset",
        "key_edges_stride_b",
        "key_edges_stride_h",
        "key_runs_stride_b",
        "key_runs_stride_h",
        "edge_weight_stride_b",
        "edge_weight_stride_h",
        "key_places_stride_b",
        "key_places_stride_h",
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
    key_edges,  # [B or 1, heads or 1, listed]
    key_edges_stride_b,
    key_edges_stride_h,
    key_runs,  # [B or 1, heads or 1, key rows, 2]
    key_runs_stride_b,
    key_runs_stride_h,
    edge_weight,  # [B or 1, heads or 1, listed]
    edge_weight_stride_b,
    edge_weight_stride_h,
    key_places,  # [B or 1, heads or 1, listed]
    key_places_stride_b,
    key_places_stride_h,
):
    # program -> (batch, head, key tile)
    tiles = n_k
    program = tl.program_id(0)
    key_tile = program % tiles
    kv_heads = heads // group
    kv_head = program // tiles % kv_heads
    b = program // tiles // kv_heads

    slot = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    j = key_tile + tl.zeros_like(slot)  # [BLOCK_N]
    key_in = slot < 1  # [BLOCK_N]
    lane_m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
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

        # where this key's list starts, and how long it is
        run = key_runs + b.to(tl.int64) * key_runs_stride_b
        run = run + kv_head.to(tl.int64) * key_runs_stride_h
        run = run + key_tile.to(tl.int64) * 2
        first_edge = tl.load(run).to(tl.int64)
        edges = tl.load(run + 1).to(tl.int32)
        listed = key_edges + b.to(tl.int64) * key_edges_stride_b
        listed = listed + kv_head.to(tl.int64) * key_edges_stride_h
        listed = listed + first_edge
        weights = edge_weight + b.to(tl.int64) * edge_weight_stride_b
        weights = weights + kv_head.to(tl.int64) * edge_weight_stride_h
        places = key_places + b.to(tl.int64) * key_places_stride_b
        places = places + kv_head.to(tl.int64) * key_places_stride_h
        places = places + first_edge
        partial_count = tl.cdiv(edges, BLOCK_M)

        # partial query tiles: only some pairs attend
        for step in range(partial_count):
            tile = step
            edge = tile * BLOCK_M + lane_m  # [BLOCK_M]
            inside = edge < edges  # [BLOCK_M]
            row = tl.load(listed + edge, mask=inside, other=0).to(tl.int32)  # [BLOCK_M]
            place = tl.load(places + edge, mask=inside, other=0)  # [BLOCK_M]
            weight = tl.load(weights + place, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M]
            rows = row.to(tl.int64)[:, None]
            i = row + q_offset  # [BLOCK_M]
            level_row = tl.load(level_head + row, mask=inside, other=0.0)  # [BLOCK_M]
            delta_row = tl.load(delta_head + row, mask=inside, other=0.0)  # [BLOCK_M]
            excess_row = tl.load(excess_head + row, mask=inside, other=0.0)  # [BLOCK_M]
            q_0 = tl.load(q_head + rows * q_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
            s = tl.dot(k_0, tl.trans(q_0))  # [BLOCK_N, BLOCK_M]
            valid = (j[:, None] <= i[None, :]) & inside[None, :]
            x = weight[None, :] + scale * s
            exponent = (x - level_row[None, :]) * LOG2E - excess_row[None, :]
            exponent = tl.where(valid, exponent, float("-inf"))
            p = tl.exp2(exponent)
            do_0 = tl.load(do_head + rows * do_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
            dp = tl.dot(v_0, tl.trans(do_0))  # [BLOCK_N, BLOCK_M]
            ds = p * (dp - delta_row[None, :])
            dv_0 = tl.dot(p.to(do_0.dtype), do_0, dv_0)
            dk_0 = tl.dot(ds.to(q_0.dtype), q_0, dk_0)

    # not a number, maybe by 0 * inf of a pair that does not attend: the guarded kernel does it again
    zero = tl.sum(dk_0 - dk_0)
    zero += tl.sum(dv_0 - dv_0)
    tl.store(odd + program, (zero != 0.0).to(tl.int32))

    dk_head = dk + b.to(tl.int64) * dk_stride_b + kv_head.to(tl.int64) * dk_stride_h
    dv_head = dv + b.to(tl.int64) * dv_stride_b + kv_head.to(tl.int64) * dv_stride_h
    dk_rows = dk_head + j.to(tl.int64)[:, None] * dk_stride_n
    dk_0 = dk_0 * scale
    tl.store(dk_rows + d_0[None, :], dk_0.to(dk.dtype.element_ty), mask=key_in[:, None])
    dv_rows = dv_head + j.to(tl.int64)[:, None] * dv_stride_n
    tl.store(dv_rows + d_0[None, :], dv_0.to(dv.dtype.element_ty), mask=key_in[:, None])
