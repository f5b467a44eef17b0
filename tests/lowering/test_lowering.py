"""The printer, the source files, captured gradients and cross-compilation."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch

import attngen as ag
from attngen.analysis import facts
from attngen.errors import ScheduleError
from attngen.inspect.cross import cross_compile
from attngen.language.expression import B, FloorDiv, H, I, J, Load, PyMod, S, Uniform
from attngen.language.expression.builder import RESERVED
from attngen.lowering import kernels_of, passes, render, sites
from attngen.lowering.axes import chunks
from attngen.lowering.kernels import FULL, FULL_PAIRS, NESTED, PROGRAM
from attngen.lowering.printer import Printer
from attngen.lowering.signature import VOCABULARY, first_word
from attngen.lowering.statements import Statements, assign, lines, name
from attngen.schedule import Schedule, complete
from attngen.schedule import Target as Gpu

SMALL = Schedule(
    **{
        prefix + name: value
        for prefix in ("", "dq_", "dkv_")
        for name, value in dict(block_m=16, block_n=16, num_warps=4, num_stages=1).items()
    }
)
T, BIAS = sympy.Symbol("t", real=True), sympy.Symbol("bias", real=True)
WIDTH = sympy.Symbol("width", integer=True)


def printed(expr: Any, rows: str = "i") -> tuple[list[str], list[str], str]:
    """Lines in front of the loop, lines in the loop, and the operand."""
    before, inside = placed(rows, expr)
    return before, inside[:-1], inside[-1].removeprefix("result = ").partition("  #")[0]


def placed(rows: str, *expressions: Any) -> tuple[list[str], list[str]]:
    """Lines in front of the loop and in it, of statements that assign the expressions to `result`."""
    printer = Printer(rows)
    pairs = tuple(assign("result", printer.operand(expr), "ij") for expr in expressions)
    walked = "j" if rows == "i" else "i"
    places: list[Statements] = [()] * (FULL_PAIRS + 1)
    places[FULL] = (assign(walked, name("tile"), walked), assign(f"{walked}_safe", name("tile"), walked))
    places[FULL_PAIRS] = passes.unnest(passes.short(passes.repeated(pairs)), passes.Variables())
    places = passes.place(places, NESTED, frozenset({FULL}), frozenset("s"), PROGRAM)
    places = passes.rename(places, NESTED, lambda variable: False)
    return lines(places[PROGRAM], rows), lines(places[FULL_PAIRS], rows)


# -- printer ----------------------------------------------------------------------------------------------------------


def test_a_separable_comparison_is_one_compare_of_vectors() -> None:
    before, inside, text = printed(sympy.Ge(J - I + WIDTH - 1, 0, evaluate=False))
    assert before == ["first_key = i - width + 1  # [BLOCK_M]"] and inside == []
    assert text == "first_key[:, None] <= j[None, :]"


def test_loads_stand_where_their_indices_are_known() -> None:
    before, inside, text = printed(Load(T, H) * (Load(BIAS, B, I) + Load(BIAS, B, J)))
    assert any(line.startswith("t_h = tl.load(") for line in before)
    assert any(line.startswith("bias_b_i = tl.load(") for line in before)
    assert any(line.startswith("bias_b_j = tl.load(") for line in inside)
    assert "t_h" in text and "bias_b_i[:, None]" in text and "bias_b_j[None, :]" in text


def test_the_pass_over_keys_has_transposed_tiles() -> None:
    assert printed(sympy.Ge(I - J, 0, evaluate=False), rows="j")[2] == "j[:, None] <= i[None, :]"


def test_plain_indices_are_kept_inside_on_lanes_past_the_end_and_others_are_clamped() -> None:
    before, inside, _ = printed(Load(BIAS, I, J - I + 7))
    text = "\n".join(before + inside)
    assert "i_safe.to(tl.int64) * bias_stride_0" in text
    assert re.search(r"bias_index = tl\.maximum\(tl\.minimum\(.*, bias_size_1 - 1\), 0\)", text)


def test_division_rounds_down_unless_it_is_known_to_be_positive() -> None:
    assert printed(FloorDiv(J, sympy.Integer(4)) + B)[1] == ["key_term = j // 4 + b  # [BLOCK_N]"]
    assert printed(FloorDiv(I - J, sympy.Integer(4)))[2] == "floor_div(i[:, None] - j[None, :], 4)"
    assert "floor_mod(" in printed(PyMod(I - J, WIDTH))[2]


def test_dropout_hashes_tiles_only_in_the_last_round() -> None:
    seed = sympy.Symbol("seed", integer=True)
    before, inside, text = printed(Uniform(seed, B, H, I, J))
    assert len(before) == 4 and not inside and text.startswith("uniform(hash_4[:, None] ^ j[None, :]")


@pytest.mark.parametrize(
    ("score", "function"),
    [(sympy.tanh(S / 30), "tanh"), (sympy.tanh(S / 10**6), "tanh_exact"), (sympy.tanh(S / T), "tanh_exact")],
)
def test_tanh_is_exact_near_0_where_that_may_matter(score: Any, function: str) -> None:
    assert printed(score)[2].startswith(f"{function}(")


def test_what_is_printed_twice_is_computed_once() -> None:
    _, inside = placed("i", sympy.tanh(T * S), 1 - sympy.tanh(T * S) ** 2)
    assert len([line for line in inside if "tanh_exact(" in line]) == 1 and len(inside) == 3


def test_nothing_that_nobody_reads_is_left() -> None:
    for kernel in ("forward", "delta", "dq", "dkv"):
        text = source(ag.Spec(mask=ag.causal(), score=ag.alibi()), kernel).text
        body = text[text.index(f"def {kernel}(") :]
        assigned = set(re.findall(r"^ +(\w+) = ", body, re.M))
        assert {name for name in assigned if len(re.findall(rf"\b{name}\b", body)) < 2} == set()


def test_every_variable_of_an_outline_is_declared() -> None:
    """So that no captured tensor is called like one."""
    for path in (Path(__file__).parent / "golden").glob("*.py"):
        tree = ast.parse(path.read_text())
        made = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        own = r"(user_)?(doc|slope|bias|width|hash)(_|$)|(before|first|last|stop|same)_key|(before|first|last|stop|same)_query"
        assert {name for name in made if first_word(name) not in VOCABULARY and not re.match(own, name)} == set()


@pytest.mark.parametrize(
    ("head_dim", "widths"),
    [(1, [16]), (16, [16]), (24, [16, 16]), (80, [64, 16]), (96, [64, 32]), (192, [128, 64]), (256, [256])],
)
def test_head_dims_are_split_not_padded(head_dim: int, widths: list[int]) -> None:
    parts = chunks(head_dim)
    assert [part.width for part in parts] == widths
    assert (parts[-1].limit is None) == (sum(widths) == head_dim)


# -- source -----------------------------------------------------------------------------------------------------------


def plain_schedule() -> Schedule:
    forms = [f"{prefix}{form}" for prefix in ("", "dq_", "dkv_") for form in ("tma", "pipeline_edges", "disable_licm")]
    plain = Schedule(**dict.fromkeys(forms, False)).over(SMALL)
    return complete(ag.Spec(), Gpu.named("sm_90"), 64, 64, torch.bfloat16, plain)


def source(spec: ag.Spec, kernel: str = "forward", **options: Any) -> Any:
    sizes = dict(head_dim=64, head_dim_v=64, dtype=torch.bfloat16, schedule=plain_schedule())
    return render(spec, facts(spec), kernel, **{**sizes, **options})


def test_the_loop_over_edges_loads_ahead_where_a_tile_says_so() -> None:
    for kernel, prefix in (("forward", ""), ("dq", "dq_"), ("dkv", "dkv_")):
        without, schedule = (replace(plain_schedule(), **{f"{prefix}pipeline_edges": edges}) for edges in (False, True))
        plain = source(ag.Spec(mask=ag.causal()), kernel, schedule=without)
        ahead = source(ag.Spec(mask=ag.causal()), kernel, schedule=schedule)
        assert plain.text.count("num_stages=1)") == ahead.text.count("num_stages=1)") + 1
        assert plain.text.replace("tl.range(", "range(").replace(", num_stages=1)", ")") == ahead.text
        again = source(ag.Spec(mask=ag.causal()), f"{kernel}_guarded", schedule=schedule)
        assert again.text == source(ag.Spec(mask=ag.causal()), f"{kernel}_guarded").text  # it may not spill


def test_no_loop_keeps_what_does_not_change_where_a_tile_says_so() -> None:
    for kernel in ("forward", "dq", "dkv", "dkv_guarded"):
        prefix = {"dq": "dq_", "dkv": "dkv_"}.get(kernel.removesuffix("_guarded"), "")
        schedule = replace(plain_schedule(), **{f"{prefix}disable_licm": True})
        plain, made = (source(ag.Spec(mask=ag.causal()), kernel, **given) for given in ({}, {"schedule": schedule}))
        assert made.text.count("disable_licm=True)") == 2 + (
            prefix == "dkv_"
        )  # full, partial, and the heads of a group
        bare = made.text.replace(", disable_licm=True)", ")").replace("tl.range(", "range(")
        assert bare == plain.text.replace("tl.range(", "range(")


@pytest.mark.parametrize(
    ("score", "masked"),
    [
        (ag.soft_cap(30.0), False),
        (lambda s, b, h, i, j: s * ag.sigmoid(s), False),
        (lambda s, b, h, i, j: s / (i - j), True),
        (lambda s, b, h, i, j: ag.exp(s), True),
    ],
)
def test_gradients_are_masked_where_their_slope_may_be_infinite(score: Any, masked: bool) -> None:
    """Elsewhere P = 0 does it."""
    for kernel in ("dq", "dkv"):
        text = source(ag.Spec(mask="i > j", score=score), kernel).text
        assert ("ds = tl.where(valid, ds, 0.0)" in text) == masked
        assert "ds = tl.where(valid, ds, 0.0)" in source(ag.Spec(mask="i > j", score=score), f"{kernel}_guarded").text


def test_a_file_is_written_once_and_named_by_its_content(tmp_path: Path) -> None:
    made = source(ag.Spec(mask=ag.causal()))
    path = made.write(tmp_path)
    stamp = path.stat().st_mtime_ns
    assert made.write(tmp_path) == path and path.stat().st_mtime_ns == stamp
    assert made.key[:16] in path.name and path.read_text() == made.text
    path.write_text("damaged")
    assert made.write(tmp_path).read_text() == made.text
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_arguments_are_those_of_the_kernel_in_order() -> None:
    for kernel in ("forward", "delta", "dq", "dkv"):
        made = source(ag.Spec(mask=ag.documents() & ag.causal(), score=ag.alibi()), kernel)
        head = made.text[made.text.index(f"def {kernel}(") : made.text.index("):\n    #")]
        assert re.findall(r"^    (\w+),", head, re.M) == [arg.name for arg in made.args]
        listed = re.findall(r'^        "(\w+)",', made.text, re.M)
        assert listed == [arg.name for arg in made.args if not arg.specialize]


def test_the_text_depends_on_no_length_and_no_param_value() -> None:
    spec = ag.Spec(mask=ag.causal() & ag.window(ag.Param("width")), score=ag.soft_cap(ag.Param("cap", float)))
    unspecialized = [arg.name for arg in source(spec).args if not arg.specialize]
    assert {"n_q", "n_k", "heads", "group", "scale", "q_offset", "width", "cap"} <= set(unspecialized)


@pytest.mark.parametrize(
    "name", ["acc_0", "q_0", "tile", "lane", "print", "tl", "row_x", "hash_2", "full_first", "a" * 60]
)
def test_names_of_the_user_never_meet_names_of_the_kernel(name: str) -> None:
    spec = ag.Spec(score=f"s + {name}[h, i] * {name}[h, j]", tensors=[ag.Tensor(name, 2)])
    attn = ag.compile(spec, schedule=SMALL, backend="interpret")
    q, k, v = (torch.randn(1, 1, 5, 16) for _ in range(3))
    values = torch.randn(1, 5)
    want, _ = ag.oracle(spec, q, k, v, **{name: values})
    assert torch.allclose(attn(q, k, v, **{name: values}), want.float(), atol=1e-5)


def test_no_statement_assigns_what_is_an_argument() -> None:
    words = sorted(VOCABULARY - RESERVED)
    for place in range(0, len(words), 5):
        names = [n for word in words[place : place + 5] for n in (word, f"{word}_0", f"{word}_first")]
        tensors = [ag.Tensor(n, 2) for n in names]
        spec = ag.Spec(
            mask="(i - j) % 3 == 0 or i >= j + 4",
            score="s + " + " + ".join(f"{n}[h, j]" for n in names),
            tensors=tensors,
        )
        text = source(spec, "dkv").text
        (kernel,) = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "dkv"]
        args = [arg.arg for arg in kernel.args.args]
        made = {node.id for node in ast.walk(kernel) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        assert len(set(args)) == len(args) and not made & set(args)


# -- values that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_reaches_exactly_the_rows_that_attend_to_it(bad: float) -> None:
    spec = ag.Spec(mask=ag.causal() & ag.window(20))
    attn = ag.compile(spec, schedule=SMALL, backend="interpret")
    q, k, v = (torch.randn(1, 1, 50, 16) for _ in range(3))
    clean = attn(q, k, v)
    v[0, 0, 21, 3] = bad
    out = attn(q, k, v)
    rows = torch.zeros(50, dtype=torch.bool)
    rows[21:41] = True
    assert torch.equal(out[0, 0].isfinite().all(-1), ~rows)
    assert torch.equal(out[0, 0, ~rows], clean[0, 0, ~rows])


# -- values that are large --------------------------------------------------------------------------------------------

LOWEST = torch.finfo(torch.float32).min


def compare(
    spec: ag.Spec, dtype: torch.dtype, schedule: Schedule = SMALL, wrt: tuple[str, ...] = (), **captures: Any
) -> None:
    """Forward and gradients of q, k, v and the captures `wrt` against the oracle, on 37 rows and keys."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 37, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    weight = torch.randn(1, 2, 37, 16, generator=generator).to(dtype)
    captures = {n: c.clone().requires_grad_() if n in wrt else c for n, c in captures.items()}
    read = [*inputs, *(captures[n] for n in wrt)]
    out, lse = ag.compile(spec, schedule=schedule, backend="interpret")(*inputs, return_lse=True, **captures)
    want, want_lse = ag.oracle(spec, *inputs, **captures)
    assert torch.equal(lse.isinf(), want_lse.isinf())
    got = [out, *torch.autograd.grad((out * weight).float().sum(), read)]
    wanted = [want, *torch.autograd.grad((want * weight.double()).sum(), read)]
    bound = 1e-5 if dtype == torch.float32 else 4e-3
    for x, y in zip(got, wanted, strict=True):
        assert x.isfinite().all() and (x.double() - y.double()).norm() <= bound * y.double().norm() + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [LOWEST, -2.5e38, -1e38, -1e30, 1e38, 3e38])
def test_rows_whose_bias_is_large_everywhere(size: float, dtype: torch.dtype) -> None:
    bias = torch.zeros(1, 2, 37, 37)
    bias[:, :, :5] = size  # left padding
    bias[:, :, 6, 3:20] = size
    bias[:, :, 7] = torch.where(torch.arange(37) % 2 == 0, LOWEST, -3.3e38)
    compare(ag.Spec(score=ag.bias("bhij")), dtype, wrt=("bias",), bias=bias)
    compare(ag.Spec(mask=ag.causal(), score=ag.bias("bhij")), dtype, bias=bias)


@pytest.mark.parametrize("options", [dict(split=3), dict(split="stream", programs=3), dict(pack=True)], ids=str)
def test_large_logits_through_partial_states(options: dict[str, Any]) -> None:
    compare(ag.Spec(score=ag.bias("j")), torch.float32, Schedule(**options).over(SMALL), bias=torch.full((37,), LOWEST))


def test_a_large_logit_leaves_no_room_for_the_log_of_a_sum() -> None:
    """lse of 37 equal logits of 1e6 is 1e6 in float32, and exp(s - lse) sums to 37."""
    compare(ag.Spec(score=lambda s, b, h, i, j: s * 1e-30 + 1e6), torch.float32)
    compare(
        ag.Spec(score=lambda s, b, h, i, j: s * 1e-30 - 1e9, mask=ag.documents()),
        torch.float32,
        doc=torch.arange(37)[None] // 9,
    )
    sink = ag.Spec(score=lambda s, b, h, i, j: s * 1e-30 + 1e6, sink=ag.sink())
    compare(sink, torch.float32, wrt=("sink",), sink=torch.tensor([1e6, 0.0]))


@pytest.mark.parametrize("options", [dict(), dict(split=3), dict(split="stream", programs=3)], ids=str)
@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("size", [2.0**14, 2.0**30, 2.0**40])
def test_weights_sum_to_one_however_large_the_products_are(size: float, sunk: bool, options: dict[str, Any]) -> None:
    """A step of lse is more than the log of any sum there: dV says what P sums to. Products of powers of 2 are exact."""
    spec = ag.Spec(scale=1.0, mask=ag.causal(), sink=ag.sink() if sunk else None)
    q, k = torch.full((1, 2, 40, 16), (size / 16) ** 0.5), torch.full((1, 2, 40, 16), (size / 16) ** 0.5)
    v = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    captures = dict(sink=torch.tensor([size / 2, 0.0])) if sunk else {}
    attn = ag.compile(spec, schedule=Schedule(**options).over(SMALL), backend="interpret")
    out = attn(q.requires_grad_(), k.requires_grad_(), v, **captures)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(bool(x.isfinite().all()) for x in grads)
    torch.testing.assert_close(grads[2].sum(2), torch.full((1, 2, 16), 40.0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sink", [0.0, 0.45])
def test_the_sink_has_its_gradient_beside_huge_products(sink: float) -> None:
    """What lse lacks is hundreds there: 2 to the power of it is no float."""
    spec, generator = ag.Spec(scale=0.3, sink=ag.sink()), torch.Generator().manual_seed(0)
    q, k, v = torch.zeros(1, 1, 64, 16), torch.zeros(1, 1, 40, 16), torch.randn(1, 1, 40, 16, generator=generator)
    q[..., 0], k[:, :, :20, 0] = 2.0**34 * (1 + torch.rand(64, generator=generator)), 1.0
    leaf = torch.tensor([sink * 2.0**34], requires_grad=True)
    _, lse = ag.compile(spec, backend="interpret")(q, k, v, sink=leaf, return_lse=True)
    _, right = ag.oracle(spec, q, k, v, sink=leaf)
    got, want = (torch.autograd.grad(x.sum(), leaf)[0] for x in (lse, right))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("sunk", [False, True])
def test_what_a_large_lse_lacks_is_of_the_rounded_product_that_dq_takes(sunk: bool, split: int) -> None:
    """lse * log2(e) unrounded, inside of a multiply-add, would put P off by 3e-4 at logits of 1e4. Only compiled code has such."""
    spec = ag.Spec(sink=ag.sink() if sunk else None)
    made = ag.cross_compile(
        spec, target="sm_90", dtype=torch.float32, head_dim=64, schedule=Schedule(split=split), passes=["forward"]
    )
    ptx = next(x.ptx for x in made if x.name == ("forward" if split == 1 else "merge"))
    minus_log2e = "0fBFB8AA3B"
    assert "0f3FB8AA3B" in ptx and not [x for x in ptx.splitlines() if "fma" in x and minus_log2e in x]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "score",
    [
        "where(i >= j, s, -1e30)",
        "where(i >= j + 5, s, -3.4028234663852886e38)",
        "where(i >= j, s, -1e19)",
        "s + where(i >= j, 0, -1e30)",
        "tanh(s * 1e-20) * 1e20",
    ],
)
def test_constants_beyond_integers(score: str, dtype: torch.dtype) -> None:
    compare(ag.Spec(score=score), dtype)


@pytest.mark.parametrize("score", [None, ag.alibi()], ids=["plain", "alibi"])
@pytest.mark.parametrize("low", [-float("inf"), LOWEST, -5.0])
def test_a_low_sink_and_rows_without_a_key(low: float, score: Any) -> None:
    captures = dict(sink=torch.tensor([low, 0.3]), **({} if score is None else dict(slope=torch.tensor([0.1, 0.2]))))
    compare(ag.Spec(mask="i > j + 3", sink=ag.sink(), score=score), torch.float32, wrt=("sink",), **captures)


# -- gradients of captured tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "kind"),
    [
        (lambda s, b, h, i, j: s * ag.Tensor("x", 1)[h], "total"),
        (lambda s, b, h, i, j: s * ag.Tensor("x", 2)[b, i], "rows"),
        (lambda s, b, h, i, j: s + ag.Tensor("x", 2)[h // 2, j], "keys"),
        (lambda s, b, h, i, j: s + ag.Tensor("x", 2)[i, j], "pairs"),
        (lambda s, b, h, i, j: s + ag.Tensor("x", 2)[j, i], "pairs"),
        (lambda s, b, h, i, j: s + ag.Tensor("x", 2)[h, i - j + 9], "bins"),
        (lambda s, b, h, i, j: s + ag.Tensor("x", 2)[i // 2, j // 3], "pairs"),
    ],
)
def test_each_kind_of_captured_gradient(score: Callable[..., Any], kind: str) -> None:
    spec = ag.Spec(mask=ag.causal(), score=score)
    (load_grads,) = facts(spec).load_grads.values()
    assert [site.kind for site in sites(load_grads)] == [kind]
    attn = ag.compile(spec, schedule=SMALL, backend="interpret")
    q, k, v = torch.randn(2, 4, 21, 16), torch.randn(2, 2, 21, 16), torch.randn(2, 2, 21, 16)
    shape = {"total": (4,), "rows": (2, 21), "keys": (2, 21), "pairs": (21, 21), "bins": (4, 33)}[kind]
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(2, 4, 21, 16)
    got = [torch.autograd.grad((attn(q, k, v, x=x) * weight).sum(), x)[0] for _ in range(2)]
    want = torch.autograd.grad((ag.oracle(spec, q, k, v, x=x)[0] * weight).sum(), x)[0]
    assert torch.equal(got[0], got[1])
    assert (got[0] - want).norm() <= 1e-4 * want.norm()
    of_nothing = attn(q[:0], k[:0], v[:0], x=x[:0] if kind == "rows" else x)  # an empty batch
    assert not torch.autograd.grad(of_nothing.sum(), x)[0].any()


@pytest.mark.parametrize("index", ["h, i, j", "h, i // 2, j // 3", "h, i - q_offset, j"])
def test_gradients_of_what_batches_share_at_positions_of_their_own(index: str) -> None:
    """Rows of one number are at other positions in each batch, so that their shares go to other elements."""
    spec = ag.Spec(mask=ag.causal(), score=f"s + x[{index}]", tensors=[ag.Tensor("x", 3)])
    q, k, v, weight = (torch.randn(2, 2, 21, 16) for _ in range(4))
    x, offset = torch.randn(2, 30, 21, requires_grad=True), torch.tensor([0, 5])
    attn = ag.compile(spec, schedule=SMALL, backend="interpret")
    found = [attn(q, k, v, x=x, q_offset=offset), ag.oracle(spec, q, k, v, x=x, q_offset=offset)[0]]
    got, want = (torch.autograd.grad((out * weight).sum(), x)[0] for out in found)
    assert (got - want).norm() <= 1e-4 * want.norm()


LEARNED = {"slope": 1, "pad": 2, "table": 2, "bias": 3, "same": 2}  # and their dimensions
SCORE = (
    "s * (1 + pad[b, j]) + slope[h] * (j - i) + table[h, min(i - j, 7)] + bias[h, i, j] + same[i, j] * bias[h, j, i]"
)


def learned_captures(batch: int, heads: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = {"slope": (heads,), "pad": (batch, 21), "table": (heads, 9), "bias": (heads, 21, 21), "same": (21, 21)}
    return {name: 0.3 * torch.randn(size, generator=generator) for name, size in sizes.items()}


TOGETHER = [
    ((*LEARNED,), 2, 2, {}),
    *(
        pytest.param(wanted, *sizes, decided, marks=pytest.mark.slow)
        for wanted in (("bias",), ("pad", "table"), (*LEARNED,))
        for sizes in ((1, 1), (1, 2), (2, 2))
        for decided in ({}, {"dq_persistent": 1, "dkv_persistent": 1}, {"deterministic": False})
    ),
]


@pytest.mark.parametrize(("wanted", "batch", "heads", "decided"), TOGETHER)
def test_gradients_of_captured_tensors_together(
    wanted: tuple[str, ...], batch: int, heads: int, decided: dict[str, Any]
) -> None:
    """Some are added up by dq, some by dkv, some apart: by whose elements they share, and by which of them are wanted. Also where
    the guarded kernels do again what came out as no number: a key that nobody attends has one.
    """
    spec = ag.Spec(mask="i >= j and j != 5", score=SCORE, tensors=[ag.Tensor(n, ndim) for n, ndim in LEARNED.items()])
    attn = ag.compile(spec, schedule=ag.Schedule(**decided).over(SMALL), backend="interpret")
    q, k, v = torch.randn(batch, heads, 21, 16), torch.randn(batch, 1, 21, 16), torch.randn(batch, 1, 21, 16)
    weight, captures = torch.randn(q.shape), learned_captures(batch, heads)
    leaves = [x.requires_grad_() for x in (q, k, v, *(captures[own] for own in wanted))]
    want = torch.autograd.grad((ag.oracle(spec, q, k, v, **captures)[0] * weight).sum(), leaves)
    bad_k, bad_v = (x.detach().index_fill(2, torch.tensor([5]), float("inf")).requires_grad_() for x in (k, v))
    for given in ([q, k, v], [q, bad_k, bad_v]):
        got = torch.autograd.grad((attn(*given, **captures) * weight).sum(), [*given, *leaves[3:]])
        for own, mine, right in zip(("q", "k", "v", *wanted), got, want, strict=True):
            assert (mine - right).norm() <= 1e-4 * right.norm(), own


# -- cross-compilation ------------------------------------------------------------------------------------------------

CAUSAL = ag.Spec(mask=ag.causal())


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    ("head_dim", "kernel"),
    [*((d, "forward") for d in (64, 128, 192, 256)), *((d, k) for d in (64, 128) for k in ("dq", "dkv"))],
)
def test_default_schedules_fit_and_do_not_spill(target: str, head_dim: int, kernel: str) -> None:
    (made,) = cross_compile(CAUSAL, target, head_dim=head_dim, passes=(kernel,))
    assert made.shared <= Gpu.named(target).shared_limit
    assert made.spills == 0 or target == "gfx942", str(made)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["dq", "dkv"])
@pytest.mark.parametrize("head_dim", [144, 192, 240, 256])
@pytest.mark.parametrize(
    "spec",
    [
        ag.Spec(score=ag.bias("bhij")),
        ag.Spec(mask=ag.causal(), score=[ag.soft_cap(30.0), ag.alibi()], dropout=0.1),
        ag.Spec(mask=ag.neighborhood_2d(64, 7)),
    ],
    ids=["bias", "soft cap, ALiBi, dropout", "neighborhood"],
)
def test_wide_heads_use_whole_warpgroups_without_spills(spec: ag.Spec, head_dim: int, kernel: str) -> None:
    """The tiles of specs for which none ships."""
    (made,) = cross_compile(spec, "sm_90", head_dim=head_dim, passes=(kernel,))
    assert made.spills == 0 and all(loop.products and "HMMA" not in loop.opcodes for loop in made.loops), str(made)


def test_descriptors_take_numbers_of_32_bits() -> None:
    """Also where the mask needs more."""
    spec = ag.Spec(mask=ag.neighborhood_2d(64, 7))
    cross_compile(spec, "sm_90", head_dim=16, schedule=Schedule(tma=True, dq_tma=True, dkv_tma=True))


def test_a_full_tile_costs_no_compare_and_no_select() -> None:
    (causal,) = cross_compile(CAUSAL, "sm_90", head_dim=64, passes=("forward",))
    full, partial = causal.loops
    elements = full.count("exp")  # one exp2 per element and thread, and a few per row
    assert full.count("mma") == partial.count("mma") > 0 and elements >= 32
    # What is left are loop counters: nothing per element.
    assert full.count("select") + full.count("compare") < elements / 2 < partial.count("select")
    assert "FSEL" not in full.opcodes and "FSETP" not in full.opcodes and full.count("spill") == 0


def test_the_results_of_a_compilation() -> None:
    made = cross_compile(CAUSAL, "sm_90", head_dim=64)
    assert [m.name for m in made] == ["forward", "delta", "dq", "dkv"]
    forward = made[0]
    assert forward.ptx and ".target sm_90" in forward.ptx and forward.cubin and forward.registers > 32
    assert "HGMMA" in forward.sass() and str(forward).startswith("forward sm_90: ")


def test_a_schedule_that_does_not_fit_says_by_how_much() -> None:
    big = Schedule(block_m=128, block_n=128, num_warps=8, num_stages=4)
    with pytest.raises(
        ScheduleError, match=r"forward on sm_86 needs \d+ bytes of shared memory, \d+ more than the limit of 101376"
    ):
        cross_compile(CAUSAL, "sm_86", head_dim=128, schedule=big, passes=("forward",))


@pytest.mark.parametrize(
    "spec",
    [
        ag.Spec(mask=ag.documents(), score=[ag.soft_cap(20.0), ag.alibi()], dropout=0.1),
        ag.Spec(mask="(i - j) // 3 >= 0 and (i - j) % 3 == 0", sink="sink[h]", tensors=[ag.Tensor("sink", 1)]),
    ],
    ids=["documents", "dilated"],
)
def test_helpers_compile(spec: ag.Spec) -> None:
    tiles = Schedule(block_m=64, block_n=32, num_warps=4, num_stages=1)
    assert all(made.registers for made in cross_compile(spec, "sm_80", head_dim=64, schedule=tiles))


def test_every_kernel_of_a_spec_can_be_read() -> None:
    for spec in (ag.Spec(), ag.Spec(mask=ag.documents() & ag.causal(), score=ag.alibi())):
        attn = ag.compile(spec)
        for kernel in kernels_of(spec, facts(spec), torch.float32):
            if kernel != "merge":  # of split forwards
                text = attn.source(kernel, head_dim=64, dtype=torch.float32)
                assert f"def {kernel}(" in text or kernel == "tables"
    with pytest.raises(ag.InputError, match="forward_guarded, dq_guarded, dkv_guarded, tables"):
        attn.source("backward", head_dim=64)
