"""The papers of the systems that attngen expresses, as data: their workloads as cases, and the tables that they print.

A case stands for one column of a table (and one part of it, where a table has several); its records are the rows. At small
sizes the shapes are others, the columns keep the paper's names, and the tables say what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.case import FORWARD, TRAINING, Case, Sizes, System
from benchmarks.paper import OVER_BEST, OVER_DENSE, PEAK, TIME, Paper, Row, case_of, dense_peers, figures_of, half
from benchmarks.papers_beside import (
    ACCELERATE,
    BIFURCATED,
    GRAPH,
    LEAN_ATTENTION,
    SPARSEK,
    accelerate,
    bifurcated,
    graph,
    sparse_k,
)

# -- FlashAttention ---------------------------------------------------------------------------------------------------

_FLASH = {"1k": 128, "2k": 256, "4k": 512, "16k": 1024, "64k": 2048}  # the small sizes
_FLASH_ROWS = (
    ("dense", "attngen", "2.29 ms/7.64 ms/30.09 ms/470.5 ms/7493 ms"),
    ("block-sparse, butterfly", "butterfly", "0.88 ms/1.71 ms/3.21 ms/12.6 ms/50.4 ms"),
    ("standard PyTorch", "sdpa-math", "3.67 ms/13.2 ms/50.4 ms/out of memory"),
    ("SDPA flash", "sdpa-flash", ""),
    ("SDPA cuDNN", "sdpa-cudnn", ""),
)
FLASH = Paper(
    "FlashAttention",
    "FlashAttention, arXiv 2205.14135",
    "forward and backward, not causal, float16, B16 H8 d64",
    "A100-40GB",
    tuple(_FLASH),
    (
        *(Row(label, peer, printed=figures_of(_FLASH, figures)) for label, peer, figures in _FLASH_ROWS),
        Row("memory, dense", "attngen", what=PEAK, printed={"4k": "836 MB"}),
        Row("memory, block-sparse", "butterfly", what=PEAK),
        Row("memory, standard PyTorch", "sdpa-math", what=PEAK, printed={"4k": "17,024 MB"}),
    ),
    "Block-sparse: `ag.butterfly` with tiles of 128 and all its levels; the authors' grid may differ. Memory is what a call "
    "takes at its peak beyond q, k, v and the gradient of out; the authors do not say what theirs counts.",
)


def flash(sizes: Sizes) -> Iterable[Case]:
    """Dense and butterfly; unfused attention as far as its matrix fits."""
    butterfly = System("butterfly", "butterfly")
    peers = sizes.peers(butterfly.name, "sdpa-flash", "sdpa-cudnn", "sdpa-math")
    batch, heads, dtype = (1, 4, sizes.dtype) if sizes.small else (16, 8, half(sizes))
    for column, small in _FLASH.items():
        n = small if sizes.small else 1024 * int(column[:-1])
        yield case_of(FLASH, column, "full", TRAINING, (batch, heads, heads, n, n, 64, dtype), peers, butterfly)


# -- SCFA -------------------------------------------------------------------------------------------------------------

_BUCKETS, _DROPPED = (4, 8, 16, 32, 64), (30, 50, 70, 80)
_SCFA = {"8k": 512, "16k": 1024, "32k": 2048}
_SCFA_PRINTED = {4: 690, 8: 480, 16: 373, 32: 318, 64: 290, 30: 755, 50: 403, 70: 163, 80: 85}
SCFA = Paper(
    "SCFA",
    "Sparse causal flash attention, arXiv 2306.01160",
    "forward and backward, causal, bfloat16, B4 H48 d64; sort, gather and scatter included",
    "A100-40GB",
    tuple(_SCFA),
    (
        Row("dense", "attngen", printed={"32k": "about 1008 ms"}),
        Row("SDPA flash", "sdpa-flash"),
        Row("SDPA cuDNN", "sdpa-cudnn"),
        *(Row(f"hash, nb {n}", f"hash nb={n}", printed={"32k": f"{_SCFA_PRINTED[n]} ms"}) for n in _BUCKETS),
        Row("hash, nb 16, hashing too", "hash nb=16 hashing"),
        *(Row(f"QK, drop {n}%", f"drop {n}%", printed={"32k": f"{_SCFA_PRINTED[n]} ms"}) for n in _DROPPED),
        Row("hash, nb 16, over the best dense", "hash nb=16", what=OVER_BEST),
        Row("training step", printed={"8k": "2.0x", "16k": "3.3x"}),
    ),
    "Making buckets (`ag.lsh_buckets`) is timed only where the row says so; the masks of what to keep are given. The authors' "
    "2.0x and 3.3x are of a model's training, not of attention alone.",
)


def scfa(sizes: Sizes) -> Iterable[Case]:
    """Hashing and dropping, all of one length in the same turns."""
    systems = [System(f"hash nb={n}", "hash_sparse", (("buckets", n),)) for n in _BUCKETS]
    systems.append(System("hash nb=16 hashing", "hash_sparse_hashing", (("buckets", 16),)))
    systems += [System(f"drop {n}%", "qk_sparse", (("dropped", n),)) for n in _DROPPED]
    peers = sizes.peers(*(system.name for system in systems), *dense_peers(sizes))
    batch, heads = (1, 4) if sizes.small else (4, 48)
    for column in reversed(_SCFA):
        n = _SCFA[column] if sizes.small else 1024 * int(column[:-1])
        yield case_of(SCFA, column, "causal", TRAINING, (batch, heads, heads, n, n, 64, sizes.dtype), peers, *systems)


# -- HyperAttention ---------------------------------------------------------------------------------------------------

_HYPER = {"4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768, "65k": 65536, "131k": 131072}
_PARTS = tuple((pattern, direction) for pattern in ("causal", "full") for direction in (TRAINING, FORWARD))
_WORDS = {"causal": "causal", "full": "not causal", TRAINING: "forward and backward", FORWARD: "forward"}
HYPER = Paper(
    "HyperAttention",
    "HyperAttention, arXiv 2310.05869",
    "bfloat16, B1 H32 d64; block and samples 256, exact below 4096",
    "",
    tuple(_HYPER),
    (
        *(
            Row(f"{_WORDS[pattern]}, {_WORDS[direction]}, {what}", "hyper", f"{pattern} {direction}", what)
            for pattern, direction in _PARTS
            for what in (TIME, OVER_DENSE, OVER_BEST)
        ),
        Row("causal, one layer, over FlashAttention", printed={"131k": "5x"}),
    ),
    "Times count hashing, sorting, sampling and merging. A causal call below 2 * 4096 is exact. The authors' baseline was "
    "about 2x slower than FlashAttention-2; ChatGLM2 at 32k: 50% faster inference (printed).",
)


def hyper(sizes: Sizes) -> Iterable[Case]:
    """Causal or not, with and without the backward, the longest first."""
    limits = (64, 32, 256) if sizes.small else (256, 256, 4096)
    system = System("hyper", "hyper", tuple(zip(("block", "samples", "min_len"), limits, strict=True)))
    peers, heads = sizes.peers(system.name, *dense_peers(sizes)), 4 if sizes.small else 32
    for column in ("16k", "8k") if sizes.small else ("131k", "32k", "65k", "16k", "8k", "4k"):
        n = _HYPER[column] // (8 if sizes.small else 1)
        for pattern, direction in _PARTS:
            yield case_of(HYPER, column, pattern, direction, (1, heads, heads, n, n, 64, sizes.dtype), peers, system)


PAPERS = (SCFA, FLASH, HYPER, BIFURCATED, ACCELERATE, GRAPH, SPARSEK, LEAN_ATTENTION)


def seeds(sizes: Sizes) -> Iterable[Case]:
    """Every paper's workload but LeanAttention's, which is among the suite of decoding; the most important first."""
    for cases in (scfa, flash, bifurcated, hyper, accelerate, graph, sparse_k):
        yield from cases(sizes)
