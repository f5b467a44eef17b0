"""The cases of tests/gpu_smoke.py by name, those that never ran on a GPU first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import attngen as ag
from attngen.language.call import bind
from attngen.language.schedule import Tile
from tests.backends.test_gpu import SMALL, Place
from tests.backends.test_gpu import key_set as sorted_keys
from tests.backends.test_gpu_schedules import FORMS, need_descriptors
from tests.backends.test_gpu_schedules import key_set as listed_keys
from tests.check import check, relative
from tests.gpu_small_cases import on

BATCH, HEADS, KV = 2, 4, 2
Run = Callable[[Place, torch.dtype], float]  # the largest error over what is allowed; raises where that is above 1
Captures = Callable[[int, int], dict[str, Any]]  # of the numbers of queries and keys


@dataclass(frozen=True)
class Case:
    """A call and its gradients, of lengths that are no multiple of a tile. schedule: None for what a user gets; hopper: what that
    has to be on sm_90 for the case's name to be true; launch: the kernel of the backward that the name speaks of.
    """

    spec: ag.Spec
    captures: Captures = lambda n_q, n_k: {}
    schedule: ag.Schedule | None = None
    d: int = 64
    dv: int | None = None
    n_q: int | None = None
    q_offset: int = 0
    backward: bool = True
    dtype: torch.dtype | None = None
    hopper: dict[str, Any] = field(default_factory=dict)
    launch: str = ""

    def __call__(self, place: Place, dtype: torch.dtype) -> float:
        n_q, n_k = (517, 645) if place.real else (45, 52)
        dims = (self.d, self.dv or self.d) if place.real else (24, 16) if self.dv else (16, 16)
        captures = on(place.device, self.captures(n_q, n_k))
        inputs = place.qkv(self.dtype or dtype, *dims, n_q=self.n_q or n_q, n_k=n_k, heads=HEADS, kv=KV)
        need_descriptors(place, self.schedule or ag.Schedule())
        schedule = self.schedule if place.real else SMALL if self.schedule is None else self.schedule.over(SMALL)
        attn = place.attention(self.spec, schedule)
        self._named_rightly(place, attn, inputs, captures)
        with contextlib.nullcontext() if self.backward else torch.no_grad():
            return check(self.spec, attn, *inputs, captures, q_offset=self.q_offset, backward=self.backward)

    def _named_rightly(self, place: Place, attn: Any, inputs: list[torch.Tensor], captures: dict[str, Any]) -> None:
        if self.launch:
            leaves = {n: t.detach().requires_grad_() if t.is_floating_point() else t for n, t in captures.items()}
            explained = attn.explain(*(t.detach().requires_grad_() for t in inputs), **leaves)
            launches = [line for line in explained.splitlines() if line.startswith("  backward: delta")]
            assert len(launches) == 1 and f", {self.launch}" in launches[0], f"no {self.launch} among {launches}"
        if self.hopper and place.real and torch.cuda.get_device_capability()[0] == 9:
            chosen = attn.specialiser.of(bind(self.spec, *inputs, captures=captures)).schedule.decided()
            got = {name: chosen.get(name) for name in self.hopper}
            assert got == self.hopper, f"expected {self.hopper} by default, got {got}"


# -- captures ---------------------------------------------------------------------------------------------------------


def normal(*size: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def documents(n_q: int, n_k: int) -> dict[str, Any]:
    """Of 1 to 211 positions."""
    ids = torch.repeat_interleave(torch.arange(7), torch.tensor([150, 1, 2, 128, 67, 211, 200])).int()
    return {"doc": ids[: max(n_q, n_k)].repeat(BATCH, 1)}


def slopes(n_q: int, n_k: int) -> dict[str, Any]:
    return {"slope": torch.linspace(0.02, 0.2, HEADS)}


def lengths(n_q: int, n_k: int) -> dict[str, Any]:
    """One sequence without a key, one of nearly all."""
    return {"length": torch.tensor([0, n_k - 7], dtype=torch.int32)}


def bias(*size: int | str) -> Captures:
    """size: a number, or "q" or "k" for how many queries or keys there are."""
    return lambda n_q, n_k: {"bias": normal(*({"q": n_q, "k": n_k}.get(str(s)) or int(s) for s in size))}


# -- what needs more than a call ----------------------------------------------------------------------------------------


def poisoned(*where: str) -> Run:
    """Values that are not finite in one row of q, k, v or do: what doesn't depend on that row is as without."""

    def run(place: Place, dtype: torch.dtype) -> float:
        n, width, d = (517, 100, 64) if place.real else (52, 10, 16)
        rows, at = torch.arange(n), n // 2
        q, k, v = place.qkv(dtype, d, d, n_q=n, n_k=n, heads=HEADS, kv=KV)
        sees = ((rows >= at) & (rows < at + width)).to(q.device)
        seen = ((rows <= at) & (rows > at - width)).to(q.device)
        itself = (rows == at).to(q.device)
        lost = sees if "k" in where else itself if "q" in where else torch.zeros_like(itself)
        tensors = {"q": q, "k": k, "v": v, "do": normal(*q.shape).to(q.device, dtype)}
        tensors["do"][:, :, lost] = 0.0  # what is lost must not come back through its own row
        attn = place.attention(ag.Spec(mask=ag.causal() & ag.window(width)), None if place.real else SMALL)

        def out_and_gradients() -> list[torch.Tensor]:
            leaves = [tensors[name].detach().clone().requires_grad_() for name in "qkv"]
            out = attn(*leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves, tensors["do"])]

        want = out_and_gradients()
        for name in where:
            tensors[name][:, :, at] = torch.nan
        got = out_and_gradients()
        kept = [~lost, ~lost & ~itself, *([] if "k" in where else [~seen, ~seen])]  # rows of out, dq, dk, dv
        error = max(relative(a[:, :, r], b[:, :, r].double()) for a, b, r in zip(got, want, kept, strict=False))
        assert error <= 1e-3, f"rows that don't depend on it changed by {error:.1e}"
        assert not lost.any() or not got[0][:, :, lost].isfinite().any(), "rows that attend it have numbers"
        return error / 1e-3

    return run


def pages(place: Place, dtype: torch.dtype) -> float:
    """Keys and values behind a page table, split."""
    q = place.qkv(dtype, n_q=3)[0]
    k, v = (normal(12, KV, 16, q.shape[3], seed=seed).to(q.device, dtype) for seed in (4, 5))
    table = torch.randperm(12, generator=torch.Generator().manual_seed(6)).view(2, 6).to(q.device, torch.int32)
    spec = ag.Spec(mask=ag.causal() & ag.window(40), page_size=16)
    with torch.no_grad():
        attn = place.attention(spec, ag.Schedule(split=2))
        return check(spec, attn, q, k, v, dict(page_table=table), q_offset=80, backward=False)


def graph(place: Place, dtype: torch.dtype) -> float:
    """A CUDA graph of a forward and its backward, whose descriptors take memory at each launch, replayed with other values."""
    place.need_gpu()
    leaves = [t.requires_grad_() for t in place.qkv(dtype, 64, 64, n_q=517, n_k=645)]
    attn, do = place.attention(CAUSAL), torch.ones_like(leaves[0])

    def once() -> list[torch.Tensor]:
        out = attn(*leaves)
        return [out, *torch.autograd.grad(out, leaves, do)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        replayed = once()
    with torch.no_grad():
        for tensor in leaves:
            tensor.normal_()
    captured.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(replayed, once(), strict=True)), "a replay differs from a call"
    return 0.0


def keys_of(name: str) -> Run:
    """The kernels of a key set. There is no plain PyTorch of it to compare with: half types are held to what rounding is."""

    def run(place: Place, dtype: torch.dtype) -> float:
        n = 130 if place.real else 30
        spec, captures = (listed_keys if name in LISTED else sorted_keys)(name, n)
        captures = {key: t.to(dtype) if key.startswith("prefix_") else t for key, t in captures.items()}
        leaves = [t.requires_grad_() for t in place.qkv(dtype, n_q=n, n_k=n)]
        results = []
        for function in (place.attention(spec), lambda *a, **c: ag.oracle(spec, *a, **c)[0]):
            out = function(*leaves, **on(place.device, captures))
            results.append([out.detach(), *torch.autograd.grad(out.double().square().sum(), leaves)])
        error = max(relative(a, b.double()) for a, b in zip(*results, strict=True))
        allowed = {torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
        assert error <= allowed, f"relative error {error:.1e} > {allowed:.0e}"
        return error / allowed

    return run


# -- the cases ----------------------------------------------------------------------------------------------------------

CAUSAL = ag.Spec(mask=ag.causal())
SLOPES = ag.Spec(mask=ag.causal(), score=ag.alibi())
RAGGED = ag.Spec(mask="j < length[b] and i >= j", tensors=[ag.Tensor("length", 1, "int")])
LISTED = ("block_sparse", "gather", "graph", "shared_prefix")
SORTED = ("hash_sparse", "hyper", "sparse_k")
WIDE = {"dkv_tma": True, "dkv_separate_sums": True, "dkv_disable_licm": True}


def biased(kind: str) -> ag.Spec:
    return ag.Spec(mask=ag.causal(), score=ag.bias(kind))


def decode(**schedule: Any) -> Case:
    made = ag.Schedule(**schedule) if schedule else None
    return Case(RAGGED, lengths, made, n_q=1, q_offset=600, backward=False)


CASES: dict[str, Run] = {
    "causal d128, descriptors in dkv by default": Case(CAUSAL, d=128, hopper={"dkv_tma": True}),
    "causal d64 by default": Case(CAUSAL),
    "causal d64, descriptors in dkv": Case(CAUSAL, schedule=ag.Schedule(dkv=Tile(64, 128, 8, 2, tma=True))),
    "descriptors in forward, dq and dkv, gradients stored by them": Case(
        ag.Spec(mask=ag.causal(), score=ag.soft_cap(20.0)), schedule=FORMS["tma"]
    ),
    "separate_sums d128": Case(CAUSAL, schedule=FORMS["separate sums"], d=128),
    "separate_sums, descriptors, disable_licm d64": Case(CAUSAL, schedule=FORMS["sparing registers"]),
    "backward d192 by default": Case(CAUSAL, d=192, hopper=WIDE),
    "backward d256 by default": Case(CAUSAL, d=256, hopper=WIDE),
    "guarded second launch: nan in k and v": poisoned("k", "v"),
    "guarded second launch: nan in q": poisoned("q"),
    "guarded second launch: nan in dO": poisoned("do"),
    "gradient of slopes inside dq": Case(SLOPES, slopes, launch="dq + slope"),
    "gradient of a bias of every pair inside dq d128": Case(
        biased("bhij"), bias(BATCH, HEADS, "q", "k"), d=128, launch="dq + bias"
    ),
    "gradient of a bias that batches share inside dq": Case(biased("hij"), bias(HEADS, "q", "k"), launch="dq + bias"),
    "gradient of a bias of keys inside dkv": Case(biased("j"), bias("k"), launch="dkv + bias"),
    "gradient of a table of relative positions inside dq": Case(
        ag.Spec(mask=ag.causal(), score=ag.t5_bias(max_distance=40)),
        lambda n_q, n_k: {"rel_bias": normal(32, HEADS)},
        launch="dq + rel_bias",
    ),
    "gradient of a bias that heads share, a kernel of its own": Case(
        biased("ij"), bias("q", "k"), launch="gradient of bias"
    ),
    "persistent, longest first": Case(CAUSAL, schedule=FORMS["persistent"].over(FORMS["longest first"])),
    "persistent, longest first, descriptors d128": Case(
        CAUSAL, schedule=FORMS["tma, persistent, longest first"], d=128
    ),
    "warps of different roles, forward": Case(
        ag.Spec(score=ag.soft_cap(20.0)),
        schedule=ag.Schedule(tma=True, warp_specialize=True, num_warps=4),
        backward=False,
    ),
    "CUDA graph of forward and backward": graph,
    "full d128": Case(ag.Spec(), d=128),
    "window d128": Case(ag.Spec(mask=ag.causal() & ag.window(100)), d=128),
    "causal documents d128": Case(ag.Spec(mask=ag.documents() & ag.causal()), documents, d=128),
    "prefix-LM": Case(ag.Spec(mask=ag.prefix_lm(77))),
    "window or global tokens": Case(ag.Spec(mask=(ag.window(30) | ag.global_tokens(5)) & ag.causal())),
    "dilated window": Case(ag.Spec(mask=ag.dilated_window(40, 5))),
    "lengths, one of them 0": Case(RAGGED, lengths),
    "soft cap and slopes d128": Case(ag.Spec(mask=ag.causal(), score=[ag.soft_cap(20.0), ag.alibi()]), slopes, d=128),
    "sink and dropout": Case(
        ag.Spec(mask=ag.causal(), sink=ag.sink(), dropout=0.2), lambda n_q, n_k: dict(sink=torch.ones(HEADS), seed=3)
    ),
    "d192 with values of 128": Case(CAUSAL, d=192, dv=128),
    "d40 with values of 24": Case(CAUSAL, d=40, dv=24),
    "float32, not tf32": Case(CAUSAL, dtype=torch.float32),
    "decode by default": decode(),
    "decode, packed and split": decode(split=4, pack=True),
    "decode, packed, stream-K": decode(split="stream", pack=True),
    "decode behind pages": pages,
    **{f"key set {name}": keys_of(name) for name in (*LISTED, *SORTED)},
}
