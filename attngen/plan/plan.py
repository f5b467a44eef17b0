"""Plans: the launches of one direction as a DAG over named buffers.

Today's plans are short: summaries of captured data, the kernels, gradients of captures. Preparation (sorting, sampling),
several pieces and merges are more steps of the same kind; whoever runs a plan needs to know only a step's `kind`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import networkx

from attngen.analysis import Facts
from attngen.language.spec import Spec


@dataclass(frozen=True)
class Step:
    """One launch. kind: "tables" (torch operations that summarise captured data), "runs" (torch operations that share out
    the tiles, see `balance`), "kernel" (a generated one), or "capture" (a generated kernel for each load of a captured
    tensor, and torch operations that add up what they leave).
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}): {', '.join(self.reads)} -> {', '.join(self.writes)}"


@dataclass(frozen=True)
class Plan:
    """Steps in an order that respects their reads and writes."""

    steps: tuple[Step, ...]
    results: tuple[str, ...]

    @classmethod
    def ordered(cls, steps: Iterable[Step], results: Iterable[str]) -> Plan:
        """Sort the steps; ties keep the given order."""
        steps = list(steps)
        position = {step.name: place for place, step in enumerate(steps)}
        by_name = {step.name: step for step in steps}
        graph = _graph(steps)
        order = networkx.lexicographical_topological_sort(graph, key=position.__getitem__)
        return cls(tuple(by_name[name] for name in order), tuple(results))

    @cached_property
    def graph(self) -> networkx.DiGraph:
        """Edges from the step that writes a buffer to the steps that read it, labelled with the buffer."""
        return _graph(self.steps)

    @cached_property
    def released(self) -> dict[str, tuple[str, ...]]:
        """After which step each buffer made by the plan is needed no more."""
        made = {buffer for step in self.steps for buffer in step.writes}
        last = {buffer: step.name for step in self.steps for buffer in (*step.reads, *step.writes)}
        keep = set(self.results)
        return {step.name: tuple(b for b in sorted(made - keep) if last[b] == step.name) for step in self.steps}

    def __str__(self) -> str:
        return "\n".join(str(step) for step in self.steps)


def forward_plan(spec: Spec, facts: Facts, split: int | str | None = None) -> Plan:
    """Tables if the mask reads data, then the forward kernel; with a split, for stream-K who computes what before it, and
    the merge of the partial states behind it.
    """
    captures = (*spec.tensors,)
    steps = []
    tables: tuple[str, ...] = ()
    if spec.lists is None and facts.walk_keys.needs_tables:
        tables = ("tables of forward",)
        steps.append(Step("tables of forward", "tables", captures, tables))
    reads, states = ("q", "k", "v", *captures, *tables), ("states", "maxima")
    if split in (None, 1):
        steps.append(Step("forward", "kernel", reads, ("out", "lse")))
        return Plan.ordered(steps, ("out", "lse"))
    runs: tuple[str, ...] = ()
    if split == "stream":
        runs = ("starts", "begins", "firsts", "owners")
        steps.append(Step("equal runs of tiles", "runs", (*captures, *tables), runs))
    steps.append(Step("forward", "kernel", (*reads, *runs), states))
    steps.append(Step("merge", "kernel", (*states, *captures, *runs), ("out", "lse")))
    return Plan.ordered(steps, ("out", "lse"))


def backward_plan(spec: Spec, facts: Facts, wanted: Iterable[str]) -> Plan:
    """delta, then the two passes, and for each wanted capture a pass of its own; no atomics between them."""
    captures = (*spec.tensors,)
    shared = ("q", "k", "v", "do", "lse", "delta", *captures)
    steps = [Step("delta", "kernel", ("out", "do", "dlse"), ("delta",))]
    if facts.natural:  # it may have to sum P again
        read = ("tables of dq",) if spec.lists is None and facts.walk_keys.needs_tables else ()
        shared = ("excess", *shared)
        steps = [Step("delta", "kernel", ("out", "do", "dlse", "q", "k", "lse", *captures, *read), ("delta", "excess"))]
    for kernel, walk, results in (
        ("dq", facts.walk_keys, ("dq",)),
        ("dkv", facts.walk_queries, ("dk", "dv")),
    ):
        tables: tuple[str, ...] = ()
        if spec.lists is None and walk.needs_tables:
            tables = (f"tables of {kernel}",)
            steps.append(Step(tables[0], "tables", captures, tables))
        steps.append(Step(kernel, "kernel", (*shared, *tables), results))
    made = tuple(buffer for step in steps if step.kind == "tables" for buffer in step.writes)
    steps.extend(Step(f"gradient of {name}", "capture", (*shared, *made), (f"d {name}",)) for name in wanted)
    return Plan.ordered(steps, ("dq", "dk", "dv", *(f"d {name}" for name in wanted)))


def _graph(steps: Iterable[Step]) -> networkx.DiGraph:
    graph = networkx.DiGraph()
    writer = {buffer: step.name for step in steps for buffer in step.writes}
    for step in steps:
        graph.add_node(step.name)
        for buffer in step.reads:
            if buffer in writer:
                graph.add_edge(writer[buffer], step.name, buffer=buffer)
    return graph
