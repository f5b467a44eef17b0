"""The six kinds of step that a call is made of. A step names the buffers it reads and writes, and says what happens to them;
who runs it (`attngen.runtime.executor`) knows no key set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from attngen.plan.moves import Move

if TYPE_CHECKING:
    from attngen.language.spec import Spec


# What a backward reads of the call as a whole, and its delta. No capture has a name like these.
OUT, LSE, DO, DLSE, DELTA = "the out", "the lse", "the do", "the dlse", "the delta"


class Result(NamedTuple):
    """The buffers of a finished softmax state: out [B, H, N, Dv] and lse [B, H, N]."""

    out: str
    lse: str


class Given(NamedTuple):
    """What the backward knows of a result's rows: dO and delta = rowsum(dO * O) - dlse of the whole attention, both times the
    share that the whole takes of the result, and the result's own lse.
    """

    do: str
    lse: str
    delta: str


@dataclass(frozen=True, eq=False)
class Step:
    """name: what it is called in a plan. reads, writes: buffers; captures, q, k and v are buffers too."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    kind = "step"

    def __str__(self) -> str:
        return f"{self.kind:<15} {self.name}: {', '.join(self.reads) or 'sizes'} -> {', '.join(self.writes)}"


@dataclass(frozen=True, eq=False)
class Prepare(Step):
    """Sort, hash, sample, list: `make(call, given) -> {buffer: tensor}`, where `call` is the checked call and `given` the key
    set's captures by name. What it makes serves every call of the same sizes with the same `reads` (`attn.prepare`), so
    nothing here gets a gradient.
    """

    make: Callable[..., Any] = field(repr=False, default=lambda call, given: {})
    params: tuple[str, ...] = ()  # what it was made for besides: the values of these params of the spec
    each_call: bool = False  # it reads what every call makes anew

    kind = "Prepare"


@dataclass(frozen=True, eq=False)
class Tables(Prepare):
    """Summaries of captured data for the walks of one `Attend`: where a query tile finds its key tiles (kernel "forward" or
    "dq"), or a key tile its queries ("dkv").
    """

    attend: str = ""
    kernel: str = "forward"
    symbols: tuple[str, ...] = ()  # what the walk calls each of `writes`

    @property
    def named(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """(kernel, (symbol, buffer) of each table), as an `Attend` has it."""
        return self.kernel, tuple(zip(self.symbols, self.writes, strict=True))


@dataclass(frozen=True, eq=False)
class Derive(Prepare):
    """Differentiable operations of every call: `make(call, *reads) -> tensors`, one for each of `writes`. The backward runs
    them again to differentiate them.
    """

    make: Callable[..., Any] = field(repr=False, default=lambda call: ())
    each_call: bool = True


@dataclass(frozen=True, eq=False)
class Delta(Prepare):
    """delta = rowsum(dO * O) - dlse of the whole attention. reads: out, do, dlse, which may be None for 0."""

    each_call: bool = True


@dataclass(frozen=True, eq=False)
class Take(Step):
    """Rows of `reads[0]`; reads[1], if there is one, is the index. For several: see `moved`."""

    move: Move = field(repr=False, default=None)  # type: ignore[assignment]
    fills: tuple[float, ...] = (0.0,)  # one for each buffer that is moved

    kind = "Take"

    @property
    def moved(self) -> tuple[str, ...]:
        """The buffers whose rows are taken, one for each of `writes`."""
        return self.reads[: len(self.writes)]

    @property
    def index(self) -> str | None:
        return self.reads[len(self.writes)] if len(self.reads) > len(self.writes) else None


@dataclass(frozen=True, eq=False)
class Attend(Step):
    """One ordinary attention: an inner spec on buffers q, k, v. captures: the inner spec's tensors, and which buffer each is.
    offset: whether its queries have the call's q_offset (else rows are positions). looks: whether indices into its captures are
    looked at here, because they depend on what was prepared; those of rows that a key set moved are trusted.

    direction "forward" writes out and lse (and with `store` the weights); "backward" reads do, lse, delta and writes dq, dk,
    dv and the gradients of `wanted` captures.
    """

    spec: Spec = field(repr=False, default=None)  # type: ignore[assignment]
    operands: tuple[str, str, str] = ("q", "k", "v")
    captures: tuple[tuple[str, str], ...] = ()
    offset: bool = False
    looks: bool = False
    direction: str = "forward"
    wanted: tuple[str, ...] = ()
    given: Given | None = None  # of a backward: where it reads dO, lse and delta
    # By kernel, the buffer of each of the walk's tables.
    tables: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()

    kind = "Attend"


class Part(NamedTuple):
    """A result that joins a merge: with the rows (an index buffer) it has, None for all; shift: a buffer of what is added to
    its lse, the log-weight that all keys of a row have in common.
    """

    result: Result
    rows: str | None = None
    shift: str | None = None


@dataclass(frozen=True, eq=False)
class Merge(Step):
    """The attention over the union of disjoint key sets, from the result of each (`attngen.plan.merging`). rows: how many a head
    has. sink: a buffer of logits [B, H, rows] that join as one more key of value 0.
    """

    parts: tuple[Part, ...] = ()
    rows: int = 0
    sink: str | None = None

    kind = "Merge"


@dataclass(frozen=True, eq=False)
class Put(Step):
    """Rows back in their places: a result's (fills 0 and -inf, `length` rows a head), or, where `into` says which tensor they
    were taken from, added to its gradient.
    """

    move: Move = field(repr=False, default=None)  # type: ignore[assignment]
    shape: tuple[int, ...] = ()
    into: str | None = None

    kind = "Put"

    @property
    def index(self) -> str | None:
        moved = 1 if self.into is not None else len(self.writes)
        return self.reads[moved] if len(self.reads) > moved else None


@dataclass(frozen=True, eq=False)
class CaptureGradient(Step):
    """Gradients of captured data: of what a `Derive` read, by differentiating it; without one, of a sink's logits, from
    (its share, delta): a key of value 0, whose dS is P * (0 - delta). made: the derivation's writes that the first of
    `reads` are the gradients of, before what it read itself; wanted: those of its reads that get one, in the order of `writes`.
    """

    derive: Derive | None = None
    made: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()

    kind = "CaptureGradient"


@dataclass(frozen=True, eq=False)
class Difference(Step):
    """out = first - factor * second, for values that depend on the pair: sum P (a_j - c_i) v_j is the difference of two
    attentions under the same weights. reads: (first, factor), first [*, 2 Dv] with both side by side; or (first, second,
    factor). lse: the result's. The factor [B, H, N] gets a gradient.
    """

    lse: str = ""

    kind = "Put"
