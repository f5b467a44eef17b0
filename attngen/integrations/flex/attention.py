"""`flex_attention` with torch's signature, on attngen's kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import flex_attention as torchs
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask

from attngen.errors import AttngenError, InputError, SpecError
from attngen.integrations.flex.masks import LazyBlockMask, agrees, blocks_of
from attngen.integrations.flex.meaning import StepError, spec_of
from attngen.integrations.flex.options import schedule_of
from attngen.integrations.flex.trace import Mod, Program, located, record
from attngen.integrations.flex.warn import warn_once
from attngen.language.keysets.tiles import Block
from attngen.language.spec import Spec
from attngen.runtime.attention import CompiledAttention, compile

_ANY_BLOCK = 1 << 30  # torch's BLOCK_SIZE of a mask that says nothing
_HALF = (torch.float16, torch.bfloat16)


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Mod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
    fallback: str | None = None,
    backend: str = "auto",
) -> Any:
    """torch's `flex_attention`, and with the same results: attention whose scores score_mod changes and whose pairs block_mask
    chooses. query [B, Hq, L, E], key [B or 1, Hkv, S, E], value [B or 1, Hkv, S, Ev] of one dtype and device.

    score_mod(score, b, h, q_idx, kv_idx) -> score and block_mask's mask_mod(b, h, q_idx, kv_idx) -> bool are run with symbols
    at each call; what they read of numbers and tensors may change between calls. New values of tensors compile nothing; a new
    number is a new kernel. Captured float tensors get gradients. score is float32, float64 for float64 inputs.
    block_mask: what `attngen.flex.create_block_mask` or torch's makes, or lists of blocks (`BlockMask.from_kv_blocks`): pairs
    in full blocks attend whatever mask_mod says, as in torch's kernels; blocks are multiples of 16.
    scale: above 0; None is 1 / sqrt(E). Another one compiles nothing. kernel_options: block sizes, warps, stages and USE_TMA pin
    the schedule; others are named in a warning, once. fallback: "torch" calls torch's flex_attention for mods that can't be
    traced, and says so once. backend: as in `ag.compile`.

    Returns out [B, Hq, L, Ev] in query's dtype; with return_lse (out, lse), with return_aux (out, AuxOutput(lse)). lse
    [B, Hq, L] float32 (float64 for float64), natural log, -inf for a row without keys, whose out is 0.
    Raises SpecError, with the line of the mod, for what can't be traced; InputError, ScheduleError.
    """
    _check(query, key, value, block_mask, enable_gqa, return_lse, return_aux)
    if fallback not in (None, "torch"):
        raise InputError("fallback", 'None or "torch"', repr(fallback))
    try:
        attn, captures = _attention(query, key, score_mod, block_mask, kernel_options, backend)
    except SpecError as error:
        if fallback is None:
            raise
        warn_once(f"flex_attention: torch's, since attngen can't compile this: {error}")
        others: Any = (scale, enable_gqa, return_lse, kernel_options)
        aux: Any = return_aux
        return torchs.flex_attention(query, key, value, score_mod, block_mask, *others, return_aux=aux)
    out, lse = attn(query, key, value, return_lse=True, scale=scale, **captures)
    if return_aux is not None:
        return out, AuxOutput(lse=lse if return_aux.lse else None)
    return (out, lse) if return_lse else out


def from_flex(
    mask_mod: Mod | None = None,
    score_mod: Mod | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Spec, dict[str, torch.Tensor]]:
    """The spec of FlexAttention's functions, and the tensors that they capture, by their names in it: `ag.compile(spec)(q, k, v,
    **captures)`. They are t0, t1, ... in the order in which mask_mod, then score_mod, first reads them.

    mask_mod(b, h, q_idx, kv_idx) -> bool, score_mod(score, b, h, q_idx, kv_idx) -> number; None for no change. dtype, device:
    what score.dtype and .device say. Raises SpecError, with the line of the mod that can't be traced.
    """
    dtype = torch.float32 if dtype in _HALF else dtype
    program, captures = traced(mask_mod, score_mod, dtype, torch.device(device))
    try:
        return spec_of(program), captures
    except StepError as error:
        raise at_its_line(error, mask_mod, score_mod, dtype, torch.device(device)) from error


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    score_mod: Mod | None,
    block_mask: BlockMask | None,
    kernel_options: dict[str, Any] | None,
    backend: str,
) -> tuple[CompiledAttention, dict[str, Any]]:
    """What computes a call, and its captures. SpecError, InputError, ScheduleError."""
    mask_mod, block, given = _mask(block_mask, query, key)
    dtype = torch.float32 if query.dtype in _HALF else query.dtype
    program, captures = traced(mask_mod, score_mod, dtype, query.device)
    options = tuple(sorted((kernel_options or {}).items()))
    if torch.compiler.is_compiling():
        parts = (program.steps, program.tensors, program.params, program.mask, program.score)
        name, problem = _hold(parts, block, options, backend)
        if name is not None:
            return getattr(_held, name), {**captures, **given}
        torch._dynamo.graph_break(msg=problem)
    try:
        attn = _compiled(program, block, options, backend)
    except StepError as error:
        raise at_its_line(error, mask_mod, score_mod, dtype, query.device) from error
    return attn, {**captures, **given}


def _mask(
    block_mask: BlockMask | None, query: torch.Tensor, key: torch.Tensor
) -> tuple[Mod | None, Block | None, dict[str, torch.Tensor]]:
    """The mask_mod of a block mask; and if its blocks say more than that, their size, and the key set's captures."""
    if block_mask is None or block_mask.BLOCK_SIZE[0] == _ANY_BLOCK == block_mask.BLOCK_SIZE[1]:
        return None, None, {}
    mask_mod = None if block_mask.mask_mod is torchs.noop_mask else block_mask.mask_mod
    if isinstance(block_mask, LazyBlockMask) and block_mask.is_its_mod:
        return mask_mod, None, {}
    block_q, block_k = block_mask.BLOCK_SIZE
    if block_q % 16 or block_k % 16:
        raise InputError(
            "block_mask", "blocks that are multiples of 16", (block_q, block_k), "choose another BLOCK_SIZE"
        )
    # Whoever compiles has no values to look at.
    if mask_mod is not None and not torch.compiler.is_compiling() and agrees(block_mask, query, key):
        return mask_mod, None, {}
    live, full = blocks_of(block_mask, -(-key.shape[2] // block_k))
    if mask_mod is None:
        return None, (block_q, block_k), {"layout": live}
    if full is None:
        return mask_mod, (block_q, block_k), {"layout": live}

    def inside(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        batch, head = (0 if full.shape[0] == 1 else b), (0 if full.shape[1] == 1 else h)
        return full[batch, head, q_idx // block_q, kv_idx // block_k] | mask_mod(b, h, q_idx, kv_idx)

    return inside, (block_q, block_k), {"layout": live}


def traced(
    mask_mod: Mod | None, score_mod: Mod | None, dtype: torch.dtype, device: torch.device
) -> tuple[Program, dict[str, Any]]:
    try:
        return record(mask_mod, score_mod, dtype, device)
    except Exception as error:
        raise located(error) from error


def at_its_line(
    error: StepError, mask_mod: Mod | None, score_mod: Mod | None, dtype: torch.dtype, device: torch.device
) -> SpecError:
    """The error of a step with the line of the mod: the mods run once more, and stop there."""
    try:
        record(mask_mod, score_mod, dtype, device, error.step, error.error)
    except SpecError as again:
        return located(again)
    return error.error


@lru_cache(maxsize=1024)
def _compiled(
    program: Program, block: Block | None, options: tuple[tuple[str, Any], ...], backend: str
) -> CompiledAttention:
    return compile(spec_of(program, block), schedule=schedule_of(options), backend=backend)


class _Held:
    """The attentions that graphs of torch.compile call, as attributes, since Dynamo looks these up anew each time."""


_held = _Held()


@torch.compiler.assume_constant_result
def _hold(parts: tuple[Any, ...], *others: Any) -> tuple[str | None, str]:
    """The attention of a program, kept for as long as a graph may call it: its name in `_held`, or None and why there is none.
    parts: of the program, since Dynamo's constants are plain tuples.
    """
    try:
        attn = _compiled(Program(*parts), *others)
    except (AttngenError, StepError) as error:
        return None, str(error)
    name = f"attention_{attn.handle}"
    setattr(_held, name, attn)
    return name, ""


def _check(
    query: Any, key: Any, value: Any, block_mask: Any, enable_gqa: bool, return_lse: bool, return_aux: AuxRequest | None
) -> None:
    """What torch refuses beyond what every call of attngen checks. InputError."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            got = f"shape {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise InputError(name, "a tensor [batch, heads, length, head dim]", got)
    if not enable_gqa and query.shape[1] != key.shape[1]:
        fix = "pass enable_gqa=True"
        raise InputError("key", f"{query.shape[1]} heads like query", f"{key.shape[1]} heads", fix)
    if return_lse and return_aux is not None:
        raise InputError("return_lse", "False next to return_aux", True, "pass return_aux=AuxRequest(lse=True) alone")
    if return_aux is not None and return_aux.max_scores:
        fix = "ask for lse, which bounds it: lse - log(keys) <= max <= lse"
        raise InputError(
            "return_aux", "AuxRequest(lse=...)", "max_scores=True, which attngen's kernels do not keep", fix
        )
    if block_mask is None:
        return
    if not isinstance(block_mask, BlockMask):
        raise InputError("block_mask", "a BlockMask", type(block_mask).__name__, "make one with create_block_mask")
    lengths, wanted = tuple(block_mask.seq_lengths), (query.shape[2], key.shape[2])
    if lengths != wanted and block_mask.BLOCK_SIZE[0] != _ANY_BLOCK:
        fix = "create one for these lengths"
        raise InputError("block_mask", f"one for lengths {wanted} of query and key", lengths, fix)
