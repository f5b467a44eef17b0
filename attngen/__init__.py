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
    "cross_compile_call": "attngen.inspect.cross",
    "from_flex": "attngen.integrations.flex",
    "tune": "attngen.tuning",
    "merge": "attngen.state.merging",
    "Preparation": "attngen.runtime.preparation",
    "KeySet": "attngen.language.keyset",
    "codebook": "attngen.language.keysets.listed",
    "gather": "attngen.language.keysets.listed",
    "graph": "attngen.language.keysets.listed",
    "paged": "attngen.language.keysets.cached",
    "shared_prefix": "attngen.language.keysets.cached",
    "hash_sparse": "attngen.language.keysets.sorted",
    "hyper": "attngen.language.keysets.sorted",
    "lsh_buckets": "attngen.plan.keysets.permuted",
    "qk_sparse": "attngen.language.keysets.sorted",
    "nn": "attngen.distributed.nn",
    "ring": "attngen.distributed.ring",
    "shard": "attngen.distributed.shards",
    "sparse_k": "attngen.language.keysets.listed",
    "union": "attngen.language.keysets.union",
    "block_sparse": "attngen.language.keysets.tiles",
    "block_cluster": "attngen.language.keysets.tiles",
    "butterfly": "attngen.language.keysets.tiles",
    "big_bird": "attngen.language.keysets.tiles",
    "longformer": "attngen.language.keysets.tiles",
    "a_shape": "attngen.language.keysets.tiles",
    "vertical_slash": "attngen.language.keysets.tiles",
    "adaptive": "attngen.language.keysets.tiles",
    "pruned": "attngen.language.keysets.tiles",
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
