"""Batches of uneven lengths, for any spec without keys: padded caches (k_len) and packed sequences (cu_q, cu_k).

Lengths stay on the device: they are captured tensors of an inner spec whose b, i and j are those of the sequences, so other
lengths neither wait nor compile anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from attngen.errors import InputError
from attngen.language.call import Call, bind
from attngen.language.checks import check_lengths, require
from attngen.language.expression import evaluate, tensor_of
from attngen.language.spec import Spec
from attngen.plan.keysets.base import Pieces, Result, b, by_distance, check_tensor, i, j, moved, moved_by, split_causal
from attngen.runtime.attention import LENGTHS
from attngen.state.merging import merge

if TYPE_CHECKING:
    from attngen.runtime.attention import CompiledAttention

LIMIT = 2**31 - 1


def run(
    attention: CompiledAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offset: Any,
    lengths: Mapping[str, Any],
    captures: Mapping[str, Any],
) -> Result:
    """out and lse of a call with `lengths`: k_len, or cu_q and cu_k. InputError."""
    spec = attention.spec
    given = [name for name in LENGTHS if lengths.get(name) is not None]
    if given not in (["k_len"], ["cu_q", "cu_k"]):
        raise InputError(
            given[0], "k_len= for padded caches, or cu_q= and cu_k= for packed sequences", ", ".join(given)
        )
    if spec.dropout is not None or spec.lists is not None or spec.page_size is not None:
        raise InputError(given[0], "a spec without dropout=, lists= and page_size=", "a spec with one of them")
    if given == ["k_len"]:
        return _padded(attention, q, k, v, q_offset, lengths["k_len"], captures)
    return _packed(attention, q, k, v, q_offset, lengths["cu_q"], lengths["cu_k"], captures)


# -- padded -----------------------------------------------------------------------------------------------------------


def _padded(
    attention: CompiledAttention, q: Any, k: Any, v: Any, q_offset: Any, k_len: Any, captures: Mapping[str, Any]
) -> Result:
    from attngen.plan.keysets.call import _sink

    call = bind(attention.spec, q, k, v, q_offset=q_offset, captures=captures, values=False)  # the piece knows lengths
    pieces = Pieces(attention, call, trusted=False)
    k_len = check_lengths("k_len", k_len, q.shape[0], k.shape[2], "rows of k", q.device)

    def build() -> dict[str, Any]:
        return {"mask": pieces.mask & (j < pieces.tensor("k_len", 1)[b]), "score": pieces.score}

    result = pieces.attend("k_len", build, q, k, v, q_offset, k_len=k_len)
    return result if attention.spec.sink is None else _with_sink(result, _sink(call, result[1]))


def _with_sink(result: Result, sink: torch.Tensor) -> Result:
    return merge(result, (result[0].new_zeros(()).expand(result[0].shape), sink))


# -- packed -----------------------------------------------------------------------------------------------------------


def _packed(
    attention: CompiledAttention,
    q: Any,
    k: Any,
    v: Any,
    q_offset: Any,
    cu_q: Any,
    cu_k: Any,
    captures: Mapping[str, Any],
) -> Result:
    bind(Spec(), q, k, v, captures={})
    if q.shape[0] != 1:
        raise InputError("q", "packed sequences [1, Hq, total_q, D]", f"shape {list(q.shape)}")
    count = cu_q.shape[0] - 1 if isinstance(cu_q, torch.Tensor) and cu_q.dim() == 1 else 0
    if count < 1:
        got = f"shape {list(cu_q.shape)}" if isinstance(cu_q, torch.Tensor) else type(cu_q).__name__
        raise InputError("cu_q", "int [S + 1], S >= 1", got)
    cu_q, cu_k = (
        _checked(name, cu, count, x.shape[2], q.device) for name, cu, x in (("cu_q", cu_q, q), ("cu_k", cu_k, k))
    )
    call = _bound(attention.spec, q, k, v, q_offset, count, captures)
    _check_room(call, captures, {"i": cu_q.diff(), "j": cu_k.diff()})
    places = _places(call, cu_q, cu_k, count)
    pieces = Pieces(attention, call, trusted=False)

    def build() -> dict[str, Any]:
        named = {name: pieces.tensor(name, 1) for name in places}
        offset = {"q_offset": named["q_own_offset"][i]}
        positions = {"b": named["q_sequence"][i], "i": named["q_position"][i], "j": named["k_position"][j], **offset}
        ranks = {"b": positions["b"], "i": named["q_rank"][i], "j": named["k_rank"][j], **offset}
        # Ranks rise over the whole row and differ like positions inside a sequence: what depends on the distance alone
        # finds tight ranges by them.
        mask = moved_by(pieces.mask, lambda atom: ranks if by_distance(atom) else positions)
        mask = mask & (ranks["j"] >= named["start"][i])
        if split_causal(pieces.spec.mask) is None:  # a causal mask ends the sequence itself
            mask = mask & (ranks["j"] < named["stop"][i])
        return {"mask": mask, "score": moved(pieces.score, **positions)}

    result = pieces.attend("packed", build, q, k, v, **places)
    return result if attention.spec.sink is None else _with_sink(result, _packed_sink(call, result[1], places, cu_q))


def _checked(name: str, cu: Any, count: int, total: int, device: torch.device) -> torch.Tensor:
    """cu int64 [S + 1]; where the checks are turned off, one that starts at 0, rises and stays inside all the same."""
    cu = check_tensor(name, cu, "int", (count + 1,), "[S + 1]", device)
    require(name, cu[:1] == 0, "0 at the start", cu[:1])
    require(name, cu.diff() >= 0, "offsets that do not fall", cu[1:], "at the end of sequence")
    require(name, cu[1:] <= total, f"offsets of at most {total} rows", cu[1:], "at the end of sequence")
    clean = cu.long().clamp(0, total).cummax(0).values
    return torch.cat([torch.zeros_like(clean[:1]), clean[1:]])


def _bound(
    spec: Spec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offset: Any,
    count: int,
    captures: Mapping[str, Any],
) -> Call:
    """The checked call. Captures are [S, ...] along b; along i and j they are as long as the longest sequence, which only the
    device knows: `_check_room` looks at that.
    """
    behind = q_offset if isinstance(q_offset, int) else 0
    full = {"b": count, "h": q.shape[1], "i": q.shape[2] + behind, "r": q.shape[2], "j": k.shape[2]}
    expanded = dict(captures)
    for name, dims in spec.plain_dims.items():
        tensor = captures.get(name)
        if isinstance(tensor, torch.Tensor) and tensor.dim() == spec.tensors[name].ndim:
            sizes = list(tensor.shape)
            for dim, axis in dims:
                sizes[dim] = full[axis] if sizes[dim] == 1 else sizes[dim]
            expanded[name] = tensor.expand(sizes)
    shortest = [t.detach().new_empty(()).expand(count, t.shape[1], 0, t.shape[3]) for t in (q, k, v)]
    call = bind(spec, *shortest, q_offset=q_offset, captures=expanded)
    return replace(call, q=q, k=k, v=v)


def _check_room(call: Call, captures: Mapping[str, Any], lengths: Mapping[str, torch.Tensor]) -> None:
    """InputError for a capture that is shorter, along i or j, than a sequence has positions. Where the checks are turned off
    a load past the end reads the last element.
    """
    for name, dims in call.spec.plain_dims.items():
        for dim, axis in dims:
            size = captures[name].shape[dim]
            if axis not in "ijr" or size == 1:
                continue
            length = lengths["i" if axis == "r" else axis]
            if axis == "i" and isinstance(call.q_offset, torch.Tensor):
                wanted = f"0 or more, since `{name}` is indexed by the position i"
                require("q_offset", (call.q_offset >= 0) | (length == 0), wanted, call.q_offset, "in sequence")
            end = torch.where(length > 0, length + (call.q_offset if axis == "i" else 0), 0)
            wanted = f"{size} positions {axis} at most, as many as it has along dimension {dim}"
            require(name, end <= size, wanted, end, "in sequence")


def _places(call: Call, cu_q: torch.Tensor, cu_k: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    """Of each packed row its sequence, position and rank, and of each query the ranks at which its keys start and stop."""
    n_q, n_k, device, offset = call.q.shape[2], call.k.shape[2], call.q.device, call.q_offset
    q_row, k_row = (torch.arange(n, device=device) for n in (n_q, n_k))
    q_sequence = torch.searchsorted(cu_q[1:].contiguous(), q_row, right=True)
    k_sequence = torch.searchsorted(cu_k[1:].contiguous(), k_row, right=True)
    inside = q_sequence.clamp(max=count - 1)  # rows behind the last sequence have the number `count`
    shift, stride = 2**30, 2**32  # an offset may be negative: shifted positions lie in 0 .. stride - 1
    if isinstance(offset, torch.Tensor):
        own = offset.long()[inside]
    else:
        own, shift = torch.full_like(inside, offset), abs(offset)
        stride = 2 * shift + n_q + n_k + 1
    word = torch.int32 if (count + 3) * stride < LIMIT else torch.int64
    q_position = q_row - cu_q[q_sequence] + own
    k_position = k_row - cu_k[k_sequence]
    # Rows behind the last sequence have ranks that no other row's range has in it, and queries a range with no key, which
    # starts after all and stops before: tiles that have such rows besides others visit no more for them.
    far = torch.where(k_sequence < count, k_sequence, count + 1)
    found = {
        "q_rank": q_sequence * stride + shift + q_position,
        "k_rank": far * stride + shift + k_position,
        "start": torch.where(q_sequence < count, q_sequence, count + 2) * stride,
        "stop": torch.where(q_sequence < count, q_sequence + 1, count) * stride,
    }
    near = {"q_sequence": inside, "q_position": q_position, "k_position": k_position, "q_own_offset": own}
    return {n: t.to(word) for n, t in found.items()} | {n: t.to(torch.int32) for n, t in near.items()}


def _packed_sink(call: Call, lse: torch.Tensor, places: Mapping[str, torch.Tensor], cu_q: torch.Tensor) -> torch.Tensor:
    """The sink's logits [1, Hq, total_q]; rows of no sequence have none."""
    env: dict[str, Any] = {**call.captures, **call.params}
    env |= {"b": places["q_sequence"].long(), "i": places["q_position"].long()}
    env |= {"q_offset": places["q_own_offset"].long()}
    env |= {"h": torch.arange(lse.shape[1], device=lse.device).view(1, -1, 1)}
    value = tensor_of(evaluate(call.spec.sink, env, real=lse.dtype), lse.device).to(lse.dtype)
    here = torch.arange(lse.shape[2], device=lse.device) < cu_q[-1]
    return torch.where(here, value.expand(lse.shape), -torch.inf)
