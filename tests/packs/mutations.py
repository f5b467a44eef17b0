"""Ways to damage a pack, or to write a bad one. Each changes a sound pack and says which files the refusal may name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from attngen.packs.format import KERNELS, MANIFEST, SCHEMA, _canonical, _digest

Mutation = Callable[[Random, Path], set[Path]]


def files_of(folder: Path) -> list[Path]:
    return [folder / MANIFEST, *sorted((folder / KERNELS).iterdir())]


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def seal(folder: Path, whole: dict[str, Any]) -> set[Path]:
    """Write a manifest with the digest that it should have: what somebody does who means harm."""
    whole["digest"] = _digest({name: value for name, value in whole.items() if name != "digest"})
    (folder / MANIFEST).write_text(_canonical(whole))
    return {folder / MANIFEST}


def flip(rng: Random, folder: Path) -> set[Path]:
    path = rng.choice(files_of(folder))
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 3])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    if bytes(content) == path.read_bytes():
        return flip(rng, folder)
    path.write_bytes(content)
    return {path}


def cut(rng: Random, folder: Path) -> set[Path]:
    path = rng.choice(files_of(folder))
    content = path.read_bytes()
    path.write_bytes(content[: rng.choice([0, 1, rng.randrange(len(content))])])
    return {path}


def lengthen(rng: Random, folder: Path) -> set[Path]:
    path = rng.choice(files_of(folder))
    path.write_bytes(path.read_bytes() + rng.choice([b"\0", b"\n", b" ", b"{}", rng.randbytes(100)]))
    return {path}


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * (path != ()) + [place for name, item in inner for place in _places(item, (*path, name))]


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        value = value[name]
    return value


STRANGE = [None, True, False, -1, 0, 7, 2**31, 2**64, 1.5, "", "x", "../x", [], [1], {}, {"x": 1}]


def change_unsealed(rng: Random, folder: Path) -> set[Path]:
    """Any field, with the digest left as it was."""
    whole = manifest_of(folder)
    path = rng.choice(_places(whole))
    value = rng.choice([x for x in STRANGE if json.dumps(x) != json.dumps(_at(whole, path))])
    _at(whole, path[:-1])[path[-1]] = value
    (folder / MANIFEST).write_text(_canonical(whole))
    return {folder / MANIFEST}


def drop_unsealed(rng: Random, folder: Path) -> set[Path]:
    whole = manifest_of(folder)
    path = rng.choice(_places(whole))
    del _at(whole, path[:-1])[path[-1]]
    (folder / MANIFEST).write_text(_canonical(whole))
    return {folder / MANIFEST}


def _some_record(rng: Random, whole: dict[str, Any]) -> dict[str, Any]:
    return whole[KERNELS][rng.choice(sorted(whole[KERNELS]))]


def mistype_sealed(rng: Random, folder: Path) -> set[Path]:
    """A field of a record of a type that it can't have, absurd, missing or unknown, with the right digest."""
    whole = manifest_of(folder)
    record = _some_record(rng, whole)
    table = record if rng.random() < 0.6 else rng.choice(record["arguments"])
    name = rng.choice(sorted(table))
    way = rng.randrange(4)
    if way == 0:
        del table[name]
    elif way == 1:
        table[rng.choice(["extra", "", "Symbol", "sha512"])] = rng.choice(STRANGE)
    elif way == 2:
        table[name] = rng.choice([None, 1.5, [1], -1, 2**64, "\0", "é", "a" * 1000])
    else:
        table[name] = {str: 5, int: "5", bool: 1, list: {}, dict: []}[type(table[name])]
    return seal(folder, whole)


def contradict_sealed(rng: Random, folder: Path) -> set[Path]:
    """A record that is sound by itself, and says other things than its cubin."""
    whole = manifest_of(folder)
    record = _some_record(rng, whole)
    arguments = record["arguments"]
    place = rng.randrange(len(arguments))
    kind = arguments[place]["kind"]
    limits = {
        "shared": 2**18,
        "num_warps": record["num_warps"] * 2,
        "num_ctas": 2,
        "trailing": 0,
        "abi": 15 - record["abi"],
    }
    name, value = rng.choice(
        [
            ("symbol", rng.choice([f"{record['symbol']}_", "main", "dkv2"])),
            ("target", rng.choice(["sm_80", "sm_86", "sm_100", "sm_120", "sm_91"])),
            ("toolkit", "11.8"),
            ("size", record["size"] + rng.choice([-1, 1])),
            ("sha256", record["sha256"][::-1]),
            ("shared", 227 * 1024 + 1 + rng.randrange(10**6)),
            ("arguments", arguments[:place] + arguments[place + 1 :]),
            ("arguments", [*arguments, {**arguments[place], "name": "one_more"}]),
            (
                "arguments",
                [
                    *arguments[:place],
                    {**arguments[place], "kind": "i64" if kind == "i32" else "i32"},
                    *arguments[place + 1 :],
                ],
            ),
            *limits.items(),
        ]
    )
    record[name] = value
    return seal(folder, whole) | {folder / record["file"]}


def leave_folder(rng: Random, folder: Path) -> set[Path]:
    """A path out of the folder, or no plain name, with the very cubin where it points."""
    whole = manifest_of(folder)
    record = _some_record(rng, whole)
    outside = folder.parent / f"outside{rng.randrange(1000)}.cubin"
    shutil.copy(folder / record["file"], outside)
    inside = folder / KERNELS / "inner" / "x.cubin"
    record["file"] = rng.choice(
        [
            f"../{outside.name}",
            f"kernels/../../{outside.name}",
            f"kernels/./{Path(record['file']).name}",
            f"kernels//{Path(record['file']).name}",
            f"{Path(record['file']).name}",
            str(outside),
            f"file://{outside}",
            "kernels/inner/x.cubin",
            "kernels\\x.cubin",
            "kernels/..cubin",
            "kernels/.x.cubin",
            "kernels/x.cubin\0",
            "kernels/x.cubin\n",
            "kernels/",
            "",
            "/dev/zero",
            "kernels/~.cubin",
        ]
    )
    if record["file"] == "kernels/inner/x.cubin":
        inside.parent.mkdir()
        shutil.copy(outside, inside)
    return seal(folder, whole)


def link(rng: Random, folder: Path) -> set[Path]:
    """A link, a pipe or a folder where a file or the folder of cubins should be."""
    path = rng.choice([*files_of(folder), folder / KERNELS])
    moved = folder.parent / f"moved{rng.randrange(10**6)}"
    path.rename(moved)
    way = rng.randrange(4)
    if way == 0:
        path.symlink_to(moved)
    elif way == 1:
        path.symlink_to(Path("..") / moved.name)
    elif way == 2:
        os.mkfifo(path)
    elif path == folder / KERNELS:
        path.write_bytes(b"")
    else:
        path.mkdir()
    return {path, *(files_of_kernels(folder) if path == folder / KERNELS else ())}


def files_of_kernels(folder: Path) -> set[Path]:
    return {folder / record["file"] for record in manifest_of(folder)[KERNELS].values()}


def newer(rng: Random, folder: Path) -> set[Path]:
    whole = manifest_of(folder)
    whole |= {"schema": SCHEMA + rng.randrange(1, 50), "attngen": f"{rng.randrange(1, 9)}.{rng.randrange(9)}.0"}
    if rng.random() < 0.5:
        whole["kernels"] = rng.choice([[], {"new": "way"}, 3])
    if rng.random() < 0.5:
        return seal(folder, whole)
    (folder / MANIFEST).write_text(json.dumps(whole))
    return {folder / MANIFEST}


def swap_cubin(rng: Random, folder: Path) -> set[Path]:
    """Another kernel's cubin, or an edited one, with the sha256 and the digest that fit."""
    whole = manifest_of(folder)
    record = _some_record(rng, whole)
    path = folder / record["file"]
    content = bytearray(path.read_bytes())
    way = rng.randrange(5)
    if way == 0:
        others = [other for other in files_of_kernels(folder) if other != path]
        content = bytearray(rng.choice(sorted(others)).read_bytes())
    elif way == 1:
        content[48 if content[8] == 7 else 49] ^= 1 << rng.randrange(8)  # the architecture, in ELF ABI 7 or 8
    elif way == 2:
        content[rng.choice([0, 1, 2, 3, 4, 5, 7, 8, 18, 19])] ^= 0xFF  # what the header starts with
    elif way == 3:
        content = content[: rng.randrange(len(content) // 2)] or bytearray(b"\0")
    else:
        content = bytearray(
            content.replace(f"\0{record['symbol']}\0".encode(), b"\0" + b"x" * len(record["symbol"]) + b"\0")
        )
    path.write_bytes(content)
    record |= {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    return seal(folder, whole) | {path}


def extra_or_missing(rng: Random, folder: Path) -> set[Path]:
    if rng.random() < 0.4:
        path = rng.choice(files_of(folder))
        path.unlink()
        return {path}
    name = rng.choice(
        [
            f"x{rng.randrange(99)}.py",
            ".hidden",
            "kernels/one_more.cubin",
            "kernels/x/y.cubin",
            "kernels2",
            "__init__.py",
        ]
    )
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(rng.randbytes(9))
    return {path, path.parent}


def bad_json(rng: Random, folder: Path) -> set[Path]:
    path = folder / MANIFEST
    text, whole = path.read_text(), manifest_of(folder)
    digest = f'"digest": "{whole["digest"]}",'
    depth = rng.choice([65, 100, 1000, 100_000])
    path.write_bytes(
        rng.choice(
            [
                json.dumps(whole, indent=rng.choice([None, 0, 2])).encode(),
                text.replace(digest, f"{digest}\n {digest}").encode(),
                text.replace(f'"schema": {SCHEMA}', f'"schema": {SCHEMA}, "schema": {SCHEMA}').encode(),
                b"\xef\xbb\xbf" + text.encode(),
                text.encode("utf-16"),
                rng.choice([b"[]", b"1", b'"pack"', b"null", b"", b"{}", rng.randbytes(500)]),
                b"[" * depth + b"]" * depth,
                b'{"a":' * depth + b"1" + b"}" * depth,
                text.replace(
                    f'"schema": {SCHEMA}',
                    f'"schema": {rng.choice(["NaN", "Infinity", "1e999", "9" * 5000, "1.0", "-1", "0"])}',
                ).encode(),
                _canonical({name: value for name, value in whole.items() if name != rng.choice(list(whole))}).encode(),
            ]
        )
    )
    if path.read_text("latin1") == text:
        path.write_text(text[1:])
    return {path}


# How many of each: 1,000 together.
MUTATIONS: dict[str, tuple[Mutation, int]] = {
    function.__name__: (function, number)
    for function, number in [
        (flip, 200),
        (cut, 50),
        (lengthen, 50),
        (change_unsealed, 100),
        (drop_unsealed, 50),
        (mistype_sealed, 120),
        (contradict_sealed, 120),
        (swap_cubin, 70),
        (leave_folder, 60),
        (link, 60),
        (newer, 30),
        (extra_or_missing, 40),
        (bad_json, 50),
    ]
}
