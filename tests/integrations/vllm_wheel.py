"""vLLM's wheel without what it was compiled to: its Python files, and as much of its requirements as its attention classes import."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from attngen.integrations.interface import TESTED

FOLDER = "ATTNGEN_VLLM_DIR"  # environment variable: where the wheel is kept between runs, 336 MB and 200 MB unpacked
NEEDED = (
    *("aiohttp", "cachetools", "cbor2", "cloudpickle", "fastapi", "msgspec", "openai", "opentelemetry-exporter-otlp"),
    *(
        "opentelemetry-sdk",
        "oss-harmony",
        "partial-json-parser",
        "prometheus-client",
        "py-cpuinfo",
        "pybase64",
        "pyzmq",
    ),
    *("requests", "urllib3", "uvloop"),
)
ALONE = ("apache-tvm-ffi", "einops", "llguidance", "xgrammar")  # not what they need, which is torch and is here


def wheel_paths() -> list[str]:
    """What to add to sys.path. The first call fetches it, with pip."""
    folder = Path(os.environ.get(FOLDER) or Path(tempfile.gettempdir()) / "attngen-vllm") / TESTED["vllm"]
    source, requirements, done = folder / "source", folder / "requirements", folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _pip("download", f"vllm=={TESTED['vllm']}", "--no-deps", "--dest", str(folder))
        _pip("install", "--target", str(requirements), "--upgrade", *NEEDED)
        _pip("install", "--target", str(requirements), "--no-deps", *ALONE)
        _unpack(next(folder.glob("vllm-*.whl")), source)
        done.touch()
    return [str(source), str(requirements)]


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", arguments[0], "-q", *arguments[1:]], check=True)


def _unpack(wheel: Path, to: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith((".py", ".json")) or ".dist-info/" in n]
        archive.extractall(to, names)
