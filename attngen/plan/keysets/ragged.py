"""Batches of uneven lengths, for any spec without keys: padded caches (k_len), sliding ones whose first key is not at position 0
(k_offset), and packed sequences (cu_q, cu_k).

Lengths stay on the device: they are captured tensors of an inner spec whose b, i and j are those of the sequences, so other
lengths neither wait nor compile anything.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from attngen.errors import InputError
from attngen.language import expression
from attngen.language.call import LARGEST_POSITION, Call, bind
from attngen.language.checks import check_lengths, check_tensor, require
from attngen.language.keysets.cached import Ragged
from attngen.language.plain import PLAIN
from attngen.language.programs import evaluate, tensor_of
from attngen.plan.planner import FAMILIES, Family, Planner
from attngen.plan.steps import Result

if TYPE_CHECKING:
    from attngen.language.spec import Spec


LIMIT = 2**31 - 1
LENGTHS = ("k_len", "k_offset", "cu_q", "cu_k")  # of ragged batches, unless the spec has a tensor of that name
PLACES = ("q_sequence", "q_position", "k_position", "q_own_offset", "q_rank", "k_rank", "start", "stop")


def ragged_of(spec: Spec, names: Any) -> Ragged | None:
    """Which lengths a call with captures of these names has; None without any. InputError."""
    given = [name for name in LENGTHS if name in names and name not in spec.tensors]
    if not given or spec.keys is not None:
        return None
    packed = given == ["cu_q", "cu_k"]
    if not packed and {*given} - {"k_len", "k_offset"}:
        wanted = "k_len= or k_offset= for padded and sliding caches, or cu_q= and cu_k= for packed sequences"
        raise InputError(given[0], wanted, ", ".join(given))
    if spec.dropout is not None or spec.lists is not None or spec.page_size is not None:
        raise InputError(given[0], "a spec without dropout=, lists= and page_size=", "a spec with one of them")
    return Ragged("packed" if packed else ", ".join(given))


def plan_ragged(keys: Ragged, planner: Planner) -> Result:
    """One attention whose mask reads the lengths."""
    return _plan_packed(planner) if keys.kind == "packed" else _plan_padded(keys, planner)


def read_ragged(keys: Ragged, given: Mapping[str, Any], q: Any, k: Any) -> dict[str, Any]:
    """k_offset as a tensor [B]. InputError."""
    found = dict(given)
    offset: Any = given.get("k_offset")
    if "k_offset" in keys.names:
        if isinstance(offset, torch.Tensor) and offset.dim() == 0:
            found["k_offset"] = offset.expand(q.shape[:1])
        elif not isinstance(offset, torch.Tensor):
            if isinstance(offset, bool) or not isinstance(offset, (numbers.Integral, torch.SymInt)):
                raise InputError("k_offset", "an int or an int tensor [B]", type(offset).__name__)
            fill: Any = offset
            found["k_offset"] = torch.full(q.shape[:1], fill, dtype=torch.int64, device=q.device)
    return found


def bind_ragged(
    keys: Ragged,
    spec: Spec,
    q: Any,
    k: Any,
    v: Any,
    q_offset: Any,
    captures: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Call:
    """The checked call. InputError."""
    if keys.kind != "packed":
        call = bind(spec, q, k, v, q_offset=q_offset, captures=captures, values=False)  # the piece knows lengths
        for name, dims in spec.plain_dims.items() if "k_offset" in keys.names else ():
            for dim, axis in dims:
                if axis == "j" and captures[name].shape[dim] == 1:
                    wanted = f"an element for each position along dimension {dim}, indexed by j, next to k_offset="
                    raise InputError(name, wanted, f"shape {list(captures[name].shape)}", "expand it")
        return call
    return _bind_packed(spec, q, k, v, q_offset, captures, given)


# -- padded -----------------------------------------------------------------------------------------------------------


def _plan_padded(keys: Ragged, planner: Planner) -> Result:
    found = planner.prepare("lengths", _lengths, keys.names, keys.names)

    def build() -> dict[str, Any]:
        from attngen.language.moved import b, j, moved

        spec, mask, score = planner.spec, planner.mask, planner.score
        sink = None if spec.sink is None else expression.Expr(spec.sink)
        if "k_offset" in keys.names:
            position = j + planner.tensor("k_offset", 1)[b]
            mask, score = moved(mask, j=position), moved(score, j=position)
        if "k_len" in keys.names:
            mask = mask & (j < planner.tensor("k_len", 1)[b])
        return {"mask": mask, "score": score, "sink": sink}

    return planner.attend("padded", keys.kind, build, "q", "k", "v", found, offset=True, looks=True)


def _lengths(call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    (batch, _, length, _), device, found = call.k.shape, call.q.device, dict[str, Any]()
    if "k_len" in given:
        found["k_len"] = check_lengths("k_len", given["k_len"], batch, length, "rows of k", device)
    if "k_offset" in given:
        offset = check_tensor("k_offset", given["k_offset"], "int", (batch,), "[B]", device)
        most = LARGEST_POSITION - length
        require("k_offset", (offset > -most) & (offset < most), f"positions of at most {most}", offset, "in row")
        found["k_offset"] = offset.clamp(1 - most, most - 1).to(torch.int32)
    return found


# -- packed -----------------------------------------------------------------------------------------------------------


def _plan_packed(planner: Planner) -> Result:
    found = planner.prepare("places", _prepare_packed, ("cu_q", "cu_k"), (*PLACES, "cu_q"))

    def build() -> dict[str, Any]:
        from attngen.language.moved import by_distance, i, j, moved, moved_by, split_causal

        named = {name: planner.tensor(name, 1) for name in PLACES}
        offset = {"q_offset": named["q_own_offset"][i]}
        positions = {"b": named["q_sequence"][i], "i": named["q_position"][i], "j": named["k_position"][j], **offset}
        ranks = {"b": positions["b"], "i": named["q_rank"][i], "j": named["k_rank"][j], **offset}
        # Ranks rise over the whole row and differ like positions inside a sequence: what depends on the distance alone
        # finds tight ranges by them.
        mask = moved_by(planner.mask, lambda atom: ranks if by_distance(atom) else positions)
        mask = mask & (ranks["j"] >= named["start"][i])
        if split_causal(planner.spec.mask) is None:  # a causal mask ends the sequence itself
            mask = mask & (ranks["j"] < named["stop"][i])
        return {"mask": mask, "score": moved(planner.score, **positions)}

    result = planner.attend(
        "packed", "packed", build, "q", "k", "v", {name: found[name] for name in PLACES}, looks=True
    )
    if planner.spec.sink is None:
        return result
    sink = planner.sink(_packed_sink, [found[name] for name in ("q_sequence", "q_position", "q_own_offset", "cu_q")])
    return planner.merge(result, sink=sink)


def _prepare_packed(call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """Checked offsets, and the place of every row in its sequence."""
    count = given["cu_q"].shape[0] - 1
    cu_q, cu_k = (
        _checked(name, given[name], count, x.shape[2], call.q.device)
        for name, x in (("cu_q", call.q), ("cu_k", call.k))
    )
    _check_room(call, call.captures, {"i": cu_q.diff(), "j": cu_k.diff()})
    return {**_places(call, cu_q, cu_k, count), "cu_q": cu_q}


def _bind_packed(
    spec: Spec, q: Any, k: Any, v: Any, q_offset: Any, captures: Mapping[str, Any], given: Mapping[str, Any]
) -> Call:
    bind(PLAIN, q, k, v, captures={})
    if q.shape[0] != 1:
        raise InputError("q", "packed sequences [1, Hq, total_q, D]", f"shape {list(q.shape)}")
    cu_q = given["cu_q"]
    count = cu_q.shape[0] - 1 if isinstance(cu_q, torch.Tensor) and cu_q.dim() == 1 else 0
    if count < 1:
        got = f"shape {list(cu_q.shape)}" if isinstance(cu_q, torch.Tensor) else type(cu_q).__name__
        raise InputError("cu_q", "int [S + 1], S >= 1", got)
    return _bound(spec, q, k, v, q_offset, count, captures)


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
        for dim, axis in dims if name in captures else ():
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


def _packed_sink(
    spec: Spec,
    names: Any,
    call: Call,
    *values: torch.Tensor,
) -> tuple[torch.Tensor]:
    """The sink's logits [1, Hq, total_q]; rows of no sequence have none. values: the sink's captures, then the rows' sequences,
    positions and offsets, and the ends of the sequences.
    """
    *values, sequence, position, offset, cu_q = values  # type: ignore[assignment]
    heads, rows, device = call.q.shape[1], call.q.shape[2], call.q.device
    real = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    env: dict[str, Any] = {**call.params, **dict(zip(names, values, strict=True))}
    env |= {"b": sequence.long(), "i": position.long(), "q_offset": offset.long()}
    env |= {"h": torch.arange(heads, device=device).view(1, -1, 1)}
    value = tensor_of(evaluate(spec.sink, env, real=real), device).to(real)
    here = torch.arange(rows, device=device) < cu_q[-1]
    return (torch.where(here, value.expand(1, heads, rows), -torch.inf),)


FAMILIES[Ragged] = Family(plan_ragged, bind=bind_ragged, read=read_ragged)
