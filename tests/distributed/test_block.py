"""Blocks of an attention: any cutting of queries and keys gives the whole again, and what is skipped has no attended pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attngen as ag
from attngen.distributed.block import block_of
from attngen.language.expression import to_text
from tests.check import check
from tests.strategies import Case, cases


@settings(max_examples=40)
@given(cases(sizes=[1, 15, 17, 40, 65]), st.data())
def test_blocks_merge_to_the_whole(case: Case, data: st.DataObject) -> None:
    spec = case.spec()
    q, k, v = (x.double() for x in case.inputs())
    captures = case.captures(spec)
    block = block_of(ag.compile(spec))
    cuts = [
        data.draw(st.lists(st.integers(0, n), max_size=3).map(sorted), f"cuts of {n}") for n in (case.n_q, case.n_k)
    ]
    queries, keys = (
        [range(a, b) for a, b in zip([0, *c], [*c, n], strict=True)]
        for c, n in zip(cuts, (case.n_q, case.n_k), strict=True)
    )
    want, want_lse = ag.oracle(spec, q, k, v, q_offset=case.q_offset, **captures)
    for i in queries:
        results = []
        for j in keys:
            operands = q[:, :, i.start : i.stop], k[:, :, j.start : j.stop], v[:, :, j.start : j.stop]
            part = ag.oracle(
                block.attention.spec, *operands, q_offset=case.q_offset + i.start, **block.captures(captures, j)
            )
            count = block.tiles(i, j, 16, tuple(q.shape[:2]), case.q_offset, captures, q.device)
            assert count or part[1].isneginf().all(), f"{i} {j} skipped"
            results.append(part)
        out, lse = ag.merge(*results)
        torch.testing.assert_close(out, want[:, :, i.start : i.stop])
        torch.testing.assert_close(lse, want_lse[:, :, i.start : i.stop])


def test_one_spec_for_all_blocks_that_the_analysis_still_understands() -> None:
    doc, table = ag.Tensor("doc", 2, torch.int32), ag.Tensor("table", 1)
    spec = ag.Spec(
        mask=lambda b, h, i, j: (doc[b, i] == doc[b, j]) & (i >= j), score=lambda s, b, h, i, j: s + table[doc[b, j]]
    )
    block = block_of(ag.compile(spec))
    assert to_text(block.attention.spec.mask) == "i >= j + key_start and doc[b, i] == doc_of_key[b, j]"
    assert to_text(block.attention.spec.score) == "s + table[doc_of_key[b, j]]"
    assert block.sources["doc_of_key"] == ("doc", (1,)) and block.names == ["doc", "table"]
    assert block_of(ag.compile(spec)) is block
    ids = torch.arange(8).repeat_interleave(64).int().view(1, -1)
    counts = [
        block.tiles(range(256, 384), range(n, n + 64), 64, (1, 1), 0, {"doc": ids}, ids.device)
        for n in range(0, 512, 64)
    ]
    assert [int(count) for count in counts] == [0, 0, 0, 0, 1, 1, 0, 0]


def test_gradients_go_to_their_part() -> None:
    bias = ag.Tensor("bias", 2)
    block = block_of(ag.compile(ag.Spec(score=lambda s, b, h, i, j: s + bias[h, j] + bias[h, i])))
    name = next(name for name in block.attention.spec.tensors if block.sources[name][1])
    totals = {"bias": torch.zeros(2, 10)}
    block.add_gradient(totals, name, torch.ones(2, 3), range(4, 7))
    assert totals["bias"].sum(0).tolist() == [0, 0, 0, 0, 2, 2, 2, 0, 0, 0]
    totals = {"bias": torch.zeros(2, 1)}
    block.add_gradient(totals, name, torch.ones(2, 3), range(4, 7))  # one value for all keys
    assert totals["bias"].flatten().tolist() == [3, 3]


def test_specs_that_cannot_be_cut() -> None:
    for spec, why in (
        (ag.Spec(keys=ag.qk_sparse()), "keys= cannot be cut into blocks: a key set"),
        (ag.Spec(dropout=0.5), "dropout= cannot be cut into blocks"),
    ):
        with pytest.raises(ag.SpecError, match=why):
            block_of(ag.compile(spec))


def test_a_block_in_generated_kernels() -> None:
    """The block's own spec, with its part of each tensor as a view, forward and backward in Triton's interpreter."""
    doc, bias = ag.Tensor("doc", 2, torch.int32), ag.Tensor("bias", 2)
    spec = ag.Spec(
        mask=lambda b, h, i, j: (doc[b, i] == doc[b, j]) & (i >= j),
        score=lambda s, b, h, i, j: 4 * ag.tanh(s / 4) + bias[h, j] + bias[h, i],
    )
    block = block_of(ag.compile(spec, backend="interpret"))
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 20, 16), torch.randn(1, 1, 37, 16), torch.randn(1, 1, 37, 16)
    whole = {"doc": torch.arange(4).repeat_interleave(25).int().view(1, -1), "bias": torch.randn(2, 100)}
    check(block.attention.spec, block.attention, q, k, v, block.captures(whole, range(30, 67)), q_offset=60)
