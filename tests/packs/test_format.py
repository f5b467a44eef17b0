"""The folder of a pack: written the same every time, read only if every byte is as it was written."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

import attngen as ag
from attngen.errors import PackError
from attngen.packs.elf import read_cubin
from attngen.packs.format import KERNELS, MANIFEST, SCHEMA, read, write
from attngen.packs.record import SHARED_LIMITS, Kernel
from attngen.schedule.target import TARGETS
from tests.packs.cases import causal_pack, record_of
from tests.packs.mutations import MUTATIONS, files_of, manifest_of, seal

SPECS = {"specs": {"causal": {"text": "mask: i >= j"}}, "numbers": [1, 0.1, True, None, "é"]}


def write_causal(folder: Path, manifest: dict = SPECS) -> Path:
    kernels, files = causal_pack()
    return write(folder, manifest, kernels, files, attngen="0.1.0")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_causal(tmp_path_factory.mktemp("sound") / "pack")


def test_what_was_written_is_read(sound: Path):
    kernels, files = causal_pack()
    pack = read(sound)
    assert pack.kernels == kernels and pack.files == files and pack.manifest == SPECS and pack.attngen == "0.1.0"
    assert pack.cubin("dq") == files[kernels["dq"].file]
    assert read(str(sound)).digest == pack.digest


def test_two_builds_are_equal_to_the_byte(sound: Path, tmp_path: Path):
    kernels, files = causal_pack()
    turned = dict(reversed(kernels.items())), dict(reversed(files.items()))
    again = write(tmp_path / "again", dict(reversed(SPECS.items())), *turned, attngen="0.1.0")
    assert [path.read_bytes() for path in files_of(again)] == [path.read_bytes() for path in files_of(sound)]
    assert str(tmp_path).encode() not in (again / MANIFEST).read_bytes()


@pytest.mark.parametrize("kind", MUTATIONS)
def test_a_mutated_pack_is_refused_by_name(kind: str, sound: Path, tmp_path: Path):
    mutate, number = MUTATIONS[kind]
    for seed in range(number):
        folder = shutil.copytree(sound, tmp_path / str(seed) / "pack")
        named = mutate(Random(f"{kind} {seed}"), folder)
        with pytest.raises(PackError) as refusal:
            read(folder)
        assert any(str(path) in str(refusal.value) for path in named), f"{kind} {seed}: {refusal.value}"
        shutil.rmtree(folder.parent)


def test_there_are_a_thousand_mutations():
    assert sum(number for _, number in MUTATIONS.values()) == 1000


@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.backend == "cuda"])
def test_the_cubins_of_every_target_are_understood(target: str):
    delta = ag.cross_compile(ag.Spec(mask=ag.causal()), target, passes=("delta",))[0]
    record = record_of(delta)
    record.check(delta.cubin or b"", "delta")
    assert record.target == target and record.abi in (7, 8) and float(record.toolkit) > 12


def test_a_damaged_cubin_never_crashes_the_reader():
    _, files = causal_pack()
    rng, refused = Random(14), 0
    content = next(iter(files.values()))
    for _ in range(2000):
        damaged = bytearray(content[: rng.choice([len(content), rng.randrange(len(content))])])
        for _ in range(rng.choice([1, 2, 8, 64])):
            # Half of it where the structure is: the header, and the tables at both ends.
            place = rng.randrange(len(damaged) or 1) if rng.random() < 0.5 else rng.randrange(64)
            if place < len(damaged):
                damaged[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        try:
            read_cubin(bytes(damaged), "kernels/x.cubin")
        except PackError as error:
            refused += str(error).startswith("kernels/x.cubin: ")
    assert refused > 1000


def test_a_pack_of_a_newer_attngen_says_so(sound: Path, tmp_path: Path):
    folder = shutil.copytree(sound, tmp_path / "pack")
    seal(folder, manifest_of(folder) | {"schema": SCHEMA + 1, "attngen": "3.1.0"})
    with pytest.raises(
        PackError, match=rf"made by a newer attngen, 3\.1\.0, with schema {SCHEMA + 1}.*upgrade attngen"
    ):
        read(folder)


def test_a_pack_of_an_older_attngen_is_not_launched(sound: Path, tmp_path: Path):
    folder = shutil.copytree(sound, tmp_path / "pack")
    seal(folder, manifest_of(folder) | {"schema": SCHEMA - 1, "attngen": "0.0.1"})
    with pytest.raises(
        PackError, match=rf"made by an older attngen, 0\.0\.1, with schema {SCHEMA - 1}.*build the pack again"
    ):
        read(folder)


def test_links_are_taken_where_asked_for(sound: Path, tmp_path: Path):
    folder = shutil.copytree(sound, tmp_path / "pack")
    for place, path in enumerate(files_of(folder)):
        path.rename(tmp_path / f"blob{place}")
        path.symlink_to(tmp_path / f"blob{place}")
    with pytest.raises(PackError, match="symbolic link"):
        read(folder)
    assert read(folder, links=True).kernels == read(sound).kernels
    (tmp_path / "blob1").write_bytes(b"other")
    with pytest.raises(PackError, match="bytes, got 5"):
        read(folder, links=True)


def test_an_older_pack_is_replaced(tmp_path: Path):
    folder = write_causal(tmp_path / "deep" / "pack", {"old": 1})
    (folder / MANIFEST).write_text("damaged")
    write_causal(folder, {"new": 2})
    assert read(folder).manifest == {"new": 2}
    assert [path.name for path in folder.parent.iterdir()] == ["pack"]


def test_what_is_no_pack_stays(tmp_path: Path):
    for place, name in enumerate(["notes.txt", "kernels/notes.txt", "kernels/x.cubin", "sub/pack.json"]):
        folder = tmp_path / str(place)
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        with pytest.raises(PackError, match="expected a pack, or no folder"):
            write_causal(folder)
        assert path.read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "0")
    for name in ("file", "link"):
        with pytest.raises(PackError, match="a link or a file"):
            write_causal(tmp_path / name)
    with pytest.raises(PackError, match="expected a place where a pack can be written"):
        write_causal(tmp_path / "file" / "pack")


def test_a_failed_write_leaves_the_older_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_causal(tmp_path / "pack", {"old": 1})
    rename = os.rename

    def fail_to_put_the_new_one(source: Path, target: Path) -> None:
        if source.name == "new":
            raise OSError("disk full")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_to_put_the_new_one)
        with pytest.raises(PackError, match="expected a place where a pack can be written: disk full"):
            write_causal(folder, {"new": 2})
    assert read(folder).manifest == {"old": 1} and [path.name for path in tmp_path.iterdir()] == ["pack"]


@pytest.mark.parametrize("manifest", [{"schema": 9}, {"x": float("nan")}, {"x": {1, 2}}, {"x": object()}])
def test_a_manifest_that_could_not_be_read_is_not_written(manifest: dict, tmp_path: Path):
    with pytest.raises(PackError):
        write_causal(tmp_path / "pack", manifest)
    assert not list(tmp_path.iterdir())


def test_records_that_contradict_their_cubins_are_not_written(tmp_path: Path):
    kernels, files = causal_pack()
    for change in ({"num_warps": 1}, {"target": "sm_100"}, {"symbol": "other"}, {"size": 1}, {"shared": 2**20}):
        with pytest.raises(PackError):
            write(tmp_path / "pack", {}, kernels | {"dq": replace(kernels["dq"], **change)}, files, attngen="0.1.0")
    with pytest.raises(PackError, match="expected a file of the pack"):
        write(tmp_path / "pack", {}, kernels, {}, attngen="0.1.0")
    with pytest.raises(PackError, match="expected no file"):
        write(tmp_path / "pack", {}, {}, files, attngen="0.1.0")
    assert not list(tmp_path.iterdir())


def test_limits_of_shared_memory_are_the_targets():
    known = {name: target.shared_limit for name, target in TARGETS.items() if target.backend == "cuda"}
    assert known.items() <= SHARED_LIMITS.items()


def test_a_record_comes_back_from_json():
    for kernel in causal_pack()[0].values():
        assert Kernel.from_json(kernel.to_json(), "x") == kernel
    assert KERNELS in str(next(iter(causal_pack()[1])))
