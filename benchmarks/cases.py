"""What is measured, as data: the cases of every suite at two sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from benchmarks.case import BACKWARD, CPU_SDPA, DENSE, FORWARD, HOPPER, SDPA, SPLITS, TRAINING, Case, Sizes
from benchmarks.papers import seeds
from benchmarks.papers_beside import LEAN_ATTENTION, lean


def dense(sizes: Sizes) -> Iterable[Case]:
    """Full and causal, both directions, three head dims, MHA and GQA, 1k to 32k. B is such that B * N is 16k or more.

    The first of each stand together at the front, so that a run that ends early has something of everything; what
    compiles longest, with max-autotune, comes after these.
    """
    lengths = (256, 1024) if sizes.small else (2048, 32768, 8192, 4096, 16384, 1024)
    dims = (64,) if sizes.small else (128, 64, 256)
    heads = ((4, 4), (4, 2)) if sizes.small else ((32, 8), (16, 16))
    for ((hq, hkv), dim, n, pattern), direction in product(
        outwards(heads, dims, lengths, ("causal", "full")), (FORWARD, BACKWARD)
    ):
        names: tuple[str, ...] = DENSE
        if sizes.small and (pattern, hq == hkv, n) != ("causal", True, 1024):
            names = CPU_SDPA  # compiling FlexAttention takes far longer than these runs
        if not sizes.small:
            if dim != 128 and n not in (2048, 8192, 32768):
                continue
            if n == 8192 and dim == 128:
                names = (*names, "flex-max-autotune")
            if direction == FORWARD and n >= 8192 and dim <= 128:
                names = (*names, *HOPPER, *(("attngen-warp-specialize",) if pattern == "full" else ()))
        batch = 1 if sizes.small else max(1, 16384 // n)
        yield Case("dense", pattern, direction, batch, hq, hkv, n, n, dim, sizes.dtype, sizes.peers(*names))


def outwards(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """All combinations: the first of every axis, then those a step away from it, then those two steps away."""
    places = sorted(product(*(range(len(axis)) for axis in axes)), key=sum)
    return [tuple(axis[place] for axis, place in zip(axes, found, strict=True)) for found in places]


def windows(sizes: Sizes) -> Iterable[Case]:
    """Sliding windows, causal and two-sided, at growing lengths."""
    shapes = ((1024, 128), (2048, 128)) if sizes.small else ((8192, 1024), (32768, 1024), (32768, 4096), (131072, 4096))
    for (n, width), pattern, direction in product(shapes, ("causal window", "window"), (FORWARD, BACKWARD)):
        if pattern == "window" and n != shapes[0][0]:
            continue
        tuned = ("flex-max-autotune",) if n == shapes[1][0] else ()
        names = ("flex", *tuned, "sdpa-efficient", "flashinfer", "cudnn-flex")
        hq, hkv = (4, 4) if sizes.small else (32, 8)
        yield Case(
            "windows", pattern, direction, 1, hq, hkv, n, n, 64 if sizes.small else 128, sizes.dtype,
            sizes.peers(*names), (("width", width),),
        )  # fmt: skip


def documents(sizes: Sizes) -> Iterable[Case]:
    """Packed documents of random lengths, causal inside each."""
    shapes = ((1024, 8),) if sizes.small else ((8192, 12), (32768, 12), (32768, 64), (131072, 64))
    for (n, count), direction in product(shapes, (FORWARD, BACKWARD)):
        tuned = ("flex-max-autotune",) if (n, count) == (32768, 64) else ()
        hq, hkv = (4, 4) if sizes.small else (32, 8)
        yield Case(
            "documents", "causal documents", direction, 1, hq, hkv, n, n, 64 if sizes.small else 128, sizes.dtype,
            sizes.peers("flex", *tuned, "sdpa-efficient", "cudnn-flex"), (("documents", count),),
        )  # fmt: skip


def scores(sizes: Sizes) -> Iterable[Case]:
    """Causal attention with a changed score: soft-cap, ALiBi, a learned bias [H, N, N]."""
    lengths = (512,) if sizes.small else (8192, 2048)
    for n, pattern, direction in product(lengths, ("soft cap", "alibi", "learned bias"), (FORWARD, BACKWARD)):
        n = min(n, 4096) if pattern == "learned bias" else n  # a bias [16, 8192, 8192] is 2 GiB, and so is its gradient
        tuned = ("flex-max-autotune",) if n > 2048 else ()
        heads = 4 if sizes.small else 16
        yield Case(
            "scores", pattern, direction, 1, heads, heads, n, n, 64 if sizes.small else 128, sizes.dtype,
            sizes.peers("flex", *tuned, "sdpa-efficient"),
        )  # fmt: skip


def decode(sizes: Sizes) -> Iterable[Case]:
    """One query per sequence against its cache: even batches, then ragged ones by a length per sequence."""
    peers = sizes.peers(*SPLITS, *(CPU_SDPA if sizes.small else (*SDPA, "flex", "flashinfer", "cudnn-flex")))
    even = ((1, 1024), (1, 32768), (1, 131072), (1, 524288), (8, 8192), (8, 32768), (8, 131072), (32, 8192), (32, 32768),
            (128, 1024), (128, 4096), (128, 16384))  # fmt: skip
    hq, hkv, dim = (8, 2, 64) if sizes.small else (32, 8, 128)
    for batch, n in ((1, 1024), (4, 2048)) if sizes.small else even:
        yield Case("decode", "full", FORWARD, batch, hq, hkv, 1, n, dim, sizes.dtype, peers)
    for column, lengths in lean(sizes):
        heads, dtype = (8, sizes.dtype) if sizes.small else (64, "float16")
        shape = (len(lengths), heads, heads, 1, max(lengths), dim, dtype)
        yield Case(
            "decode", "lengths", FORWARD, *shape, peers, (("lengths", lengths),), table=LEAN_ATTENTION.name,
            column=column,
        )  # fmt: skip


def planning(sizes: Sizes) -> Iterable[Case]:
    """Finding which tiles are live, before any attention: time and peak memory."""
    n = 8192 if sizes.small else 131072
    peers = ("attngen", "create_block_mask", "create_block_mask-compiled", "dense-mask")
    for pattern, settings in (
        ("causal window", (("width", 512 if sizes.small else 4096),)),
        ("causal documents", (("documents", 64),)),
    ):
        yield Case("planning", pattern, "plan", 1, 1, 1, n, n, 64, sizes.dtype, peers, settings)


def first_call(sizes: Sizes) -> Iterable[Case]:
    """In a new process with empty caches: import, compile to first result, cross-compiling for an H200."""
    n = 1024 if sizes.small else 8192
    settings = (("width", 128 if sizes.small else 1024),)
    shape = (1, 4, 4, n, n, 64, sizes.dtype)
    yield Case("first_call", "causal window", "import", *shape, ("attngen",), settings)
    yield Case("first_call", "causal window", FORWARD, *shape, ("attngen", "flex"), settings)
    yield Case(
        "first_call", "causal window", TRAINING, *shape, sizes.peers("flex") if sizes.cuda else ("attngen",), settings
    )
    for pattern, given in (("causal", ()), ("causal documents", (("documents", 64),))):
        yield Case("first_call", pattern, "cross-compile", *shape, ("attngen",), given)


def overhead(sizes: Sizes) -> Iterable[Case]:
    """Calls so small that only the host's work counts."""
    for pattern, settings in (("causal", ()), ("causal documents", (("documents", 2),))):
        names = ("sdpa", "flex") if pattern == "causal" else ("flex",)
        for direction in (FORWARD, TRAINING):
            yield Case(
                "overhead", pattern, direction, 1, 1, 1, 32, 32, 64, sizes.dtype, sizes.peers(*names), settings
            )  # fmt: skip


CASES: dict[str, Callable[[Sizes], Iterable[Case]]] = {
    "dense": dense,
    "windows": windows,
    "documents": documents,
    "scores": scores,
    "decode": decode,
    "seeds": seeds,
    "planning": planning,
    "first_call": first_call,
    "overhead": overhead,
}


def cases_of(suite: str, sizes: Sizes, peers: Iterable[str] | None = None) -> list[Case]:
    """The suite's cases; `peers`: only these beside attngen and the sparse systems, also ones a case would not list for the device."""
    found = list(CASES[suite](sizes))
    if peers is None:
        return found
    wanted = tuple(name for name in peers if name != "attngen")
    return [replace(case, peers=("attngen", *(s.name for s in case.systems), *wanted)) for case in found]
