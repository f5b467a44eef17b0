"""Plans: everything a call does in one direction, as a DAG of steps over named buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from attngen.plan.steps import Attend, Delta, Prepare, Step

if TYPE_CHECKING:
    import networkx

    from attngen.language.spec import Spec


@dataclass(frozen=True)
class Sizes:
    """What a plan depends on besides its spec. given: the key set's captures that a call has, each with its shape; a number
    has none. offset: "int" or "tensor", what kind of q_offset the call has.
    """

    batch: int
    heads_q: int
    heads_kv: int
    n_q: int
    n_k: int
    head_dim: int
    head_dim_v: int
    offset: str = "int"
    given: tuple[tuple[str, tuple[int, ...]], ...] = ()
    # Values that decide a plan's form: is a captured tensor of counts float, is a call's q_offset 0.
    flags: tuple[str, ...] = ()

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads_q // self.heads_kv if self.heads_kv else 1

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The first three sizes of q, k and v."""
        keys = self.batch, self.heads_kv, self.n_k
        return {"q": (self.batch, self.heads_q, self.n_q), "k": keys, "v": keys}

    def __str__(self) -> str:
        return (
            f"B{self.batch} Hq{self.heads_q} Hkv{self.heads_kv} Nq{self.n_q} Nk{self.n_k} D{self.head_dim} "
            f"Dv{self.head_dim_v}"
        )


@dataclass(frozen=True)
class Plan:
    """Steps in an order that respects their reads and writes. results: the buffers that are asked for."""

    spec: Spec
    sizes: Sizes | None
    steps: tuple[Step, ...]
    results: tuple[str, ...]
    saved: tuple[
        str, ...
    ] = ()  # buffers of the forward that the backward reads, besides inputs, preparation and results

    @classmethod
    def ordered(
        cls, spec: Spec, sizes: Sizes | None, steps: Iterable[Step], results: Iterable[str], saved: Iterable[str] = ()
    ) -> Plan:
        """Sort the steps, leave out those whose writes nobody reads; ties keep the given order."""
        results, saved = tuple(results), tuple(saved)
        steps = _needed(list(steps), {*results, *saved})
        if len({step.name for step in steps}) < len(steps):
            raise ValueError(f"two steps of one name: {[step.name for step in steps]}")
        return cls(spec, sizes, tuple(_sorted(steps)), results, saved)

    @cached_property
    def graph(self) -> networkx.MultiDiGraph:
        """Edges from the step that writes a buffer to the steps that read it, labelled with the buffer."""
        import networkx  # for who looks at a plan; a call needs none

        graph: Any = networkx.MultiDiGraph()
        for step in self.steps:
            graph.add_node(step.name, step=step)
        graph.add_edges_from((before, after, {"buffer": buffer}) for before, after, buffer in _edges(self.steps))
        return graph

    @cached_property
    def made(self) -> dict[str, Step]:
        """The (first) step that writes each buffer."""
        found: dict[str, Step] = {}
        for step in self.steps:
            for buffer in step.writes:
                found.setdefault(buffer, step)
        return found

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Buffers that steps read and none writes: a call has to bring them."""
        return tuple(dict.fromkeys(b for step in self.steps for b in step.reads if b not in self.made))

    @cached_property
    def attends(self) -> tuple[Attend, ...]:
        """The ordinary attentions it is made of."""
        return tuple(step for step in self.steps if isinstance(step, Attend))

    def attend(self, name: str) -> Attend:
        """The `Attend` of this name, in whichever direction the plan is."""
        return next(step for step in self.attends if step.name in (name, f"{name}, backward"))

    @cached_property
    def preparation(self) -> tuple[Prepare, ...]:
        """The steps that `attn.prepare` runs once for many calls."""
        return tuple(step for step in self.steps if isinstance(step, Prepare) and not step.each_call)

    @cached_property
    def prepared(self) -> tuple[str, ...]:
        """What they leave for the others."""
        own = {step.name for step in self.preparation}
        read = {b for step in self.steps if step.name not in own for b in step.reads} | {*self.results, *self.saved}
        return tuple(b for step in self.preparation for b in step.writes if b in read)

    @cached_property
    def released(self) -> dict[str, tuple[str, ...]]:
        """After which step each buffer made by the plan is needed no more."""
        last = {buffer: step.name for step in self.steps for buffer in (*step.reads, *step.writes)}
        keep = {*self.results, *self.saved, *self.prepared}
        return {
            step.name: tuple(b for b in sorted(self.made.keys() - keep) if last[b] == step.name) for step in self.steps
        }

    @cached_property
    def course(self) -> tuple[tuple[Step, bool, tuple[str, ...]], ...]:
        """What an executor goes through: each step, whether it may be done already, and what is needed no more after it."""
        return tuple(
            (step, isinstance(step, Prepare) and not isinstance(step, Delta), self.released[step.name])
            for step in self.steps
        )

    def text(self, about: Mapping[str, str] = {}) -> str:
        """One line a step; `about`: what else is known of a step, by name, for the lines under it."""
        lines = []
        for step in self.steps:
            lines.append(str(step))
            lines += [f"{'':<16}{line}" for line in about.get(step.name, "").splitlines()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def _needed(steps: list[Step], wanted: set[str]) -> list[Step]:
    """The steps that something asked for depends on. A step that adds to a buffer another one made counts for it."""
    writers: dict[str, list[Step]] = {}
    for step in steps:
        for buffer in step.writes:
            writers.setdefault(buffer, []).append(step)
    kept, open_ = set[str](), list(wanted)
    while open_:
        for step in writers.pop(open_.pop(), ()):
            if step.name not in kept:
                kept.add(step.name)
                open_ += step.reads
    return [step for step in steps if step.name in kept]


def _sorted(steps: list[Step]) -> list[Step]:
    """In an order that respects `_edges`; of those that could be next the one that was given first."""
    position = {step.name: place for place, step in enumerate(steps)}
    sorter = TopologicalSorter[int](dict.fromkeys(range(len(steps)), ()))
    for before, after, _ in _edges(steps):
        sorter.add(position[after], position[before])
    sorter.prepare()
    ready, order = list[int](), []
    while sorter.is_active():
        for place in sorter.get_ready():
            heappush(ready, place)
        place = heappop(ready)
        order.append(steps[place])
        sorter.done(place)
    return order


def _edges(steps: Iterable[Step]) -> Iterator[tuple[str, str, str]]:
    """(before, after, buffer). Where several steps write one buffer, each adds to it: the later ones come after the earlier ones."""
    writers: dict[str, list[str]] = {}
    steps = list(steps)
    for step in steps:
        for buffer in step.writes:
            for earlier in writers.setdefault(buffer, []):
                yield earlier, step.name, buffer
            writers[buffer].append(step.name)
    for step in steps:
        for buffer in step.reads:
            for writer in writers.get(buffer, ()):
                if writer != step.name:
                    yield writer, step.name, buffer
