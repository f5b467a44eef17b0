"""Lists of live tiles: layouts given at the call, butterfly, BigBird, Longformer, vertical-slash, clusters, pruning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attngen as ag
from attngen.reference.keysets import attended
from tests.check import check
from tests.keys_cases import MASKS, SIZES, compare, inputs
from tests.keys_work import OnDevice, Work, memory, on_the_meta_device, pairs_of, to_meta, work


def draw(size: tuple[int, ...], block: tuple[int, int], share: float = 0.4, seed: int = 0) -> torch.Tensor:
    """A random layout."""
    batch, heads, group, n_q, n_k, _ = size
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((batch, heads * group, -(-n_q // block[0]), -(-n_k // block[1])), generator=generator) < share


def as_counts(layout: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same as counts and indices, and what stands behind the counts is nonsense that nobody may read as a tile."""
    order = layout.int().argsort(dim=-1, descending=True, stable=True)
    return dict(counts=layout.sum(-1), indices=order)


def case(name: str, size: tuple[int, ...]) -> tuple[Any, dict[str, Any]]:
    """A key set in tiles of 16, and captures for it."""
    batch, heads, group, n_q, n_k, offset = size
    lead, generator = (batch, heads * group), torch.Generator().manual_seed(n_q)
    if name == "block_sparse":
        return ag.block_sparse((32, 16)), dict(layout=draw(size, (32, 16)))
    if name == "counts":
        return ag.block_sparse(16), as_counts(draw(size, (16, 16))[:1])
    if name == "block_cluster":
        index = torch.randint(-1, -(-n_k // 16), (batch, 1, -(-n_q // 16), 3), generator=generator)
        return ag.block_cluster(16), dict(index=index)
    if name == "vertical_slash":
        vertical = torch.randint(-1, n_k, (*lead, 7), generator=generator)
        slash = torch.randint(-1, max(n_q + offset, 2) - 1, (*lead, 5), generator=generator)
        return ag.vertical_slash(16), dict(vertical=vertical, slash=slash)
    closed = {
        "butterfly": ag.butterfly(16),
        "stretched": ag.butterfly((16, 32), size=4, levels=1, global_rows=1, global_columns=2),
        "big_bird": ag.big_bird((16, 32), window=3, globals=1, random=2, seed=7),
        "random": ag.big_bird(16, window=0, globals=0, random=2),
        "longformer": ag.longformer(10, globals=3),
        "dilated": ag.longformer(10, globals=1, dilation=3),
        "a_shape": ag.a_shape(3, 9),
        "pruned": ag.pruned(0.4, 16),
        "gated": ag.pruned(0.4, (32, 16), heads=0.5),
    }
    return closed[name], {}


GIVEN = ("block_sparse", "counts", "block_cluster", "vertical_slash")
CLOSED = ("butterfly", "stretched", "big_bird", "random", "longformer", "dilated", "a_shape", "pruned", "gated")


# -- against the definitions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*GIVEN, *CLOSED])
def test_patterns(size: tuple[int, ...], name: str):
    keys, captures = case(name, size)
    compare(ag.Spec(keys=keys, mask=ag.causal()), size, captures)
    compare(ag.Spec(keys=keys), size, captures)


@pytest.mark.parametrize("mask", ["strict", "window", "blocks"])
@pytest.mark.parametrize("name", ["block_sparse", "big_bird", "vertical_slash", "gated"])
def test_masks(mask: str, name: str):
    for size in SIZES[3:5]:
        keys, captures = case(name, size)
        compare(ag.Spec(keys=keys, mask=MASKS[mask], score=ag.soft_cap(5.0)), size, captures)


def test_masks_that_read_captures():
    size = (2, 1, 2, 100, 100, 0)
    captures = dict(doc=ag.document_ids(torch.tensor([30, 50, 20])).expand(2, -1), slope=ag.alibi_slopes(2))
    for name in ("block_sparse", "vertical_slash", "pruned"):
        keys, own = case(name, size)
        compare(ag.Spec(keys=keys, mask=ag.documents() & ag.causal(), score=ag.alibi()), size, {**captures, **own})
        compare(ag.Spec(keys=keys, mask=ag.causal() & ag.window(ag.Param("w"))), size, {**own, "w": 20})


def test_one_offset_per_batch():
    size = SIZES[4]
    q, k, v = inputs(size)
    for name in ("block_sparse", "butterfly", "vertical_slash", "longformer"):
        keys, captures = case(name, size)
        spec = ag.Spec(keys=keys, mask=ag.causal())
        check(spec, ag.compile(spec), q, k, v, captures, torch.tensor([86, 20]))


@given(st.data())
def test_random_layouts(data: st.DataObject):
    """Any sizes, tiles, share and sharing of lists."""
    size = tuple(
        data.draw(st.integers(least, most)) for least, most in ((1, 2), (1, 2), (1, 3), (1, 90), (1, 90), (0, 30))
    )
    block = (16 * data.draw(st.integers(1, 3)), 16 * data.draw(st.integers(1, 3)))
    layout = draw(size, block, data.draw(st.sampled_from([0.0, 0.2, 0.7, 1.0])), data.draw(st.integers(0, 99)))
    layout = layout[: data.draw(st.sampled_from([1, size[0]])), : data.draw(st.sampled_from([1, size[1] * size[2]]))]
    spec = ag.Spec(keys=ag.block_sparse(block), mask=MASKS[data.draw(st.sampled_from(sorted(MASKS)))])
    compare(spec, size, dict(layout=layout) if data.draw(st.booleans()) else as_counts(layout))


def test_rows_and_heads_that_are_dead():
    size = SIZES[3]
    layout = draw(size, (16, 16))
    layout[:, 1] = layout[:, :, 2] = layout[..., 4] = False
    spec = ag.Spec(keys=ag.block_sparse(16), mask=ag.causal())
    compare(spec, size, dict(layout=layout))
    q, k, v = (x.requires_grad_() for x in inputs(size))
    out, lse = ag.compile(spec)(q, k, v, return_lse=True, layout=layout)
    assert not out[:, 1].any() and lse[:, 1].isneginf().all() and lse[:, :, 32:48].isneginf().all()
    dk = torch.autograd.grad(out.sum(), k)[0]
    assert not dk[:, :, 64:80].any() and dk.any()
    compare(ag.Spec(keys=ag.block_sparse(16)), size, dict(layout=torch.zeros_like(layout)))


def test_pruning_keeps_the_lower_of_equal_tiles_and_heads():
    size = (1, 1, 3, 100, 100, 0)
    spec = ag.Spec(keys=ag.pruned(0.3, 16, heads=0.6), mask=ag.causal())
    same = [torch.ones_like(x) for x in inputs(size)]
    check(spec, ag.compile(spec), *same, {})
    tiles = attended(spec, *same, 0, {})[0, :, 99, ::16]
    assert tiles.tolist() == [[True] * 3 + [False] * 4] * 2 + [[False] * 7]


@pytest.mark.parametrize("block", [(128, 128), (64, 128), (128, 64)])
def test_head_dim_64_backward(block: tuple[int, int]):
    """On a known GPU a public block-sparse backward was silently wrong at d=64."""
    size = (1, 2, 1, 300, 300, 0)
    spec = ag.Spec(keys=ag.block_sparse(block), mask=ag.causal())
    check(spec, ag.compile(spec), *inputs(size, dim=64, dim_v=64), dict(layout=draw(size, block, 0.6)))


def test_no_rows_at_all():
    for size in ((0, 2, 1, 40, 40, 0), (1, 2, 1, 0, 40, 0), (1, 2, 1, 40, 0, 0)):
        for name in ("block_sparse", "counts", "butterfly", "big_bird", "pruned", "longformer"):
            if size[4] == 0 and name == "counts":
                continue
            keys, captures = case(name, size)
            out, lse = ag.compile(ag.Spec(keys=keys))(*inputs(size), return_lse=True, **captures)
            assert out.shape[:3] == (size[0], 2, size[3]) and not out.any() and lse.isneginf().all()


# -- the lists --------------------------------------------------------------------------------------------------------


def grids(plan: Any, tiles_q: int, tiles_k: int, heads: int) -> dict[str, torch.Tensor]:
    """What the lists say of head 0 .. heads - 1 of batch 0: int8 [heads, tiles_q, tiles_k], 0 none, 1 partial, 2 full, in
    both directions; that every list ascends and holds a tile once is checked on the way.
    """
    found = {}
    for name, shape in (("query", (tiles_q, tiles_k)), ("key", (tiles_k, tiles_q))):
        tiles, runs = plan.values[f"{name}_tiles"], plan.values[f"{name}_runs"]
        grid = torch.zeros((heads, *shape), dtype=torch.int8)
        for h in range(heads):
            own, run = tiles[0, min(h, tiles.shape[1] - 1)], runs[0, min(h, runs.shape[1] - 1)]
            for owner, (first, full, partial) in enumerate(run.tolist()):
                whole, cut = own[first : first + full], own[first + full : first + full + partial]
                assert len(cut) == partial and (whole.diff() > 0).all() and (cut.diff() > 0).all()
                assert not grid[h, owner, cut.long()].any()
                grid[h, owner, whole.long()] = 2
                grid[h, owner, cut.long()] = 1
        found[name] = grid if name == "query" else grid.mT
    return found


@pytest.mark.parametrize(
    "name", ["block_sparse", "counts", "butterfly", "stretched", "big_bird", "block_cluster", "gated"]
)
@pytest.mark.parametrize("mask", ["none", "causal", "window"])
@pytest.mark.parametrize("size", SIZES[3:])
def test_tiles_are_sorted_by_what_the_mask_makes_of_them(name: str, mask: str, size: tuple[int, ...]):
    keys, captures = case(name, size)
    spec, (q, k, v) = ag.Spec(keys=keys, mask=MASKS[mask]), inputs(size)
    block_m, block_n = keys.block
    tiles_q, tiles_k, heads = -(-size[3] // block_m), -(-size[4] // block_n), q.shape[1]
    got = grids(ag.compile(spec).plan(q, k, v, q_offset=size[5], **captures), tiles_q, tiles_k, heads)
    pairs = attended(spec, q, k, v, size[5], captures)[0]
    pairs = torch.nn.functional.pad(pairs, (0, -size[4] % block_n, 0, -size[3] % block_m))
    in_tile = pairs.unflatten(-1, (-1, block_n)).unflatten(1, (-1, block_m)).transpose(2, 3)  # [H, Tq, Tk, bm, bn]
    assert torch.equal(got["query"] > 0, in_tile.flatten(-2).any(-1))
    assert torch.equal(got["key"] > 0, got["query"] > 0)
    whole = torch.ones(size[3], size[4], dtype=torch.bool)
    whole = torch.nn.functional.pad(whole, (0, -size[4] % block_n, 0, -size[3] % block_m))
    whole = whole.unflatten(-1, (-1, block_n)).unflatten(0, (-1, block_m)).transpose(1, 2)
    full = (in_tile | ~whole).flatten(-2).all(-1) & (got["query"] > 0)
    ragged_q, ragged_k = size[3] % block_m != 0, size[4] % block_n != 0
    assert torch.equal(got["query"][..., : tiles_k - ragged_k] == 2, full[..., : tiles_k - ragged_k])
    assert not ragged_k or not (got["query"][..., -1] == 2).any()
    assert not ragged_q or not (got["key"][:, -1] == 2).any()
    inner = (slice(None), slice(0, tiles_q - ragged_q), slice(0, tiles_k - ragged_k))
    assert torch.equal(got["key"][inner] == 2, full[inner])


@pytest.mark.parametrize("name", [*GIVEN, *CLOSED, "adaptive"])
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_work_is_the_patterns(name: str, mask: str):
    """Tiles visited, forward and backward, against the attended pairs of each piece rounded out to tiles."""
    size = (1, 2, 1, 500, 500, 0)
    keys, captures = (ag.adaptive(16), {}) if name == "adaptive" else case(name, size)
    q, k, v = inputs(size)
    if name == "adaptive":
        captures = dict(estimate=ag.estimate(q, k, block=16, budget=64))
    spec = ag.Spec(keys=keys, mask=MASKS[mask])
    found = sum(work(spec, q, k, v, block=16, **captures), Work())
    assert found.needed <= found.forward <= 1.1 * found.needed
    assert found.needed_back <= found.backward <= 1.1 * found.needed_back
    assert found.pairs == pairs_of(spec, q, k, v, captures)


def long_case(name: str, n: int) -> tuple[Any, dict[str, Any]]:
    """A key set in tiles of 64 for n queries and keys of 2 heads, as many live tiles for a query tile whatever n is."""
    tiles, row = n // 64, torch.arange(n // 64)
    if name == "counts":
        indices = (row.view(-1, 1) - torch.arange(4)).clamp(min=0).expand(1, 2, -1, -1)
        return ag.block_sparse(64), dict(counts=torch.full((1, 2, tiles), 4), indices=indices)
    if name == "block_cluster":
        return ag.block_cluster(64), dict(index=((row.view(-1, 1) + 9 * torch.arange(5)) % tiles).expand(1, 2, -1, -1))
    if name == "vertical_slash":
        lines = (n // 16 * torch.arange(16) + 1).expand(1, 2, -1)
        return ag.vertical_slash(64), dict(vertical=lines, slash=lines)
    closed = {"butterfly": ag.butterfly(64, levels=5), "big_bird": ag.big_bird(64), "pruned": ag.pruned(8 / tiles)}
    return {**closed, "adaptive": ag.adaptive(64)}[name], {}


LONG = ["counts", "block_cluster", "butterfly", "big_bird", "vertical_slash", "adaptive", "pruned"]


@pytest.mark.parametrize("name", LONG)
def test_preparation_memory_grows_with_the_length(name: str):
    found, plans = [], []
    for n in (4096, 8192):
        keys, captures = long_case(name, n)
        q = torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(0))
        attn = ag.compile(ag.Spec(keys=keys))

        def prepare() -> Any:
            own = dict(estimate=ag.estimate(q, q, budget=512)) if name == "adaptive" else captures  # noqa: B023
            return attn.plan(q, q, q, **own)  # noqa: B023

        plans.append(prepare().nbytes)
        found.append(memory(prepare))
    assert plans[1] <= 2.05 * plans[0]
    # What an estimate computes at a time does not grow; everything else may double.
    assert found[1].peak <= 2.05 * found[0].peak and found[1].largest < 2**25


@pytest.mark.parametrize("name", LONG)
def test_a_call_allocates_nothing_for_every_pair(name: str):
    """Forward and backward, preparation included: not even a byte per pair of a head."""
    n = 2048
    keys, captures = long_case(name, n)
    q, k, v = (torch.randn(1, 2, n, 16).requires_grad_() for _ in range(3))
    if name == "adaptive":
        captures = dict(estimate=ag.estimate(q, k, budget=512))
    attn = ag.compile(ag.Spec(keys=keys, mask=ag.causal()))
    found = memory(lambda: torch.autograd.grad(attn(q, k, v, **captures).sum(), (q, k, v)))
    assert 0 < found.largest < n * n


@pytest.mark.parametrize("name", [*GIVEN, *CLOSED, "adaptive"])
def test_a_call_does_not_wait_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch):
    """Preparation, forward and backward. On the meta device nothing has a value: reading one is an error."""
    keys, captures = (ag.adaptive(16), {}) if name == "adaptive" else case(name, SIZES[3])
    q, k, v = (x.to("meta").requires_grad_() for x in inputs(SIZES[3]))
    captures = to_meta(captures)
    on_the_meta_device(monkeypatch)
    with OnDevice():
        if name == "adaptive":
            captures = dict(estimate=ag.estimate(q, k, block=16, budget=64))
        captures["doc"] = torch.empty(1, 130, dtype=torch.int32, device="meta")
        attn = ag.compile(ag.Spec(keys=keys, mask=ag.causal() & ag.documents()))
        attn.plan(q, k, v, **captures)
        torch.autograd.grad(attn(q, k, v, **captures).sum(), (q, k, v))


@pytest.mark.parametrize("name", ["block_sparse", "big_bird", "vertical_slash", "pruned"])
def test_pictures(name: str):
    """`attngen show` draws the pairs that the spec attends, and says what it made up."""
    from attngen.inspect import picture

    keys = {"pruned": ag.pruned(0.4, 16)}.get(name) or case(name, SIZES[3])[0]
    tiles, made = picture.of_keys(ag.Spec(keys=keys, mask=ag.causal()), 100, 90, 1, 1, 0, {})
    assert tiles.shape == (100, 90) and 0 < int((tiles == 2).sum()) < 100 * 90 and not tiles.triu(1).any()
    assert "random q and k" in made and (name != "block_sparse" or "layout = the diagonal" in made)
    whole, _ = picture.of_keys(ag.Spec(keys=keys, mask=ag.causal()), 100, 90, 16, 16, 0, {})
    assert whole.shape == (7, 6) and torch.equal(
        whole > 0,
        torch.nn.functional.max_pool2d(torch.nn.functional.pad(tiles, (0, 6, 0, 12)).float()[None], 16)[0] > 0,
    )
    with pytest.raises(ag.InputError, match="1 to 4096"):
        picture.of_keys(ag.Spec(keys=keys), 5000, 90, 1, 1, 0, {})


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["block_sparse", "counts", "vertical_slash", "pruned"])
def test_plans_are_reused(name: str):
    size = SIZES[3]
    keys, captures = case(name, size)
    attn, (q, k, v) = ag.compile(ag.Spec(keys=keys, mask=ag.causal() & ag.window(ag.Param("w")))), inputs(size)
    plan = attn.plan(q, k, v, w=40, **captures)
    assert torch.equal(attn(q, k, v, plan=plan, w=40), attn(q, k, v, w=40, **captures)) and plan.nbytes > 0
    with pytest.raises(ag.InputError, match="w=41"):
        attn(q, k, v, plan=plan, w=41)
    with pytest.raises(ag.InputError, match=r"w: .*nothing.*pass w=\.\.\. to plan"):
        attn.plan(q, k, v, **captures)
    with pytest.raises(ag.InputError, match="plan: expected a plan for"):
        attn(q[:, :, :100], k, v, plan=plan, w=40)


def test_plans_inside_unions():
    size = SIZES[3]
    near = ag.causal() & ag.window(9)
    spec = ag.union(
        ag.Spec(mask=near), ag.Spec(keys=ag.block_sparse(16), mask=ag.causal() & ~near & ag.documents(), name="far")
    )
    captures = dict(layout=draw(size, (16, 16)), doc=torch.zeros(1, 130, dtype=torch.int32))
    compare(spec, size, captures)
    attn, (q, k, v) = ag.compile(spec), inputs(size)
    plan = attn.plan(q, k, v, **captures)
    assert torch.equal(attn(q, k, v, plan=plan, doc=captures["doc"]), attn(q, k, v, **captures))


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_layouts():
    size = SIZES[3]
    q, k, v = inputs(size)
    attn = ag.compile(ag.Spec(keys=ag.block_sparse((32, 16))))
    good = draw(size, (32, 16))
    lists = as_counts(good)
    wrong = lists["indices"].clone()
    wrong[0, 1, 2, 0] = 9
    counts = lists["counts"].clone()
    counts[0, 1, 2] = 10
    for captures, message in (
        ({}, "layout: expected layout=, or counts= and indices=, got neither"),
        (dict(layout=good, **lists), "got both"),
        (dict(layout=good[..., :-1]), r"layout: expected bool \[B or 1, H or 1, tiles_q, tiles_k\].*5, 9"),
        (dict(layout=good[:, :3]), "layout: expected bool"),
        (dict(layout=good.int()), "layout: expected bool"),
        (dict(layout=good[0]), "layout: expected bool"),
        (dict(indices=lists["indices"]), "counts: expected int"),
        (dict(counts=lists["counts"]), "indices: expected int"),
        (dict(counts=lists["counts"].float(), indices=lists["indices"]), "counts: expected int"),
        (dict(counts=counts, indices=lists["indices"]), r"counts: expected numbers of indices in 0 .. 9, got 10 at \[0, 1, 2\]"),
        (dict(counts=counts.clamp(1, 9), indices=wrong), r"indices: expected numbers of key tiles.*got 9 at \[0, 1, 2, 0\]"),
    ):  # fmt: skip
        with pytest.raises(ag.InputError, match=message):
            attn(q, k, v, **captures)


def test_too_many_tiles_for_int32():
    """Offsets into a head's list have 32 bits. Nothing is read of tensors that have one element for all their places."""
    size = SIZES[3]
    one = torch.zeros(1, dtype=torch.int32)
    many = one.expand(1, 1, 9, 2**31 // 9 + 1)
    for keys, captures, name in (
        (ag.block_sparse(16), dict(counts=one.expand(1, 1, 9), indices=many), "indices"),
        (ag.block_cluster(16), dict(index=many), "index"),
    ):
        with pytest.raises(ag.InputError, match=rf"{name}: expected fewer than 2147483648 listed tiles for a head"):
            ag.compile(ag.Spec(keys=keys))(*inputs(size), **captures)


def test_out_of_range_tiles_are_never_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATTNGEN_CHECK", "0")
    size = SIZES[3]
    q, k, v = inputs(size)
    index = torch.full((1, 1, 9, 2), 2**20)
    index[..., 0] = torch.arange(9)
    attn = ag.compile(ag.Spec(keys=ag.block_cluster(16)))
    assert torch.equal(attn(q, k, v, index=index), attn(q, k, v, index=index[..., :1]))


def test_bad_lines():
    size = SIZES[3]
    q, k, v = inputs(size)
    attn = ag.compile(ag.Spec(keys=ag.vertical_slash(16)))
    good = torch.zeros(1, 4, 3, dtype=torch.int64)
    for captures, message in (
        (dict(slash=good), r"vertical: expected int \[B, H, Kv\], got NoneType.*pass vertical="),
        (dict(vertical=good, slash=good[:, :2]), "slash: expected int"),
        (dict(vertical=good + 130, slash=good), "vertical: expected rows of k"),
        (dict(vertical=good, slash=good - 2), "slash: expected distances"),
        (dict(vertical=good, slash=good.float()), "slash: expected int"),
    ):
        with pytest.raises(ag.InputError, match=message):
            attn(q, k, v, **captures)


def test_bad_patterns():
    for make, message in (
        (lambda: ag.block_sparse((100, 128)), "block_sparse: block is .* multiples of 16"),
        (lambda: ag.block_sparse((128,)), "block_sparse: block is"),
        (lambda: ag.block_sparse((128, 64.0)), "block_sparse: block is"),
        (lambda: ag.butterfly(17), r"butterfly: block is .* multiples of 16, .* got 17"),
        (lambda: ag.Spec(keys="butterfly(block=[16, 17])"), r"butterfly: block is .* got \(16, 17\)"),
        (lambda: ag.big_bird(0), r"big_bird: block is .* got 0"),
        (lambda: ag.pruned(0.5, (16, 40)), r"pruned: block is .* got \(16, 40\)"),
        (lambda: ag.block_cluster("16"), "block_cluster: block is"),
        (lambda: ag.Spec(keys="vertical_slash(block=20)"), "vertical_slash: block is a multiple of 16"),
        (lambda: ag.Spec(keys="adaptive(block=true)"), "adaptive: block is a multiple of 16"),
        (lambda: ag.butterfly(64, size=6), "power of two"),
        (lambda: ag.butterfly(64, levels=-1), "levels"),
        (lambda: ag.big_bird(64, window=2), "odd"),
        (lambda: ag.big_bird(64, random=-1), "random"),
        (lambda: ag.longformer(0), "window"),
        (lambda: ag.a_shape(4, 0), "window"),
        (lambda: ag.pruned(1.5), "keep"),
        (lambda: ag.vertical_slash(20), "multiple of 16"),
        (lambda: ag.Spec(keys=ag.block_sparse(64), dropout=0.1), "dropout"),
        (lambda: ag.Spec(keys="big_bird(block=[64, 64], seed=true)"), "seed"),
    ):
        with pytest.raises(ag.SpecError, match=message):
            make()


# -- generated kernels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["block_sparse", "counts", "block_cluster", "big_bird", "vertical_slash", "pruned", "gated", "adaptive"]
)
def test_by_generated_kernels(name: str):
    size = (1, 1, 2, 45, 67, 22)
    if name == "adaptive":
        q, k, _ = inputs(size)
        keys: Any = ag.adaptive(16)
        captures: dict[str, Any] = dict(estimate=ag.estimate(q, k, block=16, budget=64, sink=4, q_offset=22))
    else:
        keys, captures = case(name, size)
    compare(ag.Spec(keys=keys, mask=ag.causal()), size, captures, backend="interpret")


def test_head_dim_64_backward_by_generated_kernels():
    size = (1, 1, 1, 90, 90, 0)
    spec = ag.Spec(keys=ag.block_sparse(32), mask=ag.causal())
    attn = ag.compile(spec, backend="interpret")
    check(spec, attn, *inputs(size, dim=64, dim_v=64), dict(layout=draw(size, (32, 32), 0.6)))


@pytest.mark.parametrize("schedule", [dict(block_m=32, block_n=16), dict(block_m=16, block_n=32)])
def test_kernel_tiles_need_not_be_the_lists(schedule: dict[str, int]):
    """Publicly, block-sparse broke when forward and backward had other tiles than the layout."""
    size = (1, 1, 1, 70, 70, 0)
    spec = ag.Spec(keys=ag.block_sparse((32, 32)), mask=ag.causal())
    attn = ag.compile(spec, schedule=ag.Schedule(**schedule), backend="interpret")
    check(spec, attn, *inputs(size), dict(layout=draw(size, (32, 32), 0.6)))
