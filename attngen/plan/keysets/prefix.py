"""Contexts shared by many samples (bifurcated attention, arXiv 2403.08845): each is read once, whatever the number of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attngen.errors import InputError
from attngen.language.call import bind
from attngen.language.checks import check_lengths
from attngen.plan.keysets.base import KeySet, Pieces, Result, b, check_tensor, i, j, moved, positive
from attngen.state.merging import merge

if TYPE_CHECKING:
    from attngen.language.call import Call
    from attngen.language.spec import Spec


@dataclass(frozen=True)
class SharedPrefix(KeySet):
    """k, v hold each sample's own suffix. prefix_k, prefix_v [G, Hkv, Mc, *], G dividing B; tuples of `levels` tensors, the
    outermost context first, where levels > 1. k_len int [B], lengths of the suffixes.
    """

    levels: int = 1

    name: ClassVar[str] = "shared_prefix"
    used: ClassVar[tuple[str, ...]] = ("prefix_k", "prefix_v", "k_len")
    optional: ClassVar[tuple[str, ...]] = ("k_len",)

    def __post_init__(self) -> None:
        positive("shared_prefix: levels", self.levels)

    def bind(
        self, spec: Spec, q: Any, k: Any, v: Any, q_offset: Any, captures: Mapping[str, Any], given: Mapping[str, Any]
    ) -> Call:
        from attngen.language.spec import Spec as Plain

        bind(Plain(), q, k, v, q_offset=q_offset, captures={})
        # Captures are indexed by logical positions, so they are checked against as many keys as those are.
        length = k.shape[2] + sum(key.shape[2] for key, _ in self.contexts(q, k, v, given))
        long = (t.detach()[:, :, :1, :1].new_empty(()).expand(*t.shape[:2], length, t.shape[3]) for t in (k, v))
        call = bind(spec, q, *long, q_offset=q_offset, captures=captures)
        return replace(call, k=k, v=v)

    def contexts(self, q: Any, k: Any, v: Any, given: Mapping[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(k, v) of each context, outermost first. InputError."""
        found: dict[str, list[torch.Tensor]] = {}
        for name, like in (("prefix_k", k), ("prefix_v", v)):
            value = given.get(name)
            parts = [value] if self.levels == 1 and isinstance(value, torch.Tensor) else value
            if not isinstance(parts, (tuple, list)) or len(parts) != self.levels:
                wanted = "a tensor [G, Hkv, Mc, *]" if self.levels == 1 else f"a tuple of {self.levels} tensors"
                fix = f"pass {name}=... at the call" if value is None else ""
                raise InputError(name, wanted, type(value).__name__, fix)
            for level, part in enumerate(parts):
                place = name if self.levels == 1 else f"{name}[{level}]"
                shape = tuple(part.shape) if isinstance(part, torch.Tensor) else ()
                groups, length = (shape[0], shape[2]) if len(shape) == 4 else (1, 0)
                wanted_shape = (groups, like.shape[1], length, like.shape[3])
                check_tensor(place, part, "float", wanted_shape, "[G, Hkv, Mc, *]", q.device)
                if part.dtype != q.dtype:
                    raise InputError(place, f"{q.dtype} like q", part.dtype)
                if groups == 0 or q.shape[0] % groups:
                    raise InputError(place, f"a first dimension that divides the batch {q.shape[0]}", groups)
            found[name] = list(parts)
        pairs = list(zip(found["prefix_k"], found["prefix_v"], strict=True))
        for level, (key, value) in enumerate(pairs):
            if key.shape[:3] != value.shape[:3]:
                place = "prefix_v" if self.levels == 1 else f"prefix_v[{level}]"
                raise InputError(place, f"{list(key.shape[:3])} + [Dv] like prefix_k", f"shape {list(value.shape)}")
        return pairs

    def run(self, pieces: Pieces, plan: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
        call, start, results = pieces.call, 0, []
        for key, value in self.contexts(call.q, call.k, call.v, given):
            if key.shape[2]:
                results.append(_context(pieces, key, value, start))
            start += key.shape[2]
        batch, device, limited = call.q.shape[0], call.q.device, given.get("k_len") is not None
        extra = {"k_start": _filled(batch, start, device)}
        if limited:
            size = call.k.shape[2]
            extra["k_len"] = check_lengths("k_len", given["k_len"], batch, size, "rows of k", device)

        def build() -> dict[str, Any]:
            places = {"j": j + pieces.tensor("k_start", 1)[b]}
            mask = moved(pieces.mask, **places)
            if limited:
                mask = mask & (j < pieces.tensor("k_len", 1)[b])
            return {"mask": mask, "score": moved(pieces.score, **places)}

        role = ("suffix", limited)
        return merge(*results, pieces.attend(role, build, call.q, call.k, call.v, call.q_offset, **extra))


def _context(pieces: Pieces, key: torch.Tensor, value: torch.Tensor, start: int) -> Result:
    """One context's part: the query rows of the samples that share it, one after the other, are the rows of one call."""
    call = pieces.call
    (batch, _, n_q, _), groups, device = call.q.shape, key.shape[0], call.q.device
    samples = batch // groups

    def build() -> dict[str, Any]:
        sample, position = pieces.tensor("q_sample", 2), pieces.tensor("q_position", 2)
        k_start = pieces.tensor("k_start", 1)
        places = {"b": sample[b, i], "i": position[b, i], "j": j + k_start[b]}
        return {"mask": moved(pieces.mask, **places), "score": moved(pieces.score, **places)}

    offset = call.q_offset.view(-1, 1) if isinstance(call.q_offset, torch.Tensor) else call.q_offset
    position = (torch.arange(n_q, device=device) + offset).expand(batch, n_q)
    extra = {
        "q_sample": torch.arange(batch, device=device).repeat_interleave(n_q).view(groups, -1).to(torch.int32),
        "q_position": position.reshape(groups, -1).to(torch.int32),
        "k_start": _filled(groups, start, device),
    }
    folded = call.q.unflatten(0, (groups, samples)).transpose(1, 2).flatten(2, 3)
    out, lse = pieces.attend("context", build, folded, key, value, **extra)
    out = out.unflatten(2, (samples, n_q)).transpose(1, 2).flatten(0, 1)
    lse = lse.unflatten(2, (samples, n_q)).transpose(1, 2).flatten(0, 1)
    return out, lse


def _filled(count: int, value: int, device: torch.device) -> torch.Tensor:
    return torch.full((count,), value, dtype=torch.int32, device=device)


def shared_prefix(levels: int = 1) -> SharedPrefix:
    """One context for many samples (bifurcated attention, arXiv 2403.08845): `Spec(keys=ag.shared_prefix(), mask=...)`, with
    each sample's own keys as k, v [B, Hkv, Md, D], called with prefix_k= and prefix_v= [G, Hkv, Mc, D]: sample b continues
    context b * G // B. levels > 1: tuples of as many tensors, the outermost context first, each with a G of its own.
    Optionally k_len= int [B], the suffixes' lengths.

    Logical positions count the contexts one after the other and then the suffix; q_offset, masks, scores and captures are
    in these. The keys read are Mc + B * Md, not B * (Mc + Md). Differentiable in the contexts. Raises InputError.
    """
    return SharedPrefix(levels)
