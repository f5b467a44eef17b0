"""Key sets that are closed-form masks: Longformer and the A-shape. One attention, no index memory, nothing to prepare."""

from __future__ import annotations

from typing import Any

from attngen.language.keysets.tiles import Shape
from attngen.plan.planner import FAMILIES, Family, Planner
from attngen.plan.steps import Result


def plan_shape(keys: Shape, planner: Planner) -> Result:
    """One attention under the mask and the set's own condition."""

    def build() -> dict[str, Any]:
        return {"mask": planner.mask & keys.condition(), "score": planner.score}

    return planner.attend("shape", "shape", build, "q", "k", "v", offset=True)


FAMILIES[Shape] = Family(plan_shape)
