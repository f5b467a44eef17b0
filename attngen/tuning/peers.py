"""What computes the same attention as a spec, beside attngen: SDPA and FlexAttention, each as its user would call it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from attngen.language.call import Call, bind
from attngen.language.expression import B, H, S
from attngen.language.patterns import causal
from attngen.language.programs import evaluate, tensor_of
from attngen.language.spec import Spec
from attngen.plan.keysets.ragged import LENGTHS
from attngen.reference.dense import dense_env
from attngen.runtime.attention import compile as compile_spec
from attngen.tuning.bench import Inputs
from attngen.tuning.flex_mods import mask_mod, score_mod

MOST_ELEMENTS = 2**30  # of a dense mask
CAUSAL = Spec(mask=causal()).mask


class Unavailable(Exception):
    """This peer cannot do this; the message says why."""


@dataclass(frozen=True)
class Problem:
    """A call to compare on: its spec, without a key set, pages or dropout; its inputs; whether its backward is looked at."""

    spec: Spec
    inputs: Inputs
    backward: bool
    learned: tuple[str, ...] = ()

    @property
    def q(self) -> torch.Tensor:
        return self.inputs.q

    @property
    def k(self) -> torch.Tensor:
        return self.inputs.k

    @property
    def v(self) -> torch.Tensor:
        return self.inputs.v

    @property
    def d_out(self) -> torch.Tensor:
        return self.inputs.d_out

    @property
    def captures(self) -> dict[str, Any]:
        return self.inputs.captures

    @property
    def q_offset(self) -> int:
        return int(self.inputs.q_offset)

    @property
    def call(self) -> Call:
        """Of a spec without a key set. InputError."""
        return bind(self.spec, self.q, self.k, self.v, q_offset=self.q_offset, captures=self.captures)


@dataclass(frozen=True)
class Built:
    """Ready to run. note: how it does it, if that needs saying."""

    run: Callable[[], torch.Tensor]
    note: str = ""


def attngen(problem: Problem, db: str | None = None) -> Built:
    """As a user calls it: with tuned records where the database has them."""
    attention = compile_spec(problem.spec, db=db)
    return Built(lambda: problem.inputs.run(attention))


def sdpa(problem: Problem, db: str | None = None) -> Built:
    """scaled_dot_product_attention with whatever backend it picks. A dense mask or bias is made beforehand, and not timed. Unavailable
    where it cannot express the spec.
    """
    spec, q, k, v = problem.spec, problem.q, problem.k, problem.v
    _no_lengths(problem, "SDPA")
    if spec.sink is not None:
        raise Unavailable("SDPA has no sinks")
    if S in (spec.score - S).free_symbols:
        raise Unavailable("SDPA has no scores but what is added to the logits")
    arguments: dict[str, Any] = {"scale": spec.scale_for(q.shape[3]), "enable_gqa": q.shape[1] != k.shape[1]}
    if spec.score == S and spec.mask == True:  # noqa: E712 (a sympy value)
        return Built(lambda: F.scaled_dot_product_attention(q, k, v, **arguments))
    if spec.score == S and spec.mask == CAUSAL and q.shape[2] == k.shape[2] and problem.q_offset == 0:
        return Built(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, **arguments), "is_causal")
    mask = _dense(problem)
    if mask.dtype == torch.bool and bool(mask.all()):  # as when decoding
        return Built(lambda: F.scaled_dot_product_attention(q, k, v, **arguments), "every pair attends: no mask")
    note = f"a dense {'mask' if mask.dtype == torch.bool else 'bias'} of {_mib(mask)}, not timed"
    return Built(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **arguments), note)


def _dense(problem: Problem) -> torch.Tensor:
    """The mask bool, or with a bias in q's dtype, [B or 1, H or 1, Nq, Nk]. Unavailable where it would be too large."""
    spec, call, device = problem.spec, problem.call, problem.q.device
    sizes = tuple(
        size if axis in spec.expressions.free_symbols else 1
        for axis, size in ((B, problem.q.shape[0]), (H, problem.q.shape[1]))
    )
    sizes = (*sizes, problem.q.shape[2], problem.k.shape[2])
    if math.prod(sizes) > MOST_ELEMENTS:
        raise Unavailable(f"its dense mask would have {math.prod(sizes) / 2**30:.1f} Gi elements")
    env = dense_env(call, torch.float32)
    env = {**env, "b": env["b"][: sizes[0]], "h": env["h"][:, : sizes[1]]}

    def dense(expr: Any) -> torch.Tensor:
        return torch.broadcast_to(tensor_of(evaluate(expr, env), device), sizes)

    mask = dense(spec.mask)
    if spec.score == S:
        return mask.contiguous()
    return dense(spec.score - S).to(problem.q.dtype).masked_fill(~mask, -torch.inf)


def flex(problem: Problem, db: str | None = None) -> Built:
    """FlexAttention through torch.compile for exactly these sizes; its block mask is made beforehand and not timed. Unavailable where it
    cannot express the spec.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    spec, q, k, v = problem.spec, problem.q, problem.k, problem.v
    _no_lengths(problem, "FlexAttention")
    if q.device.type == "cpu" and problem.backward:
        raise Unavailable("FlexAttention has no backward on a CPU")
    if q.device.type == "cpu" and spec.sink is not None:
        raise Unavailable("FlexAttention gives no lse on a CPU, which sinks need")
    given = problem.captures, problem.q_offset, q.device
    mask, score = mask_mod(spec, *given), score_mod(spec, *given)
    arguments: dict[str, Any] = {
        "score_mod": score, "scale": spec.scale_for(q.shape[3]), "enable_gqa": q.shape[1] != k.shape[1],
    }  # fmt: skip
    if mask is not None:
        batch, heads = (
            size if axis in spec.mask.free_symbols else None for axis, size in ((B, q.shape[0]), (H, q.shape[1]))
        )
        compiled = q.shape[2] * k.shape[2] > 2**28  # else it makes a dense mask on the way
        arguments["block_mask"] = create_block_mask(
            mask, batch, heads, q.shape[2], k.shape[2], device=q.device, _compile=compiled
        )
    function = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    if spec.sink is None:
        return Built(lambda: function(q, k, v, **arguments), "its block mask is not timed" if mask else "")
    sink = evaluate(spec.sink, dense_env(problem.call, torch.float32))
    arguments["return_lse"] = True

    def run() -> torch.Tensor:
        out, lse = function(q, k, v, **arguments)
        return with_sinks(out, lse, sink)

    return Built(run, "sinks by its lse, in torch")


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sink: Any) -> torch.Tensor:
    """out [B, H, Nq, Dv] with one more logit in the softmax's denominator, which lse [B, H, Nq] is the log of. sink: a number, or a
    tensor that broadcasts to [B, H, Nq, 1].
    """
    return (out * torch.sigmoid(lse.unsqueeze(-1) - sink)).to(out.dtype)


def _no_lengths(problem: Problem, name: str) -> None:
    """Unavailable for ragged batches, which only attngen has."""
    if any(length in problem.captures for length in LENGTHS if length not in problem.spec.tensors):
        raise Unavailable(f"{name} takes no lengths")


def _mib(tensor: torch.Tensor) -> str:
    return f"{tensor.numel() * tensor.element_size() / 2**20:.3g} MiB"


PEERS: Mapping[str, Callable[[Problem, str | None], Built]] = {"attngen": attngen, "SDPA": sdpa, "FlexAttention": flex}
