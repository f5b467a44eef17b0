"""Source: the generated file of one kernel, and everything a launch needs to know about it.

`render` fills an outline of `templates/` with statements; what the kernel takes stands in `signature`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2

from attngen.lowering.signature import Arg
from attngen.plan.grid import Grid
from attngen.store import cache_folder


@dataclass(frozen=True)
class Source:
    """A generated file: its text, the kernel's name in it, the arguments in order and the grid."""

    name: str
    text: str
    args: tuple[Arg, ...]
    grid: Grid
    num_warps: int
    num_stages: int

    @property
    def key(self) -> str:
        """sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def makes_descriptors(self) -> bool:
        """Whether the kernel makes tensor descriptors, which need memory at the launch."""
        return "make_tensor_descriptor" in self.text

    def write(self, folder: Path | str | None = None) -> Path:
        """The file, named by its content; written atomically if it is not there yet."""
        folder = Path(folder) if folder is not None else cache_folder() / "source"
        path = folder / f"{self.name}_{self.key[:16]}.py"
        if not path.exists() or path.read_text(encoding="utf-8") != self.text:
            folder.mkdir(parents=True, exist_ok=True)
            handle, staged = tempfile.mkstemp(dir=folder, prefix=path.stem, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.text)
            os.replace(staged, path)
        return path

    def load(self, folder: Path | str | None = None) -> Any:
        """The kernel: a triton.jit function, or its interpreted form when TRITON_INTERPRET is set."""
        place = folder, os.environ.get("TRITON_INTERPRET", "0")
        if place not in self._loaded:  # a launch must not read the file again
            self._loaded[place] = getattr(_module(str(self.write(folder)), place[1]), self.name)
        return self._loaded[place]

    @cached_property
    def _loaded(self) -> dict[tuple[Path | str | None, str], Any]:
        return {}


@cache
def _module(path: str, interpret: str) -> ModuleType:
    name = f"attngen_source_{Path(path).stem}_{interpret}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # triton looks its functions up by module
    spec.loader.exec_module(module)
    return module


@cache
def environment() -> jinja2.Environment:
    """The templates. What is not defined is an error, not empty text."""
    folder = Path(__file__).resolve().parent.parent / "templates"
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )


def tidy(text: str) -> str:
    """Blank lines as a formatter leaves them: two in front of a function, else at most one, none after a colon."""
    lines: list[str] = []
    blank = False
    for line in (line.rstrip() for line in text.strip().splitlines()):
        if line and blank and not (lines and lines[-1].endswith(":")):
            lines += ["", ""] if line.startswith("@") else [""]
        if line:
            lines.append(line)
        blank = not line
    return "\n".join(lines) + "\n"
