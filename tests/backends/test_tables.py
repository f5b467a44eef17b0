"""Tables of captured data for walks: the generated kernel against torch, value by value, and against the pairs themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attngen as ag
from attngen.analysis import facts
from attngen.backends import interpret, meta
from attngen.backends.triton.compiling import compile_source
from attngen.language.call import bind
from attngen.lowering.tables import render_tables
from attngen.schedule import Schedule, Target, complete

N, HEADS, BATCH = 90, 3, 2
TENSORS = [
    ag.Tensor("doc", 2, dtype=torch.int32),
    ag.Tensor("wide", 2, dtype=torch.int64),
    ag.Tensor("bit", 2, dtype=torch.bool),
    ag.Tensor("time", 2),
    ag.Tensor("edge", 1),
    ag.Tensor("limit", 1, dtype=torch.int32),
]
PARAMS = [ag.Param("gap"), ag.Param("ratio", float)]
# By what their walks read: matches, orders (strict and not), extents, floors, of integers and of real numbers.
MASKS = [
    "doc[b, i] == doc[b, j]",
    "i >= j and doc[b, i] == doc[b, j]",
    "wide[b, i] != wide[b, j]",
    "wide[b, i] == wide[b, j] + gap",
    "doc[b, j] == gap",
    "doc[b, j] == limit[h]",
    "time[b, i] == time[b, j]",
    "time[b, i] != time[b, j]",
    "doc[b, i] >= doc[b, j]",
    "doc[b, i] > doc[b, j] + gap and j <= i",
    "wide[b, j] < limit[h]",
    "time[b, i] >= time[b, j]",
    "time[b, i] + time[b, j] > edge[h]",
    "time[b, j] * 0.5 > ratio",
    "bit[b, i] or not bit[b, j]",
    "i - j < 3 * ratio",
    "i - j < limit[h] * doc[b, i]",
    "j < wide[b, i]",
    "doc[b, i] == doc[b, j] and time[b, i] >= time[b, j] or wide[b, i] == wide[b, j]",
]
CHOSEN = Schedule(block_m=32, block_n=16, dq_block_m=16, dq_block_n=16, dkv_block_m=16, dkv_block_n=64)


def call_of(
    mask: str, seed: int = 0, n_q: int = N, n_k: int = N, q_offset: Any = 0, sort: bool = True, nan: bool = False
):
    generator = torch.Generator().manual_seed(seed)
    length = max(n_q + int(torch.as_tensor(q_offset).max()), n_k)
    values = {
        "doc": torch.randint(-2, 4, (BATCH, length), generator=generator).int(),
        "wide": torch.randint(-2, 4, (1, length), generator=generator) + 2**40 * ("j < wide" not in mask),
        "bit": torch.rand(BATCH, length, generator=generator) < 0.5,
        "time": torch.randn(BATCH, length, generator=generator).mul(3).round().div(3),
        "edge": torch.randn(HEADS, generator=generator),
        "limit": torch.randint(-3, 4, (HEADS,), generator=generator).int(),
    }
    if sort:
        values |= {name: values[name].sort(-1).values for name in ("doc", "wide", "bit", "time")}
    if nan:
        values["time"][0, 7] = values["time"][1, 40:60] = torch.nan
        values["time"][0, 30], values["time"][0, 31] = torch.inf, -torch.inf
    spec = ag.Spec(mask=mask, tensors=TENSORS, params=PARAMS)
    q, k = torch.randn(BATCH, HEADS, n_q, 16), torch.randn(BATCH, 1, n_k, 16)
    named = {**values, "gap": 1, "ratio": 0.7}
    captures = {name: named[name] for name in [*spec.tensors, *spec.params]}
    return bind(spec, q, k, k, q_offset=q_offset, captures=captures)


def agree(call: Any, kernels: tuple[str, ...] = ("forward", "dq", "dkv")) -> None:
    known = facts(call.spec)
    schedule = complete(call.spec, interpret.TARGET, 16, 16, torch.float32, CHOSEN)
    assert known.walk_keys.needs_tables or known.walk_queries.needs_tables
    for kernel in kernels:
        walk = known.walk_queries if kernel == "dkv" else known.walk_keys
        if not walk.needs_tables:
            continue
        got = interpret.tables(call, known, schedule, kernel)
        want = meta.tables(call, known, schedule, kernel)
        assert [*got] == [*want] == [*walk.symbols]
        for name, value in want.items():
            assert got[name].dtype == torch.int32 and got[name].shape[-1] == value.shape[-1]
            assert torch.equal(got[name].expand(BATCH, HEADS, -1), value.expand(BATCH, HEADS, -1)), (kernel, name)


@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "in any order"])
@pytest.mark.parametrize("mask", MASKS)
def test_the_kernel_finds_what_torch_does(mask: str, sort: bool):
    agree(call_of(mask, sort=sort))
    agree(call_of(mask, sort=sort, n_q=33, n_k=70, q_offset=torch.tensor([37, 5])))
    agree(call_of(mask, sort=sort, n_q=1, n_k=17, q_offset=16))


@pytest.mark.parametrize("mask", [mask for mask in MASKS if "time" in mask])
def test_values_that_are_not_finite(mask: str):
    agree(call_of(mask, sort=False, nan=True))


@pytest.mark.parametrize("mask", MASKS[:2] + MASKS[8:9])
def test_more_positions_than_a_chunk(mask: str):
    agree(call_of(mask, n_q=40, n_k=2500, q_offset=1100), ("forward",))
    agree(call_of(mask, n_q=2100, n_k=40), ("dkv",))


@pytest.mark.parametrize("n_q, n_k", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_visit(n_q: int, n_k: int):
    agree(call_of("doc[b, i] == doc[b, j]", n_q=n_q, n_k=n_k, q_offset=3))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(MASKS), st.integers(0, 2**31), st.integers(1, 100), st.integers(1, 100), st.integers(0, 50),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_sizes(mask: str, seed: int, n_q: int, n_k: int, q_offset: int, sort: bool, nan: bool):
    agree(call_of(mask, seed, n_q, n_k, q_offset, sort, nan and n_q + q_offset > 60))


@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mask", MASKS)
def test_it_compiles_without_spills(mask: str, target: str):
    spec = ag.Spec(mask=mask, tensors=TENSORS, params=PARAMS)
    kinds = {name: "wide" if name == "wide" else tensor.kind for name, tensor in spec.tensors.items()}
    known = facts(spec)
    for kernel, walk, block in (("forward", known.walk_keys, 128), ("dkv", known.walk_queries, 64)):
        if not walk.needs_tables:
            continue
        source = render_tables(spec, known, kernel, block, offset_tensor=kernel == "dkv")
        compiled = compile_source(source, Target.named(target), torch.bfloat16, kinds)
        assert compiled.spills == 0, compiled
