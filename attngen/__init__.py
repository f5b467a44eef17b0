"""attngen: describe an attention, get a fused, differentiable, tuned kernel for it.

import attngen as ag
attn = ag.compile(ag.Spec(mask=ag.causal() & ag.window(1024)))
out = attn(q, k, v)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
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

# All but errors loads when it is first used, so that `import attngen` stays cheap, and a pack needs no compiler.
_LAZY = {
    "Expr": "attngen.language.expression",
    "Param": "attngen.language.expression",
    "Tensor": "attngen.language.expression",
    "absolute": "attngen.language.expression",
    "ceil": "attngen.language.expression",
    "clamp": "attngen.language.expression",
    "cos": "attngen.language.expression",
    "erf": "attngen.language.expression",
    "exp": "attngen.language.expression",
    "exp2": "attngen.language.expression",
    "floor": "attngen.language.expression",
    "log": "attngen.language.expression",
    "maximum": "attngen.language.expression",
    "minimum": "attngen.language.expression",
    "relu": "attngen.language.expression",
    "round": "attngen.language.expression",
    "sigmoid": "attngen.language.expression",
    "sin": "attngen.language.expression",
    "sqrt": "attngen.language.expression",
    "tanh": "attngen.language.expression",
    "where": "attngen.language.expression",
    "alibi": "attngen.language.patterns",
    "alibi_slopes": "attngen.language.patterns",
    "bias": "attngen.language.patterns",
    "block_causal": "attngen.language.patterns",
    "causal": "attngen.language.patterns",
    "dilated_window": "attngen.language.patterns",
    "document_ids": "attngen.language.patterns",
    "documents": "attngen.language.patterns",
    "global_tokens": "attngen.language.patterns",
    "neighborhood_2d": "attngen.language.patterns",
    "prefix_lm": "attngen.language.patterns",
    "row": "attngen.language.patterns",
    "sink": "attngen.language.patterns",
    "soft_cap": "attngen.language.patterns",
    "t5_bias": "attngen.language.patterns",
    "tree": "attngen.language.patterns",
    "window": "attngen.language.patterns",
    "Schedule": "attngen.language.schedule",
    "Tile": "attngen.language.schedule",
    "Spec": "attngen.language.spec",
    "compile": "attngen.runtime.attention",
    "CompiledAttention": "attngen.runtime.attention",
    "oracle": "attngen.reference.oracle",
    "tile_map": "attngen.analysis",
    "facts": "attngen.analysis",
    "cross_compile": "attngen.inspect.cross",
    "cross_compile_call": "attngen.inspect.cross",
    "from_flex": "attngen.integrations.flex",
    "tune": "attngen.tuning",
    "save": "attngen.packs.build",
    "load": "attngen.packs.load",
    "merge": "attngen.plan.merging",
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
