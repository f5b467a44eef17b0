"""Faults that people reported of other attention software, tried here: transforms, merging far from 0, seeds, layouts, devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import attngen as ag

BACKENDS = ["cpu", "interpret"]
SIZES = (4, 20), (2, 24), (2, 24)


def rows(dtype: torch.dtype = torch.float32, batch: int = 2, grads: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, h, n, 16, generator=generator).to(dtype).requires_grad_(grads) for h, n in SIZES]


def causal(backend: str, **more: Any) -> Any:
    return ag.compile(ag.Spec(mask=ag.causal(), **more), backend=backend)


# -- transforms -------------------------------------------------------------------------------------------------------


def transforms() -> dict[str, tuple[Callable[..., Any], type[Exception], str]]:
    def jvp(attn: Any, q: Any, k: Any, v: Any) -> Any:
        return torch.func.jvp(lambda x: attn(x, k, v), (q,), (torch.ones_like(q),))

    def dual(attn: Any, q: Any, k: Any, v: Any) -> Any:
        with forward_ad.dual_level():
            return attn(forward_ad.make_dual(q, torch.ones_like(q)), k, v)

    def vmap(attn: Any, q: Any, k: Any, v: Any) -> Any:
        return torch.func.vmap(lambda x: attn(x, k, v))(torch.stack([q, q]))

    def twice(attn: Any, q: Any, k: Any, v: Any) -> Any:
        q = q.requires_grad_()
        (gradient,) = torch.autograd.grad(attn(q, k, v).sum(), q, create_graph=True)
        return torch.autograd.grad(gradient.sum(), q)

    return {
        "jvp": (jvp, NotImplementedError, "forward-mode AD"),
        "dual": (dual, NotImplementedError, "forward-mode AD"),
        "vmap": (vmap, NotImplementedError, r"fold the mapped dimension into the batch"),
        "double backward": (twice, NotImplementedError, "first derivatives only"),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", transforms())
@pytest.mark.parametrize("keys", [None, "qk_sparse"])
def test_what_has_no_transform_says_so(name: str, backend: str, keys: str | None):
    run, error, message = transforms()[name]
    attn = causal(backend)
    if keys:
        sparse, keep = ag.compile(ag.Spec(keys=ag.qk_sparse()), backend=backend), torch.ones(2, 4, 24, dtype=torch.bool)

        def attn(q: Any, k: Any, v: Any) -> Any:
            return sparse(q, k, v, keep_q=keep[:, :, :20], keep_k=keep[:, :2])

    with pytest.raises(error, match=message):
        run(attn, *rows())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_and_vjp(backend: str, dtype: torch.dtype):
    attn, (q, k, v) = causal(backend), rows(dtype)
    own = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attn(*own)
    want = torch.autograd.grad(out.square().sum(), own)
    got = torch.func.grad(lambda *x: attn(*x).square().sum(), argnums=(0, 1, 2))(q, k, v)
    result, pull = torch.func.vjp(attn, q, k, v)
    assert torch.equal(result, out)
    for a, b, c in zip(got, want, pull(2 * out.detach()), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, b)


# -- merging far from 0 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lse", [-1e9, -1e6, 0.0, 1e6, 3e38])
def test_weights_of_a_merge_sum_to_one(lse: float, dtype: torch.dtype):
    part = torch.ones(1, 2, 5, 8, dtype=dtype), torch.full((1, 2, 5), lse)
    for count in (1, 2, 3, 7):
        assert torch.equal(ag.merge(*[part] * count)[0], part[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", ["1e9", "1e6", "-1e6", "300"])
@pytest.mark.parametrize("sink", [None, "0.0"])
def test_a_union_far_from_zero(far: str, backend: str, sink: str | None):
    """Two halves that see all keys together, with values of 1: out is 1, or the share of the keys beside the sink."""
    score = f"s - {far}" if not far.startswith("-") else f"s + {far[1:]}"
    halves = [ag.Spec(mask=mask, score=score) for mask in ("j < 11", "j >= 11")]
    q, k, v = rows()
    v = torch.ones_like(v).requires_grad_()
    attn = ag.compile(ag.union(*halves, sink=sink), backend=backend)
    out = attn(q, k, v)
    share = 0.0 if sink and not far.startswith("-") else 1.0
    torch.testing.assert_close(out, torch.full_like(out, share), atol=1e-5, rtol=0)
    (dv,) = torch.autograd.grad(out.sum(), v)
    # Every query's weights sum to its share: dv over all keys is how many queries read a key head.
    torch.testing.assert_close(dv[..., 0].sum(-1), torch.full((2, 2), 40.0 * share), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("parts", ["one", "union", "split"])
def test_gradients_at_large_logits(parts: str, scale: float, backend: str):
    """As good as SDPA's, however lse is rounded: at 1e5 a step is 0.01. The products of q and k are exact here: numpy's, in
    the interpreter, are not the same to the last bit for transposed matrices."""
    q, k, v = (x.mul(4).round().div(4) for x in rows())
    halves = [ag.Spec(mask=f"i >= j and {part}", scale=scale) for part in ("j < 11", "j >= 11")]
    spec = ag.union(*halves) if parts == "union" else ag.Spec(mask="i >= j", scale=scale)
    attn = ag.compile(spec, backend=backend, schedule=ag.Schedule(split=3) if parts == "split" else None)

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (q, k, v))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    def gradients(call: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        return list(torch.autograd.grad(call(*leaves).square().sum(), leaves))

    right = gradients(sdpa, torch.float64)
    ours, torchs = (
        [float((a - b).norm() / b.norm()) for a, b in zip(gradients(call, torch.float32), right, strict=True)]
        for call in (attn, sdpa)
    )
    assert ours[2] <= 4 * torchs[2] + 1e-6


# -- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1, 2**31, 2**32 + 7, 2**63 - 1, 2**63, 2**64 - 1, -3, 10**30])
def test_any_int_is_a_seed(seed: int, backend: str):
    spec, (q, k, v) = ag.Spec(mask=ag.causal(), dropout=0.3), rows()
    attn = ag.compile(spec, backend=backend)
    out = attn(q, k, v, seed=seed)
    assert torch.allclose(out.double(), ag.oracle(spec, q, k, v, seed=seed)[0], atol=1e-5)
    if not -(2**63) <= seed < 2**63:
        return
    there = torch.tensor(seed)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.equal(attn(*leaves, seed=there), out)
    torch.testing.assert_close(ag.oracle(spec, q, k, v, seed=there)[0], ag.oracle(spec, q, k, v, seed=seed)[0])
    grads = [torch.autograd.grad(attn(*leaves, seed=x).square().sum(), leaves) for x in (seed, there)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_high_and_low_bits_of_a_seed_count():
    attn, x = causal("cpu", dropout=0.5), rows()
    seeds = [5, 5 + 2**32, 5 + 2**40, 5 + 2**63, -5]
    outs = [attn(*x, seed=seed) for seed in seeds]
    assert all(not torch.equal(a, b) for n, a in enumerate(outs) for b in outs[:n])


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_seed_on_the_device_costs_no_spills(target: str):
    spec = ag.Spec(mask=ag.causal(), dropout=0.1).with_seed_on_device
    assert ag.Spec.from_text(str(spec)).key == spec.key != ag.Spec(mask=ag.causal(), dropout=0.1).key
    for kernel in ag.cross_compile(spec, target, head_dim=64):
        assert kernel.spills == 0, kernel


def test_bad_seeds():
    attn, x = causal("cpu", dropout=0.5), rows()
    for seed in (True, 1.5, "1", torch.tensor(1.5), torch.tensor([1, 2])):
        with pytest.raises(ag.InputError, match="seed"):
            attn(*x, seed=seed)
    with pytest.raises(ag.SpecError, match="seed: only dropout"):
        ag.Spec.from_text("tensor seed: int[0]\nmask: i >= j")


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("keys", [None, "qk_sparse", "k_len"])
def test_keys_of_one_batch_serve_all(backend: str, dtype: torch.dtype, keys: str | None):
    q, k, v = rows(dtype, grads=True)
    k, v = (x.detach()[:1].clone().requires_grad_() for x in (k, v))
    more: dict[str, Any] = {}
    if keys == "qk_sparse":
        keep = torch.ones(2, 4, 24, dtype=torch.bool)
        more = dict(keep_q=keep[:, :, :20], keep_k=keep[:, :2])
    elif keys:
        more = dict(k_len=torch.tensor([24, 9]))
    attn = ag.compile(ag.Spec(keys=ag.qk_sparse() if keys == "qk_sparse" else None), backend=backend)
    found = []
    for own in ((k, v), tuple(x.expand(2, -1, -1, -1) for x in (k, v))):
        out = attn(q, *own, **more)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b)
    with pytest.raises(ag.InputError, match="k: expected batch 2"):
        attn(q, torch.cat([k] * 3), torch.cat([v] * 3), **more)
    if not more:
        torch.testing.assert_close(ag.oracle(attn.spec, q, k, v)[0].to(q.dtype), found[0][0], atol=2e-3, rtol=1e-3)


FIRST, HELD = 23, 24  # the position of a sliding cache's first key, and how many it holds
END = FIRST + HELD
SHIFTED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "causal": (ag.causal(), None, {}),
    "window, alibi": (ag.causal() & ag.window(12), ag.alibi(), dict(slope=torch.rand(4))),
    "documents": (ag.causal() & ag.documents(), None, dict(doc=(torch.arange(END) // 9).int().expand(2, END))),
    "bias": (ag.causal(), ag.bias("bhij"), dict(bias=torch.randn(2, 4, END, END))),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SHIFTED)
def test_a_sliding_cache(name: str, backend: str, dtype: torch.dtype):
    """k_offset: keys from position 23 on, against all keys with the first ones masked; alone and with k_len."""
    mask, score, captures = SHIFTED[name]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, 3, 16, generator=generator).to(dtype).requires_grad_()
    whole = [torch.randn(2, 2, END, 16, generator=generator).to(dtype) for _ in "kv"]
    held = [x[:, :, FIRST:].clone().requires_grad_() for x in whole]
    attn = ag.compile(ag.Spec(mask=mask, score=score), backend=backend)
    seen = ag.Spec(mask=mask & ag.Expr(ag.Spec(mask=f"j >= {FIRST}").mask), score=score)
    want, _ = ag.oracle(seen, q, *whole, q_offset=END - 3, **captures)
    bound: dict[str, Any] = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=4e-3, rtol=4e-3)
    for offset in (FIRST, torch.tensor(FIRST), torch.tensor([FIRST, FIRST], dtype=torch.int32)):
        out = attn(q, *held, q_offset=END - 3, k_offset=offset, **captures)
        torch.testing.assert_close(out.double(), want, **bound)
    gradients = torch.autograd.grad(out.square().sum(), (q, *held))
    lengths = torch.tensor([HELD, HELD])
    both = attn(q, *held, q_offset=END - 3, k_offset=FIRST, k_len=lengths, **captures)
    torch.testing.assert_close(both.double(), want, **bound)
    leaves = [q, *(x.requires_grad_() for x in whole)]
    exact = torch.autograd.grad(ag.oracle(seen, *leaves, q_offset=END - 3, **captures)[0].square().sum(), leaves)
    for got, expected in zip(gradients, exact, strict=True):
        expected = expected if expected.shape == got.shape else expected[:, :, FIRST:]
        torch.testing.assert_close(got, expected.to(dtype), atol=10 * bound["atol"], rtol=10 * bound["rtol"])


def test_bad_key_offsets():
    attn, (q, k, v) = causal("cpu"), rows()
    for offset, message in ((True, "an int"), (1.0, "an int"), (2**28, "positions"), (torch.tensor([1]), "k_offset")):
        with pytest.raises(ag.InputError, match=message):
            attn(q, k, v, k_offset=offset)
    doc = ag.compile(ag.Spec(mask=ag.documents()))
    with pytest.raises(ag.InputError, match="doc"):  # no element for the last positions
        doc(q, k, v, k_offset=5, doc=torch.zeros(2, 24, dtype=torch.int32))
    with pytest.raises(ag.InputError, match=r"next to k_offset="):
        doc(q, k, v, k_offset=5, doc=torch.zeros(2, 1, dtype=torch.int32), q_offset=torch.tensor([0, 0]))
    with pytest.raises(ag.InputError, match="k_offset"):
        attn(q[:1], k[:1], v[:1], k_offset=1, cu_q=torch.tensor([0, 20]), cu_k=torch.tensor([0, 24]))


# -- devices and kinds of tensor --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [None, "qk_sparse", "hyper"])
def test_meta_tensors_give_shapes(keys: str | None):
    q, k, v = (x.to("meta").requires_grad_() for x in rows(torch.bfloat16))
    more: dict[str, Any] = {}
    if keys == "qk_sparse":
        keep = torch.ones(2, 4, 24, dtype=torch.bool, device="meta")
        more = dict(keep_q=keep[:, :, :20], keep_k=keep[:, :2])
    attn = ag.compile(ag.Spec(keys=ag.qk_sparse() if keys == "qk_sparse" else None, mask=ag.causal()))
    out, lse = attn(q, k, v, return_lse=True, **more)
    assert out.shape == q.shape and out.dtype == q.dtype and out.device.type == "meta"
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_nested_tensors_are_told_how_to_pack():
    parts = [torch.randn(n, 4, 16) for n in (3, 5)]
    q = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    with pytest.raises(ag.InputError, match=r"nested tensor; pack it: .* cu_q="):
        causal("cpu")(q, q, q)
    packed = torch.cat(parts).transpose(0, 1)[None]
    ends = torch.tensor([0, 3, 8])
    out = causal("cpu")(packed, packed, packed, cu_q=ends, cu_k=ends)
    for number, part in enumerate(parts):
        own = part.transpose(0, 1)[None]
        want = causal("cpu")(own, own, own)
        torch.testing.assert_close(out[:, :, ends[number] : ends[number + 1]], want)


def test_a_union_is_no_key_set_and_a_shortest_length_of_none():
    with pytest.raises(ag.SpecError, match="already is a Spec"):
        ag.Spec(keys=ag.union(ag.Spec(mask="i >= j"), ag.Spec(mask="i < j")))  # type: ignore[arg-type]
    assert ag.hyper(min_len=0) == ag.hyper(min_len=1)
    with pytest.raises(ag.SpecError, match="min_len"):
        ag.hyper(min_len=-1)
