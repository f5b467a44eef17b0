"""What may change at a call without anything being compiled: counted on what Triton keys its compiled kernels by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
from attngen.analysis import facts
from attngen.backends.triton import launch as gpu
from attngen.language.call import bind
from attngen.schedule.choice import complete_for
from tests.compilations import counted


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Distinct compilations that launches would have needed; the kernels themselves do not run."""
    return counted(monkeypatch)


def launch(
    spec: ag.Spec, batch: int, n: int, n_k: int, heads: int = 4, kv: int = 2, q_offset: int = 0, **captures: Any
) -> None:
    q, k, v = torch.zeros(batch, heads, n, 64), torch.zeros(batch, kv, n_k, 64), torch.zeros(batch, kv, n_k, 64)
    call = bind(spec, q, k, v, q_offset=q_offset, captures=captures)
    schedule = complete_for(spec, "sm_90", 64, 64, q.dtype, ag.Schedule())
    out, lse = gpu.forward(call, facts(spec), schedule)
    delta = gpu.delta(out, out, lse)
    gpu.backward(call, facts(spec), schedule, lse, delta, out, [n for n in captures if n == "slope"])


def test_params_lengths_batches_and_heads_compile_nothing(compiled: set[Any]):
    spec = ag.Spec(
        mask=ag.causal() & ag.window(ag.Param("width")), score=[ag.soft_cap(ag.Param("cap", float)), ag.alibi()]
    )
    launch(spec, 2, 200, 200, width=7, cap=3.0, slope=torch.zeros(4))
    first = set(compiled)
    assert len(first) == 8  # forward, dq with the gradient of slope, dkv, each with its guarded kernel, delta, excess
    for width in (1, 16, 100, 1024):
        launch(spec, 2, 200, 200, width=width, cap=width / 7, slope=torch.zeros(4))
    for n, n_k in ((1, 256), (129, 130), (250, 16), (256, 256)):
        launch(spec, 2, n, n_k, width=7, cap=3.0, slope=torch.zeros(4))
    for batch, heads, kv in ((1, 4, 2), (5, 8, 1), (16, 16, 16)):
        launch(spec, batch, 200, 200, heads, kv, width=7, cap=3.0, slope=torch.zeros(heads))
    for scale in (0.1, 1.0, 3.0):
        launch(spec, 2, 200, 200, width=7, cap=3.0, slope=torch.zeros(4), scale=scale)
    launch(spec, 2, 200, 200, q_offset=55, width=7, cap=3.0, slope=torch.zeros(4))
    assert compiled == first


def test_documents_too(compiled: set[Any]):
    spec = ag.Spec(mask=ag.documents() & ag.causal())
    launch(spec, 2, 200, 200, doc=torch.zeros(2, 200, dtype=torch.int32))
    first = set(compiled)
    assert (
        len(first) == 10
    )  # forward, dq and dkv, each with its guarded kernel, delta, excess, and the tables by queries and by keys
    for batch, n in ((1, 200), (4, 130), (2, 255)):
        launch(spec, batch, n, n, doc=torch.zeros(batch, n, dtype=torch.int32))
    assert compiled == first


def test_another_dtype_or_head_dim_is_another_kernel(compiled: set[Any]):
    spec = ag.Spec(mask=ag.causal())
    launch(spec, 1, 64, 64)
    once = len(compiled)
    launch(ag.Spec(mask=ag.window(3)), 1, 64, 64)
    assert len(compiled) > once
