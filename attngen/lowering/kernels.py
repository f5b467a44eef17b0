"""What goes into the holes of the kernel skeletons: for each kernel, its sides, tensors, loops and printed statements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from attngen.language.expression import B, H, I, J, S, Uniform
from attngen.lowering.printer import AND, COMPARE, Axes, Place, Printer
from attngen.lowering.sides import Sides
from attngen.lowering.visits import Reader, Visits
from attngen.lowering.width import needs_64_bits

EVERYTHING: Axes = frozenset({"b", "h", "i", "j", "walk"})
LOG2E, SCALE, SCALE2 = sympy.Symbol("LOG2E", real=True), sympy.Symbol("scale"), sympy.Symbol("scale2", real=True)
WEIGHT = sympy.Symbol("weight", real=True)  # of a listed key, added to its logit


@dataclass(frozen=True)
class Step:
    """One of the two loops: its range, the statements that find the tile and its rows, and what a step computes there."""

    partial: bool
    comment: str
    variable: str
    range: str
    tile: tuple[str, ...]
    locate: tuple[str, ...]
    lines: tuple[str, ...]
    logits: str
    valid: str
    keep: str
    slope: str
    bin: str
    uses_position: bool
    uses_safe: bool


class Holes:
    """Prints a spec's expressions for one kernel. After `fill`, `program` and `head` hold what stands in front of the
    loops and `steps` the loops themselves."""

    def __init__(
        self,
        spec: Any,
        facts: Any,
        sides: Sides,
        *,
        blocks: tuple[int, int],
        offset_tensor: bool,
        names: Mapping[str, str],
        one_loop: bool = False,
        sliced: str = "",
    ) -> None:
        self.spec, self.facts, self.sides, self.names = spec, facts, sides, names
        own = sides.resident.axis
        known = frozenset({"b", own}) if sides.grouped else frozenset({"b", "h", own})
        self.program, self.head = Place(known), Place(known | {"h", "walk"})
        symbols = {p.sym: names[n] for n, p in spec.params.items()}
        trusted = {B, H, J} if offset_tensor else {B, H, I, J}  # with offsets on the device nobody has checked i
        self.printer = Printer([self.program, self.head], own, symbols, trusted, names)
        if sides.resident.packed:
            self.printer.placed[H] = frozenset(own)
        self.printer.placed[WEIGHT] = frozenset(sides.walked.axis)
        walk = facts.program_keys if sides.walked.noun == "key" else facts.program_queries
        printed = [*spec.expressions.args, *(line for _, line in walk.lines if spec.lists is None)]
        self.printer.wide = needs_64_bits(printed, frozenset(p.sym for p in spec.params.values()))
        score = spec.score + WEIGHT if spec.lists is not None and "edge_weight" in spec.lists.names else spec.score
        self.form = "general"
        rest = sympy.Add(*[term for term in sympy.Add.make_args(score) if term != S])
        if score == S and (spec.scale is None or spec.scale > 0):
            self.form = "folded"
        elif score == S + rest and S not in rest.free_symbols:
            self.form = "additive"
        terms = sympy.Add.make_args(rest if self.form == "additive" else score)
        scaled = sympy.Add(*[LOG2E * term for term in terms if term != 0])
        self.logits = S * SCALE2 + scaled if self.form == "additive" else scaled
        self.reader = Reader(spec, facts, sides, self.printer, self.head, names, blocks, one_loop, sliced)
        # With closed-form intervals only the edges are partial: a few tiles, for which a pipeline's prologue costs more
        # registers than it hides.
        self.few_partial = False
        self.boost = ""  # what a weight that survives dropout is multiplied by
        self.steps: tuple[Step, ...] = ()

    def fill(self, slope: Any = 1, site: Any = None) -> None:
        """Print the walk and the two loops. `slope`: what dS is multiplied by. `site`: a captured load whose place in
        the tensor a step needs."""
        slope, self.site = sympy.sympify(slope), site
        self.printer.share(self.spec.mask, self.logits, slope)
        full, partial = self.reader.loops()
        self.few_partial = full is not None and not self.reader.tables and self.spec.lists is None
        steps = [self._step(full, False, slope), self._step(partial, True, slope)]
        self.steps = tuple(step for step in steps if step is not None)

    def _step(self, visits: Visits | None, partial: bool, slope: Any) -> Step | None:
        if visits is None:
            return None
        bounds = visits.range
        walked = self.sides.walked
        child = self.printer.inside(EVERYTHING, exists=None if partial else walked.axis)
        valid = ""
        if partial:
            inside = child.vector("inside", walked.axis)
            valid = inside
            if self.spec.mask != sympy.true:
                valid = "valid"
                child.places[-1].lines.append(f"valid = {child.operand(self.spec.mask, AND)} & {inside}")
        logits = "" if self.form == "folded" else child.operand(self.logits, COMPARE)
        if logits and S not in self.logits.free_symbols:
            logits += " + tl.zeros_like(s)"
        keep = ""
        if self.spec.dropout is not None:
            self.boost = child.operand(1 / (1 - self.spec.dropout))
            seed = sympy.Symbol("seed", integer=True)
            keep = "keep"
            condition = child.operand(
                sympy.Ge(Uniform(seed, B, H, I, J) - self.spec.dropout, 0, evaluate=False), COMPARE
            )
            child.places[-1].lines.append(f"keep = {condition}")
        factor = "" if slope == 1 else child.operand(slope)
        place = child.flat(self.site.load, self.site.dims) if self.site is not None and self.site.dims else ""
        self.printer.used |= child.used
        noun, kind_ = walked.noun, "partial" if partial else "full"
        says = "only some pairs attend" if self.spec.mask != sympy.true else "it reaches past the end"
        return Step(
            partial=partial,
            comment=f"all {noun} tiles, with the mask"
            if self.reader.one_loop
            else f"{kind_} {noun} tiles: {says if partial else 'every pair attends, so no mask'}",
            variable=visits.variable,
            range=f"tl.range({bounds}, warp_specialize=True)"
            if self.reader.one_loop
            else f"tl.range({bounds}, num_stages=1)"
            if partial and self.few_partial
            else f"range({bounds})",
            tile=visits.find,
            locate=self.reader.locate(partial),
            lines=tuple(child.places[-1].lines),
            logits=logits,
            valid=valid,
            keep=keep,
            slope=factor,
            bin=place,
            uses_position=walked.axis in child.used,
            uses_safe=f"{walked.axis}_safe" in child.used,
        )
