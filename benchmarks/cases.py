"""What is measured, as data: the cases of every suite at two sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

FORWARD, BACKWARD, TRAINING = "forward", "backward", "training"
DIRECTIONS = (FORWARD, BACKWARD, TRAINING)  # training: forward and backward together

SDPA = ("sdpa-cudnn", "sdpa-flash", "sdpa-efficient")
CPU_SDPA = ("sdpa-flash", "sdpa-math")
DENSE = ("attngen", *SDPA, "flex", "flashinfer")
# attngen's own schedules, beside the one it chooses. Warps can be specialised only where there is no mask.
HOPPER = ("attngen-tma", "attngen-persistent", "attngen-longest-first")
SPLITS = ("attngen-no-split", "attngen-split-8", "attngen-stream", "attngen-paged")


@dataclass(frozen=True)
class Case:
    """One row of a table. `settings`: what the pattern or the suite's measurement needs besides sizes."""

    suite: str
    pattern: str
    direction: str
    batch: int
    heads_q: int
    heads_kv: int
    n_q: int
    n_k: int
    head_dim: int
    dtype: str
    peers: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...] = ()

    def setting(self, name: str) -> Any:
        """The value of one setting. KeyError if the case has none of that name."""
        return dict(self.settings)[name]

    @property
    def group(self) -> str:
        """The case without batch and length: what belongs into one panel of a chart."""
        heads = f"H{self.heads_q}" if self.heads_q == self.heads_kv else f"Hq{self.heads_q} Hkv{self.heads_kv}"
        return f"{self._title} {self.direction} {heads} D{self.head_dim} {self.dtype}"

    @property
    def id(self) -> str:
        """Names the case within its suite; results are kept and resumed by it."""
        n = f"N{self.n_k}" if self.n_q == self.n_k else f"Nq{self.n_q} Nk{self.n_k}"
        return f"{self.group} B{self.batch} {n}"

    @property
    def _title(self) -> str:
        values = [f"{name}={_short(value)}" for name, value in self.settings]
        return " ".join([self.pattern, *values])


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(f"{value.count(x)}x{x}" if value.count(x) > 1 else str(x) for x in dict.fromkeys(value))
    return str(value)


@dataclass(frozen=True)
class Sizes:
    """How large: `small` is for a CPU and for trying the harness; `full` is for a GPU."""

    small: bool
    cuda: bool

    @property
    def dtype(self) -> str:
        """bfloat16 on a GPU; a CPU's own kernels are float32."""
        return "bfloat16" if self.cuda else "float32"

    def peers(self, *names: str) -> tuple[str, ...]:
        """attngen and those of the names that make sense on the device."""
        if not self.cuda:
            names = tuple(
                dict.fromkeys("sdpa-math" if name in ("sdpa-cudnn", "sdpa-efficient") else name for name in names)
            )
            of_gpu = {"flex-max-autotune", "flashinfer", *HOPPER, "attngen-warp-specialize", *SPLITS} - {
                "attngen-paged"
            }
            names = tuple(name for name in names if name not in of_gpu)
        return ("attngen", *(name for name in names if name != "attngen"))


def dense(sizes: Sizes) -> Iterable[Case]:
    """Full and causal, both directions, three head dims, MHA and GQA, 1k to 32k. B is such that B * N is 16k or more."""
    lengths = (256, 1024) if sizes.small else (2048, 8192, 32768, 1024, 4096, 16384)
    dims = (64,) if sizes.small else (128, 64, 256)
    heads = ((4, 4), (4, 2)) if sizes.small else ((32, 8), (16, 16))
    for (hq, hkv), dim, n, pattern, direction in product(heads, dims, lengths, ("causal", "full"), (FORWARD, BACKWARD)):
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


def windows(sizes: Sizes) -> Iterable[Case]:
    """Sliding windows, causal and two-sided, at growing lengths."""
    shapes = ((1024, 128), (2048, 128)) if sizes.small else ((8192, 1024), (32768, 1024), (32768, 4096), (131072, 4096))
    for (n, width), pattern, direction in product(shapes, ("causal window", "window"), (FORWARD, BACKWARD)):
        if pattern == "window" and n != shapes[0][0]:
            continue
        tuned = ("flex-max-autotune",) if n == shapes[1][0] else ()
        names = ("flex", *tuned, "sdpa-efficient", "flashinfer")
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
            sizes.peers("flex", *tuned, "sdpa-efficient"), (("documents", count),),
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


LEAN = (  # arXiv 2405.10480's own cases: float16, d 128, 64 heads
    (131072,),
    (4096, 32768, 65536),
    (1024, 1024, 2048, 2048, 4096, 4096, 32768, 65536),
)


def decode(sizes: Sizes) -> Iterable[Case]:
    """One query per sequence against its cache: even batches, then ragged ones by a length per sequence."""
    peers = sizes.peers(*SPLITS, *(CPU_SDPA if sizes.small else (*SDPA, "flex", "flashinfer")))
    even = ((1, 1024), (1, 32768), (1, 131072), (1, 524288), (8, 8192), (8, 32768), (8, 131072), (32, 8192), (32, 32768),
            (128, 1024), (128, 4096), (128, 16384))  # fmt: skip
    hq, hkv, dim = (8, 2, 64) if sizes.small else (32, 8, 128)
    for batch, n in ((1, 1024), (4, 2048)) if sizes.small else even:
        yield Case("decode", "full", FORWARD, batch, hq, hkv, 1, n, dim, sizes.dtype, peers)
    for lengths in ((64, 500, 1024),) if sizes.small else LEAN:
        heads, dtype = (8, sizes.dtype) if sizes.small else (64, "float16")
        settings = (("lengths", lengths),)
        yield Case(
            "decode", "lengths", FORWARD, len(lengths), heads, heads, 1, max(lengths), dim, dtype, peers, settings
        )


def seeds(sizes: Sizes) -> Iterable[Case]:
    """SCFA's and HyperAttention's own sizes, and block-sparse FlashAttention; the peers are dense."""
    peers = ("attngen", "attngen-dense", "sdpa-flash") if not sizes.cuda else ("attngen", "attngen-dense", *SDPA[:2])
    dim, dtype = 64, sizes.dtype
    batch, heads = (1, 4) if sizes.small else (4, 48)
    lengths = (2048,) if sizes.small else (8192, 16384, 32768)
    variants = [("qk_sparse", "kept", kept) for kept in (0.7, 0.5, 0.3, 0.2)]
    variants += [("hash_sparse", "buckets", count) for count in (4, 16, 64)]
    for n, (pattern, name, value) in product(lengths, variants):
        if sizes.small and value not in (0.5, 16):
            continue
        shape = (batch, heads, heads, n, n, dim, dtype)
        yield Case("seeds", pattern, TRAINING, *shape, peers, ((name, value),))
    for n, live in product((2048,) if sizes.small else (8192, 32768), (0.25,) if sizes.small else (0.5, 0.25, 0.1)):
        heads = 4 if sizes.small else 16
        yield Case("seeds", "block_sparse", TRAINING, 1, heads, heads, n, n, dim, dtype, peers, (("live", live),))
    for n, direction in product((2048,) if sizes.small else (32768, 131072), (FORWARD, TRAINING)):
        heads = 4 if sizes.small else 32
        settings = (("min_len", 512 if sizes.small else 4096),)
        yield Case("seeds", "hyper", direction, 1, heads, heads, n, n, dim, dtype, peers, settings)


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
    """The suite's cases; `peers`: only these beside attngen, also ones a case would not list for the device."""
    found = list(CASES[suite](sizes))
    if peers is None:
        return found
    wanted = tuple(name for name in peers if name != "attngen")
    return [replace(case, peers=("attngen", *wanted)) for case in found]
