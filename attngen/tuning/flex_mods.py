"""A spec's mask and score as FlexAttention's functions, so that both can be timed on one spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from attngen.language.expression import Load, S
from attngen.language.programs import evaluate, tensor_of
from attngen.language.spec import Spec

Mod = Callable[..., torch.Tensor]
_SWAPPED = {torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor}  # of which both operands may come first


def mask_mod(spec: Spec, captures: Mapping[str, Any], q_offset: int, device: torch.device) -> Mod | None:
    """(b, h, q_idx, kv_idx) -> bool; None where all pairs attend."""
    if spec.mask == True:  # noqa: E712 (a sympy value)
        return None
    graph, tensors = _graph(spec.mask, captures, q_offset, device, score=False)
    return lambda b, h, q_idx, kv_idx: graph(b, h, q_idx, kv_idx, *tensors)


def score_mod(spec: Spec, captures: Mapping[str, Any], q_offset: int, device: torch.device) -> Mod | None:
    """(score, b, h, q_idx, kv_idx) -> score; None where it stays as it is."""
    if spec.score == S:
        return None
    graph, tensors = _graph(spec.score, captures, q_offset, device, score=True)
    return lambda s, b, h, q_idx, kv_idx: graph(s, b, h, q_idx, kv_idx, *tensors)


def _graph(
    expr: Any, captures: Mapping[str, Any], q_offset: int, device: torch.device, *, score: bool
) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The expression as torch operations, and the captured tensors that come behind its indices."""
    names = sorted({load.name for load in expr.atoms(Load)})
    tensors = [captures[name] for name in names]
    numbers = {name: value for name, value in captures.items() if not isinstance(value, torch.Tensor)}

    def value(*args: torch.Tensor) -> torch.Tensor:
        first, (b, h, i, j, *loaded) = (args[0], args[1:]) if score else (None, args)
        places = {"s": first, "b": b, "h": h, "i": i + q_offset, "j": j, "q_offset": q_offset}
        env = {**numbers, **places, **dict(zip(names, loaded, strict=True))}
        return tensor_of(evaluate(expr, env, real=torch.float32), device)

    # One element each, and not none: a number cannot be an index while it is traced.
    places = [torch.zeros(1, dtype=torch.int32, device=device) for _ in "bhij"]
    scores = [torch.zeros(1, device=device)] if score else []
    return _with_numbers(make_fx(value)(*scores, *places, *tensors)), tensors


def _with_numbers(graph: fx.GraphModule) -> fx.GraphModule:
    """Fractions were traced as tensors of one element. As numbers they are part of the kernel, as in a mod written by hand."""
    lifted = torch.ops.aten.lift_fresh_copy.default
    for node in [node for node in graph.graph.nodes if node.op == "call_function" and node.target is lifted]:
        number = float(getattr(graph, node.args[0].target))
        for user in list(node.users):
            if user.target in _SWAPPED and user.args[0] is node and isinstance(user.args[1], fx.Node):
                user.args = (user.args[1], user.args[0], *user.args[2:])
            if user.args and user.args[0] is not node:
                user.args = tuple(number if arg is node else arg for arg in user.args)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
