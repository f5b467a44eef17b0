"""Random specs and shapes against the oracle: `python -m tests.fuzz --count 1000 --seed 1 [--backend interpret] [--resume FILE]`.

Every case has a number, and its seed and number make it again: a failure prints the line that runs it alone. What is drawn:
masks and scores from all of the language (old and new functions, large constants, params, captures of every kind), GQA, odd
sizes, offsets of every form, dtypes. Numbers that a rounding error could push over a step (floor, comparisons) are whole.

Errors: relative to plain PyTorch's in the same dtype on the same inputs, so that a score that magnifies rounding is not held
against the kernel, with the floors of `tests.check` (float32) or a rounding of the result (half types).
"""

from __future__ import annotations

import argparse
import json
import random
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import attngen as ag
from attngen.reference.dense import plain
from tests.check import LIMITS

PARAMS = [ag.Param("width"), ag.Param("shift"), ag.Param("gain", float)]
TENSORS = [
    ag.Tensor("doc", 2, dtype=torch.int32),
    ag.Tensor("length", 1, dtype=torch.int32),
    ag.Tensor("keep", 2, dtype=torch.bool),
    ag.Tensor("seen", 3, dtype=torch.bool),
    ag.Tensor("count", 0, dtype=torch.int32),
    ag.Tensor("slope", 1),
    ag.Tensor("row_bias", 3),
    ag.Tensor("col_bias", 2),
    ag.Tensor("pair_bias", 3),
    ag.Tensor("table", 2),
    ag.Tensor("heat", 0),
    ag.Tensor("sink", 1),
]
ALLOWED = {torch.float32: 4.0, torch.float64: 4.0, torch.float16: 2.0, torch.bfloat16: 2.0}
SIZES = {"cpu": (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130), "interpret": (1, 2, 15, 16, 17, 31, 33)}


@dataclass
class Case:
    """One attention problem, made from a seed and a number."""

    seed: int
    number: int
    backend: str
    mask: str = "true"
    score: str = "s"
    sink: str | None = None
    sizes: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    q_offset: Any = 0

    @property
    def repro(self) -> str:
        return f"python -m tests.fuzz --seed {self.seed} --case {self.number} --backend {self.backend}"

    def __str__(self) -> str:
        offset = self.q_offset.tolist() if isinstance(self.q_offset, torch.Tensor) else self.q_offset
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        sink = f"\n    sink: {self.sink}" if self.sink else ""
        return f"    mask: {self.mask}\n    score: {self.score}{sink}\n    {sizes} q_offset={offset} {self.dtype}"


class Draw:
    """Draws texts of the language."""

    def __init__(self, source: random.Random):
        self.random = source

    def one(self, *options: Any) -> Any:
        return self.random.choice(options)

    def integer(self, depth: int = 2) -> str:
        """A whole expression in b, h, i, j."""
        if depth == 0 or self.random.random() < 0.2:
            return self.one("i", "j", "i", "j", "h", "i - j", "j - i", "width", "shift", "count", "doc[b, i]", "doc[b, j]",
                            str(self.random.randint(-9, 40)))  # fmt: skip
        a, b, c = self.integer(depth - 1), self.integer(depth - 1), self.random.randint(1, 9)
        return self.one(
            f"({a}) + ({b})", f"({a}) - ({b})", f"{c} * ({a})", f"({a}) // {c}", f"({a}) % {c}", f"abs({a})",
            f"min({a}, {b})", f"max({a}, {b})", f"({a}) & {c}", f"({a}) | {c}", f"({a}) ^ ({b})", f"({a}) >> {c % 4}",
            f"({a}) << {c % 3}", f"floor(({a}) / {c})", f"ceil(({a}) / {c})", f"clamp({a}, {-c}, {4 * c})", f"~({a})",
            f"where({self.atom()}, {a}, {b})", f"relu({a})", f"round(({a}) * 0.5)", f"({a}) >> (({b}) & 3)",
        )  # fmt: skip

    def atom(self) -> str:
        c = self.random.randint(1, 40)
        return self.one(
            "i >= j", "i >= j", "i > j", "j < width", "i != j", f"i - j < {c}", f"abs(i - j) <= {c}", f"i - j >= {c} - shift",
            f"i // {c} >= j // {c}", f"(i - j) % {c} == 0", "doc[b, i] == doc[b, j]", "doc[b, i] >= doc[b, j]",
            "j < length[b]", "keep[b, j]", "keep[b, i]", "seen[h, i - q_offset, j]", "j < count", "i - q_offset >= j // 2",
            f"max(i, j) - min(i, {c}) < width", f"(i + h) % {c} < 2",
        )  # fmt: skip

    def mask(self, depth: int = 2) -> str:
        kind = self.random.random()
        if depth == 0 or kind < 0.3:
            compared = f"{self.integer()} {self.one('>=', '<', '==', '!=', '>', '<=')} {self.integer(1)}"
            return self.atom() if self.random.random() < 0.6 else compared
        a, b = self.mask(depth - 1), self.mask(depth - 1)
        return self.one(f"({a}) & ({b})", f"({a}) | ({b})", f"({a}) | ({b})", f"~({a})", f"({a}) ^ ({b})")

    def logit(self) -> str:
        """A smooth function of s, or one that is continuous."""
        return self.one(
            "s", "s", "3 * tanh(s / 3)", "s * sigmoid(s)", "min(s, 2.0)", "relu(s)", "clamp(s, -1, 1.5)", "sin(s) * 2",
            "cos(s) + s", "s * (1 + erf(s / sqrt(2))) / 2", "exp2(-abs(s))", "(s * s + 1) ** 0.7", "sqrt(s * s + 0.5)",
            "(abs(s) + 0.5) ** gain", "s ** 3 / 4", "log(1 + s * s)", "where(s > 0, s, s / 2)", "exp(-s * s)",
            "tanh(s * 1e-20) * 1e20", "s * heat", "1.5 ** s", "(s * s + 1) ** -1.5", "s * gain", "1e30 * s / 1e30",
            "max(s, -1e30)",
        )  # fmt: skip

    def term(self) -> str:
        large = self.one("-1e30", "-1e19", "-1e38", "-1e9", "-12345678901234567890.0", "-1e18 * abs(i - j)")
        return self.one(
            "slope[h] * (j - i)", "row_bias[b, h, i]", "col_bias[h, j]", f"table[h, ({self.integer()}) % 8]",
            f"table[h, clamp({self.integer()}, 0, 7)]", "pair_bias[h, i - q_offset, j]", "gain", "heat * heat", "slope[h] * heat",
            f"where({self.atom()}, 0.5, 0.0 - gain)", f"where({self.atom()}, 0, {large})", f"where({self.atom()}, 0.0, {large})",
            f"0.01 * ({self.integer()})", "sin(0.25 * i) * cos(j * 0.5)", "0.1 * sqrt(abs(i - j))", "log(1 + abs(i - j)) * slope[h]",
            "0.001 * i ** 2", "tanh(table[h, 3])", "exp2(slope[h])",
        )  # fmt: skip

    def score(self) -> str:
        return " + ".join([self.logit(), *(self.term() for _ in range(self.random.choice((0, 0, 1, 1, 2, 3))))])


def make(seed: int, number: int, backend: str) -> Case:
    """The case of this number."""
    source = random.Random(f"{seed} {number} {backend}")
    draw, sizes = Draw(source), SIZES[backend]
    case = Case(seed, number, backend)
    case.mask, case.score = draw.mask(), draw.score()
    case.sink = draw.one(None, None, None, "sink[h]", "sink[h] + heat", "sink[h] * cos(i * 0.5)")
    batch, groups = (2, (1, 2, 4, 8)) if backend == "cpu" else (2, (1, 2))
    case.sizes = dict(
        batch=source.randint(1, batch),
        kv=draw.one(1, 2),
        group=draw.one(*groups),
        n_q=draw.one(*sizes),
        n_k=draw.one(*sizes),
        d=draw.one(16, 20, 32, 48),
        dv=draw.one(16, 24, 32),
    )
    kinds = (torch.float32, torch.float32, torch.float32, torch.float16)
    case.dtype = draw.one(*kinds, *((torch.float64, torch.bfloat16) if backend == "cpu" else ()))
    offset = draw.one(0, 0, 5, 64)
    each = torch.tensor([source.randint(0, 64) for _ in range(case.sizes["batch"])])
    case.q_offset = draw.one(offset, offset, torch.tensor(offset), each, each.int())
    return case


def inputs(case: Case) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """q, k, v and every capture that a spec may mention."""
    generator, size = torch.Generator().manual_seed(case.number), case.sizes
    batch, kv, heads, n_q, n_k = size["batch"], size["kv"], size["kv"] * size["group"], size["n_q"], size["n_k"]
    positions = max(n_q + int(torch.as_tensor(case.q_offset).max()), n_k)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def whole(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32)

    q, k, v = (
        normal(batch, heads, n_q, size["d"]),
        normal(batch, kv, n_k, size["d"]),
        normal(batch, kv, n_k, size["dv"]),
    )
    few = random.Random(case.number)
    doc = whole(4, batch, positions)
    captures = {
        "doc": few.choice((doc, doc.sort(-1).values, doc.to(torch.int8), doc.long(), doc.to(torch.uint8)[:1])),
        "length": whole(n_k + 1, batch),
        "keep": whole(10, batch, positions) < 7,
        "seen": whole(10, few.choice((1, heads)), n_q, n_k) < 7,
        "count": whole(n_k + 1),
        "slope": 0.1 * normal(few.choice((1, heads))),
        "row_bias": normal(batch, few.choice((1, heads)), positions),
        "col_bias": normal(heads, positions),
        "pair_bias": normal(few.choice((1, heads)), n_q, n_k),
        "table": normal(heads, 8),
        "heat": normal().abs() + 0.5,
        "sink": normal(heads),
        "width": few.randint(1, 60),
        "shift": few.randint(-20, 20),
        "gain": few.choice((0.25, 0.5, 1.0, 1.5)),
    }
    return [t.to(case.dtype) for t in (q, k, v)], captures


def run(case: Case) -> None:
    """AssertionError for a wrong result; whatever else is raised is a fault of its own."""
    spec = ag.Spec(mask=case.mask, score=case.score, sink=case.sink, params=PARAMS, tensors=TENSORS)
    assert ag.Spec.from_text(str(spec)).key == spec.key, f"its text says something else: {spec}"
    tensors, values = inputs(case)
    captures = {name: values[name] for name in [*spec.tensors, *spec.params]}
    small = ag.Schedule(block_m=16, block_n=16, dq_block_m=16, dq_block_n=16, dkv_block_m=16, dkv_block_n=16)
    attn = ag.compile(spec, backend=case.backend, schedule=small if case.backend == "interpret" else None)
    got = results(lambda *a, **c: attn(*a, return_lse=True, **c), case, tensors, captures)
    want = results(lambda *a, **c: ag.oracle(spec, *a, **c), case, tensors, captures)
    yardstick = results(lambda *a, **c: plain(spec, *a, **c), case, tensors, captures)
    if case.dtype.itemsize == 2:  # where plain PyTorch overflows, what float32 makes of it: kernels compute in that
        wide = results(lambda *a, **c: plain(spec, *a, **c), case, [t.float() for t in tensors], captures)
        for name, value in yardstick.items():
            if value is not None:
                yardstick[name] = torch.where(value.isfinite(), value.double(), wide[name].double())

    def noise(name: str) -> float:
        """What rounding may leave of dP - delta, which cancel where a row's weight lies on few keys; or, where the score has a kink
        at a logit that is 0 to the last bit, what the last bit of q makes of it there.
        """
        generator = torch.Generator().manual_seed(case.number)
        last_bit = 1 + 1e-7 * torch.randn(tensors[0].shape, generator=generator, dtype=torch.float64)
        nearby = [tensors[0].double() * last_bit, *(t.double() for t in tensors[1:])]
        moved = results(lambda *a, **c: ag.oracle(spec, *a, **c), case, nearby, captures)[f"gradient of {name}"]
        kinks = 2 * (moved.double() - want[f"gradient of {name}"].double()).norm().item()
        return kinks + cancelled(name)

    def cancelled(name: str) -> float:
        eps = torch.finfo(case.dtype).eps * (1 if case.dtype.itemsize == 2 and name in ("q", "k") else 4)
        if name not in ("q", "k"):  # a capture: of a sum over all pairs
            dp = tensors[2].double().norm(dim=-1).max().item() * case.sizes["dv"] ** 0.5
            return eps * dp * tensors[0][..., 0].numel()
        leaves = {n: t.detach().double().requires_grad_() for n, t in zip("qkv", tensors, strict=True)}
        out, lse = ag.oracle(spec, *leaves.values(), q_offset=case.q_offset, **captures)
        delta = (cotangents(out, lse)[0] * out.detach()).abs().sum(-1)  # of each row: delta is off by eps times this
        return eps * torch.autograd.grad(lse, leaves[name], delta)[0].norm().item()

    for name in got:
        compare(name, got[name], want[name], yardstick[name], case.dtype, noise)


def cotangents(out: torch.Tensor, lse: torch.Tensor) -> list[torch.Tensor]:
    """What out and lse are multiplied with in the loss, which adds up all of that."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (out, lse)]


def results(function: Any, case: Case, tensors: list[torch.Tensor], captures: dict[str, Any]) -> dict[str, Any]:
    """out, lse and all gradients by name."""
    leaves = dict(zip("qkv", tensors, strict=True))
    leaves |= {n: t for n, t in captures.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    given = {**captures, **{n: t for n, t in leaves.items() if n not in ("q", "k", "v")}}
    out, lse = function(leaves["q"], leaves["k"], leaves["v"], q_offset=case.q_offset, **given)
    weights = cotangents(out, lse)
    seen = torch.where(lse.isfinite(), lse, 0.0)
    loss = (out.double() * weights[0]).sum() + (seen.double() * weights[1] / 8).sum()
    grads = (
        torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        if loss.requires_grad
        else [None] * len(leaves)
    )
    return {"out": out, "lse": lse, **{f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}}


def compare(name: str, got: Any, want: Any, yardstick: Any, dtype: torch.dtype, noise: Callable[[str], float]) -> None:
    """AssertionError if the error passes the allowed one; `noise`: what a gradient may be off by whatever its size."""
    if want is None:
        assert got is None or not got.any(), f"{name}: not 0"
        return
    assert got is not None, f"{name}: none"
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}"
    got, want = got.detach().double(), want.detach().double()
    if name == "lse":
        assert torch.equal(got.isneginf(), want.isneginf()), "lse: rows without a key differ"
        got, want = torch.where(want.isneginf(), 0.0, got), torch.where(want.isneginf(), 0.0, want)
    assert want.isfinite().all(), f"{name}: the oracle is not finite"
    assert got.isfinite().all(), f"{name}: not finite"
    other = want if yardstick is None else yardstick.detach().double()
    other = torch.where(other.isfinite(), other, want)
    if dtype.itemsize == 2 and name != "lse":
        error, scale = (got - want).abs(), want.abs()
        least = torch.finfo(dtype).eps * (scale.max().item() if scale.numel() else 0.0)
        factor = ALLOWED[dtype] * (1.0 if name == "out" else 1.5)
        allowed = factor * max((other - want).abs().max().item() if want.numel() else 0.0, least)
        worst = error.max().item() if error.numel() else 0.0
    else:
        size = max(want.norm().item(), 1e-6 * want.numel() ** 0.5, 1e-30)
        limit = LIMITS["gradient" if name.startswith("gradient") else name] * (1e3 if dtype.itemsize == 2 else 1)
        worst = (got - want).norm().item() / size
        allowed = max(limit, ALLOWED[dtype] * (other - want).norm().item() / size)
        if want.norm().item() <= 1e-6:  # sums that cancel: nothing is left to be relative to
            worst *= 1e-2
    of = name.split()[-1]
    if worst > allowed and name.startswith("gradient") and of != "v":
        worst = 0.0 if (got - want).norm().item() <= noise(of) else worst
    assert worst <= allowed, f"{name}: error {worst:.2e}, allowed {allowed:.2e}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--case", type=int, help="only this one, with its traceback")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep what is done here, and go on from there")
    given = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, under the interpreter: infinities are meant
    if given.case is not None:
        case = make(given.seed, given.case, given.backend)
        print(case)
        run(case)
        print("right")
        return 0
    found: Counter[str] = Counter()
    first = 0
    if given.resume is not None and given.resume.exists():
        lines = [json.loads(line) for line in given.resume.read_text().splitlines()]
        mine = [line for line in lines if (line["seed"], line["backend"]) == (given.seed, given.backend)]
        first = max((line["done"] for line in mine), default=0)
        found.update(mine[-1]["found"] if mine else {})
    start = time.monotonic()
    for number in range(first, given.count):
        case = make(given.seed, number, given.backend)
        try:
            run(case)
            found["right"] += 1
        except Exception as error:
            kind = (
                "wrong"
                if isinstance(error, AssertionError)
                else "refused"
                if isinstance(error, ag.AttngenError)
                else "raw"
            )
            found[kind] += 1
            what = str(error).splitlines()[0][:300] if str(error) else ""
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = "" if kind == "wrong" else f" at {Path(where.filename).name}:{where.lineno}"
            print(f"{kind}: {type(error).__name__}: {what}{place}\n{case}\n    {case.repro}", flush=True)
        if given.resume is not None and ((number + 1) % 25 == 0 or number + 1 == given.count):
            with given.resume.open("a") as file:
                state = dict(seed=given.seed, backend=given.backend, done=number + 1, found=dict(found))
                file.write(json.dumps(state) + "\n")
    words = ", ".join(f"{found[kind]} {kind}" for kind in ("right", "wrong", "refused", "raw"))
    print(f"{given.count} cases on {given.backend}, seed {given.seed}: {words}; {time.monotonic() - start:.0f} s")
    return 0 if found["right"] == given.count else 1


if __name__ == "__main__":
    raise SystemExit(main())
