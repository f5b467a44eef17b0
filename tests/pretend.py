"""A GPU's tensors on the CPU, to rehearse what lives where.

Within `pretending()`, what is asked for on "cuda" is a CPU tensor that says `device == cuda:0`. An operation that mixes such
tensors with ordinary ones (other than single numbers) fails as it would on a GPU, and so does one that CUDA doesn't have.
Kernels are interpreted as usual, or left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from attngen.backends.triton import launch as gpu
from attngen.runtime import operators
from attngen.runtime.executable import Executable

CUDA = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="pretended", major=9, minor=0, multi_processor_count=132, L2_cache_size=2**20 * 50, total_memory=2**37,
    shared_memory_per_block_optin=232448, warp_size=32,
)  # fmt: skip
T = torch.Tensor
MOVING = {torch.tensor, torch.as_tensor, T.copy_, T.__setitem__}  # may take from anywhere
PRODUCTS = {torch.matmul, T.matmul, T.__matmul__, torch.mm, T.mm, torch.bmm, T.bmm, torch.einsum}


class Pretended(torch.Tensor):
    """A CPU tensor that passes for one of a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class Mode(TorchFunctionMode):
    """Sees every torch function, also those that make tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        what = getattr(func, "__self__", None)
        if what in (T.device, T.is_cuda, T.is_cpu):
            there = isinstance(args[0], Pretended)
            return (CUDA if there else func(*args)) if what is T.device else there == (what is T.is_cuda)
        if func is T.get_device:
            return 0 if isinstance(args[0], Pretended) else -1
        tensors = list(_tensors((args, kwargs)))
        pretended = [t for t in tensors if isinstance(t, Pretended)]
        if func in (T.cpu, T.cuda, T.to):
            return _moved(func, args, kwargs)
        if func is T.numpy and pretended:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        device, there = kwargs.get("device"), bool(pretended)
        if device is not None:
            there = torch.device(device).type == "cuda"
            kwargs["device"] = "cpu" if there else device
        elif pretended and func not in MOVING and _mixed(tensors):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cpu and cuda:0")
        if pretended and func in PRODUCTS and not all(t.is_floating_point() for t in tensors):
            raise RuntimeError(f'{func}: "addmm_cuda" not implemented for integers')
        result = func(*args, **kwargs)
        return _pretend(result, args) if there else result


def _mixed(tensors: list[torch.Tensor]) -> bool:
    # In a backward, what the engine made is not told from what is on the CPU.
    in_backward = torch._C._current_graph_task_id() != -1
    return not in_backward and any(t.dim() > 0 and not isinstance(t, Pretended) for t in tensors)


def _moved(func: Any, args: Any, kwargs: Any) -> Any:
    """x.to(...), x.cpu(), x.cuda(): a copy where the place changes."""
    x, targets = args[0], [*args[1:], *kwargs.values()]
    there = isinstance(x, Pretended)
    if func is not T.to:
        there, plain = func is T.cuda, x
    else:
        kept = []
        for target in targets:
            if isinstance(target, torch.Tensor):
                there = isinstance(target, Pretended)
                kept.append(target.dtype)
            elif isinstance(target, (str, torch.device)):
                there = torch.device(target).type == "cuda"
            elif isinstance(target, torch.dtype):
                kept.append(target)
        plain = T.to(x, *kept[:1]) if kept else x
    if there == isinstance(x, Pretended):
        return x if plain is x else _pretend(plain, ()) if there else plain
    return _pretend(plain.clone(), ()) if there else plain.clone().as_subclass(torch.Tensor)


def _pretend(result: Any, given: Any) -> Any:
    if isinstance(result, torch.Tensor):
        if isinstance(result, Pretended) or any(result is x for x in given):
            return result
        if result.is_leaf and result.requires_grad:
            return result.detach().as_subclass(Pretended).requires_grad_()
        return result.as_subclass(Pretended)
    if isinstance(result, (tuple, list)) and not isinstance(result, torch.Size):
        parts = [_pretend(x, given) for x in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for x in value:
            yield from _tensors(x)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@contextlib.contextmanager
def pretending(kernels: bool = True) -> Iterator[None]:
    """Within it "cuda" is there, as far as tensors go. Without `kernels`, launches only check where their arguments live."""
    mode = Mode()

    def within(run: Any) -> Any:
        """Operators get plain tensors: what they hand on pretends again."""

        def running(self: Any, *args: Any) -> Any:
            with torch._C.DisableTorchFunction():
                args = tree_map(lambda x: _pretend(x, ()) if isinstance(x, torch.Tensor) else x, args)
            with mode:
                return run(self, *args)

        return running

    def start(source: Any, programs: int, arguments: list[Any], options: Any, run: Any = gpu._start) -> None:
        with torch._C.DisableTorchFunction():
            plain = [x.as_subclass(torch.Tensor) if isinstance(x, torch.Tensor) else x for x in arguments]
            for x in arguments:
                assert not isinstance(x, torch.Tensor) or isinstance(x, Pretended), f"{source.name}: {x} is on the CPU"
            if kernels:
                run(source, programs, plain, options)

    with (
        mock.patch.object(gpu, "_start", start),
        mock.patch.object(operators._Names, "call", within(operators._Names.call)),
        mock.patch.object(Executable, "forward_and_kept", within(Executable.forward_and_kept)),
        mock.patch.object(Executable, "backward", within(Executable.backward)),
        mock.patch.object(torch.autograd, "has_torch_function", lambda args: False),
        mock.patch.object(torch.autograd, "grad", _grad),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0)),
        mock.patch.object(torch.cuda, "device_of", lambda x: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: PROPERTIES),
        mock.patch.object(torch, "Generator", _Generator),
        mode,
    ):
        yield


def _grad(outputs: Any, inputs: Any, *args: Any, run: Any = torch.autograd.grad, **named: Any) -> Any:
    with torch._C.DisableTorchFunction():
        places = [isinstance(x, Pretended) for x in ([inputs] if isinstance(inputs, torch.Tensor) else inputs)]
    grads = run(outputs, inputs, *args, **named)
    return tuple(_pretend(grad, ()) if there else grad for grad, there in zip(grads, places, strict=True))


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")
