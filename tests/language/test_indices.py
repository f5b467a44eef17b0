"""Indices out of range: one InputError on every backend, and nothing for loads whose value does not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
from attngen.language import indices

t, e, w = ag.Tensor("t", 1), ag.Tensor("e", 1, dtype=torch.int32), ag.Param("w")
causal, N_Q, N_K = ag.causal(), 5, 9
ENTRIES = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9])


def spec(score: Any = None, mask: Any = None) -> ag.Spec:
    return ag.Spec(mask=mask, score=None if score is None else lambda s, b, h, i, j: s + score(b, h, i, j))


def floats(size: int) -> dict[str, torch.Tensor]:
    return {"t": torch.randn(size)}


def tree(size: int) -> dict[str, Any]:
    return dict(ancestor=torch.ones(size, size, dtype=torch.bool).tril(), start=4, q_offset=4)


IDS = dict(doc=torch.zeros(2, 9, dtype=torch.int32))

RIGHT = {
    "shifted": (spec(lambda b, h, i, j: t[j + 5]), floats(14)),
    "shifted, at a scale": (spec(lambda b, h, i, j: t[j + 5]), floats(14) | dict(scale=0.3)),
    "a number": (spec(lambda b, h, i, j: t[3]), floats(4)),
    "distance under causal": (spec(lambda b, h, i, j: t[i - j], causal), floats(5)),
    "distance in a window": (spec(lambda b, h, i, j: t[i - j], causal & ag.window(w)), floats(3) | dict(w=3)),
    "branch of where": (spec(lambda b, h, i, j: ag.where(j < 3, t[2 * j], 0)), floats(5)),
    "part of a mask": (spec(mask=lambda b, h, i, j: (j < 4) & (t[2 * j] > 0)), floats(7)),
    "clamped": (spec(lambda b, h, i, j: t[ag.clamp(i - j, 0, 3)]), floats(4)),
    "of a tensor, masked out": (spec(lambda b, h, i, j: t[e[j]], causal), floats(9) | dict(e=ENTRIES)),
    "of a tensor, past the length": (
        spec(lambda b, h, i, j: t[e[j]]),
        floats(9) | dict(e=ENTRIES, k_len=torch.tensor([8, 3])),
    ),
    "tree": (ag.Spec(mask=ag.tree()), tree(5)),
    "ids": (ag.Spec(mask=ag.documents() & causal), IDS | dict(q_offset=torch.tensor([4, 4]))),
    "ids, a row without keys": (ag.Spec(mask=ag.documents() & causal), IDS | dict(q_offset=torch.tensor([-1, 0]))),
}
WRONG = {
    "shifted": ("t", "`j + 5`", "0 .. 8", 9, spec(lambda b, h, i, j: t[j + 5]), floats(9)),
    "a number": ("t", "`3`", "0 .. 2", 3, spec(lambda b, h, i, j: t[3]), floats(3)),
    "below 0": ("t", "`i - j`", "0 .. 4", -1, spec(lambda b, h, i, j: t[i - j]), floats(5)),
    "distance under causal": ("t", "`i - j`", "0 .. 3", 4, spec(lambda b, h, i, j: t[i - j], causal), floats(4)),
    "distance in a window": (
        "t", "`i - j`", "0 .. 1", 2, spec(lambda b, h, i, j: t[i - j], causal & ag.window(w)), floats(2) | dict(w=3),
    ),
    "branch of where": ("t", "`2 * j`", "0 .. 3", 4, spec(lambda b, h, i, j: ag.where(j < 3, t[2 * j], 0)), floats(4)),
    "of a tensor": ("t", "`e[j]`", "0 .. 8", 9, spec(lambda b, h, i, j: t[e[j]]), floats(9) | dict(e=ENTRIES)),
    "of a tensor, within the length": (
        "t", "`e[j]`", "0 .. 8", 9, spec(lambda b, h, i, j: t[e[j]]),
        floats(9) | dict(e=ENTRIES, k_len=torch.tensor([9, 3])),
    ),
    "tree": ("ancestor", "start", "0 .. 3", 4, ag.Spec(mask=ag.tree()), tree(4)),
    "sink": ("t", "`2 * h`", "0 .. 5", 6, ag.Spec(sink=lambda b, h, i: t[2 * h]), floats(6)),
    "ids, tensor offsets": (
        "doc", "`i`", "0 .. 8", 9, ag.Spec(mask=ag.documents() & causal), IDS | dict(q_offset=torch.tensor([4, 5])),
    ),
    "ids, one offset": (
        "doc", "`i`", "0 .. 8", 9, ag.Spec(mask=ag.documents() & causal), IDS | dict(q_offset=torch.tensor(6)),
    ),
}  # fmt: skip


def qkv() -> list[torch.Tensor]:
    return [torch.randn(2, heads, n, 16) for heads, n in ((4, N_Q), (2, N_K), (2, N_K))]


@pytest.mark.parametrize("case", RIGHT)
@pytest.mark.parametrize("backend", ["cpu", "interpret"])
def test_what_does_not_matter_may_be_out_of_range(backend: str, case: str):
    given, captures = RIGHT[case]
    assert ag.compile(given, backend=backend)(*qkv(), **captures).isfinite().all()


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("backend", ["cpu", "interpret", "oracle"])
def test_one_error_everywhere(backend: str, case: str):
    name, index, wanted, got, given, captures = WRONG[case]
    attn = (lambda *a, **c: ag.oracle(given, *a, **c)) if backend == "oracle" else ag.compile(given, backend=backend)
    if backend == "oracle" and "k_len" in captures:
        pytest.skip("the oracle has no ragged lengths")
    with pytest.raises(ag.InputError) as caught:
        attn(*qkv(), **captures)
    assert caught.value.name == name and caught.value.got == got
    assert index in str(caught.value) and wanted in str(caught.value)


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("backend", ["cpu", "interpret"])
def test_without_checks_nothing_is_read_out_of_bounds(backend: str, case: str, monkeypatch):
    monkeypatch.setenv("ATTNGEN_CHECK", "0")
    *_, given, captures = WRONG[case]
    assert ag.compile(given, backend=backend)(*qkv(), **captures).isfinite().all()


@pytest.mark.parametrize("case", [*RIGHT, *WRONG])
def test_the_device_asserts_the_same(case: str, monkeypatch):
    """What a GPU asserts, on the CPU: an error exactly for the wrong ones."""
    monkeypatch.setattr(indices, "_look", indices._assert)
    given, captures = RIGHT[case] if case in RIGHT and case not in WRONG else WRONG[case][-2:]
    if case in WRONG:
        with pytest.raises(ag.InputError):
            ag.compile(given, backend="cpu")(*qkv(), **captures)
    else:
        assert ag.compile(given, backend="cpu")(*qkv(), **captures).isfinite().all()


def test_proofs_need_no_look(monkeypatch):
    """Sizes and the mask's own bounds decide the usual cases: nothing is computed."""
    monkeypatch.setattr(indices, "_look", lambda *_: pytest.fail("a look"))
    for case in ("shifted", "a number", "distance under causal", "distance in a window", "clamped", "tree", "ids"):
        given, captures = RIGHT[case]
        ag.compile(given, backend="cpu")(*qkv(), **captures)
    bucket = ag.Spec(mask=causal, score=ag.t5_bias())
    ag.compile(bucket, backend="cpu")(*qkv(), rel_bias=torch.randn(32, 4))
