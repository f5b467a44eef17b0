"""The folder of a pack: `pack.json` and `kernels/*.cubin`. Written whole or not at all; read with suspicion.

`pack.json` is canonical JSON (sorted keys, fixed indent, ASCII), so that equal packs are equal to the byte. It holds the schema, who
made it, a digest of all the rest, and a record of each kernel with the sha256 of its cubin. What else it holds is for others to read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from ..errors import PackError
from .record import MOST_BYTES, Kernel

SCHEMA = 3
MANIFEST = "pack.json"
KERNELS = "kernels"  # the folder of cubins, and the manifest's field of their records
OWN_FIELDS = ("schema", "attngen", "digest", KERNELS)
MOST_MANIFEST_BYTES = 2**26
MOST_KERNELS = 10_000
MOST_DEPTH = 64
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"


@dataclass(frozen=True)
class Pack:
    """A pack that was read and found sound.

    attngen: the version that made it. digest: sha256 of the manifest, which holds that of every file: what identifies a pack.
    kernels: by name. manifest: the other fields, as they came from JSON. files: the cubins, by the name that `Kernel.file` says.
    """

    folder: Path
    attngen: str
    digest: str
    kernels: Mapping[str, Kernel]
    manifest: Mapping[str, Any]
    files: Mapping[str, bytes]

    def cubin(self, name: str) -> bytes:
        """The cubin of a kernel."""
        return self.files[self.kernels[name].file]


def write(
    folder: Path | str,
    manifest: Mapping[str, Any],
    kernels: Mapping[str, Kernel],
    files: Mapping[str, bytes],
    *,
    attngen: str,
) -> Path:
    """Write a pack, in the place of an older one if there is one: the folder appears whole, or stays as it was.

    manifest: fields for others to read, plain JSON. kernels: by name. files: their cubins, by `Kernel.file`. attngen: the version
    that makes it. Returns the folder. Raises PackError where `read` would not take the result, for a folder that holds something
    else, and where nothing can be written.
    """
    folder = Path(os.path.abspath(folder))
    whole = _manifest_of(folder, manifest, kernels, attngen)
    records = {name: _record(folder / MANIFEST, name, record) for name, record in whole[KERNELS].items()}
    _check_kernels(folder, records.values(), files)
    try:
        _check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
            staged = Path(beside, "new")
            (staged / KERNELS).mkdir(parents=True)
            for name, content in files.items():
                (staged / name).write_bytes(content)
            (staged / MANIFEST).write_text(_canonical(whole), encoding="ascii")
            _swap(staged, folder, Path(beside, "old"))
    except OSError as error:
        raise PackError(f"{folder}: expected a place where a pack can be written: {error}") from error
    return folder


def read(folder: Path | str, *, links: bool = False) -> Pack:
    """Read a pack, and check all of it: the schema, the digest, every file's size and sha256, every record, alone and against its
    cubin. Nothing is run.

    links: take files that are symbolic links, as caches of downloads have them; what is in them is checked all the same.
    Raises PackError, which names the file.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    whole = _parsed(path, _content(path, MOST_MANIFEST_BYTES, links))
    records = whole.get(KERNELS)
    if not isinstance(records, dict) or len(records) > MOST_KERNELS:
        raise PackError(f"{path}: {KERNELS}: expected an object of at most {MOST_KERNELS} records")
    kernels = {name: _record(path, name, record) for name, record in records.items()}
    _check_listing(folder, {kernel.file for kernel in kernels.values()}, links)
    files = {
        kernel.file: _content(folder / kernel.file, MOST_BYTES, links)
        for kernel in sorted(kernels.values(), key=lambda kernel: kernel.file)
    }
    _check_kernels(folder, kernels.values(), files)
    rest = {name: value for name, value in whole.items() if name not in OWN_FIELDS}
    return Pack(folder, whole["attngen"], whole["digest"], kernels, rest, files)


def _manifest_of(
    folder: Path, manifest: Mapping[str, Any], kernels: Mapping[str, Kernel], attngen: str
) -> dict[str, Any]:
    """All of `pack.json`, and once more as it comes back from JSON, so that no value changes on the way."""
    taken = sorted(set(manifest) & set(OWN_FIELDS))
    if taken:
        raise PackError(f"manifest: expected other fields than {', '.join(OWN_FIELDS)}, got {', '.join(taken)}")
    whole = {
        **manifest,
        "schema": SCHEMA,
        "attngen": attngen,
        KERNELS: {name: kernel.to_json() for name, kernel in kernels.items()},
    }
    path = folder / MANIFEST
    try:
        whole["digest"] = _digest(whole)
        return _parsed(path, _canonical(whole).encode("ascii"))
    except (TypeError, ValueError, RecursionError) as error:
        raise PackError(f"{path}: expected plain JSON: {error}") from error


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    """The manifest, if its JSON is sound, of a known schema, canonical, and has the digest that it says."""
    try:
        whole = json.loads(content.decode("ascii"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
        text = _canonical(whole) if _depth_is_sound(whole) else None
    except (ValueError, RecursionError) as error:
        raise PackError(
            f"{path}: expected the JSON of a pack: {error}; the file is damaged, build the pack again"
        ) from None
    if text is None:
        raise PackError(f"{path}: expected JSON of at most {MOST_DEPTH} levels")
    if not isinstance(whole, dict):
        raise PackError(f"{path}: expected an object, got {type(whole).__name__}")
    schema, maker = whole.get("schema"), whole.get("attngen")
    if type(schema) is not int or schema < 1 or not isinstance(maker, str) or not re.fullmatch(_NAME, maker):
        raise PackError(
            f"{path}: expected a schema and the version of attngen that made it, got {schema!r:.40}, {maker!r:.40}"
        )
    if schema > SCHEMA:
        raise PackError(
            f"{path}: made by a newer attngen, {maker}, with schema {schema}; this one is {_own_version()}, which reads schema "
            f"{SCHEMA}: upgrade attngen, or build the pack with this one"
        )
    if schema < SCHEMA:
        raise PackError(
            f"{path}: made by an older attngen, {maker}, with schema {schema}, whose kernels this one ({_own_version()}, schema {SCHEMA}) "
            "does not launch: build the pack again"
        )
    digest = _digest({name: value for name, value in whole.items() if name != "digest"})
    if whole.get("digest") != digest:
        raise PackError(
            f"{path}: expected digest {digest}, got {whole.get('digest')!r:.80}; it was changed, build the pack again"
        )
    if text.encode("ascii") != content:
        raise PackError(f"{path}: expected canonical JSON, as attngen writes it; it was changed, build the pack again")
    return whole


def _record(path: Path, name: str, record: object) -> Kernel:
    if not re.fullmatch(_NAME, name):
        raise PackError(f"{path}: kernels: expected a plain name, got {name!r:.80}")
    return Kernel.from_json(record, f"{path}, kernel {name}")


def _check_kernels(folder: Path, kernels: Collection[Kernel], files: Mapping[str, bytes]) -> None:
    """Every record against its cubin, and no cubin without a record."""
    _check_names(folder, {kernel.file for kernel in kernels}, files)
    for kernel in kernels:
        content, where = files[kernel.file], str(folder / kernel.file)
        if len(content) != kernel.size:
            raise PackError(f"{where}: expected {kernel.size} bytes, got {len(content)}; build the pack again")
        found = hashlib.sha256(content).hexdigest()
        if found != kernel.sha256:
            raise PackError(
                f"{where}: expected sha256 {kernel.sha256}, got {found}; it was changed, build the pack again"
            )
        kernel.check(content, where)


def _check_names(folder: Path, expected: Iterable[str], found: Iterable[str]) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise PackError(f"{folder / missing[0]}: expected a file of the pack, got none; build the pack again")
    if extra:
        raise PackError(f"{folder / extra[0]}: expected no file that the pack does not name; remove it")


def _check_listing(folder: Path, files: Iterable[str], links: bool) -> None:
    """Exactly the named files, and the folder of cubins a real one."""
    inner = folder / KERNELS
    if inner.is_symlink() and not links:
        raise PackError(f"{inner}: expected the folder of cubins, got a symbolic link")
    try:
        found = [entry.name for entry in folder.iterdir()]
        if inner.is_dir():
            found.remove(KERNELS)
            found += [f"{KERNELS}/{entry.name}" for entry in inner.iterdir()]
    except OSError as error:
        raise PackError(f"{error.filename}: expected a folder of a pack that can be read: {error.strerror}") from None
    _check_names(folder, {MANIFEST, *files}, found)


def _content(path: Path, limit: int, links: bool) -> bytes:
    """All of a regular file."""
    try:
        if path.is_symlink() and not links:
            raise PackError(f"{path}: expected a plain file of a pack, got a symbolic link")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise PackError(f"{path}: expected a plain file of a pack, got a folder or a special file")
        if status.st_size > limit:
            raise PackError(f"{path}: expected at most {limit} bytes, got {status.st_size}")
        return path.read_bytes()
    except FileNotFoundError:
        raise PackError(f"{path}: expected a file of a pack, got none; build the pack again") from None
    except OSError as error:
        raise PackError(f"{path}: expected a file of a pack that can be read: {error.strerror}") from None


def _check_replaceable(folder: Path) -> None:
    """A folder that a pack may take the place of: none, an empty one, or one with nothing but what a pack has."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise PackError(f"{folder}: expected a folder for a pack, got a link or a file; choose another")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path != folder / KERNELS)
    others = [name for name in names if name != MANIFEST and not re.fullmatch(rf"{KERNELS}/[^/]*\.cubin", name)]
    if others or (names and MANIFEST not in names):
        raise PackError(
            f"{folder}: expected a pack, or no folder, got one that holds {(others or names)[0]!r}; choose another"
        )


def _swap(staged: Path, folder: Path, old: Path) -> None:
    """Put a folder in the place of another, which is moved to `old`, and back again should that fail."""
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(staged, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def _digest(whole: Mapping[str, Any]) -> str:
    """Of the same without white space, which json writes ten times as fast."""
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _depth_is_sound(value: object) -> bool:
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return True
    return False


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _own_version() -> str:
    try:
        return metadata.version("attngen")
    except metadata.PackageNotFoundError:
        return "a copy without a version"
