"""What attngen does with one call and why, as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from attngen.analysis import GPUS, Cost, tile_map
from attngen.analysis.cost import visited_pairs
from attngen.backends import pick
from attngen.backends.cpu.tiles import grain_of
from attngen.inspect import picture, plan_picture
from attngen.language.call import Call
from attngen.language.lists import RowLists, TileLists
from attngen.plan.steps import Attend
from attngen.runtime.attention import CompiledAttention
from attngen.runtime.executable import tensors_of
from attngen.runtime.specialise import Specialised
from attngen.schedule import Schedule

ALTERNATIVES = ((64, 32), (64, 64), (128, 32), (128, 64), (128, 128))
CPU_ALTERNATIVES = (32, 64, 128, 256, 512)  # queries of a tile
MOST_TILES = 2**22  # a finer map would take seconds to draw


def explain(
    attention: CompiledAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offset: Any,
    captures: Mapping[str, Any],
    png: str | Path | None = None,
) -> str:
    """Sections: the spec, the plan of both directions with sizes, bytes and schedules, and of each attention in it the mask's
    picture and tile counts, facts, the cost bound, the schedule and where it came from, and what other tiles would visit.
    Everything about a GPU that is not here is modelled, and says so.
    """
    k, v = attention.for_all_batches(q, k, v)
    call, given, executable = attention.checked(q, k, v, q_offset, captures)
    backend = pick(attention.backend, call.q.device)
    attends, buffers = executable.attends(call, given)
    wanted = frozenset(name for name, value in tensors_of(call, given).items() if value.requires_grad) or frozenset(
        "qkv"
    )
    forward = executable.forward_plan
    about = {step.name: _about_attend(attention, inner) for step, inner in attends}
    for step in forward.steps:
        about.setdefault(step.name, _about_buffers(step.writes, buffers))
    paged = call.spec.page_size is not None  # for inference
    if png is not None:
        plans = {"forward": forward} if paged else {"forward": forward, "backward": executable.backward_plan(wanted)}
        plan_picture.draw(plans, png)
    parts = [("spec", f"{attention.spec}\nkey {attention.spec.key[:16]}")]
    backward = [] if paged else [f"backward\n{_indent(str(executable.backward_plan(wanted)))}"]
    parts.append(("plan", "\n".join([f"forward\n{_indent(forward.text(about))}", *backward])))
    if call.spec.keys is not None or len(attends) > 1:
        parts.append(("pairs of all attentions together", _pairs(attention, call, attends, backend)))
    for step, inner in attends:
        own = _attention(attention, inner, backend)
        parts += own if len(attends) == 1 else [(f"{step.name}: {title}", body) for title, body in own]
    return "\n\n".join(f"{title}\n{_indent(body)}" for title, body in parts)


def _attention(attention: CompiledAttention, call: Call, backend: str) -> list[tuple[str, str]]:
    """What is to be said of one ordinary attention."""
    stages = attention.specialiser.of(call)
    schedule, known = stages.schedule, stages.facts
    batch, n_q, n_k = call.q.shape[0], call.q.shape[2], call.n_k
    tile = _tile(call, schedule, backend)
    parts = []
    if n_q and n_k and batch:
        parts.append((f"mask of batch 0, head 0, {n_q} queries x {n_k} keys", _map(call, tile)))
    listed = (
        ""
        if call.spec.lists is None
        else f"what is visited say the lists, {call.spec.lists.text}; of the mask is known:\n"
    )
    parts.append(("facts", f"{listed}{known}"))
    parts.append(("cost bound (modelled)", str(_cost(call, stages, tile))))
    parts.append((f"schedule on backend {backend!r}", f"{schedule}\nfrom {stages.origin}"))
    if n_q and n_k and batch and call.spec.lists is None:
        title = "alternatives: pairs visited by other forward tiles, against the attended pairs"
        if backend == "cpu":
            title += f" (a tile's keys begin and end at multiples of {tile[1]}, whatever block_n)"
        parts.append((title, _alternatives(call, stages, backend)))
    return parts


def _pairs(attention: CompiledAttention, call: Call, attends: Iterable[tuple[Attend, Call]], backend: str) -> str:
    """What all attentions of a plan visit, against every query with every key."""
    total = 0
    for _, inner in attends:
        stages = attention.specialiser.of(inner)
        total += _cost(inner, stages, _tile(inner, stages.schedule, backend)).pairs
    dense = call.q.shape[0] * call.q.shape[1] * call.q.shape[2] * call.n_k
    return f"{total:,} visited, {total / max(dense, 1):.1%} of the {dense:,} of every query with every key"


def _about_attend(attention: CompiledAttention, call: Call) -> str:
    """Sizes, schedule and its origin, in two lines under a step of the plan."""
    stages = attention.specialiser.of(call)
    batch, heads, n_q, dim = call.q.shape
    sizes = f"B{batch} Hq{heads} Hkv{call.k.shape[1]} Nq{n_q} Nk{call.n_k} D{dim} Dv{call.v.shape[3]}, spec {call.spec.key[:12]}"
    return f"{sizes}\n{stages.schedule}\nfrom {stages.origin}"


def _about_buffers(names: Iterable[str], buffers: Mapping[str, Any]) -> str:
    """Shapes and bytes of what a step makes."""
    shown = []
    for name in names:
        value = buffers.get(name)
        if isinstance(value, torch.Tensor):
            size = value.numel() * value.element_size()
            shown.append(f"{name}: {str(value.dtype).removeprefix('torch.')} {list(value.shape)}, {size:,} bytes")
    return "\n".join(shown)


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.split("\n"))


def _walk_captures(call: Call) -> dict[str, Any]:
    """What decides the tiles: what the mask reads, and the lists that take its place."""
    read = {symbol.name for symbol in call.spec.mask.free_symbols}
    read |= set() if call.spec.lists is None else {*call.spec.lists.names}
    values: dict[str, Any] = {**call.captures, **call.params}
    return {name: value for name, value in values.items() if name in read}


def _tile(call: Call, schedule: Schedule, backend: str) -> tuple[int, int]:
    """What a forward tile's pairs are rounded out to: listed tiles or pairs, on the CPU the grain of its walk, else the tile."""
    if call.spec.lists is not None:
        lists = call.spec.lists
        return (lists.block_m, lists.block_n) if isinstance(lists, TileLists) else (1, 1)
    block_m, block_n = schedule.forward.block_m or 128, schedule.forward.block_n or 64
    return (block_m, grain_of(block_m, call.q.shape[2])) if backend == "cpu" else (block_m, block_n)


def _map(call: Call, tile: tuple[int, int]) -> str:
    (block_m, block_n), n_q = tile, call.q.shape[2]
    while (n_q // block_m + 1) * (call.n_k // block_n + 1) > MOST_TILES:
        block_m, block_n = 2 * block_m, 2 * block_n
    captures = _walk_captures(call)
    tiles = tile_map(call.spec, n_q, call.n_k, block_m, block_n, q_offset=call.q_offset, **captures)
    lines = [picture.text(tiles, 32), f"{picture.LEGEND}   (tiles of {block_m} x {block_n})"]
    if isinstance(call.spec.lists, RowLists):
        lines.append("key by key: each row visits the keys that it lists, and no others of a tile")
    else:
        lines.append(picture.summary(tiles))
    return "\n".join(lines)


def _sizes(call: Call) -> dict[str, Any]:
    batch, heads, n_q, head_dim = call.q.shape
    return dict(
        batch=batch,
        heads_q=heads,
        heads_kv=call.k.shape[1],
        n_q=n_q,
        n_k=call.n_k,
        head_dim=head_dim,
        head_dim_v=call.v.shape[3],
        dtype=call.q.dtype,
        q_offset=call.q_offset,
        captures=_walk_captures(call),
    )


def _gpu(device: torch.device) -> str:
    """The GPU whose rates bound this call: the one at hand if its rates are known, else an H200."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((gpu for gpu in GPUS if gpu in name), "H200")
    return "H200"


def _cost(call: Call, stages: Specialised, tile: tuple[int, int]) -> Cost:
    block_m, block_n = tile
    return stages.facts.cost(**_sizes(call), block_m=block_m, block_n=block_n, gpu=_gpu(call.q.device))


def _alternatives(call: Call, stages: Specialised, backend: str) -> str:
    """Forward tiles as the backend has them, the schedule's own among them."""
    sizes, captures = _sizes(call), _walk_captures(call)
    key = (sizes["batch"], sizes["heads_q"], sizes["n_q"], sizes["n_k"])

    def visited(m: int, n: int) -> int:
        return visited_pairs(stages.facts, *key, m, n, call.q_offset, captures) or 0

    own = stages.schedule.forward.block_m or 128, stages.schedule.forward.block_n or 64
    others = [(m, own[1]) for m in CPU_ALTERNATIVES] if backend == "cpu" else ALTERNATIVES
    attended, lines = visited(1, 1) or 1, []
    for m, n in sorted({*others, own}):
        pairs = visited(m, grain_of(m, sizes["n_q"]) if backend == "cpu" else n)
        mark = "   <- this schedule" if (m, n) == own else ""
        lines.append(f"{m:4} x {n:<4} {pairs / attended:6.3f} x{mark}")
    return "\n".join(lines)
