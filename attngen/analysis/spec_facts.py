"""Facts: everything that symbolic analysis knows about one spec, each worked out when it is first asked for."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational

from attngen.analysis.call_facts import CallFacts, WalkFacts, restores
from attngen.analysis.capture_sites import CaptureSite, SinkSlope
from attngen.analysis.cost import Cost, cost
from attngen.analysis.order import ZERO, Order
from attngen.analysis.sites import sites
from attngen.analysis.walk import Walk, WalkProgram, walk_keys, walk_queries
from attngen.language.expression import (
    Erf,
    Floor,
    FloorDiv,
    Load,
    PyMod,
    Round,
    S,
    Sigmoid,
    Where,
    is_int,
    loads,
    to_text,
)
from attngen.language.programs import program_of
from attngen.language.spec import Spec

WEIGHT = sympy.Symbol("weight", real=True)  # of a listed key, added to its logit
LARGE = 2.0**13  # the size of a logit from which on a float32 lse is off by more than 0.0005
NOTICED = 2.0**7  # and from which on float32 results show it: 2^-17 of P


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of a spec for every call; parts are worked out when first asked for."""

    spec: Spec

    @cached_property
    def walk_keys(self) -> Walk:
        """A tile of queries walks the keys: the forward, and the backward of q."""
        return walk_keys(self.spec.mask)

    @cached_property
    def walk_queries(self) -> Walk:
        """A tile of keys walks the queries: the backward of k and v."""
        return walk_queries(self.spec.mask)

    def walk_of(self, kernel: str) -> Walk:
        """The walk of a kernel: "dkv" goes through queries, all others through keys."""
        return self.walk_queries if kernel == "dkv" else self.walk_keys

    @cached_property
    def program_keys(self) -> WalkProgram:
        """`walk_keys` in tile numbers, keys starting at position 0."""
        return self.walk_keys.program()

    @cached_property
    def program_queries(self) -> WalkProgram:
        """`walk_queries` in tile numbers, queries starting at position BEGIN."""
        return self.walk_queries.program()

    @cached_property
    def positive(self) -> frozenset[str]:
        """Names of int params that the analysis takes to be at least 1, because the mask divides positions by them."""
        return frozenset(symbol.name for symbol in self.walk_keys.positive | self.walk_queries.positive)

    @cached_property
    def may_be_empty(self) -> bool:
        """Whether some query, at any position, may have no key although there is one. False only if that is proved."""
        order = Order(self.walk_keys.positive)
        for interval in self.walk_keys.live:
            always = interval.when == sympy.true and self.walk_keys.exact_live
            if always and order.less_equal(interval.low, ZERO) and order.less(ZERO, interval.high):
                return False  # it holds key 0
        return True

    @cached_property
    def score_ds(self) -> Any:
        """d score / d s."""
        return self.spec.score.diff(S)

    @cached_property
    def steps(self) -> bool:
        """Whether the score or its derivative may jump at some s. What computes s must then not add a rounding of its own:
        on whole numbers it has to meet the jump exactly.
        """
        jumps = {atom for e in (self.spec.score, self.score_ds) for atom in e.atoms(*_JUMPS)}
        return any(S in atom.free_symbols for atom in jumps)

    @cached_property
    def load_grads(self) -> dict[str, tuple[tuple[Load, Any], ...]]:
        """For each float tensor in the score, its loads and d score / d load."""
        return _load_gradients(self.spec.score)

    @cached_property
    def sink_grads(self) -> dict[str, tuple[tuple[Load, Any], ...]]:
        """For each float tensor in the sink, its loads and d sink / d load."""
        return {} if self.spec.sink is None else _load_gradients(self.spec.sink)

    @property
    def learned(self) -> frozenset[str]:
        """The captured tensors that can have a gradient."""
        return frozenset({*self.load_grads, *self.sink_grads})

    def sites_of(self, name: str, deterministic: bool) -> tuple[CaptureSite, ...]:
        """Where the score loads a captured tensor. deterministic: without atomics."""
        return self._sites[deterministic].get(name, ())

    @cached_property
    def _sites(self) -> dict[bool, dict[str, tuple[CaptureSite, ...]]]:
        """By whether atomics are ruled out; every backward asks."""

        def plain(deterministic: bool, pairs: Any) -> tuple[CaptureSite, ...]:
            return tuple(site.plain(deterministic) for site in sites(pairs, deterministic))

        return {fixed: {n: plain(fixed, pairs) for n, pairs in self.load_grads.items()} for fixed in (True, False)}

    @cached_property
    def slopes(self) -> dict[str, tuple[SinkSlope, ...]]:
        """`sink_grads` as plain data."""
        return {
            name: tuple(SinkSlope(tuple(map(program_of, load.indices)), program_of(slope)) for load, slope in pairs)
            for name, pairs in self.sink_grads.items()
        }

    @cached_property
    def call(self) -> CallFacts:
        """What calls need of it, as plain data."""
        keys, queries = (
            WalkFacts(walk.summaries, walk.divisors, *walk.differ(False))
            for walk in (self.walk_keys, self.walk_queries)
        )
        certain, atomic = self._sites[True], self._sites[False]
        programs = self.program_keys.plain, self.program_queries.plain
        return CallFacts(
            keys, queries, *programs, self.positive, self.natural, self.paged, certain, atomic, self.slopes
        )

    @cached_property
    def score_terms(self) -> tuple[Any, ...]:
        """The score as a sum, with the weight of a listed key."""
        weighted = self.spec.lists is not None and "edge_weight" in self.spec.lists.names
        return sympy.Add.make_args(self.spec.score + WEIGHT if weighted else self.spec.score)

    @cached_property
    def form(self) -> str:
        """Of the logits: "folded" (s alone, which one multiply-add takes to units of log 2), "additive" (s and what does not
        depend on it) or "general".
        """
        rest = [term for term in self.score_terms if term != S]
        if not rest and (self.spec.scale is None or self.spec.scale > 0):
            return "folded"
        additive = len(rest) < len(self.score_terms) and not any(S in term.free_symbols for term in rest)
        return "additive" if additive else "general"

    @cached_property
    def natural(self) -> bool:
        """Whether kernels keep logits in their natural unit, since the score may be large whatever q and k are.

        finfo.min times log2(e) would be -inf. And beside a large logit float32 has no room for the log of a sum: what lse
        lacks there the forward leaves for the backward.
        """
        return self.form != "folded" and sum(map(_bound, self.score_terms)) >= LARGE

    @property
    def paged(self) -> bool:
        """Whether keys are in pages; then there is no backward."""
        return self.spec.page_size is not None

    def restores(self, dtype: torch.dtype) -> bool:
        """Whether the backward takes what a large lse lacks, see `attngen.analysis.call_facts.restores`."""
        return restores(self.natural, self.paged, dtype)

    def cost(self, **shape: Any) -> Cost:
        """FLOPs, bytes, exps and the speed-of-light time of a call, see `attngen.analysis.cost.cost`."""
        return cost(self, **shape)

    def __str__(self) -> str:
        return "\n".join(
            [
                str(self.walk_keys),
                str(self.walk_queries),
                f"rows without a key: {'possible' if self.may_be_empty else 'none'}",
                f"d score / d s = {to_text(self.score_ds)}",
                *(
                    f"d score / d {to_text(load)} = {to_text(slope)}"
                    for pairs in self.load_grads.values()
                    for load, slope in pairs
                ),
            ]
        )


_JUMPS = (Relational, Floor, Round, FloorDiv, PyMod)

_KNOWN: OrderedDict[str, Facts] = OrderedDict()


def facts(spec: Spec) -> Facts:
    """What analysis knows of a spec, shared by equal specs: walks (`walk_keys`, `walk_queries`), whether a row may see no key
    (`may_be_empty`), derivatives (`score_ds`), and the cost of a call (`cost(...)`). `str()` is for people.
    """
    known = _KNOWN.get(spec.key)
    if known is None:
        known = _KNOWN[spec.key] = Facts(spec)
        if len(_KNOWN) > 256:
            _KNOWN.popitem(last=False)
    return known


def _load_gradients(expr: Any) -> dict[str, tuple[tuple[Load, Any], ...]]:
    """Derivatives by each distinct load of a float tensor, all its occurrences taken together."""
    found: dict[str, list[tuple[Load, Any]]] = {}
    for load in loads(expr):
        if is_int(load):
            continue
        site = sympy.Dummy("load", real=True)
        slope = expr.xreplace({load: site}).diff(site).xreplace({site: load})
        found.setdefault(load.name, []).append((load, slope))
    return {name: tuple(pairs) for name, pairs in found.items()}


def _bound(expr: Any) -> float:
    """What a real expression is at most in size, for every value of its symbols: inf where that takes more than a look."""
    if expr.is_Number:
        return abs(float(expr))
    if isinstance(expr, (sympy.tanh, sympy.sin, sympy.cos, Sigmoid, Erf)):
        return 1.0
    if expr.is_Add:
        return sum(map(_bound, expr.args))
    if expr.is_Mul:
        return math.prod(map(_bound, expr.args))
    return max(map(_bound, expr.args[1:])) if isinstance(expr, Where) else math.inf
