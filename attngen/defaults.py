"""The model's choice of tiles: what compiles without spills and fits, before anything was tuned."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from attngen.schedule import Target, Tile

# (target family, kernel, largest head dim) -> tile, for float16 and bfloat16. Cross-compiled for a causal mask; no spills.
HALF = MappingProxyType(
    {
        ("sm_90", "forward", 64): Tile(128, 64, 8, 3),
        ("sm_90", "forward", 128): Tile(128, 64, 8, 3),
        ("sm_90", "forward", 192): Tile(64, 64, 8, 2),
        ("sm_90", "forward", 256): Tile(64, 32, 8, 3),
        ("sm_90", "dq", 64): Tile(64, 64, 8, 2),
        ("sm_90", "dq", 128): Tile(64, 64, 8, 2),
        ("sm_90", "dq", 256): Tile(64, 32, 8, 2),
        ("sm_90", "dkv", 64): Tile(64, 64, 8, 2),
        ("sm_90", "dkv", 128): Tile(64, 64, 8, 2),
        ("sm_90", "dkv", 256): Tile(32, 64, 8, 2),
    }
)
# float32 with exact ("ieee") products runs on the ordinary cores: small tiles.
SINGLE = MappingProxyType(
    {
        ("forward", 64): Tile(32, 32, 4, 2),
        ("forward", 128): Tile(32, 32, 4, 2),
        ("forward", 256): Tile(16, 16, 4, 1),
        ("dq", 64): Tile(32, 32, 4, 1),
        ("dq", 128): Tile(16, 32, 4, 1),
        ("dq", 256): Tile(16, 16, 4, 1),
        ("dkv", 64): Tile(32, 32, 4, 1),
        ("dkv", 128): Tile(32, 16, 4, 1),
        ("dkv", 256): Tile(16, 16, 4, 1),
    }
)


def default_tile(target: Target, kernel: str, head_dim: int, dtype: Any) -> Tile:
    """The tile of "forward", "dq" or "dkv" for the larger of the two head dims."""
    if str(dtype) in ("torch.float32", "torch.float64"):
        return _smallest(SINGLE, (kernel,), head_dim)
    return _smallest(HALF, ("sm_90", kernel), head_dim)


def _smallest(table: Any, prefix: tuple[str, ...], head_dim: int) -> Tile:
    """The entry of the smallest class of head dims that holds this one."""
    classes = sorted(key[-1] for key in table if key[:-1] == prefix)
    return table[(*prefix, next((c for c in classes if head_dim <= c), classes[-1]))]
