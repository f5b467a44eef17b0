"""Tables of captured data, derivatives, empty rows, costs, and what is refused."""

from __future__ import annotations

import pytest
import torch

from attngen.analysis import GPUS, Axis, facts, paint, run, tile_map
from attngen.errors import InputError
from attngen.language.expression import Param, Tensor, to_text
from attngen.language.programs import evaluate
from attngen.language.spec import Spec

DOC, LIMIT, KEEP = Tensor("doc", 2, torch.int32), Tensor("limit", 1, torch.int32), Tensor("keep", 2, torch.bool)
SLOPE, BIAS, TIME = Tensor("slope", 1), Tensor("bias", 2), Tensor("time", 2)
WIDTH, STEP = Param("width"), Param("step")
NAMES = {"params": [WIDTH, STEP], "tensors": [DOC, LIMIT, KEEP, SLOPE, BIAS, TIME]}


def spec(mask: str = "true", score: str | None = None, **fields) -> Spec:
    return Spec(mask, score, **fields, **NAMES)


def documents(*lengths: int, ids: list[int] | None = None) -> torch.Tensor:
    ids = list(range(len(lengths))) if ids is None else ids
    return torch.cat([torch.full((n,), d, dtype=torch.int32) for n, d in zip(lengths, ids, strict=True)])[None]


def brute_tiles(s: Spec, n_q: int, n_k: int, block_m: int, block_n: int, **captures) -> torch.Tensor:
    env = {**captures, "b": torch.tensor(0), "h": torch.tensor(0)}
    env |= {"i": torch.arange(n_q).view(-1, 1), "j": torch.arange(n_k).view(1, -1)}
    mask = torch.as_tensor(evaluate(s.mask, env)).expand(n_q, n_k)
    tiles = mask.view(n_q // block_m, block_m, n_k // block_n, block_n)
    return (tiles.any(3).any(1).to(torch.int8) + tiles.all(3).all(1)).to(torch.int8)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "ids",
    [[0, 1, 2, 3, 4], [7, 3, 9, -2, 5], [1, 2, 3, 4, 0], [1, 1, 2, 3, 4]],
    ids=["sorted", "any order", "padded", "joined"],
)
def test_documents_are_exact(ids: list[int], transposed: bool) -> None:
    doc = documents(64, 48, 80, 128, 64, ids=ids)
    for text in ("doc[b, i] == doc[b, j]", "doc[b, i] == doc[b, j] and i >= j"):
        s = spec(text)
        got = tile_map(s, 384, 384, 16, 16, doc=doc, transposed=transposed)
        assert torch.equal(got, brute_tiles(s, 384, 384, 16, 16, doc=doc)), text
    # A tile over two documents walks from the first one's start to the last one's end, which may take in others.
    got, best = tile_map(s, 384, 384, 32, 32, doc=doc), brute_tiles(s, 384, 384, 32, 32, doc=doc)
    assert ((got == 2) == (best == 2)).all() and ((got > 0) >= (best > 0)).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_data_dependent_masks_skip_tiles(transposed: bool) -> None:
    n = 256
    limit = torch.tensor([100], dtype=torch.int32)
    keep = (torch.arange(n) < 160)[None]
    time = torch.linspace(0, 8, n)[None]
    reach = documents(64, 64, 128, ids=[64, 200, 256])
    for text, captures in (
        ("j < limit[b]", {"limit": limit}),
        ("i >= j or j < limit[b]", {"limit": limit}),
        ("keep[b, j]", {"keep": keep}),
        ("keep[b, j] and keep[b, i]", {"keep": keep}),
        ("time[b, j] <= time[b, i]", {"time": time}),
        ("j < doc[b, i]", {"doc": reach}),
    ):
        s = spec(text)
        got = tile_map(s, n, n, 16, 16, transposed=transposed, **captures)
        assert torch.equal(got, brute_tiles(s, n, n, 16, 16, **captures)), text


def test_nan_in_a_captured_tensor_is_never_called_full_or_skipped_wrongly() -> None:
    time = torch.linspace(0, 8, 128)[None].clone()
    time[0, 40] = time[0, 90] = float("nan")
    for text in ("time[b, j] <= time[b, i]", "not (time[b, j] <= time[b, i])", "time[b, i] == time[b, j]"):
        s = spec(text)
        best = brute_tiles(s, 128, 128, 16, 16, time=time)
        for transposed in (False, True):
            got = tile_map(s, 128, 128, 16, 16, time=time, transposed=transposed)
            assert not ((got == 0) & (best != 0)).any() and not ((got == 2) & (best != 2)).any()


def test_batches_heads_and_offsets_are_evaluated_together() -> None:
    """One run for all of b and h paints what `tile_map` paints one by one."""
    s = spec("doc[b, i] == doc[b, j] and (h == 1 or i - j < width) and j < limit[b]")
    n_q, n_k, heads = 50, 90, 2
    doc = torch.stack([documents(30, 60)[0], documents(45, 45, ids=[3, 1])[0], documents(90)[0]])
    limit, offset = torch.tensor([80, 33, 90], dtype=torch.int32), torch.tensor([0, 40, 17])
    captures = {"doc": doc, "limit": limit, "width": 20}
    known = facts(s)
    env = {**captures, "b": torch.arange(3).view(-1, 1, 1), "h": torch.arange(heads).view(1, -1, 1)}
    queries, keys = Axis("i", offset.view(-1, 1, 1), n_q), Axis("j", 0, n_k)
    forward = run(known.walk_keys, known.program_keys, env, queries, keys, 16, 8)
    backward = run(known.walk_queries, known.program_queries, env, keys, queries, 8, 16)
    for b in range(3):
        for h in range(heads):
            call = {"b": b, "h": h, "q_offset": offset, **captures}
            assert torch.equal(paint(*forward, 4, 12, b, h), tile_map(s, n_q, n_k, 16, 8, **call))
            assert torch.equal(paint(*backward, 12, 4, b, h).T, tile_map(s, n_q, n_k, 16, 8, transposed=True, **call))


def test_many_runs_fall_back_to_visiting_everything() -> None:
    """More runs than a table has slots for: nothing may be skipped or called full on their account."""
    n = 1 << 17
    doc = torch.arange(n, dtype=torch.int32)[None] % 7919
    s = spec("doc[b, i] == doc[b, j]")
    got = tile_map(s, n, n, 4096, 4096, doc=doc)
    assert (got == 1).all()


@pytest.mark.parametrize(
    ("mask", "full", "partial", "most_lines"),
    [
        ("true", 1, 1, 3),
        ("i >= j", 1, 1, 3),
        ("i >= j and i - j < 1024", 1, 2, 12),
        ("i >= j and i - j < width", 1, 2, 12),
        ("j < limit[b] or i >= j", 1, 1, 3),
        ("i // step >= j // step", 1, 1, 3),
        ("doc[b, i] == doc[b, j] and i >= j", 1, 2, 14),
        ("(i - j) % 4 == 0 and i >= j and i - j < 512", 0, 1, 5),
    ],
)
def test_programs_are_short(mask: str, full: int, partial: int, most_lines: int) -> None:
    program = facts(spec(mask)).program_keys
    assert (len(program.full), len(program.partial)) == (full, partial), str(program)
    assert len(program.lines) <= most_lines, str(program)


def test_closed_forms_need_no_tables() -> None:
    closed = ["i >= j and i - j < width", "j < limit[b] or i >= j", "i // step >= j // step", "abs(i - j) <= width"]
    for mask in closed:
        assert not facts(spec(mask)).walk_keys.tables and not facts(spec(mask)).walk_queries.tables
    assert facts(spec("doc[b, i] == doc[b, j]")).walk_keys.tables


def test_facts_are_shared_by_equal_specs() -> None:
    assert facts(spec("i >= j and i - j < 9")) is facts(spec("i - j <= 8 and j <= i"))


def test_rows_without_a_key() -> None:
    for mask, expected in (
        ("true", False),
        ("j <= 3", False),
        ("j < width", True),
        ("i >= j", True),
        ("j == 0 or i > j", False),
    ):
        assert facts(spec(mask)).may_be_empty is expected, mask
    assert facts(spec("bias[i, j] > 0")).may_be_empty


def test_score_derivatives_match_autograd() -> None:
    score = (
        "20 * tanh(s / 20) + slope[h] * (j - i) + where(i > j, s * s * 0.1, abs(s))"
        " + sigmoid(s) * bias[i, j] + max(s, slope[h])"
    )
    s = spec("i >= j", score)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    slope = torch.randn(2, dtype=torch.float64, generator=generator, requires_grad=True)
    bias = torch.randn(8, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    env = {"s": logits, "slope": slope, "bias": bias, "b": 0, "h": torch.tensor(1)}
    env |= {"i": torch.arange(8).view(-1, 1), "j": torch.arange(8).view(1, -1)}
    wanted = torch.autograd.grad(evaluate(s.score, env).sum(), (logits, slope, bias))
    known = facts(s)
    assert torch.allclose(evaluate(known.score_ds, env).expand(8, 8), wanted[0])
    assert set(known.load_grads) == {"slope", "bias"}
    ((load, by_slope),), ((_, by_bias),) = known.load_grads["slope"], known.load_grads["bias"]
    assert to_text(load) == "slope[h]"
    assert torch.allclose(torch.as_tensor(evaluate(by_slope, env)).double().expand(8, 8).sum(), wanted[1][1])
    assert torch.allclose(torch.as_tensor(evaluate(by_bias, env)).expand(8, 8), wanted[2])
    assert facts(spec("i >= j")).score_ds == 1 and not facts(spec("i >= j")).load_grads


def test_sink_derivative() -> None:
    known = facts(spec("i >= j", sink="slope[h] * 2"))
    ((load, slope),) = known.sink_grads["slope"]
    assert to_text(load) == "slope[h]" and slope == 2


def test_cost_counts_tiles() -> None:
    shape = {"batch": 2, "heads_q": 8, "heads_kv": 2, "n_q": 1000, "n_k": 1024, "head_dim": 64}
    dense = facts(spec("true")).cost(**shape, block_m=128, block_n=64)
    assert dense.pairs == dense.dense_pairs == 2 * 8 * 1000 * 1024
    assert dense.forward.flops == 4 * dense.pairs * 64
    assert dense.backward.flops == 14 * dense.pairs * 64 and dense.backward.counted == 10 * dense.pairs * 64
    assert dense.forward.bytes == 2 * 2 * 64 * (2 * 8 * 1000 + 2 * 2 * 1024) + 4 * 2 * 8 * 1000
    causal = facts(spec("i >= j")).cost(**shape, block_m=128, block_n=64)
    visited = int((tile_map(spec("i >= j"), 1024, 1024, 128, 64) > 0).sum())
    assert causal.pairs == 16 * (visited * 128 - 16 * 24) * 64  # the last query tile has 104 of 128 rows
    unknown = facts(spec("j < limit[b]")).cost(**shape)
    assert not unknown.known and unknown.pairs == unknown.dense_pairs
    by_head = facts(spec("h == 0 or i - j < 0")).cost(**shape)
    assert by_head.known and by_head.pairs < by_head.dense_pairs
    for gpu in GPUS:
        timed = facts(spec("i >= j")).cost(**shape, gpu=gpu)
        assert 0 < timed.forward.seconds < timed.backward.seconds and gpu in str(timed)
    with pytest.raises(InputError, match="H200"):
        facts(spec("true")).cost(**shape, gpu="GTX 970")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"block_m": 0}, "block_m"),
        ({"block_n": -16}, "block_n"),
        ({"n_q": 1.5}, "n_q"),
        ({"b": -1}, "b"),
        ({"q_offset": 0.5}, "q_offset"),
        ({"q_offset": torch.tensor([1.0])}, "q_offset"),
        ({"limit": None}, "limit"),
        ({"limit": torch.zeros(2, 2)}, "limit"),
        ({"nonsense": 3}, "nonsense"),
        ({"step": 0}, "step"),
        ({"step": "3"}, "step"),
    ],
)
def test_bad_arguments_are_named(change: dict, names: str) -> None:
    s = spec("j < limit[b] and i // step == j // step")
    call = {"n_q": 64, "n_k": 64, "block_m": 16, "block_n": 16, "limit": torch.tensor([9]), "step": 4, **change}
    with pytest.raises(InputError, match=names):
        tile_map(s, **call)


def test_empty_axes() -> None:
    s = spec("doc[b, i] == doc[b, j] and i >= j")
    doc = documents(4)
    assert tile_map(s, 0, 5, 4, 4, doc=doc).shape == (0, 2)
    assert tile_map(s, 5, 0, 4, 4, doc=doc).shape == (2, 0)
