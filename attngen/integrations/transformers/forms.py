"""What a model's attention is, as a spec: the form of a call is all of it but values and sizes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from attngen.errors import AttngenError
from attngen.integrations.layers import layer_spec, unpadded
from attngen.integrations.transformers.masks import spec_named
from attngen.language.expression import Expr, Param, Tensor
from attngen.language.expression.builder import wrap
from attngen.language.moved import b, h, j, s
from attngen.language.patterns import bias, row
from attngen.language.spec import Spec
from attngen.runtime.attention import CompiledAttention, compile


class Form(NamedTuple):
    """mask: name of a traced mask, "" for all pairs. padded: kind of the padding, "" for none (`masks.kept`). dense: kind of a mask
    that is given for all pairs, "bool" or "float". softcap: its number. bias: whether a position bias is added. sinks: 1 for one a
    head, 3 for one a query. dropout: whether weights are dropped.
    """

    mask: str = ""
    padded: str = ""
    dense: str = ""
    softcap: float | None = None
    bias: bool = False
    sinks: int = 0
    dropout: bool = False


def spec_of_form(form: Form) -> Spec:
    """Captures: the mask's and the padding's, keep bool or additive float [B, H, Nq, Nk], position_bias [B, H, Nq, Nk], sinks [H] or
    [B, H, Nq]; params lowest (the additive mask excludes what is not above it) and dropout.
    """
    mask, scores = wrap(True), []
    if form.mask:
        spec = spec_named(form.mask)
        mask = Expr(spec.mask, {**spec.tensors, **spec.params})
    if form.padded:
        mask = mask & unpadded(form.padded)
    if form.dense == "bool":
        mask = mask & Tensor("keep", 4, "bool")[b, h, row(), j]
    if form.dense == "float":
        additive = Tensor("additive", 4)[b, h, row(), j]
        mask = mask & (additive > Param("lowest", float))
        scores.append(s + additive)
    if form.bias:
        scores.append(bias("bhrj", name="position_bias"))
    return layer_spec(mask, soft_cap=form.softcap, scores=scores, sinks=form.sinks, dropout=form.dropout)


@lru_cache(maxsize=1024)
def compiled(form: Form, backend: str) -> CompiledAttention:
    """What computes attention of a form."""
    return compile(spec_of_form(form), backend=backend)


class _Held:
    """The attentions that graphs of torch.compile call, as attributes, since Dynamo looks these up anew each time."""


_held = _Held()


def attention_of(form: Form, backend: str) -> CompiledAttention:
    """`compiled`, inside of torch.compile too."""
    if not torch.compiler.is_compiling():
        return compiled(form, backend)
    name, problem = _hold(tuple(form), backend)
    if not name:
        torch._dynamo.graph_break(msg=problem)
        return compiled(form, backend)
    return getattr(_held, name)


@torch.compiler.assume_constant_result
def _hold(parts: tuple[Any, ...], backend: str) -> tuple[str, str]:
    """The attention of a form, kept for as long as a graph may call it: its name in `_held`, or none and why."""
    try:
        attn = compiled(Form(*parts), backend)
    except AttngenError as error:
        return "", str(error)
    name = f"attention_{attn.handle}"
    setattr(_held, name, attn)
    return name, ""
