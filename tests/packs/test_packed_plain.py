"""What a pack says of specs and kernels, changed by somebody who gives it the digest that it should have: refused when it is loaded, or
an attention that behaves. No other error than attngen's own, whatever stands there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch

import attngen as ag
from attngen.packs.format import MANIFEST
from tests.packs.interpreted import SMALL, Interpreted, interpreted_packs
from tests.packs.mutations import STRANGE, _at, _places, seal

TREES = ("specs", "plain", "schedules", "choices", "launches", "backward")
doc, slope, width = ag.Tensor("doc", 2, dtype=torch.int32), ag.Tensor("slope", 1), ag.Param("width")
SPECS = {
    "documents": ag.Spec(
        mask=lambda b, h, i, j: (doc[b, i] == doc[b, j]) & (i - j < width) & (i >= j),
        score=lambda s, b, h, i, j: s + slope[h] * (j - i),
        sink=lambda b, h, i: slope[h] * 2,
    ),
    "sparse": ag.Spec(keys=ag.block_sparse(32), mask=ag.causal()),
    "union": ag.union(
        ag.Spec(mask=ag.causal() & ag.window(9)), ag.Spec(keys=ag.gather(), mask=ag.causal() & ~ag.window(9))
    ),
}
SHAPE = "B1 Hq2 Hkv1 N64 D16"


def build_pack(folder: Path) -> Path:
    more: dict[str, Any] = {"targets": ["sm_90"], "shapes": [SHAPE], "dtypes": [torch.float32], "schedule": SMALL}
    return ag.save(SPECS, folder, **more)


def call_all(pack: Any) -> None:
    """Every attention of a pack, forward and backward."""
    captures = {
        "documents": {"doc": torch.zeros(1, 40).int(), "slope": torch.ones(2, requires_grad=True), "width": 9},
        "sparse": {"layout": torch.ones(1, 1, 2, 2, dtype=torch.bool)},
        "union": {"index": torch.arange(8)[None, None]},
    }
    for name, attention in pack.items():
        q, k, v = (torch.randn(1, heads, 40, 16, requires_grad=True) for heads in (2, 1, 1))
        attention(q, k, v, **captures.get(name, {})).sum().backward()


def _like(rng: Random, old: Any) -> Any:
    """Another value of the same type."""
    if type(old) is bool:
        return not old
    if type(old) is int:
        return old + rng.choice([-1, 1, 1000, 2**40])
    return {str: "extent", float: 1e300}.get(type(old), [copy.deepcopy(old)] * 2)


def mutate(rng: Random, folder: Path, whole: str) -> str:
    """Write a changed manifest. Returns what was changed."""
    manifest = json.loads(whole)
    tree = rng.choice([*TREES, "specs", "specs", "specs"])
    path = rng.choice(_places(manifest[tree], (tree,)))
    owner, name, old = _at(manifest, path[:-1]), path[-1], _at(manifest, path)
    way = rng.randrange(7)
    if way == 0 and isinstance(owner, (dict, list)):
        del owner[name]
    elif way == 1:
        owner[name] = rng.choice(STRANGE)
    elif way == 2:
        owner[name] = _like(rng, old)
    elif way == 3:
        nest: Any = old
        for _ in range(rng.choice([2, 10, 50])):
            nest = [nest] if rng.random() < 0.5 else {"x": nest}
        owner[name] = nest
    elif way == 4:
        other = rng.choice(_places(manifest[tree], (tree,)))
        owner[name] = copy.deepcopy(_at(manifest, other))
    elif way == 5 and isinstance(old, str):
        owner[name] = rng.choice(
            ["exec", "load", "add", "where", "floordiv", "integer", "power", "mul", "b", "k", "i >= j", ""]
        )
    elif isinstance(owner, dict):
        owner[rng.choice(["extra", "", "Key", name])] = owner.pop(name)
    else:
        owner.insert(name, rng.choice(STRANGE))
    seal(folder, manifest)
    return f"{path}: {old!r:.60} -> way {way}"


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    with interpreted_packs() as found, mock.patch.object(found, "start", lambda *given: None):  # launches nothing
        yield found


@pytest.mark.filterwarnings("ignore::attngen.errors.AttngenWarning")
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 10))])
def test_a_changed_manifest_is_refused_or_behaves(part: int, interpreted: Interpreted, tmp_path: Path):
    """40 changes each."""
    folder = build_pack(tmp_path / "pack")
    whole, refused = (folder / MANIFEST).read_text(), 0
    call_all(ag.load(folder))
    for seed in range(40 * part, 40 * part + 40):
        what = mutate(Random(f"plain {seed}"), folder, whole)
        try:
            call_all(ag.load(folder))
        except ag.PackError:
            refused += 1
        except ag.InputError:  # of an attention that now takes other things
            pass
        except Exception as error:
            raise AssertionError(f"{seed}: {what}") from error
    assert refused > 20
