"""Specs named on a command line: text, `file.py:name`, or a TOML file."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from attngen.errors import SpecError
from attngen.language.spec import Spec


def read_spec(source: str) -> Spec:
    """The spec that `source` names. A Python file is imported, so it runs; text and TOML never do. Raises SpecError."""
    if source.endswith(".toml"):
        return Spec.from_toml(source)
    match = re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)", source)
    if match is None:
        if source.endswith(".py"):
            raise SpecError(f"{source}: which spec?", fix=f"write {source}:NAME, where NAME = ag.Spec(...)")
        return Spec.from_text(source)
    path, name = Path(match[1]), match[2]
    if not path.is_file():
        raise SpecError(f"{path}: no such file")
    module_spec = importlib.util.spec_from_file_location(f"attngen_specs_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    value = getattr(module, name, None)
    value = value() if callable(value) and not isinstance(value, Spec) else value
    if not isinstance(value, Spec):
        raise SpecError(
            f"{path}: {name!r} is not an ag.Spec", fix="give the name of a Spec, or of a function that returns one"
        )
    return value
