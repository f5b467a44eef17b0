"""Maps of a mask's tiles, from the very programs that the kernels run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attngen.analysis.listed import listed_map
from attngen.analysis.spec_facts import facts
from attngen.analysis.summaries import Axis
from attngen.analysis.tiles import check_positive, paint, run
from attngen.errors import InputError
from attngen.language.spec import Spec


def tile_map(
    spec: Spec,
    n_q: int,
    n_k: int,
    block_m: int,
    block_n: int,
    *,
    b: int = 0,
    h: int = 0,
    q_offset: int | torch.Tensor = 0,
    transposed: bool = False,
    **captures: Any,
) -> torch.Tensor:
    """What a kernel does with each tile of batch `b`, query head `h`: int8 [ceil(n_q / block_m), ceil(n_k / block_n)],
    0 empty (skipped), 1 partial (with the mask), 2 full (without it).

    `captures`: the spec's params and tensors. `transposed`: use the walk of the backward's second pass, in which key
    tiles walk the queries; the map has the same orientation. Of a spec with lists, which walks them and not its mask, `h` counts
    their heads, and blocks are multiples of theirs. Raises InputError.
    """
    for name, value, least in (
        ("n_q", n_q, 0), ("n_k", n_k, 0), ("block_m", block_m, 1), ("block_n", block_n, 1), ("b", b, 0), ("h", h, 0)
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(name, f"an int of at least {least}", repr(value))
    if isinstance(q_offset, torch.Tensor):
        if q_offset.ndim > 1 or q_offset.is_floating_point() or (q_offset.ndim == 1 and b >= q_offset.shape[0]):
            raise InputError(
                "q_offset", f"an int, or an int tensor [B] with B > {b}", f"{q_offset.dtype} {list(q_offset.shape)}"
            )
        q_offset = int(q_offset if q_offset.ndim == 0 else q_offset[b])
    if isinstance(q_offset, bool) or not isinstance(q_offset, int):
        raise InputError("q_offset", "an int or an int tensor [B]", type(q_offset).__name__)
    if spec.lists is not None:
        missing = [name for name in spec.lists.names if not isinstance(captures.get(name), torch.Tensor)]
        if missing:
            raise InputError(missing[0], f"a tensor, {spec.tensors[missing[0]].text()}", "nothing", "the walk reads it")
        return listed_map(spec.lists, captures, n_q, n_k, block_m, block_n, b, h)
    env = mask_environment(spec, captures)
    env |= {name: torch.full((1, 1, 1), value, device="cpu") for name, value in (("b", b), ("h", h))}
    env["q_offset"] = q_offset

    known = facts(spec)
    walk = known.walk_queries if transposed else known.walk_keys
    check_positive(walk, env)
    queries, keys = Axis("i", q_offset, n_q), Axis("j", 0, n_k)
    shape = (-(-n_q // block_m), -(-n_k // block_n))
    if 0 in shape:
        return torch.zeros(shape, dtype=torch.int8, device="cpu")
    if transposed:
        segments = run(walk, known.program_queries, env, keys, queries, block_n, block_m)
        return paint(*segments, shape[1], shape[0]).T.contiguous()
    segments = run(walk, known.program_keys, env, queries, keys, block_m, block_n)
    return paint(*segments, *shape)


def mask_environment(spec: Spec, captures: Mapping[str, Any]) -> dict[str, Any]:
    """The captures that the mask reads, by name, tensors on the CPU. InputError for unknown, missing or ill-shaped
    ones.
    """
    declared = {**spec.tensors, **spec.params}
    for name in captures:
        if name not in declared:
            raise InputError(
                name, f"one of this spec's captures ({', '.join(declared) or 'it has none'})", "an unknown name"
            )
    env: dict[str, Any] = {}
    for name in sorted(symbol.name for symbol in spec.mask.free_symbols if symbol.name in declared):
        value = captures.get(name)
        if name in spec.tensors:
            wanted = spec.tensors[name]
            if not isinstance(value, torch.Tensor) or value.ndim != wanted.ndim or 0 in value.shape:
                got = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise InputError(
                    name, f"a non-empty tensor, {wanted.text()}", got, f"the mask reads it: pass {name}=..."
                )
            env[name] = value.detach().cpu()
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(
                name, f"a number, {declared[name].text()}", type(value).__name__, f"the mask reads it: pass {name}=..."
            )
        else:
            env[name] = value
    return env
