"""One block of a longer attention, a run of queries by a run of keys, as an ordinary attention: one spec for all blocks.

Queries get their positions by `q_offset`. Keys count from 0 in the block: j becomes j + key_start, a param, but for captured
tensors that j itself indexes, of which the block gets its own part, so that the analysis sees what it always sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch

from attngen.analysis import Axis, facts, run
from attngen.analysis.tiles import check_positive
from attngen.errors import SpecError
from attngen.language.call import Call
from attngen.language.expression import Expr, J, Load, Param, Tensor, loads
from attngen.language.moved import j, moved
from attngen.language.spec import Spec
from attngen.runtime.attention import CompiledAttention, compile

_ROW = sympy.Symbol("key row", integer=True)  # j counted from the block's first key, while the other j are moved


class Block:
    """The compiled attention of any block, and how to cut out the captures of one.

    sources: for each captured tensor of its spec the name of the whole tensor and the dimensions along which the block has a
    part of it.
    """

    def __init__(self, attention: CompiledAttention):
        spec = attention.spec
        _check(spec)
        self._taken = {*spec.tensors, *spec.params}
        self.sources: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.start = Param(self._free("key_start"))
        declared = {**spec.tensors, **spec.params}
        mask, score = (self._moved(Expr(part, declared)) for part in (spec.mask, spec.score))
        inner = Spec(mask=mask, score=score, scale=spec.scale, schedule=spec.schedule, name=spec.name)
        self.attention = compile(inner, schedule=attention.pins, backend=attention.backend, db=attention.db)
        self.sources = {name: self.sources.get(name, (name, ())) for name in inner.tensors}
        self.learned = [name for name, tensor in inner.tensors.items() if tensor.kind == "float"]

    def forward(self, call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """out and lse of a block's call, and what its backward makes use of, if it can have one."""
        stages = self.attention.specialiser.of(call)
        if call.wants_grad:
            return stages.backend.forward_keeping(call, stages.facts, stages.schedule)
        return *stages.backend.forward(call, stages.facts, stages.schedule), None

    def delta(self, out: torch.Tensor, do: torch.Tensor, dlse: torch.Tensor) -> torch.Tensor:
        """rowsum(dO * O) - dlse."""
        return self.attention.specialiser.backend(out.device).delta(out, do, dlse)

    def backward(
        self,
        call: Call,
        lse: torch.Tensor,
        delta: torch.Tensor,
        do: torch.Tensor,
        wanted: list[str],
        kept: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """dq, dk, dv and the gradients of the block's tensors in `wanted`."""
        stages = self.attention.specialiser.of(call)
        return stages.backend.backward(call, stages.facts, stages.schedule, lse, delta, do, wanted, kept)

    @property
    def names(self) -> list[str]:
        """The whole tensors that it reads."""
        return list(dict.fromkeys(name for name, _ in self.sources.values()))

    def captures(self, given: Mapping[str, Any], keys: range, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Tensors and params of the block whose keys have these positions, from those of the whole. names: only these."""
        spec = self.attention.spec
        wanted = {*spec.tensors, *spec.params, *({"scale"} & given.keys())} if names is None else {*names}
        found: dict[str, Any] = {}
        for name in wanted & {*spec.tensors}:
            source, dims = self.sources[name]
            found[name] = self._cut(given[source], dims, keys)
        for name in wanted & {*spec.call_params}:
            found[name] = keys.start if name == self.start.name else given[name]
        return found

    def add_gradient(self, totals: Mapping[str, torch.Tensor], name: str, gradient: torch.Tensor, keys: range) -> None:
        """Add the gradient of a block's tensor to its part of the whole one's, in `totals`."""
        source, dims = self.sources[name]
        part = self._cut(totals[source], dims, keys)
        part.add_(gradient.sum_to_size(part.shape))

    def tiles(
        self,
        queries: range,
        keys: range,
        tile: int,
        heads: tuple[int, ...],
        q_offset: int | torch.Tensor,
        given: Mapping[str, Any],
        device: torch.device,
    ) -> torch.Tensor | int:
        """How many tile x tile tiles the kernels compute for a block, over heads = (B, Hq); on the device, not waited for. 0
        only if no pair is attended.
        """
        if not (len(queries) and len(keys) and all(heads)):
            return 0
        known = facts(self.attention.spec)
        axes = {
            "b": torch.arange(heads[0], device=device).view(-1, 1, 1),
            "h": torch.arange(heads[1], device=device).view(1, -1, 1),
        }
        read = {symbol.name for symbol in known.spec.mask.free_symbols}
        env = {**self.captures(given, keys, read), **axes}
        check_positive(known.walk_keys, env)
        offset = q_offset.view(-1, 1, 1) if isinstance(q_offset, torch.Tensor) else q_offset
        walked = Axis("i", offset + queries.start, len(queries)), Axis("j", 0, len(keys))
        segments = run(known.walk_keys, known.program_keys, env, *walked, tile, tile, device)
        shape = (*heads, -(-len(queries) // tile))
        each = [count.expand(shape).sum() for kind in segments for _, count in kind]
        return torch.stack(each).sum() if each else 0

    def _cut(self, x: torch.Tensor, dims: tuple[int, ...], keys: range) -> torch.Tensor:
        for dim in dims:
            if x.shape[dim] != 1:  # 1: the same for all keys
                x = x.narrow(dim, keys.start, len(keys))
        return x

    def _moved(self, expr: Expr) -> Expr:
        declared = {**expr.declared, self.start.name: self.start}
        cut = {load: self._by_row(load, declared) for load in loads(expr.sym) if load.has(J)}
        shifted = moved(Expr(expr.sym.xreplace(cut), declared), j=j + self.start)
        return Expr(shifted.sym.xreplace({_ROW: J}), declared)

    def _by_row(self, load: Any, declared: dict[str, Any]) -> Any:
        """The load from the block's part of the tensor, in the dimensions that j itself indexes."""
        inner = {x: self._by_row(x, declared) for index in load.indices for x in loads(index) if x.has(J)}
        indices = [_ROW if index == J else index.xreplace(inner) for index in load.indices]
        dims = tuple(dim for dim, index in enumerate(load.indices) if index == J)
        if not dims:
            return Load(load.args[0], *indices)
        whole = declared[load.name]
        name = next((n for n, source in self.sources.items() if source == (load.name, dims)), None)
        if name is None:
            name = self._free(f"{load.name[:50]}_of_key{'_'.join(map(str, dims)) if len(dims) > 1 else ''}")
            self._taken.add(name)
            self.sources[name] = (load.name, dims)
        declared[name] = Tensor(name, whole.ndim, whole.kind)
        return Load(declared[name].symbol, *indices)

    def _free(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        return name


def block_of(attention: CompiledAttention) -> Block:
    """The block of an attention, compiled once. SpecError for one that cannot be cut into blocks."""
    found = _BLOCKS.get(attention.handle)
    if found is None:
        found = _BLOCKS[attention.handle] = Block(attention)
    return found


_BLOCKS: dict[str, Block] = {}


def _check(spec: Spec) -> None:
    for given, what, why in (
        (spec.keys, "keys=", "a key set sorts or samples all keys, and a rank has a part of them"),
        (spec.lists, "lists=", "the lists number the tiles of the whole sequence"),
        (spec.page_size, "page_size=", "pages are of one device's cache"),
        (spec.dropout, "dropout=", "its random numbers count keys from the first one of a block"),
    ):
        if given is not None:
            raise SpecError(f"ring: a spec with {what} cannot be cut into blocks: {why}", fix=f"leave out {what}")
    if spec.reads_rows:
        raise SpecError(
            "ring: a spec with i - q_offset, the query's row, cannot be cut into blocks", fix="index by the position i"
        )
