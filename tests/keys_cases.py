"""What the tests of key sets share: random inputs, and a check of a spec against its oracle."""

from __future__ import annotations

from typing import Any

import torch

import attngen as ag
from tests.check import check

# batch, kv heads, query heads per kv head, queries, keys, q_offset
SIZES = [
    (1, 1, 1, 1, 1, 0),
    (1, 1, 1, 67, 67, 0),
    (2, 2, 1, 100, 100, 0),
    (1, 2, 2, 130, 130, 0),
    (2, 1, 4, 45, 131, 86),
    (1, 1, 2, 90, 37, 0),
]
MASKS: dict[str, Any] = {
    "none": None,
    "causal": ag.causal(),
    "strict": lambda b, h, i, j: i > j,
    "window": ag.causal() & ag.window(24),
    "blocks": ag.block_causal(16),
}


def inputs(size: tuple[int, ...], seed: int = 0, dim: int = 16, dim_v: int = 24) -> tuple[torch.Tensor, ...]:
    batch, heads, group, n_q, n_k, _ = size
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads * group, n_q, dim), (batch, heads, n_k, dim), (batch, heads, n_k, dim_v)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def compare(
    spec: ag.Spec, size: tuple[int, ...], captures: dict[str, Any], backend: str = "cpu", seed: int = 0
) -> None:
    """out, lse and all gradients against the oracle; the spec's text reads back as the same spec."""
    check(spec, ag.compile(spec, backend=backend), *inputs(size, seed), captures, size[5])
    assert ag.Spec.from_text(str(spec)).key == spec.key


def visited(
    spec: ag.Spec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, **captures: Any
) -> tuple[int, int]:
    """(tiles visited, tiles that hold an attended pair) over all pieces, batches and heads of a call."""
    from attngen.language.programs import evaluate
    from attngen.reference.dense import dense_env
    from tests.keys_work import tile_maps

    seen = needed = 0
    for _, call in ag.compile(spec, backend="cpu").attends(q, k, v, **captures):
        n_q, n_k = call.q.shape[2], call.k.shape[2]
        mask = torch.as_tensor(evaluate(call.spec.mask, dense_env(call, torch.float64)))
        mask = mask.expand(*call.q.shape[:3], n_k)
        pad = torch.nn.functional.pad(mask, (0, -n_k % block, 0, -n_q % block))
        needed += int(pad.unflatten(-1, (-1, block)).unflatten(2, (-1, block)).any(-1).any(3).sum())
        seen += int((tile_maps(call, block) > 0).sum())
    return seen, needed
