"""What attngen needs of libraries whose interfaces are not promised to stay."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping

from attngen.errors import InputError

TESTED = {"vllm": "0.33.0", "sglang": "0.5.23"}  # the versions that attngen was tested with


def require_names(library: str, names: Mapping[str, tuple[str, ...]]) -> None:
    """That a library has these names, by module. Raises InputError that names the first one missing, and the version to install."""
    tested = TESTED[library]
    fix = f'pip install "{library}=={tested}", or a later attngen'
    for module, wanted in names.items():
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise InputError(
                library, f"version {tested}, with a module {module}", f"{_version(library)}: {error}", fix
            ) from error
        for name in wanted:
            if not hasattr(found, name):
                got = f"{_version(library)}, whose {module} has no {name}"
                raise InputError(library, f"version {tested}, with {module}.{name}", got, fix)


def _version(library: str) -> str:
    try:
        return f"version {importlib.metadata.version(library)}"
    except importlib.metadata.PackageNotFoundError:
        return "none installed"
