"""Modules around attention that keep activations small.

`Block` is a pre-norm transformer block whose query side, from the q projection over attention to the feed-forward, runs a
chunk of rows at a time, and again so in the backward (Blockwise Parallel Transformer, arXiv 2305.19370). What a plain block
keeps and peaks at grows with length x feed-forward width; here that product is chunk x width.

`checkpoint` recomputes a function in the backward but for its attention, whose results are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from attngen.errors import InputError, SpecError
from attngen.language.spec import Spec
from attngen.runtime.attention import CompiledAttention, compile


class Block(nn.Module):
    """y = x + attention(norm(x)); y + feed_forward(norm(y)), with norms before, as most models have it.

    dim: width of x. heads, heads_kv: query heads, and key/value heads (None: as many). spec: a Spec or what `ag.compile`
    returns (without keys=: those prepare for all queries at once). ff_width: of the feed-forward, 4 * dim by default.
    activation: of the feed-forward, elementwise or not, on [..., ff_width]; a module may have parameters. norm: makes a norm
    from a width. chunk: rows at a time; None: everything at once, the plain block. bias: of the linear maps. Raises SpecError,
    InputError.

    forward(x [B, N, dim], **captures) -> [B, N, dim]; captures of the spec by name, differentiable as ever. Results and
    gradients are those of the plain block. At its peak the backward holds a few tensors of [B, N, dim] and of [B, chunk,
    ff_width], and nothing of [B, N, ff_width]; it recomputes the chunk's forward but for the attention, of which out and lse are
    kept.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        spec: Spec | CompiledAttention,
        *,
        heads_kv: int | None = None,
        ff_width: int | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        chunk: int | None = 1024,
        bias: bool = True,
    ):
        super().__init__()
        heads_kv = heads if heads_kv is None else heads_kv
        if dim % heads or heads % heads_kv:
            raise InputError("heads", f"a divisor of dim = {dim}, and a multiple of heads_kv = {heads_kv}", heads)
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
            raise InputError("chunk", "an int of at least 1, or None", repr(chunk))
        self.attention = _compiled(spec)
        self.heads, self.heads_kv, self.chunk = heads, heads_kv, chunk
        head_dim = dim // heads
        self.norm_attention, self.norm_ff = norm(dim), norm(dim)
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_kv = nn.Linear(dim, 2 * heads_kv * head_dim, bias=bias)
        self.to_out = nn.Linear(dim, dim, bias=bias)
        self.widen = nn.Linear(dim, ff_width or 4 * dim, bias=bias)
        self.activation = nn.GELU() if activation is None else activation
        self.narrow = nn.Linear(ff_width or 4 * dim, dim, bias=bias)

    def forward(self, x: torch.Tensor, **captures: Any) -> torch.Tensor:
        if x.dim() != 3 or x.shape[2] != self.to_q.in_features:
            raise InputError("x", f"[B, N, {self.to_q.in_features}]", f"shape {list(x.shape)}")
        k, v = self._heads(self.to_kv(self.norm_attention(x)), 2 * self.heads_kv).chunk(2, dim=1)
        if self.chunk is None:
            return self._rows(0, x, k, v, captures)
        run = checkpoint if torch.is_grad_enabled() else _call
        rows = x.split(self.chunk, 1)  # not slices: their backward would make a whole x for each
        return torch.cat([run(self._rows, n * self.chunk, part, k, v, captures) for n, part in enumerate(rows)], 1)

    def _rows(
        self, start: int, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: dict[str, Any]
    ) -> torch.Tensor:
        """The block's result for rows that begin at position `start`."""
        q = self._heads(self.to_q(self.norm_attention(x)), self.heads)
        seen = self.attention(q, k, v, q_offset=start, **captures)
        x = x + self.to_out(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(self.activation(self.widen(self.norm_ff(x))))

    def _heads(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, heads_kv={self.heads_kv}, chunk={self.chunk}, attention={self.attention!r}"


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), of which the backward keeps the arguments and the results of attngen's attention (out, lse and what
    a large lse lacks, O(N)) and computes everything else again, but never attention: for whole transformer blocks. Gradients are the
    same as without. See `torch.utils.checkpoint.checkpoint`, which this calls without re-entering.
    """
    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=_contexts, **kwargs)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep_attention)


def _keep_attention(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator is torch.ops.attngen.forward.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _compiled(spec: Any) -> CompiledAttention:
    attention = spec if isinstance(spec, CompiledAttention) else compile(spec)
    if attention.spec.keys is not None:
        raise SpecError(
            "Block: a spec with keys= is not for chunks of queries", fix="use a mask, or attention of its own"
        )
    if attention.spec.reads_rows:
        raise SpecError(
            "Block: a spec with i - q_offset, the query's row, is not for chunks", fix="index by the position i"
        )
    return attention
