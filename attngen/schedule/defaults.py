"""The model's choice before anything was tuned: tables of tiles that compile without spills and fit, and the CPU's tile."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from sympy.core.relational import Relational

from attngen.analysis import Facts, facts
from attngen.language.call import Call
from attngen.language.expression import FloorDiv, I, J, Load, PyMod, S
from attngen.language.lists import RowLists, TileLists
from attngen.language.schedule import Schedule, Tile
from attngen.language.spec import Spec
from attngen.schedule.shipped import family_of, shipped_tile
from attngen.schedule.target import Target

# A wide head's sums leave few registers for a tile's products, see `Tile`.
_SPARING: dict[str, Any] = {"tma": True, "disable_licm": True}

# float16 and bfloat16: (family, kernel, largest head dim of the class) -> tile. Without spills for head dims 64, 128, 192
# and 256 forward and 64 and 128 backward, on sm_90 192 and 256 backward too, under triton 3.6 and 3.9
# (tests/lowering/test_lowering.py); the other classes were seen with 3.9 only, and above 128 those that aren't 192 or 256 still
# spill in dkv (head dims of several pieces), but not on sm_90. The deeper key blocks of sm_90 and sm_100 don't fit the registers of
# the older ones.
HALF: Mapping[tuple[str, str, int], Tile] = MappingProxyType(
    {
        ("sm_80", "forward", 64): Tile(128, 64, 8, 3),
        ("sm_80", "forward", 128): Tile(128, 32, 8, 3),
        ("sm_80", "forward", 192): Tile(128, 16, 8, 2),
        ("sm_80", "forward", 256): Tile(64, 32, 8, 2),
        ("sm_80", "dq", 112): Tile(128, 32, 8, 2),
        ("sm_80", "dq", 128): Tile(64, 32, 4, 2),
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
        ("sm_90", "dq", 128): Tile(64, 32, 4, 2),
        ("sm_90", "dq", 192): Tile(128, 64, 8, 1, **_SPARING),
        ("sm_90", "dq", 256): Tile(128, 32, 8, 1, **_SPARING),
        ("sm_90", "dkv", 64): Tile(32, 128, 8, 2),
        ("sm_90", "dkv", 128): Tile(16, 128, 8, 2),
        ("sm_90", "dkv", 256): Tile(32, 128, 8, 1, separate_sums=True, **_SPARING),
        ("sm_100", "forward", 64): Tile(128, 32, 8, 3),
        ("sm_100", "forward", 128): Tile(128, 64, 8, 3),
        ("sm_100", "forward", 192): Tile(128, 32, 8, 2),
        ("sm_100", "forward", 256): Tile(64, 32, 8, 2),
        ("sm_100", "dq", 64): Tile(64, 64, 4, 2),
        ("sm_100", "dq", 128): Tile(64, 64, 4, 2),
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
# The same for specs whose pairs need more than logits and two comparisons, which takes registers too: from so many steps on
# (see `steps`), that tile instead. Without spills for every piece of every key set at head dims 64 and 128, under triton 3.6
# and 3.9 (tests/plan/keysets/test_resources.py). Found by search: near the limit a few registers come and go with the form of an
# expression, so that more steps sometimes have the wider tile.
CROWDED: Mapping[tuple[str, str, int], tuple[tuple[int, Tile], ...]] = MappingProxyType(
    {
        ("sm_80", "forward", 64): ((6, Tile(128, 32, 8, 3)),),
        ("sm_80", "forward", 128): ((30, Tile(64, 64, 8, 2)),),
        ("sm_80", "dkv", 64): ((5, Tile(16, 128, 8, 1)),),
        ("sm_80", "dkv", 128): ((4, Tile(32, 32, 8, 2)), (30, Tile(16, 64, 4, 2))),
        ("sm_90", "forward", 64): ((17, Tile(128, 32, 8, 3)),),
        ("sm_90", "forward", 128): ((8, Tile(128, 32, 8, 3)), (30, Tile(128, 64, 8, 3))),
        ("sm_90", "dkv", 64): ((5, Tile(16, 128, 8, 2)), (35, Tile(32, 128, 8, 2))),
        ("sm_90", "dkv", 128): ((4, Tile(32, 32, 8, 2)), (30, Tile(16, 128, 8, 2))),
        ("sm_100", "forward", 128): (
            (3, Tile(128, 32, 8, 3)),
            (4, Tile(128, 64, 8, 3)),
            (6, Tile(128, 32, 8, 3)),
            (30, Tile(128, 64, 8, 3)),
        ),
        ("sm_100", "dq", 128): ((11, Tile(64, 32, 8, 2)), (28, Tile(64, 64, 8, 2))),
        ("sm_100", "dkv", 64): (
            (4, Tile(32, 128, 8, 1)),
            (8, Tile(32, 64, 8, 1)),
            (9, Tile(32, 128, 8, 1)),
            (13, Tile(32, 128, 8, 2)),
            (14, Tile(32, 128, 8, 1)),
            (30, Tile(64, 128, 8, 1)),
        ),
        ("sm_100", "dkv", 128): (
            (3, Tile(32, 64, 8, 2)),
            (4, Tile(32, 64, 8, 1)),
            (11, Tile(32, 64, 8, 2)),
            (17, Tile(16, 128, 8, 1)),
            (30, Tile(32, 128, 8, 1)),
            (34, Tile(16, 128, 8, 1)),
            (35, Tile(16, 128, 8, 2)),
        ),
    }
)
# The same for logits that keep their natural unit (`Facts.natural`), where pairs are not listed one by one. Without spills for
# biases, ALiBi and large constants with their gradients at head dims 64 and 128, under triton 3.6 and 3.9 (tests/schedule/test_natural.py).
NATURAL: Mapping[tuple[str, str, int], tuple[tuple[int, Tile], ...]] = MappingProxyType(
    {
        ("sm_80", "forward", 128): ((0, Tile(64, 64, 8, 3)),),
        ("sm_80", "dq", 128): ((0, Tile(64, 32, 8, 2)),),
        ("sm_80", "dkv", 64): ((0, Tile(16, 128, 8, 1)), (28, Tile(16, 64, 4, 1))),
        ("sm_90", "forward", 128): ((0, Tile(128, 32, 8, 3)),),
        ("sm_90", "dq", 64): ((0, Tile(64, 32, 4, 1)),),
        ("sm_90", "dq", 128): ((0, Tile(64, 32, 4, 2)),),
        ("sm_90", "dq", 192): ((0, Tile(128, 32, 8, 1, **_SPARING)),),
        ("sm_90", "dkv", 64): ((0, Tile(16, 128, 8, 2)),),
        ("sm_90", "dkv", 128): ((0, Tile(32, 32, 8, 2)),),
        ("sm_100", "forward", 128): ((0, Tile(128, 32, 8, 2)),),
        ("sm_100", "dq", 64): ((0, Tile(64, 32, 8, 1)),),
        ("sm_100", "dq", 128): ((0, Tile(64, 64, 8, 2)),),
        ("sm_100", "dkv", 64): ((0, Tile(32, 64, 8, 1)),),
        ("sm_100", "dkv", 128): ((0, Tile(16, 64, 4, 1)), (8, Tile(64, 32, 8, 1))),
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

# On a CPU: the logits of such a tile stay in a core's second-level cache.
CPU_ROWS, CPU_CHUNK = 128, 1024


def default_on_cpu(call: Call, known: Facts) -> Schedule:
    """Query rows per head and keys per chunk of the CPU backend's forward, and of its one backward pass (`dq`)."""
    # Closed forms cost nothing to find, so that short tiles waste least; where data decides, each tile has to be looked at.
    most = CPU_ROWS if not known.spec.tensors else 2 * CPU_ROWS
    rows = min(max(32, most // _power_of_two(call.group)), max(32, _power_of_two(call.q.shape[2])))
    tile = Tile(block_m=rows, block_n=CPU_CHUNK)
    return Schedule(forward=tile, dq=tile)


def default_tile(spec: Spec, target: Target, kernel: str, head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile of "forward", "dq" or "dkv" for the larger of the two head dims."""
    if dtype in (torch.float32, torch.float64):
        return SINGLE[_class_of(SINGLE, "gfx942" if target.name == "gfx942" else "sm", kernel, head_dim)]
    found = shipped_tile(spec, family_of(target.name), kernel, head_dim)
    if found is not None:
        return found
    entry = _class_of(HALF, family_of(target.name), kernel, head_dim)
    tile = HALF[entry]
    natural = entry in NATURAL and facts(spec).natural and not isinstance(spec.lists, RowLists)
    for least, other in (NATURAL if natural else CROWDED).get(entry, ()):
        tile = other if steps(spec) >= least else tile
    return tile


def default_order(known: Facts, kernel: str, schedule: Schedule) -> str:
    """Of a kernel's outputs. Where tiles at one end have most to visit the longest come first, so that the last that run are short.
    By head where that says nothing, where a split forward shares out the tiles itself, and where dq adds up a bias's gradient
    over the batch. schedule: what is decided.
    """
    if known.spec.lists is not None or not known.walk_of(kernel).uneven:
        return "by_head"
    if kernel == "forward" and schedule.split not in (None, 1):
        return "by_head"
    if kernel == "dq":
        sites = (
            site for name in known.load_grads for site in known.sites_of(name, schedule.deterministic is not False)
        )
        if any(site.over_batches for site in sites):
            return "by_head"
    return "longest_first"


def steps(spec: Spec) -> int:
    """How much a pair takes besides its logit: comparisons of the mask, more for what it loads or divides and where only loaded
    values are compared; what is loaded in full tiles too; a seed on the device; lists, of tiles a little, of single keys most of
    all, and weights.
    """
    compared = spec.mask.atoms(Relational)
    found = len(compared) + 3 * len(spec.mask.atoms(Load)) + 2 * len(spec.mask.atoms(FloorDiv, PyMod))
    found += 2 * bool(compared and not any({I, J} & _outside_loads(part) for part in compared))
    score = spec.score.atoms(Relational), spec.score.atoms(Load), spec.score.atoms(FloorDiv, PyMod)
    found += sum(weight * len(part) for weight, part in zip((1, 3, 2), score, strict=True))
    found += 4 * ("seed" in spec.tensors)  # its hash
    if isinstance(spec.lists, RowLists):
        return found + 30 + 4 * spec.lists.weighted
    return found + 2 * isinstance(spec.lists, TileLists)


def _outside_loads(part: Any) -> set[Any]:
    """The symbols of a comparison that are not only indices of loads."""
    return set(part.xreplace(dict.fromkeys(part.atoms(Load), S)).free_symbols)


def _class_of(table: Mapping[Any, Tile], family: str, kernel: str, head_dim: int) -> tuple[str, str, int]:
    """The key of the smallest class of head dims that holds this one."""
    classes = sorted(key[2] for key in table if key[:2] == (family, kernel))
    return family, kernel, next((c for c in classes if head_dim <= c), classes[-1])


def _power_of_two(size: int) -> int:
    """The least one that is not below."""
    return 1 << max(0, size - 1).bit_length()
