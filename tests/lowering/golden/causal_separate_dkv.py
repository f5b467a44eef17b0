"""attngen backward: a key tile walks its queries and sums dK and dV.

spec bcd35470716f0e7a
    mask: i >= j
head dims 192 and 192, bfloat16
schedule block_m=64, block_n=128, num_warps=8, num_stages=2
"""

import triton
import triton.language as tl

BLOCK_M = tl.constexpr(64)  # query rows of a tile
BLOCK_N = tl.constexpr(128)  # keys of a tile
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=[
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
):
    # program -> (batch, head, key tile)
    tiles = tl.cdiv(n_k, BLOCK_N)
    program = tl.program_id(0)
    part = program % 2
    whole = program // 2
    key_tile = whole % tiles
    kv_heads = heads // group
    kv_head = whole // tiles % kv_heads
    b = whole // tiles // kv_heads

    j = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    key_in = j < n_k  # [BLOCK_N]
    lane_m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    d_0 = tl.arange(0, 128)  # [128]
    d_1 = 128 + tl.arange(0, 64)  # [64]

    if part == 0:  # dv
        k_head = k + b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
        k_rows = k_head + j.to(tl.int64)[:, None] * k_stride_n
        k_0 = tl.load(k_rows + d_0[None, :], mask=key_in[:, None], other=0.0)  # [BLOCK_N, 128]
        k_1 = tl.load(k_rows + d_1[None, :], mask=key_in[:, None], other=0.0)  # [BLOCK_N, 64]
        scale2 = scale * LOG2E
        dv_0 = tl.zeros([BLOCK_N, 128], tl.float32)
        dv_1 = tl.zeros([BLOCK_N, 64], tl.float32)

        # every query head that reads this key head
        for g in tl.range(group, disable_licm=True):
            h = kv_head * group + g
            q_head = q + b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h
            q_tiles_0 = tl.make_tensor_descriptor(
                q_head,
                shape=[n_q, 192],
                strides=[q_stride_n, 1],
                block_shape=[BLOCK_M, 128],
            )
            q_tiles_1 = tl.make_tensor_descriptor(
                q_head,
                shape=[n_q, 192],
                strides=[q_stride_n, 1],
                block_shape=[BLOCK_M, 64],
            )
            do_head = do + b.to(tl.int64) * do_stride_b + h.to(tl.int64) * do_stride_h
            do_tiles_0 = tl.make_tensor_descriptor(
                do_head,
                shape=[n_q, 192],
                strides=[do_stride_n, 1],
                block_shape=[BLOCK_M, 128],
            )
            do_tiles_1 = tl.make_tensor_descriptor(
                do_head,
                shape=[n_q, 192],
                strides=[do_stride_n, 1],
                block_shape=[BLOCK_M, 64],
            )
            level_head = level + (b.to(tl.int64) * heads + h) * n_q

            # this tile's first and last key, as positions
            first = key_tile * BLOCK_N
            last = tl.minimum(key_tile * BLOCK_N + BLOCK_N, n_k) - 1

            # query tiles with a row that attends some key of this tile
            live_start = tl.maximum(0, first - q_offset)
            live_end = n_q
            live_first = live_start // BLOCK_M
            live_stop = tl.where(live_end > live_start, tl.cdiv(live_end, BLOCK_M), live_first)

            # of those, the ones whose rows attend all keys of this tile
            full_first = tl.cdiv(tl.maximum(0, last - q_offset), BLOCK_M)
            unmasked_stop = tl.maximum(full_first, n_q // BLOCK_M)
            full_stop = tl.minimum(live_stop, unmasked_stop)
            full_count = tl.maximum(0, full_stop - full_first)

            # the partial tiles before and behind them
            before_stop = tl.minimum(full_first, live_stop)
            before_full = tl.maximum(0, before_stop - live_first)
            after_full = tl.maximum(0, live_stop - unmasked_stop)
            skip_full = unmasked_stop - before_full
            partial_count = after_full + before_full

            # full query tiles: every pair attends, so no mask
            for step in tl.range(full_count, disable_licm=True):
                tile = full_first + step
                row = tile * BLOCK_M + lane_m  # [BLOCK_M]
                level_row = tl.load(level_head + row)  # [BLOCK_M]
                q_0 = q_tiles_0.load([tile * BLOCK_M, 0])
                q_1 = q_tiles_1.load([tile * BLOCK_M, 128])
                s = tl.dot(k_0, tl.trans(q_0))  # [BLOCK_N, BLOCK_M]
                s = tl.dot(k_1, tl.trans(q_1), s)
                exponent = s * scale2 - level_row[None, :]
                p = tl.exp2(exponent)
                do_0 = do_tiles_0.load([tile * BLOCK_M, 0])
                do_1 = do_tiles_1.load([tile * BLOCK_M, 128])
                dv_0 = tl.dot(p.to(do_0.dtype), do_0, dv_0)
                dv_1 = tl.dot(p.to(do_1.dtype), do_1, dv_1)

            # partial query tiles: only some pairs attend
            for step in tl.range(partial_count, num_stages=1, disable_licm=True):
                tile = live_first + step
                tile = tl.where(step < before_full, tile, skip_full + step)
                row = tile * BLOCK_M + lane_m  # [BLOCK_M]
                inside = row < n_q  # [BLOCK_M]
                i = row + q_offset  # [BLOCK_M]
                level_row = tl.load(level_head + row, mask=inside, other=0.0)  # [BLOCK_M]
                q_0 = q_tiles_0.load([tile * BLOCK_M, 0])
                q_1 = q_tiles_1.load([tile * BLOCK_M, 128])
                s = tl.dot(k_0, tl.trans(q_0))  # [BLOCK_N, BLOCK_M]
                s = tl.dot(k_1, tl.trans(q_1), s)
                valid = j[:, None] <= i[None, :]
                exponent = s * scale2 - level_row[None, :]
                exponent = tl.where(valid, exponent, float("-inf"))
                p = tl.exp2(exponent)
                do_0 = do_tiles_0.load([tile * BLOCK_M, 0])
                do_1 = do_tiles_1.load([tile * BLOCK_M, 128])
                dv_0 = tl.dot(p.to(do_0.dtype), do_0, dv_0)
                dv_1 = tl.dot(p.to(do_1.dtype), do_1, dv_1)

        # not a number, maybe by 0 * inf of a pair that does not attend: the guarded kernel does it again
        zero = tl.sum(dv_0 - dv_0)
        zero += tl.sum(dv_1 - dv_1)
        tl.store(odd + program, (zero != 0.0).to(tl.int32))

        dv_head = dv + b.to(tl.int64) * dv_stride_b + kv_head.to(tl.int64) * dv_stride_h
        dv_tiles_0 = tl.make_tensor_descriptor(
            dv_head,
            shape=[n_k, 192],
            strides=[dv_stride_n, 1],
            block_shape=[BLOCK_N, 128],
        )
        dv_tiles_1 = tl.make_tensor_descriptor(
            dv_head,
            shape=[n_k, 192],
            strides=[dv_stride_n, 1],
            block_shape=[BLOCK_N, 64],
        )
        dv_tiles_0.store([key_tile * BLOCK_N, 0], dv_0.to(dv.dtype.element_ty))
        dv_tiles_1.store([key_tile * BLOCK_N, 128], dv_1.to(dv.dtype.element_ty))

    else:  # dk
        k_head = k + b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
        v_head = v + b.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
        k_rows = k_head + j.to(tl.int64)[:, None] * k_stride_n
        k_0 = tl.load(k_rows + d_0[None, :], mask=key_in[:, None], other=0.0)  # [BLOCK_N, 128]
        k_1 = tl.load(k_rows + d_1[None, :], mask=key_in[:, None], other=0.0)  # [BLOCK_N, 64]
        v_rows = v_head + j.to(tl.int64)[:, None] * v_stride_n
        v_0 = tl.load(v_rows + d_0[None, :], mask=key_in[:, None], other=0.0)  # [BLOCK_N, 128]
        v_1 = tl.load(v_rows + d_1[None, :], mask=key_in[:, None], other=0.0)  # [BLOCK_N, 64]
        scale2 = scale * LOG2E
        dk_0 = tl.zeros([BLOCK_N, 128], tl.float32)
        dk_1 = tl.zeros([BLOCK_N, 64], tl.float32)

        # every query head that reads this key head
        for g in tl.range(group, disable_licm=True):
            h = kv_head * group + g
            q_head = q + b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h
            q_tiles_0 = tl.make_tensor_descriptor(
                q_head,
                shape=[n_q, 192],
                strides=[q_stride_n, 1],
                block_shape=[BLOCK_M, 128],
            )
            q_tiles_1 = tl.make_tensor_descriptor(
                q_head,
                shape=[n_q, 192],
                strides=[q_stride_n, 1],
                block_shape=[BLOCK_M, 64],
            )
            do_head = do + b.to(tl.int64) * do_stride_b + h.to(tl.int64) * do_stride_h
            do_tiles_0 = tl.make_tensor_descriptor(
                do_head,
                shape=[n_q, 192],
                strides=[do_stride_n, 1],
                block_shape=[BLOCK_M, 128],
            )
            do_tiles_1 = tl.make_tensor_descriptor(
                do_head,
                shape=[n_q, 192],
                strides=[do_stride_n, 1],
                block_shape=[BLOCK_M, 64],
            )
            level_head = level + (b.to(tl.int64) * heads + h) * n_q
            delta_head = delta + (b.to(tl.int64) * heads + h) * n_q

            # this tile's first and last key, as positions
            first = key_tile * BLOCK_N
            last = tl.minimum(key_tile * BLOCK_N + BLOCK_N, n_k) - 1

            # query tiles with a row that attends some key of this tile
            live_start = tl.maximum(0, first - q_offset)
            live_end = n_q
            live_first = live_start // BLOCK_M
            live_stop = tl.where(live_end > live_start, tl.cdiv(live_end, BLOCK_M), live_first)

            # of those, the ones whose rows attend all keys of this tile
            full_first = tl.cdiv(tl.maximum(0, last - q_offset), BLOCK_M)
            unmasked_stop = tl.maximum(full_first, n_q // BLOCK_M)
            full_stop = tl.minimum(live_stop, unmasked_stop)
            full_count = tl.maximum(0, full_stop - full_first)

            # the partial tiles before and behind them
            before_stop = tl.minimum(full_first, live_stop)
            before_full = tl.maximum(0, before_stop - live_first)
            after_full = tl.maximum(0, live_stop - unmasked_stop)
            skip_full = unmasked_stop - before_full
            partial_count = after_full + before_full

            # full query tiles: every pair attends, so no mask
            for step in tl.range(full_count, disable_licm=True):
                tile = full_first + step
                row = tile * BLOCK_M + lane_m  # [BLOCK_M]
                level_row = tl.load(level_head + row)  # [BLOCK_M]
                delta_row = tl.load(delta_head + row)  # [BLOCK_M]
                q_0 = q_tiles_0.load([tile * BLOCK_M, 0])
                q_1 = q_tiles_1.load([tile * BLOCK_M, 128])
                s = tl.dot(k_0, tl.trans(q_0))  # [BLOCK_N, BLOCK_M]
                s = tl.dot(k_1, tl.trans(q_1), s)
                exponent = s * scale2 - level_row[None, :]
                p = tl.exp2(exponent)
                do_0 = do_tiles_0.load([tile * BLOCK_M, 0])
                do_1 = do_tiles_1.load([tile * BLOCK_M, 128])
                dp = tl.dot(v_0, tl.trans(do_0))  # [BLOCK_N, BLOCK_M]
                dp = tl.dot(v_1, tl.trans(do_1), dp)
                ds = p * (dp - delta_row[None, :])
                dk_0 = tl.dot(ds.to(q_0.dtype), q_0, dk_0)
                dk_1 = tl.dot(ds.to(q_1.dtype), q_1, dk_1)

            # partial query tiles: only some pairs attend
            for step in tl.range(partial_count, num_stages=1, disable_licm=True):
                tile = live_first + step
                tile = tl.where(step < before_full, tile, skip_full + step)
                row = tile * BLOCK_M + lane_m  # [BLOCK_M]
                inside = row < n_q  # [BLOCK_M]
                i = row + q_offset  # [BLOCK_M]
                level_row = tl.load(level_head + row, mask=inside, other=0.0)  # [BLOCK_M]
                delta_row = tl.load(delta_head + row, mask=inside, other=0.0)  # [BLOCK_M]
                q_0 = q_tiles_0.load([tile * BLOCK_M, 0])
                q_1 = q_tiles_1.load([tile * BLOCK_M, 128])
                s = tl.dot(k_0, tl.trans(q_0))  # [BLOCK_N, BLOCK_M]
                s = tl.dot(k_1, tl.trans(q_1), s)
                valid = j[:, None] <= i[None, :]
                exponent = s * scale2 - level_row[None, :]
                exponent = tl.where(valid, exponent, float("-inf"))
                p = tl.exp2(exponent)
                do_0 = do_tiles_0.load([tile * BLOCK_M, 0])
                do_1 = do_tiles_1.load([tile * BLOCK_M, 128])
                dp = tl.dot(v_0, tl.trans(do_0))  # [BLOCK_N, BLOCK_M]
                dp = tl.dot(v_1, tl.trans(do_1), dp)
                ds = p * (dp - delta_row[None, :])
                dk_0 = tl.dot(ds.to(q_0.dtype), q_0, dk_0)
                dk_1 = tl.dot(ds.to(q_1.dtype), q_1, dk_1)

        # not a number, maybe by 0 * inf of a pair that does not attend: the guarded kernel does it again
        zero = tl.sum(dk_0 - dk_0)
        zero += tl.sum(dk_1 - dk_1)
        tl.store(odd + program, (zero != 0.0).to(tl.int32))

        dk_head = dk + b.to(tl.int64) * dk_stride_b + kv_head.to(tl.int64) * dk_stride_h
        dk_tiles_0 = tl.make_tensor_descriptor(
            dk_head,
            shape=[n_k, 192],
            strides=[dk_stride_n, 1],
            block_shape=[BLOCK_N, 128],
        )
        dk_tiles_1 = tl.make_tensor_descriptor(
            dk_head,
            shape=[n_k, 192],
            strides=[dk_stride_n, 1],
            block_shape=[BLOCK_N, 64],
        )
        dk_0 = dk_0 * scale
        dk_tiles_0.store([key_tile * BLOCK_N, 0], dk_0.to(dk.dtype.element_ty))
        dk_1 = dk_1 * scale
        dk_tiles_1.store([key_tile * BLOCK_N, 128], dk_1.to(dk.dtype.element_ty))
