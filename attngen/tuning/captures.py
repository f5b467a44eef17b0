"""Plausible values for what a spec captures, so that it can be tuned from shapes alone.

Tuning wants typical work, not typical data: documents of some hundreds of tokens, windows of an eighth of the length,
ALiBi-like slopes. Real values, where the user has them, are better: `tune(..., captures=...)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from attngen.language.expression import B, H, I, J, S, loads
from attngen.language.spec import Spec
from attngen.store import Shape

DOCUMENT = 512  # tokens of a made-up document


def make_captures(
    spec: Spec,
    shape: Shape,
    device: torch.device | str = "cpu",
    given: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """A value for each tensor and param of the spec: `given` where it has one, else made up, the same for one seed."""
    given = dict(given or {})
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Any] = {}
    for name, param in spec.params.items():
        values[name] = given[name] if name in given else _param(spec, name, param.number_kind, shape)
    for name, tensor in spec.tensors.items():
        made = given[name] if name in given else _tensor(spec, name, tensor.kind, shape, generator)
        values[name] = made.to(device) if isinstance(made, torch.Tensor) else made
    return values


def _param(spec: Spec, name: str, kind: str, shape: Shape) -> int | float:
    if name == "seed":
        return 0
    if spec.dropout is not None and getattr(spec.dropout, "name", None) == name:
        return 0.1
    return max(1, shape.n_k // 8) if kind == "int" else 1.0


def _tensor(spec: Spec, name: str, kind: str, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    uses = [load.indices for load in loads(spec.expressions) if load.name == name]
    sizes = [max(_extent(use[dim], shape) for use in uses) for dim in range(len(uses[0]))]
    along_tokens = any({I, J, S} & use[-1].free_symbols for use in uses)
    if kind == "bool":
        return torch.rand(sizes, generator=generator) < 0.9
    if kind == "int":
        if not along_tokens:  # a length or a start, per batch or head
            return torch.full(sizes, max(1, shape.n_k // 4), dtype=torch.int32)
        documents = max(2, sizes[-1] // DOCUMENT)
        ids = torch.randint(0, documents, sizes, generator=generator, dtype=torch.int32)
        return ids.sort(dim=-1).values
    if sizes == [shape.heads_q]:  # slopes, as ALiBi has them
        return 2.0 ** (-8.0 * (torch.arange(shape.heads_q) + 1) / shape.heads_q)
    return torch.randn(sizes, generator=generator)


def _extent(index: Any, shape: Shape) -> int:
    """How far an index reaches; beyond a plain position it is not known, and gets room for i - j and the like."""
    extents = {B: shape.batch, H: shape.heads_q, I: max(shape.n_q, shape.n_k), J: max(shape.n_q, shape.n_k)}
    if index in extents:
        return extents[index]
    return int(index) + 1 if index.is_number else shape.n_q + shape.n_k


def save_captures(values: dict[str, Any], folder: Path) -> Path:
    """Captures as a JSON index and raw bytes, nothing that would run code when read."""
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            index[name] = value
            continue
        data = value.detach().cpu().contiguous()
        (folder / f"{name}.bin").write_bytes(data.reshape(-1).view(torch.uint8).numpy().tobytes())
        index[name] = {"dtype": str(data.dtype).removeprefix("torch."), "shape": list(data.shape)}
    path = folder / "captures.json"
    path.write_text(json.dumps(index))
    return path


def load_captures(path: Path) -> dict[str, Any]:
    """What `save_captures` wrote."""
    values: dict[str, Any] = {}
    for name, value in json.loads(path.read_text()).items():
        if isinstance(value, dict):
            data = bytearray((path.parent / f"{name}.bin").read_bytes())
            flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            values[name] = flat.view(getattr(torch, value["dtype"])).reshape(value["shape"])
        else:
            values[name] = value
    return values
