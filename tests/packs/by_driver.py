"""Launch kernels of a pack: `python by_driver.py PACKAGES PACK JOBS`.

PACKAGES holds a package `copied` of attngen/errors.py and attngen/packs alone, as a repository of kernels has them. What a compiler needs
cannot be imported here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

for name in ("attngen", "triton", "sympy", "jinja2", "optuna", "networkx", "numpy"):
    sys.modules[name] = None  # type: ignore[assignment]
packages, pack_folder, jobs_file = sys.argv[1:]
sys.path.insert(0, packages)

from copied.packs.driver import Function, Launch  # noqa: E402
from copied.packs.format import read  # noqa: E402

SCRATCH = 0x7F00_0000_0000

pack = read(pack_folder)
asked = []


def allocate(size: int) -> SimpleNamespace:
    asked.append(size)
    return SimpleNamespace(data_ptr=lambda: SCRATCH)


for job in json.loads(Path(jobs_file).read_text()):
    kernel = pack.kernels[job["name"]]
    launch = Launch(Function(kernel, pack.cubin(job["name"]), kernel.file), 0, allocate)
    launch(job["programs"], job["stream"], job["values"])
print(json.dumps(asked))
