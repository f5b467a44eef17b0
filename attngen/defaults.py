"""The model's choice of tiles before anything was tuned: tables of tiles that compile without spills and fit."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from attngen.schedule import Target, Tile

# float16 and bfloat16: (family, kernel, largest head dim of the class) -> tile. Without spills for head dims 64, 128, 192
# and 256 forward and 64 and 128 backward, under triton 3.6 and 3.9 (tests/test_lowering.py); the other classes were seen
# with 3.9 only, and above 128 those that aren't 192 or 256 still spill in dkv (head dims of several pieces). The deeper key
# blocks of sm_90 and sm_100 don't fit the registers of the older ones.
HALF: Mapping[tuple[str, str, int], Tile] = MappingProxyType(
    {
        ("sm_80", "forward", 64): Tile(128, 64, 8, 3),
        ("sm_80", "forward", 128): Tile(128, 32, 8, 3),
        ("sm_80", "forward", 192): Tile(128, 16, 8, 2),
        ("sm_80", "forward", 256): Tile(64, 32, 8, 2),
        ("sm_80", "dq", 112): Tile(128, 32, 8, 2),
        ("sm_80", "dq", 128): Tile(64, 64, 8, 2),
        ("sm_80", "dq", 256): Tile(64, 16, 8, 1),
        ("sm_80", "dkv", 64): Tile(32, 128, 8, 2),
        ("sm_80", "dkv", 96): Tile(16, 128, 8, 2),
        ("sm_80", "dkv", 112): Tile(16, 64, 8, 1),
        ("sm_80", "dkv", 128): Tile(16, 64, 8, 2),
        ("sm_80", "dkv", 176): Tile(16, 64, 8, 1),
        ("sm_80", "dkv", 192): Tile(32, 32, 8, 2),
        ("sm_80", "dkv", 240): Tile(16, 64, 8, 1),
        ("sm_80", "dkv", 256): Tile(32, 32, 8, 2),
        ("sm_90", "forward", 64): Tile(128, 64, 8, 3),
        ("sm_90", "forward", 128): Tile(128, 64, 8, 3),
        ("sm_90", "forward", 192): Tile(128, 32, 8, 3),
        ("sm_90", "forward", 256): Tile(64, 32, 8, 3),
        ("sm_90", "dq", 64): Tile(128, 64, 8, 2),
        ("sm_90", "dq", 128): Tile(128, 64, 8, 2),
        ("sm_90", "dq", 256): Tile(128, 16, 8, 1),
        ("sm_90", "dkv", 64): Tile(32, 128, 8, 2),
        ("sm_90", "dkv", 128): Tile(16, 128, 8, 2),
        ("sm_90", "dkv", 176): Tile(16, 64, 8, 2),
        ("sm_90", "dkv", 192): Tile(64, 32, 8, 1),
        ("sm_90", "dkv", 240): Tile(16, 64, 8, 2),
        ("sm_90", "dkv", 256): Tile(64, 32, 8, 1),
        ("sm_100", "forward", 64): Tile(128, 64, 8, 3),
        ("sm_100", "forward", 128): Tile(128, 64, 8, 3),
        ("sm_100", "forward", 192): Tile(128, 32, 8, 2),
        ("sm_100", "forward", 256): Tile(64, 32, 8, 2),
        ("sm_100", "dq", 64): Tile(128, 64, 8, 2),
        ("sm_100", "dq", 128): Tile(64, 32, 8, 2),
        ("sm_100", "dq", 256): Tile(64, 32, 8, 2),
        ("sm_100", "dkv", 64): Tile(64, 128, 8, 1),
        ("sm_100", "dkv", 128): Tile(32, 128, 8, 1),
        ("sm_100", "dkv", 240): Tile(16, 64, 8, 1),
        ("sm_100", "dkv", 256): Tile(64, 32, 8, 1),
        ("gfx942", "forward", 64): Tile(128, 64, 4, 2),
        ("gfx942", "forward", 128): Tile(64, 32, 4, 2),
        ("gfx942", "forward", 256): Tile(64, 32, 4, 2),
        ("gfx942", "dq", 64): Tile(64, 64, 4, 2),
        ("gfx942", "dq", 128): Tile(128, 32, 8, 2),
        ("gfx942", "dq", 256): Tile(64, 16, 4, 1),
        ("gfx942", "dkv", 64): Tile(32, 64, 4, 2),
        ("gfx942", "dkv", 128): Tile(32, 32, 4, 2),
        ("gfx942", "dkv", 256): Tile(16, 32, 4, 1),
    }
)
# float32 with exact ("ieee") products runs on the ordinary cores, where a thread holds whole rows of both operands: small
# tiles and many warps. The backward spills at 128 (up to 6 registers seen) and above with every tile tried.
SINGLE: Mapping[tuple[str, str, int], Tile] = MappingProxyType(
    {
        ("sm", "forward", 112): Tile(64, 32, 8, 1),
        ("sm", "forward", 256): Tile(32, 32, 8, 1),
        ("sm", "dq", 112): Tile(64, 16, 8, 1),
        ("sm", "dq", 256): Tile(16, 16, 8, 1),
        ("sm", "dkv", 112): Tile(32, 32, 8, 1),
        ("sm", "dkv", 256): Tile(16, 16, 8, 1),
        ("gfx942", "forward", 128): Tile(32, 32, 4, 2),
        ("gfx942", "forward", 256): Tile(16, 16, 4, 1),
        ("gfx942", "dq", 64): Tile(32, 32, 4, 1),
        ("gfx942", "dq", 128): Tile(16, 32, 4, 1),
        ("gfx942", "dq", 256): Tile(16, 16, 4, 1),
        ("gfx942", "dkv", 64): Tile(32, 32, 4, 1),
        ("gfx942", "dkv", 128): Tile(32, 16, 4, 1),
        ("gfx942", "dkv", 256): Tile(16, 16, 4, 1),
    }
)


def default_tile(target: Target, kernel: str, head_dim: int, dtype: Any) -> Tile:
    """The tile of "forward", "dq" or "dkv" for the larger of the two head dims."""
    if str(dtype) in ("torch.float32", "torch.float64"):
        return _of_class(SINGLE, ("gfx942" if target.name == "gfx942" else "sm", kernel), head_dim)
    return _of_class(HALF, (_family(target), kernel), head_dim)


def decode_tile(rows: int, head_dim: int) -> Tile:
    """The forward's tile for a few query rows, whose time is that of reading the keys: long key tiles, and stages to have
    several of them on their way.
    """
    if rows > 16:  # more than 32 rows spill
        return Tile(32, 64 if head_dim <= 64 else 32 if head_dim <= 128 else 16, 8, 2)
    return Tile(16, 128, 4, 3) if head_dim <= 64 else Tile(16, 64, 4, 3) if head_dim <= 128 else Tile(16, 32, 8, 2)


def _family(target: Target) -> str:
    """Targets that compile to the same kind of matrix instructions: sm_86, sm_89 and sm_120 are like sm_80."""
    return target.name if target.name in ("sm_90", "sm_100", "gfx942") else "sm_80"


def _of_class(table: Mapping[Any, Tile], prefix: tuple[str, ...], head_dim: int) -> Tile:
    """The entry of the smallest class of head dims that holds this one."""
    classes = sorted(key[-1] for key in table if key[:-1] == prefix)
    return table[(*prefix, next((c for c in classes if head_dim <= c), classes[-1]))]
