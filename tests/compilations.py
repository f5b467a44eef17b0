"""What launches of kernels would compile, counted without compiling anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from attngen.lowering import Source


def counted(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Distinct compilations that launches would have needed; the kernels themselves do not run."""
    keys: set[Any] = set()

    class Kernel:
        def __init__(self, source: Source):
            self.source = source

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*values: Any, **options: Any) -> None:
                keys.add(compilation(self.source, values, options))

            return run

    monkeypatch.setattr(Source, "load", lambda self, folder=None: Kernel(self))
    return keys


def compilation(source: Source, values: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """What Triton keys a compiled kernel by."""
    described = [_seen_by_triton(arg, value) for arg, value in zip(source.args, values, strict=True)]
    return source.key, tuple(described), tuple(options.items())


def _seen_by_triton(arg: Any, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.data_ptr() % 16 == 0) if arg.specialize else value.dtype
    kind = "i64" if isinstance(value, int) and abs(value) >= 2**31 else type(value).__name__
    return (kind, value == 1, value % 16 == 0) if arg.specialize else kind
