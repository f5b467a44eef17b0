"""Every backend against the float64 oracle, forward and backward: the library's masks and scores, then random specs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings

import attngen as ag
from tests.check import check
from tests.strategies import Case, cases

BACKENDS = ["cpu", "interpret"]
N_Q, N_K, HEADS, KV_HEADS, D = 70, 83, 4, 2, 16

doc2 = torch.arange(90).view(1, -1).repeat(2, 1).int() // 23
MASKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "none": (None, {}),
    "causal": (ag.causal(), {}),
    "window": (ag.window(9), {}),
    "causal window param": (ag.causal() & ag.window(ag.Param("width")), dict(width=33)),
    "window left right": (ag.window(left=20, right=40), {}),
    "prefix": (ag.prefix_lm(21), {}),
    "prefix per batch": (
        ag.prefix_lm(ag.Tensor("prefix", 1, dtype=torch.int32)),
        dict(prefix=torch.tensor([0, 40]).int()),
    ),
    "global and window": ((ag.window(9) | ag.global_tokens(3)) & ag.causal(), {}),
    "dilated": (ag.dilated_window(6, 3), {}),
    "documents": (ag.documents(), dict(doc=doc2)),
    "causal documents": (ag.documents() & ag.causal(), dict(doc=doc2)),
    "documents by long ids": (ag.documents(), dict(doc=doc2.long() * 2**32 + 5)),
    "unsorted documents": (
        ag.documents(),
        dict(doc=torch.randint(0, 3, (2, 90), generator=torch.Generator().manual_seed(0)).int()),
    ),
    "block causal": (ag.block_causal(24), {}),
    "neighborhood": (ag.neighborhood_2d(10, 2), {}),
    "tree": (ag.tree(), dict(ancestor=torch.rand(60, 60, generator=torch.Generator().manual_seed(1)) < 0.4, start=30)),
    "key padding": (ag.Spec(mask="j < n[b]", tensors=[ag.Tensor("n", 1, "int")]), dict(n=torch.tensor([0, 31]).int())),
    "long rows": (
        ag.Spec(
            mask="((i + h) % 4 < 2 or (i + h) % 3 < 2) and max(i, j) - min(i, 40) < width or i - j + 4 <= width",
            params=[ag.Param("width")],
        ),
        dict(width=12),
    ),
    "nothing": ("false", {}),
}
table = torch.randn(32, HEADS, generator=torch.Generator().manual_seed(2))
SCORES: dict[str, tuple[Any, dict[str, Any]]] = {
    "alibi": (ag.alibi(), dict(slope=torch.tensor([0.5, 0.1, 0.02, 0.3]))),
    "soft cap": (ag.soft_cap(2.0), {}),
    "soft cap param": (ag.soft_cap(ag.Param("cap", float)), dict(cap=1.5)),
    "bias bhij": (ag.bias("bhij"), dict(bias=torch.randn(2, HEADS, N_Q, N_K))),
    "bias broadcast": (ag.bias("bhij"), dict(bias=torch.randn(1, HEADS, 1, N_K))),
    "bias hij": (ag.bias("hij"), dict(bias=torch.randn(HEADS, N_Q, N_K))),
    "bias ij": (ag.bias("ij"), dict(bias=torch.randn(N_Q, N_K))),
    "bias j": (ag.bias("j"), dict(bias=torch.randn(N_K))),
    "bias bi": (ag.bias("bi"), dict(bias=torch.randn(2, N_Q))),
    "t5": (ag.t5_bias(max_distance=40), dict(rel_bias=table)),
    "t5 causal": (ag.t5_bias(max_distance=40, bidirectional=False), dict(rel_bias=table)),
    "several": (
        [ag.soft_cap(3.0), ag.alibi(), ag.bias("hij")],
        dict(slope=torch.full((HEADS,), 0.1), bias=torch.randn(HEADS, N_Q, N_K)),
    ),
    "clipped": (lambda s, b, h, i, j: ag.minimum(ag.maximum(s, ag.Param("low", float)), 2.5), dict(low=-0.75)),
    "cosine": (lambda s, b, h, i, j: s * ag.sigmoid(s) + ag.where(i > j, s / 2, -s), {}),
}


def qkv(
    dtype: torch.dtype, d: int = D, dv: int = D, n_q: int = N_Q, n_k: int = N_K, heads: int = HEADS, kv: int = KV_HEADS
):
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, heads, n_q, d), (2, kv, n_k, d), (2, kv, n_k, dv)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attention(spec: ag.Spec, backend: str, rows: int = 32):
    """The interpreter with query tiles of `rows` and key tiles of half that: several of each, but few programs."""
    half = rows // 2
    schedule = ag.Schedule(
        block_m=rows, block_n=half, dq_block_m=rows, dq_block_n=half, dkv_block_m=half, dkv_block_n=rows
    )
    return ag.compile(spec, backend=backend, schedule=schedule if backend == "interpret" else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend: str, mask: str, dtype: torch.dtype):
    given, captures = MASKS[mask]
    spec = given if isinstance(given, ag.Spec) else ag.Spec(mask=given)
    check(spec, attention(spec, backend), *qkv(dtype), captures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores(backend: str, score: str, dtype: torch.dtype):
    given, captures = SCORES[score]
    spec = ag.Spec(mask=ag.causal() | ag.window(12), score=given)
    check(spec, attention(spec, backend), *qkv(dtype), captures)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sink_and_dropout(backend: str):
    spec = ag.Spec(mask=ag.window(left=5, right=1), sink=ag.sink(), dropout=ag.Param("p", float), scale=0.3)
    captures = dict(sink=torch.tensor([1.0, -2.0, 0.0, 3.0]), p=0.4, seed=11)
    check(spec, attention(spec, backend), *qkv(torch.float32), captures)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [13, torch.tensor([0, 40], dtype=torch.int32)], ids=["int", "tensor"])
def test_query_offset(backend: str, offset: Any):
    spec = ag.Spec(mask=ag.causal() & ag.window(25), score=ag.alibi())
    check(
        spec,
        attention(spec, backend),
        *qkv(torch.float32, n_q=20),
        dict(slope=torch.full((HEADS,), 0.1)),
        q_offset=offset,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "mask",
    [
        "(i * i + j) % 7 < 3",
        "(i * 7919 + j * 104729) % 17 < 9",
        "2147483648 * i > 150323855360000 + j",
        "i + j < 3000000000",
        "5000 * i - 4999 * j < 350000000",
    ],
)
def test_integers_beyond_32_bits(backend: str, mask: str):
    spec = ag.Spec(mask=mask)
    check(spec, attention(spec, backend), *qkv(torch.float32, n_q=20, n_k=40), {}, q_offset=70_000)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_nothing_with_a_learned_table(backend: str):
    spec = ag.Spec(mask="i > j and i < j", score=[ag.t5_bias(max_distance=40), ag.alibi(), ag.bias("j")])
    captures = dict(rel_bias=table, slope=torch.ones(HEADS), bias=torch.ones(N_K))
    check(spec, attention(spec, backend), *qkv(torch.float32, n_q=20, n_k=40), captures)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_undefined_on_masked_pairs(backend: str):
    spec = ag.Spec(mask=ag.causal(), score="s * sqrt(i - j + 1)")
    check(spec, attention(spec, backend), *qkv(torch.float32, n_q=20, n_k=40), {})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("d", "dv"), [(16, 16), (80, 80), (96, 64), (192, 128), (20, 40), (256, 256), (7, 3), (64, 80)], ids=str
)
def test_head_dims(backend: str, d: int, dv: int):
    spec = ag.Spec(mask=ag.causal())
    check(spec, attention(spec, backend), *qkv(torch.float32, d, dv, 37, 41, heads=2, kv=1), {})


@pytest.mark.parametrize(
    "form", [{}, dict(tma=True, disable_licm=True), dict(persistent=1, order="longest_first")], ids=str
)
@pytest.mark.parametrize(
    ("name", "d", "dv"), [("full", 192, 192), ("documents", 24, 40), ("dropout", 16, 16), ("bias", 256, 64)]
)
def test_separate_sums(name: str, d: int, dv: int, form: dict[str, Any]):
    """One program of a key tile for dV, another for dK."""
    specs = {
        "full": (ag.Spec(), {}),
        "documents": (ag.Spec(mask=ag.documents() & ag.causal(), score=ag.soft_cap(2.0)), dict(doc=doc2)),
        "dropout": (ag.Spec(mask=ag.causal(), dropout=0.3), dict(seed=5)),
        "bias": (ag.Spec(mask=ag.causal(), score=ag.bias("hij")), dict(bias=torch.randn(HEADS, N_Q, N_K))),
    }
    spec, captures = specs[name]
    tile = ag.Tile(16, 32, 1, 1, separate_sums=True, **form)
    schedule = ag.Schedule(block_m=32, block_n=32, dq_block_m=32, dq_block_n=32, dkv=tile)
    attn = ag.compile(spec, backend="interpret", schedule=schedule)
    check(spec, attn, *qkv(torch.float32, d, dv), captures)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv"), [(1, 1), (6, 2), (8, 1), (3, 3)])
def test_head_groups(backend: str, heads: int, kv: int):
    spec = ag.Spec(mask=ag.causal(), score=ag.alibi())
    q, k, v = qkv(torch.float32, n_q=33, n_k=35, heads=heads, kv=kv)
    check(spec, attention(spec, backend), q, k, v, dict(slope=torch.linspace(0.1, 0.5, heads)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str):
    spec = ag.Spec(mask=ag.causal())
    q, k, v = qkv(torch.float32, n_q=40, n_k=40)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))  # [B, N, H, D] storage
    v = v.mT.contiguous().mT  # and a head dim that is not the fastest
    k = torch.cat([k, k], -1)[..., ::2]
    check(spec, attention(spec, backend), q, k, v, {})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0), (1, 4, 1, 1)], ids=str)
def test_nothing_to_do(backend: str, shape: tuple[int, ...]):
    batch, heads, n_q, n_k = shape
    q, k, v = torch.randn(batch, heads, n_q, D), torch.randn(batch, 2, n_k, D), torch.randn(batch, 2, n_k, D)
    for spec in (ag.Spec(mask=ag.causal()), ag.Spec(mask=ag.documents())):
        captures = {name: torch.zeros(max(batch, 1), 8, dtype=torch.int32) for name in spec.tensors}
        check(spec, attention(spec, backend), q, k, v, captures)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_key(backend: str):
    spec = ag.Spec(mask="i >= j + 20")
    q, k, v = (t.requires_grad_() for t in qkv(torch.float32, n_q=50, n_k=50))
    out, lse = attention(spec, backend)(q, k, v, return_lse=True)
    assert not out[:, :, :20].any() and lse[:, :, :20].isneginf().all() and lse[:, :, 20:].isfinite().all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads) and not grads[0][:, :, :20].any() and not grads[1][:, :, 30:].any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_poison_in_masked_pairs_stays_out(backend: str, poison: float):
    """Per pair: rows that do not attend a poisoned key are as if it were not there, in the same tile too."""
    spec = ag.Spec(mask=ag.causal())
    q, k, v = (t.requires_grad_() for t in qkv(torch.float32, n_q=50, n_k=50))
    clean = attention(spec, backend)(q, k, v)
    bad_k, bad_v = k.detach().clone(), v.detach().clone()
    bad_k[:, :, 37:] = poison
    bad_v[:, :, 37:] = poison
    out = attention(spec, backend)(q, bad_k, bad_v)
    torch.testing.assert_close(out[:, :, :37], clean[:, :, :37])
    (got,) = torch.autograd.grad(out[:, :, :37].sum(), q)
    (want,) = torch.autograd.grad(clean[:, :, :37].sum(), q)
    torch.testing.assert_close(got[:, :, :37], want[:, :, :37])


@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_loads_stay_in_bounds_on_masked_pairs(backend: str):
    """Only pairs with |i - j| <= 8 attend; the table has no room for others."""
    spec = ag.Spec(mask=ag.window(9), score=lambda s, b, h, i, j: s + ag.Tensor("rel", 1)[i - j + 8])
    rel = torch.full((40,), 1e30)[10:27].normal_()  # what lies around the view would be seen
    check(spec, attention(spec, backend), *qkv(torch.float32, n_q=40, n_k=40), dict(rel=rel))


def test_an_attended_load_out_of_range_is_an_error():
    spec = ag.Spec(mask=ag.window(9), score=lambda s, b, h, i, j: s + ag.Tensor("rel", 1)[i - j + 8])
    with pytest.raises(ag.InputError, match="rel"):
        ag.compile(spec, backend="cpu")(*qkv(torch.float32, n_q=40, n_k=40), rel=torch.zeros(12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cpu_dtypes(dtype: torch.dtype):
    spec = ag.Spec(mask=ag.causal() & ag.window(30), score=ag.alibi())
    check(spec, attention(spec, "cpu"), *qkv(dtype), dict(slope=torch.full((HEADS,), 0.1)))


def test_gradients_are_deterministic():
    spec = ag.Spec(mask=ag.causal(), score=[ag.t5_bias(max_distance=40), ag.alibi()])
    learned = table.clone().requires_grad_()
    captures = dict(rel_bias=learned, slope=torch.full((HEADS,), 0.1).requires_grad_())
    q, k, v = (t.requires_grad_() for t in qkv(torch.float32))
    for backend in BACKENDS:
        attn = attention(spec, backend)
        runs = [torch.autograd.grad(attn(q, k, v, **captures).sum(), [q, k, v, *captures.values()]) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def run_case(case: Case, backend: str, dtype: torch.dtype) -> None:
    spec = case.spec()
    rows = 64 if case.n_q * case.n_k > 4096 else 32
    check(spec, attention(spec, backend, rows), *case.inputs(dtype), case.captures(spec), q_offset=case.q_offset)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12)
@given(case=cases([1, 2, 15, 16, 17, 33]))
def test_random_specs(backend: str, case: Case):
    run_case(case, backend, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=200)
@given(case=cases())
def test_two_hundred_random_specs(backend: str, dtype: torch.dtype, case: Case):
    run_case(case, backend, dtype)
