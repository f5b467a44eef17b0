"""Calls of packs give what compiled ones give: every kind of mask, score and key set, at other sizes than the built ones. Kernels are
interpreted, see `tests.packs.interpreted`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import attngen as ag
from tests.check import LIMITS, check, relative
from tests.keys_cases import inputs
from tests.keys_work import case as listed_case
from tests.packs.interpreted import Interpreted, interpreted_packs, pack_of
from tests.plan.keysets import test_tiles
from tests.plan.keysets.test_paged import cache
from tests.plan.keysets.test_prefix import contexts

doc, slope, bias = ag.Tensor("doc", 2, dtype=torch.int32), ag.Tensor("slope", 1), ag.Tensor("bias", 4)
sink, width = ag.Tensor("sink", 1), ag.Param("width")

# Nothing is compiled in the place of a kernel that a pack should have.
pytestmark = pytest.mark.filterwarnings("error::attngen.errors.AttngenWarning")

# batch, kv heads, query heads per kv head, queries, keys, q_offset: none of the sizes that packs are built for
SQUARE, CHUNK, SHORT = (1, 2, 2, 67, 67, 0), (2, 1, 4, 45, 131, 86), (1, 1, 2, 40, 19, 0)
Size = tuple[int, ...]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    with interpreted_packs() as found:
        yield found


def agree(spec: ag.Spec, packed: Any, q: Any, k: Any, v: Any, named: dict[str, Any], backward: bool = True) -> None:
    """out, lse and all gradients as the CPU backend gives them, which is tested for itself."""
    runs = []
    for attend in (packed, ag.compile(spec, backend="cpu")):
        leaves: list[torch.Tensor] = []

        def leaf(x: Any, leaves: list[torch.Tensor] = leaves) -> Any:
            if isinstance(x, tuple):
                return tuple(map(leaf, x))
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                return x
            leaves.append(x.detach().requires_grad_(backward))
            return leaves[-1]

        out, lse = attend(*map(leaf, (q, k, v)), return_lse=True, **{name: leaf(x) for name, x in named.items()})
        found = {"out": out, "lse": torch.where(lse.isneginf(), -1e3, lse)}
        if backward:
            weight = torch.linspace(-1, 1, out.shape[-1])
            loss = (out * weight).sum() + torch.where(lse.isneginf(), 0.0, lse).sum()
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            found |= {f"gradient {place}": g for place, g in enumerate(grads) if g is not None}
        runs.append(found)
    got, want = runs
    assert got.keys() == want.keys()
    for name, x in got.items():
        limit = LIMITS.get(name, LIMITS["gradient"])
        assert relative(x, want[name].double()) <= limit, f"{name}: {relative(x, want[name].double()):.2e}"


# -- masks and scores -------------------------------------------------------------------------------------------------


def documents(size: Size) -> dict[str, Any]:
    positions = torch.arange(max(size[3] + size[5], size[4]))
    return dict(doc=(positions // 40).int().expand(size[0], -1).contiguous())


def by_head(name: str) -> Callable[[Size], dict[str, Any]]:
    return lambda size: {name: torch.linspace(0.1, 1, size[1] * size[2])}


def random_bias(size: Size) -> dict[str, Any]:
    return dict(bias=torch.randn((1, size[1] * size[2], size[3] + size[5], size[4])))


def nothing(size: Size) -> dict[str, Any]:
    return {}


MASKS: dict[str, tuple[ag.Spec, Callable[[Size], dict[str, Any]]]] = {
    "causal": (ag.Spec(mask=ag.causal()), nothing),
    "window": (ag.Spec(mask=lambda b, h, i, j: (i >= j) & (i - j < width)), lambda size: dict(width=20)),
    "documents": (ag.Spec(mask=lambda b, h, i, j: (doc[b, i] == doc[b, j]) & (i >= j)), documents),
    "cap and slopes": (
        ag.Spec(mask=ag.causal(), score=lambda s, b, h, i, j: 50 * ag.tanh(s / 50) + slope[h] * (j - i)),
        by_head("slope"),
    ),
    "full": (ag.Spec(), nothing),
    "bias": (ag.Spec(score=lambda s, b, h, i, j: s + bias[b, h, i, j]), random_bias),
    "sink": (ag.Spec(mask=ag.causal(), sink=lambda b, h, i: sink[h]), by_head("sink")),
    "dropout": (ag.Spec(mask=ag.causal(), dropout=ag.Param("rate", float)), lambda size: dict(rate=0.25, seed=7)),
    "scale": (ag.Spec(mask=ag.causal()), lambda size: dict(scale=0.3)),
}
QUICK = ("causal", "documents", "cap and slopes")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MASKS])
def test_masks_and_scores(name: str, interpreted: Interpreted, tmp_path: Path):
    spec, captures = MASKS[name]
    packed = pack_of(tmp_path / "pack", spec)
    for size in (CHUNK,) if name in QUICK else (SQUARE, CHUNK, SHORT):
        torch.manual_seed(0)
        agree(spec, packed, *inputs(size, dim_v=32), {**captures(size), "q_offset": size[5]})
    assert {"forward", "dq", "dkv"} <= {*interpreted.started}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dim", [24, pytest.param(16, marks=pytest.mark.slow)])
def test_dtypes_and_head_dims(dtype: torch.dtype, dim: int, interpreted: Interpreted, tmp_path: Path):
    """Several in one pack, and one whose contiguous rows are not aligned."""
    spec, captures = MASKS["cap and slopes"]
    shapes = [f"B1 Hq2 Hkv1 N64 D{own}" for own in (16, 24)]
    packed = pack_of(tmp_path / "pack", spec, shapes, dtypes=[torch.float32, torch.float16])
    q, k, v = (x.to(dtype) for x in inputs(SHORT, dim=dim, dim_v=dim))
    check(spec, packed, q, k, v, captures(SHORT))


# -- key sets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Keys:
    """A spec with a key set. make(size) -> its captures; build: what `ag.save` takes besides."""

    spec: ag.Spec
    make: Callable[[Size], dict[str, Any]]
    sizes: tuple[Size, ...] = (SQUARE, CHUNK)
    build: dict[str, Any] = field(default_factory=dict)


def tiles(name: str, mask: Any = None) -> Keys:
    spec = ag.Spec(keys=test_tiles.case(name, SQUARE)[0], mask=mask or ag.causal())
    return Keys(
        spec, lambda size: test_tiles.case(name, size)[1], build={"schedule": ag.Schedule(block_m=16, block_n=16)}
    )


def listed(name: str, **more: Any) -> Keys:
    mask = None if name == "union" else ag.causal()
    return Keys(ag.Spec(keys=listed_case(name, SQUARE)[0], mask=mask), lambda s: listed_case(name, s)[1], **more)


KEYS: dict[str, Keys] = {
    **{name: tiles(name) for name in (*test_tiles.GIVEN, *test_tiles.CLOSED)},
    **{
        name: listed(name)
        for name in ("qk_sparse", "hash_sparse", "codebook", "gather", "sparse_k", "sparse_k, window")
    },
    **{name: listed(name, sizes=(SQUARE,)) for name in ("graph", "union", "incremental")},
    "hyper": listed("hyper", sizes=((1, 1, 2, 150, 150, 0),), build=dict(shapes=["B1 Hq2 Hkv1 N160 D16 Dv32"])),
}


@pytest.mark.parametrize(
    "name", [n if n in ("block_sparse", "qk_sparse") else pytest.param(n, marks=pytest.mark.slow) for n in KEYS]
)
def test_key_sets(name: str, interpreted: Interpreted, tmp_path: Path):
    found = KEYS[name]
    packed = pack_of(tmp_path / "pack", found.spec, **found.build)
    for size in found.sizes:
        torch.manual_seed(0)
        agree(found.spec, packed, *inputs(size, dim_v=32), {**found.make(size), "q_offset": size[5]})


# -- caches and ragged batches ----------------------------------------------------------------------------------------


def padded(*names: str) -> Keys:
    """Keys that are not all there, or do not start at 0."""

    def make(size: Size) -> dict[str, Any]:
        ends = torch.linspace(1, size[4], size[0]).int()
        named = {"k_len": ends, "k_offset": torch.arange(size[0]).int() * 3}
        return {name: named[name] for name in names}

    return Keys(ag.Spec(mask=ag.causal(), sink="0.5"), make, (SQUARE, CHUNK), {"captures": make((1, 1, 2, 64, 64, 0))})


def packed_sequences() -> Keys:
    def make(size: Size) -> dict[str, Any]:
        ends_q, ends_k = ([0, n // 3, n // 3, n - 2] for n in size[3:5])
        return {"cu_q": torch.tensor(ends_q).int(), "cu_k": torch.tensor(ends_k).int()}

    spec = ag.Spec(mask=ag.causal(), score=lambda s, b, h, i, j: s + slope[h] * (j - i))
    build = {"captures": make((1, 1, 2, 64, 64, 0))}
    return Keys(spec, lambda size: make(size) | by_head("slope")(size), (SQUARE, SHORT), build)


def shared(levels: int = 1) -> Keys:
    def make(size: Size) -> dict[str, Any]:
        named = contexts((1, 2)[:levels], (19, 8)[:levels], size[1])
        return named if levels > 1 else {name: parts[0] for name, parts in named.items()}

    keys = ag.shared_prefix() if levels == 1 else ag.shared_prefix(levels=levels)
    return Keys(
        ag.Spec(keys=keys, mask=ag.causal()), make, ((4, 1, 2, 3, 6, 22),), {"shapes": ["B2 Hq2 Hkv1 N64 D16 Dv24"]}
    )


RAGGED = {
    "k_len": padded("k_len"),
    "k_offset": padded("k_offset"),
    "k_len, k_offset": padded("k_len", "k_offset"),
    "cu_q, cu_k": packed_sequences(),
    "shared prefix": shared(),
    "two shared prefixes": shared(2),
}


@pytest.mark.parametrize("name", ["k_len", *(pytest.param(n, marks=pytest.mark.slow) for n in RAGGED if n != "k_len")])
def test_ragged_batches_and_prefixes(name: str, interpreted: Interpreted, tmp_path: Path):
    found = RAGGED[name]
    packed = pack_of(tmp_path / "pack", found.spec, **found.build)
    dim_v = 24 if "prefix" in name else 32
    for size in found.sizes:
        torch.manual_seed(0)
        agree(found.spec, packed, *inputs(size, dim_v=dim_v), {**found.make(size), "q_offset": size[5]})


@pytest.mark.parametrize("head_major", [False, True])
def test_pages(head_major: bool, interpreted: Interpreted, tmp_path: Path):
    q, k, v, table, lengths = cache(16, head_major)
    spec = ag.Spec(keys=ag.paged(16, head_major), mask=ag.causal(), sink="0.25")
    build = dict(captures=dict(page_table=table, k_len=lengths), offset_tensors=True)
    packed = pack_of(tmp_path / "pack", spec, ["B3 Hq4 Hkv2 Nq2 Nk48 D16"], **build)
    agree(spec, packed, q, k, v, dict(page_table=table, k_len=lengths, q_offset=lengths - 2), backward=False)


def test_lengths_that_were_not_built_are_said_to_be_missing(interpreted: Interpreted, tmp_path: Path):
    spec = ag.Spec(mask=ag.causal())
    q, k, v = inputs(SQUARE, dim_v=32)
    packed = pack_of(tmp_path / "pack", spec, captures=[{}, {"k_len": torch.tensor([40])}])
    packed._compiler = _no_compiler
    packed(q, k, v)
    packed(q, k, v, k_len=torch.tensor([40]))
    with pytest.raises(ag.PackError, match="needs an attention 'k_offset', and the pack has 'k_len'"):
        packed(q, k, v, k_offset=3)


def _no_compiler(why: str) -> Any:
    raise ag.PackError(why)
