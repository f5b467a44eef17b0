"""attngen the walk's tables: what captured data allow a tile to skip.

bias_first, bias_stop: order of bias[b, i] - bias[b, j] >= 0
slope_floor: floor of slope[h]
slope2_floor: floor of -slope[h]
bias2_first, bias2_stop: order of bias[b, j] - bias[b, i] > 0
for each tile of 64 keys
"""

import triton
import triton.language as tl

BLOCK_N = tl.constexpr(64)  # keys of a tile
CHUNK = tl.constexpr(1024)  # queries looked at together
LIMIT = tl.constexpr(1073676288)  # sums with positions fit an int32


@triton.jit(
    do_not_specialize=[
        "heads",
        "n_q",
        "n_k",
        "bias_stride_0",
        "bias_size_1",
    ]
)
def tables(
    made,  # [values, B or 1, heads or 1, tiles]
    heads,
    n_q,
    n_k,
    q_offsets,  # [B]
    bias,
    bias_stride_0,
    bias_stride_1,
    bias_size_1,
    slope,
    slope_stride_0,
):
    # program -> (batch, head, key tile)
    tiles = tl.cdiv(n_k, BLOCK_N)
    program = tl.program_id(0)
    key_tile = program % tiles
    h = program // tiles % heads
    b = program // tiles // heads

    q_offset = tl.load(q_offsets + b).to(tl.int32)
    j = tl.minimum(key_tile * BLOCK_N + tl.arange(0, BLOCK_N), n_k - 1)  # [BLOCK_N]
    bias_base = bias + b.to(tl.int64) * bias_stride_0
    bias_b_j = tl.load(bias_base + j.to(tl.int64) * bias_stride_1).to(tl.float32)  # [BLOCK_N]
    a1 = bias_b_j  # [BLOCK_N]
    slope_h = tl.load(slope + h.to(tl.int64) * slope_stride_0).to(tl.float32)
    a2 = tl.full([], slope_h, tl.float32)
    a3 = tl.full([], -slope_h, tl.float32)
    a4 = -bias_b_j  # [BLOCK_N]

    # a query has to reach this for some row
    a1 = tl.where(a1 == a1, a1, float("-inf"))  # nothing is skipped for nan
    threshold1 = tl.min(a1, 0)
    first1 = tl.full([CHUNK], n_q, tl.int32)
    stop1 = tl.zeros([CHUNK], tl.int32)
    largest1 = tl.zeros([CHUNK], tl.float32)

    # a query has to reach this for some row
    a4 = tl.where(a4 == a4, a4, float("-inf"))  # nothing is skipped for nan
    threshold4 = tl.min(a4, 0)
    first4 = tl.full([CHUNK], n_q, tl.int32)
    stop4 = tl.zeros([CHUNK], tl.int32)
    largest4 = tl.zeros([CHUNK], tl.float32)

    # room for kernels that add real numbers in another order
    for start in range(0, n_q, CHUNK):
        row = start + tl.arange(0, CHUNK)  # [CHUNK]
        i = row + q_offset  # [CHUNK]
        inside = row < n_q  # [CHUNK]
        bias_index = tl.maximum(tl.minimum(i, bias_size_1 - 1), 0)  # [CHUNK]
        bias_b_i = tl.load(bias_base + bias_index.to(tl.int64) * bias_stride_1).to(tl.float32)
        c1 = bias_b_i  # [CHUNK]
        c4 = -bias_b_i  # [CHUNK]
        size = tl.where(inside & (tl.abs(c1) < float("inf")), tl.abs(c1), 0.0)
        largest1 = tl.maximum(largest1, size)
        size = tl.where(inside & (tl.abs(c4) < float("inf")), tl.abs(c4), 0.0)
        largest4 = tl.maximum(largest4, size)
    size1 = tl.where(tl.abs(threshold1) < float("inf"), tl.abs(threshold1), 0.0)
    threshold1 -= 1e-06 * (size1 + tl.max(largest1, 0))
    size4 = tl.where(tl.abs(threshold4) < float("inf"), tl.abs(threshold4), 0.0)
    threshold4 -= 1e-06 * (size4 + tl.max(largest4, 0))

    for start in range(0, n_q, CHUNK):
        row = start + tl.arange(0, CHUNK)  # [CHUNK]
        i = row + q_offset  # [CHUNK]
        inside = row < n_q  # [CHUNK]
        bias_index = tl.maximum(tl.minimum(i, bias_size_1 - 1), 0)  # [CHUNK]
        bias_b_i = tl.load(bias_base + bias_index.to(tl.int64) * bias_stride_1).to(tl.float32)
        c1 = bias_b_i  # [CHUNK]
        c4 = -bias_b_i  # [CHUNK]
        c1 = tl.where(c1 == c1, c1, float("inf"))
        hit = inside & (c1 >= threshold1)
        first1 = tl.minimum(first1, tl.where(hit, row, n_q))
        stop1 = tl.maximum(stop1, tl.where(hit, row + 1, 0))
        c4 = tl.where(c4 == c4, c4, float("inf"))
        hit = inside & (c4 > threshold4)
        first4 = tl.minimum(first4, tl.where(hit, row, n_q))
        stop4 = tl.maximum(stop4, tl.where(hit, row + 1, 0))

    programs = tl.num_programs(0)
    tl.store(made + program, q_offset + tl.min(first1, 0))  # bias_first
    tl.store(made + programs + program, q_offset + tl.max(stop1, 0))  # bias_stop
    a2 = tl.floor(tl.where(a2 == a2, a2, float("inf")))
    a2 = tl.minimum(tl.maximum(a2, -LIMIT), LIMIT)
    tl.store(made + 2 * programs + program, a2.to(tl.int32))  # slope_floor
    a3 = tl.floor(tl.where(a3 == a3, a3, float("inf")))
    a3 = tl.minimum(tl.maximum(a3, -LIMIT), LIMIT)
    tl.store(made + 3 * programs + program, a3.to(tl.int32))  # slope2_floor
    tl.store(made + 4 * programs + program, q_offset + tl.min(first4, 0))  # bias2_first
    tl.store(made + 5 * programs + program, q_offset + tl.max(stop4, 0))  # bias2_stop
