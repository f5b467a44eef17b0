"""attngen the walk's tables: what captured data allow a tile to skip.

doc_first, doc_stop, doc_run_first, doc_run_stop: match of doc[b, i] - doc[b, j] == 0
for each tile of 64 query rows
"""

import triton
import triton.language as tl

BLOCK_M = tl.constexpr(64)  # query rows of a tile
CHUNK = tl.constexpr(1024)  # keys looked at together


@triton.jit(
    do_not_specialize=[
        "n_q",
        "n_k",
        "q_offset",
        "doc_stride_0",
    ]
)
def tables(
    made,  # [values, B or 1, heads or 1, tiles]
    n_q,
    n_k,
    q_offset,
    doc,
    doc_stride_0,
    doc_stride_1,
):
    # program -> (batch, head, query tile)
    tiles = tl.cdiv(n_q, BLOCK_M)
    program = tl.program_id(0)
    query_tile = program % tiles
    b = program // tiles

    row = tl.minimum(query_tile * BLOCK_M + tl.arange(0, BLOCK_M), n_q - 1)  # [BLOCK_M]
    i = row + q_offset  # [BLOCK_M]
    doc_base = doc + b.to(tl.int64) * doc_stride_0
    doc_b_i = tl.load(doc_base + i.to(tl.int64) * doc_stride_1)  # [BLOCK_M]
    a1 = doc_b_i  # [BLOCK_M]

    # the rows' values lie between these; are all the same?
    low1 = tl.min(a1, 0)
    high1 = tl.max(a1, 0)
    same1 = tl.min((a1 == low1).to(tl.int32), 0) > 0
    first1 = tl.full([], n_k, tl.int32)
    stop1 = tl.full([], 0, tl.int32)
    run1 = tl.full([CHUNK], n_k, tl.int32)

    for start in range(0, n_k, CHUNK):
        j = start + tl.arange(0, CHUNK)  # [CHUNK]
        j_safe = tl.minimum(j, n_k - 1)  # [CHUNK]
        inside = j < n_k  # [CHUNK]
        doc_b_j = tl.load(doc_base + j_safe.to(tl.int64) * doc_stride_1)  # [CHUNK]
        c1 = doc_b_j  # [CHUNK]
        near = inside & (c1 >= low1) & (c1 <= high1)
        if tl.max(near.to(tl.int32), 0) > 0:
            # which of them some row has: its values, one after the other
            value = low1
            hit = near & (c1 == value)
            rest = a1 > value
            while tl.max(rest.to(tl.int32), 0) > 0:
                value = tl.min(tl.where(rest, a1, high1), 0)
                hit = hit | (near & (c1 == value))
                rest = a1 > value
            first1 = tl.minimum(first1, tl.min(tl.where(hit, j, n_k), 0))
            stop1 = tl.maximum(stop1, tl.max(tl.where(hit, j + 1, 0), 0))
        # where the first run of what all rows have ends
        end = inside & (c1 != low1) & (j > first1)
        run1 = tl.minimum(run1, tl.where(end, j, n_k))

    programs = tl.num_programs(0)
    run_first = tl.where(same1, first1, n_k)
    run_stop = tl.where(same1, tl.min(run1, 0), n_k)
    tl.store(made + program, first1)  # doc_first
    tl.store(made + programs + program, stop1)  # doc_stop
    tl.store(made + 2 * programs + program, run_first)  # doc_run_first
    tl.store(made + 3 * programs + program, run_stop)  # doc_run_stop
