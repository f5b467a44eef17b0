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
from attngen.language.expression import (
    Expr,
    Param,
    Tensor,
    absolute,
    ceil,
    clamp,
    cos,
    erf,
    exp,
    exp2,
    floor,
    log,
    maximum,
    minimum,
    relu,
    round,
    sigmoid,
    sin,
    sqrt,
    tanh,
    where,
)
from attngen.language.patterns import (
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
    row,
    sink,
    soft_cap,
    t5_bias,
    tree,
    window,
)
from attngen.language.schedule import Schedule, Tile
from attngen.language.spec import Spec

__version__ = "0.1.0"

# Heavier stages load when they are first used, so that `import attngen` stays cheap.
_LAZY = {
    "compile": "attngen.runtime.attention",
    "CompiledAttention": "attngen.runtime.attention",
    "oracle": "attngen.reference.oracle",
    "tile_map": "attngen.analysis",
    "facts": "attngen.analysis",
    "cross_compile": "attngen.inspect.cross",
    "tune": "attngen.tuning",
    "merge": "attngen.state.merging",
    "KeyPlan": "attngen.plan.keysets",
    "KeySet": "attngen.plan.keysets",
    "codebook": "attngen.plan.keysets.listed",
    "gather": "attngen.plan.keysets.listed",
    "graph": "attngen.plan.keysets.graph",
    "paged": "attngen.plan.keysets.paged",
    "shared_prefix": "attngen.plan.keysets.prefix",
    "hash_sparse": "attngen.plan.keysets.permuted",
    "hyper": "attngen.plan.keysets.hyper",
    "lsh_buckets": "attngen.plan.keysets.permuted",
    "qk_sparse": "attngen.plan.keysets.permuted",
    "nn": "attngen.distributed.nn",
    "ring": "attngen.distributed.ring",
    "shard": "attngen.distributed.shards",
    "sparse_k": "attngen.plan.keysets.sparse_k",
    "union": "attngen.plan.keysets.union",
    "block_sparse": "attngen.plan.keysets.tiles",
    "block_cluster": "attngen.plan.keysets.tiles",
    "butterfly": "attngen.plan.keysets.layouts",
    "big_bird": "attngen.plan.keysets.layouts",
    "longformer": "attngen.plan.keysets.shapes",
    "a_shape": "attngen.plan.keysets.shapes",
    "vertical_slash": "attngen.plan.keysets.slashes",
    "adaptive": "attngen.plan.keysets.slashes",
    "pruned": "attngen.plan.keysets.pruned",
    "estimate": "attngen.plan.keysets.estimate",
    "Estimate": "attngen.plan.keysets.estimate",
    "unshard": "attngen.distributed.shards",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        module = importlib.import_module(_LAZY[name])
        value = module if name == "nn" else getattr(module, name)
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
    "Tile",
    "absolute",
    "alibi",
    "alibi_slopes",
    "bias",
    "block_causal",
    "causal",
    "ceil",
    "clamp",
    "cos",
    "dilated_window",
    "document_ids",
    "documents",
    "erf",
    "exp",
    "exp2",
    "floor",
    "global_tokens",
    "log",
    "maximum",
    "minimum",
    "neighborhood_2d",
    "prefix_lm",
    "relu",
    "round",
    "row",
    "sigmoid",
    "sin",
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
