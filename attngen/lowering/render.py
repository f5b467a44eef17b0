"""`render`: one kernel of a spec, under a schedule, as a `Source`."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import sympy

from attngen.expression import B, H
from attngen.lowering.captures import Site
from attngen.lowering.kernels import (
    KEY,
    LOG2E,
    QUERIES_WALK_KEYS,
    QUERY,
    SIDES,
    Holes,
    Loop,
    Sides,
    View,
    chunks,
    decode,
)
from attngen.lowering.source import Arg, Grid, Source, environment, tidy

TENSORS = {
    "forward": ("q", "k", "v", "out"),
    "delta": ("out", "do"),
    "dq": ("q", "do", "k", "v", "dq"),
    "dkv": ("k", "v", "q", "do", "dk", "dv"),
    "capture": ("q", "do", "k", "v"),
}
_SHAPES = {
    "q": ("B", "heads", "n_q", "D"),
    "k": ("B", "heads // group", "n_k", "D"),
    "v": ("B", "heads // group", "n_k", "Dv"),
    "out": ("B", "heads", "n_q", "Dv"),
}
_LIKE = {"do": "out", "dq": "q", "dk": "k", "dv": "v"}
_ROWS = {  # float32 [B, heads, n_q], contiguous
    "forward": ("lse",),
    "delta": ("dlse", "delta"),
    "dq": ("lse", "delta"),
    "dkv": ("lse", "delta"),
    "capture": ("lse", "delta"),
}
LONGEST = 10  # characters of a captured tensor's or param's name that the kernel keeps, for lines that fit

_GRADS = {
    "total": "[B, heads, tiles]",
    "rows": "[B, heads, n_q]",
    "keys": "[B, heads, n_k]",
    "pairs": "[B or 1, heads or 1, n_q, n_k]",
    "bins": "[B, heads, tiles, bins]",
    "atomic": "[B, heads, bins]",
}
_TITLES = {
    "forward": "forward: a query tile walks its keys with the online softmax",
    "delta": "backward, first step: delta = rowsum(dO * O) - dlse",
    "dq": "backward: a query tile walks its keys and sums dQ",
    "dkv": "backward: a key tile walks its queries and sums dK and dV",
    "capture": "backward: the gradient of a captured tensor",
}


def render(
    spec: Any,
    facts: Any,
    kernel: str,
    *,
    head_dim: int,
    head_dim_v: int,
    dtype: Any,
    schedule: Any,
    aligned: bool = True,
    offset_tensor: bool = False,
    site: Site | None = None,
) -> Source:
    """The source of `kernel`: "forward", "delta", "dq", "dkv", or "capture" for one `site` (see `captures`).

    schedule: a complete one. aligned: the last dimension of every [B, heads, n, d] tensor has stride 1 and all other
    strides are multiples of 16, so rows are loaded in whole vectors; False takes any strides. offset_tensor: q_offset is
    an int32 tensor [B]. The text does not depend on lengths, batch, head counts, params or the scale.
    """
    by_keys = site is not None and site.by_keys
    tile = schedule.tile("dkv" if by_keys else {"delta": "dq", "capture": "dq"}.get(kernel, kernel))
    sides = SIDES.get(kernel, Sides(KEY, QUERY, False) if by_keys else QUERIES_WALK_KEYS)
    tensors = TENSORS[kernel] if not by_keys else ("k", "v", "q", "do")
    owned = (
        [not site.uses(symbol) for symbol in (B, H)] if site is not None and site.kind == "pairs" else [False, False]
    )
    lines, owner = decode(sides, *owned)
    walk = facts.walk_keys if sides.walked is KEY else facts.walk_queries
    tables = [symbol.name for table in walk.tables for symbol in table.symbols]
    names = _safe_names([*spec.params, *spec.tensors, *tables])
    holes = Holes(spec, facts, sides, offset_tensor=offset_tensor, names=names)
    if kernel != "delta":
        slope = 1 if kernel == "forward" else facts.score_ds if site is None else site.slope
        holes.fill(slope, site if site is not None and site.kind in ("bins", "atomic") else None)
    d, dv = chunks(head_dim), chunks(head_dim_v)
    columns = "d" if d == dv else "e"
    views = {
        t: View(t, dv, columns, _head(t), not aligned)
        if _shape(t)[3] == "Dv"
        else View(t, d, "d", _head(t), not aligned)
        for t in tensors
    }
    sink = ""
    if kernel == "forward" and spec.sink is not None:
        terms = sympy.Add.make_args(spec.sink)
        sink = holes.printer.operand(sympy.Add(*[LOG2E * term for term in terms]))
    args = _arguments(spec, holes, kernel, tensors, names, aligned, offset_tensor, site, owner)
    text = (
        environment()
        .get_template(f"{kernel}.jinja")
        .render(
            **views,
            about=_about(spec, kernel, head_dim, head_dim_v, dtype, tile),
            name=kernel,
            args=args,
            block_m=tile.block_m,
            block_n=tile.block_n,
            precision=schedule.precision if str(dtype) == "torch.float32" else "",
            helpers=sorted(holes.printer.helpers),
            R=sides.resident,
            W=sides.walked,
            grouped=sides.grouped,
            load_offset=offset_tensor and any(arg.role == "offset" for arg in args),
            uses_resident_position=sides.resident.axis in holes.printer.used,
            uses_resident_safe=f"{sides.resident.axis}_safe" in holes.printer.used,
            d_chunks=d,
            dv_chunks=dv,
            columns={view.columns: view.chunks for view in views.values()},
            score=holes.form,
            program=holes.program.lines,
            head=holes.head.lines,
            steps=holes.steps,
            sink=sink,
            resident_tensors=[views[t] for t in tensors[:2]],
            walked_tensors=[views[t] for t in tensors[2:4]],
            decode=[line for line in lines if "k" in tensors or "kv_head" not in line],  # delta reads no keys
            walks="k" in tensors,
            owner=owner,
            site=site,
            site_bins=" * ".join(f"{names[site.tensor]}_size_{d}" for d in site.dims) if site is not None else "",
            boost=holes.boost,
        )
    )
    length = sides.resident.length
    block = tile.block_m if length == "n_q" else tile.block_n
    heads = "kv" if sides.grouped else "one" if owned[1] else "q"
    grid = Grid(length, block, heads, not owned[0])
    return Source(kernel, tidy(text), args, grid, tile.num_warps, tile.num_stages)


def _shape(tensor: str) -> tuple[str, ...]:
    return _SHAPES[_LIKE.get(tensor, tensor)]


def _head(tensor: str) -> str:
    return "h" if _shape(tensor)[1] == "heads" else "kv_head"


def _arguments(
    spec: Any,
    holes: Holes,
    kernel: str,
    tensors: tuple[str, ...],
    names: dict[str, str],
    aligned: bool,
    offset_tensor: bool,
    site: Site | None,
    owner: Loop | None,
) -> tuple[Arg, ...]:
    out: list[Arg] = []
    out += [Arg(t, "tensor", t, "*q", comment=f"[{', '.join(_shape(t))}]") for t in tensors]
    out += [Arg(t, "tensor", t, "*fp32", comment="[B, heads, n_q]") for t in _ROWS[kernel]]
    if site is not None:
        out.append(Arg("grad", "tensor", "grad", "*fp32", comment=_GRADS[site.kind]))
    for t in tensors:
        for dim, axis in enumerate("bhn" if aligned else "bhnd"):
            out.append(Arg(f"{t}_stride_{axis}", "stride", t, "i32", dim, specialize=aligned))
    if site is not None and site.kind == "pairs":
        out += [Arg(f"grad_stride_{axis}", "stride", "grad", "i32", dim, False) for dim, axis in enumerate("bh")]
    lengths = ["heads", "n_q", *(("group", "n_k") if kernel != "delta" else ())]
    lengths += ["batch"] if owner is not None and "batch" in owner.range else []
    out += [Arg(length, "length", length, "i32", specialize=False) for length in lengths]
    if kernel == "delta":
        return tuple(out)
    out.append(Arg("scale", "scale", "scale", "fp32", specialize=False))
    used = holes.printer.used | {"q_offset"}
    if used & {"i", "i_safe"} or any("q_offset" in line for line in (*holes.program.lines, *holes.head.lines)):
        if offset_tensor:
            out.append(Arg("q_offsets", "offset", "q_offset", "*i32", comment="[B]"))
        else:
            out.append(Arg("q_offset", "offset", "q_offset", "i32", specialize=False))
    for name, param in spec.params.items():
        if names[name] in used:
            kind = "i32" if param.sym.is_integer else "fp32"
            out.append(Arg(names[name], "param", name, kind, specialize=False))
    for name in holes.tables:
        out.append(Arg(f"{names[name]}_table", "table", name, "*i32", comment="[B or 1, heads or 1, tiles]"))
        out += [Arg(f"{names[name]}_stride_{axis}", "stride", name, "i32", dim, False) for dim, axis in enumerate("bh")]
    for name, tensor in spec.tensors.items():
        if name not in holes.printer.loaded:
            continue
        own = names[name]
        last = tensor.ndim - 1
        out.append(Arg(own, "tensor", name, "*capture"))
        out += [
            Arg(f"{own}_stride_{dim}", "stride", name, "i32", dim, specialize=dim == last) for dim in range(last + 1)
        ]
        for _, dim in sorted(b for b in holes.printer.bounded if b[0] == name):
            out.append(Arg(f"{own}_size_{dim}", "size", name, "i32", dim, specialize=False))
    return tuple(out)


def _about(spec: Any, kernel: str, head_dim: int, head_dim_v: int, dtype: Any, tile: Any) -> list[str]:
    return [
        f"attngen {_TITLES[kernel]}.",
        "",
        f"spec {spec.key[:16]}",
        *(f"    {line}" for line in _wrapped(str(spec).splitlines())),
        f"head dims {head_dim} and {head_dim_v}, {str(dtype).removeprefix('torch.')}",
        f"schedule block_m={tile.block_m}, block_n={tile.block_n}, num_warps={tile.num_warps}, num_stages={tile.num_stages}",
    ]


def _wrapped(lines: Iterable[str], width: int = 100) -> Iterable[str]:
    for line in lines:
        while len(line) > width:
            cut = line.rfind(" ", 0, width)
            cut = width if cut <= 0 else cut
            yield line[:cut]
            line = "    " + line[cut:].lstrip()
        yield line


@lru_cache(maxsize=1)
def _reserved() -> frozenset[str]:
    """Every name that a template gives to something: a captured tensor or a param of that name is renamed."""
    loader = environment().loader
    assert loader is not None
    words: set[str] = set()
    for template in environment().list_templates():
        text = loader.get_source(environment(), template)[0]
        text = re.sub(r"\{#.*?#\}|\{%.*?%\}", " ", text, flags=re.S)
        text = re.sub(r"\{\{(.*?)\}\}", lambda hole: " ".join(re.findall(r'"([^"]*)"', hole[1])), text, flags=re.S)
        words |= set(re.findall(r"[A-Za-z_]\w*", text))
    for side in (QUERY, KEY):
        words |= {side.tile, side.block, side.length, side.index, side.lane, side.stored}
    words |= {
        "grad",
        "first",
        "last",
        "step",
        "tile",
        "valid",
        "inside",
        "scalar",
        "row",
        "key",
        "hash",
        "boost",
        "do",
        "e",
        "d",
    }
    return frozenset(words)


def _safe_names(names: Iterable[str]) -> dict[str, str]:
    """Kernel names of captured tensors and params: their own, unless the kernel uses that for something else."""
    out: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"(_(\d+|ok|x|at|index|head|rows|step|lanes|stride|size|tile)|_[bhijnd])+$", "", name)
        taken = (
            keyword.iskeyword(name)
            or name in _reserved()
            or stem in _reserved()
            or re.match(r"user_|(live|hole|full|partial)\d*_", name)
        )
        own = f"user_{name}" if taken else name
        if len(own) > LONGEST:
            own = f"{own[: LONGEST - 3]}_{len(out)}"
        out[name] = own
    return out
