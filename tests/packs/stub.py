"""A CUDA driver of the tests' own, `stub_driver.c`, and processes that run on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TREE = HERE.parent.parent


@dataclass(frozen=True)
class Stub:
    """The folder of the built libcuda.so.1."""

    folder: Path

    @classmethod
    def build(cls, folder: Path) -> Stub:
        if shutil.which("gcc") is None:
            pytest.skip("needs gcc, which builds the CUDA driver of these tests")
        library = folder / "libcuda.so.1"
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run(["gcc", *flags, "-o", library, HERE / "stub_driver.c", "-lpthread"], check=True)
        return cls(folder)

    def environment(self, log: Path | None = None, **settings: object) -> dict[str, str]:
        """Of a process that finds this driver. settings: `capability=80` for STUB_CUDA_CAPABILITY and so on."""
        return {
            **os.environ,
            "LD_LIBRARY_PATH": str(self.folder),
            "TRITON_LIBCUDA_PATH": str(self.folder),
            "PYTHONPATH": f"{TREE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            **({} if log is None else {"STUB_CUDA_LOG": str(log)}),
            **{f"STUB_CUDA_{name.upper()}": str(value) for name, value in settings.items()},
        }

    def run(self, *arguments: object, environment: Mapping[str, str]) -> str:
        """What a Python process prints. It must end well."""
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def lines_of(log: Path, call: str = "cuLaunchKernelEx") -> list[str]:
    """The logged calls of one function."""
    return [line for line in log.read_text().splitlines() if line.startswith(f"{call} ")]
