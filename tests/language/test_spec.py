"""Specs: three ways to write one, one key; text and TOML round trips; what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings

import attngen as ag
from attngen.language import expression, programs
from tests.strategies import Case, cases

PADDING = torch.ones(2, 8, dtype=torch.bool)


def or_masks(b, h, i, j):
    """As FlexAttention's or_masks begins."""
    return b.new_zeros((), dtype=torch.bool) | (i >= j)


MASKS = {
    "causal": ag.causal(),
    "window": ag.window(7),
    "window left right": ag.window(left=3, right=9),
    "prefix": ag.prefix_lm(5),
    "prefix per batch": ag.prefix_lm(ag.Tensor("prefix", 1, dtype=torch.int32)),
    "global": ag.window(5) | ag.global_tokens(3),
    "dilated": ag.dilated_window(4, 3),
    "documents": ag.documents() & ag.causal(),
    "block causal": ag.block_causal(16),
    "neighborhood": ag.neighborhood_2d(8, 2),
    "tree": ag.tree(),
    "none": None,
}
SCORES = {
    "s": None,
    "alibi": ag.alibi(),
    "soft cap": ag.soft_cap(30.0),
    "bias": ag.bias("hij"),
    "t5": ag.t5_bias(),
    "t5 causal": ag.t5_bias(bidirectional=False),
    "several": [ag.soft_cap(20), ag.alibi(), ag.bias("j")],
}


def test_three_ways_one_key():
    combined = ag.Spec(mask=ag.causal() & ag.window(1024))
    function = ag.Spec(mask=lambda b, h, i, j: (i >= j) & (i - j < 1024))
    text = ag.Spec(mask="i >= j and i - j < 1024")
    assert combined.key == function.key == text.key
    assert combined == function and hash(combined) == hash(text)
    assert ag.Spec(mask=ag.causal() & ag.window(1025)).key != combined.key


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("score", SCORES, ids=str)
def test_text_round_trip(mask: str, score: str):
    spec = ag.Spec(mask=MASKS[mask], score=SCORES[score], sink=ag.sink(), dropout=0.25, scale=0.5)
    again = ag.Spec.from_text(str(spec))
    assert str(again) == str(spec) and again.key == spec.key
    assert again.tensors == spec.tensors and set(again.params) == set(spec.params)
    assert pickle.loads(pickle.dumps(spec)).key == copy.deepcopy(spec).key == spec.key


@settings(max_examples=200)
@given(case=cases())
def test_random_specs_round_trip(case: Case):
    spec = case.spec()
    assert ag.Spec.from_text(str(spec)).key == spec.key


def test_schedule_and_name_are_no_part_of_the_key():
    schedule = ag.Schedule(block_m=64)
    assert ag.Spec(mask=ag.causal(), schedule=schedule, name="x").key == ag.Spec(mask=ag.causal()).key


def test_toml(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'mask = "doc[b, i] == doc[b, j] and i - j < width"\nscore = "s + slope[h] * (j - i)"\n'
        '[params]\nwidth = "int"\n[tensors]\ndoc = "int[2]"\nslope = "float[1]"\n[schedule]\nblock_m = 64\n'
    )
    spec = ag.Spec.from_toml(path)
    doc, slope, width = ag.Tensor("doc", 2, dtype=torch.int32), ag.Tensor("slope", 1), ag.Param("width")
    same = ag.Spec(
        mask=lambda b, h, i, j: (doc[b, i] == doc[b, j]) & (i - j < width),
        score=lambda s, b, h, i, j: s + slope[h] * (j - i),
    )
    assert spec.key == same.key and spec.name == "mine" and spec.schedule == ag.Schedule(block_m=64)
    path.write_text("maks = 'i >= j'")
    with pytest.raises(ag.SpecError, match="unknown keys"):
        ag.Spec.from_toml(path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(mask="s > 0"), "cannot use s"),
        (dict(mask=lambda b, h, i, j: i - j), "expected a condition"),
        (dict(mask=lambda i, j: i >= j), "takes (b, h, i, j)"),
        (dict(mask=lambda b, h, i, j: None), "expected a number or a symbolic expression"),
        (dict(mask=3.5), "expected a condition"),
        (dict(score="i >= j"), "expected a number"),
        (dict(score=lambda s, b, h, i, j: s if i >= j else 0), "no truth value"),
        (dict(sink="j"), "no j"),
        (dict(dropout=1.5), "[0, 1)"),
        (dict(dropout="i"), "float Param"),
        (dict(dropout=ag.Tensor("p", 0)[()]), "float Param"),
        (dict(mask=lambda b, h, i, j: PADDING[b, j]), "ag.Tensor"),
        (dict(mask=lambda b, h, i, j: (i >= j) & PADDING), "ag.Tensor"),
        (dict(mask=lambda b, h, i, j: PADDING.numpy()[b, j]), "`PADDING`"),
        (dict(score=lambda s, b, h, i, j: torch.tanh(s)), "ag.tanh"),
        (dict(score=lambda s, b, h, i, j: torch.where(i >= j, s, 0)), "ag.where"),
        (dict(score=lambda s, b, h, i, j: torch.minimum(s, 0 * s)), "ag.minimum"),
        (dict(score=lambda s, b, h, i, j: torch.softmax(s, 0)), "attngen has the functions"),
        (dict(mask=lambda b, h, i, j: i.new_ones(()) & (i >= j)), "ag.where, ag.minimum, ag.tanh"),
        (dict(mask=or_masks), "ag.where, ag.minimum, ag.tanh"),
        (dict(score=lambda s, b, h, i: s), "takes (s, b, h, i, j)"),
        (dict(score=lambda s, *, scale, **more: s), "takes (s, b, h, i, j)"),
        (dict(keys=ag.union(ag.Spec(), ag.Spec())), "already is a Spec"),
        (dict(scale=float("nan")), "finite"),
        (dict(mask="doc[b, i] == doc[b, j]"), "not declared"),
        (dict(mask=ag.documents(), score=ag.Tensor("doc", 1)[ag.Expr(expression.H)]), "declared twice"),
    ],
)
def test_bad_specs(arguments: dict, says: str):
    with pytest.raises(ag.SpecError) as caught:
        ag.Spec(**arguments)
    assert says in str(caught.value)


def test_equal_declarations_may_repeat():
    spec = ag.Spec(mask=ag.documents() & (ag.documents() | ag.causal()))
    assert list(spec.tensors) == ["doc"]


def test_t5_buckets_are_those_of_the_paper_code():
    def reference(relative: torch.Tensor, bidirectional: bool, buckets: int = 32, most: int = 128) -> torch.Tensor:
        result = torch.zeros_like(relative)
        if bidirectional:
            buckets //= 2
            result += (relative > 0).long() * buckets
            relative = relative.abs()
        else:
            relative = -torch.minimum(relative, torch.zeros_like(relative))
        exact = buckets // 2
        large = (
            exact
            + (torch.log(relative.float() / exact) / torch.log(torch.tensor(most / exact)) * (buckets - exact)).long()
        )
        return result + torch.where(relative < exact, relative, large.clamp(max=buckets - 1))

    i, j = torch.arange(300).view(-1, 1), torch.arange(300).view(1, -1)
    for bidirectional in (True, False):
        spec = ag.Spec(score=ag.t5_bias(bidirectional=bidirectional))
        (load,) = expression.loads(spec.score)
        got = programs.evaluate(load.indices[0], {"i": i, "j": j})
        assert torch.equal(torch.broadcast_to(got, (300, 300)).long(), reference(j - i, bidirectional))


def test_document_ids_of_lengths():
    want = torch.tensor([0, 0, 0, 2], dtype=torch.int32)
    for lengths in ([3, 0, 1], (3, 0, 1), torch.tensor([3, 0, 1]), torch.tensor([3, 0, 1], dtype=torch.int32)):
        found = ag.document_ids(lengths)
        assert found.dtype == torch.int32 and torch.equal(found, want)
    assert ag.document_ids([]).shape == (0,)


@pytest.mark.parametrize(
    "lengths", [3, [1.0], [True], [-1], "12", torch.ones(3), torch.ones(1, 3, dtype=torch.int32)], ids=str
)
def test_document_ids_of_something_else(lengths):
    with pytest.raises(ag.InputError, match=r"lengths: expected an int tensor \[D\], or a sequence of ints"):
        ag.document_ids(lengths)


@pytest.mark.parametrize(
    "given", [{"params": ["width"]}, {"params": "width"}, {"tensors": ["bias"]}, {"params": [ag.Tensor("width", 1)]}]
)
def test_declarations_are_declarations(given: dict[str, object]):
    with pytest.raises(ag.SpecError, match=r"(params|tensors): expected an ag\.(Param|Tensor), got .*\n.*declare it"):
        ag.Spec(mask="i >= j", **given)  # type: ignore[arg-type]


def test_one_declaration_needs_no_list():
    width = ag.Param("width")
    assert ag.Spec(mask="i - j < width", params=width).key == ag.Spec(mask="i - j < width", params=[width]).key
