from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Two test processes share the cores: threads that spin at barriers would keep each other from working.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A pretended GPU's first calls compile nothing: what searches tiles says so.
os.environ.setdefault("ATTNGEN_SEARCH_SECONDS", "0")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "attngen",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("attngen")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files of generated source")
    parser.addoption("--gpu-part", metavar="K/N", help="of the GPU tests only the K-th of N parts (with -m gpu)")
    parser.addoption(
        "--gpu-passed",
        type=Path,
        metavar="FILE",
        help="note there what passed, and leave out what is noted: go on after a kill",
    )
    parser.addoption(
        "--rehearse-gpu",
        action="store_true",
        help="without a GPU: run the GPU tests in the interpreter, at small sizes",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.gpu_passed and not hasattr(
        config, "workerinput"
    ):  # one process reads and notes for all of xdist's
        config.pluginmanager.register(Passed(config.option.gpu_passed), PASSED)


NO_GPU = "torch.cuda.is_available() is False"
PASSED = "gpu-passed"


def _lacks_gpu(config: pytest.Config) -> bool:
    return not torch.cuda.is_available() and not config.option.rehearse_gpu


class Passed:
    """A file of the tests that passed, or skipped themselves: a line each as they end, behind the hash of the kernels' generator.
    Those of other kernels count for nothing.
    """

    def __init__(self, path: Path):
        from attngen.schedule.choice import generator_hash

        self.path, self.kernels = path, generator_hash("triton" if torch.cuda.is_available() else "interpret")
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        noted = [line.partition(" ") for line in lines]
        self.known = {name for kernels, _, name in noted if kernels == self.kernels}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """xdist: a worker in place of one that crashed has to collect what the others did, though the file has grown."""
        node.workerinput[PASSED] = sorted(self.known)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or (report.when == "call" and report.passed):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{self.kernels} {report.nodeid}\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.known:
            session.exitstatus = pytest.ExitCode.OK


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _keep_part(config, items)
    if config.option.gpu_passed:
        if _lacks_gpu(config):  # skips would count as done
            raise pytest.UsageError(f"--gpu-passed: {NO_GPU}; --rehearse-gpu runs without one")
        known = _passed(config)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
        items[:] = [item for item in items if item.nodeid not in known]
    if _lacks_gpu(config):
        skip = pytest.mark.skip(reason=f"needs a GPU: {NO_GPU}")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    chosen = config.option.markexpr
    for name, asked in (("slow", bool(chosen)), ("vllm", "vllm" in chosen)):
        left_out = pytest.mark.skip(reason=f"{name}: run with `pytest -m {name}`")
        for item in items:
            if name in item.keywords and not asked:
                item.add_marker(left_out)


def _passed(config: pytest.Config) -> set[str]:
    if hasattr(config, "workerinput"):
        return set(config.workerinput[PASSED])
    return config.pluginmanager.get_plugin(PASSED).known


def _keep_part(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deal the GPU tests out in turn, so that each part has some of every kind."""
    if not config.option.gpu_part:
        return
    part, _, parts = config.option.gpu_part.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise pytest.UsageError(f"--gpu-part: expected K/N with 1 <= K <= N, as in 2/4, got {config.option.gpu_part!r}")
    of_gpu = [item for item in items if "gpu" in item.keywords]
    left_out = {item for place, item in enumerate(of_gpu) if place % int(parts) != int(part) - 1}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's database, trials or generated files."""
    monkeypatch.delenv("ATTNGEN_DB", raising=False)
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "attngen"))
