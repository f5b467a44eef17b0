"""attngen: describe an attention, get a fused, differentiable, tuned kernel for it.

import attngen as ag
attn = ag.compile(ag.Spec(mask=ag.causal() & ag.window(1024)))
out = attn(q, k, v)
"""

from __future__ import annotations

from typing import Any

from attngen.errors import (
    AttngenError,
    AttngenWarning,
    GroupError,
    InputError,
    PackError,
    ScheduleError,
    SpecError,
    StoreError,
)
from attngen.expression import (
    Expr,
    Param,
    Tensor,
    absolute,
    exp,
    log,
    maximum,
    minimum,
    sigmoid,
    sqrt,
    tanh,
    where,
)
from attngen.patterns import (
    alibi,
    alibi_slopes,
    bias,
    block_causal,
    causal,
    dilated_window,
    document_ids,
    documents,
    global_tokens,
    neighborhood_2d,
    prefix_lm,
    sink,
    soft_cap,
    t5_bias,
    tree,
    window,
)
from attngen.schedule import Schedule
from attngen.spec import Spec

__version__ = "0.1.0"

# Heavier stages load when they are first used, so that `import attngen` stays cheap.
_LAZY = {
    "compile": "attngen.runtime",
    "CompiledAttention": "attngen.runtime",
    "oracle": "attngen.reference",
    "tile_map": "attngen.analysis",
    "facts": "attngen.analysis",
    "cross_compile": "attngen.cross",
    "tune": "attngen.tuning",
    "merge": "attngen.merging",
    "KeyPlan": "attngen.keys",
    "KeySet": "attngen.keys",
    "codebook": "attngen.keys.listed",
    "gather": "attngen.keys.listed",
    "graph": "attngen.keys.graph",
    "paged": "attngen.keys.paged",
    "shared_prefix": "attngen.keys.prefix",
    "hash_sparse": "attngen.keys.permuted",
    "hyper": "attngen.keys.hyper",
    "lsh_buckets": "attngen.keys.permuted",
    "qk_sparse": "attngen.keys.permuted",
    "ring": "attngen.parallel",
    "shard": "attngen.shards",
    "sparse_k": "attngen.keys.sparse_k",
    "union": "attngen.keys.union",
    "block_sparse": "attngen.keys.tiles",
    "block_cluster": "attngen.keys.tiles",
    "butterfly": "attngen.keys.layouts",
    "big_bird": "attngen.keys.layouts",
    "longformer": "attngen.keys.shapes",
    "a_shape": "attngen.keys.shapes",
    "vertical_slash": "attngen.keys.slashes",
    "adaptive": "attngen.keys.slashes",
    "pruned": "attngen.keys.pruned",
    "estimate": "attngen.keys.estimate",
    "Estimate": "attngen.keys.estimate",
    "unshard": "attngen.shards",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'attngen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


__all__ = [
    "AttngenError",
    "AttngenWarning",
    "Expr",
    "GroupError",
    "InputError",
    "PackError",
    "Param",
    "Schedule",
    "ScheduleError",
    "Spec",
    "SpecError",
    "StoreError",
    "Tensor",
    "absolute",
    "alibi",
    "alibi_slopes",
    "bias",
    "block_causal",
    "causal",
    "dilated_window",
    "document_ids",
    "documents",
    "exp",
    "global_tokens",
    "log",
    "maximum",
    "minimum",
    "neighborhood_2d",
    "prefix_lm",
    "sigmoid",
    "sink",
    "soft_cap",
    "sqrt",
    "t5_bias",
    "tanh",
    "tree",
    "where",
    "window",
    *_LAZY,
]
