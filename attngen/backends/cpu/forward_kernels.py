"""The forward's inner loops: one call computes units, each a tile of query rows on all its key chunks.

Every function is TorchScript and plain Python at once. Scripted, a call holds no interpreter lock, so that a thread per
core keeps every core busy; where torch can't script, the same functions run as they are. No annotations from the future in
this file: TorchScript reads them.

A unit takes the call's whole tensors: q, do [B, Hq, Nq, *] in any dtype and with any strides; k [B, Hkv, Nk, D] and
v [B, Hkv, Nk, Dv] contiguous in the computing dtype. Its place is
[batch, kv head, first query head, heads, first row, rows, which of dk and dv it adds to].
`log_base` is the natural logarithm of the logits' base: log(2), which spares a factor on each of them before exp2; or 1
where the change of base might lose a logit.

All units of a call visit chunks start[n] .. stop[n] - 1. Chunks bundle[m] .. bundle[m + 1] - 1 are taken together: several
short ones are copied into one, since an operator on few keys costs as much as on many. Their masks: cap[x] (+inf or -inf,
[rows, columns] or with heads in front) for the columns low[x] .. high[x] - 1 of chunk owner[x].
"""

import torch

from attngen.backends.cpu.products import (
    bundled,
    exponential,
    head_of,
    lowest,
    masked_logits,
    product,
    rows_of,
    tile_of,
)
from attngen.plan.softmax import State, merge


def state_of(logits: torch.Tensor, v: torch.Tensor, log_base: float) -> State:
    """The softmax state of one chunk; `logits` [rows, keys] is overwritten by the weights."""
    m = logits.amax([-1], keepdim=True)
    p = exponential(logits.sub_(m.clamp(min=lowest(m))), log_base)  # -inf - -inf would be nan
    return State(m, p.sum([-1], keepdim=True), product(p, v.t()))


def with_sink(state: State, log_base: float, sink: torch.Tensor) -> State:
    """The state in natural base, and one more key in it: its value is 0, its logits are `sink` [heads, rows]."""
    logit = sink.reshape(-1, 1)
    one = State(logit, torch.ones_like(logit), torch.zeros_like(state.o))
    return merge(State(state.m * log_base, state.l, state.o), one, False)


def write(state: State, log_base: float, sink: torch.Tensor | None, lse: torch.Tensor, out: torch.Tensor) -> float:
    """The finished rows of a state: lse [heads, rows] in natural base, out [heads, rows, Dv]. Returns a sum that is finite if
    out is.
    """
    if sink is not None:
        state = with_sink(state, log_base, sink)
        log_base = 1.0
    torch.add(state.l.log().view(lse.shape), state.m.view(lse.shape), alpha=log_base, out=lse)
    # The largest logit adds 1 to l: it is 0 for a row without a key and at least 1 for any other.
    torch.div(state.o.view(out.shape), state.l.clamp_(min=1).view(out.size(0), out.size(1), 1), out=out)
    return float(state.o.sum())


def _rows_of_sink(sink: torch.Tensor | None, place: list[int]) -> torch.Tensor | None:
    return None if sink is None else tile_of(sink, place)


def _state_of_unit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    place: list[int],
    factor: float,
    log_base: float,
    start: list[int],
    stop: list[int],
    bundle: list[int],
    cap: list[torch.Tensor],
    owner: list[int],
    low: list[int],
    high: list[int],
) -> State:
    tile = [place[3], place[5], -1]
    k, v = head_of(k, place), head_of(v, place)
    rows = rows_of(tile_of(q, place), factor, k)
    a, b = bundle[0], bundle[1]
    logits = masked_logits(rows, bundled(k, start, stop, a, b), tile, start, stop, a, b, cap, owner, low, high)
    state = state_of(logits, bundled(v, start, stop, a, b), log_base)
    for m in range(1, len(bundle) - 1):
        a, b = bundle[m], bundle[m + 1]
        logits = masked_logits(rows, bundled(k, start, stop, a, b), tile, start, stop, a, b, cap, owner, low, high)
        state = merge(state, state_of(logits, bundled(v, start, stop, a, b), log_base), log_base != 1.0)
    return state


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    places: list[list[int]],
    factor: float,
    log_base: float,
    start: list[int],
    stop: list[int],
    bundle: list[int],
    cap: list[torch.Tensor],
    owner: list[int],
    low: list[int],
    high: list[int],
    sink: torch.Tensor | None,
    lse: torch.Tensor,
    out: torch.Tensor,
) -> float:
    """Forward of units with the identity score: a state per chunk, merged. `factor` scales q and brings logits to
    their base; sink [B, Hq, Nq] in natural base. Writes the units' parts of lse [B, Hq, Nq] and out [B, Hq, Nq, Dv]; returns
    a sum that is finite if out is.
    """
    total = 0.0
    for place in places:
        state = _state_of_unit(q, k, v, place, factor, log_base, start, stop, bundle, cap, owner, low, high)
        total += write(state, log_base, _rows_of_sink(sink, place), tile_of(lse, place), tile_of(out, place))
    return total


def measure(
    q: torch.Tensor,
    k: torch.Tensor,
    places: list[list[int]],
    factor: float,
    log_base: float,
    start: list[int],
    stop: list[int],
    bundle: list[int],
    cap: list[torch.Tensor],
    owner: list[int],
    low: list[int],
    high: list[int],
    top: torch.Tensor,
    total: torch.Tensor,
) -> None:
    """Writes the units' largest logits and sums of base ** (logit - largest), to top and total [B, Hq, Nq]."""
    none = k.narrow(3, 0, 0)
    for place in places:
        state = _state_of_unit(q, k, none, place, factor, log_base, start, stop, bundle, cap, owner, low, high)
        tile_of(top, place).copy_(state.m.view(place[3], place[5]))
        tile_of(total, place).copy_(state.l.view(place[3], place[5]))


def attend_storing(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    places: list[list[int]],
    factor: float,
    log_base: float,
    start: list[int],
    stop: list[int],
    bundle: list[int],
    cap: list[torch.Tensor],
    owner: list[int],
    low: list[int],
    high: list[int],
    sink: torch.Tensor | None,
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
            states.append(state_of(logits, bundled(values, start, stop, a, b), log_base))  # logits now holds exp(x - m)
            before = 0
            for n in range(a, b):
                size = stop[n] - start[n]
                kept[:, :, start[n] : stop[n]] = logits.view(tile).narrow(2, before, size)
                before += size
        state = states[0]
        for m in range(1, len(states)):
            state = merge(state, states[m], log_base != 1.0)
        own = _rows_of_sink(sink, place)
        whole = State(state.m * log_base, state.l, state.o) if own is None else with_sink(state, log_base, own)
        top = whole.m.clamp(min=lowest(whole.m))
        for m in range(len(states)):
            weight = torch.exp(states[m].m * log_base - top).div_(whole.l.clamp(min=1)).view(place[3], place[5], 1)
            for n in range(bundle[m], bundle[m + 1]):
                kept[:, :, start[n] : stop[n]].mul_(weight)
        total += write(whole, 1.0, None, tile_of(lse, place), tile_of(out, place))
    return total
