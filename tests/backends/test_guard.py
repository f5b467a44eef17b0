"""Values that are not finite, masked and not masked, through every kernel that multiplies weights with values; and what looking
for them costs a call without any.

A row that attends such a value has no number, in out and in the gradients that go through it. Nothing else may change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.backends.triton import launch
from attngen.language.device import multiprocessors
from attngen.language.spec import Spec

N, HEADS, KV, D, AT = 70, 4, 2, 16, 37
TILES = dict(
    block_m=32, block_n=16, dq_block_m=32, dq_block_n=16, dkv_block_m=16, dkv_block_n=32, num_warps=4, num_stages=1
)
SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "split": dict(split=3),
    "stream-K": dict(split="stream", programs=5),
    "packed heads": dict(pack=True),
    "packed stream-K": dict(pack=True, split="stream", programs=7),
    "persistent": dict(persistent=1, dq_persistent=1, dkv_persistent=1),
    "separate sums": dict(dkv_separate_sums=True),
    "persistent separate sums": dict(dkv_persistent=1, dkv_separate_sums=True),
    "longest first": dict(order="longest_first", dq_order="longest_first", dkv_order="longest_first"),
}
DOC = (torch.arange(N) // 23).int()[None]
LISTED = torch.stack([(torch.arange(40) * 7 + row) % N for row in range(N)]).expand(2, HEADS, N, 40)
SPECS: dict[str, tuple[Spec, dict[str, Any]]] = {
    "causal": (ag.Spec(mask=ag.causal()), {}),
    "window": (ag.Spec(mask=ag.causal() & ag.window(9)), {}),
    "documents": (ag.Spec(mask=ag.documents()), dict(doc=DOC)),
    "soft cap": (ag.Spec(mask=ag.causal(), score=ag.soft_cap(2.0)), {}),
    "alibi": (ag.Spec(mask=ag.causal(), score=ag.alibi()), dict(slope=torch.full((HEADS,), 0.1))),
    "sink": (ag.Spec(mask=ag.causal(), sink=ag.sink()), dict(sink=torch.zeros(HEADS))),
}
KEY_SETS: dict[str, tuple[Spec, dict[str, Any]]] = {
    "block_sparse": (
        ag.Spec(keys=ag.block_sparse((32, 32)), mask=ag.causal()),
        dict(layout=torch.ones(1, 1, 3, 3, dtype=torch.bool)),
    ),
    "gather": (ag.Spec(keys=ag.gather(), mask=ag.causal()), dict(index=LISTED)),
    "qk_sparse": (
        ag.Spec(keys=ag.qk_sparse(), mask=ag.causal()),
        dict(keep_q=torch.ones(2, HEADS, N, dtype=torch.bool), keep_k=torch.ones(2, KV, N, dtype=torch.bool)),
    ),
    "union": (
        ag.union(ag.Spec(mask=ag.causal() & ag.window(20)), ag.Spec(mask="i - j >= 20")),
        {},
    ),
}


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn((2, heads, N, D), generator=generator).to(dtype) for heads in (HEADS, KV, KV)]


def attended(spec: Spec, captures: dict[str, Any]) -> torch.Tensor:
    """bool [2, HEADS, N, N], from the oracle's gradient of v: which pairs have a weight."""
    q, k, v = (torch.zeros(2, HEADS, N, size) for size in (D, D, N))
    v[...] = torch.eye(N)
    return ag.oracle(spec, q, k, v, **captures)[0] > 0


def compiled(spec: Spec, schedule: str = "plain") -> Any:
    return ag.compile(spec, backend="interpret", schedule=ag.Schedule(**TILES, **SCHEDULES[schedule]))


def out_and_gradients(
    attn: Any, tensors: list[torch.Tensor], do: torch.Tensor, captures: dict[str, Any]
) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = attn(*leaves, **captures)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


def clean_rows(spec: Spec, captures: dict[str, Any], where: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which queries, by query heads, and which keys, by query heads, a poisoned row AT of q (and do) or k (and v) leaves alone;
    and the cotangent of out: nothing where a row has no number.
    """
    pairs = attended(spec, captures)
    if where in ("k", "v"):
        queries = ~pairs[..., AT]
        keys = torch.ones(2, HEADS, N, dtype=torch.bool)
    else:
        queries = torch.ones(2, HEADS, N, dtype=torch.bool)
        queries[..., AT] = False
        keys = ~pairs[..., AT, :]
    do = torch.randn(2, HEADS, N, D, generator=torch.Generator().manual_seed(3))
    return queries, keys, do


def check(spec: Spec, captures: dict[str, Any], schedule: str, where: str, poison: float, dtype: torch.dtype) -> None:
    attn, tensors = compiled(spec, schedule), inputs(dtype)
    queries, keys, do = clean_rows(spec, captures, where)
    if where in ("k", "v"):  # what is lost must not come back through its own row
        do = torch.where(queries[..., None], do, 0.0)
    want = out_and_gradients(attn, tensors, do.to(dtype), captures)
    if where == "do":
        do[:, :, AT] = poison
    else:
        tensors["qkv".index(where)][:, :, AT] = poison
    got = out_and_gradients(attn, tensors, do.to(dtype), captures)
    shared = keys.unflatten(1, (KV, -1)).all(2)
    limit = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-3, atol=2e-3)
    lost = ~queries if where != "do" else torch.zeros_like(queries)
    torch.testing.assert_close(got[0][~lost], want[0][~lost], **limit)
    assert not lost.any() or not got[0][lost].isfinite().all(-1).any()
    torch.testing.assert_close(got[1][queries], want[1][queries], **limit)
    if where in ("q", "do"):  # a poisoned key's own rows are nan, whoever attends it
        torch.testing.assert_close(got[2][shared], want[2][shared], **limit)
        torch.testing.assert_close(got[3][shared], want[3][shared], **limit)


@pytest.mark.parametrize("where", ["q", "k", "v", "do"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_schedules(schedule: str, where: str, poison: float) -> None:
    check(*SPECS["causal"], schedule, where, poison, torch.float32)


@pytest.mark.parametrize("where", ["q", "k", "v", "do"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_specs(name: str, where: str, dtype: torch.dtype) -> None:
    check(*SPECS[name], "plain", where, -torch.inf if dtype == torch.float16 else torch.nan, dtype)


@pytest.mark.parametrize("where", ["q", "k", "v", "do"])
@pytest.mark.parametrize("name", KEY_SETS)
def test_key_sets(name: str, where: str) -> None:
    check(*KEY_SETS[name], "plain", where, torch.nan, torch.float32)


@pytest.mark.parametrize("where", ["masked", "attended"])
@pytest.mark.parametrize("schedule", ["plain", "split", "stream-K"])
def test_biases(schedule: str, where: str) -> None:
    spec, tensors = ag.Spec(mask=ag.causal(), score=ag.bias("ij")), inputs()
    bias = torch.randn(N, N, generator=torch.Generator().manual_seed(1))
    do = torch.ones(2, HEADS, N, D)
    if where == "attended":
        do[:, :, AT] = 0
    attn = compiled(spec, schedule)
    want = out_and_gradients(attn, tensors, do, dict(bias=bias))
    bad = bias.clone()
    bad[AT, 60 if where == "masked" else 20] = torch.nan
    got = out_and_gradients(attn, tensors, do, dict(bias=bad))
    rows = torch.arange(N) != AT if where == "attended" else torch.ones(N, dtype=torch.bool)
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a[:, :, rows], b[:, :, rows])
    assert where == "masked" or not got[0][:, :, AT].isfinite().any()
    keys = torch.arange(N) > AT if where == "attended" else rows
    for a, b in zip(got[2:], want[2:], strict=True):
        torch.testing.assert_close(a[:, :, keys], b[:, :, keys])


# -- what it costs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """(kernel, programs that it was launched with, how many results it changed) of every guarded kernel."""
    found: list[tuple[str, int, int]] = []
    run = launch._start

    def start(source: Any, programs: int, arguments: list[Any], options: Any) -> None:
        if not source.name.endswith("_guarded"):
            return run(source, programs, arguments, options)
        by_name = dict(zip([arg.name for arg in source.args], arguments, strict=True))
        results = [by_name[n] for n in ("out", "lse", "states", "maxima", "dq", "dk", "dv") if n in by_name]
        before = [t.clone() for t in results]
        for t in results:
            t.fill_(-3.0)
        run(source, programs, arguments, options)
        written = sum(int((t != -3.0).sum()) for t in results)
        for t, old in zip(results, before, strict=True):
            t.copy_(torch.where(t == -3.0, old, t))
        found.append((source.name, programs, written))

    monkeypatch.setattr(launch, "_start", start)
    yield found


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["causal", "documents"])
def test_on_clean_inputs_the_second_launch_does_nothing(
    name: str, schedule: str, launches: list[tuple[str, int, int]]
) -> None:
    if name == "documents" and SCHEDULES[schedule].get("pack"):
        pytest.skip("its tables are of query tiles, which packed heads have not")
    spec, captures = SPECS[name]
    out_and_gradients(compiled(spec, schedule), inputs(), torch.ones(2, HEADS, N, D), captures)
    assert [kernel for kernel, _, _ in launches] == ["forward_guarded", "dq_guarded", "dkv_guarded"]
    assert all(written == 0 for _, _, written in launches)
    most = multiprocessors(torch.device("cpu"))
    assert all(programs <= most for _, programs, _ in launches)


def test_without_masked_pairs_there_is_no_second_launch(launches: list[tuple[str, int, int]]) -> None:
    out_and_gradients(compiled(ag.Spec()), inputs(), torch.ones(2, HEADS, N, D), {})
    assert not launches


def test_only_what_came_out_as_no_number_is_done_again(launches: list[tuple[str, int, int]]) -> None:
    """A value at AT: of three query tiles of 32 rows the first sees nothing of it."""
    q, k, v = inputs()
    v[:, :, AT] = torch.inf
    with torch.no_grad():
        compiled(SPECS["causal"][0])(q, k, v)
    ((_, _, written),) = launches
    assert written == 2 * HEADS * (N - 32) * (D + 1)
