"""Maps of a mask's tiles, from the very programs that the kernels run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from attngen.analysis.tables import Axis
from attngen.analysis.walk import Walk, WalkProgram
from attngen.errors import InputError

if TYPE_CHECKING:
    from attngen.language.spec import Spec

EMPTY, PARTIAL, FULL = 0, 1, 2

Segments = tuple[tuple[torch.Tensor, torch.Tensor], ...]  # (firsts, counts), each [B or 1, H or 1, tiles]


def run(
    walk: Walk,
    program: WalkProgram,
    env: Mapping[str, Any],
    tile: Axis,
    walked: Axis,
    block_tile: int,
    block_walked: int,
    device: Any = "cpu",
    tables: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Segments, Segments]:
    """Prepare the walk's tables and run its program for all tiles of an axis: (full segments, partial segments).

    `env`: params and captures by name, "b" int64 [B, 1, 1] and "h" int64 [1, H, 1]. tables: those of the walk, if they are
    there already.
    """
    scope = {**env, **(tables or walk.prepare(env, tile, walked, block_tile, device))}
    starts = torch.arange(0, tile.length, block_tile, device=device).view(1, 1, -1)
    last = (starts + block_tile).clamp(max=tile.length) - 1
    end = walked.begin + walked.length
    full_first, full_count, partial_first, partial_count = program.evaluate(
        starts + tile.begin, last + tile.begin, walked.begin, end, block_walked, scope
    )
    return tuple(zip(full_first, full_count, strict=True)), tuple(zip(partial_first, partial_count, strict=True))


def paint(full: Segments, partial: Segments, tiles: int, walked_tiles: int, b: int = 0, h: int = 0) -> torch.Tensor:
    """The segments of one (b, h) as int8 [tiles, walked tiles]: 0 empty, 1 partial, 2 full."""
    canvas = torch.zeros(tiles, walked_tiles, dtype=torch.int8, device="cpu")
    columns = torch.arange(walked_tiles, device="cpu")
    for value, segments in ((FULL, full), (PARTIAL, partial)):
        for first, count in segments:
            low, size = (x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)].cpu().view(-1, 1) for x in (first, count))
            canvas.masked_fill_((columns >= low) & (columns < low + size), value)
    return canvas


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
    tiles walk the queries; the map has the same orientation. Raises InputError.
    """
    from attngen.analysis import facts

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
    env = mask_environment(spec, captures)
    env |= {name: torch.full((1, 1, 1), value, device="cpu") for name, value in (("b", b), ("h", h))}

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


def check_positive(walk: Walk, env: Mapping[str, Any]) -> None:
    """InputError for a param that divides a position and is not positive."""
    for symbol in walk.positive:
        value = env.get(symbol.name)
        if value is not None and not isinstance(value, torch.Tensor) and value < 1:
            raise InputError(symbol.name, "at least 1, since the mask divides by it", value)
