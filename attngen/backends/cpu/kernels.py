"""The CPU backend's inner loops: one call computes units, each a tile of query rows on all its key chunks.

Each function is TorchScript and plain Python at once. Scripted, a call holds no interpreter lock, so that a thread per
core keeps every core busy; where torch can't script, the same functions run as they are. No annotations from the future in
this file: TorchScript reads them.

A unit takes the call's whole tensors: q, do [B, Hq, Nq, *] in any dtype and with any strides; k [B, Hkv, Nk, D] and
v [B, Hkv, Nk, Dv] contiguous in the computing dtype. Its place is
[batch, kv head, first query head, heads, first row, rows, which of dk and dv it adds to].
Logits are in base 2: torch's exp2 is several times faster than its exp.

All units of a call visit chunks start[n] .. stop[n] - 1. Chunks bundle[m] .. bundle[m + 1] - 1 are taken together: several
short ones are copied into one, since an operator on few keys costs as much as on many. Their masks: cap[x] (+inf or -inf,
[rows, columns] or with heads in front) for the columns low[x] .. high[x] - 1 of chunk owner[x].
"""

import threading
import warnings
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from attngen.errors import AttngenWarning
from attngen.state.softmax import State, merge


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


def state_of(logits: torch.Tensor, v: torch.Tensor) -> State:
    """The softmax state of one chunk; `logits` [rows, keys] is overwritten by the weights."""
    m = logits.amax([-1], keepdim=True).clamp_(min=-3.0e38)  # -inf - -inf would be nan
    p = logits.sub_(m).exp2_()
    return State(m, p.sum([-1], keepdim=True), product(p, v.t()))


def write(state: State, lse: torch.Tensor, out: torch.Tensor) -> float:
    """The finished rows: lse [heads, rows] in natural base, out [heads, rows, Dv]. Returns a sum that is finite if out is."""
    ln_2 = 0.6931471805599453
    torch.add(state.l.log().view(lse.shape), state.m.view(lse.shape), alpha=ln_2, out=lse)
    # The largest logit adds 1 to l: it is 0 for a row without a key and at least 1 for any other.
    torch.div(state.o.view(out.shape), state.l.clamp_(min=1).view(out.size(0), out.size(1), 1), out=out)
    return float(state.o.sum())


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


def _attend_unit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    place: list[int],
    factor: float,
    start: list[int],
    stop: list[int],
    bundle: list[int],
    cap: list[torch.Tensor],
    owner: list[int],
    low: list[int],
    high: list[int],
    lse: torch.Tensor,
    out: torch.Tensor,
) -> float:
    tile = [place[3], place[5], -1]
    k, v = head_of(k, place), head_of(v, place)
    rows = rows_of(tile_of(q, place), factor, k)
    a, b = bundle[0], bundle[1]
    logits = masked_logits(rows, bundled(k, start, stop, a, b), tile, start, stop, a, b, cap, owner, low, high)
    state = state_of(logits, bundled(v, start, stop, a, b))
    for m in range(1, len(bundle) - 1):
        a, b = bundle[m], bundle[m + 1]
        logits = masked_logits(rows, bundled(k, start, stop, a, b), tile, start, stop, a, b, cap, owner, low, high)
        state = merge(state, state_of(logits, bundled(v, start, stop, a, b)), True)
    return write(state, tile_of(lse, place), tile_of(out, place))


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    places: list[list[int]],
    factor: float,
    start: list[int],
    stop: list[int],
    bundle: list[int],
    cap: list[torch.Tensor],
    owner: list[int],
    low: list[int],
    high: list[int],
    lse: torch.Tensor,
    out: torch.Tensor,
) -> float:
    """Forward of units with the identity score: a state per chunk, merged. `factor` brings logits to base 2. Writes the units'
    parts of lse [B, Hq, Nq] and out [B, Hq, Nq, Dv]; returns a sum that is finite if out is.
    """
    total = 0.0
    for place in places:
        total += _attend_unit(q, k, v, place, factor, start, stop, bundle, cap, owner, low, high, lse, out)
    return total


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


def _differentiate_unit(
    q: torch.Tensor,
    do: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    place: list[int],
    factor: float,
    scale: float,
    delta: torch.Tensor,
    lse: torch.Tensor,
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
    delta, lse = tile_of(delta, place).reshape(-1, 1), tile_of(lse, place).reshape(-1, 1)
    sums = torch.zeros_like(rows)
    for m in range(len(bundle) - 1):
        a, b = bundle[m], bundle[m + 1]
        keys = bundled(k, start, stop, a, b)
        p = masked_logits(rows, keys, tile, start, stop, a, b, cap, owner, low, high).sub_(lse).exp2_()
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
    scale: float,
    delta: torch.Tensor,
    lse: torch.Tensor,
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
    """Backward of units with the identity score. delta, lse (base 2) [B, Hq, Nq, 1]; dk [slots, D, Nk] and
    dv [slots, Dv, Nk] are added to, dk times `factor` / `scale`; the units' parts of dq [B, Hq, Nq, D] are written.
    """
    for place in places:
        _differentiate_unit(
            q, do, k, v, place, factor, scale, delta, lse, start, stop, bundle, cap, owner, low, high, dk, dv, dq
        )


def attend_storing(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    places: list[list[int]],
    factor: float,
    start: list[int],
    stop: list[int],
    bundle: list[int],
    cap: list[torch.Tensor],
    owner: list[int],
    low: list[int],
    high: list[int],
    lse: torch.Tensor,
    out: torch.Tensor,
    weights: torch.Tensor,
) -> float:
    """`attend`, which also writes the units' weights P [B, Hq, Nq, Nk] in the columns that they visit."""
    total = 0.0
    for place in places:
        tile = [place[3], place[5], -1]
        keys, values = head_of(k, place), head_of(v, place)
        rows, kept = rows_of(tile_of(q, place), factor, keys), tile_of(weights, place)
        states: list[State] = []
        for m in range(len(bundle) - 1):
            a, b = bundle[m], bundle[m + 1]
            logits = masked_logits(
                rows, bundled(keys, start, stop, a, b), tile, start, stop, a, b, cap, owner, low, high
            )
            states.append(state_of(logits, bundled(values, start, stop, a, b)))  # logits now holds exp2(x - m)
            before = 0
            for n in range(a, b):
                size = stop[n] - start[n]
                kept[:, :, start[n] : stop[n]] = logits.view(tile).narrow(2, before, size)
                before += size
        state = states[0]
        for m in range(1, len(states)):
            state = merge(state, states[m], True)
        for m in range(len(states)):
            weight = torch.exp2(states[m].m - state.m).div_(state.l.clamp(min=1)).view(place[3], place[5], 1)
            for n in range(bundle[m], bundle[m + 1]):
                kept[:, :, start[n] : stop[n]].mul_(weight)
        total += write(state, tile_of(lse, place), tile_of(out, place))
    return total


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


_scripting = threading.Lock()


def kernels() -> SimpleNamespace:
    """The functions for units, scripted where torch can."""
    with _scripting:  # of the threads that come here first, Python can parse for one only
        return _kernels()


@cache
def _kernels() -> SimpleNamespace:
    functions: dict[str, Any] = {f.__name__: f for f in (attend, differentiate, attend_storing, differentiate_stored)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is in maintenance
            return SimpleNamespace(**{name: torch.jit.script(function) for name, function in functions.items()})
    except (AttributeError, RuntimeError, OSError) as error:
        warnings.warn(
            f"torch can't script the CPU backend's inner loops here ({str(error).splitlines()[0]}): they run as plain "
            "Python, about 20% slower",
            AttngenWarning,
            stacklevel=2,
        )
        return SimpleNamespace(**functions)
