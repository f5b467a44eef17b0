"""What several commands take, and how it is read."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from attngen.errors import InputError

console = Console(highlight=False, soft_wrap=True)

SpecArg = Annotated[
    str, typer.Argument(metavar="SPEC", help="Text such as 'i >= j and i - j < 1024', a TOML file, or file.py:NAME.")
]
Shape = Annotated[str, typer.Option(help="Sizes, as 'B1 H8 N4096 D64' or 'B2 Hq32 Hkv8 Nq1 Nk8192 D128'.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="A param's value, or a 1-D int tensor as 0,0,1,1. Others are made up."
    ),
]
Database = Annotated[
    str | None,
    typer.Option("--db", help="The record database: a file, or postgresql://... of a fleet. Default: the user's own."),
]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def read_dtype(name: str) -> torch.dtype:
    """InputError for another word."""
    if name not in DTYPES:
        raise InputError("--dtype", f"one of {', '.join(DTYPES)}", name)
    return DTYPES[name]


def given_captures(spec: Any, assignments: list[str] | None) -> dict[str, Any]:
    """What --set says. InputError."""
    given: dict[str, Any] = {}
    for assignment in assignments or []:
        name, _, text = assignment.partition("=")
        if name not in spec.params and name not in spec.tensors:
            known = ", ".join([*spec.params, *spec.tensors]) or "none"
            raise InputError("--set", f"NAME=VALUE with a capture of the spec ({known})", repr(assignment))
        try:
            if name in spec.tensors:
                numbers = torch.tensor([float(x) for x in text.split(",")])
                kind, ndim = spec.tensors[name].kind, spec.tensors[name].ndim
                tensor = numbers.to({"int": torch.int32, "bool": torch.bool}.get(kind, torch.float32))
                given[name] = tensor.view(*[1] * (ndim - 1), -1)
            else:
                given[name] = int(text) if spec.params[name].number_kind == "int" else float(text)
        except ValueError:
            raise InputError("--set", "NAME=NUMBER or NAME=NUMBER,NUMBER,...", repr(assignment)) from None
    return given
