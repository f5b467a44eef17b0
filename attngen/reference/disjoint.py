"""Whether the pieces of a union attend different pairs: what ATTNGEN_DEBUG=1 looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attngen.errors import InputError
from attngen.language.call import Call
from attngen.language.spec import Spec
from attngen.reference.keysets import attended

SMALL = 2**22  # pairs of a head up to which it is looked at


def check_disjoint(specs: Sequence[Spec], call: Call, given: Mapping[str, Any]) -> None:
    """InputError naming two pieces and a pair that both attend. given: the key sets' captures."""
    if call.q.shape[2] * call.k.shape[2] > SMALL:
        return
    captures = {**call.captures, **call.params, **given}
    with torch.no_grad():
        seen = torch.zeros((*call.q.shape[:3], call.k.shape[2]), dtype=torch.int64, device=call.q.device)
        for number, spec in enumerate(specs):
            names = {*spec.tensors, *spec.params, *(() if spec.keys is None else spec.keys.captures())}
            own = {name: value for name, value in captures.items() if name in names}
            if spec.keys is not None and {*spec.keys.captures()} - {*spec.keys.optional} - {*given}:
                continue  # a preparation came in the place of what it was made from
            mask = attended(spec, call.q, call.k, call.v, call.q_offset, own)
            twice = (seen > 0) & mask
            if twice.any():
                at = twice.nonzero()[0].tolist()
                first = int(seen[tuple(at)]) - 1
                raise InputError(
                    "union", "disjoint pieces", f"pieces {first} and {number} both attend (b, h, i, j) = {at}"
                )
            seen = torch.where(mask & (seen == 0), number + 1, seen)
