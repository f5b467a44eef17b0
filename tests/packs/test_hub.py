"""Repositories for Hugging Face's kernels: they load with torch alone, and their kernels launch."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

import attngen as ag
from attngen.errors import PackError
from attngen.packs import hub
from attngen.store import Shape
from attngen.store.workload import Workload
from tests.packs.stub import Stub, lines_of

CALL = """
import importlib.util
import sys

for name in ("attngen", "triton", "sympy", "jinja2", "optuna", "networkx"):
    sys.modules[name] = None

path = sys.argv[1]
spec = importlib.util.spec_from_file_location("under_any_name", path + "/__init__.py", submodule_search_locations=[path])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)

import torch
from under_any_name._attngen.packs import driver

assert module.__all__ == ["causal"]
q, k, v = (torch.randn(1, 2, 100, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
try:
    module.causal(q, k, v)
except Exception as error:
    assert type(error).__name__ == "PackError" and "runs no kernels" in str(error), error
memory, load = torch.empty(2**20, dtype=torch.uint8), driver.Launch.__init__  # for kernels with descriptors
driver.Launch.__init__ = lambda self, function, device: load(self, function, device, lambda size: memory[:size])
driver.launches_on, driver.index_of, driver.current_stream = lambda device: True, lambda device: 0, lambda index: 7
module.causal(q, k, v).sum().backward()
assert not any(name.split(".")[0] in ("attngen", "sympy", "triton") and there for name, there in sys.modules.items())
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    call = Workload("causal", ag.Spec(mask=ag.causal()), Shape.of("B1 H2 N128 D64"), "bfloat16")
    return hub.save_repository([call], tmp_path_factory.mktemp("hub") / "some-attention", targets=["sm_90"])


def test_it_loads_with_torch_alone_and_launches(repository: Path, stub: Stub, tmp_path: Path) -> None:
    script, log = tmp_path / "call.py", tmp_path / "log"
    script.write_text(CALL)
    stub.run(script, repository / hub.VARIANT, environment=stub.environment(log))
    launched = lines_of(log)
    assert len(launched) == 7  # forward, dq and dkv with who looks after them, and delta
    metadata = json.loads((repository / hub.VARIANT / "metadata.json").read_text())
    assert metadata["name"] == "some-attention" and metadata["backend"]["archs"] == ["9.0"]


def test_what_is_copied_imports_itself_torch_and_the_standard_library(repository: Path) -> None:
    for path in (repository / hub.VARIANT).rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert all(name.split(".")[0] in {*sys.stdlib_module_names, "torch"} for name in names), (path, names)


def test_the_library_loads_it(repository: Path) -> None:
    kernels = pytest.importorskip("kernels")
    module = kernels.get_local_kernel(repository)
    assert module.__all__ == ["causal"]


def test_names_and_folders_that_do_not_do(tmp_path: Path) -> None:
    call = Workload("a name", ag.Spec(), Shape.of("B1 H1 N16 D16"), "float16", directions=("forward",))
    with pytest.raises(PackError, match="a name that Python takes"):
        hub.save_repository([call], tmp_path / "repository", targets=["sm_90"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(PackError, match="a folder that is empty"):
        hub.save_repository([call], tmp_path / "other", targets=["sm_90"])
    with pytest.raises(PackError, match="small letters"):
        hub.save_repository([call], tmp_path / "Other", targets=["sm_90"])
