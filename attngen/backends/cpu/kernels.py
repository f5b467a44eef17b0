"""The inner loops as TorchScript: a call holds no interpreter lock, so that a thread per core keeps every core busy."""

from __future__ import annotations

import threading
import warnings
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from attngen.backends.cpu.backward_kernels import differentiate, differentiate_stored
from attngen.backends.cpu.forward_kernels import attend, attend_storing, measure
from attngen.errors import AttngenWarning

_scripting = threading.Lock()


def kernels() -> SimpleNamespace:
    """The functions for units, scripted where torch can."""
    with _scripting:  # of the threads that come here first, Python can parse for one only
        return _kernels()


@cache
def _kernels() -> SimpleNamespace:
    functions: dict[str, Any] = {
        f.__name__: f for f in (attend, measure, attend_storing, differentiate, differentiate_stored)
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is in maintenance
            return SimpleNamespace(**{name: torch.jit.script(function) for name, function in functions.items()})
    except (AttributeError, RuntimeError, OSError) as error:
        warnings.warn(
            f"torch can't script the CPU backend's inner loops here ({str(error).splitlines()[0]}): they run as plain "
            "Python, about 20% slower",
            AttngenWarning,
            stacklevel=2,
        )
        return SimpleNamespace(**functions)
