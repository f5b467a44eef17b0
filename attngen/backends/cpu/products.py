"""Matrix products of the CPU backend's loops, and the views and masks that lead to them.

TorchScript and plain Python at once, see `kernels`: no annotations from the future in this file.
"""

import torch


def _product_onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # torch.mm goes to MKL, which does not use AVX-512 on AMD: half the speed. A oneDNN kernel of its own pays only for
    # products that are large enough.
    if a.dtype == torch.float32 and a.size(0) * a.size(1) * b.size(0) >= 65536:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.t())


def _product_plain(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b.t())


def _has_onednn() -> bool:
    try:
        a, b = torch.ones(64, 32), torch.full((64, 32), 2.0)
        with torch.no_grad():
            return bool((_product_onednn(a, b) == 64).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


# product(a, b) = a @ b.T for a [m, k] contiguous and b [n, k] dense in either order.
product = _product_onednn if _has_onednn() else _product_plain


def tile_of(x: torch.Tensor, place: list[int]) -> torch.Tensor:
    """The unit's part of x [B, Hq, Nq, *]: [heads, rows, *]. Views are made in one step: of a short list of tiles they cost
    as much as the arithmetic.
    """
    first = x.storage_offset() + place[0] * x.stride(0) + place[2] * x.stride(1) + place[4] * x.stride(2)
    if x.dim() == 3:
        return x.as_strided([place[3], place[5]], [x.stride(1), x.stride(2)], first)
    return x.as_strided([place[3], place[5], x.size(3)], [x.stride(1), x.stride(2), x.stride(3)], first)


def head_of(x: torch.Tensor, place: list[int]) -> torch.Tensor:
    """The unit's rows of k or v: [Nk, *]."""
    first = x.storage_offset() + place[0] * x.stride(0) + place[1] * x.stride(1)
    return x.as_strided([x.size(2), x.size(3)], [x.stride(2), x.stride(3)], first)


def part(x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows start .. stop - 1 of a matrix."""
    return x.as_strided([stop - start, x.size(1)], [x.stride(0), x.stride(1)], x.storage_offset() + start * x.stride(0))


def rows_of(x: torch.Tensor, factor: float, like: torch.Tensor) -> torch.Tensor:
    """x [heads, rows, D] times a factor as contiguous [heads x rows, D] in the dtype of `like`."""
    x = x.to(like.dtype)
    if factor != 1.0:
        x = x * factor
    return x.reshape(-1, x.size(2)).contiguous()


def bundled(x: torch.Tensor, start: list[int], stop: list[int], first: int, last: int) -> torch.Tensor:
    """Rows of x [N, *] that chunks first .. last - 1 visit."""
    if last - first == 1:
        return part(x, start[first], stop[first])
    return torch.cat([part(x, start[n], stop[n]) for n in range(first, last)])


def masked_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    tile: list[int],
    start: list[int],
    stop: list[int],
    first: int,
    last: int,
    cap: list[torch.Tensor],
    owner: list[int],
    low: list[int],
    high: list[int],
) -> torch.Tensor:
    """q @ k.T [rows, keys] of chunks first .. last - 1 under the masks that are theirs."""
    logits = product(q, k)
    for x in range(len(owner)):
        if first <= owner[x] and owner[x] < last:
            before = 0
            for n in range(first, owner[x]):
                before += stop[n] - start[n]
            columns = logits.view(tile).narrow(2, before + low[x], high[x] - low[x])
            torch.minimum(columns, cap[x], out=columns)
    return logits


def exponential(x: torch.Tensor, log_base: float) -> torch.Tensor:
    """base ** x in place, of a base whose natural logarithm is 1 or log(2): torch's exp2 takes half as long as its exp."""
    if log_base == 1.0:
        x = x.mul_(1.4426950408889634)
    return x.exp2_()


def lowest(x: torch.Tensor) -> float:
    """The least finite number of its dtype."""
    return -1.7976931348623157e308 if x.dtype == torch.float64 else -3.4028234663852886e38


def add_products(
    ds: torch.Tensor,
    weights: torch.Tensor,
    q_t: torch.Tensor,
    do_t: torch.Tensor,
    k: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """What a chunk adds: dq [rows, D] += dS K; dk [D, keys] += Q^T dS and dv [Dv, keys] += dO^T P, transposed so that the
    sums run along rows in memory.
    """
    dv.add_(product(do_t, weights.t()))
    dk.add_(product(q_t, ds.t()))
    dq.add_(product(ds, k.t()))


def add_bundle(
    shares: torch.Tensor, total: torch.Tensor, start: list[int], stop: list[int], first: int, last: int
) -> None:
    """total [D, N] += shares [D, keys of chunks first .. last - 1]."""
    before = 0
    for n in range(first, last):
        size = stop[n] - start[n]
        part(total.t(), start[n], stop[n]).add_(part(shares.t(), before, before + size))
        before += size
