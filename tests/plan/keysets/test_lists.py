"""Lists of tiles or rows against the definition: the CPU backend, and generated kernels in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
from attngen.inspect.cross import cross_compile
from attngen.language.lists import RowLists, TileLists
from tests.list_cases import row_lists, tile_lists

N_Q, N_K, OFFSET = 37, 45, 8
BACKENDS = ["cpu", "interpret"]
ROWS = {"n_q": 9, "n_k": 13}  # few, since each is a program


def inputs(heads: int = 4, kv_heads: int = 2, batch: int = 2, n_q: int = N_Q, n_k: int = N_K) -> list[torch.Tensor]:
    kv = batch, kv_heads, n_k
    return [torch.randn(batch, heads, n_q, 16), torch.randn(*kv, 16), torch.randn(*kv, 24)]


def check(spec: ag.Spec, qkv: list[torch.Tensor], backend: str = "interpret", **captures: Any) -> None:
    """Forward and gradients, of q, k, v and the float captures, against the oracle."""
    results = []
    for run, dtype in ((ag.compile(spec, backend=backend), torch.float32), (ag.oracle, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in qkv]
        own = {n: t.to(dtype).requires_grad_() if _is_float(t) else t for n, t in captures.items()}
        arguments = {"return_lse": True} if run is not ag.oracle else {}
        out, lse = run(*((spec,) if run is ag.oracle else ()), *leaves, **arguments, **own)
        torch.manual_seed(1)
        loss = (out * torch.randn(out.shape)).sum() + (
            lse.masked_fill(lse.isneginf(), 0) * torch.randn(lse.shape)
        ).sum()
        grads = torch.autograd.grad(loss, [*leaves, *(t for t in own.values() if _is_float(t))])
        results.append((out, lse, *grads))
    for number, (got, want) in enumerate(zip(*results, strict=True)):
        assert torch.equal(got.isneginf(), want.isneginf())
        got, want = (t.masked_fill(t.isneginf(), 0).double() for t in (got, want))
        error = (got - want).norm() / want.norm().clamp(min=1e-9)
        assert error <= (1e-5 if number < 2 else 1e-4), (number, float(error))


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 32), (48, 32)])
def test_tiles_in_both_directions(tile: tuple[int, int], backend: str) -> None:
    """Causal, with lists per head and ragged last tiles, which are partial where they are walked."""
    torch.manual_seed(0)
    m, n = tile
    layout = torch.rand(2, 4, -(-N_Q // m), -(-N_K // n)) < 0.6
    layout[0, 1] = False
    layout[1, :, 0] = False

    def below(r: int, c: int) -> bool:
        return (c + 1) * n - 1 <= r * m + OFFSET

    lists = tile_lists(
        layout,
        lambda r, c: below(r, c) and (c + 1) * n <= N_K,
        lambda r, c: below(r, c) and (r + 1) * m <= N_Q,
    )
    spec = ag.Spec(mask=ag.causal(), score=ag.alibi(), lists=TileLists(m, n))
    check(spec, inputs(), backend, q_offset=OFFSET, slope=torch.randn(4), **lists)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("heads", ["one", "kv", "query"])
def test_rows_in_both_directions(weighted: bool, heads: str, backend: str) -> None:
    torch.manual_seed(0)
    shape = {"one": (1, 1), "kv": (1, 2), "query": (1, 4)}[heads]
    lists = row_lists(*shape, **ROWS, weighted=weighted)
    mask = None if weighted else ag.causal()
    spec = ag.Spec(mask=mask, score=ag.alibi(), lists=RowLists(weighted, heads == "query"))
    check(spec, inputs(batch=1, **ROWS), backend, slope=torch.randn(4), **lists)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_larger_than_a_tile_of_rows(backend: str) -> None:
    torch.manual_seed(0)
    lists = row_lists(1, 1, **ROWS, weighted=True)
    check(ag.Spec(lists=RowLists(weighted=True)), inputs(18, 1, batch=1, **ROWS), backend, **lists)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("captured", ["hij", "i", "hj"])
def test_captured_scores_over_listed_rows(captured: str, backend: str) -> None:
    torch.manual_seed(0)
    lists = row_lists(1, 1, **ROWS)
    sizes = {"h": 4, "i": ROWS["n_q"], "j": ROWS["n_k"]}
    spec = ag.Spec(score=ag.bias(captured), lists=RowLists())
    check(spec, inputs(batch=1, **ROWS), backend, bias=torch.randn([sizes[axis] for axis in captured]), **lists)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_and_values_that_are_not_finite(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (t.to(dtype) for t in inputs(batch=1, **ROWS))
    k[:, :, 3], v[:, :, 3] = torch.nan, torch.inf
    lists = row_lists(1, 1, **ROWS)
    spec = ag.Spec(mask="j != 3", lists=RowLists(), sink=lambda b, h, i: ag.Tensor("sink", 1)[h])
    out, lse = ag.compile(spec)(q, k, v, return_lse=True, sink=torch.randn(4), **lists)
    assert out.isfinite().all() and lse.isfinite().all()
    want, _ = ag.oracle(spec, q, k.nan_to_num(0), v.nan_to_num(0, posinf=0), sink=torch.zeros(4), **lists)
    assert out.shape == want.shape


def test_no_edge_at_all_under_a_score_that_checks_its_loads() -> None:
    q, k, v = inputs(batch=1, **ROWS)
    table = ag.Tensor("table", 2)
    spec = ag.Spec(keys=ag.graph(), score=lambda s, b, h, i, j: s + table[h, ag.absolute(i - j)])
    crow, col = torch.zeros(ROWS["n_q"] + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    out, lse = ag.compile(spec)(q, k, v, return_lse=True, crow=crow, col=col, table=torch.randn(4, 20))
    assert not out.any() and lse.isneginf().all()


def test_lists_have_one_text_and_no_name_of_the_users() -> None:
    for lists in (TileLists(128, 64), RowLists(), RowLists(weighted=True, by_query_head=True)):
        spec = ag.Spec(mask=ag.causal(), lists=lists)
        assert ag.Spec.from_text(spec.text).key == spec.key and spec.lists == lists
    with pytest.raises(ag.SpecError, match="query_tiles"):
        ag.Spec(score="s + query_tiles[i]", tensors=[ag.Tensor("query_tiles", 1)], lists=TileLists(16, 16))
    with pytest.raises(ag.SpecError, match="multiple of 16"):
        TileLists(24, 16)
    with pytest.raises(ag.SpecError, match="lists are"):
        ag.Spec(lists="tiles(a, b)")


def test_a_pinned_block_divides_the_listed_tiles() -> None:
    spec = ag.Spec(lists=TileLists(48, 32))
    with pytest.raises(ag.ScheduleError, match="block_m"):
        cross_compile(spec, "sm_90", schedule=ag.Schedule(block_m=32))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lists", [TileLists(128, 128), RowLists(weighted=True)], ids=["tiles", "rows"])
def test_default_schedules_do_not_spill(target: str, head_dim: int, lists: Any) -> None:
    spec = ag.Spec(mask=ag.causal(), lists=lists)
    for kernel in cross_compile(spec, target, head_dim=head_dim):
        assert kernel.spills == 0, str(kernel)
