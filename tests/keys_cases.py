"""What the tests of key sets share: random inputs, and a check of a spec against its oracle."""

from __future__ import annotations

from typing import Any

import torch

import attngen as ag
from attngen.language.call import bind
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
    from attngen.language.expression import evaluate
    from attngen.plan.keysets.call import recorded
    from attngen.reference.dense import dense_env

    seen = needed = 0
    for _, piece, pq, pk, pv, offset, named in recorded(ag.compile(spec, backend="cpu"), q, k, v, 0, captures):
        read = {name: value for name, value in named.items() if name in {s.name for s in piece.spec.mask.free_symbols}}
        call = bind(piece.spec, pq, pk, pv, q_offset=offset, captures=named)
        mask = torch.as_tensor(evaluate(piece.spec.mask, dense_env(call, torch.float64)))
        mask = mask.expand(*pq.shape[:3], pk.shape[2])
        pad = torch.nn.functional.pad(mask, (0, -pk.shape[2] % block, 0, -pq.shape[2] % block))
        needed += int(pad.unflatten(-1, (-1, block)).unflatten(2, (-1, block)).any(-1).any(3).sum())
        for b in range(pq.shape[0]):
            for h in range(pq.shape[1]):
                tiles = ag.tile_map(
                    piece.spec, pq.shape[2], pk.shape[2], block, block, b=b, h=h, q_offset=offset, **read
                )
                seen += int((tiles > 0).sum())
    return seen, needed
