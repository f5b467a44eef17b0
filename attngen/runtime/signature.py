"""What is known of calls that differ in values alone, so that shapes and dtypes are checked once.

A signature is all that decides the checks of `attngen.language.call.bind` and the plan, but for values: of params, of q_offset, and
of indices, which every call looks at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attngen.language.call import LARGEST_POSITION, Call, check_offset, numbers_of
from attngen.language.indices import check_indices, doubtful_of
from attngen.language.keyset import KeySet
from attngen.runtime.executable import Executable
from attngen.runtime.preparation import Preparation

if TYPE_CHECKING:
    from attngen.language.spec import Spec


MOST = 4096  # signatures that are kept; then all are forgotten


def signature_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_offset: Any, captures: Mapping[str, Any], preparation: Any
) -> Any:
    """A hashable, or None for a call that has something else than tensors and numbers."""
    stamp = None
    if preparation is not None:
        if not isinstance(preparation, Preparation):
            return None
        stamp = preparation.stamp
    shifted: Any = int
    if isinstance(q_offset, torch.Tensor):
        shifted = (q_offset.dtype, q_offset.shape, q_offset.device)
    elif type(q_offset) is not int:
        return None
    key = [q.shape, q.dtype, q.device, k.shape, k.dtype, k.device, v.shape, v.dtype, v.device, shifted, stamp]
    for name, value in captures.items():
        if isinstance(value, torch.Tensor):
            key += name, value.dtype, value.shape, value.device
        elif type(value) is int or type(value) is float or value is None:
            key += name, type(value)
        else:
            return None
    return tuple(key)


@dataclass(frozen=True, eq=False)
class Known:
    """Of calls with one signature: what runs them, their key set, and how their arguments become a `Call`. tensors: what a captured
    tensor is converted and expanded to, None for nothing; offsets: the ints that q_offset may be.
    """

    executable: Executable
    keys: KeySet | None
    tensors: tuple[tuple[str, torch.dtype | None, tuple[int, ...] | None], ...]
    offsets: tuple[int, int]
    looks: bool
    stages: dict[Any, Any]

    @classmethod
    def of(cls, call: Call, captures: Mapping[str, Any], keys: KeySet | None, executable: Executable) -> Known | None:
        """From a call that was checked; None where an offset decides the shape of a captured tensor."""
        spec, tensors, most = call.spec, [], LARGEST_POSITION - 1
        least = 1 - LARGEST_POSITION
        for name, ready in call.captures.items():
            given = captures.get(name)
            if not isinstance(given, torch.Tensor):
                return None
            for dim, axis in spec.plain_dims[name]:
                if axis == "i" and not isinstance(call.q_offset, torch.Tensor):
                    if given.shape[dim] == 1:
                        return None
                    least, most = max(least, 0), min(most, given.shape[dim] - call.q.shape[2])
            dtype = None if ready.dtype == given.dtype else ready.dtype
            tensors.append((name, dtype, None if ready.shape == given.shape else tuple(ready.shape)))
        looks = bool(doubtful_of(call))
        return cls(executable, keys, tuple(tensors), (least, most), looks, call.known)

    def own(self, captures: Mapping[str, Any]) -> dict[str, Any]:
        """The key set's captures."""
        names = () if self.keys is None else self.keys.captures()
        return {name: captures[name] for name in names if name in captures}

    def call(
        self, spec: Spec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_offset: Any, captures: Mapping[str, Any]
    ) -> Call | None:
        """The checked call; None where the offset needs a closer look. InputError for values."""
        if isinstance(q_offset, torch.Tensor):
            q_offset = check_offset(q_offset, q)
        elif not self.offsets[0] <= q_offset <= self.offsets[1]:
            return None
        tensors = {}
        for name, dtype, sizes in self.tensors:
            tensor = captures[name]
            tensor = tensor if dtype is None else tensor.to(dtype)
            tensors[name] = tensor if sizes is None else tensor.expand(sizes)
        call = Call(spec, q, k, v, tensors, numbers_of(spec, captures), q_offset, known=self.stages)
        if self.looks:
            check_indices(call)
        return call
