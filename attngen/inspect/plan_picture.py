"""A plan as a picture: its steps as boxes, from left to right in the order of what they wait for, arrows where a buffer goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import networkx

from attngen.plan.plan import Plan

COLORS = {
    "Prepare": "#f2e6c9",
    "Take": "#d7e8d2",
    "Attend": "#b9d3ee",
    "Merge": "#e3d4ec",
    "Put": "#d7e8d2",
    "CaptureGradient": "#f0d0cd",
}
WIDTH = 26  # characters of a line in a box
HALF = 0.37  # from the middle of a box to where arrows start and end, in columns


def draw(plans: Mapping[str, Plan], path: str | Path) -> None:
    """Draw plans below each other into a PNG file. plans: by title, such as "forward" and "backward"."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    layouts = {title: _layout(plan) for title, plan in plans.items()}
    heights = [max(3, *(len(column) for column in columns)) for columns in layouts.values()]
    width = max(len(columns) for columns in layouts.values())
    figure, axes = plt.subplots(
        len(plans),
        1,
        figsize=(2.2 * width, 0.42 * sum(heights) + 0.8 * len(plans)),
        height_ratios=heights,
        squeeze=False,
        dpi=130,
    )
    for axis, (title, plan) in zip(axes[:, 0], plans.items(), strict=True):
        _draw_one(axis, plan, layouts[title], width)
        axis.set_title(title, fontsize=11, loc="left")
    handles = [Patch(facecolor=color, edgecolor="#555555", label=kind) for kind, color in COLORS.items()]
    figure.legend(handles=handles, loc="lower center", ncol=len(COLORS), frameon=False, fontsize=8)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _layout(plan: Plan) -> list[list[str]]:
    """Columns of what stands below each other: inputs, then steps by how many others they wait for, then results."""
    graph = networkx.DiGraph(plan.graph)
    columns = [list(names) for names in networkx.topological_generations(graph)]
    return [[f"input {name}" for name in plan.inputs], *columns, [f"result {name}" for name in plan.results]]


def _draw_one(axis: Any, plan: Plan, columns: list[list[str]], width: int) -> None:
    places: dict[str, tuple[float, float]] = {}
    for across, column in enumerate(columns):
        for down, name in enumerate(column):
            places[name] = float(across), (len(column) - 1) / 2 - down
    kinds = {step.name: step.kind for step in plan.steps}
    for source, target in dict.fromkeys(edge[:2] for edge in _edges(plan)):
        (x0, y0), (x1, y1) = places[source], places[target]
        bent = "arc3,rad=0.08" if abs(x0 - x1) > 1.5 else "arc3,rad=0"
        arrow = dict(arrowstyle="-|>", color="#999999", lw=0.7, shrinkA=0, shrinkB=0, connectionstyle=bent)
        axis.annotate("", (x1 - HALF, y1), (x0 + HALF, y0), arrowprops=arrow, zorder=1)
    for name, (x, y) in places.items():
        kind = kinds.get(name)
        text = name.partition(" ")[2] if kind is None else fill(name, WIDTH)
        box = dict(boxstyle="round,pad=0.3", facecolor=COLORS.get(kind or "", "#ffffff"), edgecolor="#555555", lw=0.8)
        axis.text(x, y, text, fontsize=6.5, ha="center", va="center", bbox=box, zorder=3)
    tallest = max(len(column) for column in columns)
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(-tallest / 2 - 0.2, tallest / 2 + 0.2)
    axis.axis("off")


def _edges(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """(from, to, buffer), each once."""
    seen = set()
    for step in plan.steps:
        for buffer in step.reads:
            made = plan.made.get(buffer)
            edge = (f"input {buffer}" if made is None else made.name), step.name, buffer
            if edge not in seen and edge[0] != step.name:
                seen.add(edge)
                yield edge
    for name in plan.results:
        if name in plan.made:
            yield plan.made[name].name, f"result {name}", name
