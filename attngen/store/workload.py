"""A call that somebody wants ready before it is made: what is tuned, asked of the database, or built into a pack ahead of time; and
lists of them in TOML files:

    dtype = "bfloat16"                            # of all attentions that do not say another, as are shapes and directions
    shapes = ["B1 Hq32 Hkv8 N4096 D128", "B8 Hq32 Hkv8 Nq1 Nk4096 D128"]

    [[attention]]                                 # the keys of a spec's own file, and
    name = "window"
    mask = "i >= j and i - j < width"
    params = {width = "int"}
    values = {width = 512}                        # of params; others are made up
    directions = ["forward"]                      # default: forward and backward

    [[attention]]
    spec = "specs.py:packed"                      # or text, or a TOML file; paths are relative to this one
    shapes = ["B1 H8 N2048 D64"]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attngen.errors import InputError, SpecError
from attngen.language.files import read_spec
from attngen.language.spec import Spec, read_toml
from attngen.store.record import Shape


@dataclass(frozen=True, eq=False)
class Workload:
    """name: for people. dtype: of q, k, v, as "bfloat16"; "" for the device's usual one. captures: values for what the spec captures,
    and lengths (`k_len=`, ...), by name; what is not given is made up. directions: "forward", "backward".
    """

    name: str
    spec: Spec
    shape: Shape
    dtype: str = ""
    captures: Mapping[str, Any] = field(default_factory=dict)
    directions: tuple[str, ...] = ("forward", "backward")


COMMON = ("dtype", "shapes", "directions")  # what a list says for all of its attentions, or one of them for itself
DIRECTIONS = ("forward", "backward")


def is_list(path: str | Path) -> bool:
    """Whether it is the path of a TOML file with a list of attentions. SpecError for one that can't be read."""
    return str(path).endswith(".toml") and "attention" in read_toml(path)


def read_list(path: str | Path) -> list[Workload]:
    """The calls that a TOML file lists. InputError, SpecError, StoreError."""
    data = read_toml(path)
    listed = data.pop("attention", None)
    if not isinstance(listed, list) or not listed or not all(isinstance(own, dict) for own in listed):
        raise SpecError(f"{path}: no attention is listed", fix="write [[attention]], then the keys of a spec")
    if unknown := sorted(set(data) - {*COMMON}):
        raise SpecError(f"{path}: unknown keys {unknown}", fix=f"for all attentions there are {', '.join(COMMON)}")
    return [one for place, own in enumerate(listed, 1) for one in _read_one(Path(path), place, {**data, **own})]


def _read_one(path: Path, place: int, data: dict[str, Any]) -> list[Workload]:
    where = f"{path}, attention {place}"
    shapes, dtype, values = data.pop("shapes", None), data.pop("dtype", ""), data.pop("values", {})
    directions = data.pop("directions", list(DIRECTIONS))
    if not isinstance(shapes, list) or not shapes:
        raise InputError(f"{where}: shapes", "a list such as ['B1 H8 N4096 D64']", repr(shapes))
    if dtype not in ("", "float32", "float16", "bfloat16"):
        raise InputError(f"{where}: dtype", "float32, float16 or bfloat16", repr(dtype))
    if not isinstance(directions, list) or not {*directions} <= {*DIRECTIONS}:
        raise InputError(f"{where}: directions", f"some of {', '.join(DIRECTIONS)}", repr(directions))
    if not isinstance(values, dict):
        raise InputError(f"{where}: values", "a table such as {width = 512}", repr(values))
    spec = _read_spec(path, where, data)
    for name, value in values.items():
        if name not in spec.params or type(value) not in (int, float):
            raise InputError(
                f"{where}: values", f"numbers of the spec's params ({', '.join(spec.params) or 'none'})", name
            )
    name = spec.name or f"attention {place}"
    return [Workload(name, spec, Shape.of(shape), dtype, values, tuple(directions)) for shape in shapes]


def _read_spec(path: Path, where: str, data: dict[str, Any]) -> Spec:
    source = data.pop("spec", None)
    if source is None:
        return Spec.from_table(data, where)
    if set(data) - {"name"} or not isinstance(source, str):
        raise SpecError(
            f"{where}: next to spec = {source!r} there are {sorted(data)}", fix="name the spec, or write it out"
        )
    if source.endswith(".toml") or ".py:" in source:
        source = str(path.parent / source)
    found = read_spec(source)
    name = str(data.get("name", found.name))
    return Spec.from_text(found.text, schedule=found.schedule, name=name)
