"""The masks of transformers: what `AttentionMaskInterface` makes, once a forward and kind of mask, and every layer gets.

A mask is the library's mask function run with symbols (`attngen.integrations.flex.trace`). What it closes over, padding, packed
sequences, groups of image tokens, becomes captures, so nothing of the size of all pairs is ever made.

Positions are those of the keys at hand: a sliding cache that starts at key `kv_offset` shifts queries and keys by as much. What
depends on the distance alone does not notice, and the rest reads the shift at run time, so a step of a generation compiles nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NoReturn

import torch

from attngen.errors import InputError, SpecError
from attngen.integrations.flex.attention import at_its_line, traced
from attngen.integrations.flex.masks import LazyBlockMask
from attngen.integrations.flex.meaning import StepError, spec_of
from attngen.integrations.flex.trace import Mod, Program
from attngen.integrations.layers import kept
from attngen.integrations.transformers.windows import causal
from attngen.language.expression import Expr, I, Param, greater_equal
from attngen.language.expression.builder import wrap
from attngen.language.moved import i, j, moved, split_causal
from attngen.language.spec import Spec

FIX = 'or give the model attn_implementation="sdpa" or "eager"'
PADDING = frozenset({"first", "last", "padding"})  # names of its captures
_BLOCK = (128, 128)  # of the lists of blocks, if anybody asks for them
_SHIFT = Param("shift")


class Mask(LazyBlockMask):
    """A traced mask. name: what `spec_named` knows it by; padded: the kind of its padding; captures: of both; q_offset: position of the
    first query, counted from the first key at hand.

    A BlockMask, since transformers passes on what is one and has four dimensions. No model can compute with it.
    """

    def __init__(
        self,
        name: str,
        padded: str,
        captures: Mapping[str, Any],
        q_offset: int | torch.Tensor,
        mask_mod: Mod,
        sizes: tuple[int, int, int, int],
        device: torch.device,
    ):
        super().__init__(mask_mod, sizes, device, _BLOCK, True)
        self.name, self.padded, self.captures, self.q_offset = name, padded, captures, q_offset

    @property
    def ndim(self) -> int:
        return 4

    def dim(self) -> int:
        return 4

    def to(self, device: Any, **options: Any) -> Mask:
        """The same with its tensors on a device, for models whose layers are on several."""
        if isinstance(device, torch.dtype):
            _computes(f"conversion to {device}")
        device = torch.device(device)
        captures = {name: _moved_to(x, device) for name, x in self.captures.items()}
        offset = _moved_to(self.q_offset, device)
        return Mask(self.name, self.padded, captures, offset, self.mask_mod, self.sizes, device)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(f"attngen's mask has no {name!r}: {_COMPUTES}, {FIX}") from None

    def __getitem__(self, index: Any) -> Any:
        """The mask itself where nothing is cut off: some models cut masks to the length of their keys."""
        parts = index if isinstance(index, tuple) else (index,)
        for part, size in zip(parts, self.sizes, strict=False):
            if not isinstance(part, slice) or part.start not in (None, 0) or part.step not in (None, 1):
                _computes("a part of it")
            if part.stop is not None and part.stop < size:
                _computes(f"a part of it, {part.stop} of {size}")
        return self


_COMPUTES = "this model computes with its mask, which attngen never makes for all pairs; prepare a 4-D mask yourself"


def _computes(what: str) -> NoReturn:
    raise InputError("attention_mask", "to be passed to attention as it is", what, f"{_COMPUTES}, {FIX}")


def _no_operator(name: str) -> Callable[..., Any]:
    def operator(self: Mask, *others: Any) -> Any:
        _computes(f"an operation on it ({name})")

    return operator


for _name in "add sub mul truediv and or xor lt le gt ge neg invert matmul".split():  # noqa: SIM905
    setattr(Mask, f"__{_name}__", _no_operator(_name))
    setattr(Mask, f"__r{_name}__", _no_operator(_name))


def _moved_to(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, torch.Tensor) else x


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Mod = causal,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Mask:
    """What transformers' `AttentionMaskInterface` calls. mask_function(b, h, q_idx, kv_idx) -> bool, on positions from q_offset and
    kv_offset on; attention_mask: bool [B, positions], False for padding. local_size: of a window or a chunk, whose caches may slide.
    others: what it tells its own implementations, which is all in mask_function. Raises SpecError, with the line of the mask function,
    for what can't be traced; InputError.
    """
    for unknown in others.keys() - _TOLD:
        fix = f"this attngen knows no such part of a mask; {FIX}"
        raise InputError(unknown, "an argument of transformers' masks", "an unknown one", fix)
    device = torch.device(device)
    name, captures, moves, is_causal = _traced_name(mask_function, local_size is not None or kv_offset != 0, device)
    padded, padding = _padding(attention_mask, kv_length, kv_offset, is_causal)
    shift = {"shift": kv_offset} if moves else {}
    offset = q_offset - kv_offset  # of a tensor a new one: a static cache changes its own in place

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        seen = mask_function(b, h, q_idx + q_offset, kv_idx + kv_offset)
        return seen & kept(padded, padding, b, kv_idx) if padded else seen

    sizes = (batch_size, 1, q_length, kv_length)
    return Mask(name, padded, {**captures, **shift, **padding}, offset, mask_mod, sizes, device)


def _padding(
    attention_mask: torch.Tensor | None, kv_length: int, kv_offset: int, is_causal: bool
) -> tuple[str, dict[str, torch.Tensor]]:
    """The kind of the padding, "" for none, and its captures, on the keys at hand."""
    if attention_mask is None:
        return "", {}
    if attention_mask.dim() != 2:
        raise InputError("attention_mask", "2 dimensions [batch, positions], or 4", list(attention_mask.shape))
    keep, length, end = attention_mask.bool(), attention_mask.shape[1], kv_offset + kv_length
    if not torch.compiler.is_compiling():
        # This waits for the device, once a forward, as transformers does for SDPA. All of the mask is looked at, not the part in a
        # window, which may lose its padding as the window slides: that would be another kernel.
        count, first = keep.sum(-1), keep.int().argmax(-1)
        last = length - 1 - keep.flip(-1).int().argmax(-1)
        full, ends = torch.stack([(count == length).all(), ((count == 0) | (count == last - first + 1)).all()]).tolist()
        # Behind it a static cache is not written yet: no causal query sees that.
        if full and (is_causal or length >= end):
            return "", {}
        if ends:  # found without looking at pairs
            return "ends", {"first": first - kv_offset, "last": torch.where(count == 0, -1, last) - kv_offset}
    if length < end:
        keep = torch.nn.functional.pad(keep, (0, end - length))
    return "holes", {"padding": keep[:, kv_offset:end]}


_TOLD = {"allow_is_causal_skip", "allow_is_bidirectional_skip", "dtype", "config", "use_vmap"}


# -- traced masks by name ---------------------------------------------------------------------------------------------

_specs: dict[str, Spec] = {}


def spec_named(name: str) -> Spec:
    """The spec of a traced mask, on the keys at hand."""
    return _specs[name]


def _traced_name(mask_function: Mod, moving: bool, device: torch.device) -> tuple[str, dict[str, Any], bool, bool]:
    """Of a mask function its name, its captures, whether it reads the shift, and whether it is causal. moving: whether keys may start
    behind position 0. SpecError.
    """
    try:
        program, captures = traced(mask_function, None, torch.float32, device)
    except SpecError as error:
        raise _unfit(error) from error
    # Dynamo's constants are plain tuples.
    parts = (program.steps, program.tensors, program.params, program.mask, program.score)
    name, moves, is_causal, problem = _remember(parts, moving)
    if not name:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=problem)
        try:
            spec_of(program)
        except StepError as error:
            raise _unfit(at_its_line(error, mask_function, None, torch.float32, device)) from error
    return name, captures, moves, is_causal


def _unfit(error: SpecError) -> SpecError:
    fix = f"{error.fix}; {FIX}" if error.fix else FIX
    return SpecError(f"the model's mask: {error.problem}", text=error.text, width=len(error.text or ""), fix=fix)


@torch.compiler.assume_constant_result
def _remember(parts: tuple[Any, ...], moving: bool) -> tuple[str, bool, bool, str]:
    """Of a program's spec the name, whether it reads the shift, whether it is causal, and "". An empty name, and why there is no spec."""
    try:
        return *_known(parts, moving), ""
    except StepError as error:
        return "", False, False, str(error)


@lru_cache(maxsize=1024)
def _known(parts: tuple[Any, ...], moving: bool) -> tuple[str, bool, bool]:
    spec = _at_hand(spec_of(Program(*parts)), moving)
    name = hashlib.sha256(repr((parts, moving)).encode()).hexdigest()[:32]
    _specs[name] = spec
    return name, "shift" in spec.params, split_causal(spec.mask) is not None


def _at_hand(spec: Spec, moving: bool) -> Spec:
    """The mask of absolute positions on those that count from the first key at hand. Positions are never negative: what transformers
    writes for "all" is `q_idx >= 0`.
    """
    mask = Expr(spec.mask.xreplace({greater_equal(I, 0): wrap(True).sym}), {**spec.tensors, **spec.params})
    return Spec(moved(mask, i=i + _SHIFT, j=j + _SHIFT) if moving else mask)
