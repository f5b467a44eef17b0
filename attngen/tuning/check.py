"""Is an implementation right? Its result against dense float64 attention, by the project's rules, before it is timed.

float32: relative Frobenius error at most 1e-5 for out, 1e-4 for gradients. Half types: the largest error at most twice
(gradients three times) that of plain PyTorch in the same dtype on the same inputs. Looked at are the first and the last
batch and key/value head: for the forward a few runs of query rows against all their keys, for the backward all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from sympy import Dummy

from attngen.language.expression import B, H, loads
from attngen.language.spec import Spec
from attngen.reference.dense import plain
from attngen.reference.oracle import oracle

ROWS = 16  # queries in each sampled run
CHUNK_ELEMENTS = 2**26  # of the float64 matrix held at once
ALL_PAIRS = 2**31  # pairs of a head beyond which the backward looks at one head only

Results = dict[str, torch.Tensor]


class WrongResult(Exception):
    """A result is off by `error` times what is allowed."""

    def __init__(self, name: str, error: float):
        super().__init__(f"{name} is off by {error:.3g} times what is allowed")
        self.error = error


@dataclass(frozen=True)
class Group:
    """One batch and the query heads of one key/value head."""

    batch: int
    head: int  # of k and v
    heads: slice  # of q

    @property
    def label(self) -> str:
        return f"batch {self.batch}, key head {self.head}"


def _numbers_heads(spec: Spec) -> bool:
    """Whether it reads the number of a batch or a head elsewhere than as a plain index of captured data."""
    plain = {load: Dummy() for load in loads(spec.expressions) if not {B, H} & _inside(load)}
    return bool({B, H} & spec.expressions.xreplace(plain).free_symbols)


def _inside(load: Any) -> set[Any]:
    """What the indices that are no plain symbol read."""
    return set().union(*(index.free_symbols for index in load.indices if index not in (B, H)))


class Problem(Protocol):
    """A call: q [B, Hq, Nq, D], k and v [B, Hkv, Nk, D], d_out like the result, captures by name; backward: whether gradients are
    looked at; learned: captures that have one.
    """

    @property
    def spec(self) -> Spec: ...
    @property
    def q(self) -> torch.Tensor: ...
    @property
    def k(self) -> torch.Tensor: ...
    @property
    def v(self) -> torch.Tensor: ...
    @property
    def d_out(self) -> torch.Tensor: ...
    @property
    def captures(self) -> Mapping[str, Any]: ...
    @property
    def q_offset(self) -> int: ...
    @property
    def backward(self) -> bool: ...
    @property
    def learned(self) -> tuple[str, ...]: ...


class Reference:
    """What results must be, worked out once for a call; `error` compares one implementation's with it."""

    def __init__(self, inputs: Problem):
        self.inputs, self.backward = inputs, inputs.backward
        self.ratio, self.n_q, self.n_k = inputs.q.shape[1] // inputs.k.shape[1], inputs.q.shape[2], inputs.k.shape[2]
        self.half = inputs.q.dtype in (torch.float16, torch.bfloat16)
        self.want: list[Results] = []
        self.allowed: list[Mapping[str, float]] = []
        for group in self.groups():
            exact = self._compute(group, oracle, torch.float64)
            rounded = self._compute(group, plain, inputs.q.dtype) if self.half else {}
            self.want.append(exact)
            self.allowed.append({name: self._allowed(name, exact, rounded) for name in exact})

    def groups(self) -> list[Group]:
        """The sampled heads: the first and the last; learned captures are summed over batches, so they want all."""
        last = self.inputs.k.shape[0] - 1, self.inputs.k.shape[1] - 1
        ends = {(0, 0), last}
        if self.backward and self.n_q * self.n_k * self.ratio > ALL_PAIRS:
            ends = {last}
        if _numbers_heads(self.inputs.spec):  # the oracle of a part of them counts from 0
            ends = {(0, 0)}
        if self.backward and self.inputs.learned and last[0]:
            raise ValueError("a learned capture is checked at batch 1 only")
        return [Group(b, h, slice(h * self.ratio, (h + 1) * self.ratio)) for b, h in sorted(ends)]

    def error(self, out: torch.Tensor, grads: Results) -> float:
        """The largest error over what is allowed, at most 1. out: [B, Hq, Nq, D]; grads by name. Raises WrongResult."""
        worst = 0.0
        for group, want, allowed in zip(self.groups(), self.want, self.allowed, strict=True):
            for name, expected in want.items():
                got = self._part(name, group, {"out": out, **grads}[name].detach())
                relative = self._difference(got, expected) / allowed[name] if got.shape == expected.shape else torch.inf
                if not relative <= 1:  # nan too
                    what = name if name == "out" else f"gradient of {name}"
                    raise WrongResult(f"{what} ({group.label})", relative)
                worst = max(worst, relative)
        return worst

    # -- the reference ------------------------------------------------------------------------------------------------

    def _compute(self, group: Group, reference: Callable[..., Any], dtype: torch.dtype) -> Results:
        """out of the sampled rows, or of all rows with the gradients, over chunks of rows so that memory stays bounded."""
        inputs, one = self.inputs, slice(group.batch, group.batch + 1)
        keys = slice(group.head, group.head + 1)
        given = {"q": inputs.q[one, group.heads], "k": inputs.k[one, keys], "v": inputs.v[one, keys]}
        captures = self._captures(group)
        learned = {name: captures[name] for name in inputs.learned}
        leaves = {n: t.detach().to(dtype).requires_grad_(self.backward) for n, t in {**given, **learned}.items()}
        captures |= {name: leaves[name] for name in learned}
        outs, totals = [], {n: torch.zeros_like(t, dtype=torch.float64) for n, t in leaves.items()}
        for rows in self._rows(leaves["q"].shape[1]):
            q = leaves["q"][:, :, rows]
            with torch.set_grad_enabled(self.backward):
                out, _ = reference(
                    inputs.spec, q, leaves["k"], leaves["v"], q_offset=inputs.q_offset + rows.start, **captures
                )
            outs.append(out.detach())
            if self.backward:
                seed = inputs.d_out[one, group.heads, rows].to(out.dtype)
                for name, grad in zip(leaves, torch.autograd.grad(out, list(leaves.values()), seed), strict=True):
                    totals[name] += grad
        return {"out": torch.cat(outs, 2), **(totals if self.backward else {})}

    def _captures(self, group: Group) -> dict[str, Any]:
        """The captures of that batch and those heads: the oracle numbers both from 0."""
        spec, captures = self.inputs.spec, dict(self.inputs.captures)
        for name, dims in spec.plain_dims.items():
            for dim, axis in dims:
                if axis in "bh" and captures[name].shape[dim] > 1:
                    start, stop = (
                        (group.batch, group.batch + 1) if axis == "b" else (group.heads.start, group.heads.stop)
                    )
                    captures[name] = captures[name].narrow(dim, start, stop - start)
        return captures

    def _rows(self, heads: int) -> Iterator[slice]:
        n_q, n_k = self.n_q, self.n_k
        if self.inputs.spec.reads_rows:  # a few rows of a call are other rows of a call of their own
            yield slice(0, n_q)
            return
        if not self.backward:
            for start in sorted({0, max(0, n_q // 2 - 5), max(0, n_q - ROWS)}):
                yield slice(start, min(n_q, start + ROWS))
            return
        step = max(1, CHUNK_ELEMENTS // (heads * n_k))
        for start in range(0, n_q, step):
            yield slice(start, min(n_q, start + step))

    def _part(self, name: str, group: Group, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a whole result that `want` holds."""
        one = slice(group.batch, group.batch + 1)
        if name == "out":
            heads = tensor[one, group.heads]
            return torch.cat([heads[:, :, rows] for rows in self._rows(heads.shape[1])], 2)
        if name == "q":
            return tensor[one, group.heads]
        if name in ("k", "v"):
            return tensor[one, group.head : group.head + 1]
        for dim, axis in self.inputs.spec.plain_dims[name]:
            if axis == "h" and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, group.heads.start, group.heads.stop - group.heads.start)
        return tensor

    def _allowed(self, name: str, exact: Results, rounded: Results) -> float:
        if not self.half:
            return 1e-5 if name == "out" else 1e-4
        base = self._difference(rounded[name], exact[name])
        # Below the dtype's resolution at the result's own size there is nothing to compare.
        floor = torch.finfo(self.inputs.q.dtype).eps * float(exact[name].abs().max()) + 1e-30
        return max((2.0 if name == "out" else 3.0) * base, floor)

    def _difference(self, got: torch.Tensor, expected: torch.Tensor) -> float:
        difference = got.double() - expected
        if not difference.isfinite().all():
            return torch.inf
        if self.half:
            return float(difference.abs().max())
        norm = float(torch.linalg.vector_norm(expected))
        return float(torch.linalg.vector_norm(difference)) / (norm or 1.0)
