"""A pack as a repository for Hugging Face's `kernels`: the pack, and beside it the part of attngen that loads it.

The copied modules import each other relatively, and nothing but torch and the standard library besides. Their operators have a
namespace of their own, so that several repositories, and attngen itself, live in one process.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attngen
from attngen.errors import PackError
from attngen.language import keyset
from attngen.packs import format
from attngen.packs.build import save_workloads
from attngen.plan import planner
from attngen.store.workload import Workload

VARIANT = Path("build", "torch-universal")
COPY, PACK = "_attngen", "pack"
LICENSE = "Apache-2.0"
ROOT = Path(attngen.__file__).parent
STARTS = (
    "attngen.packs.load",
    *(f"attngen.plan.keysets.{name}" for name in planner.MODULES),
    *(f"attngen.language.keysets.{name}" for name in keyset.MODULES),
)
# What names the package otherwise than by an import, by module.
OPERATORS = "attngen.runtime.operators"


def save_repository(
    calls: Iterable[Workload], folder: Path | str, *, name: str = "", version: int = 1, **how: Any
) -> Path:
    """Build a repository that `kernels.get_local_kernel(folder)` loads, and `kernels.get_kernel` once it is on the Hub.

    calls, how: as for `attngen.packs.build.save_workloads`. name: of the repository,
    by default the folder's. version: a whole number, which the Hub counts. The module has each attention under its
    spec's name. Returns the folder. Raises as `ag.save`.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    if not re.fullmatch(r"[a-z][a-z0-9-]{1,63}", name):
        raise PackError(f"name: expected small letters, digits and hyphens, got {name!r}; pass name=")
    if folder.exists() and any(folder.iterdir()) and not (folder / VARIANT / PACK / format.MANIFEST).exists():
        raise PackError(f"{folder}: expected a folder that is empty or a repository of attngen's; choose another")
    variant = folder / VARIANT
    pack = format.read(save_workloads(calls, variant / PACK, **how))
    names = list(pack.manifest["specs"])
    for own in names:
        if not own.isidentifier() or keyword.iskeyword(own) or own.startswith("_"):
            raise PackError(f"{own!r}: expected a name that Python takes, for the module of a repository")
    namespace = f"attngen_{pack.digest[:16]}"
    for module, path in sorted(_needed()):
        target = variant / COPY / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_copied(module, path, namespace), encoding="utf-8")
    (variant / "__init__.py").write_text(_module(name, names), encoding="utf-8")
    metadata = {
        "name": name,
        "id": f"_{name.replace('-', '_')}_{pack.digest[:16]}",
        "version": version,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": "cuda", "archs": sorted({_arch(kernel.target) for kernel in pack.kernels.values()})},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _arch(target: str) -> str:
    """As `kernels` writes it: 9.0."""
    major, minor = divmod(int(target.removeprefix("sm_")), 10)
    return f"{major}.{minor}"


def _module(name: str, names: list[str]) -> str:
    lines = "\n".join(f'{own} = _pack["{own}"]' for own in names)
    return f'''"""{name}: attention kernels made by attngen."""

from pathlib import Path

from .{COPY}.packs.load import load as _load

# Caches of downloads hold links; all files are checked against the manifest, whatever they are.
_pack = _load(Path(__file__).parent / "{PACK}", links=True)
{lines}

__all__ = {names!r}
'''


def _needed() -> set[tuple[str, Path]]:
    """The modules that loading imports, with their files: imports inside functions are for who builds."""
    found: dict[str, Path] = {}
    open_ = list(STARTS)
    while open_:
        module = open_.pop()
        path = _file(module)
        if path is None or module in found:
            continue
        found[module] = path
        open_ += module.rpartition(".")[:1]  # its package
        for imported, names in _imports(module, ast.parse(path.read_text(encoding="utf-8"))):
            open_ += [imported, *(f"{imported}.{name}" for name in names)]
    found["attngen"] = ROOT / "__init__.py"
    return set(found.items())


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split(".")[1:])
    for found in (path / "__init__.py", path.with_suffix(".py")):
        if found.exists():
            return found
    return None


def _imports(module: str, tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """(module, names) of what of attngen is imported at the top."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                name = ".".join([*module.split(".")[: -node.level], *([name] if name else [])])
            if name.split(".")[0] == "attngen":
                yield name, [alias.name for alias in node.names]


def _copied(module: str, path: Path, namespace: str) -> str:
    """A module's text with relative imports."""
    if module == "attngen":
        return '"""The part of attngen that loads a pack."""\n'
    depth = len(module.split(".")) - (path.name != "__init__.py")
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^(\s*)from attngen\.", rf"\1from {'.' * depth}", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*)from attngen import", rf"\1from {'.' * depth} import", text, flags=re.MULTILINE)
    if module == OPERATORS:
        for before, after in (
            ('Library("attngen"', f'Library("{namespace}"'),
            ('"attngen::', f'"{namespace}::'),
            ("torch.ops.attngen.", f"torch.ops.{namespace}."),
        ):
            if before not in text:
                raise PackError(f"{module}: expected {before!r}, which a copy has to change")
            text = text.replace(before, after)
    return text
