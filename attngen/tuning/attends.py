"""What a search is about: the ordinary attentions that a call is made of, at the sizes and with the captures they really get.

A call of a plain mask is one attention. One with a key set, ragged lengths or pages is planned, what it prepares is prepared, and each
`Attend` of its plan is searched for itself, under the key by which a call will look for its record.

Captures that are not given are made up: masks and scores get those of `attngen.tuning.captures`, key sets those of
`attngen.reference.samples`. Lengths (k_len=, cu_q=, cu_k=) are never made up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from attngen.errors import InputError
from attngen.language.call import Call
from attngen.language.keysets.cached import Paged
from attngen.language.keysets.union import Union
from attngen.language.spec import Spec
from attngen.plan.keysets.ragged import LENGTHS
from attngen.reference.samples import made_up
from attngen.runtime.attention import compile as compile_spec
from attngen.store import Shape
from attngen.tuning.captures import make_captures
from attngen.tuning.sizes import offset_of, small_shape


@dataclass(frozen=True, eq=False)
class Part:
    """One attention of a call. name: its step in the plan, "" where it is the call itself. captures: all that it reads, on the CPU,
    "q_offset" too; of the call itself those that were given. small: the same attention in a call of few tokens, which can be
    compared with the oracle; None where such a call has no such part.
    """

    name: str
    spec: Spec
    shape: Shape
    captures: dict[str, Any] = field(repr=False)
    small: Part | None = field(default=None, repr=False)

    @property
    def whole(self) -> bool:
        """Whether it is a call as users make it, whose captures may be made up anew at any size."""
        return self.name == ""


def parts_of(
    spec: Spec,
    shape: Shape,
    dtype: torch.dtype,
    captures: Mapping[str, Any],
    *,
    device: torch.device,
    patient: bool,
    backward: bool,
    seed: int,
) -> tuple[list[Part], list[str]]:
    """The different attentions of a call, and what was made up for it, in words. device: where it is planned. patient: whether sizes
    may depend on values, as they do on a CPU and never on a GPU. backward: whether it also prepares for one. InputError for
    captures that do not fit.
    """
    own = [name for name in (*spec.params, *spec.tensors) if name not in captures]
    if spec.keys is None and not any(captures.get(name) is not None for name in LENGTHS):
        return [Part("", spec, shape, dict(captures))], own
    made: dict[str, Any] = {"device": device, "patient": patient, "backward": backward, "seed": seed}
    found, words = _planned(spec, shape, dtype, captures, **made)
    small: dict[str, Part] = {}
    if small_shape(shape) != shape and not _tied_to_sizes(spec, captures):
        small = {part.name: part for part in _planned(spec, small_shape(shape), dtype, captures, **made)[0]}
    parts: dict[tuple[str, Shape], Part] = {}
    for part in found:
        like = part if small_shape(shape) == shape else small.get(part.name)
        like = like if like is not None and like.spec.key == part.spec.key else None
        parts.setdefault((part.spec.key, part.shape), replace(part, small=like))
    return list(parts.values()), [*own, *words]


def _planned(
    spec: Spec,
    shape: Shape,
    dtype: torch.dtype,
    captures: Mapping[str, Any],
    *,
    device: torch.device,
    patient: bool,
    backward: bool,
    seed: int,
) -> tuple[list[Part], list[str]]:
    (q, k, v), named, words = example(spec, shape, dtype, captures, device=device, seed=seed)
    q = q.requires_grad_(backward and not isinstance(spec.keys, Paged))
    return [
        Part(step.name, _pinned(call.spec, spec), _shape_of(call), _captures_of(call))
        for step, call in compile_spec(spec).attends(q, k, v, patient=patient, **named)
    ], words


def _pinned(inner: Spec, outer: Spec) -> Spec:
    """The inner spec with what the outer one pins, which the search may not change."""
    if outer.schedule is None or inner is outer:
        return inner
    return Spec.from_text(inner.text, schedule=outer.schedule, name=inner.name)


def example(
    spec: Spec,
    shape: Shape,
    dtype: torch.dtype,
    captures: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, Any], list[str]]:
    """A call of a shape: random q, k, v; all that it captures and its q_offset, by name, with what was not given made up; and
    what a key set's made-up captures are, in words. InputError for a capture that nobody can make up.
    """
    captures, device = captures or {}, torch.device(device)
    q, k, v = _rows(spec, shape, dtype, device, seed)
    named = {name: _to(value, device) for name, value in captures.items()}
    named |= {name: x for name, x in make_captures(spec, shape, device, captures, seed).items() if name not in named}
    named, words = _of_key_sets(spec, q, k, v, named, offset_of(shape))
    named.setdefault("q_offset", offset_of(shape))
    return (q, k, v), named, words


def _rows(
    spec: Spec, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, random; of a paged cache as many pages as the keys need."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    q = random(shape.batch, shape.heads_q, shape.n_q, shape.head_dim)
    if not isinstance(spec.keys, Paged):
        k, v = (random(shape.batch, shape.heads_kv, shape.n_k, d) for d in (shape.head_dim, shape.head_dim_v))
        return q, k, v
    pages, size = shape.batch * -(-shape.n_k // spec.keys.page_size), spec.keys.page_size
    k, v = (random(pages, shape.heads_kv, size, d) for d in (shape.head_dim, shape.head_dim_v))
    return q, *((k, v) if spec.keys.head_major else (k.transpose(1, 2), v.transpose(1, 2)))


def _of_key_sets(
    spec: Spec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, named: dict[str, Any], q_offset: int
) -> tuple[dict[str, Any], list[str]]:
    """`named` with what the key sets take besides, and what that is, in words."""
    words: list[str] = []
    for part in spec.keys.specs if isinstance(spec.keys, Union) else (spec,):
        if part.keys is None:
            continue
        given = {*named} & {*part.keys.captures()}
        if given - {*part.keys.optional} or (given and not {*part.keys.captures()} - {*part.keys.optional}):
            missing = [n for n in part.keys.captures() if n not in named and n not in part.keys.optional]
        else:
            missing = None  # nothing of it is given
        if missing == []:
            continue
        values, how = made_up(part.keys, *(x.detach().cpu() for x in (q, k, v)), q_offset=q_offset)
        for (name, value), text in zip(values.items(), how, strict=True):
            if name not in named and (missing is None or name in missing):
                named[name] = _to(value, q.device)
                words.append(text)
    return named, words


def _tied_to_sizes(spec: Spec, captures: Mapping[str, Any]) -> bool:
    """Whether a tensor was given that fits calls of this size only."""
    keys = spec.keys.captures() if spec.keys is not None else LENGTHS
    return any(isinstance(captures.get(name), (torch.Tensor, tuple, list)) for name in (*keys, *spec.tensors))


def _shape_of(call: Call) -> Shape:
    batch, heads, n_q, head_dim = call.q.shape
    return Shape(batch, heads, int(call.k.shape[1]), n_q, int(call.n_k), head_dim, int(call.v.shape[3]))


def _captures_of(call: Call) -> dict[str, Any]:
    tensors = {name: value.detach().cpu().contiguous() for name, value in call.captures.items()}
    offset = call.q_offset.cpu() if isinstance(call.q_offset, torch.Tensor) else int(call.q_offset)
    return {**tensors, **call.params, "q_offset": offset}


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def check_names(spec: Spec, captures: Mapping[str, Any]) -> None:
    """InputError for a capture that a call would not take."""
    keys = () if spec.keys is None else spec.keys.captures()
    lengths = LENGTHS if spec.keys is None else ()
    for name in captures:
        if name not in spec.params and name not in spec.tensors and name not in keys and name not in lengths:
            known = ", ".join([*spec.params, *spec.tensors, *keys]) or "it has none"
            raise InputError(name, f"one of this spec's captures ({known})", "an unknown name")
