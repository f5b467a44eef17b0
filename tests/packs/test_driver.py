"""Launches through the driver: the same bytes as Triton's own launcher, on a driver that logs them."""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton import knobs

import attngen as ag
from attngen.errors import PackError
from attngen.lowering import Source
from attngen.packs import driver
from attngen.packs.elf import read_cubin
from attngen.packs.format import write
from attngen.packs.record import Argument, Kernel
from tests.packs import by_triton
from tests.packs.cases import causal_kernels, causal_pack
from tests.packs.stub import HERE, TREE, Stub, lines_of

CLUSTER = """
import triton
import triton.language as tl


@triton.jit
def scaled(x, y, n, total, scale):
    i = tl.program_id(0) * 256 + tl.arange(0, 256)
    tl.store(y + i, tl.load(x + i, i < n) * scale, i < total)
"""


def job_of(source: Source, name: str) -> dict[str, Any]:
    """A job for `by_triton`, with values that differ from each other."""
    signature = {arg.name: arg.triton_type(torch.bfloat16, {}) for arg in source.args}
    return {
        "name": name,
        "file": str(source.write()),
        "symbol": source.name,
        "signature": signature,
        "divisible": [place for place, arg in enumerate(source.args) if arg.divisible],
        "options": {"num_warps": source.num_warps, "num_stages": source.num_stages, "enable_fp_fusion": True},
        "arch": 90,
        "programs": 37,
        "stream": 0x5EED0,
        "values": values_of(list(signature.values())),
    }


def values_of(kinds: list[str]) -> list[int | float]:
    made = {"i32": -7, "i64": 2**40 + 3, "fp32": 0.1}
    return [made[kind] + place if kind in made else 2**45 + 256 * place for place, kind in enumerate(kinds)]


def cluster_job(folder: Path) -> dict[str, Any]:
    """A kernel of two blocks a cluster, with an int64 argument."""
    (folder / "scaled.py").write_text(CLUSTER)
    signature = {"x": "*fp32", "y": "*fp32", "n": "i32", "total": "i64", "scale": "fp32"}
    return {
        "name": "scaled",
        "file": str(folder / "scaled.py"),
        "symbol": "scaled",
        "signature": signature,
        "divisible": [],
        "options": {"num_warps": 4, "num_ctas": 2, "enable_fp_fusion": True},
        "arch": 90,
        "programs": 5,
        "stream": 0,
        "values": values_of(list(signature.values())),
    }


def record_of_job(job: dict[str, Any]) -> tuple[Kernel, bytes]:
    """What a pack says of a kernel that Triton compiled."""
    made = by_triton.compiled(job)
    cubin, metadata = made.asm["cubin"], made.metadata
    found, digest = read_cubin(cubin, job["name"]), hashlib.sha256(cubin).hexdigest()
    kernel = Kernel(
        symbol=job["symbol"],
        file=f"kernels/{job['name']}-{digest[:16]}.cubin",
        sha256=digest,
        size=len(cubin),
        target=f"sm_{job['arch']}",
        arguments=tuple(Argument(name, kind, "any", name) for name, kind in job["signature"].items()),
        grid={},
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        shared=metadata.shared,
        toolkit=found.kernels[job["symbol"]].toolkit,
        abi=found.abi,
        num_ctas=metadata.num_ctas,
        scratch=metadata.global_scratch_size,
        scratch_alignment=metadata.global_scratch_align,
    )
    return kernel, cubin


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with a package of what a pack needs, and nothing else of attngen."""
    package = tmp_path / "packages" / "copied"
    shutil.copytree(TREE / "attngen" / "packs", package / "packs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TREE / "attngen" / "errors.py", package)
    (package / "__init__.py").touch()
    return package.parent


@pytest.mark.slow
def test_launches_are_those_of_triton(stub: Stub, copied: Path, tmp_path: Path):
    descriptors = ag.Schedule(tma=True)
    with_scratch = ag.cross_compile(ag.Spec(mask=ag.causal()), "sm_90", schedule=descriptors, passes=("forward",))
    more_warps = descriptors.over(ag.Schedule(warp_specialize=True, num_warps=4))  # 12 in the end
    specialised = ag.cross_compile(ag.Spec(), "sm_90", schedule=more_warps, passes=("forward",))
    jobs = [job_of(kernel.source, name) for name, kernel in causal_kernels().items()]
    jobs += [job_of(with_scratch[0].source, "descriptors"), job_of(specialised[0].source, "specialised")]
    jobs += [cluster_job(tmp_path)]
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        made = {job["name"]: record_of_job(job) for job in jobs}
    kernels = {name: kernel for name, (kernel, _) in made.items()}
    write(tmp_path / "pack", {}, kernels, {kernel.file: cubin for kernel, cubin in made.values()}, attngen="0.1.0")
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))

    ours, theirs = tmp_path / "ours.log", tmp_path / "theirs.log"
    asked = stub.run(
        HERE / "by_driver.py", copied, tmp_path / "pack", tmp_path / "jobs.json", environment=stub.environment(ours)
    )
    environment = stub.environment(theirs) | {"TRITON_DISABLE_LINE_INFO": "1"}
    asked_by_triton = stub.run(HERE / "by_triton.py", tmp_path / "jobs.json", environment=environment)
    assert lines_of(ours) == lines_of(theirs)
    assert [line.split()[1] for line in lines_of(ours)] == [f"kernel={job['symbol']}" for job in jobs]
    # Room for the alignment, which Triton leaves to the allocator.
    assert json.loads(asked) == [size + alignment - 1 for size, alignment in json.loads(asked_by_triton)] != []
    specialised_line, cluster = lines_of(ours)[-2:]
    assert "block=384,1,1" in specialised_line
    assert "grid=10,1,1 block=128,1,1" in cluster and "attributes=4:2,1,1;5:1" in cluster


@pytest.fixture
def log(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process launches on the stub of two devices, whose log this is."""
    monkeypatch.setattr(driver, "LIBRARY", str(stub.folder / "libcuda.so.1"))
    monkeypatch.setenv("STUB_CUDA_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("STUB_CUDA_DEVICES", "2")
    forget()
    yield tmp_path / "log"
    forget()


def forget() -> None:
    """As if no driver had been loaded."""
    for cached in (driver._library, driver._current_getter, driver.primary_context):
        cached.cache_clear()


def function_of(name: str, **changes: Any) -> driver.Function:
    kernels, files = causal_pack()
    kernel = kernels[name]
    return driver.Function(replace(kernel, **changes), files[kernel.file], kernel.file)


def values_for(kernel: Kernel) -> list[int | float]:
    return values_of([argument.kind for argument in kernel.arguments])


def in_new_thread(work: Callable[[], Any]) -> Any:
    """A thread of its own has no context, nor leaves one behind."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def current_context() -> int | None:
    context = ctypes.c_void_p()
    driver._current_getter()(context)
    return context.value


def test_a_launch_in_bytes(log: Path):
    function = function_of("delta")
    launch = driver.Launch(function, 0)
    launch(37, 0x5EED, values_for(function.kernel))
    launch(0, 0x5EED, values_for(function.kernel))
    pointers = [struct.pack("<Q", 2**45 + 256 * place).hex() for place in range(4)]
    strides = [struct.pack("<i", place - 7).hex() for place in range(4, 12)]
    shown = ",".join([*pointers, *strides, "00" * 8, "00" * 8])
    head = "cuLaunchKernelEx kernel=delta device=0 grid=37,1,1 block=256,1,1 shared=512 stream=0x5eed attributes="
    assert lines_of(log) == [f"{head} parameters={shown}"]


def test_a_kernel_is_loaded_once_on_each_device(log: Path):
    function = function_of("forward")
    for device in (0, 1, 0, 1):
        driver.Launch(function, device)(1, 0, values_for(function.kernel))
    assert lines_of(log, "cuModuleLoadData") == ["cuModuleLoadData device=0", "cuModuleLoadData device=1"]
    shared = f"cuFuncSetAttribute kernel=forward attribute=8 value={function.kernel.shared}"
    assert function.kernel.shared > driver.STATIC_SHARED and lines_of(log, "cuFuncSetAttribute") == [shared] * 2
    assert [line.split()[2] for line in lines_of(log)] == ["device=0", "device=1"] * 2
    # Loading is allowed while a graph is captured, and what was allowed before holds afterwards.
    assert lines_of(log, "cuThreadExchangeStreamCaptureMode")[:2] == [
        "cuThreadExchangeStreamCaptureMode mode=2",
        "cuThreadExchangeStreamCaptureMode mode=0",
    ]


def test_a_launch_makes_no_call_that_waits(log: Path):
    launch = driver.Launch(function_of("dq"), 0)
    log.unlink()
    for _ in range(3):
        launch(1, 0, values_for(launch.function.kernel))
    assert log.read_text().count("\n") == 3 == len(lines_of(log))


def test_the_threads_context_is_what_it_was(log: Path):
    launches = [driver.Launch(function_of("delta"), device) for device in (0, 1)]
    values = values_for(launches[0].function.kernel)

    def without_context() -> None:
        assert current_context() is None
        launches[1](1, 0, values)
        assert current_context() is None

    def with_another() -> None:
        with driver._current(driver.primary_context(0)):
            for launch in launches:
                launch(1, 0, values)
                assert current_context() == driver.primary_context(0)

    in_new_thread(without_context)
    in_new_thread(with_another)
    assert [line.split()[2] for line in lines_of(log)] == ["device=1", "device=0", "device=1"]


def test_threads_do_not_write_into_each_others_launch(log: Path):
    launch = driver.Launch(function_of("delta"), 0)
    kinds = [argument.kind for argument in launch.function.kernel.arguments]

    def work(thread: int) -> None:
        for step in range(100):
            launch(1 + thread, thread, [1000 * thread + step] * len(kinds))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    seen = set()
    for line in lines_of(log):
        grid, shown = line.split("grid=")[1].split(",")[0], line.split("parameters=")[1].split(",")[:-2]
        numbers = {int.from_bytes(bytes.fromhex(value), "little") for value in shown}
        assert len(numbers) == 1
        seen.add((int(grid) - 1, numbers.pop()))
    assert seen == {(thread, 1000 * thread + step) for thread in range(8) for step in range(100)}


def test_scratch_memory_is_aligned_and_enough(log: Path):
    function = function_of("delta", scratch=256, scratch_alignment=128, profile_scratch=3, num_ctas=2)
    given: list[torch.Tensor] = []

    def allocate(size: int) -> torch.Tensor:
        given.append(torch.empty(size, dtype=torch.uint8))
        return given[-1]

    driver.Launch(function, 0, allocate)(5, 0, values_for(function.kernel))
    pointers = [int.from_bytes(bytes.fromhex(x), "little") for x in lines_of(log)[0].split(",")[-2:]]
    for pointer, memory, size, alignment in zip(pointers, given, (256, 3), (128, 1), strict=True):
        assert pointer % alignment == 0 and memory.data_ptr() <= pointer
        assert pointer + 5 * 2 * size <= memory.data_ptr() + len(memory)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"FAIL": "cuModuleLoadData=209", "VERSION": "12000"},
            "NO_BINARY_FOR_GPU.*ELF ABI.*driver here knows CUDA 12.0: install",
        ),
        ({"FAIL": "cuModuleLoadData=200", "VERSION": "14000"}, "INVALID_IMAGE.*ELF ABI.*for CUDA 14.0, should take"),
        (
            {"FAIL": "cuModuleLoadData=222", "VERSION": "12000"},
            "UNSUPPORTED_PTX_VERSION.*install a driver for CUDA 1[23]",
        ),
        ({"FAIL": "cuModuleLoadData=999"}, "loading it: CUDA error 999"),
        ({"CAPABILITY": "80"}, "expected a device that runs sm_90, got cuda:0 of sm_80"),
        ({"CAPABILITY": "100"}, "expected a device that runs sm_90, got cuda:0 of sm_100"),
        ({"DEVICES": "0"}, "finding cuda:0"),
        ({"FAIL": "cuInit=100"}, "the driver does not start, error 100"),
        (
            {"FAIL": "cuLaunchKernelEx=719"},
            "launching 3 programs on cuda:0: CUDA_ERROR_LAUNCH_FAILED: words of the stub",
        ),
    ],
)
def test_what_the_driver_refuses_has_words(
    log: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], says: str
):
    for name, value in settings.items():
        monkeypatch.setenv(f"STUB_CUDA_{name}", value)
    function = function_of("delta")
    with pytest.raises(PackError, match=says) as refusal:
        driver.Launch(function, 0)(3, 0, values_for(function.kernel))
    if "DEVICES" not in settings and "cuInit=100" not in settings.values():
        assert f"{function.kernel.file}: kernel delta" in str(refusal.value)


def test_other_refusals_have_words(log: Path):
    with pytest.raises(PackError, match=r"needs 300000 bytes of shared memory, cuda:0 has at most 232448"):
        driver.Launch(function_of("delta", shared=300_000), 0)
    with pytest.raises(PackError, match="kernel other: finding it in its cubin: CUDA_ERROR_NOT_FOUND"):
        driver.Launch(function_of("delta", symbol="other"), 0)
    launch = driver.Launch(function_of("delta"), 0)
    values = values_for(launch.function.kernel)
    for changed, says in [
        (values[:-1], "expected 12 values, got 11"),
        ([*values[:5], 2**31, *values[6:]], f"{launch.function.kernel.arguments[5].name}: expected i32, got {2**31}"),
        ([None, *values[1:]], r"out: expected \*bf16, got None"),
    ]:
        with pytest.raises(PackError, match=says):
            launch(1, 0, changed)
    with pytest.raises(PackError, match="expected a number of programs and a stream, got -1"):
        launch(-1, 0, values)
    assert not log.exists() or not lines_of(log)
    launch(1, 0, values)
    assert len(lines_of(log)) == 1


def test_a_machine_without_a_driver(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver, "LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(PackError, match="expected NVIDIA's driver, got none"):
        driver.Launch(function_of("delta"), 0)
    (tmp_path / "old.c").write_text("int cuInit(unsigned flags) { return flags; }")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "old.so", tmp_path / "old.c"], check=True)
    monkeypatch.setattr(driver, "LIBRARY", str(tmp_path / "old.so"))
    with pytest.raises(PackError, match="expected a driver for CUDA 12 or later"):
        driver.Launch(function_of("delta"), 0)


def test_which_device_runs_which_target():
    assert driver.runs_on("sm_80", (8, 0)) and driver.runs_on("sm_80", (8, 9)) and driver.runs_on("sm_86", (8, 9))
    assert (
        not driver.runs_on("sm_86", (8, 0))
        and not driver.runs_on("sm_80", (9, 0))
        and not driver.runs_on("sm_89", (8, 6))
    )
    assert driver.runs_on("sm_90", (9, 0)) and driver.runs_on("sm_100", (10, 0)) and driver.runs_on("sm_120", (12, 0))
    assert (
        not driver.runs_on("sm_100", (10, 3))
        and not driver.runs_on("sm_90", (10, 0))
        and not driver.runs_on("sm_120", (12, 1))
    )
