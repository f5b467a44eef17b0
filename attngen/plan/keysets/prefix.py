"""Contexts shared by many samples (bifurcated attention, arXiv 2403.08845): each is read once, whatever the number of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attngen.errors import InputError
from attngen.language.call import Call, bind
from attngen.language.checks import check_lengths, check_tensor
from attngen.language.keysets.cached import SharedPrefix
from attngen.language.plain import PLAIN
from attngen.plan.moves import Samples
from attngen.plan.planner import FAMILIES, Family, Planner
from attngen.plan.steps import Result

if TYPE_CHECKING:
    from attngen.language.spec import Spec


CONTEXT = ("q_sample", "q_position", "k_start")


def plan_prefix(keys: SharedPrefix, planner: Planner) -> Result:
    """The query rows of all samples of a context are the rows of one call; then each sample's own suffix; merged."""
    sizes, start, results = planner.sizes, 0, []
    given = dict(sizes.given)
    for level in range(keys.levels):
        groups, _, length, _ = given.get(f"prefix_k.{level}", (1, 0, 0, 0))
        if length:
            results.append(_context(planner, level, groups, start))
        start += length
    lengths = ("k_len",) if "k_len" in given else ()
    found = planner.prepare("lengths of suffixes", partial(_suffixes, start), lengths, ("suffix_start", *lengths))

    def build() -> dict[str, Any]:
        from attngen.language.moved import b, j, moved

        mask = moved(planner.mask, j=j + planner.tensor("suffix_start", 1)[b])
        if lengths:
            mask = mask & (j < planner.tensor("k_len", 1)[b])
        return {"mask": mask, "score": moved(planner.score, j=j + planner.tensor("suffix_start", 1)[b])}

    own = planner.attend("suffix", ("suffix", bool(lengths)), build, "q", "k", "v", found, offset=True)
    return planner.merge(*results, own)


def _context(planner: Planner, level: int, groups: int, start: int) -> Result:
    samples = planner.sizes.batch // groups
    make = partial(_context_rows, groups, start, level)
    found = planner.prepare(f"rows of context {level}", make, (), tuple(f"{name}.{level}" for name in CONTEXT))

    def build() -> dict[str, Any]:
        from attngen.language.moved import b, i, j, moved

        sample, position = planner.tensor("q_sample", 2), planner.tensor("q_position", 2)
        places = {"b": sample[b, i], "i": position[b, i], "j": j + planner.tensor("k_start", 1)[b]}
        return {"mask": moved(planner.mask, **places), "score": moved(planner.score, **places)}

    q = planner.take(f"samples {level}", "q", Samples(samples))
    captures = {name: found[f"{name}.{level}"] for name in CONTEXT}
    part = planner.attend(f"context {level}", "context", build, q, f"prefix_k.{level}", f"prefix_v.{level}", captures)
    return planner.put(f"by sample {level}", part, Samples(samples), None, planner.sizes.shapes["q"])


def _context_rows(groups: int, start: int, level: int, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of each row of a context its sample and position, int32 [G, samples * Nq], and where the context starts."""
    (batch, _, n_q, _), device = call.q.shape, call.q.device
    offset = call.q_offset.view(-1, 1) if isinstance(call.q_offset, torch.Tensor) else call.q_offset
    position = (torch.arange(n_q, device=device) + offset).expand(batch, n_q)
    sample = torch.arange(batch, device=device).repeat_interleave(n_q).view(groups, -1)
    return {
        f"q_sample.{level}": sample.to(torch.int32),
        f"q_position.{level}": position.reshape(groups, -1).to(torch.int32),
        f"k_start.{level}": _filled(groups, start, device),
    }


def _suffixes(start: int, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    batch, device = call.q.shape[0], call.q.device
    found = {"suffix_start": _filled(batch, start, device)}
    if given.get("k_len") is not None:
        found["k_len"] = check_lengths("k_len", given["k_len"], batch, call.k.shape[2], "rows of k", device)
    return found


def _filled(count: int, value: int, device: torch.device) -> torch.Tensor:
    return torch.full((count,), value, dtype=torch.int32, device=device)


# -- what comes at the call -------------------------------------------------------------------------------------------


def read_contexts(keys: SharedPrefix, given: Mapping[str, Any], q: Any, k: Any) -> dict[str, Any]:
    """prefix_k.0, prefix_v.0 and so on, outermost first. InputError."""
    found = {name: value for name, value in given.items() if name == "k_len" and value is not None}
    for name in ("prefix_k", "prefix_v"):
        value = given.get(name)
        parts = [value] if keys.levels == 1 and isinstance(value, torch.Tensor) else value
        if not isinstance(parts, (tuple, list)) or len(parts) != keys.levels:
            wanted = "a tensor [G, Hkv, Mc, *]" if keys.levels == 1 else f"a tuple of {keys.levels} tensors"
            fix = f"pass {name}=... at the call" if value is None else ""
            raise InputError(name, wanted, type(value).__name__, fix)
        found |= {f"{name}.{level}": part for level, part in enumerate(parts)}
    return found


def bind_contexts(
    keys: SharedPrefix,
    spec: Spec,
    q: Any,
    k: Any,
    v: Any,
    q_offset: Any,
    captures: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Call:
    """The checked call. Captures are indexed by logical positions, so they are checked against as many keys as those are."""
    bind(PLAIN, q, k, v, q_offset=q_offset, captures={})
    length = k.shape[2]
    for level in range(keys.levels):
        shapes = {}
        for name, like in (("prefix_k", k), ("prefix_v", v)):
            place = name if keys.levels == 1 else f"{name}[{level}]"
            part = given[f"{name}.{level}"]
            shape = tuple(part.shape) if isinstance(part, torch.Tensor) else ()
            groups, size = (shape[0], shape[2]) if len(shape) == 4 else (1, 0)
            check_tensor(
                place, part, "float", (groups, like.shape[1], size, like.shape[3]), "[G, Hkv, Mc, *]", q.device
            )
            if part.dtype != q.dtype:
                raise InputError(place, f"{q.dtype} like q", part.dtype)
            if groups == 0 or q.shape[0] % groups:
                raise InputError(place, f"a first dimension that divides the batch {q.shape[0]}", groups)
            shapes[name] = shape
        if shapes["prefix_k"][:3] != shapes["prefix_v"][:3]:
            place = "prefix_v" if keys.levels == 1 else f"prefix_v[{level}]"
            raise InputError(
                place, f"{list(shapes['prefix_k'][:3])} + [Dv] like prefix_k", f"shape {list(shapes['prefix_v'])}"
            )
        length += shapes["prefix_k"][2]
    long = (t.detach()[:, :, :1, :1].new_empty(()).expand(*t.shape[:2], length, t.shape[3]) for t in (k, v))
    call = bind(spec, q, *long, q_offset=q_offset, captures=captures)
    return replace(call, k=k, v=v)


FAMILIES[SharedPrefix] = Family(plan_prefix, bind=bind_contexts, read=read_contexts)
