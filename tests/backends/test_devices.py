"""Which tensors live on the device: every key set, its preparation and its oracle, with tensors that pass for a GPU's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime import _allocation

import attngen as ag
from attngen.backends.launcher import is_aligned
from attngen.backends.triton import launch as gpu
from tests.backends.test_backends import HEADS, SCORES, qkv
from tests.gpu_small_cases import on
from tests.keys_work import CASES
from tests.plan.keysets.test_resources import CLOSED, N, given
from tests.pretend import CUDA, pretending

NAMES = [
    *CASES, *CLOSED, "hash_sparse, buckets", "gather, log_weight", "vertical_slash", "block_sparse",
    "block_cluster", "shared_prefix", "k_len", "packed",
]  # fmt: skip
WITHOUT_ORACLE = ("k_len", "packed")


def inputs() -> list[torch.Tensor]:
    return [torch.randn(1, heads, N, 16, device="cuda", requires_grad=True) for heads in (4, 2, 2)]


@pytest.mark.parametrize("name", NAMES)
def test_key_sets_and_their_definitions(name: str) -> None:
    keys, captures = given(name, *(torch.randn(1, heads, N, 16) for heads in (4, 2)))
    spec = ag.Spec(keys=keys, mask=None if name == "union" else ag.causal())
    with pretending(kernels=False):
        leaves, captures = inputs(), on("cuda", captures)
        attn = ag.compile(spec, backend="interpret")
        out = attn(*leaves, **captures)
        assert out.device == CUDA
        torch.autograd.grad(out.sum(), leaves)
        if name not in WITHOUT_ORACLE:
            want, lse = ag.oracle(spec, *leaves, **captures)
            assert want.device == lse.device == CUDA


def test_what_is_made_from_q_and_k() -> None:
    with pretending(kernels=False):
        q, k, v = inputs()
        assert all(bucket.device == CUDA for bucket in ag.lsh_buckets(q, k, 8))
        estimate = ag.estimate(q, k, budget=512, sink=4)
        attn = ag.compile(ag.Spec(keys=ag.adaptive(), mask=ag.causal()), backend="interpret")
        plan = attn.plan(q, k, v, estimate=estimate)
        assert attn(q, k, v, plan=plan).device == CUDA


@pytest.mark.parametrize("score", SCORES)
def test_scores_and_their_definitions(score: str) -> None:
    what, captures = SCORES[score]
    spec = ag.Spec(mask=ag.causal(), score=what, sink=ag.sink(), dropout=ag.Param("p", float))
    with pretending(kernels=False):
        leaves = [t.to("cuda").requires_grad_() for t in qkv(torch.float32)]
        captures = on("cuda", {**captures, "sink": torch.zeros(HEADS), "p": 0.3, "seed": 5})
        learned = [x.requires_grad_() for x in captures.values() if isinstance(x, torch.Tensor)]
        for run in (ag.compile(spec, backend="interpret"), lambda *a, **c: ag.oracle(spec, *a, **c)[0]):
            out = run(*leaves, **captures)
            assert out.device == CUDA
            torch.autograd.grad(out.sum(), [*leaves, *learned])


@pytest.mark.parametrize("device", ["meta", CUDA], ids=str)
def test_a_map_of_tiles_is_made_on_the_cpu(device: Any) -> None:
    """Whatever the default device is."""
    spec = ag.Spec(mask=ag.documents() & ag.causal())
    doc = (torch.arange(N) // 70).int()[None]
    for transposed in (False, True):
        want = ag.tile_map(spec, N, N, 16, 32, doc=doc, transposed=transposed)
        with pretending(kernels=False), torch.device(device):
            got = ag.tile_map(spec, N, N, 16, 32, doc=doc, transposed=transposed)
        assert torch.equal(got, want)


def test_the_rehearsal_fails_where_a_gpu_would() -> None:
    with pretending():
        there, here = torch.arange(6.0, device="cuda"), torch.arange(6.0)
        assert there.is_cuda and not there.is_cpu and there.device == CUDA and (there + torch.tensor(1.0)).is_cuda
        assert here.device.type == "cpu" and there.cpu().device.type == "cpu" and here.to("cuda").device == CUDA
        assert torch.zeros_like(there).is_cuda and there.new_empty(3).is_cuda and there.sort().values.is_cuda
        for wrong in (
            lambda: there + here,
            lambda: torch.where(here > 0, there, 0.0),
            lambda: there.gather(0, torch.zeros(2, dtype=torch.int64)),
            lambda: torch.stack([there, here]),
            lambda: there.long().view(2, 3) @ there.long().view(3, 2),
        ):
            with pytest.raises(RuntimeError):
                wrong()
        with pytest.raises(TypeError):
            there.numpy()


class Launched:
    """A kernel that notes what Triton would find at its launch."""

    def __init__(self) -> None:
        self.allocator: Any = None

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            self.allocator = _allocation._allocator.get()

        return run


def test_memory_for_descriptors_is_given_on_any_thread() -> None:
    """A backward runs on a thread of its own, and Triton keeps the allocator by context. What others set stays."""
    for _ in range(2):
        kernel = Launched()
        source: Any = SimpleNamespace(makes_descriptors=True, load=lambda kernel=kernel: kernel)
        found: list[Any] = []

        def backward(source: Any = source, found: list[Any] = found) -> None:
            gpu._start(source, 1, [], {})
            found.append(_allocation._allocator.get())

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        assert kernel.allocator is gpu._allocate
        assert type(found[0]).__name__ == "NullAllocator"


def test_launches_are_on_the_device_of_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device, whichever the pointers are of."""
    current: list[Any] = []
    started: list[Any] = []

    @contextlib.contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(gpu, "_start", lambda *_: started.append(list(current)))
    q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in "qkv")
    out = ag.compile(ag.Spec(mask=ag.causal()), backend="interpret")(q, k, v)
    torch.autograd.grad(out.sum(), (q, k, v))
    # forward, delta, dq, dkv, and what looks after three of them
    assert len(started) == 7 and all(len(inside) == 1 and inside[0].shape == q.shape for inside in started)


def test_a_constant_sink_of_a_union() -> None:
    keys, captures = given("union", *(torch.randn(1, heads, N, 16) for heads in (4, 2)))
    with pretending(kernels=False):
        q, k, v = inputs()
        out, lse = ag.oracle(ag.Spec(keys=keys, sink=lambda b, h, i: 0.5), q, k, v, **on("cuda", captures))
        assert out.device == lse.device == CUDA


def test_rows_are_aligned_where_a_descriptor_may_load_them():
    whole = torch.zeros(2, 3, 8, 64, dtype=torch.bfloat16)
    assert is_aligned(whole) and is_aligned(whole[:, :, ::2]) and is_aligned(whole[:1, :, :1].expand(4, 3, 8, 64))
    assert is_aligned(whole.as_strided((1, 3, 8, 64), (7, 512, 64, 1)))  # a stride that nobody takes
    for odd in (whole[..., ::2], whole[..., 1:33], torch.zeros(2, 3, 8, 72)[..., :64]):
        assert not is_aligned(odd)
    assert not is_aligned(whole.as_strided((2, 3, 1, 64), (1536, 512, 24, 1)))
