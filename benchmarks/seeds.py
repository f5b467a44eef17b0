"""The systems that attngen has to express, at their authors' sizes, against dense causal attention on the same inputs.

They compute something else than dense attention, so the ratio says what dropping pairs gains, preparation included; each is
checked against its own float64 oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import attngen as ag
from benchmarks.cases import TRAINING, Case
from benchmarks.check import Reference, WrongResult
from benchmarks.measure import (
    FAILED,
    OK,
    Context,
    Record,
    candidate,
    clean,
    describe,
    failure,
    named,
    results,
    with_ratio,
)
from benchmarks.peers import Built
from benchmarks.timing import race
from benchmarks.work import Inputs

CHECK_LENGTH = 1024  # of the dense check
BLOCK = 128  # queries and keys of a tile of block-sparse attention
LIMITS = {"out": 1e-5, "gradient": 1e-4}


def qk_sparse(case: Case, q: torch.Tensor, k: torch.Tensor) -> tuple[ag.Spec, dict[str, Any]]:
    """SCFA's dropping of queries and keys, at random (arXiv 2306.01160)."""
    generator = torch.Generator(q.device).manual_seed(1)
    keep = (torch.rand(t.shape[:3], generator=generator, device=q.device) < case.setting("kept") for t in (q, k))
    return ag.Spec(keys=ag.qk_sparse(), mask=ag.causal()), dict(zip(("keep_q", "keep_k"), keep, strict=True))


def hash_sparse(case: Case, q: torch.Tensor, k: torch.Tensor) -> tuple[ag.Spec, dict[str, Any]]:
    """SCFA's attention within hash buckets; the hashing is not timed, sorting by it is."""
    q_bucket, k_bucket = ag.lsh_buckets(q.detach(), k.detach(), case.setting("buckets"))
    spec = ag.Spec(keys=ag.hash_sparse(case.setting("buckets")), mask=ag.causal())
    return spec, {"q_bucket": q_bucket, "k_bucket": k_bucket}


def hyper(case: Case, q: torch.Tensor, k: torch.Tensor) -> tuple[ag.Spec, dict[str, Any]]:
    """Causal HyperAttention with its authors' block and samples (arXiv 2310.05869)."""
    block, samples, least = 256, 256, case.setting("min_len")
    if case.n_k <= CHECK_LENGTH:  # so that the check has all parts
        block, samples, least = 64, 32, CHECK_LENGTH // 4
    return ag.Spec(keys=ag.hyper(block, samples, least), mask=ag.causal()), {"seed": 1}


def block_sparse(case: Case, q: torch.Tensor, k: torch.Tensor) -> tuple[ag.Spec, dict[str, Any]]:
    """A random share of the tiles under the diagonal and those on it, other ones for each head (arXiv 2205.14135); making
    the lists from this layout is timed.
    """
    tiles = -(-case.n_q // BLOCK)
    generator = torch.Generator(q.device).manual_seed(1)
    layout = torch.rand(1, case.heads_q, tiles, tiles, generator=generator, device=q.device) < case.setting("live")
    layout |= torch.eye(tiles, dtype=torch.bool, device=q.device)
    return ag.Spec(keys=ag.block_sparse(BLOCK), mask=ag.causal()), {"layout": layout}


KEY_SETS: dict[str, Callable[[Case, torch.Tensor, torch.Tensor], tuple[ag.Spec, dict[str, Any]]]] = {
    "qk_sparse": qk_sparse,
    "hash_sparse": hash_sparse,
    "hyper": hyper,
    "block_sparse": block_sparse,
}


def seeds(case: Case, peers: tuple[str, ...], context: Context) -> Iterator[Record]:
    """Time of attention alone; attngen is the sparse one, all others are dense and causal ("attngen-dense": attngen's)."""
    inputs = Inputs.make(replace(case, pattern="causal", settings=()), context.device)
    reference = Reference(inputs) if set(peers) != {"attngen"} else None
    ready: dict[str, tuple[Built, float]] = {}
    for peer in peers:
        context.starting(peer)
        try:
            if peer == "attngen":
                ready[peer] = sparse(case, inputs), check(case, context.device)
                results(ready[peer][0].run, inputs)
            else:
                assert reference is not None
                built = named(context.peers, peer.removesuffix("-dense"))(inputs)
                ready[peer] = built, reference.error(*results(built.run, inputs))
        except Exception as error:
            ready.pop(peer, None)
            yield failure(case, peer, error)
    context.starting("")
    candidates = {peer: candidate(built.run, inputs) for peer, (built, _) in ready.items()}
    timings, failed = race(candidates, context.stopwatch, context.seconds, clock=context.clock)
    for peer, reason in failed.items():
        yield Record(case.id, peer, FAILED, clean(reason), described=describe(case))
    yield from with_ratio(
        Record(
            case.id, peer, OK, error=ready[peer][1], timing=timing, figure=1e3 * timing.median, unit="ms",
            notes=ready[peer][0].notes, described=describe(case),
        )
        for peer, timing in timings.items()
    )  # fmt: skip


def sparse(case: Case, inputs: Inputs) -> Built:
    """The key set's attention on these inputs."""
    spec, captures = KEY_SETS[case.pattern](case, inputs.q, inputs.k)
    attn = ag.compile(spec)
    return Built(lambda: attn(inputs.q, inputs.k, inputs.v, **captures))


def check(case: Case, device: torch.device) -> float:
    """The same key set, shorter and in float32, against its oracle: the largest error over what is allowed."""
    n = min(case.n_k, CHECK_LENGTH)
    small = replace(
        case, batch=1, heads_q=2, heads_kv=2, n_q=n, n_k=n, dtype="float32", direction=TRAINING, pattern="causal"
    )
    inputs = Inputs.make(replace(small, settings=()), device)
    spec, captures = KEY_SETS[case.pattern](replace(small, settings=case.settings), inputs.q, inputs.k)
    attn = ag.compile(spec)
    out, grads = results(lambda: attn(inputs.q, inputs.k, inputs.v, **captures), inputs)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.leaves.items()}
    want, _ = ag.oracle(spec, exact["q"], exact["k"], exact["v"], **captures)
    wanted = torch.autograd.grad(want, list(exact.values()), inputs.d_out.double())
    worst = 0.0
    for name, got, expected in zip(("out", *exact), (out, *grads.values()), (want.detach(), *wanted), strict=True):
        allowed = LIMITS["out" if name == "out" else "gradient"]
        error = float((got.double() - expected).norm() / expected.norm()) / allowed
        if not error <= 1:
            raise WrongResult(f"{name} at N {n} in float32", error)
        worst = max(worst, error)
    return worst
