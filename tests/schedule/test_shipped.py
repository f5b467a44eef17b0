"""Default tiles found by compiling, which ship in `tuning_db/`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attngen as ag
from attngen.inspect.cross import cross_compile
from attngen.language.schedule import KERNELS, Tile
from attngen.schedule import Target, complete, shipped
from attngen.schedule.shipped import (
    FOLDER,
    FORMS,
    form_of,
    read_tiles,
    tile_of,
    tiles_under,
    triton_version,
    write_tiles,
)
from benchmarks.machine_code import SPECS

FILES = sorted(FOLDER.glob("tiles-*.json"))
ENTRIES = [
    (path.stem.removeprefix("tiles-"), *entry, tile)
    for path in FILES
    for entry, tile in tiles_under(triton_version(), read_tiles(path)).items()
]


def windowed(width: int, name: str) -> ag.Spec:
    ids = ag.Tensor(name, 2, dtype=torch.int32)
    return ag.Spec(mask=lambda b, h, i, j: (ids[b, i] == ids[b, j]) & (i >= j) & (i - j < width))


def test_numbers_and_names_do_not_matter():
    assert form_of(windowed(512, "doc")) == form_of(windowed(4096, "segment"))
    assert form_of(ag.Spec(score=ag.soft_cap(30.0))) == form_of(ag.Spec(score=ag.soft_cap(2.5e-3)))


def test_everything_else_does():
    x, y = ag.Tensor("x", 1), ag.Tensor("y", 1)
    different = [
        ag.Spec(),
        ag.Spec(mask=ag.causal()),
        ag.Spec(mask=ag.causal() & ag.window(8)),
        windowed(8, "doc"),
        ag.Spec(mask=ag.causal(), dropout=0.1),
        ag.Spec(score=lambda s, b, h, i, j: s + x[i] + y[i]),
        ag.Spec(score=lambda s, b, h, i, j: s + x[i] + x[j]),
        ag.Spec(score=lambda s, b, h, i, j: s + ag.Tensor("x", 2)[h, i]),
    ]
    assert len({form_of(spec) for spec in different}) == len(different)


def test_a_file_is_read_as_it_was_written(tmp_path: Path):
    tiles = tile_of((64, 64, 4, 2), ()), tile_of((32, 64, 4, 2), FORMS)
    found = [
        (("mask: true", kernel, 64, "3.6"), tile, {"cycles": 1.5})
        for kernel, tile in zip(("dkv", "dq"), tiles, strict=True)
    ]
    write_tiles(tmp_path / "tiles-sm_90.json", found)
    assert read_tiles(tmp_path / "tiles-sm_90.json") == found


@pytest.mark.parametrize(
    "content", ["", "[]", '{"attngen_tiles": 2, "tiles": []}', '{"attngen_tiles": 1, "tiles": [{"form": "x"}]}']
)
def test_a_file_that_is_none_is_named(content: str, tmp_path: Path):
    (tmp_path / "tiles-sm_90.json").write_text(content)
    with pytest.raises(ag.StoreError, match=r"tiles-sm_90\.json: expected"):
        read_tiles(tmp_path / "tiles-sm_90.json")


def test_the_default_is_the_shipped_tile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    spec, tile = ag.Spec(mask=ag.causal() & ag.window(700)), Tile(32, 64, 4, 2)
    write_tiles(tmp_path / "tiles-sm_80.json", [((form_of(spec), "dkv", 64, "3.6"), tile, {})])
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)

    def chosen(target: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, **pins: int) -> Tile:
        return complete(spec, Target.named(target), head_dim, head_dim, dtype, ag.Schedule(**pins)).dkv

    shared = ("block_m", "block_n", "num_warps", "num_stages")
    for target in ("sm_80", "sm_86", "sm_89", "sm_120"):  # one family
        assert all(getattr(chosen(target), name) == getattr(tile, name) for name in shared)
    assert chosen("sm_80", dkv_num_stages=1).num_stages == 1
    others = chosen("sm_90"), chosen("sm_80", torch.float32), chosen("sm_80", head_dim=128)
    assert not any(all(getattr(other, name) == getattr(tile, name) for name in shared) for other in others)


def test_an_older_triton_has_its_own_tile_where_the_best_spills_there():
    wide, narrow, other = Tile(32, 128, 8, 2), Tile(16, 64, 4, 1), Tile(64, 64, 4, 1)
    found = [
        (("x", "dkv", 128, "3.10"), wide, {}),
        (("x", "dkv", 128, "3.6"), narrow, {}),
        (("y", "dq", 64, "3.6"), other, {}),
    ]
    for triton, tile in (("3.6.0", narrow), ("3.9.0", narrow), ("3.10.0+git1", wide), ("4.0.0", wide)):
        assert tiles_under(triton, found) == {("x", "dkv", 128): tile, ("y", "dq", 64): other}
    assert tiles_under("3.5.1", found) == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_entries_are_told_apart(path: Path):
    """One a form, kernel, head dim and Triton; a newer Triton's is not the older one's."""
    found = read_tiles(path)
    assert len({entry for entry, _, _ in found}) == len(found)
    tiles = [(entry[:3], tile) for entry, tile, _ in found]
    assert len(set(tiles)) == len(tiles)


def test_common_specs_have_tiles():
    """Those that `benchmarks.machine_code tiles` compiles, at the usual head dims."""
    have = {entry[1:4] for entry in ENTRIES if entry[0] == "sm_90"}
    wanted = {(form_of(SPECS[name]), kernel, d) for name in ("full", "causal") for kernel in KERNELS for d in (64, 128)}
    assert wanted <= have


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form", "kernel", "head_dim", "tile"), ENTRIES)
def test_no_shipped_tile_spills(family: str, form: str, kernel: str, head_dim: int, tile: Tile):
    spec = next(spec for spec in SPECS.values() if form_of(spec) == form)
    schedule = complete(spec, Target.named(family), head_dim, head_dim, torch.bfloat16)
    assert getattr(schedule, kernel).block_m == tile.block_m
    made = cross_compile(spec, family, head_dim=head_dim, passes=(kernel,))[0]
    assert made.spills == 0, f"{made}"
