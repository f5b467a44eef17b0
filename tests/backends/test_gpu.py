"""What only a GPU can show: the compiled kernels, bfloat16, large tensors, races, real recompiles, tuning.

    pytest -m gpu                       all of it
    pytest -m gpu --gpu-part 1/4        a quarter, for machines that are lent for minutes
    pytest -m gpu --gpu-passed FILE     go on behind the tests that passed before, noted in FILE
    pytest -m gpu --rehearse-gpu        without a GPU: the same tests through the interpreter, to try the tests themselves

Half types are checked by the rules of tests/check.py: at most twice (gradients three times) plain PyTorch's error.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import attngen as ag
from attngen.language.call import bind
from attngen.runtime import operators
from attngen.store import device_of, read_records, write_records
from tests.backends.test_backends import HEADS, MASKS, SCORES, D, qkv, table
from tests.check import check, relative
from tests.gpu_small_cases import on
from tests.pretend import pretending
from tests.strategies import Case, cases

pytestmark = pytest.mark.gpu

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
SMALL = ag.Schedule(block_m=32, block_n=16, dq_block_m=32, dq_block_n=16, dkv_block_m=16, dkv_block_n=32)
TILES = [
    (16, 16, 1, 1),
    (32, 64, 2, 2),
    (64, 32, 4, 3),
    (128, 64, 8, 3),
    (64, 128, 4, 2),
    (128, 128, 8, 1),
    (256, 32, 8, 2),
]


@dataclass(frozen=True)
class Place:
    """Where the tests run."""

    device: str
    backend: str

    @property
    def real(self) -> bool:
        """On a GPU, not rehearsed."""
        return self.backend == "triton"

    def need(self, dtype: torch.dtype) -> None:
        """Skip what the interpreter gets wrong."""
        if not self.real and dtype == torch.bfloat16:
            pytest.skip("rehearsal: the interpreter has no bfloat16")

    def need_gpu(self) -> None:
        """Skip what cannot be rehearsed."""
        if not self.real:
            pytest.skip("rehearsal: this needs a GPU")

    def qkv(self, dtype: torch.dtype, *sizes: int, **named: int) -> list[torch.Tensor]:
        """As in test_backends."""
        self.need(dtype)
        return [t.to(self.device) for t in qkv(dtype, *sizes, **named)]

    def attention(self, spec: ag.Spec, schedule: ag.Schedule | None = None) -> Any:
        """The compiled kernels, or the interpreted ones."""
        return ag.compile(spec, backend=self.backend, schedule=schedule)


@contextlib.contextmanager
def here() -> Iterator[Place]:
    """A GPU; in a rehearsal, tensors that pass for one's, and the interpreter."""
    with contextlib.nullcontext() if torch.cuda.is_available() else pretending():
        yield Place("cuda", "triton" if torch.cuda.is_available() else "interpret")


@pytest.fixture
def place() -> Iterator[Place]:
    with here() as found:
        yield found


@pytest.fixture
def ordinary() -> Place:
    """The same, but a rehearsal has ordinary CPU tensors, as torch's own machinery needs them."""
    return Place("cuda", "triton") if torch.cuda.is_available() else Place("cpu", "interpret")


def as_spec(mask: Any, **more: Any) -> ag.Spec:
    return mask if isinstance(mask, ag.Spec) else ag.Spec(mask=mask, **more)


# -- results ----------------------------------------------------------------------------------------------------------


@HALF
@pytest.mark.parametrize("mask", MASKS)
def test_masks(place: Place, mask: str, dtype: torch.dtype):
    given, captures = MASKS[mask]
    spec, inputs = as_spec(given), place.qkv(dtype)
    for schedule in (SMALL, None) if place.real else (SMALL,):
        check(spec, place.attention(spec, schedule), *inputs, on(place.device, captures))


@HALF
@pytest.mark.parametrize("score", SCORES)
def test_scores(place: Place, score: str, dtype: torch.dtype):
    given, captures = SCORES[score]
    spec, inputs = ag.Spec(mask=ag.causal() | ag.window(12), score=given), place.qkv(dtype)
    for schedule in (SMALL, None) if place.real else (SMALL,):
        check(spec, place.attention(spec, schedule), *inputs, on(place.device, captures))


LONG: dict[str, tuple[Any, dict[str, Any]]] = {
    "full": (None, {}),
    "causal": (ag.causal(), {}),
    "causal window": (ag.causal() & ag.window(ag.Param("width")), dict(width=150)),
    "dilated": (ag.dilated_window(40, 5), {}),
    "causal documents": (
        ag.documents() & ag.causal(),
        dict(doc=ag.document_ids(torch.tensor([300, 1, 2, 128, 500, 169]))[None].repeat(2, 1)),
    ),
    "global and window": ((ag.window(64) | ag.global_tokens(130)) & ag.causal(), {}),
}


@HALF
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("mask", LONG)
def test_many_tiles_of_the_default_size(place: Place, mask: str, d: int, dtype: torch.dtype):
    """Lengths that are no multiple of a tile, with several full, partial and empty tiles a row."""
    place.need_gpu()
    given, captures = LONG[mask]
    spec = as_spec(given, score=ag.soft_cap(20.0))
    check(spec, place.attention(spec), *place.qkv(dtype, d, d, 1037, 1100), on(place.device, captures))


@pytest.mark.parametrize("mask", ["causal", "causal documents", "dilated"])
def test_float32_is_exact_and_not_tf32(place: Place, mask: str):
    given, captures = MASKS[mask]
    spec = as_spec(given)
    check(spec, place.attention(spec, SMALL), *place.qkv(torch.float32), on(place.device, captures))


@HALF
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "x".join(map(str, tile)))
def test_every_schedule(place: Place, tile: tuple[int, ...], dtype: torch.dtype):
    """Schedules change the time, never the result: one tile for all three kernels."""
    names = ("block_m", "block_n", "num_warps", "num_stages")
    pins = {prefix + name: value for prefix in ("", "dq_", "dkv_") for name, value in zip(names, tile, strict=True)}
    spec = ag.Spec(mask=ag.documents() & ag.window(left=70), score=ag.alibi())
    doc = (torch.arange(290) // 97).int().repeat(2, 1)
    sizes = dict(n_q=290, n_k=277) if place.real else dict(n_q=40, n_k=37)
    captures = on(place.device, dict(doc=doc, slope=torch.full((HEADS,), 0.05)))
    try:
        check(spec, place.attention(spec, ag.Schedule(**pins)), *place.qkv(dtype, 64, 64, **sizes), captures)
    except ag.ScheduleError as error:
        pytest.skip(f"does not fit this GPU, and says so: {error}")


@HALF
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_precision_is_no_matter_of_half_types(place: Place, precision: str, dtype: torch.dtype):
    spec = ag.Spec(mask=ag.causal())
    check(spec, place.attention(spec, ag.Schedule(precision=precision)), *place.qkv(dtype), {})


@HALF
@pytest.mark.parametrize(
    ("d", "dv"), [(16, 16), (80, 80), (96, 64), (192, 128), (20, 40), (256, 256), (7, 3), (64, 80), (128, 256)], ids=str
)
def test_head_dims(place: Place, d: int, dv: int, dtype: torch.dtype):
    spec = ag.Spec(mask=ag.causal())
    n = dict(n_q=137, n_k=141) if place.real else dict(n_q=17, n_k=19)
    check(spec, place.attention(spec), *place.qkv(dtype, d, dv, **n, heads=2, kv=1), {})


@HALF
@pytest.mark.parametrize(("heads", "kv"), [(1, 1), (6, 2), (8, 1), (3, 3), (64, 8)])
def test_head_groups(place: Place, heads: int, kv: int, dtype: torch.dtype):
    spec = ag.Spec(mask=ag.causal(), score=ag.alibi())
    slope = torch.linspace(0.1, 0.5, heads, device=place.device)
    check(spec, place.attention(spec), *place.qkv(dtype, n_q=33, n_k=35, heads=heads, kv=kv), dict(slope=slope))


@HALF
def test_strides(place: Place, dtype: torch.dtype):
    spec = ag.Spec(mask=ag.causal())
    q, k, v = place.qkv(dtype, n_q=40, n_k=40)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))  # [B, N, H, D] storage
    v = v.mT.contiguous().mT  # and a head dim that is not the fastest
    k = torch.cat([k, k], -1)[..., ::2]
    check(spec, place.attention(spec), q, k, v, {})
    check(spec, place.attention(spec), q[:1].expand(2, -1, -1, -1), k, v, {})


@HALF
@pytest.mark.parametrize("offset", [13, torch.tensor([0, 40], dtype=torch.int32)], ids=["int", "tensor"])
def test_query_offset(place: Place, offset: Any, dtype: torch.dtype):
    spec = ag.Spec(mask=ag.causal() & ag.window(25), score=ag.alibi())
    offset = offset.to(place.device) if isinstance(offset, torch.Tensor) else offset
    captures = dict(slope=torch.full((HEADS,), 0.1, device=place.device))
    check(spec, place.attention(spec), *place.qkv(dtype, n_q=20), captures, q_offset=offset)


@HALF
def test_sink_and_dropout(place: Place, dtype: torch.dtype):
    spec = ag.Spec(mask=ag.window(left=5, right=1), sink=ag.sink(), dropout=ag.Param("p", float), scale=0.3)
    captures = on(place.device, dict(sink=torch.tensor([1.0, -2.0, 0.0, 3.0]), p=0.4, seed=11))
    check(spec, place.attention(spec), *place.qkv(dtype), captures)


@HALF
@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0), (1, 4, 1, 1)], ids=str)
def test_nothing_to_do(place: Place, shape: tuple[int, ...], dtype: torch.dtype):
    place.need(dtype)
    batch, heads, n_q, n_k = shape
    q, k, v = (
        torch.randn(batch, h, n, D, device=place.device).to(dtype) for h, n in ((heads, n_q), (2, n_k), (2, n_k))
    )
    for spec in (ag.Spec(mask=ag.causal()), ag.Spec(mask=ag.documents())):
        captures = {name: torch.zeros(max(batch, 1), 8, dtype=torch.int32) for name in spec.tensors}
        check(spec, place.attention(spec), q, k, v, on(place.device, captures))


@HALF
@settings(max_examples=25)
@given(case=cases([1, 2, 15, 16, 17, 33, 130]))
def test_random_specs(case: Case, dtype: torch.dtype):
    place = Place("cuda", "triton") if torch.cuda.is_available() else Place("cpu", "interpret")
    place.need(dtype)
    place.need_gpu()
    spec = case.spec()
    offset = case.q_offset.to(place.device) if isinstance(case.q_offset, torch.Tensor) else case.q_offset
    q, k, v = (t.to(place.device) for t in case.inputs(dtype))
    check(spec, place.attention(spec, SMALL), q, k, v, on(place.device, case.captures(spec)), q_offset=offset)


def key_set(name: str, n: int = 130) -> tuple[ag.Spec, dict[str, Any]]:
    """A spec of each key set with its captures, for 2 batches, 4 query and 2 key heads, n queries and keys."""
    generator = torch.Generator().manual_seed(3)

    def some(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator)

    if name == "qk_sparse":
        keep = dict(keep_q=some(2, 4, n) < 0.5, keep_k=some(2, 2, n) < 0.5)
        return ag.Spec(keys=ag.qk_sparse(), mask=ag.causal()), keep
    if name == "hash_sparse":
        buckets = dict(q_bucket=(some(2, 4, n) * 5).int(), k_bucket=(some(2, 2, n) * 5).int())
        return ag.Spec(keys=ag.hash_sparse(), mask=ag.causal()), buckets
    if name == "hyper":
        return ag.Spec(keys=ag.hyper(16, 8, 16), mask=ag.causal()), dict(seed=1)
    if name == "sparse_k":
        return ag.Spec(keys=ag.sparse_k(6, 4), mask=ag.causal()), dict(u=some(2, 2, n))
    assert name == "codebook"
    return ag.Spec(keys=ag.codebook()), dict(count=(some(2, 2, n) * 4).int())


@pytest.mark.parametrize("name", ["qk_sparse", "hash_sparse", "hyper", "sparse_k", "codebook"])
def test_key_sets(place: Place, name: str):
    spec, captures = key_set(name)
    q, k, v = place.qkv(torch.float32, n_q=130, n_k=130)
    check(spec, place.attention(spec), q, k, v, on(place.device, captures))


# -- memory -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned(place: Place) -> Iterator[None]:
    """Within it fresh memory holds nan (and large integers), so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    if place.real:  # the allocator hands these blocks out again
        blocks = [
            torch.full((size,), torch.nan, device="cuda")
            for size in (2**10, 2**14, 2**18, 2**24, 2**26)
            for _ in "1234"
        ]
        del blocks
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device=place.device).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@HALF
@pytest.mark.filterwarnings("ignore:.*deterministic.*")
@pytest.mark.parametrize("mask", ["none", "causal", "causal documents", "key padding", "nothing", "tree"])
def test_outputs_are_written_everywhere(place: Place, mask: str, dtype: torch.dtype):
    given, captures = MASKS[mask]
    spec, inputs = as_spec(given), place.qkv(dtype)
    with poisoned(place):
        check(spec, place.attention(spec), *inputs, on(place.device, captures))


@HALF
@pytest.mark.filterwarnings("ignore:.*deterministic.*")
def test_captured_gradients_are_written_everywhere(place: Place, dtype: torch.dtype):
    spec = ag.Spec(mask=ag.causal(), score=[ag.t5_bias(max_distance=40), ag.alibi()], sink=ag.sink())
    captures = dict(rel_bias=table, slope=torch.full((HEADS,), 0.1), sink=torch.zeros(HEADS))
    inputs = place.qkv(dtype)
    with poisoned(place):
        check(spec, place.attention(spec), *inputs, on(place.device, captures))


@HALF
def test_nothing_around_the_inputs_is_read(place: Place, dtype: torch.dtype):
    """q, k, v as views into memory that is nan before, between and behind the rows."""
    views = []
    for tensor in place.qkv(dtype, n_q=45, n_k=51):
        batch, heads, n, d = tensor.shape
        around = torch.full((batch + 1, heads + 1, n + 37, d + 8), torch.nan, device=place.device, dtype=dtype)
        view = around[:batch, :heads, 3 : 3 + n, :d]
        view.copy_(tensor)
        views.append(view)
    spec = ag.Spec(mask=ag.window(left=20, right=3), score=ag.alibi())
    captures = dict(slope=torch.full((HEADS,), 0.1, device=place.device))
    leaves = [view.detach().requires_grad_() for view in views]  # check() would copy the views
    out = place.attention(spec)(*leaves, **captures)
    want, _ = ag.oracle(spec, *(view.double() for view in views), **captures)
    assert relative(out, want) < 1e-2
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.float().square().sum(), leaves))


@HALF
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_poison_in_masked_pairs_stays_out(place: Place, poison: float, dtype: torch.dtype):
    q, k, v = (t.requires_grad_() for t in place.qkv(dtype, n_q=50, n_k=50))
    attn = place.attention(ag.Spec(mask=ag.causal()))
    clean = attn(q, k, v)
    bad_k, bad_v = (t.detach().clone() for t in (k, v))
    bad_k[:, :, 37:] = poison
    bad_v[:, :, 37:] = poison
    out = attn(q, bad_k, bad_v)
    assert torch.equal(out[:, :, :37], clean[:, :, :37])
    (got,) = torch.autograd.grad(out[:, :, :37].sum(), q)
    (want,) = torch.autograd.grad(clean[:, :, :37].sum(), q)
    assert torch.equal(got[:, :, :37], want[:, :, :37])


@HALF
def test_captured_loads_stay_in_bounds_on_masked_pairs(place: Place, dtype: torch.dtype):
    spec = ag.Spec(mask=ag.window(9), score=lambda s, b, h, i, j: s + ag.Tensor("rel", 1)[i - j + 8])
    rel = torch.full((40,), 1e30, device=place.device)[10:27].normal_()
    leaves = [t.requires_grad_() for t in (*place.qkv(dtype, n_q=40, n_k=40), rel.detach())]  # check() would copy
    out = place.attention(spec)(*leaves[:3], rel=leaves[3])
    want, _ = ag.oracle(spec, *(t.double() for t in leaves[:3]), rel=leaves[3])
    assert relative(out, want) < 1e-2
    grads, wants = (torch.autograd.grad(x.double().square().sum(), leaves) for x in (out, want))
    assert all(relative(*pair) < 2e-2 for pair in zip(grads, wants, strict=True))


def need_memory(place: Place, gigabytes: float) -> None:
    if place.real:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"needs {gigabytes:g} GB of GPU memory, {free:.0f} are free")


def test_more_than_2_31_elements(place: Place):
    """q, k, v, out and their gradients each pass 2^31 elements; the last rows and keys are compared. With a window of W a
    piece at the end depends on nothing further back than W.
    """
    need_memory(place, 60)
    dtype = torch.bfloat16 if place.real else torch.float16
    heads, d, width, last = 2, 128, 64, 100
    n = 2**31 // (heads * d) + 1000 if place.real else 500
    generator = torch.Generator(place.device).manual_seed(1)
    q, k, v, seed = (
        torch.randn(1, heads, n, d, generator=generator, device=place.device, dtype=dtype).requires_grad_(
            name != "seed"
        )
        for name in ("q", "k", "v", "seed")
    )
    assert not place.real or q.numel() > 2**31
    spec = ag.Spec(mask=ag.causal() & ag.window(width))
    out = place.attention(spec)(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), seed)
    piece = slice(n - last - 2 * width, n)
    ends = [t.detach()[:, :, piece].double().requires_grad_() for t in (q, k, v)]
    want, _ = ag.oracle(spec, *ends)
    wants = torch.autograd.grad(want, ends, seed[:, :, piece].double())
    for got, expected in zip((out.detach(), *grads), (want.detach(), *wants), strict=True):
        assert got.isfinite().all()
        assert (
            relative(got[:, :, -last:], expected[:, :, -last:]) < 2e-2
        )  # rounding; a wrong address would give about 1


def test_a_stride_past_2_31(place: Place):
    """Two batches at the two ends of one large buffer."""
    need_memory(place, 30)
    dtype = torch.bfloat16 if place.real else torch.float16
    heads, n, d = 2, 70, 64
    far = 2**31 + 2**20 if place.real else 2**16
    buffer = torch.empty(far + heads * n * d, device=place.device, dtype=dtype)
    steps = (far, n * d, d, 1)
    views = []
    for seed in range(3):
        view = (
            buffer.as_strided((2, heads, n, d), steps)
            if seed == 0
            else torch.empty(2, heads, n, d, device=place.device, dtype=dtype)
        )
        view.normal_(generator=torch.Generator(place.device).manual_seed(seed))
        views.append(view)
    spec = ag.Spec(mask=ag.causal())
    q, k, v = views
    attn = place.attention(spec)
    for args in ((q, k, v), (k, q, v), (k, v, q)):
        leaves = [t.detach().requires_grad_() for t in args]
        out = attn(*leaves)
        exact = [t.detach().double().requires_grad_() for t in args]
        want, _ = ag.oracle(spec, *exact)
        assert relative(out.detach(), want.detach()) < 1e-2
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        for got, expected in zip(grads, torch.autograd.grad(want, exact, torch.ones_like(want)), strict=True):
            assert relative(got, expected) < 2e-2


# -- determinism, recompiles, torch's own machinery -------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["causal", "causal documents", "global and window"])
def test_a_hundred_runs_are_equal(place: Place, mask: str):
    dtype = torch.bfloat16 if place.real else torch.float16
    given, captures = MASKS[mask]
    spec = ag.Spec(mask=given, score=[ag.t5_bias(max_distance=40), ag.alibi()], sink=ag.sink())
    learned = dict(rel_bias=table, slope=torch.full((HEADS,), 0.1), sink=torch.zeros(HEADS))
    learned = {name: t.to(place.device).requires_grad_() for name, t in learned.items()}
    q, k, v = (t.requires_grad_() for t in place.qkv(dtype, 64, 64, n_q=90, n_k=90))
    attn, rest = place.attention(spec), on(place.device, captures)

    def once() -> list[torch.Tensor]:
        out, lse = attn(q, k, v, return_lse=True, **learned, **rest)
        loss = out.float().square().sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
        return [out, lse, *torch.autograd.grad(loss, [q, k, v, *learned.values()])]

    first = once()
    for _ in range(100 if place.real else 1):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_what_compiles_and_what_does_not(place: Place):
    """Counted by triton itself: other values, lengths, batches, head counts and documents compile nothing."""
    place.need_gpu()
    import triton

    compiled: list[str] = []
    spec = ag.Spec(mask=ag.documents() & ag.causal() & ag.window(ag.Param("width")), score=ag.alibi())
    rest = {
        f"{kernel}{name}": value
        for kernel in ("", "dq_", "dkv_")
        for name, value in (("num_warps", 4), ("num_stages", 2))
    }
    attn = place.attention(spec, ag.Schedule(**rest, split=1, pack=False).over(SMALL))  # nothing is left to lengths

    def run(batch: int, heads: int, kv: int, n_q: int, n_k: int, width: int, offset: int = 0, d: int = 64) -> None:
        q, k, v = (
            torch.randn(batch, h, n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for h, n in ((heads, n_q), (kv, n_k), (kv, n_k))
        )
        doc = (torch.arange(1200, device="cuda") // 77).int().repeat(batch, 1)
        slope = torch.full((heads,), 0.1, device="cuda", requires_grad=True)
        attn(q, k, v, doc=doc, slope=slope, width=width, q_offset=offset).sum().backward()

    def count(**event: Any) -> None:
        compiled.append(str(event.get("fn", event)))

    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = count
    try:
        run(2, 4, 2, 200, 200, 7)
        kernels = len(compiled)
        assert 4 <= kernels <= 6, compiled  # forward, delta, dq, dkv, and for the slopes one or two
        for width in (1, 16, 100, 1024):
            run(2, 4, 2, 200, 200, width)
        for n_q, n_k in ((1, 256), (129, 130), (250, 16), (1024, 1024)):
            run(2, 4, 2, n_q, n_k, 7)
        for batch, heads, kv in ((1, 4, 2), (5, 8, 1), (16, 16, 16)):
            run(batch, heads, kv, 200, 200, 7)
        run(2, 4, 2, 200, 300, 7, offset=55)
        assert compiled[kernels:] == []
        run(2, 4, 2, 200, 200, 7, d=128)
        assert len(compiled) > kernels  # the hook does count
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


@HALF
def test_torch_compile_autocast_and_streams(ordinary: Place, dtype: torch.dtype):
    ordinary.need(dtype)
    spec = ag.Spec(mask=ag.causal() & ag.window(ag.Param("width")), score=ag.alibi())
    attn = ordinary.attention(spec)
    slope = torch.full((HEADS,), 0.1, device=ordinary.device, requires_grad=True)
    q, k, v = (t.requires_grad_() for t in ordinary.qkv(dtype))
    expected = attn(q, k, v, slope=slope, width=30) * 2
    compiled = torch.compile(
        lambda *a, **c: attn(*a, **c) * 2, fullgraph=True, backend="inductor" if ordinary.real else "aot_eager"
    )
    out = compiled(q, k, v, slope=slope, width=30)
    assert relative(out.detach(), expected.detach().double()) < 1e-3
    got = torch.autograd.grad(out.float().sum(), [q, k, v, slope])
    for one, other in zip(got, torch.autograd.grad(expected.float().sum(), [q, k, v, slope]), strict=True):
        assert relative(one, other.double()) < 1e-2
    with torch.autocast(ordinary.device, dtype):
        assert attn(q.float(), k.float(), v.float(), slope=slope, width=30).dtype == dtype
    if ordinary.real:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            other = attn(q, k, v, slope=slope, width=30) * 2
        side.synchronize()
        assert torch.equal(other, expected)


@pytest.mark.parametrize("mask", ["causal", "causal documents"])
def test_cuda_graph(place: Place, mask: str):
    """A captured call replays with other values in the same memory."""
    place.need_gpu()
    given, captures = MASKS[mask]
    spec, captures = as_spec(given), on(place.device, captures)
    attn = place.attention(spec)
    q, k, v = place.qkv(torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            attn(q, k, v, **captures)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = attn(q, k, v, **captures)
    q.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, attn(q, k, v, **captures))


def test_opcheck(ordinary: Place):
    q, k, v = (t.requires_grad_() for t in ordinary.qkv(torch.float16, n_q=17, n_k=17))
    for spec in (ag.Spec(mask=ag.causal()), ag.Spec(score=ag.alibi())):
        attn, captures = (
            ordinary.attention(spec),
            {name: torch.ones(q.shape[1], device=q.device) for name in spec.tensors},
        )
        torch.library.opcheck(torch.ops.attngen.forward, operators.arguments(attn, q, k, v, 0, None, captures))


# -- tuning and records -----------------------------------------------------------------------------------------------


def test_the_tuner_and_its_records(ordinary: Place, tmp_path: Path):
    """Tuned on this device, found by compile, carried as text, and never mixed up with another GPU's."""
    pytest.importorskip("optuna")
    spec, database = ag.Spec(mask=ag.causal() & ag.window(40)), str(tmp_path / "records.db")
    n, trials, dtype = (2048, 6, torch.bfloat16) if ordinary.real else (256, 3, torch.float32)
    report = ag.tune(
        spec, f"B1 H4 N{n} D64", dtype=dtype, trials=trials, db=database, storage=tmp_path / "trials.log",
        pieces=("forward", "backward") if ordinary.real else ("forward",), progress=False, patience=0.2,
    )  # fmt: skip
    assert report.kind == "measured" and report.records, str(report)
    for record in report.records:
        assert record.kind == "measured" and 0 < record.error <= 1 and record.seconds > 0 and record.spread >= 0
        here = device_of(ordinary.device)
        assert not ordinary.real or (record.key.device, record.key.driver) == (
            torch.cuda.get_device_name(),
            here.driver,
        )
    q, k, v = (torch.randn(1, 4, n, 64, device=ordinary.device, dtype=dtype) for _ in "qkv")
    attn = ag.compile(spec, db=database)
    stages = attn.specialiser.of(bind(spec, q, k, v, captures={}))
    assert "measured record" in stages.origin
    tuned = next(r for r in report.records if r.key.piece == "forward").schedule
    assert {name: stages.schedule.decided()[name] for name in tuned} == tuned
    check(spec, attn, *(t[:, :, :300] for t in (q, k, v)), {}, backward=ordinary.real)
    write_records(report.records, tmp_path / "records.jsonl")
    assert sorted(read_records(tmp_path / "records.jsonl"), key=repr) == sorted(report.records, key=repr)


@HALF
def test_a_first_call_finds_its_tiles(place: Place, dtype: torch.dtype, monkeypatch: Any, tmp_path: Path):
    """By compiling, for a mask that nobody tuned and nothing ships for; and the next one remembers."""
    place.need_gpu()
    monkeypatch.setenv("ATTNGEN_DB", str(tmp_path / "records.db"))
    monkeypatch.setenv("ATTNGEN_SEARCH_SECONDS", "20")
    spec, inputs = ag.Spec(mask="i >= j and i % 3 != j % 5"), place.qkv(dtype)
    for expected in ("found by compiling, modelled", "found by compiling at an earlier first call"):
        attn = place.attention(spec)
        check(spec, attn, *inputs, {})
        assert expected in attn.explain(*inputs)


# -- tools ------------------------------------------------------------------------------------------------------------


GENERATED = re.compile(r"\b(forward|merge|delta|dq|dkv|capture)\+0x")  # as the tool names places in kernels


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(place: Place, tool: str):
    place.need_gpu()
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    small = [sys.executable, "-m", "tests.gpu_small_cases"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a tensor's end is an allocation's end
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", *small],
        env=environment, capture_output=True, text=True, timeout=420, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not work on this machine")
    said = done.stdout + done.stderr
    races = [line for line in said.splitlines() if "Race reported" in line]
    others = (
        tool == "racecheck" and races and not any(GENERATED.search(line) for line in races)
    )  # in torch's own kernels
    assert "done" in done.stdout and (done.returncode == 0 or others), said[-3000:]


def test_the_sanitizers_cases_run(place: Place):
    from tests import gpu_small_cases

    gpu_small_cases.main(place.device, place.backend)
