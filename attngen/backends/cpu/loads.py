"""Loads from captured tensors: whether their indices are in range, and where their gradients go."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy
import torch

from attngen.errors import InputError
from attngen.language.checks import checked
from attngen.language.expression import B, H, I, J, Load, Where, conjunction, negate, to_text
from attngen.language.programs import evaluate


@lru_cache(maxsize=256)
def checked_loads(expr: Any, by_offset: bool) -> tuple[tuple[Load, Any], ...]:
    """Loads whose indices have to be checked at run time, each with the condition under which its value is used.

    Plain b, h, i, j are checked when a call is bound; i is not when the offset is a tensor (`by_offset`).
    """
    plain = {B, H, J} if by_offset else {B, H, I, J}
    found: dict[tuple[Load, Any], None] = {}

    def visit(node: Any, used: Any) -> None:
        if isinstance(node, Where):
            condition, yes, no = node.args
            visit(condition, used)
            visit(yes, conjunction([used, condition]))
            visit(no, conjunction([used, negate(condition)]))
            return
        if isinstance(node, Load) and any(index not in plain and not index.is_Integer for index in node.indices):
            found[node, used] = None
        for arg in node.args:
            visit(arg, used)

    visit(expr, sympy.true)
    return tuple(found)


def check_loads(
    loads: tuple[tuple[Load, Any], ...], env: dict[str, Any], attended: torch.Tensor | None, real: torch.dtype
) -> None:
    """InputError if an attended pair loads outside its tensor. `attended`: bool, broadcasts to the tile; None for all."""
    if not checked():
        return
    for load, used in loads:
        for dim, (index, size) in enumerate(zip(load.indices, env[load.name].shape, strict=True)):
            values = torch.as_tensor(evaluate(index, env, real=real))
            if values.numel() == 0:
                continue
            low, high = (int(x) for x in values.aminmax())
            if low >= 0 and high < size:
                continue
            wrong = ((values < 0) | (values >= size)) & torch.as_tensor(evaluate(used, env, real=real))
            wrong = wrong if attended is None else wrong & attended
            if wrong.any():
                value = int(values.expand(wrong.shape)[wrong][0])
                raise InputError(
                    load.name,
                    f"`{to_text(index)}`, its index {dim}, in 0 .. {size - 1} for every pair that the mask keeps",
                    f"{value}",
                    "clamp the index with min and max, mask these pairs out, or pass a larger tensor",
                )


def scatter(total: torch.Tensor, load: Load, share: torch.Tensor, scope: dict[str, Any], real: torch.dtype) -> None:
    """Add share [heads, rows, keys] to the elements of `total` that the load reads."""
    index: Any = torch.zeros((), dtype=torch.int64)
    for place, size, stride in zip(load.indices, total.shape, total.stride(), strict=True):
        index = index + torch.as_tensor(evaluate(place, scope, real=real)).clamp(0, max(size - 1, 0)) * stride
    index = index.view((1,) * (3 - index.ndim) + tuple(index.shape))
    # Sum first over what the element does not depend on: a slope per head is one number, not heads x rows x keys.
    sums = [d for d in range(3) if index.shape[d] == 1 and share.shape[d] != 1]
    share = share.sum(sums, keepdim=True) if sums else share
    if total.numel():
        total.view(-1).index_add_(0, index.expand(share.shape).reshape(-1), share.reshape(-1))
