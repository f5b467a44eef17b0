"""Default tiles found by compiling, for common specs: one file per architecture in `tuning_db/`, made by
`python -m benchmarks.machine_code tiles`.

What a kernel needs depends on the form of its spec, hardly on its numbers and not on its names: a window of 512 and one of
4096, a soft cap of 30 and one of 50 share an entry. Where the best tile spills under an older Triton, that has an entry of
its own.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sympy

from attngen.errors import StoreError
from attngen.language.expression import Load
from attngen.language.schedule import Tile
from attngen.language.spec import Spec

FORMAT = 1
FORMS = ("tma", "pipeline_edges", "disable_licm", "separate_sums")  # that a tile of a file may have
FOLDER = Path(__file__).parent.parent / "tuning_db"

Entry = tuple[str, str, int, str]  # the form of a spec, a kernel, the larger head dim, the Triton from which on ("3.6")
Found = tuple[Entry, Tile, dict[str, object]]  # the last: what was found about the tile


@lru_cache(maxsize=512)
def form_of(spec: Spec) -> str:
    """What is computed, with # for every number and a kind for every name: "mask And(GreaterThan(i, j), ...); score s"."""
    kinds = {name: f"{tensor.kind}[{tensor.ndim}]" for name, tensor in spec.tensors.items()}
    params = {param.sym for param in spec.params.values()}

    def form(expr: Any) -> str:
        if expr.is_Number:
            return "-#" if expr.is_negative else "#"
        if isinstance(expr, Load):
            return f"{kinds[expr.name]}({', '.join(map(form, expr.indices))})"
        if not expr.args:
            return "param" if expr in params else str(expr)
        parts = [form(arg) for arg in expr.args]
        if isinstance(expr, (sympy.Add, sympy.Mul, sympy.And, sympy.Or)):  # whose order is that of names
            parts.sort()
        return f"{expr.func.__name__}({', '.join(parts)})"

    said = {"mask": spec.mask, "score": spec.score, "sink": spec.sink, "dropout": spec.dropout}
    return "; ".join(f"{name} {form(sympy.sympify(expr))}" for name, expr in said.items() if expr is not None)


def shipped_tile(spec: Spec, family: str, kernel: str, head_dim: int) -> Tile | None:
    """For float16 and bfloat16: the tile of "forward", "dq" or "dkv"; None where the architecture's file has none."""
    tiles = _tiles(FOLDER / f"tiles-{family}.json")
    if not tiles or spec.lists is not None or spec.page_size is not None:
        return None
    return tiles.get((form_of(spec), kernel, head_dim))


def shipped_tiles(family: str, kernel: str, head_dim: int) -> list[Tile]:
    """Those of every form, one for each."""
    tiles = _tiles(FOLDER / f"tiles-{family}.json")
    return [tile for (_, own, d), tile in tiles.items() if (own, d) == (kernel, head_dim)]


def family_of(target: str) -> str:
    """Architectures that compile to the same kind of matrix instructions: sm_86, sm_89 and sm_120 are like sm_80."""
    return target if target in ("sm_90", "sm_100", "gfx942") else "sm_80"


@cache
def _tiles(path: Path) -> Mapping[tuple[str, str, int], Tile]:
    if not path.is_file():
        return MappingProxyType({})
    return MappingProxyType(tiles_under(triton_version(), read_tiles(path)))


def tiles_under(triton: str, found: list[Found]) -> dict[tuple[str, str, int], Tile]:
    """For each form, kernel and head dim the tile that a version of Triton takes: the newest entry that is not newer than it."""
    by_age = sorted(found, key=lambda line: _minor(line[0][3]))
    return {entry[:3]: tile for entry, tile, _ in by_age if _minor(entry[3]) <= _minor(triton)}


def _minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def triton_version() -> str:
    """The installed one; where there is none, as where kernels come from packs, the newest of all."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "999.0"


def read_tiles(path: Path) -> list[Found]:
    """Entries, their tiles, and what was found about them. StoreError for a file that is none of these."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["attngen_tiles"] != FORMAT:
            raise StoreError(f"{path}: expected tiles of format {FORMAT}, got {content['attngen_tiles']!r}")
        return [
            ((line["form"], line["kernel"], line["head_dim"], line["triton"]), _tile(line), line["found"])
            for line in content["tiles"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: expected a file of tiles, got {error!r}") from error


def _tile(line: dict[str, Any]) -> Tile:
    return tile_of(line["tile"], line["forms"])


def tile_of(sizes: Sequence[int], forms: Collection[str]) -> Tile:
    """The tile of rows, keys, warps and stages with those of the special forms."""
    block_m, block_n, num_warps, num_stages = sizes
    given: dict[str, Any] = {name: name in forms for name in FORMS}
    return Tile(block_m, block_n, num_warps, num_stages, **given)


def forms_of(tile: Tile) -> list[str]:
    """The names of a tile's special forms."""
    return [name for name in FORMS if getattr(tile, name)]


def write_tiles(path: Path, found: list[Found]) -> None:
    """One entry a line, sorted, so that a review shows which changed."""
    lines = [
        json.dumps(
            {
                "form": form,
                "kernel": kernel,
                "head_dim": head_dim,
                "triton": triton,
                "tile": [tile.block_m, tile.block_n, tile.num_warps, tile.num_stages],
                "forms": forms_of(tile),
                "found": about,
            }
        )
        for (form, kernel, head_dim, triton), tile, about in sorted(found, key=lambda line: line[0])
    ]
    path.write_text(f'{{"attngen_tiles": {FORMAT}, "tiles": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
