"""attngen backward: a query tile walks its keys and sums dQ, and the gradient of edge_weight.

spec 1dc2518f2451e059
    mask: i >= j
    lists: rows(weighted)
head dims 64 and 64, bfloat16
schedule block_m=16, block_n=32, num_warps=4, num_stages=2
"""

import triton
import triton.language as tl

BLOCK_M = tl.constexpr(16)  # query rows of a tile
BLOCK_N = tl.constexpr(32)  # keys of a tile
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=[
        "grad_edges_stride_b",
        "grad_edges_stride_h",
        "heads",
        "n_q",
        "group",
        "n_k",
        "scale",
        "q_offset",
        "query_edges_stride_b",
        "query_edges_stride_h",
        "query_runs_stride_b",
        "query_runs_stride_h",
        "edge_weight_stride_b",
        "edge_weight_stride_h",
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
    grad_edges,  # [B, list heads, listed keys]
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
    grad_edges_stride_b,
    grad_edges_stride_h,
    heads,
    n_q,
    group,
    n_k,
    scale,
    q_offset,
    query_edges,  # [B or 1, heads or 1, listed]
    query_edges_stride_b,
    query_edges_stride_h,
    query_runs,  # [B or 1, heads or 1, query rows, 2]
    query_runs_stride_b,
    query_runs_stride_h,
    edge_weight,  # [B or 1, heads or 1, listed]
    edge_weight_stride_b,
    edge_weight_stride_h,
):
    # program -> (batch, head, query tile)
    tiles = n_q * tl.cdiv(group, BLOCK_M)
    program = tl.program_id(0)
    query_tile = program % tiles
    kv_heads = heads // group
    kv_head = program // tiles % kv_heads
    b = program // tiles // kv_heads

    group_tiles = tl.cdiv(group, BLOCK_M)
    query = query_tile // group_tiles
    slot = query_tile % group_tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row = query + tl.zeros_like(slot)  # [BLOCK_M]
    h = kv_head * group + tl.minimum(slot, group - 1)  # [BLOCK_M]
    row_in = slot < group  # [BLOCK_M]
    i = row + q_offset  # [BLOCK_M]
    lane_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    d_0 = tl.arange(0, 64)  # [64]
    q_head = q + b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h
    do_head = do + b.to(tl.int64) * do_stride_b + h.to(tl.int64) * do_stride_h
    q_rows = q_head[:, None] + row.to(tl.int64)[:, None] * q_stride_n
    q_0 = tl.load(q_rows + d_0[None, :], mask=row_in[:, None], other=0.0)  # [BLOCK_M, 64]
    do_rows = do_head[:, None] + row.to(tl.int64)[:, None] * do_stride_n
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
    grad_edges_head = grad_edges + b.to(tl.int64) * grad_edges_stride_b
    grad_edges_head += kv_head.to(tl.int64) * grad_edges_stride_h

    # where this query's list starts, and how long it is
    run = query_runs + b.to(tl.int64) * query_runs_stride_b
    run = run + kv_head.to(tl.int64) * query_runs_stride_h
    run = run + query.to(tl.int64) * 2
    first_edge = tl.load(run).to(tl.int64)
    edges = tl.load(run + 1).to(tl.int32)
    listed = query_edges + b.to(tl.int64) * query_edges_stride_b
    listed = listed + kv_head.to(tl.int64) * query_edges_stride_h
    listed = listed + first_edge
    weights = edge_weight + b.to(tl.int64) * edge_weight_stride_b
    weights = weights + kv_head.to(tl.int64) * edge_weight_stride_h
    weights = weights + first_edge
    partial_count = tl.cdiv(edges, BLOCK_N)

    # partial key tiles: only some pairs attend
    for step in range(partial_count):
        tile = step
        edge = tile * BLOCK_N + lane_n  # [BLOCK_N]
        inside = edge < edges  # [BLOCK_N]
        j = tl.load(listed + edge, mask=inside, other=0).to(tl.int32)  # [BLOCK_N]
        weight = tl.load(weights + edge, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N]
        rows = j.to(tl.int64)[:, None]
        k_0 = tl.load(k_head + rows * k_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
        s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
        valid = (i[:, None] >= j[None, :]) & inside[None, :]
        x = weight[None, :] + scale * s
        exponent = (x - level_row[:, None]) * LOG2E - excess_row[:, None]
        exponent = tl.where(valid, exponent, float("-inf"))
        p = tl.exp2(exponent)
        v_0 = tl.load(v_head + rows * v_stride_n + d_0[None, :], mask=inside[:, None], other=0.0)
        dp = tl.dot(do_0, tl.trans(v_0))  # [BLOCK_M, BLOCK_N]
        ds = p * (dp - delta_row[:, None])
        ds = tl.where(valid, ds, 0.0)
        # heads beyond 16 of one group are another program's
        tl.atomic_add(grad_edges_head + first_edge + edge, tl.sum(ds, 0), mask=inside, sem="relaxed")
        dq_0 = tl.dot(ds.to(k_0.dtype), k_0, dq_0)

    # not a number, maybe by 0 * inf of a pair that does not attend: the guarded kernel does it again
    zero = tl.sum(dq_0 - dq_0)
    tl.store(odd + program, (zero != 0.0).to(tl.int32))

    dq_head = dq + b.to(tl.int64) * dq_stride_b + h.to(tl.int64) * dq_stride_h
    dq_rows = dq_head[:, None] + row.to(tl.int64)[:, None] * dq_stride_n
    dq_0 = dq_0 * scale
    tl.store(dq_rows + d_0[None, :], dq_0.to(dq.dtype.element_ty), mask=row_in[:, None])
