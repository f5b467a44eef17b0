"""What attngen does with one call and why, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attngen.analysis import GPUS, tile_map
from attngen.analysis.cost import visited_pairs
from attngen.inspect import picture
from attngen.language.call import Call
from attngen.schedule import Schedule

if TYPE_CHECKING:
    from attngen.runtime.attention import CompiledAttention

ALTERNATIVES = ((64, 32), (64, 64), (128, 32), (128, 64), (128, 128))
MOST_TILES = 2**22  # a finer map would take seconds to draw


def explain(attention: CompiledAttention, call: Call) -> str:
    """Sections: the spec, the mask's picture and tile counts, facts, plan, the cost bound, the schedule and where it came
    from, and what other tiles would visit. Everything about a GPU that is not here is modelled, and says so.
    """
    from attngen.backends import pick
    from attngen.plan.plan import backward_plan, forward_plan

    spec = attention.spec
    stages = attention.specialise(call)
    schedule, known = stages.schedule, stages.facts
    batch, n_q, n_k = call.q.shape[0], call.q.shape[2], call.n_k
    backend = pick(attention.backend, call.q.device)
    tile = _tile(call, schedule, backend)
    parts = [("spec", f"{spec}\nkey {spec.key[:16]}")]
    if n_q and n_k and batch:
        parts.append((f"mask of batch 0, head 0, {n_q} queries x {n_k} keys", _map(call, tile)))
    parts.append(("facts", str(known)))
    wanted = [name for name, t in call.captures.items() if t.is_floating_point() and t.requires_grad]
    plans = f"forward\n{_indent(str(forward_plan(spec, known)))}\nbackward\n{_indent(str(backward_plan(spec, known, wanted)))}"
    parts.append(("plan", plans))
    parts.append(("cost bound (modelled)", _cost(call, stages, tile)))
    parts.append((f"schedule on backend {backend!r}", f"{schedule}\nfrom {stages.origin}"))
    if n_q and n_k and batch:
        parts.append(
            (
                "alternatives: pairs visited by other forward tiles, against the attended pairs",
                _alternatives(call, stages, tile),
            )
        )
    return "\n\n".join(f"{title}\n{_indent(body)}" for title, body in parts)


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.split("\n"))


def _mask_captures(call: Call) -> dict[str, Any]:
    read = {symbol.name for symbol in call.spec.mask.free_symbols}
    values: dict[str, Any] = {**call.captures, **call.params}
    return {name: value for name, value in values.items() if name in read}


def _tile(call: Call, schedule: Schedule, backend: str) -> tuple[int, int]:
    """The forward's tile; on the CPU a chunk of keys is cut at a finer grain than its size."""
    block_m, block_n = schedule.forward.block_m or 128, schedule.forward.block_n or 64
    if backend == "cpu":
        from attngen.backends.cpu.tiles import GRAIN

        block_n = GRAIN
    while (call.q.shape[2] // block_m + 1) * (call.n_k // block_n + 1) > MOST_TILES:
        block_m, block_n = 2 * block_m, 2 * block_n
    return block_m, block_n


def _map(call: Call, tile: tuple[int, int]) -> str:
    block_m, block_n = tile
    tiles = tile_map(
        call.spec, call.q.shape[2], call.n_k, block_m, block_n, q_offset=call.q_offset, **_mask_captures(call)
    )
    return f"{picture.text(tiles, 32)}\n{picture.LEGEND}   (tiles of {block_m} x {block_n})\n{picture.summary(tiles)}"


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
        captures=_mask_captures(call),
    )


def _gpu(device: torch.device) -> str:
    """The GPU whose rates bound this call: the one at hand if its rates are known, else an H200."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((gpu for gpu in GPUS if gpu in name), "H200")
    return "H200"


def _cost(call: Call, stages: Any, tile: tuple[int, int]) -> str:
    block_m, block_n = tile
    return str(stages.facts.cost(**_sizes(call), block_m=block_m, block_n=block_n, gpu=_gpu(call.q.device)))


def _alternatives(call: Call, stages: Any, tile: tuple[int, int]) -> str:
    sizes = _sizes(call)
    key = (sizes["batch"], sizes["heads_q"], sizes["n_q"], sizes["n_k"])
    captures = _mask_captures(call)
    exact = visited_pairs(stages.facts, *key, 1, 1, call.q_offset, captures) or 1
    lines = []
    for block_m, block_n in sorted({*ALTERNATIVES, tile}):
        visited = visited_pairs(stages.facts, *key, block_m, block_n, call.q_offset, captures) or 0
        mark = "   <- this schedule" if (block_m, block_n) == tile else ""
        lines.append(f"{block_m:4} x {block_n:<4} {visited / exact:6.3f} x{mark}")
    return "\n".join(lines)
