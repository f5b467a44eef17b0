"""What planners write plans with. A planner turns a key set's declaration into steps; it runs nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attngen.analysis.call_facts import facts_of
from attngen.language import expression
from attngen.language.call import Call, bind
from attngen.language.keyset import KeySet
from attngen.language.programs import evaluate, tensor_of
from attngen.plan.moves import Move
from attngen.plan.plan import Sizes
from attngen.plan.steps import Attend, Derive, Difference, Merge, Part, Prepare, Put, Result, Step, Tables, Take

if TYPE_CHECKING:
    from attngen.language.expression import Expr, Tensor
    from attngen.language.spec import Spec


Build = Callable[[], dict[str, Any]]


class Planner:
    """Collects the steps of one spec's call. Buffers that it makes get `prefix`, so that the pieces of a union keep apart."""

    def __init__(self, spec: Spec, sizes: Sizes, backend: str, prefix: str = "", steps: list[Step] | None = None):
        self.spec, self.sizes, self.backend, self.prefix = spec, sizes, backend, prefix
        self.steps: list[Step] = [] if steps is None else steps
        self._taken = {*spec.tensors, *spec.params}
        self._inputs = {"q", "k", "v", "q_offset", *self._taken, *(name for name, _ in sizes.given)}
        self._each_call: set[str] = set()  # buffers that a preparation cannot hold

    def piece(self, spec: Spec, prefix: str) -> Planner:
        """A planner for a member of a union, whose steps join this one's."""
        return Planner(spec, self.sizes, self.backend, self.prefix + prefix, self.steps)

    # -- steps --------------------------------------------------------------------------------------------------------

    def prepare(
        self,
        name: str,
        make: Callable[[Call, Mapping[str, Any]], dict[str, Any]],
        reads: Sequence[str],
        writes: Sequence[str],
        params: Sequence[str] = (),
    ) -> dict[str, str]:
        """Index tensors, once for many calls. Returns the buffer of each name that `make` returns."""
        buffers = {write: self._buffer(write) for write in writes}
        own = self.spec

        def run(call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
            found = make(call.of(own), given)
            return {buffers[write]: found[write] for write in writes}

        self._add(Prepare(self.prefix + name, tuple(reads), tuple(buffers.values()), make=run, params=tuple(params)))
        return buffers

    def derive(
        self, name: str, make: Callable[..., tuple[Any, ...]], reads: Sequence[str], writes: Sequence[str]
    ) -> tuple[str, ...]:
        """Differentiable operations of every call. Returns the buffers of `writes`."""
        buffers = tuple(self._buffer(write) for write in writes)
        self._each_call |= {*buffers}
        self._add(Derive(self.prefix + name, tuple(reads), buffers, make=make))
        return buffers

    def take(self, name: str, x: str, move: Move, index: str | None = None) -> str:
        """Rows of a buffer. Returns the buffer they are in."""
        buffer = self.prefix + name
        self._each_call.add(buffer)
        self._add(Take(f"take {buffer}", (x,) if index is None else (x, index), (buffer,), move=move))
        return buffer

    def attend(
        self,
        name: str,
        role: Any,
        build: Build | None,
        q: str,
        k: str,
        v: str,
        captures: Mapping[str, str] | None = None,
        *,
        offset: bool = False,
        looks: bool = False,
    ) -> Result:
        """One ordinary attention. `build` makes the parts of its spec (mask, score, and if it has them lists, page_size, sink)
        once per `role`, a hashable that says everything `build` depends on besides the spec; None: the spec itself.
        captures: of the tensors declared with `tensor`, and of lists, the buffer of each. offset, looks: see `Attend`.
        """
        inner = self.spec if build is None else self._inner(role, build)
        # What positions do not prove has to be looked at, whatever rows the key set moved.
        looks = looks or bool(self.spec.doubtful(self.sizes.offset == "tensor", sink=False))
        local = {self._free(own): buffer for own, buffer in (captures or {}).items()}
        named = tuple((tensor, local.get(tensor, tensor)) for tensor in inner.tensors)
        step = self.prefix + name
        result = Result(f"{step}.out", f"{step}.lse")
        tables = tables_of(step, inner, named, "forward", self._each_call, (q, k, v))
        reads = (q, k, v, *(buffer for _, buffer in named))
        if tables is not None:
            self._add(tables)
            reads += tables.writes
        reads += ("q_offset",) if offset and self.sizes.offset == "tensor" else ()
        self._each_call |= {*result}
        self._add(
            Attend(
                step,
                tuple(dict.fromkeys(reads)),
                result,
                spec=inner,
                operands=(q, k, v),
                captures=named,
                offset=offset,
                looks=looks,
                tables=() if tables is None else (tables.named,),
            )
        )
        return result

    def sink(self, make: Callable[..., tuple[Any, ...]] | None = None, reads: Sequence[str] = ()) -> str:
        """The buffer of the spec's sink's logits [B, Hq, Nq]. make: how, if rows are not positions."""
        own, captures = self.spec, self.spec.sink_reads
        (buffer,) = self.derive(
            "sink logits",
            partial(make or sink_logits, own, captures),
            (*captures, *reads),
            ("sink logits",),
        )
        return buffer

    def put(self, name: str, result: Result, move: Move, index: str | None, shape: tuple[int, ...]) -> Result:
        """A result's rows in their places among `shape` = (B, H, N); rows that nobody fills see no key."""
        written = Result(f"{self.prefix}{name}.out", f"{self.prefix}{name}.lse")
        reads = (*result,) if index is None else (*result, index)
        self._add(Put(self.prefix + name, reads, written, move=move, shape=shape))
        return written

    def merge(
        self, *results: Result | Part, rows: int | None = None, sink: str | None = None, name: str = "merge"
    ) -> Result:
        """The union of disjoint key sets; parts may have some of the `rows` (None: all queries) of a head."""
        parts = tuple(part if isinstance(part, Part) else Part(part) for part in results)
        if len(parts) == 1 and parts[0].rows is None and parts[0].shift is None and sink is None:
            return parts[0].result
        written = Result(f"{self.prefix}{name}.out", f"{self.prefix}{name}.lse")
        reads = [b for part in parts for b in (*part.result, part.rows, part.shift) if b is not None]
        reads += [] if sink is None else [sink]
        length = self.sizes.n_q if rows is None else rows
        self._add(Merge(self.prefix + name, tuple(dict.fromkeys(reads)), written, parts=parts, rows=length, sink=sink))
        return written

    def difference(self, name: str, firsts: Sequence[str], lse: str, factor: str) -> Result:
        """out = first - factor * second, see `attngen.plan.steps.Difference`."""
        written = Result(f"{self.prefix}{name}.out", f"{self.prefix}{name}.lse")
        self._add(Difference(self.prefix + name, (*firsts, factor, lse), written, lse=lse))
        return written

    # -- inner specs --------------------------------------------------------------------------------------------------

    def tensor(self, name: str, ndim: int, dtype: torch.dtype | None = torch.int32) -> Tensor:
        """Declare a captured tensor of an inner spec, renamed if the spec has that name."""
        return expression.Tensor(self._free(name), ndim, dtype)

    @property
    def mask(self) -> Expr:
        return mask_of(self.spec)

    @property
    def score(self) -> Expr:
        return expression.Expr(self.spec.score, {**self.spec.tensors, **self.spec.params})

    @property
    def mask_reads(self) -> tuple[str, ...]:
        """Names of the captured tensors that the mask reads."""
        return self.spec.mask_reads

    @property
    def mask_params(self) -> tuple[str, ...]:
        return self.spec.mask_params

    def _inner(self, role: Any, build: Build) -> Spec:
        return inner_spec(self.spec, role, build)

    def _free(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        return name

    def _buffer(self, name: str) -> str:
        """A name for what a step makes, which no capture of the call has."""
        name = self.prefix + name
        while name in self._inputs:
            name += " checked"
        return name

    def _add(self, step: Step) -> None:
        self.steps.append(step)


def inner_spec(spec: Spec, role: Any, build: Build) -> Spec:
    """The spec of an attention that a call of `spec` is made of. build: its parts, once per `role`, a hashable that says everything
    they depend on besides the spec. A spec that came with its inner ones builds none.
    """
    if spec.inner is not None:
        return spec.inner[repr(role)]
    key = spec.key, role
    found = _INNER.get(key)
    if found is None:
        declared = {**spec.tensors, **spec.params}
        parts = {"scale": spec.scale, "name": spec.name, **build()}
        for part in ("mask", "score", "sink"):
            if parts.get(part) is not None:
                parts[part] = expression.Expr(parts[part].sym, {**declared, **parts[part].declared})
        found = _INNER.setdefault(key, type(spec)(**parts))  # pins are the compiled attention's
        if len(_INNER) > MOST_INNER:
            _INNER.pop(next(iter(_INNER)), None)
    return found


def mask_of(spec: Spec) -> Expr:
    """The mask, to build others with."""
    return expression.Expr(spec.mask, {**spec.tensors, **spec.params})


def inner_specs(spec: Spec) -> dict[str, Spec]:
    """Those that calls of a spec had so far, by the text of their role."""
    return {repr(role): inner for (key, role), inner in list(_INNER.items()) if key == spec.key}


def forget_inner(spec: Spec) -> None:
    """What `inner_specs` finds are then those of calls that are planned from now on."""
    for key in list(_INNER):
        if key[0] == spec.key:
            _INNER.pop(key, None)


_INNER: dict[Any, Spec] = {}  # equal whoever makes them, so that threads may
MOST_INNER = 1024


def tables_of(
    attend: str,
    spec: Spec,
    captures: Sequence[tuple[str, str]],
    kernel: str,
    each_call: set[str],
    operands: Sequence[str],
) -> Tables | None:
    """The step that makes the tables of a kernel's walk; None for a walk that needs none. Those of data that every call makes
    anew come after the operands, whose sizes they need.
    """
    walk = facts_of(spec).walk_of(kernel)
    if spec.lists is not None or not walk.needs_tables:
        return None
    symbols = walk.symbols
    reads = tuple(dict.fromkeys(buffer for name, buffer in captures if name in spec.mask_reads))
    each = bool({*reads} & each_call)
    return Tables(
        f"tables of {attend} ({kernel})",
        (*reads, *operands) if each else reads,
        tuple(f"{attend}: {symbol} of {kernel}" for symbol in symbols),
        params=spec.mask_params,
        attend=attend,
        kernel=kernel,
        symbols=symbols,
        each_call=each,
    )


def sink_logits(spec: Spec, names: Sequence[str], call: Call, *values: torch.Tensor) -> tuple[torch.Tensor]:
    """The sink of every row, [B, Hq, Nq] in lse's dtype."""
    device, (batch, heads, rows, _) = call.q.device, call.q.shape
    real = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    env: dict[str, Any] = {**call.params, **dict(zip(names, values, strict=True))}
    env |= {"b": torch.arange(batch, device=device).view(-1, 1, 1)}
    env |= {"h": torch.arange(heads, device=device).view(1, -1, 1)}
    env |= {"i": torch.arange(rows, device=device) + call.offset_column, "q_offset": call.offset_column}
    return (tensor_of(evaluate(spec.sink, env, real=real), device).to(real).expand(batch, heads, rows),)


# -- the registry -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """How calls with a kind of key set are planned. plan(keys, planner) -> the result. bind(keys, spec, q, k, v, q_offset,
    captures, given) -> the checked call, for k and v with a layout of their own. read(keys, given, q, k) -> the key set's
    captures as tensors and numbers. flags(keys, call, given): values that decide the plan's form.
    """

    plan: Callable[[Any, Planner], Result]
    bind: Callable[..., Call] | None = None
    read: Callable[..., dict[str, Any]] | None = None
    flags: Callable[..., tuple[str, ...]] | None = None


FAMILIES: dict[type[KeySet], Family] = {}
MODULES = (  # of `attngen.plan.keysets`
    "graph",
    "hyper",
    "layouts",
    "listed",
    "paged",
    "permuted",
    "prefix",
    "pruned",
    "ragged",
    "shapes",
    "slashes",
    "sparse_k",
    "tiles",
    "union",
)


def family_of(keys: KeySet) -> Family:
    """The planner of a key set."""
    if not any(kind in FAMILIES for kind in type(keys).__mro__):
        register_families()
    return next(FAMILIES[kind] for kind in type(keys).__mro__ if kind in FAMILIES)


def register_families() -> None:
    """Import all planners. For whoever has a key set and may be traced later: nobody can import then."""
    for module in MODULES:  # they register themselves
        importlib.import_module(f"{__package__}.keysets.{module}")


def bound(
    spec: Spec,
    keys: KeySet | None,
    q: Any,
    k: Any,
    v: Any,
    q_offset: Any,
    captures: Any,
    given: Any,
    values: bool = True,
) -> Call:
    """The checked call; `values`: look at the values of indices too. InputError."""
    own = None if keys is None else family_of(keys).bind
    if own is not None:
        return own(keys, spec, q, k, v, q_offset, captures, given)
    return bind(spec, q, k, v, q_offset=q_offset, captures=captures, values=values)
