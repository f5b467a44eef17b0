"""The systems that are named beside the four papers, as `benchmarks.papers` has those; and LeanAttention's decoding."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.case import FORWARD, TRAINING, Case, Sizes, System
from benchmarks.paper import OVER_BEST, Paper, Row, case_of, dense_peers, half

RAGGED = (1024, 1024, 2048, 2048, 4096, 4096, 32768, 65536)
LEAN = {  # LeanAttention's own cases: float16, d 128, 64 heads
    "B1 N131072": (131072,),
    "B3 N{4096, 32768, 65536}": (4096, 32768, 65536),
    "B8 N{1024x2, 2048x2, 4096x2, 32768, 65536}": RAGGED,
}
CONTEXT, SUFFIX = 8192, 128  # keys that samples share, and that each has of its own

_SAMPLES = {"16 samples": 16, "32 samples": 32}
BIFURCATED = Paper(
    "bifurcated attention",
    "Bifurcated attention, arXiv 2403.08845",
    f"decoding, bfloat16, Hq32 Hkv32 d128, {CONTEXT} keys shared by all samples and {SUFFIX} of each",
    "H100, a whole step of a 7B model",
    tuple(_SAMPLES),
    (
        Row("shared context", "shared prefix", printed={"16 samples": "31.7 ms", "32 samples": "31.8 ms"}),
        Row(
            "context repeated, attngen",
            "attngen",
            printed_as="context repeated",
            printed={"16 samples": "109.6 ms", "32 samples": "205.6 ms"},
        ),
        Row("context repeated, SDPA flash", "sdpa-flash"),
        Row("context repeated, SDPA cuDNN", "sdpa-cudnn"),
        Row("shared context, over the best repeated", "shared prefix", what=OVER_BEST),
    ),
    "Printed are steps of a whole model, measured are single calls of attention: compare the ratios, not the times. "
    "`python -m benchmarks.decode` compares 16 samples with 8 kv heads on a CPU.",
)


def bifurcated(sizes: Sizes) -> Iterable[Case]:
    """One query for each sample."""
    context, suffix = (CONTEXT // 16, SUFFIX // 8) if sizes.small else (CONTEXT, SUFFIX)
    system = System("shared prefix", "shared_prefix", (("suffix", suffix),))
    peers, heads, dim = sizes.peers(system.name, *dense_peers(sizes)), *((4, 64) if sizes.small else (32, 128))
    for column, samples in _SAMPLES.items():
        shape = (samples, heads, heads, 1, context + suffix, dim, sizes.dtype)
        yield case_of(BIFURCATED, column, "full", FORWARD, shape, peers, system)


_ACCELERATE = {"8k": 8192, "32k": 32768, "131k": 131072}
ACCELERATE = Paper(
    "SparseAccelerate",
    "SparseAccelerate, arXiv 2412.06198",
    "prefill, causal forward, bfloat16, B1 Hq32 Hkv8 d128; tiles of 64, a budget of 1024 keys a query",
    "time to the first token of a whole model",
    tuple(_ACCELERATE),
    (
        Row("dense", "attngen"),
        Row("SDPA flash", "sdpa-flash"),
        Row("SDPA cuDNN", "sdpa-cudnn"),
        Row("vertical-slash, pattern given", "vertical-slash"),
        Row("adaptive, estimate included", "adaptive"),
        Row("vertical-slash, over the best dense", "vertical-slash", what=OVER_BEST),
        Row("adaptive, over the best dense", "adaptive", what=OVER_BEST),
        Row("over dense attention", printed={"32k": "1.04x"}),
    ),
    "Heads, tiles and budget are this project's choice. On random inputs, so that the estimate finds nothing to prefer; its "
    "cost and the pattern's size do not depend on that.",
)


def accelerate(sizes: Sizes) -> Iterable[Case]:
    """Patterns found at run time."""
    budget = (("budget", 256 if sizes.small else 1024),)
    systems = System("vertical-slash", "vertical_slash", budget), System("adaptive", "adaptive", budget)
    peers = sizes.peers(*(system.name for system in systems), *dense_peers(sizes))
    heads, dim = ((4, 2), 64) if sizes.small else ((32, 8), 128)
    for column in ("32k",) if sizes.small else ("32k", "131k", "8k"):
        n = _ACCELERATE[column] // (16 if sizes.small else 1)
        yield case_of(ACCELERATE, column, "causal", FORWARD, (1, *heads, n, n, dim, sizes.dtype), peers, *systems)


_DEGREES = (16, 64, 256)
_NODES = {"65k": 65536, "262k": 262144}
GRAPH = Paper(
    "graph attention",
    "Graph-processing attention, arXiv 2502.01659",
    "forward, float16, B1 H8 d64; each node sees half of its edges nearby, a quarter dilated by 8, a quarter at random",
    "A100",
    tuple(_NODES),
    (
        Row("dense", "attngen"),
        Row("SDPA flash", "sdpa-flash"),
        *(Row(f"graph, {degree} edges a node", f"graph {degree}") for degree in _DEGREES),
        *(Row(f"graph, {degree} edges, over the best dense", f"graph {degree}", what=OVER_BEST) for degree in _DEGREES),
    ),
    "Sizes are this project's choice. One graph for all heads, in CSR; sorting it is part of a call. The authors print "
    "lengths, not times that can stand here: 160M tokens on one A100, with one head and no backward.",
)


def graph(sizes: Sizes) -> Iterable[Case]:
    """Time against the number of edges."""
    systems = [System(f"graph {d}", "graph", (("degree", d),)) for d in _DEGREES]
    peers = sizes.peers(*(system.name for system in systems), "sdpa-flash")
    heads, dtype = (2, sizes.dtype) if sizes.small else (8, half(sizes))
    for column in ("65k",) if sizes.small else _NODES:
        n = _NODES[column] // (64 if sizes.small else 1)
        yield case_of(GRAPH, column, "full", FORWARD, (1, heads, heads, n, n, 64, dtype), peers, *systems)


_SPARSEK = {"4k": 4096, "8k": 8192, "16k": 16384}
SPARSEK = Paper(
    "SPARSEK",
    "SPARSEK attention, arXiv 2406.16747",
    "forward and backward with the gradient of the scores, causal, bfloat16, B1 H8 d64; k 256, window 256",
    "",
    tuple(_SPARSEK),
    (
        Row("dense", "attngen"),
        Row("SDPA flash", "sdpa-flash"),
        Row("SDPA cuDNN", "sdpa-cudnn"),
        Row("keys chosen once", "sparse_k"),
        Row("keys chosen for every query", "sparse_k incremental"),
        Row("chosen once, over the best dense", "sparse_k", what=OVER_BEST),
        Row("chosen for every query, over the best dense", "sparse_k incremental", what=OVER_BEST),
    ),
    "Sizes are this project's choice; no printed figure stands beside them.",
)


def sparse_k(sizes: Sizes) -> Iterable[Case]:
    """Both forms; the incremental one's thresholds take O(N * chosen) memory, which bounds N here."""
    settings = (("k", 32 if sizes.small else 256), ("window", 32 if sizes.small else 256))
    systems = (
        System("sparse_k", "sparse_k", settings),
        System("sparse_k incremental", "sparse_k", (*settings, ("incremental", True))),
    )
    peers, heads = sizes.peers(*(s.name for s in systems), *dense_peers(sizes)), 2 if sizes.small else 8
    for column in ("8k",) if sizes.small else _SPARSEK:
        n = _SPARSEK[column] // (8 if sizes.small else 1)
        shape = (1, heads, heads, n, n, 64, sizes.dtype)
        yield case_of(SPARSEK, column, "causal", TRAINING, shape, peers, *systems)


# -- decoding ---------------------------------------------------------------------------------------------------------

LEAN_ATTENTION = Paper(
    "LeanAttention",
    "LeanAttention, arXiv 2405.10480",
    "decoding, one query a sequence, float16, H64 d128",
    "",
    tuple(LEAN),
    (
        Row("no split", "attngen-no-split"),
        Row("8 splits", "attngen-split-8"),
        Row("stream-K", "attngen-stream"),
        Row("attngen's choice", "attngen"),
        Row("pages of 16", "attngen-paged"),
        Row("SDPA flash", "sdpa-flash"),
        Row("SDPA efficient", "sdpa-efficient"),
        Row("SDPA cuDNN", "sdpa-cudnn"),
        Row("FlexAttention", "flex"),
        Row("FlashInfer", "flashinfer"),
        Row("cuDNN's flex", "cudnn-flex"),
        Row("attngen's choice, over the best peer", "attngen", what=OVER_BEST),
    ),
    "Printed are averages over other cases only: 2.6x over FlashAttention-2 (up to 8.33x at 512k), 1.7x over a fixed split. "
    "`python -m benchmarks.stream_k` models these cases for an H200.",
)


def lean(sizes: Sizes) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Columns and the lengths of the batch."""
    for column, lengths in LEAN.items():
        yield column, tuple(max(1, n // 64) for n in lengths) if sizes.small else lengths
