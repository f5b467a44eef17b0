"""Conditions on the values of captured tensors: one reduction each, an InputError here or an assertion on the device."""

from __future__ import annotations

import os

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
    from attngen.plan.keysets.base import check_tensor

    lengths = check_tensor(name, value, "int", (batch,), "[B]", device)
    require(name, (lengths >= 0) & (lengths <= most), f"lengths in 0 .. {most}, {what}", lengths, "in row")
    return lengths.clamp(0, most).to(torch.int32)
