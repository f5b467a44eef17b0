"""Schedules as values: tiles and flat names are one thing, and what files and records say stays readable."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import attngen as ag
from attngen.language.schedule import KERNELS, PLAIN, PREFIXES, SHARED_FIELDS, TILE_FIELDS

VALUES = {
    "block_m": (16, 128),
    "block_n": (16, 4096),
    "num_warps": (1, 16),
    "num_stages": (1, 8),
    "tma": (False, True),
    "warp_specialize": (False, True),
    "persistent": (0, 32),
    "order": ("by_head", "longest_first"),
    "pipeline_edges": (False, True),
    "disable_licm": (False, True),
    "separate_sums": (False, True),
    "split": (1, 7, "stream"),
    "programs": (1, 65536),
    "pack": (False, True),
    "store": (False, True),
    "deterministic": (False, True),
    "precision": ("ieee", "tf32", "tf32x3"),
}
FLAT = [*(PREFIXES[kernel] + name for kernel in KERNELS for name in TILE_FIELDS), *SHARED_FIELDS]


def flat(draw: Any) -> dict[str, Any]:
    """Some flat names with values, in the order of records."""
    field = {name: name.removeprefix("dq_").removeprefix("dkv_") for name in FLAT}
    chosen = draw(st.sets(st.sampled_from(FLAT)))
    return {name: draw(st.sampled_from(VALUES[field[name]])) for name in FLAT if name in chosen}


flats = st.composite(flat)()


@given(flats, flats)
def test_flat_names_and_tiles_are_one_thing(some: dict[str, Any], others: dict[str, Any]) -> None:
    schedule = ag.Schedule(**some)
    tiles: dict[str, Any] = {kernel: getattr(schedule, kernel) for kernel in KERNELS}
    shared: dict[str, Any] = {name: some.get(name) for name in SHARED_FIELDS}
    for same in (ag.Schedule(**tiles, **shared), pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert same == schedule and hash(same) == hash(schedule)
    assert list(schedule.decided().items()) == list(some.items())
    assert str(schedule) == (", ".join(f"{name}={value}" for name, value in some.items()) or "undecided")
    assert eval(repr(schedule), {"Schedule": ag.Schedule}) == schedule
    assert schedule.over(ag.Schedule(**others)).decided() == others | some
    assert schedule.over(None) == schedule


def test_a_tile_is_whole_or_says_what_is_open() -> None:
    whole = ag.Tile(64, 32, 4, 2)
    schedule = ag.Schedule(forward=whole, dq=ag.Tile(block_m=64), dkv=ag.Tile(num_warps=8), dkv_block_n=32)
    tile = schedule.tile("forward")
    assert tile == whole.over(PLAIN) and tile.whole
    assert schedule.dkv == ag.Tile(block_n=32, num_warps=8)
    with pytest.raises(ag.ScheduleError, match="dq_block_n, dq_num_warps, dq_num_stages not decided: complete"):
        schedule.tile("dq")
    assert schedule.with_tile("dq", whole).tile("dq") == tile
    assert replace(schedule, block_m=32, dq_block_m=None, split=2).decided() == {
        **schedule.forward.decided(),
        "block_m": 32,
        **{f"dkv_{name}": value for name, value in schedule.dkv.decided().items()},
        "split": 2,
    }
    assert str(ag.Tile(block_m=64)) == "block_m=64" and str(ag.Tile()) == "undecided"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ag.Schedule(dq_blok_m=64), "got 'dq_blok_m': did you mean dq_block_m?"),
        (lambda: ag.Schedule(spilt=2), "got 'spilt': did you mean split?"),
        (lambda: ag.Schedule(colour=2), "the fields of a tile are block_m, block_n"),
        (lambda: ag.Schedule(forward=64), "forward: expected a Tile, got 64; one field alone is written block_m=..."),
        (lambda: ag.Schedule(dq={"block_m": 64}), "one field alone is written dq_block_m=..."),
        (lambda: ag.Schedule(dkv_block_m=100), "^dkv_block_m: expected a power of two from 16 to 4096, got 100"),
        (lambda: ag.Tile(block_n=8), "^block_n: expected a power of two"),
        (lambda: ag.Schedule(dq_num_warps=True), "^dq_num_warps: expected 1, 2, 4, 8 or 16, got True"),
        (lambda: ag.Schedule(split=0), 'split: expected 1 to 1024, or "stream", got 0'),
        (lambda: ag.Schedule(dq_order="backwards"), "dq_order: expected one of by_head, longest_first"),
        (lambda: ag.Schedule(pack=1), "pack: expected True or False, got 1"),
    ],
)
def test_bad_values_are_named_as_they_were_written(make: Any, says: str) -> None:
    with pytest.raises(ag.ScheduleError, match=says.replace("?", r"\?")):
        make()


def test_records_and_spec_files_of_earlier_versions_stay_readable(tmp_path: Path) -> None:
    record = {"dq_block_m": 64, "dq_block_n": 128, "dq_tma": True, "dkv_num_warps": 8, "dkv_order": "longest_first"}
    schedule = ag.Schedule(**record)
    assert schedule.dq == ag.Tile(block_m=64, block_n=128, tma=True)
    assert schedule.dkv == ag.Tile(num_warps=8, order="longest_first") and schedule.forward == ag.Tile()
    path = tmp_path / "causal.toml"
    lines = ["mask = 'i >= j'", "[schedule]", "block_m = 64", "dkv_block_n = 32", "split = 'stream'", "pack = true"]
    path.write_text("\n".join(lines))
    read = ag.Spec.from_toml(path).schedule
    assert str(read) == "block_m=64, dkv_block_n=32, split=stream, pack=True"
    path.write_text("mask = 'i >= j'\n[schedule]\nblok_m = 64")
    with pytest.raises(ag.ScheduleError, match=r"got 'blok_m': did you mean block_m\?"):
        ag.Spec.from_toml(path)
