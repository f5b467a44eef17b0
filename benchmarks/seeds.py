"""The sparse systems that are measured beside dense attention: their specs, what a call of them needs, and their check.

They compute something else than dense attention, so each is checked against its own float64 oracle, shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

import attngen as ag
from benchmarks.case import FORWARD, TRAINING, Case, System
from benchmarks.check import WrongResult
from benchmarks.work import Inputs

CHECK_LENGTH = 512  # keys of a check
GRAPH_CHECK_LENGTH = 256  # the oracle of graphs goes edge by edge
BLOCK = 128  # queries and keys of a tile of block-sparse attention
LINE = 64  # of a tile of lines and clusters
# Relative Frobenius errors of out and of gradients. Half types round each input and result to their own precision.
LIMITS = {"float32": (1e-5, 1e-4), "float16": (1e-2, 2e-2), "bfloat16": (1e-2, 2e-2)}


@dataclass(frozen=True)
class Ready:
    """A system for given inputs. call(): captures, made anew at each call where making them is part of the measurement.
    k, v: what stands in the inputs' place, if not these. learned: captures that get a gradient.
    """

    spec: ag.Spec
    call: Callable[[], dict[str, Any]] = dict
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    learned: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def _generator(inputs: Inputs) -> torch.Generator:
    return torch.Generator(inputs.q.device).manual_seed(1)


def _mask(inputs: Inputs) -> dict[str, Any]:
    """The spec's own mask, as an argument of ag.Spec: the case's pattern."""
    return {"mask": ag.causal()} if inputs.case.pattern == "causal" else {}


def qk_sparse(system: System, inputs: Inputs) -> Ready:
    """SCFA's dropping of queries and keys, at random (arXiv 2306.01160)."""
    generator, kept = _generator(inputs), 1 - system.setting("dropped") / 100
    keep = (torch.rand(t.shape[:3], generator=generator, device=t.device) < kept for t in (inputs.q, inputs.k))
    captures = dict(zip(("keep_q", "keep_k"), keep, strict=True))
    return Ready(ag.Spec(keys=ag.qk_sparse(), **_mask(inputs)), lambda: captures)


def hash_sparse(system: System, inputs: Inputs, hashing: bool = False) -> Ready:
    """SCFA's attention within hash buckets. Sorting by them is part of a call; making them only with `hashing`."""
    count = system.setting("buckets")

    def buckets() -> dict[str, Any]:
        q_bucket, k_bucket = ag.lsh_buckets(inputs.q, inputs.k, count)
        return {"q_bucket": q_bucket, "k_bucket": k_bucket}

    spec, made = ag.Spec(keys=ag.hash_sparse(count), **_mask(inputs)), buckets()
    return Ready(spec, buckets if hashing else lambda: made)


def hyper(system: System, inputs: Inputs) -> Ready:
    """HyperAttention (arXiv 2310.05869)."""
    block, samples, least = (system.setting(name) for name in ("block", "samples", "min_len"))
    n = inputs.case.n_k
    if n <= CHECK_LENGTH:  # so that the check has all parts
        block, samples, least = min(block, n // 16), min(samples, n // 32), min(least, n // 4)
    return Ready(ag.Spec(keys=ag.hyper(block, samples, least), **_mask(inputs)), lambda: {"seed": 1})


def butterfly(system: System, inputs: Inputs) -> Ready:
    """Block-sparse FlashAttention's layout (arXiv 2205.14135), made and sorted at each call."""
    return Ready(ag.Spec(keys=ag.butterfly(BLOCK), **_mask(inputs)))


def vertical_slash(system: System, inputs: Inputs) -> Ready:
    """Key columns and runs of distances (arXiv 2412.06198), chosen beforehand and not timed."""
    found = _estimate(system, inputs)
    inside = torch.arange(LINE, device=inputs.q.device)
    slash = torch.where(found.band.unsqueeze(-1) < 0, -1, found.band.unsqueeze(-1) * LINE + inside).flatten(2)
    captures = {"vertical": found.vertical, "slash": slash}
    return Ready(ag.Spec(keys=ag.vertical_slash(LINE), **_mask(inputs)), lambda: captures)


def adaptive(system: System, inputs: Inputs) -> Ready:
    """Per head the pattern that an estimate finds; estimating is part of a call."""
    spec = ag.Spec(keys=ag.adaptive(LINE), **_mask(inputs))
    return Ready(spec, lambda: {"estimate": _estimate(system, inputs)})


def _estimate(system: System, inputs: Inputs) -> Any:
    budget = min(system.setting("budget"), max(4 * LINE, inputs.case.n_k // 2))  # a check must leave something out
    return ag.estimate(inputs.q, inputs.k, block=LINE, budget=budget)


def sparse_k(system: System, inputs: Inputs) -> Ready:
    """SPARSEK (arXiv 2406.16747) with random scores, which get a gradient."""
    settings = dict(system.settings)
    u = torch.randn(inputs.k.shape[:3], generator=_generator(inputs), device=inputs.k.device)
    learned = {"u": u.requires_grad_(inputs.case.direction != FORWARD)}
    return Ready(ag.Spec(keys=ag.sparse_k(**settings), **_mask(inputs)), lambda: learned, learned=learned)


def graph(system: System, inputs: Inputs) -> Ready:
    """One graph for all heads (arXiv 2502.01659): half of a node's edges nearby, a quarter dilated by 8, a quarter random."""
    n, degree, device = inputs.case.n_k, system.setting("degree"), inputs.q.device
    near = torch.arange(degree // 2, device=device) - degree // 4
    reach = degree // 4 + 8 * (torch.arange(degree // 8, device=device) + 1)
    nodes = torch.arange(n, device=device).view(-1, 1)
    drawn = torch.randint(0, n, (n, degree // 4), generator=_generator(inputs), device=device)
    keys = torch.cat([nodes + near, nodes + reach, nodes - reach, drawn], 1).sort(-1).values
    there = (keys >= 0) & (keys < n)
    crow = torch.nn.functional.pad(there.sum(-1).cumsum(0), (1, 0))
    captures = {"crow": crow, "col": keys[there].to(torch.int32)}
    return Ready(ag.Spec(keys=ag.graph(), **_mask(inputs)), lambda: captures, notes={"edges": captures["col"].numel()})


def shared_prefix(system: System, inputs: Inputs) -> Ready:
    """Bifurcated attention (arXiv 2403.08845): the first sample's first keys are the context of all."""
    context = inputs.case.n_k - min(system.setting("suffix"), inputs.case.n_k // 2)
    captures = {f"prefix_{name}": t[:1, :, :context].clone() for name, t in (("k", inputs.k), ("v", inputs.v))}
    k, v = (t[:, :, context:].contiguous() for t in (inputs.k, inputs.v))
    return Ready(ag.Spec(keys=ag.shared_prefix()), lambda: captures, k, v)


KEY_SETS: dict[str, Callable[[System, Inputs], Ready]] = {
    "qk_sparse": qk_sparse,
    "hash_sparse": hash_sparse,
    "hash_sparse_hashing": lambda system, inputs: hash_sparse(system, inputs, hashing=True),
    "hyper": hyper,
    "butterfly": butterfly,
    "vertical_slash": vertical_slash,
    "adaptive": adaptive,
    "sparse_k": sparse_k,
    "graph": graph,
    "shared_prefix": shared_prefix,
}


def build(system: System, inputs: Inputs) -> tuple[Callable[[], torch.Tensor], Inputs, dict[str, Any]]:
    """(what computes out, the inputs whose leaves it has, notes for the record)."""
    ready = KEY_SETS[system.key_set](system, inputs)
    own = replace(inputs, leaves={**inputs.leaves, **ready.learned} if inputs.leaves else {})
    attn, k, v = ag.compile(ready.spec), *_keys(ready, inputs)
    notes = {**dict(system.settings), **ready.notes, "pieces": pieces(attn, inputs.q, k, v, ready.call())}
    return lambda: attn(inputs.q, k, v, **ready.call()), own, notes


def pieces(
    attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: dict[str, Any]
) -> list[dict[str, Any]]:
    """What the call consists of: the schedule of each piece, and where it comes from; equal ones once. Runs a forward."""
    found: list[dict[str, Any]] = []
    for step, call in attn.attends(q, k, v, **captures):
        stages = attn.specialiser.of(call)
        one = {"piece": step.name, "schedule": stages.schedule.decided(), "origin": stages.origin}
        if one not in found:
            found.append(one)
    return found


def _keys(ready: Ready, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return (inputs.k if ready.k is None else ready.k), (inputs.v if ready.v is None else ready.v)


def check(system: System, case: Case, device: torch.device) -> float:
    """The same system, shorter and with a backward (but where it decodes), in float32 and in the case's dtype, against its
    oracle: the largest error over what is allowed. Raises WrongResult.
    """
    n = min(case.n_k, GRAPH_CHECK_LENGTH if system.key_set == "graph" else CHECK_LENGTH)
    small = replace(
        case, batch=min(case.batch, 2), heads_q=2 * case.heads_q // case.heads_kv, heads_kv=2, n_q=min(case.n_q, n), n_k=n,
        direction=FORWARD if case.n_q == 1 else TRAINING, peers=(), systems=(), table="", column="",
    )  # fmt: skip
    return max(_checked(system, replace(small, dtype=dtype), device) for dtype in {"float32", case.dtype})


@cache
def _checked(system: System, case: Case, device: torch.device) -> float:
    inputs = Inputs.make(case, device)
    ready = KEY_SETS[system.key_set](system, inputs)
    captures, (k, v) = ready.call(), _keys(ready, inputs)
    leaves = {**inputs.leaves, **ready.learned} if inputs.leaves else {}
    attn = ag.compile(ready.spec)
    with torch.set_grad_enabled(bool(leaves)):
        out = attn(inputs.q, k, v, **captures)
        exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
        floats = {n: t.double() for n, t in captures.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
        given = {"q": inputs.q.double(), "k": k.double(), "v": v.double(), **captures, **floats, **exact}
        with device:  # where the definitions make tensors of their own
            want, _ = ag.oracle(ready.spec, **given)
        pairs = {"out": (out, want)}
        if leaves:
            grads = torch.autograd.grad(out, list(leaves.values()), inputs.d_out)
            wanted = torch.autograd.grad(want, list(exact.values()), inputs.d_out.double())
            pairs |= {f"gradient of {n}": both for n, both in zip(leaves, zip(grads, wanted, strict=True), strict=True)}
    worst = 0.0
    for name, (got, expected) in pairs.items():
        got, expected = got.detach().double(), expected.detach()
        error = float((got - expected).norm() / expected.norm()) / LIMITS[case.dtype][name != "out"]
        if not error <= 1:  # nan too
            raise WrongResult(f"{name} of {system.name} at N {case.n_k} in {case.dtype}", error)
        worst = max(worst, error)
    return worst


def check_finite(out: torch.Tensor, grads: dict[str, torch.Tensor]) -> None:
    """WrongResult if something at full length is no number: the least that can be asked where no oracle fits."""
    for name, tensor in {"out": out, **grads}.items():
        if not bool(tensor.isfinite().all()):
            raise WrongResult(f"{name} at full length", torch.inf)
