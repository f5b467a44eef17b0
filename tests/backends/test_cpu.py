"""The CPU backend against a dense float64 reference written here from the definition, with masks and scores in plain torch."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import attngen as ag
from attngen.backends.cpu import backward as cpu_backward
from attngen.backends.cpu import forward as cpu_forward
from attngen.backends.cpu import kernels as cpu_kernels
from attngen.backends.cpu import parallel as cpu_parallel
from attngen.backends.cpu import tiles as cpu_tiles
from attngen.backends.cpu.work import Work
from tests.strategies import Case, by_torch, cases


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    score: Any = None,
    sink: torch.Tensor | None = None,
    offset: Any = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """mask(b, h, i, j) and score(s, b, h, i, j) get int64 positions that broadcast over [B, Hq, Nq, Nk]; sink [Hq]."""
    batch, heads, n_q, head_dim = q.shape
    group = heads // k.shape[1]
    b = torch.arange(batch).view(-1, 1, 1, 1)
    h = torch.arange(heads).view(1, -1, 1, 1)
    i = torch.arange(n_q).view(1, 1, -1, 1) + torch.as_tensor(offset).view(-1, 1, 1, 1)
    j = torch.arange(k.shape[2])
    s = torch.einsum("bhid,bhjd->bhij", q.double(), k.double().repeat_interleave(group, 1)) / head_dim**0.5
    s = s if score is None else score(s, b, h, i, j)
    s = torch.where(torch.as_tensor(mask(b, h, i, j)).broadcast_to(s.shape), s, -torch.inf)
    if sink is not None:
        s = torch.cat([s, sink.double().view(1, -1, 1, 1).expand(batch, heads, n_q, 1)], -1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    alive = (s > -torch.inf).any(-1, keepdim=True)
    safe = torch.where(alive, s, 0.0)
    p = torch.where(alive, torch.softmax(safe, -1), 0.0)
    lse = torch.where(alive.squeeze(-1), torch.logsumexp(safe, -1), -torch.inf)
    return p @ v.double().repeat_interleave(group, 1), lse


def compare(attn: Any, leaves: list[torch.Tensor], reference: Any, tensors: dict[str, Any], **more: Any) -> None:
    """out, lse and all gradients: relative Frobenius errors as in the design page."""
    named = {
        n: t.detach().clone().requires_grad_(t.is_floating_point())
        for n, t in tensors.items()
        if isinstance(t, torch.Tensor)
    }
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    wants = [*leaves, *(t for t in named.values() if t.requires_grad)]
    captures = {**tensors, **named}
    results = []
    for out, lse in (attn(*leaves, return_lse=True, **captures, **more), reference(*leaves, captures)):
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        bias = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
        loss = (out * weight).sum() + (torch.where(lse.isfinite(), lse, 0.0) * bias).sum()
        results.append((out, lse, torch.autograd.grad(loss, wants, allow_unused=True)))
    (out, lse, grads), (want, want_lse, want_grads) = results
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    close(out, want, 1e-5)
    close(lse.nan_to_num(neginf=0.0), want_lse.nan_to_num(neginf=0.0), 1e-5)
    for got, wanted in zip(grads, want_grads, strict=True):
        if wanted is None:
            assert got is None or not got.any()
        else:
            close(got, wanted, 1e-4)


def close(got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    assert got.shape == want.shape and got.isfinite().all()
    error, norm = (got.double() - want.double()).norm().item(), want.double().norm().item()
    assert error <= limit * max(norm, 1e-2), f"relative error {error / max(norm, 1e-30):.1e}"


def inputs(batch: int = 2, heads: int = 4, kv: int = 2, n_q: int = 150, n_k: int = 150, d: int = 16, dv: int = 24):
    generator = torch.Generator().manual_seed(3)
    shapes = [(batch, heads, n_q, d), (batch, kv, n_k, d), (batch, kv, n_k, dv)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


CASES: dict[str, tuple[ag.Spec, Any, Any]] = {
    "all": (ag.Spec(), lambda b, h, i, j: torch.tensor(True), None),
    "window": (ag.Spec(mask=ag.causal() & ag.window(40)), lambda b, h, i, j: (i >= j) & (i - j < 40), None),
    "no distance": (ag.Spec(mask="i + j < 120 or j % 7 == 0"), lambda b, h, i, j: (i + j < 120) | (j % 7 == 0), None),
    "by head": (ag.Spec(mask="i - j >= 9 * h"), lambda b, h, i, j: i - j >= 9 * h, None),
    "by batch and head": (
        ag.Spec(mask="j < 20 * h + 50 * b", score=lambda s, b, h, i, j: s * (h + 1) / 2 - b),
        lambda b, h, i, j: j < 20 * h + 50 * b,
        lambda s, b, h, i, j: s * (h + 1) / 2 - b,
    ),
    "undefined on masked pairs": (
        ag.Spec(mask=ag.causal(), score=lambda s, b, h, i, j: s - ag.log(i - j + 1)),
        lambda b, h, i, j: i >= j,
        lambda s, b, h, i, j: s - torch.log((i - j).clamp(min=0) + 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("blocks", [(16, 32), (64, 64), (256, 1024)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_tiles_and_chunks_do_not_matter(name: str, blocks: tuple[int, int]):
    spec, mask, score = CASES[name]
    m, n = blocks
    schedule = ag.Schedule(block_m=m, block_n=n, dq_block_m=m, dq_block_n=n)
    attn = ag.compile(spec, schedule=schedule, backend="cpu")
    compare(attn, inputs(), lambda q, k, v, _: dense(q, k, v, mask, score), {})


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_the_split_over_threads_does_not_matter(cores: int, monkeypatch: pytest.MonkeyPatch):
    """Also with fewer heads than threads, where threads share a head's gradients."""
    monkeypatch.setattr(cpu_parallel, "SMALL", 0)
    before = torch.get_num_threads()
    spec = ag.Spec(mask=ag.causal(), score=ag.alibi(), sink=ag.sink())
    attn = ag.compile(spec, schedule=ag.Schedule(block_m=32, block_n=64, dq_block_m=32, dq_block_n=64), backend="cpu")

    def reference(q: Any, k: Any, v: Any, c: Any) -> Any:
        def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return s + c["slope"][h] * (j - i)

        return dense(q, k, v, lambda b, h, i, j: i >= j, score, c["sink"])

    try:
        torch.set_num_threads(cores)
        for kv in (1, 2, 4):
            compare(attn, inputs(batch=1, kv=kv), reference, {"slope": torch.rand(4), "sink": torch.randn(4)})
            assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(before)


def test_every_pair_and_tile_has_one_job(monkeypatch: pytest.MonkeyPatch):
    for cores in (1, 2, 6, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        for pairs in (1, 2, 3, 8):
            for tiles in (1, 2, 9):
                for finer in (1, 4):
                    jobs = cpu_parallel.split_jobs(pairs, tiles, 2**40, finer)
                    assert len(jobs) <= cores * finer
                    everything = [(p, t) for p in range(pairs) for t in range(tiles)]
                    assert sorted((p, t) for own, some in jobs for p in own for t in some) == everything


def test_chunks_cover_runs_once():
    chunks = cpu_tiles.cut([(0, 64, False), (320, 333, True), (70, 300, False), (64, 70, True)], 100)
    assert chunks.start == [0, 100, 200, 320] and chunks.stop == [100, 200, 300, 333]
    assert (chunks.owner, chunks.low, chunks.high) == ([0, 3], [64, 0], [70, 13])


@pytest.mark.parametrize("offset", [17, torch.tensor([0, 60])], ids=["int", "tensor"])
def test_offset_and_lengths(offset: Any):
    spec = ag.Spec(mask=ag.causal() & ag.window(ag.Param("width")))
    attn = ag.compile(spec, backend="cpu")

    def reference(q: Any, k: Any, v: Any, c: Any) -> Any:
        return dense(q, k, v, lambda b, h, i, j: (i >= j) & (i - j < 30), None, None, offset)

    compare(attn, inputs(n_q=33, n_k=101), reference, {"width": 30}, q_offset=offset)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_round_once(dtype: torch.dtype):
    """The result is float32's on the same inputs, rounded: nothing in between is kept in the half type."""
    attn = ag.compile(ag.Spec(mask=ag.causal() & ag.window(40)), backend="cpu")
    leaves = [t.to(dtype).requires_grad_() for t in inputs()]
    wide = [t.detach().float().requires_grad_() for t in leaves]
    out, reference = attn(*leaves), attn(*wide)
    torch.testing.assert_close(out, reference.to(dtype), rtol=0, atol=0)
    grads = torch.autograd.grad(out.sum(), leaves)
    for got, want in zip(grads, torch.autograd.grad(reference.sum(), wide), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_kernels_run_unscripted_too(monkeypatch: pytest.MonkeyPatch):
    """As they do where torch can't script: the same results."""
    plain = SimpleNamespace(attend=cpu_kernels.attend, differentiate=cpu_kernels.differentiate)
    scripted = cpu_kernels.kernels()
    attn = ag.compile(CASES["window"][0], backend="cpu")
    leaves = [t.requires_grad_() for t in inputs()]
    runs = []
    for functions in (scripted, plain):
        for module in (cpu_forward, cpu_backward):
            monkeypatch.setattr(module, "kernels", lambda functions=functions: functions)
        out = attn(*leaves)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def test_large_logits():
    attn = ag.compile(ag.Spec(mask=ag.causal()), backend="cpu")
    q, k, v = inputs()
    compare(attn, [q * 40, k, v], lambda q, k, v, _: dense(q, k, v, lambda b, h, i, j: i >= j), {})


def test_overflow_on_masked_pairs_stays_out():
    """Masked pairs whose logit overflows float32."""
    q, k, v = inputs()
    k[:, :, 100:] *= 3e38
    q *= 3
    k.requires_grad_()
    attn = ag.compile(ag.Spec(mask=ag.causal()), backend="cpu")
    out = attn(q, k, v)
    close(out[:, :, :100], dense(q[:, :, :100], k[:, :, :100], v[:, :, :100], lambda b, h, i, j: i >= j)[0], 1e-5)


@pytest.mark.parametrize("poisoned", ["k", "v"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_poison_reaches_only_rows_that_attend_it(poisoned: str, poison: float):
    """One key in the middle of a window: rows before it and past its window are untouched, gradients too."""
    mask = lambda b, h, i, j: (i >= j) & (i - j < 30)  # noqa: E731
    attn = ag.compile(ag.Spec(mask=ag.causal() & ag.window(30)), backend="cpu")
    q, k, v = inputs()
    bad_k, bad_v = k.clone(), v.clone()
    (bad_k if poisoned == "k" else bad_v)[:, :, 70] = poison
    leaves = [t.requires_grad_() for t in (q, bad_k, bad_v)]
    out = attn(*leaves)
    clean = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    want = dense(*clean, mask)[0]
    safe = torch.tensor([i for i in range(150) if not 70 <= i < 100])
    close(out[:, :, safe], want[:, :, safe], 1e-5)
    weight = torch.zeros(150).index_fill_(0, safe, 1.0).view(-1, 1)
    got = torch.autograd.grad(torch.where(weight > 0, out, 0.0).sum(), leaves)
    expected = torch.autograd.grad((want * weight).sum(), clean)
    close(got[0][:, :, safe], expected[0][:, :, safe].float(), 1e-4)
    apart = torch.tensor([j for j in range(150) if not 41 <= j < 100])  # keys that no poisoned row attends
    for g, e in zip(got[1:], expected[1:], strict=True):
        close(g[:, :, apart], e[:, :, apart].float(), 1e-4)


def test_out_of_range_loads():
    table = ag.Tensor("table", 2)
    q, k, v = inputs(n_q=40, n_k=40)
    masked = ag.Spec(mask=ag.causal() & ag.window(8), score=lambda s, b, h, i, j: s + table[h, i - j])
    guarded = ag.Spec(mask=ag.causal(), score=lambda s, b, h, i, j: s + ag.where(i - j < 8, table[h, i - j], 0))
    for spec in (masked, guarded):
        assert ag.compile(spec, backend="cpu")(q, k, v, table=torch.randn(4, 8)).isfinite().all()
        with pytest.raises(ag.InputError, match=r"table: .*`i - j`.* 7"):
            ag.compile(spec, backend="cpu")(q, k, v, table=torch.randn(4, 7))


def test_dropout_keeps_the_mean_and_repeats():
    attn = ag.compile(ag.Spec(dropout=0.3), backend="cpu")
    q, k, v = inputs(n_q=256, n_k=256)
    v = torch.ones_like(v)
    a, b, other = attn(q, k, v, seed=1), attn(q, k, v, seed=1), attn(q, k, v, seed=2)
    assert torch.equal(a, b) and not torch.equal(a, other)
    assert abs(a.mean().item() - 1) < 0.01 and a.std() > 0.01


def test_repeated_gradients_are_equal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_parallel, "SMALL", 0)
    spec = ag.Spec(mask=ag.causal(), score=ag.alibi())
    attn = ag.compile(spec, backend="cpu", schedule=ag.Schedule(dq_block_m=32, dq_block_n=64))
    leaves = [t.requires_grad_() for t in (*inputs(batch=1, kv=1), torch.rand(4))]
    runs = [torch.autograd.grad(attn(*leaves[:3], slope=leaves[3]).square().sum(), leaves) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_the_masks_of_equal_distances_are_made_once():
    spec = ag.Spec(mask=ag.causal() & ag.window(64))
    q, k, v = inputs(1, 1, 1, 2048, 2048)
    from attngen.analysis import facts
    from attngen.language.call import bind

    work = Work(bind(spec, q, k, v, captures={}), facts(spec), 64, 256)
    masks = [units[0].masks for units in work.units(range(1), range(32))][-1]
    assert masks.by_distance and 0 < len(masks._known) <= 4


def test_memory_grows_with_n_not_n_squared():
    """Forward and backward of a window at N = 32768: a dense mask alone would take 1 GiB."""
    script = (
        "import resource, torch, attngen as ag\n"
        "attn = ag.compile(ag.Spec(mask=ag.causal() & ag.window(128)), backend='cpu')\n"
        "def go(n):\n"
        "    q = torch.randn(1, 1, n, 16, requires_grad=True)\n"
        "    attn(q, q, q).sum().backward()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "a = go(1024); b = go(32768); print((b - a) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200, f"{done.stdout} MiB"


@settings(max_examples=60)
@given(cases())
def test_random_specs(case: Case):
    spec = case.spec()

    def reference(q: Any, k: Any, v: Any, captures: dict[str, Any]) -> Any:
        values = {**case.values(), **captures}

        def reads(text: str, **more: Any) -> Any:
            return by_torch(text, {**values, **more})

        return dense(
            q, k, v,
            lambda b, h, i, j: reads(case.mask, b=b, h=h, i=i, j=j),
            lambda s, b, h, i, j: reads(case.score, s=s, b=b, h=h, i=i, j=j),
            None, case.q_offset,
        )  # fmt: skip

    compare(
        ag.compile(spec, backend="cpu"), list(case.inputs()), reference, case.captures(spec), q_offset=case.q_offset
    )
