"""Every function and operator of the language, large constants and scalars on the device: text, forward and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
from attngen.analysis import facts
from attngen.language.expression import Expr, I, J
from attngen.language.expression.parse import parse
from attngen.language.programs import evaluate
from tests.check import check

B, HEADS, KV_HEADS, N_Q, N_K, D = 2, 4, 2, 20, 37, 16
OFFSETS = {"0": 0, "3": 3, "tensor": torch.tensor([2, 5])}

t, heat, keep = ag.Tensor("t", 1), ag.Tensor("heat", 0), ag.Tensor("keep", 4, dtype=torch.bool)
p, n = ag.Param("p", float), ag.Tensor("n", 0, dtype=torch.int32)
lowest = torch.finfo(torch.float32).min


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


SCORES: dict[str, tuple[Any, dict[str, Any]]] = {
    "where -1e30": (lambda s, b, h, i, j: ag.where(i >= j, s, -1e30), {}),
    "where -1e19": (lambda s, b, h, i, j: ag.where((i >= j) | (j < 3), s, -1e19), {}),
    "where finfo.min": (lambda s, b, h, i, j: ag.where((i >= j) | (j < 3), s, lowest), {}),
    "plus where -1e30": (lambda s, b, h, i, j: s + ag.where((i >= j) | (j < 3), 0, -1e30), {}),
    "plus -1e18 a step": (lambda s, b, h, i, j: s + ag.where((i >= j) | (j < 3), 0, 1e18 * (i - j)), {}),
    "tanh of little": (lambda s, b, h, i, j: ag.tanh(s * 1e-20) * 1e20, {}),
    "large soft cap": (ag.soft_cap(1e5), {}),
    "sin cos": (lambda s, b, h, i, j: s.sin() * 3 + ag.cos(i * 0.1) * s, {}),
    "gelu": (lambda s, b, h, i, j: s * (1 + ag.erf(s / 2**0.5)) / 2, {}),
    "exp2": (lambda s, b, h, i, j: ag.exp2(-abs(s)) * 4, {}),
    "powers": (lambda s, b, h, i, j: (s * s + 1) ** -0.5 + (abs(s) + 0.5) ** 1.5 + (abs(s) + 1) ** 1.3 + 1.1**s, {}),
    "power of a param": (lambda s, b, h, i, j: (abs(s) + 1) ** p, dict(p=1.7)),
    "odd power of a param": (lambda s, b, h, i, j: s**p / 10, dict(p=3.0)),
    "roundings": (
        lambda s, b, h, i, j: (
            s * (1 + ag.floor(i * 0.375 + 0.1) % 3)
            + ag.round(j * 0.25) / 10
            + ag.ceil(j / 3) / 100
            + ag.floor(ag.tanh(s) * 0)
        ),
        {},
    ),
    "rounded indices": (
        lambda s, b, h, i, j: s + t[ag.floor(i / 4)] + t[ag.round(ag.exp(j * 0) * 2.5)],
        dict(t=random(9)),
    ),
    "clamps": (lambda s, b, h, i, j: s.clamp(-0.5, 1) + ag.relu(s) + s.clamp(min=0.2), {}),
    "bits": (
        lambda s, b, h, i, j: (
            s
            + 0.1 * ((i | j) & 5)
            + 0.01 * (i >> 2)
            + 0.001 * (j << 2)
            + 0.1 * (1 << (h & 3))
            + 0.1 * ((j >> (i & 3)) & 1)
            + 0.01 * ~i
            + 0.05 * (-5 & j)
            + 0.02 * (i ^ j)
        ),
        {},
    ),
    "a number on the device": (lambda s, b, h, i, j: s * heat + heat * heat, dict(heat=torch.tensor(0.7))),
    "rows of the call": (ag.bias("bhrj"), dict(bias=random(B, HEADS, N_Q, N_K))),
    "one row for all heads": (ag.bias("hr"), dict(bias=random(1, N_Q))),
    "rows and positions": (lambda s, b, h, i, j: s + t[ag.row()] * (i - j) / 9, dict(t=random(N_Q))),
}
MASKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bits": (lambda b, h, i, j: ((i ^ j) & 3) != 1, {}),
    "xor": (lambda b, h, i, j: (i >= j) ^ (j % 3 == 0), {}),
    "floor": (lambda b, h, i, j: ag.floor(i / 4) >= j // 4, {}),
    "shift": (lambda b, h, i, j: i >> 2 >= j >> 2, {}),
    "rows": (lambda b, h, i, j: keep[b, h, ag.row(), j], dict(keep=random(B, 1, N_Q, N_K) > -0.3)),
    "rows in a closed form": (lambda b, h, i, j: (ag.row() >= j - 9) & (i >= j), {}),
    "a number on the device": (lambda b, h, i, j: j < n, dict(n=torch.tensor(17, dtype=torch.int16))),
    "a number on the device in the walk and in a tile": (
        lambda b, h, i, j: ((j < n) | (i + j > 20)) & (ag.floor(ag.exp(i * 0) * j / 2) + n > i),
        dict(n=torch.tensor(17)),
    ),
    "large": (lambda b, h, i, j: i * 1e30 >= j * 1e30, {}),
}


def qkv(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(B, HEADS, N_Q, D), (B, KV_HEADS, N_K, D), (B, KV_HEADS, N_K, D)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attention(spec: ag.Spec, backend: str) -> Any:
    small = ag.Schedule(block_m=16, block_n=16, dq_block_m=16, dq_block_n=16, dkv_block_m=16, dkv_block_n=16)
    return ag.compile(spec, backend=backend, schedule=small if backend == "interpret" else None)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", ["cpu", "interpret"])
def test_scores(backend: str, score: str, dtype: torch.dtype, offset: str):
    given, captures = SCORES[score]
    spec = ag.Spec(score=given)
    check(spec, attention(spec, backend), *qkv(dtype), captures, q_offset=OFFSETS[offset])


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["cpu", "interpret"])
def test_masks(backend: str, mask: str, offset: str):
    given, captures = MASKS[mask]
    spec = ag.Spec(mask=given)
    check(spec, attention(spec, backend), *qkv(torch.float32), captures, q_offset=OFFSETS[offset])


@pytest.mark.parametrize("backend", ["cpu", "interpret"])
def test_a_learned_number_in_the_sink(backend: str):
    spec = ag.Spec(mask=ag.causal(), sink=heat * 2, score=lambda s, b, h, i, j: s * heat)
    check(spec, attention(spec, backend), *qkv(torch.float32), dict(heat=torch.tensor(0.7)))


@pytest.mark.parametrize("name", [*SCORES, *MASKS])
def test_text_round_trip(name: str):
    for spec in [ag.Spec(score=SCORES[name][0])] if name in SCORES else []:
        assert ag.Spec.from_text(str(spec)).key == spec.key
    for spec in [ag.Spec(mask=MASKS[name][0])] if name in MASKS else []:
        assert ag.Spec.from_text(str(spec)).key == spec.key


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("sqrt(2 * abs(s))", "1.4142135623730951 * sqrt(abs(s))"),
        ("(0.123456789 * s) ** 4", "0.00023230572279825924 * (s * s * s * s)"),
        ("1e30 * s / 7", "1.4285714285714285e+29 * s"),
        ("s + where(i >= j, 0, -1e30)", "s + where(i >= j, 0, -1e+30)"),
        ("s + 9007199254740991", "s + 9007199254740991"),
        ("s + 2.0", "s + 2"),
        ("s ** 1.3", "s ** 1.3"),
        ("s ** -1", "1 / s"),
        ("ceil(s)", "-floor(-s)"),
        ("floor(i / 4 + 0.5)", "(i + 2) // 4"),
        ("relu(s)", "max(0, s)"),
        ("clamp(s, -1, 1)", "min(1, max(-1, s))"),
        ("i << 3", "8 * i"),
        ("7 & i & 12", "(4 & i)"),
        ("-(i // 2)", "-(i // 2)"),
        ("(i - j) * exp(i) * 2", "2 * ((i - j) * exp(i))"),
        ("-((i - j) * exp(i))", "-((i - j) * exp(i))"),
        ("where(i > j, 1, 2) * where(i > 3, 2, 3)", "where(i >= 4, 2, 3) * where(i >= j + 1, 1, 2)"),
        ("~i", "-i - 1"),
        ("(i ^ 5 ^ j) | 1", "(1 | (5 ^ i ^ j))"),
    ],
)
def test_canonical_text(text: str, stays: str):
    spec = ag.Spec(score=text)
    assert str(spec).splitlines()[-1] == f"score: {stays}"
    assert ag.Spec.from_text(str(spec)).key == spec.key


def test_values_are_those_of_python():
    import math

    i, j = Expr(I), Expr(J)
    places = range(-9, 10)
    env = {"i": torch.arange(-9, 10), "j": torch.tensor(3)}
    for build in (
        lambda i, j: i & 6, lambda i, j: i | 5, lambda i, j: i ^ 12, lambda i, j: ~i, lambda i, j: i >> 2,
        lambda i, j: i << 3, lambda i, j: i >> j, lambda i, j: i << j, lambda i, j: -7 & i, lambda i, j: i ^ j,
    ):  # fmt: skip
        assert evaluate(build(i, j).sym, env).tolist() == [build(x, 3) for x in places]
    for ours, python in ((ag.floor, math.floor), (ag.ceil, math.ceil), (ag.round, round)):
        for factor in (0.5, 0.37, 1.0):
            assert evaluate(ours(i * factor).sym, env, real=torch.float64).tolist() == [
                python(x * factor) for x in places
            ]
        assert evaluate(ours(Expr(I) * 1e30 + 0.5).sym, env)[0] == -(2**30)


def test_derivatives_are_those_of_torch():
    x = torch.linspace(0.31, 2.1, 7, dtype=torch.float64).requires_grad_()
    for text, value in {
        "sin(s)": x.sin(), "cos(s)": x.cos(), "erf(s)": x.erf(), "exp2(s)": x.exp2(), "s ** 1.3": x**1.3,
        "s ** -2.5": x**-2.5, "2.5 ** s": 2.5**x, "s ** s": x**x, "floor(s)": x * 0, "round(s) * s": x.round() * x,
        "relu(s - 1)": (x - 1).relu(), "clamp(s, 0.5, 1.5)": x.clamp(0.5, 1.5), "s ** 12": x**12,
    }.items():  # fmt: skip
        slope = facts(ag.Spec(score=text)).score_ds
        got = torch.as_tensor(evaluate(slope, {"s": x.detach()}, real=torch.float64)).expand(7).double()
        torch.testing.assert_close(got, torch.autograd.grad(value.sum(), x, retain_graph=True)[0])


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda i: i & 1.5, "make it an integer"),
        (lambda i: (i > 0) & 3, "takes bool"),
        (lambda i: i << 40, "from 0 to 31"),
        (lambda i: i + 2**60, "the limit is 2**53"),
        (lambda i: i**-1 * 0 + (i * 0.5) ** 100, "exponent from -64 to 64"),
        (lambda i: ag.sqrt(-i * i), "not a real number"),
        (lambda i: t[-1], "counts from the start"),
        (lambda i: t[i - i - 2], "counts from the start"),
        (lambda i: ag.Tensor("x", -1), "ndim is 0 to 4"),
        (lambda i: t + 1, "index it"),
        (lambda i: ag.clamp(i), "min, max or both"),
        (lambda i: parse("i >= j & i - j < 5", {}), "put comparisons in parentheses"),
        (lambda i: ag.log(i * 0.0), "not a finite real"),
    ],
)
def test_mistakes_say_what_to_write(build: Any, says: str):
    with pytest.raises(ag.SpecError) as caught:
        build(Expr(I))
    assert says in str(caught.value)
