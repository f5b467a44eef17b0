"""What a call prepares, to be used by many: `attn.prepare(q, k, v, ...)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from attngen.errors import InputError
from attngen.language.call import Call
from attngen.language.keyset import KeySet
from attngen.plan.plan import Sizes

if TYPE_CHECKING:
    from attngen.language.spec import Spec


FIX = "make a new one: attn.prepare(...)"


@dataclass(frozen=True, eq=False)
class Preparation:
    """Sorted rows, lists, samples and tile tables, for calls of the same sizes in other layers and steps.

    keys, mask: what it was made for; sizes: of the call; reads: the captured tensors it was made from; params likewise;
    values: what was made, by buffer of the plan. Nothing in it gets a gradient.
    """

    keys: str
    mask: str
    sizes: Sizes
    q_offset: int | torch.Tensor
    device: str
    reads: Mapping[str, _Seen] = field(repr=False)
    params: Mapping[str, int | float]
    values: Mapping[str, torch.Tensor] = field(repr=False)
    stamp: object = field(
        default_factory=object, repr=False
    )  # stands for it in signatures, without holding its tensors

    @classmethod
    def of(
        cls,
        spec: Spec,
        keys: KeySet | None,
        sizes: Sizes,
        call: Call,
        reads: Mapping[str, Any],
        params: Mapping[str, int | float],
        values: Mapping[str, torch.Tensor],
    ) -> Preparation:
        """What was made for a call from these captures and params."""
        seen = {name: _Seen.of(value) for name, value in reads.items()}
        text = "" if keys is None else str(keys)
        return cls(text, spec.mask_text, sizes, call.q_offset, str(call.q.device), seen, params, values)

    def check(self, spec: Spec, keys: KeySet | None, sizes: Sizes, call: Call, given: Mapping[str, Any]) -> None:
        """InputError, by name, unless it was made for this key set and mask, for such a call, and from the same captures. On a
        GPU values are compared there, and nobody waits.
        """
        own = replace(self.sizes, given=(), head_dim=0, head_dim_v=0)
        wanted = replace(sizes, given=(), head_dim=0, head_dim_v=0)
        for what, made, asked in (
            ("", self.keys, "" if keys is None else str(keys)),
            ("the mask ", self.mask, spec.mask_text),
            ("", _sizes(own, self.q_offset, self.device), _sizes(wanted, call.q_offset, str(call.q.device))),
        ):
            if made != asked:
                raise InputError("plan", f"a plan for {what}{asked or 'a spec without keys='}", f"one for {made}", FIX)
        if not torch.compiler.is_compiling():
            self.check_values(call, given)

    def check_values(self, call: Call, given: Mapping[str, Any]) -> None:
        """The part of `check` that a call's signature does not tell."""
        if isinstance(self.q_offset, torch.Tensor):
            assert isinstance(call.q_offset, torch.Tensor)  # as the sizes say
            _same("plan", call.q_offset, self.q_offset, "the q_offset that the plan was made for")
        elif call.q_offset != self.q_offset:
            raise InputError("plan", f"a plan for q_offset {call.q_offset}", f"one for {self.q_offset}", FIX)
        for name, value in self.params.items():
            if name in call.params and call.params[name] != value:
                raise InputError(
                    "plan", f"a plan made with {name}={call.params[name]}", f"one made with {name}={value}"
                )
        for name, seen in self.reads.items():
            now = given.get(name, call.captures.get(name))
            if now is not None:
                seen.check(name, now)

    @property
    def nbytes(self) -> int:
        """Memory of its tensors."""
        return sum(t.numel() * t.element_size() for t in self.values.values())


@dataclass(frozen=True, eq=False)
class _Seen:
    """A capture as it was when something was made from it."""

    value: Any
    version: int

    @classmethod
    def of(cls, value: Any) -> _Seen:
        if not isinstance(value, torch.Tensor):
            return cls(value, 0)
        # Nobody counts the changes of an inference tensor: its values are kept, and compared each time.
        return cls(value.detach().clone() if value.is_inference() else value.detach(), _version(value))

    def check(self, name: str, now: Any) -> None:
        if not isinstance(self.value, torch.Tensor):
            if self.value != now:
                raise InputError("plan", f"a plan made with {name}={now}", f"one made with {name}={self.value}", FIX)
            return
        if _version(self.value) != self.version:
            raise InputError(name, "what the plan was made from", "a tensor that was changed in place since", FIX)
        if (
            now.data_ptr() != self.value.data_ptr()
            or now.shape != self.value.shape
            or now.stride() != self.value.stride()
        ):
            _same(name, now.detach(), self.value, "what the plan was made from: it holds what that chose")


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _same(name: str, now: torch.Tensor, before: torch.Tensor, what: str) -> None:
    if now.device.type == "cpu":
        if now.shape == before.shape and torch.equal(now, before):
            return
        raise InputError(name, what, "other values", FIX)
    if now.is_cuda:
        torch._assert_async((now == before).all(), f"{name}: expected {what}")


def _sizes(sizes: Sizes, q_offset: Any, device: str) -> str:
    offset = "tensor" if isinstance(q_offset, torch.Tensor) else q_offset
    shown = (sizes.batch, sizes.heads_q, sizes.n_q, sizes.heads_kv, sizes.n_k, offset, device)
    return f"(B, Hq, Nq, Hkv, Nk, q_offset, device) = {shown}"
