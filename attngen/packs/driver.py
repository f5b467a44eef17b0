"""Launching the kernels of a pack through the CUDA driver, by ctypes: no compiler, and nothing to build.

A `Function` is a kernel's cubin, loaded on each device at its first launch there. A `Launch` is a function made ready for one
device: a call packs values into a buffer and makes one call of the driver.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from ..errors import PackError
from .record import Kernel

LIBRARY = "libcuda.so.1"
STATIC_SHARED = 48 * 1024  # bytes of shared memory that a program may use without asking
MOST_PORTABLE_CTAS = 8

# Values of cuda.h.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _SHARED_LIMIT = 75, 76, 97  # CU_DEVICE_ATTRIBUTE_...
_MAX_DYNAMIC_SHARED, _NON_PORTABLE_CLUSTER = 8, 14  # CU_FUNC_ATTRIBUTE_...
_PREFER_SHARED = 1  # CU_FUNC_CACHE_PREFER_SHARED
_CAPTURE_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_CLUSTER_DIMENSION, _CLUSTER_POLICY, _SPREAD = 4, 5, 1  # CU_LAUNCH_ATTRIBUTE_...
# CUDA_ERROR_...: INVALID_IMAGE, NO_BINARY_FOR_GPU, INVALID_PTX, UNSUPPORTED_PTX_VERSION, INVALID_SOURCE.
_NO_IMAGE_FOR_DEVICE = {200, 209, 218, 222, 300}

_FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}
_POINTER, _INT, _POINTER_TO = ctypes.c_void_p, ctypes.c_int, ctypes.POINTER
_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [ctypes.c_uint],
    "cuDriverGetVersion": [_POINTER_TO(_INT)],
    "cuGetErrorName": [_INT, _POINTER_TO(ctypes.c_char_p)],
    "cuGetErrorString": [_INT, _POINTER_TO(ctypes.c_char_p)],
    "cuDeviceGet": [_POINTER_TO(_INT), _INT],
    "cuDeviceGetAttribute": [_POINTER_TO(_INT), _INT, _INT],
    "cuDevicePrimaryCtxRetain": [_POINTER_TO(_POINTER), _INT],
    "cuCtxPushCurrent_v2": [_POINTER],
    "cuCtxPopCurrent_v2": [_POINTER_TO(_POINTER)],
    "cuThreadExchangeStreamCaptureMode": [_POINTER_TO(_INT)],
    "cuModuleLoadData": [_POINTER_TO(_POINTER), ctypes.c_char_p],
    "cuModuleGetFunction": [_POINTER_TO(_POINTER), _POINTER, ctypes.c_char_p],
    "cuFuncSetAttribute": [_POINTER, _INT, _INT],
    "cuFuncSetCacheConfig": [_POINTER, _INT],
    "cuLaunchKernelEx": [_POINTER, _POINTER, _POINTER, _POINTER],
}


def current_stream(device: int) -> int:
    """Torch's current stream on a device, as the driver's handle."""
    return torch._C._cuda_getCurrentRawStream(device)


def launches_on(device: torch.device) -> bool:
    """Whether kernels run on such a device."""
    return device.type == "cuda"


def index_of(device: torch.device) -> int:
    """Its number for the driver."""
    return torch.cuda.current_device() if device.index is None else device.index


def capability(device: int) -> tuple[int, int]:
    """The compute capability of a device, as (9, 0). Raises PackError."""
    return _attribute(_CAPABILITY_MAJOR, device), _attribute(_CAPABILITY_MINOR, device)


def driver_version() -> str:
    """The newest CUDA that the driver of this machine knows, as "13.0". Raises PackError."""
    version = _INT()
    _check(_library().cuDriverGetVersion(version), "asking for the driver's version")
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Whether a cubin for a target runs on a device: from sm_90 on only on exactly it, before on later minor versions too."""
    major, minor = divmod(int(target.removeprefix("sm_")), 10)
    return capability == (major, minor) if major >= 9 else capability[0] == major and capability[1] >= minor


class Function:
    """A kernel on whatever devices launch it. What was loaded stays loaded.

    cubin: its content, checked by whoever read it. where: names the file in errors.
    """

    def __init__(self, kernel: Kernel, cubin: bytes, where: str):
        self.kernel, self.where = kernel, where
        self._cubin = cubin
        self._handles: dict[int, int] = {}
        self._loading = threading.Lock()

    def __str__(self) -> str:
        return f"{self.where}: kernel {self.kernel.symbol}"

    def handle(self, device: int) -> int:
        """The driver's handle of it on a device, loaded at the first call: also while a CUDA graph is captured. Raises PackError."""
        with self._loading:
            if device not in self._handles:
                self._check_device(device)
                with _current(primary_context(device)), _relaxed_capture():
                    self._handles[device] = self._load(device)
            return self._handles[device]

    def _check_device(self, device: int) -> None:
        kernel, here = self.kernel, capability(device)
        if not runs_on(kernel.target, here):
            raise PackError(
                f"{self}: expected a device that runs {kernel.target}, got cuda:{device} of sm_{here[0]}{here[1]}; build the pack "
                f"with that target"
            )
        limit = _attribute(_SHARED_LIMIT, device)
        if kernel.shared > limit:
            raise PackError(
                f"{self}: needs {kernel.shared} bytes of shared memory, cuda:{device} has at most {limit} for a program; build the "
                f"pack for sm_{here[0]}{here[1]}"
            )

    def _load(self, device: int) -> int:
        """Into the current context."""
        cuda, kernel = _library(), self.kernel
        module, function = _POINTER(), _POINTER()
        code = cuda.cuModuleLoadData(module, self._cubin)
        if code in _NO_IMAGE_FOR_DEVICE:
            raise PackError(f"{self}: {_said(code)} on cuda:{device}: {self._why_not_loaded()}")
        _check(code, f"{self}: loading it")
        _check(cuda.cuModuleGetFunction(function, module, kernel.symbol.encode()), f"{self}: finding it in its cubin")
        if kernel.shared > STATIC_SHARED:
            # As Triton does: the kernel's launches prefer shared memory to first-level cache.
            _check(cuda.cuFuncSetCacheConfig(function, _PREFER_SHARED), f"{self}: preferring shared memory")
            asked = cuda.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, kernel.shared)
            _check(asked, f"{self}: asking for {kernel.shared} bytes of shared memory")
        if kernel.num_ctas > MOST_PORTABLE_CTAS:
            asked = cuda.cuFuncSetAttribute(function, _NON_PORTABLE_CLUSTER, 1)
            _check(asked, f"{self}: asking for clusters of {kernel.num_ctas}")
        assert function.value is not None
        return function.value

    def _why_not_loaded(self) -> str:
        kernel, here = self.kernel, driver_version()
        made = f"it was made by ptxas of CUDA {kernel.toolkit} (ELF ABI {kernel.abi}) for {kernel.target}"
        if _numbers(here) < _numbers(kernel.toolkit):
            return (
                f"{made}, and the driver here knows CUDA {here}: install a driver for CUDA {kernel.toolkit} or later, or build the "
                f"pack with an older Triton"
            )
        return f"{made}, which the driver here, for CUDA {here}, should take: run `attngen pack verify`"


class Launch:
    """A function made ready for one device. A call gives it the number of programs, a stream and values.

    allocate: gives so many bytes of memory on the device, for kernels that need scratch memory.
    Raises PackError where the kernel can't be loaded there.
    """

    def __init__(self, function: Function, device: int, allocate: Callable[[int], torch.Tensor] | None = None):
        kernel = function.kernel
        self.function, self.device = function, device
        self._handle = _POINTER(function.handle(device))
        self._context = _POINTER(primary_context(device))
        self._launch, self._get_context = _library().cuLaunchKernelEx, _current_getter()
        self._kinds = [argument.kind for argument in kernel.arguments] + ["*"] * kernel.trailing
        # Native alignment: that of parameters too.
        self._pack = struct.Struct("@" + "".join(_FORMATS.get(kind, "Q") for kind in self._kinds)).pack_into
        self._ctas = kernel.num_ctas
        self._scratch = kernel.scratch or kernel.profile_scratch
        self._no_scratch = (0,) * kernel.trailing
        self._allocate = allocate or (
            lambda size: torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device))
        )
        self._frames: list[_Frame] = []  # those that no thread uses now

    def __call__(self, programs: int, stream: int, values: Sequence[int | float]) -> None:
        """Launch so many programs; nothing for 0. values: pointers as ints, and numbers, in the order of the kernel's arguments.

        stream: the driver's handle. It must be torch's current stream for a kernel that needs scratch memory. Raises PackError.
        """
        if not programs:
            return
        scratch, kept = (self._no_scratch, None) if not self._scratch else self._scratch_of(programs)
        try:
            frame = self._frames.pop()
        except IndexError:
            frame = _Frame(self.function.kernel, self._kinds)
        try:
            frame.words[0] = programs * self._ctas
            frame.longs[_STREAM // 8] = stream
            self._pack(frame.memory, frame.values, *values, *scratch)
        except (struct.error, ValueError, OverflowError, TypeError) as error:
            raise PackError(f"{self.function}: {self._why_not_packed(programs, values)}: {error}") from None
        # The driver launches in the thread's current context, which a thread may not have, or may have of another device.
        self._get_context(frame.context)
        if frame.context.value == self._context.value:
            code = self._launch(frame.config, self._handle, frame.parameters, None)
        else:
            with _current(self._context.value):
                code = self._launch(frame.config, self._handle, frame.parameters, None)
        self._frames.append(frame)
        if code:
            _check(code, f"{self.function}: launching {programs} programs on cuda:{self.device}")
        del kept  # given back to torch's allocator, which orders its use by streams

    def _scratch_of(self, programs: int) -> tuple[tuple[int, ...], list[torch.Tensor]]:
        """Pointers to memory for all programs of a launch, and the tensors that own it."""
        kernel, pointers, kept = self.function.kernel, [], []
        for size, alignment in (
            (kernel.scratch, kernel.scratch_alignment),
            (kernel.profile_scratch, kernel.profile_scratch_alignment),
        ):
            if not size:
                pointers.append(0)
                continue
            memory = self._allocate(programs * kernel.num_ctas * size + alignment - 1)
            pointers.append(-(-memory.data_ptr() // alignment) * alignment)
            kept.append(memory)
        return tuple(pointers), kept

    def _why_not_packed(self, programs: int, values: Sequence[int | float]) -> str:
        """Which value it was."""
        arguments = self.function.kernel.arguments
        if len(values) != len(arguments):
            return f"expected {len(arguments)} values, got {len(values)}"
        for argument, value in zip(arguments, values, strict=True):
            try:
                struct.pack(_FORMATS.get(argument.kind, "Q"), value)
            except (struct.error, OverflowError, TypeError):
                return f"{argument.name}: expected {argument.kind}, got {value!r}"
        return f"expected a number of programs and a stream, got {programs!r}"


_CONFIG_BYTES, _STREAM = 56, 32  # CUlaunchConfig, and where its stream stands
_ATTRIBUTE_BYTES = 72  # CUlaunchAttribute: the number, padding, 64 bytes of value


class _Frame:
    """The memory that one launch reads: CUlaunchConfig, its attributes, the pointers to parameters, and their values.

    Made once and used again: a thread takes one for a launch and puts it back, so that no two write to the same.
    """

    def __init__(self, kernel: Kernel, kinds: Sequence[str]):
        attributes = (
            [] if kernel.num_ctas == 1 else [(_CLUSTER_DIMENSION, kernel.num_ctas, 1, 1), (_CLUSTER_POLICY, _SPREAD)]
        )
        pointers = _CONFIG_BYTES + _ATTRIBUTE_BYTES * len(attributes)
        self.values = pointers + 8 * len(kinds)
        form, offsets = "@", []
        for kind in kinds:
            form += _FORMATS.get(kind, "Q")
            offsets.append(struct.calcsize(form) - struct.calcsize(_FORMATS.get(kind, "Q")))
        self._owner = ctypes.create_string_buffer(self.values + struct.calcsize(form))
        self.memory = memoryview(self._owner).cast("B")
        self.words, self.longs = self.memory[:_CONFIG_BYTES].cast("I"), self.memory[:_CONFIG_BYTES].cast("Q")
        start = ctypes.addressof(self._owner)
        grid, block, listed = (1, 1, 1), (32 * kernel.num_warps, 1, 1), start + _CONFIG_BYTES if attributes else 0
        struct.pack_into("@7IQQI", self.memory, 0, *grid, *block, kernel.shared, 0, listed, len(attributes))
        for place, (number, *words) in enumerate(attributes):
            at = _CONFIG_BYTES + place * _ATTRIBUTE_BYTES
            struct.pack_into(f"@I4x{len(words)}I", self.memory, at, number, *words)
        struct.pack_into(
            f"@{len(kinds)}Q", self.memory, pointers, *(start + self.values + offset for offset in offsets)
        )
        self.config, self.parameters = _POINTER(start), _POINTER(start + pointers)
        self.context = _POINTER()


@cache
def primary_context(device: int) -> int:
    """The context that torch uses on a device. Kept for the life of the process, as torch keeps it."""
    cuda, found, context = _library(), _INT(), _POINTER()
    _check(cuda.cuDeviceGet(found, device), f"finding cuda:{device}")
    _check(cuda.cuDevicePrimaryCtxRetain(context, found), f"making a context on cuda:{device}")
    assert context.value is not None
    return context.value


@contextmanager
def _current(context: int | None) -> Iterator[None]:
    """A context as the thread's current one; afterwards it is what it was."""
    cuda = _library()
    _check(cuda.cuCtxPushCurrent_v2(context), "making a device's context current")
    try:
        yield
    finally:
        _check(cuda.cuCtxPopCurrent_v2(_POINTER()), "making the context before it current again")


@contextmanager
def _relaxed_capture() -> Iterator[None]:
    """Loading a module may allocate memory, which a capture of a CUDA graph forbids unless told otherwise; it is no part of it."""
    cuda, mode = _library(), _INT(_CAPTURE_RELAXED)
    _check(cuda.cuThreadExchangeStreamCaptureMode(mode), "allowing to load a kernel while a graph is captured")
    try:
        yield
    finally:
        _check(cuda.cuThreadExchangeStreamCaptureMode(mode), "forbidding it again")


def _attribute(which: int, device: int) -> int:
    cuda, found, value = _library(), _INT(), _INT()
    _check(cuda.cuDeviceGet(found, device), f"finding cuda:{device}")
    _check(cuda.cuDeviceGetAttribute(value, which, found), f"asking cuda:{device} for attribute {which}")
    return value.value


@cache
def _library() -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(LIBRARY)
        for name, arguments in _SIGNATURES.items():
            getattr(found, name).argtypes = arguments
    except OSError as error:
        raise PackError(
            f"{LIBRARY}: expected NVIDIA's driver, got none ({error}); launch on a machine with a GPU"
        ) from None
    except AttributeError as error:
        raise PackError(f"{LIBRARY}: expected a driver for CUDA 12 or later: {error}; install a newer one") from None
    code = found.cuInit(0)
    if code:
        raise PackError(f"{LIBRARY}: the driver does not start, error {code}; see what `nvidia-smi` says")
    return found


@cache
def _current_getter() -> Any:
    """cuCtxGetCurrent, called without giving up the interpreter's lock: it only reads a thread's own variable."""
    function = ctypes.PyDLL(LIBRARY).cuCtxGetCurrent
    function.argtypes = [_POINTER_TO(_POINTER)]
    return function


def _check(code: int, doing: str) -> None:
    if code:
        raise PackError(f"{doing}: {_said(code)}")


def _said(code: int) -> str:
    """The driver's name and words for an error."""
    cuda, name, words = _library(), ctypes.c_char_p(), ctypes.c_char_p()
    if cuda.cuGetErrorName(code, name) or cuda.cuGetErrorString(code, words):
        return f"CUDA error {code}"
    return f"{(name.value or b'').decode()}: {(words.value or b'').decode()}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
