"""Conditions on the values of captured tensors: one reduction each, an InputError here or an assertion on the device."""

from __future__ import annotations

import os
from typing import Any

import torch

from attngen.errors import InputError


def checked() -> bool:
    """Whether the values of tensors are checked at all."""
    return os.environ.get("ATTNGEN_CHECK", "1") != "0"


def require(name: str, right: torch.Tensor, wanted: str, values: torch.Tensor, row: str = "at") -> None:
    """InputError with the first of `values` for which `right` (bool, of the same shape) does not hold, and where it is. On a
    GPU the device asserts it later, so that nobody waits. `ATTNGEN_CHECK=0` turns it off.
    """
    if right.numel() == 0 or not checked():
        return
    if right.device.type == "cpu":
        if not bool(right.all()):
            wrong = (~right).nonzero()[0].tolist()
            raise InputError(name, wanted, f"{values[tuple(wrong)].item()} {row} {wrong}")
    elif right.is_cuda:
        torch._assert_async(right.all(), f"{name}: expected {wanted}")


def check_dims(name: str, value: object, dims: tuple[int, ...], wanted: str) -> torch.Tensor:
    """InputError unless `value` is a tensor with one of these numbers of dimensions; its sizes are the next check's."""
    if isinstance(value, torch.Tensor) and value.dim() in dims:
        return value
    got = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
    raise InputError(name, wanted, got, f"pass {name}=... at the call" if value is None else "")


def check_lengths(name: str, value: object, batch: int, most: int, what: str, device: torch.device) -> torch.Tensor:
    """Lengths int [B] in 0 .. most, as int32. InputError names the row."""
    lengths = check_tensor(name, value, "int", (batch,), "[B]", device)
    require(name, (lengths >= 0) & (lengths <= most), f"lengths in 0 .. {most}, {what}", lengths, "in row")
    return lengths.clamp(0, most).to(torch.int32)


def check_tensor(
    name: str, value: Any, kind: str, shape: tuple[int, ...], dims: str, device: torch.device
) -> torch.Tensor:
    """InputError unless `value` is a tensor of this kind ("bool", "int", "float") and shape on this device."""
    wanted = f"{kind} {dims} = {list(shape)} on {device}"
    if not isinstance(value, torch.Tensor):
        raise InputError(name, wanted, type(value).__name__, f"pass {name}=... at the call" if value is None else "")
    given = "float" if value.is_floating_point() else "bool" if value.dtype == torch.bool else "int"
    right = given == kind and (kind != "int" or value.dtype in (torch.int32, torch.int64))
    if not right or tuple(value.shape) != shape or value.device != device:
        raise InputError(name, wanted, f"{value.dtype} {list(value.shape)} on {value.device}")
    return value


def check_range(name: str, value: torch.Tensor, low: int, high: int, what: str) -> None:
    """InputError if an element lies outside low .. high - 1: one reduction. On a GPU the device asserts it later, so that
    nobody waits. `ATTNGEN_CHECK=0` turns it off.
    """
    if value.numel() == 0 or not checked():
        return
    least, largest = value.aminmax()
    if value.device.type == "cpu":
        if int(least) < low or int(largest) >= high:
            wrong = ((value < low) | (value >= high)).nonzero()[0].tolist()
            raise InputError(name, f"{what} in {low} .. {high - 1}", f"{int(value[tuple(wrong)])} at {wrong}")
    elif value.is_cuda:
        torch._assert_async((least >= low) & (largest < high), f"{name}: expected {what} in {low} .. {high - 1}")
