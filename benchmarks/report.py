"""Results as JSON and as a Markdown table."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from attngen.store import device_of


@dataclass(frozen=True)
class Line:
    """One figure: what was measured, against what it stands, and the measurements behind it."""

    name: str
    figure: float
    unit: str
    target: float
    higher_is_better: bool = True
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the figure reaches its target."""
        return self.figure >= self.target if self.higher_is_better else self.figure <= self.target

    def __str__(self) -> str:
        sign = ">=" if self.higher_is_better else "<="
        return f"{self.name}: {self.figure:.3g} {self.unit} (target {sign} {self.target:g}, {'met' if self.met else 'NOT met'})"


def markdown(lines: Iterable[Line]) -> str:
    """A table with a row for each line."""
    rows = ["| figure | result | target | met | measured |", "|---|---|---|---|---|"]
    for line in lines:
        sign = ">=" if line.higher_is_better else "<="
        detail = ", ".join(f"{name} {_short(value)}" for name, value in line.measured.items())
        rows.append(
            f"| {line.name} | {line.figure:.3g} {line.unit} | {sign} {line.target:g} | {'yes' if line.met else 'no'} | {detail} |"
        )
    return "\n".join(rows) + "\n"


def to_json(lines: Iterable[Line]) -> str:
    """The lines and what machine they are from."""
    return json.dumps({"machine": machine(), "lines": [{**asdict(line), "met": line.met} for line in lines]}, indent=1)


def save(lines: list[Line], json_path: str | None, markdown_path: str | None) -> None:
    """Write the asked files."""
    if json_path:
        Path(json_path).write_text(to_json(lines) + "\n", encoding="utf-8")
    if markdown_path:
        Path(markdown_path).write_text(markdown(lines), encoding="utf-8")


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "processor": device_of("cpu").name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "load before": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def setting(device: torch.device) -> dict[str, Any]:
    """What measurements on this device depend on, and what two runs must share for their results to stand in one table."""
    from attngen.schedule.choice import generator_hash
    from attngen.store import device_of

    cuda = device.type == "cuda"
    found = device_of(device)
    return {
        "device": found.name,
        "units": found.units,
        "memory GiB": found.memory or None,
        "driver": found.driver,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "attngen": _version("attngen"),
        "generator": generator_hash("triton" if cuda else "cpu"),
        "flashinfer": _version("flashinfer-python"),
        "cudnn frontend": _version("nvidia-cudnn-frontend"),
        "commit": commit(),
    }


def commit() -> str | None:
    """The git commit of the code, with "+changes" if the files differ from it; None outside a repository."""
    root = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", *words]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "../attngen", "../templates", ".", ":(exclude)results")
        return git("rev-parse", "HEAD")[:12] + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        if package == "attngen":
            import attngen

            return attngen.__version__
        return None


def _short(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{1e3 * value['median']:.1f} ms ({1e3 * value['p20']:.1f} .. {1e3 * value['p80']:.1f})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
