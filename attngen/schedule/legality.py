"""What a schedule may say, for a spec, a target and a backend: one function each, that gives the reason why not.

A reason is empty if the form is legal. `check` and `check_targeted` turn reasons into errors; the tuner leaves out what has one.
"""

from __future__ import annotations

from attngen.analysis import Facts
from attngen.errors import ScheduleError
from attngen.language.call import Call
from attngen.language.expression import H, J, S, loads
from attngen.language.lists import RowLists
from attngen.language.schedule import KERNELS, Schedule, Tile
from attngen.language.spec import Spec
from attngen.schedule.target import Target

WIDE = 128  # from this head dim on a kernel's sums leave few registers
WIDEST = 256  # rows or keys of a tile on a GPU
MOST_STORED = 2048  # keys: their weights for a tile of queries are one piece of work


def why_not_targeted(kernel: str, tile: Tile, target: Target) -> str:
    """The reason why a kernel cannot have this tile on a target, decided only in part or whole."""
    for name in ("block_m", "block_n"):
        if (getattr(tile, name) or 0) > WIDEST:
            return f"{name}: at most {WIDEST} on a GPU, got {getattr(tile, name)}"
    if tile.tma and not target.has_descriptors:
        return f"tma: {target.name} has no tensor descriptors (sm_90 and above have)"
    if tile.separate_sums and kernel != "dkv":
        return "separate_sums: a key tile alone has two sums; it goes with dkv"
    if not tile.warp_specialize:
        return ""
    if kernel != "forward":
        return (
            "warp_specialize: the compiler takes the forward only; the backward's loops load lse and delta by pointers"
        )
    if not tile.tma:
        return "warp_specialize: needs tma=True, since a warp that only loads cannot compute pointers"
    if target.name == "sm_90" and tile.num_warps != 4:
        return (
            f"warp_specialize: on sm_90 it takes num_warps=4, got {tile.num_warps}: the compiler ignores it with others"
        )
    return ""


def why_not_packed(spec: Spec, facts: Facts) -> str:
    """The reason why the heads of a group cannot share a tile's walk."""
    if spec.lists is not None:
        return "its lists say which keys a head sees"
    if H in spec.mask.free_symbols:
        return "the mask depends on h, and packed heads walk the same keys"
    if facts.walk_keys.needs_tables:
        return "the mask's walk reads captured data in tables of whole query tiles"
    return ""


def why_not_specialised(spec: Spec) -> str:
    """The reason why a forward cannot go through the one loop of specialised warps."""
    if spec.mask != True or spec.lists is not None or spec.page_size is not None:  # noqa: E712  a sympy condition
        return (
            "with a mask: Triton compiles no sum behind the loop of specialised warps, so that nobody would notice a value "
            "that is masked out and not finite"
        )
    if spec.dropout is not None or any(J in load.free_symbols for load in loads(spec.score)):
        return "with dropout, or with captured data that depends on j: the loop may hold no pointers"
    return ""


def why_not_split(split: int | str | None, persistent: int | None, order: str | None) -> str:
    """The reason why a forward cannot be split beside these forms of its tile."""
    if split not in (None, 1) and (persistent or order == "longest_first"):
        return "goes with persistent=0 and order='by_head', since it shares out the tiles itself"
    return ""


def why_not_stored(call: Call, backend: str) -> str:
    """The reason why the weights cannot be kept for the backward, or should not."""
    spec = call.spec
    if backend != "cpu":
        return (
            "on a GPU: a weight written once and read by both passes is at least 6 bytes, for which memory takes longer than "
            "the matrix units for two products of any head dim up to 256 (modelled for an H200: 4 times as long at 64)"
        )
    if spec.score != S or spec.dropout is not None or spec.lists is not None or spec.page_size is not None:
        return "with a score, dropout, lists or pages: their derivatives need the logits too"
    if call.n_k > MOST_STORED:
        return f"for more than {MOST_STORED} keys: memory would grow with the square of the length"
    return ""


def why_not_listed(name: str, block: int | None, listed: int) -> str:
    """The reason why a block cannot walk listed tiles of that size; a block that is not decided can."""
    return f"{name}: expected a divisor of the listed tiles' {listed}, got {block}" if block and listed % block else ""


def check(spec: Spec, facts: Facts, schedule: Schedule) -> None:
    """ScheduleError for pack, split, programs or warp_specialize where they make no sense for the spec."""
    forward = schedule.forward
    if forward.warp_specialize and (reason := why_not_specialised(spec)):
        raise ScheduleError(f"warp_specialize: expected False {reason}")
    if reason := why_not_split(schedule.split, forward.persistent, forward.order):
        raise ScheduleError(f"split: {reason}")
    if schedule.pack and not isinstance(spec.lists, RowLists) and (reason := why_not_packed(spec, facts)):
        raise ScheduleError(f"pack: expected False, since {reason}")
    if schedule.programs is not None and schedule.split != "stream":
        raise ScheduleError(f"programs: goes with split='stream', got split={schedule.split!r}")


def check_targeted(schedule: Schedule, target: Target) -> None:
    """ScheduleError for a kernel's tile that the target cannot have."""
    for kernel in KERNELS:
        if reason := why_not_targeted(kernel, getattr(schedule, kernel), target):
            raise ScheduleError(f"{kernel} {reason}")


def registers_held(
    kernel: str, block_m: int, block_n: int, threads: int, head_dim: int, head_dim_v: int, separate_sums: bool = False
) -> int:
    """Registers a thread for the float32 values that live across a kernel's loop and for the products of one step."""
    pairs = block_m * block_n
    sums = max(head_dim, head_dim_v) if separate_sums else head_dim + head_dim_v
    values = {
        "forward": block_m * head_dim_v + pairs,
        "dq": block_m * head_dim + 2 * pairs,
        "dkv": block_n * sums + 2 * pairs,
    }
    return -(-values[kernel] // threads)
