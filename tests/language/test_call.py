"""What does not fit a spec is refused by name, with what was expected and what came."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import attngen as ag

SPEC = ag.Spec(
    mask=ag.documents() & (lambda w: ag.window(w))(ag.Param("width")),
    score=[ag.alibi(), ag.bias("hij")],
    dropout=ag.Param("p", float),
)


def arguments(**changed):
    torch.manual_seed(0)
    base = dict(
        q=torch.randn(2, 4, 8, 16),
        k=torch.randn(2, 2, 9, 16),
        v=torch.randn(2, 2, 9, 24),
        doc=torch.zeros(2, 9, dtype=torch.int32),
        slope=torch.zeros(4),
        bias=torch.zeros(4, 8, 9),
        width=5,
        p=0.1,
        seed=3,
    )
    return {name: value for name, value in (base | changed).items() if value is not ...}


BAD = [
    (dict(q=torch.randn(2, 4, 8)), "q", "4 dimensions"),
    (dict(q=[1.0]), "q", "torch.Tensor"),
    (dict(q=torch.zeros(2, 4, 8, 16, dtype=torch.int32)), "q", "float16"),
    (dict(k=torch.randn(2, 2, 9, 16).half()), "k", "torch.float32 like q"),
    (dict(k=torch.randn(2, 3, 9, 16), v=torch.randn(2, 3, 9, 16)), "k", "divides q's 4"),
    (dict(k=torch.randn(2, 2, 9, 32)), "k", "head dim 16"),
    (dict(v=torch.randn(2, 2, 7, 24)), "v", "[*, 2, 9, *]"),
    (dict(k=torch.randn(1, 2, 9, 16)), "k", "batch 2"),
    (dict(q=torch.randn(2, 4, 8, 300), k=torch.randn(2, 2, 9, 300)), "q", "1 to 256"),
    (dict(k=torch.randn(2, 2, 9, 16, device="meta")), "k", "device cpu"),
    (dict(doc=...), "doc", "nothing"),
    (dict(doc=torch.zeros(2, 9)), "doc", "int32 or int64"),
    (dict(doc=torch.zeros(9, dtype=torch.int32)), "doc", "2 dimensions"),
    (dict(doc=torch.zeros(2, 5, dtype=torch.int32)), "doc", "at least"),
    (dict(doc=3), "doc", "torch.Tensor"),
    (dict(slope=torch.zeros(3)), "slope", "at least 4"),
    (dict(slope=ag.alibi_slopes(8)), "slope", "4 (or 1)"),
    (dict(doc=torch.zeros(3, 9, dtype=torch.int32)), "doc", "2 (or 1)"),
    (dict(doc=torch.zeros(2, 9, dtype=torch.uint64)), "doc", "int32 or int64"),
    (dict(width=torch.tensor(5)), "width", "ag.Tensor('width', 0, dtype=torch.int32)"),
    (dict(p=torch.tensor(0.1)), "p", "ag.Tensor('p', 0)"),
    (dict(width=True), "width", "Python int"),
    (dict(q_offset=torch.tensor(1.0)), "q_offset", "int tensor"),
    (dict(bias=torch.zeros(4, 8, 5)), "bias", "at least 9"),
    (dict(width=...), "width", "nothing"),
    (dict(width=2.5), "width", "Python int"),
    (dict(width=2**40), "width", "32 bits"),
    (dict(p="x"), "p", "Python float"),
    (dict(p=1.5), "p", "[0, 1)"),
    (dict(seed=...), "seed", "nothing"),
    (dict(typo=3), "typo", "unknown name"),
    (dict(q_offset=1.5), "q_offset", "an int"),
    (dict(q_offset=torch.zeros(3, dtype=torch.int32)), "q_offset", "[2]"),
    (dict(q_offset=-1), "q_offset", "0 or more"),
]


@pytest.mark.parametrize(("changed", "name", "says"), BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("backend", ["cpu", "interpret"])
def test_bad_input(changed, name: str, says: str, backend: str):
    with pytest.raises(ag.InputError) as caught:
        ag.compile(SPEC, backend=backend)(**arguments(**changed))
    assert caught.value.name == name and says in str(caught.value), str(caught.value)


def test_the_same_checks_guard_the_oracle():
    with pytest.raises(ag.InputError, match="doc"):
        ag.oracle(SPEC, **arguments(doc=...))


def test_good_input_passes_and_size_one_broadcasts():
    wide = ag.compile(SPEC)(**arguments(bias=torch.ones(4, 8, 9)))
    narrow = ag.compile(SPEC)(**arguments(bias=torch.ones(4, 1, 1)))
    assert wide.shape == (2, 4, 8, 24)
    torch.testing.assert_close(wide, narrow)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: ag.compile(3), ag.SpecError, "expected a Spec"),
        (lambda: ag.compile(ag.Spec(), backend="cuda"), ag.InputError, "backend"),
        (lambda: ag.compile(ag.Spec(), backend="triton")(*[torch.randn(1, 1, 4, 16)] * 3), ag.InputError, "CUDA"),
        (lambda: ag.Schedule(block_m=-64), ag.ScheduleError, "block_m: expected a power of two"),
        (lambda: ag.Schedule(block_m=100), ag.ScheduleError, "got 100"),
        (lambda: ag.Schedule(num_warps=3), ag.ScheduleError, "num_warps"),
        (lambda: ag.Schedule(num_stages=99), ag.ScheduleError, "num_stages"),
        (lambda: ag.Schedule(precision="fp8"), ag.ScheduleError, "tf32"),
        (lambda: ag.tile_map(ag.Spec(), 64, 64, -16, 16), ag.InputError, "block_m"),
        (
            lambda: ag.cross_compile(ag.Spec(), target="sm_1", dtype=torch.float16, head_dim=64),
            ag.ScheduleError,
            "sm_90",
        ),
        (
            lambda: ag.cross_compile(
                ag.Spec(),
                target="sm_86",
                dtype=torch.float16,
                head_dim=256,
                passes=("forward",),
                schedule=ag.Schedule(block_m=128, block_n=128, num_stages=4),
            ),
            ag.ScheduleError,
            "shared memory",
        ),
    ],
)
def test_bad_schedules_and_targets(make, error, says: str):
    with pytest.raises(error) as caught:
        make()
    assert says in str(caught.value)


@pytest.mark.parametrize("backend", ["cpu", "interpret"])
@pytest.mark.parametrize(
    "changed",
    [
        dict(width=np.int64(5), p=np.float32(0.1)),
        *(
            dict(doc=torch.zeros(2, 9, dtype=d))
            for d in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int64)
        ),
        dict(q_offset=torch.tensor(1), bias=torch.zeros(4, 9, 9)),
        dict(q_offset=torch.tensor(1, dtype=torch.int16), bias=torch.zeros(4, 9, 9)),
        dict(q_offset=torch.tensor([1, 7, 1, 7], dtype=torch.int32)[::2], bias=torch.zeros(4, 9, 9)),
        dict(q_offset=np.int32(1), bias=torch.zeros(4, 9, 9)),
        dict(doc=torch.zeros(2, 20, dtype=torch.int32), bias=torch.zeros(4, 12, 13)),
    ],
    ids=range(11),
)
def test_numbers_of_every_kind_are_accepted(changed, backend: str):
    attn = ag.compile(SPEC, backend=backend)
    plain = {"bias": changed["bias"], "q_offset": 1} if "q_offset" in changed else {}
    assert torch.equal(attn(**arguments(**changed)), attn(**arguments(**plain)))


def test_rows_of_a_call_need_rows_that_stay():
    spec = ag.Spec(mask=ag.causal(), score=ag.bias("bhrj"))
    with pytest.raises(ag.SpecError, match="row"):
        ag.nn.Block(32, 2, spec)
    moved = ag.Spec(mask=ag.causal(), score=ag.bias("bhrj"), keys=ag.qk_sparse())
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    keep = torch.ones(1, 2, 8, dtype=torch.bool)
    with pytest.raises(ag.SpecError, match="moves rows"):
        ag.compile(moved)(q, k, v, bias=torch.zeros(1, 2, 8, 8), keep_q=keep, keep_k=keep)


def test_rows_of_packed_sequences():
    """Each sequence counts its rows from 0."""
    spec = ag.Spec(mask=ag.causal(), score=ag.bias("brj"))
    q, k, v = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)
    bias, offset = torch.randn(2, 5, 6), torch.tensor([2, 1])
    cu_q, cu_k = torch.tensor([0, 4, 9]), torch.tensor([0, 6, 12])
    got = ag.compile(spec)(q, k, v, cu_q=cu_q, cu_k=cu_k, q_offset=offset, bias=bias)
    for n, (rows, keys) in enumerate([(slice(0, 4), slice(0, 6)), (slice(4, 9), slice(6, 12))]):
        own = bias[n : n + 1, : rows.stop - rows.start]
        parts = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
        want = ag.oracle(spec, *parts, q_offset=int(offset[n]), bias=own)[0]
        torch.testing.assert_close(got[:, :, rows].double(), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ag.InputError, match="4 positions"):
        ag.compile(spec)(q, k, v, cu_q=cu_q, cu_k=cu_k, q_offset=offset, bias=bias[:, :4])
