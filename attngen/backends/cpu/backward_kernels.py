"""The backward's inner loops; arguments as in `forward_kernels`. No annotations from the future: TorchScript reads them."""

import torch

from attngen.backends.cpu.products import (
    add_bundle,
    bundled,
    exponential,
    head_of,
    masked_logits,
    product,
    rows_of,
    tile_of,
)


def _differentiate_unit(
    q: torch.Tensor,
    do: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    place: list[int],
    factor: float,
    log_base: float,
    scale: float,
    delta: torch.Tensor,
    top: torch.Tensor,
    share: torch.Tensor | None,
    start: list[int],
    stop: list[int],
    bundle: list[int],
    cap: list[torch.Tensor],
    owner: list[int],
    low: list[int],
    high: list[int],
    dk: torch.Tensor,
    dv: torch.Tensor,
    dq: torch.Tensor,
) -> None:
    dk, dv = dk.select(0, place[6]), dv.select(0, place[6])
    tile = [place[3], place[5], -1]
    k, v = head_of(k, place), head_of(v, place)
    rows, do_rows = rows_of(tile_of(q, place), factor, k), rows_of(tile_of(do, place), 1.0, k)
    q_t, do_t = rows.t().contiguous(), do_rows.t().contiguous()
    delta, top = tile_of(delta, place).reshape(-1, 1), tile_of(top, place).reshape(-1, 1)
    sums = torch.zeros_like(rows)
    for m in range(len(bundle) - 1):
        a, b = bundle[m], bundle[m + 1]
        keys = bundled(k, start, stop, a, b)
        logits = masked_logits(rows, keys, tile, start, stop, a, b, cap, owner, low, high)
        p = exponential(logits.sub_(top), log_base)
        if share is not None:
            p = p.mul_(tile_of(share, place).reshape(-1, 1))
        ds = product(do_rows, bundled(v, start, stop, a, b)).sub_(delta).mul_(p)
        add_bundle(product(do_t, p.t()), dv, start, stop, a, b)
        add_bundle(product(q_t, ds.t()), dk, start, stop, a, b)
        sums.add_(product(ds, keys.t()))
    tile_of(dq, place).copy_(sums.mul_(scale).view(tile))


def differentiate(
    q: torch.Tensor,
    do: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    places: list[list[int]],
    factor: float,
    log_base: float,
    scale: float,
    delta: torch.Tensor,
    top: torch.Tensor,
    share: torch.Tensor | None,
    start: list[int],
    stop: list[int],
    bundle: list[int],
    cap: list[torch.Tensor],
    owner: list[int],
    low: list[int],
    high: list[int],
    dk: torch.Tensor,
    dv: torch.Tensor,
    dq: torch.Tensor,
) -> None:
    """Backward of units with the identity score. P = base ** (logit - top) * share, with top, share and
    delta [B, Hq, Nq]. dk [slots, D, Nk] and dv [slots, Dv, Nk] are added to, dk times `factor` / `scale`; the units' parts
    of dq [B, Hq, Nq, D] are written.
    """
    for place in places:
        _differentiate_unit(
            q,
            do,
            k,
            v,
            place,
            factor,
            log_base,
            scale,
            delta,
            top,
            share,
            start,
            stop,
            bundle,
            cap,
            owner,
            low,
            high,
            dk,
            dv,
            dq,
        )


def differentiate_stored(
    q: torch.Tensor,
    do: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    places: list[list[int]],
    factor: float,
    scale: float,
    delta: torch.Tensor,
    weights: torch.Tensor,
    start: list[int],
    stop: list[int],
    bundle: list[int],
    dk: torch.Tensor,
    dv: torch.Tensor,
    dq: torch.Tensor,
) -> None:
    """`differentiate` from the weights P [B, Hq, Nq, Nk] of `attend_storing`: a product and the exponentials less."""
    for place in places:
        keys, values = head_of(k, place), head_of(v, place)
        rows, do_rows = rows_of(tile_of(q, place), factor, keys), rows_of(tile_of(do, place), 1.0, keys)
        q_t, do_t = rows.t().contiguous(), do_rows.t().contiguous()
        unit_delta, kept = tile_of(delta, place).reshape(-1, 1), tile_of(weights, place)
        sums = torch.zeros_like(rows)
        for m in range(len(bundle) - 1):
            a, b = bundle[m], bundle[m + 1]
            p = torch.cat([kept[:, :, start[n] : stop[n]] for n in range(a, b)], 2).view(rows.size(0), -1)
            ds = product(do_rows, bundled(values, start, stop, a, b)).sub_(unit_delta).mul_(p)
            add_bundle(product(do_t, p.t()), dv.select(0, place[6]), start, stop, a, b)
            add_bundle(product(q_t, ds.t()), dk.select(0, place[6]), start, stop, a, b)
            sums.add_(product(ds, bundled(keys, start, stop, a, b).t()))
        tile_of(dq, place).copy_(sums.mul_(scale).view(place[3], place[5], -1))
