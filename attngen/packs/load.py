"""Loading packs: attentions that run on the kernels of a folder. Nothing is compiled, and no compiler is imported.

A call goes the way of every call of attngen: it is checked, planned, and executed step by step. Only where kernels come from is
different (`Packed`), and who decides schedules (`Choices`): the pack has both.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from attngen.analysis.capture_sites import CAPTURED, CaptureSite
from attngen.backends.launcher import Launcher
from attngen.errors import AttngenWarning, InputError, PackError, ScheduleError
from attngen.language.call import Call
from attngen.language.plain import PlainSpec
from attngen.language.schedule import Schedule
from attngen.packs import driver, format
from attngen.packs.plain import NUMBER, TEXT, TRUTH, Missing, get_spec
from attngen.packs.record import Argument
from attngen.plan.grid import Grid
from attngen.runtime.callable import Attention
from attngen.runtime.executor import Executor, check_positive_params

GUARDED = "_guarded"
NEEDED_BY_THE_COMPILER = ("attngen", "triton", "sympy", "jinja2")


def load(folder: Path | str, *, links: bool = False) -> LoadedPack:
    """The attentions of a pack by name; of a pack with one spec, also what is called itself.

    attn = ag.load("pack/")["causal"]
    out = attn(q, k, v)

    links: take files that are links, as download caches have them. All of the pack is checked (`attngen pack verify`), nothing is
    compiled, and kernels go to a GPU at their first launch there. Raises PackError, which names the file.
    """
    return LoadedPack(format.read(folder, links=links))


class LoadedPack(Mapping[str, "PackedAttention"]):
    """Attentions by name."""

    def __init__(self, pack: format.Pack):
        self.pack = pack
        path = pack.folder / format.MANIFEST
        try:
            contents = Contents.read(pack)
        except PackError as error:
            raise PackError(f"{path}: {error}") from None
        self._attentions = {name: PackedAttention(name, spec, contents) for name, spec in contents.specs.items()}

    def __getitem__(self, name: str) -> PackedAttention:
        if name not in self._attentions:
            raise PackError(f"{self.pack.folder}: expected one of {', '.join(self._attentions)}, got {name!r}")
        return self._attentions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._attentions)

    def __len__(self) -> int:
        return len(self._attentions)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The only attention of the pack."""
        if len(self._attentions) != 1:
            raise PackError(f"{self.pack.folder}: has {', '.join(self._attentions)}: call one, pack[NAME](q, k, v)")
        return next(iter(self._attentions.values()))(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<attngen.load({str(self.pack.folder)!r}): {', '.join(self._attentions)}>"


# -- what is in a pack ------------------------------------------------------------------------------------------------

Dims = tuple[int, int]


@dataclass(frozen=True)
class Choice:
    """A schedule for calls of about these sizes."""

    bucket: tuple[int, ...]
    schedule: Schedule
    origin: str


@dataclass(frozen=True)
class Contents:
    """The manifest, read. choices: by (spec, target, dtype, dims); kernels: by `_key` the name of a kernel and the kinds of captured
    tensors that it takes.
    """

    pack: format.Pack
    specs: Mapping[str, PlainSpec]
    plain: PlainSpec
    backward: bool
    choices: Mapping[Any, tuple[Choice, ...]]
    kernels: Mapping[Any, Mapping[tuple[tuple[str, str], ...], str]]

    @classmethod
    def read(cls, pack: format.Pack) -> Contents:
        """PackError for a manifest that is malformed."""
        whole = pack.manifest
        fields = {"specs", "plain", "backward", "schedules", "choices", "launches"}
        if set(whole) != fields:
            raise PackError(f"expected the fields {', '.join(sorted(fields))}, got {', '.join(sorted(whole))}")
        schedules = [_schedule(data) for data in _list(whole["schedules"])]
        choices: dict[Any, tuple[Choice, ...]] = {}
        for row in _list(whole["choices"]):
            data = _fields(row, ("spec", "target", "dtype", "dims", "bucket", "schedule", "origin"))
            key = (*(TEXT.get(None, data[name]) for name in ("spec", "target", "dtype")), _dims(data["dims"]))
            found = Choice(
                _numbers(data["bucket"], 5), _at(schedules, data["schedule"]), TEXT.get(None, data["origin"])
            )
            choices[key] = (*choices.get(key, ()), found)
        kernels: dict[Any, dict[Any, str]] = {}
        for row in _list(whole["launches"]):
            names = ("spec", "kernel", "target", "dtype", "dims", "schedule", "offset", "kinds", "site", "name")
            data = _fields(row, names)
            name = TEXT.get(None, data["name"])
            if name not in pack.kernels:
                raise PackError(f"launches: expected a kernel of the pack, got {name!r:.60}")
            if not isinstance(data["kinds"], dict):
                raise PackError(f"kinds: expected an object, got {data['kinds']!r:.60}")
            kinds = tuple(sorted((own, TEXT.get(None, kind)) for own, kind in data["kinds"].items()))
            texts = (TEXT.get(None, data[own]) for own in ("spec", "kernel", "target", "dtype"))
            rest = _at(schedules, data["schedule"]), TRUTH.get(None, data["offset"]), _site(data["site"])
            kernels.setdefault((*texts, _dims(data["dims"]), *rest), {})[kinds] = name
        if not isinstance(whole["specs"], dict):
            raise PackError("specs: expected an object")
        specs = {}
        for name, data in whole["specs"].items():
            both = _fields(data, ("text", "plain"))
            specs[name] = get_spec(both["plain"])
            if specs[name].text != both["text"]:
                raise PackError(f"specs: {name}: expected its text twice, got two")
        return cls(pack, specs, get_spec(whole["plain"]), TRUTH.get(None, whole["backward"]), choices, kernels)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Of the kernels, the newest first."""
        found = {kernel.target for kernel in self.pack.kernels.values()}
        return tuple(sorted(found, key=lambda target: -int(target.removeprefix("sm_"))))

    def target_of(self, device: torch.device) -> str:
        """The one that runs on a device. Missing."""
        here = driver.capability(driver.index_of(device))
        for target in self.targets:
            if driver.runs_on(target, here):
                return target
        raise Missing(
            f"{self.pack.folder} has kernels for {', '.join(self.targets)}, and {device} is sm_{here[0]}{here[1]}"
        )


def _list(data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise PackError(f"expected a list, got {data!r:.60}")
    return data


def _fields(data: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, dict) or set(data) != {*names}:
        raise PackError(f"expected {', '.join(names)}, got {data!r:.60}")
    return data


def _numbers(data: Any, count: int) -> tuple[int, ...]:
    found = tuple(NUMBER.get(None, item) for item in _list(data))
    if len(found) != count or any(number < 0 for number in found):
        raise PackError(f"expected {count} numbers, got {data!r:.60}")
    return found


def _dims(data: Any) -> Dims:
    head_dim, head_dim_v = _numbers(data, 2)
    return head_dim, head_dim_v


def _at(schedules: list[Schedule], place: Any) -> Schedule:
    if NUMBER.get(None, place) not in range(len(schedules)):
        raise PackError(f"schedule: expected one of {len(schedules)}, got {place}")
    return schedules[place]


def _schedule(data: Any) -> Schedule:
    try:
        return Schedule(**data)
    except (ScheduleError, TypeError) as error:
        raise PackError(f"schedules: {error}") from None


def _site(data: Any) -> Any:
    if data is None:
        return None
    if not isinstance(data, list) or len(data) != 3:
        raise PackError(f"site: expected [tensor, number, deterministic], got {data!r:.60}")
    return TEXT.get(None, data[0]), NUMBER.get(None, data[1]), TRUTH.get(None, data[2])


# -- where kernels come from ------------------------------------------------------------------------------------------


class PackedKernel:
    """A kernel of a pack made ready for a device, as a launcher takes it: `args`, `grid`, `num_stages`."""

    def __init__(self, contents: Contents, name: str, device: torch.device):
        pack = contents.pack
        kernel = pack.kernels[name]
        self.name, self.args, self.num_stages = kernel.symbol, kernel.arguments, kernel.num_stages
        try:
            self.grid = Grid(**kernel.grid)
        except TypeError as error:
            raise PackError(f"{pack.folder / format.MANIFEST}: kernel {name}: grid: {error}") from None
        self.pointers = [place for place, arg in enumerate(self.args) if arg.kind.startswith("*")]
        self.index = driver.index_of(device)
        function = driver.Function(kernel, pack.cubin(name), str(pack.folder / kernel.file))
        self.launch = driver.Launch(function, self.index)

    def check(self, tensors: Mapping[str, Any]) -> None:
        """Missing unless the tensors are laid out as the kernel takes for granted."""
        for arg in self.args:
            if arg.of not in tensors:  # a number, or what the launch itself makes
                continue
            if arg.role in ("tensor", "table") and arg.divisible and tensors[arg.of].data_ptr() % 16:
                raise Missing(
                    f"{_called(arg)} starts at an address that is no multiple of 16 bytes; pass {_called(arg)}.clone()"
                )
            if arg.role == "stride":
                self._check_stride(arg, tensors[arg.of])

    def _check_stride(self, arg: Argument, tensor: torch.Tensor) -> None:
        step = tensor.stride(arg.dim) if tensor.shape[arg.dim] != 1 else 0
        if arg.divisible and step % 16:
            raise Missing(
                f"{_called(arg)} has stride {step} along dimension {arg.dim}, no multiple of 16; pass {_called(arg)}.contiguous()"
            )
        if arg.kind == "i32" and not -(2**31) <= step < 2**31:
            raise Missing(f"{_called(arg)} has stride {step} along dimension {arg.dim}, which does not fit 32 bits")


def _called(arg: Argument) -> str:
    return arg.of.removeprefix(CAPTURED)


class Packed:
    """Sources out of a pack, see `attngen.backends.launcher.Sources`."""

    def __init__(self, contents: Contents):
        self.contents = contents
        self._ready: dict[Any, PackedKernel] = {}

    def find(
        self,
        kernel: str,
        call: Call,
        facts: Any,
        schedule: Schedule,
        tensors: Mapping[str, Any],
        site: CaptureSite | None = None,
    ) -> PackedKernel:
        """The kernel, loaded on the call's device. Missing."""
        dims, dtype = (int(call.q.shape[3]), int(call.v.shape[3])), str(call.q.dtype).removeprefix("torch.")
        where = call.spec.key, kernel, self.contents.target_of(call.q.device), dtype, dims
        by_offset = isinstance(call.q_offset, torch.Tensor)
        own = None if site is None else (site.tensor, site.number, site.deterministic)
        found = self.contents.kernels.get((*where, schedule, by_offset, own))
        if found is None:
            offsets = "tensors" if by_offset else "ints"
            raise Missing(f"no kernel {kernel} of {dtype}, head dims {dims}, {where[2]}, for q_offset of {offsets}")
        kinds = tuple(sorted((name, _POINTERS.get(x.dtype, str(x.dtype))) for name, x in call.captures.items()))
        name = found.get(kinds)
        if name is None:
            wanted, given = next(iter(found)), dict(kinds)
            wrong = next((own for own, kind in wanted if given.get(own) != kind), "?")
            raise Missing(f"{wrong} is {given.get(wrong)}, and the kernels take {dict(wanted).get(wrong)}")
        ready = self._ready.get((name, call.q.device))
        if ready is None:
            ready = self._ready[name, call.q.device] = PackedKernel(self.contents, name, call.q.device)
        ready.check(tensors)
        for own_name, x in call.captures.items():
            if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
                raise Missing(
                    f"{own_name} has stride {x.stride(-1)} along its last dimension; pass {own_name}.contiguous()"
                )
        return ready

    def guarded(
        self, kernel: str, call: Call, facts: Any, schedule: Schedule, tensors: Mapping[str, Any]
    ) -> PackedKernel | None:
        """What looks after the results of a kernel, if the pack has such a one."""
        names = {key[1] for key in self.contents.kernels if key[0] == call.spec.key}
        return self.find(kernel + GUARDED, call, facts, schedule, tensors) if kernel + GUARDED in names else None

    def plain(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> tuple[Schedule, Any]:
        """How delta is computed."""
        plain, short = self.contents.plain, str(dtype).removeprefix("torch.")
        found = self.contents.choices.get((plain.key, self.contents.target_of(device), short, (head_dim, head_dim)))
        if not found:
            raise Missing(f"no kernel of a backward for {short}, head dim {head_dim} of v")
        return found[0].schedule, plain.known

    def options(self, source: PackedKernel) -> int:
        """The device, which gives the stream."""
        return source.index

    def start(self, source: PackedKernel, programs: int, arguments: list[Any], options: int) -> None:
        """One launch on torch's current stream."""
        values = arguments.copy()
        for place in source.pointers:
            values[place] = values[place].data_ptr()
        source.launch(programs, driver.current_stream(options), values)


_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class PackedLauncher(Launcher):
    """Gradients that come in any layout are made what the kernels take."""

    def delta(self, out: torch.Tensor, do: torch.Tensor, dlse: torch.Tensor | None = None) -> torch.Tensor:
        """rowsum(dO * O) - dlse, see `attngen.backends`."""
        return super().delta(_laid_out(out), _laid_out(do), dlse)

    def backward(
        self,
        call: Call,
        facts: Any,
        schedule: Schedule,
        lse: torch.Tensor,
        delta: torch.Tensor,
        do: torch.Tensor,
        wanted: list[str],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Gradients, see `attngen.backends`."""
        return super().backward(call, facts, schedule, lse, delta, _laid_out(do), wanted)


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """With rows of whole vectors, where its head dim is one."""
    steps = [step for step, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    whole = x.stride(-1) == 1 and all(step % 16 == 0 for step in steps)
    right = x.data_ptr() % 16 == 0 and (whole or x.shape[-1] % 16 != 0)
    return x if right else x.contiguous().clone() if x.is_contiguous() else x.contiguous()


# -- who decides ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Specialised:
    """How an attention is computed, see `attngen.runtime.specialise`."""

    facts: Any
    schedule: Schedule
    origin: str
    backend: Launcher


class Choices:
    """The schedules of a pack, see `attngen.runtime.executor.Specialiser`."""

    def __init__(self, contents: Contents):
        self.contents, self.launcher = contents, PackedLauncher(Packed(contents))
        self._known: dict[Any, Specialised] = {}

    def backend(self, device: torch.device) -> Launcher:
        """The launcher."""
        return self.launcher

    def of(self, call: Call) -> Specialised:
        """The schedule for the sizes that are nearest. Missing."""
        q = call.q
        sizes = q.shape[0], q.shape[1], call.k.shape[1], q.shape[2], call.n_k
        key = call.spec.key, q.device, q.dtype, q.shape[3], call.v.shape[3], sizes
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._nearest(call, sizes)
        check_positive_params(found.facts, call)
        return found

    def _nearest(self, call: Call, sizes: tuple[int, ...]) -> Specialised:
        target, dims = self.contents.target_of(call.q.device), (int(call.q.shape[3]), int(call.v.shape[3]))
        dtype = str(call.q.dtype).removeprefix("torch.")
        choices = self.contents.choices.get((call.spec.key, target, dtype, dims))
        if not choices:
            known = sorted({f"{key[2]} {key[3][0]}" for key in self.contents.choices if key[0] == call.spec.key})
            raise Missing(
                f"no kernels of {dtype}, head dims {dims[0]} and {dims[1]} for {target}; it has {', '.join(known) or 'none'}"
            )

        def distance(choice: Choice) -> float:
            return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(choice.bucket, sizes, strict=True))

        best = min(choices, key=distance)
        return Specialised(call.spec.known, best.schedule, best.origin, self.launcher)


# -- what is called ---------------------------------------------------------------------------------------------------


class PackedAttention(Attention):
    """An attention of a pack: called like a compiled one (`attngen.compile`), with the same arguments and errors.

    A call that the pack has no kernel for is compiled where attngen's compiler is installed, which is said once; elsewhere it is a
    PackError that says what is missing. On a machine without a GPU the spec runs on attngen's CPU backend, which takes the compiler too.
    """

    def __init__(self, name: str, spec: PlainSpec, contents: Contents):
        identity = json.dumps([contents.pack.digest, name])
        plain: Any = spec
        super().__init__(plain, Executor(Choices(contents)), hashlib.sha256(identity.encode()).hexdigest()[:32])
        self.name, self.contents, self.plain = name, contents, spec
        self._said = False

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        return_lse: bool = False,
        q_offset: int | torch.Tensor = 0,
        plan: Any = None,
        **captures: Any,
    ) -> Any:
        if isinstance(q, torch.Tensor) and q.device.type == "cpu" and not driver.launches_on(q.device):
            attention = self._compiler(f"{q.device} runs no kernels")
            return attention(q, k, v, return_lse=return_lse, q_offset=q_offset, plan=plan, **captures)
        try:
            if not self.contents.backward:
                self._check_gradients(q, k, v, captures)
            return super().__call__(q, k, v, return_lse=return_lse, q_offset=q_offset, plan=plan, **captures)
        except Missing as missing:
            attention = self._compiler(str(missing))
            if not self._said:
                self._said = True
                warnings.warn(f"{self.name}: not in the pack, compiled here: {missing}", AttngenWarning, stacklevel=2)
            return attention(q, k, v, return_lse=return_lse, q_offset=q_offset, plan=plan, **captures)

    def _check_gradients(self, *values: Any) -> None:
        if not torch.is_grad_enabled():
            return
        *rows, captures = values
        if any(isinstance(x, torch.Tensor) and x.requires_grad for x in (*rows, *captures.values())):
            raise Missing("it was built without a backward, and an argument requires a gradient")

    def _compiler(self, why: str) -> Any:
        """The same attention, compiled here. PackError without a compiler."""
        if not all(importlib.util.find_spec(name) for name in NEEDED_BY_THE_COMPILER):
            raise PackError(
                f"{self.name}: {why}; build the pack for it (attngen build --help), or install attngen's compiler: "
                f"pip install {' '.join(NEEDED_BY_THE_COMPILER)}"
            )
        return self._compiled

    @cached_property
    def _compiled(self) -> Any:
        spec = importlib.import_module("attngen.language.spec").Spec.from_text(self.spec.text, name=self.spec.name)
        return importlib.import_module("attngen.runtime.attention").compile(spec)

    def backend_of(self, device: torch.device) -> str:
        """That of kernels. InputError for a device that has none."""
        if not driver.launches_on(device):
            raise InputError("q", "a CUDA tensor, or one on a CPU", f"device {device}")
        return "triton"

    def explain(self) -> str:
        """The spec, and of each attention that its calls are made of the schedules that were chosen when the pack was built."""
        lines = [
            f"{self.name}, from {self.contents.pack.folder}",
            *(f"    {line}" for line in self.spec.text.splitlines()),
        ]
        keys = {self.spec.key, *(own.key for own in self.plain.inner.values())}
        for (key, target, dtype, dims), choices in sorted(self.contents.choices.items()):
            for choice in choices if key in keys else ():
                sizes = " ".join(
                    f"{n}{size}" for n, size in zip(("B", "Hq", "Hkv", "Nq", "Nk"), choice.bucket, strict=True)
                )
                lines.append(f"{target} {dtype} D{dims[0]} Dv{dims[1]} {sizes}: {choice.origin}: {choice.schedule}")
        return "\n".join(lines)

    def __reduce__(self) -> Any:
        pack = self.contents.pack
        return _reloaded, (str(pack.folder.absolute()), pack.digest, self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedAttention:
        return self  # immutable but for caches

    def __repr__(self) -> str:
        return f"<{self.name} of {self.contents.pack.folder}>"


def _reloaded(folder: str, digest: str, name: str) -> PackedAttention:
    """A pickled attention: of the same pack, in the same place."""
    found = load(folder, links=True)
    if found.pack.digest != digest:
        raise PackError(f"{folder}: expected the pack that was pickled, {digest[:12]}, got {found.pack.digest[:12]}")
    return found[name]
