"""What each kernel takes: one table, and the arguments that follow from it, in order.

Lowering writes the `def` line from them, a launch its arguments, cross-compilation the types and what is known about values.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from attngen.analysis.capture_sites import CAPTURED
from attngen.language.expression import I, J, loads
from attngen.language.lists import RowLists
from attngen.lowering.gradients import Gradient

_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_CAPTURED = {"float": "*fp32", "int": "*i32", "bool": "*i1", "wide": "*i64"}


@dataclass(frozen=True)
class Arg:
    """One kernel argument.

    role: "tensor" (a pointer to the tensor `of`), "stride" and "size" (of dimension `dim` of the tensor `of`), "length"
    (the int `of`: n_q, n_k, heads, group, batch, splits, pages, together), "scale" (the float factor on q.k), "offset"
    (q_offset, an int, or a pointer to int32 [B]), "param" (the spec's Param `of`), "table" (a pointer to the table `of`).
    type: "*q" pointer in the dtype of q, "*fp32", "*i32", "*capture" pointer in the captured tensor's dtype; "i32", "fp32".
    specialize: whether Triton may compile for a value's divisibility by 16 (or 1); no other value ever recompiles.
    last: of a captured tensor the stride of its last dimension.
    """

    name: str
    role: str
    of: str
    type: str
    dim: int = 0
    specialize: bool = True
    comment: str = ""
    last: bool = False

    def triton_type(self, dtype: torch.dtype, captured: Mapping[str, str]) -> str:
        """Its type for a compilation. dtype: of q, k, v. captured: the kind of each captured tensor, "wide" for int64."""
        if self.type == "*capture":
            return _CAPTURED[captured.get(self.of.removeprefix(CAPTURED), "float")]
        return _POINTERS[dtype] if self.type == "*q" else self.type

    @property
    def unit(self) -> bool:
        """Whether its value is 1 in the usual case, which a compilation without values assumes: a captured tensor's last stride."""
        return self.last and self.specialize

    @property
    def divisible(self) -> bool:
        """Whether its value is a multiple of 16 in the usual case, which a compilation without values assumes."""
        return self.specialize and not self.unit and (self.type.startswith("*") or self.role == "stride")


@dataclass(frozen=True)
class Takes:
    """One kernel's row of the table.

    tensors: [B, heads, n, d], in the order of the arguments: of a gradient kernel first the two that stay, then the two that
    are walked, then its results. rows: float32 [B, heads, n_q], contiguous; `level` is lse as a loop wants it, which dq leaves for
    the kernels behind it: in the unit of the logits, and inf for a row without a key. more_rows: what it takes besides
    where a large lse lacks something (`Facts.restores`). stream_k: what tells the programs of a split forward which tiles
    are theirs. made: int32 results that no gradient meets. scaled: whether it computes logits.
    """

    title: str
    tensors: tuple[str, ...]
    rows: tuple[str, ...]
    more_rows: tuple[str, ...] = ()
    stream_k: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    scaled: bool = True


TABLE = {
    "tables": Takes("the walk's tables: what captured data allow a tile to skip", (), (), made=("made",), scaled=False),
    "forward": Takes(
        "forward: a query tile walks its keys with the online softmax",
        ("q", "k", "v", "out"),
        ("lse",),
        more_rows=("excess",),
        stream_k=("starts", "begins", "firsts"),
    ),
    "merge": Takes(
        "forward, second step: merge the partial softmax states of each output",
        ("out",),
        ("lse",),
        more_rows=("excess",),
        stream_k=("owners",),
        scaled=False,
    ),
    "delta": Takes(
        "backward, first step: delta = rowsum(dO * O) - dlse", ("out", "do"), ("dlse", "delta"), scaled=False
    ),
    "delta_of_out": Takes(
        "backward, first step: delta = rowsum(dO * O), where lse has no gradient",
        ("out", "do"),
        ("delta",),
        scaled=False,
    ),
    "excess": Takes(
        "backward, where the forward did not leave it: what a large lse lacks", ("q", "k"), ("lse", "excess")
    ),
    "dq": Takes(
        "backward: a query tile walks its keys and sums dQ",
        ("q", "do", "k", "v", "dq"),
        ("lse", "delta", "level"),
        more_rows=("excess",),
    ),
    "dkv": Takes(
        "backward: a key tile walks its queries and sums dK and dV",
        ("k", "v", "q", "do", "dk", "dv"),
        ("level", "delta"),
        more_rows=("excess",),
    ),
    "capture": Takes(
        "backward: the gradient of a captured tensor", ("q", "do", "k", "v"), ("level", "delta"), more_rows=("excess",)
    ),
    "capture by keys": Takes(
        "backward: the gradient of a captured tensor", ("k", "v", "q", "do"), ("level", "delta"), more_rows=("excess",)
    ),
}
LONGEST = 10  # characters of a captured tensor's or param's name that the kernel keeps, for lines that fit
LONGEST_TABLE = 16

# The first words of every variable that an outline or a fixed statement makes.
_WORDS = """
    a acc after alpha any b bad batch before begin begins beta beyond bin BLOCK bound c CHUNK count d delta dk dlse do dp dq
    ds dv e edge edges empty end excess exponent first firsts floor full g grad group h half HEAD head heads hi high hit hole i
    inside j k keep key kv l lane LANES LARGE large largest last launched level LIMIT listed live LN lo LOG2E low LOWEST lse
    m made masked maxima members mix n near nearest norm number odd other out output owner owners p PAGE page pages pair
    part partial place places power PRECISION program programs q query range rest rounding row rows run s same scale section
    share sink size skip slot split splits start starts state states step steps stop strange tanh threshold tile tiles
    tl together total triton turn uniform unmasked user v valid value weight weights whole written x zero
"""
VOCABULARY = frozenset(_WORDS.split())

_SHAPES = {
    "q": ("B", "heads", "n_q", "D"),
    "k": ("B", "heads // group", "n_k", "D"),
    "v": ("B", "heads // group", "n_k", "Dv"),
    "out": ("B", "heads", "n_q", "Dv"),
}
_LIKE = {"do": "out", "dq": "q", "dk": "k", "dv": "v"}
_STATES = (
    Arg("states", "tensor", "states", "*fp32", comment="[slots, BLOCK_M, Dv]: unnormalised sums"),
    Arg("maxima", "tensor", "maxima", "*fp32", comment="[slots, 2, BLOCK_M]: m and l"),
)
_LENGTHS = ("heads", "n_q", "group", "n_k", "batch", "together", "splits", "pages")


def takes(kernel: str, *, restores: bool = False, by_keys: bool = False) -> Takes:
    """What a kernel takes. restores: whether what a large lse lacks is found (`Facts.restores`); by_keys: whether keys are resident."""
    found = TABLE["capture by keys" if by_keys and kernel == "capture" else kernel]
    return replace(found, rows=(*found.rows, *found.more_rows)) if restores else found


def shape(tensor: str) -> tuple[str, ...]:
    """The dimensions of a tensor [B, heads, n, d], in words."""
    return _SHAPES[_LIKE.get(tensor, tensor)]


def arguments(
    kernel: str,
    spec: Any,
    reads: Iterable[str],
    names: Mapping[str, str],
    *,
    aligned: bool,
    offset_tensor: bool,
    restores: bool,
    split: str,
    tables: Iterable[str],
    by_keys: bool,
    gradients: Sequence[Gradient],
) -> tuple[Arg, ...]:
    """The arguments of a kernel that reads the variables `reads`.

    names: what captured tensors, params and tables are called in it. split: "split" or "stream" for a forward whose outputs
    several programs share, and its merge. tables: the walk's summaries. See `render` for the others.
    """
    known, own = takes(kernel, restores=restores, by_keys=by_keys), set(reads)
    partial = kernel == "forward" and split == "split"  # merge writes out and lse
    tensors = [name for name in known.tensors if not (partial and name == "out")]
    out = [Arg(name, "tensor", name, "*q", comment=f"[{', '.join(_dims(name, spec))}]") for name in tensors]
    out += [Arg(name, "tensor", name, "*fp32", comment=_row_comment(name)) for name in known.rows if not partial]
    if split:
        out += _STATES
        out += [Arg(name, "tensor", name, "*i32") for name in known.stream_k if split == "stream"]
    if "odd" in own:
        out.append(Arg("odd", "tensor", "odd", "*i32", comment="[programs]: what is not finite there"))
    out += [Arg(name, "tensor", name, "*i32", comment="[values, B or 1, heads or 1, tiles]") for name in known.made]
    out += [Arg(g.name, "tensor", g.buffer, "*fp32", comment=g.comment) for g in gradients]
    for name in tensors:
        out += strides(name, "bhn" if aligned else "bhnd", "i32", specialize=aligned)
    for g in gradients:
        # Rows of pairs begin at multiples of 16, so that they are stored in whole vectors.
        out += strides(g.buffer, g.strides, "i64", specialize=g.kind == "pairs", called=g.name)
    out += [Arg(name, "length", name, "i32", specialize=False) for name in _LENGTHS if name in own]
    if known.scaled:
        out.append(Arg("scale", "scale", "scale", "fp32", specialize=False))
    if "q_offsets" in own:
        out.append(Arg("q_offsets", "offset", "q_offset", "*i32", comment="[B]"))
    elif "q_offset" in own and not offset_tensor:
        out.append(Arg("q_offset", "offset", "q_offset", "i32", specialize=False))
    for name, param in spec.params.items():
        if names[name] in own:
            number = "i32" if param.sym.is_integer else "fp32"
            out.append(Arg(names[name], "param", name, number, specialize=False))
    lists = () if spec.lists is None else spec.lists.names
    for name in lists:
        if name in own:
            comment = f"[B or 1, heads or 1, {_listed(name, spec)}]"
            out.append(Arg(name, "tensor", CAPTURED + name, "*capture", comment=comment))
            out += strides(CAPTURED + name, "bh", "i64", called=name)
    if "page_table" in own:
        out.append(Arg("page_table", "tensor", CAPTURED + "page_table", "*capture", comment="[B, pages of a row]"))
        out += strides(CAPTURED + "page_table", "b", "i32", called="page_table")
    for name in tables:
        if f"{names[name]}_table" in own:
            comment = "[B or 1, heads or 1, tiles]"
            # One value is loaded: where the table starts must not make another kernel.
            out.append(Arg(f"{names[name]}_table", "table", name, "*i32", specialize=False, comment=comment))
            out += strides(name, "bh", "i32", called=names[name])
    in_tiles = loaded_in_tiles(spec)
    for name, tensor in spec.tensors.items():
        if name in names and names[name] in own and name not in lists:
            out += _captured(name, names[name], tensor.ndim, own, name in in_tiles)
    if "launched" in own:  # last: what stands before is what the first launch has
        out.append(Arg("launched", "length", "launched", "i32", specialize=False))
    return tuple(out)


def strides(of: str, axes: str, type: str, *, specialize: bool = False, called: str = "") -> list[Arg]:
    """The strides of the first dimensions of a tensor."""
    called = called or of
    return [Arg(f"{called}_stride_{axis}", "stride", of, type, dim, specialize) for dim, axis in enumerate(axes)]


def loaded_in_tiles(spec: Any) -> set[str]:
    """The captured tensors with an element for every pair: rows that are aligned load in whole vectors."""
    every = (load for expr in spec.expressions.args for load in loads(expr))
    reads = ((load.name, {s for index in load.indices for s in index.free_symbols}) for load in every)
    return {name for name, symbols in reads if J in symbols and I in symbols}


def _captured(name: str, called: str, ndim: int, reads: set[str], in_tiles: bool) -> list[Arg]:
    """A captured tensor: its last stride is 1 in the usual case. Sizes where an index has to be clamped."""
    name = CAPTURED + name
    out = [Arg(called, "tensor", name, "*capture")]
    for dim in range(ndim):
        last = dim == ndim - 1
        out.append(Arg(f"{called}_stride_{dim}", "stride", name, "i32", dim, specialize=last or in_tiles, last=last))
    sizes = [dim for dim in range(ndim) if f"{called}_size_{dim}" in reads]
    return out + [Arg(f"{called}_size_{dim}", "size", name, "i32", dim, specialize=False) for dim in sizes]


def _row_comment(name: str) -> str:
    return "[B, heads, n_q]" + (": lse as P needs it" if name == "level" else "")


def _dims(tensor: str, spec: Any) -> tuple[str, ...]:
    paged = spec.page_size is not None and tensor in ("k", "v")
    return ("pages", "heads // group", "PAGE_SIZE", shape(tensor)[3]) if paged else shape(tensor)


def _listed(name: str, spec: Any) -> str:
    rows = isinstance(spec.lists, RowLists)
    return f"{name.removesuffix('_runs')} {'rows, 2' if rows else 'tiles, 3'}" if "runs" in name else "listed"


# -- names ------------------------------------------------------------------------------------------------------------


def kernel_names(names: Iterable[str], tables: Iterable[str]) -> dict[str, str]:
    """What the kernel calls captured tensors, params and tables: by their own names, unless those could meet a variable of the
    kernel or of each other, or are long."""
    out: dict[str, str] = {}
    for given, longest in [*((n, LONGEST) for n in names), *((t, LONGEST_TABLE) for t in tables)]:
        own, derived = given, longest == LONGEST_TABLE  # a table is named after its tensor
        if keyword.iskeyword(own) or first_word(own) in VOCABULARY:
            own = f"user_{own}"
        if len(own) > longest:
            own = f"{own[: longest - 3]}_{len(out)}"
        while own in out.values() or (not derived and any(_meet(own, other) for other in out.values())):
            own = f"user_{own}"
        out[given] = own
    return out


def first_word(own: str) -> str:
    """The analysis numbers its words: live2_stop."""
    return own.partition("_")[0].rstrip("0123456789")


def _meet(own: str, other: str) -> bool:
    """Whether what is named after one could be named after the other."""
    return f"{own}_".startswith(f"{other}_") or f"{other}_".startswith(f"{own}_")
