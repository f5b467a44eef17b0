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

from attngen.backends.launcher import Launcher
from attngen.errors import AttngenWarning, InputError, PackError
from attngen.language.call import Call
from attngen.language.plain import PlainSpec
from attngen.language.schedule import Schedule
from attngen.packs import driver, format
from attngen.packs.contents import Choice, Contents, dtype_name
from attngen.packs.kernels import Packed, PackedLauncher
from attngen.packs.plain import Missing
from attngen.runtime.callable import Attention
from attngen.runtime.executor import Executor, check_positive_params

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
        dtype = dtype_name(call.q.dtype)
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
