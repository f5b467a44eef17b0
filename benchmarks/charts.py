"""Charts from the files that `python -m benchmarks` writes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import OK
from benchmarks.paper_tables import panels

Data = Mapping[str, Any]
Row = Mapping[str, Any]  # a record as the file has it

COLOURS = {
    "attngen": "#d6336c",
    "attngen-dense": "#faa2c1",
    "attngen-no-split": "#ffc9c9",
    "attngen-split-8": "#ff8787",
    "attngen-stream": "#c92a2a",
    "attngen-paged": "#9c36b5",
    "attngen-tma": "#ff8787",
    "attngen-warp-specialize": "#c92a2a",
    "attngen-persistent": "#ffc9c9",
    "attngen-by-head": "#9c36b5",
    "flex": "#1971c2",
    "flex-max-autotune": "#74c0fc",
    "sdpa": "#2f9e44",
    "sdpa-cudnn": "#2f9e44",
    "sdpa-flash": "#e8590c",
    "sdpa-efficient": "#ae3ec9",
    "sdpa-math": "#868e96",
    "flashinfer": "#f59f00",
    "cudnn-flex": "#087f5b",
    "create_block_mask": "#1971c2",
    "create_block_mask-compiled": "#74c0fc",
    "dense-mask": "#868e96",
}


def chart(data: Data, path: Path) -> bool:
    """A panel for each paper; lines over the length where a group of cases has several; else a row of dots a case. False if
    nothing was timed.
    """
    import matplotlib

    matplotlib.use("Agg")
    timed = [r for r in data["records"] if r["status"] == OK]
    if not timed:
        return False
    lengths: dict[str, set[int]] = {}
    for r in timed:
        lengths.setdefault(r["described"]["group"], set()).add(r["described"]["n_k"])
    if all(r["described"].get("table") for r in timed):
        _panels(data, timed, path)
    elif data["suite"] == "dense" and all(len(found) > 1 for found in lengths.values()):
        _lines(data, timed, list(lengths), path)
    else:
        _dots(data, timed, path)
    return True


def _title(figure: Any, data: Data, what: str) -> None:
    setting = data["setting"]
    figure.suptitle(
        f"{data['suite']}: {what}\n{setting['device']}, torch {setting['torch']}, triton {setting['triton']}, {setting['size']} sizes",
        fontsize=10,
    )


def _lines(data: Data, timed: list[Row], groups: list[str], path: Path) -> None:
    import matplotlib.pyplot as plt

    across = min(4, len(groups))
    down = math.ceil(len(groups) / across)
    figure, panels = plt.subplots(
        down, across, figsize=(1 + 3.4 * across, 1.2 + 2.6 * down), squeeze=False, layout="constrained"
    )
    for panel, group in zip(panels.flat, groups, strict=False):
        of_group = [r for r in timed if r["described"]["group"] == group]
        for peer in _peers(of_group):
            points = sorted(
                (
                    r["described"]["n_k"],
                    *(r["figure"] * r["timing"]["median"] / r["timing"][p] for p in ("median", "p80", "p20")),
                )
                for r in of_group
                if r["peer"] == peer
            )
            x, y, low, high = zip(*points, strict=True)
            wide = 2.4 if peer == "attngen" else 1.2
            panel.plot(x, y, color=COLOURS.get(peer), linewidth=wide, marker="o", markersize=3, label=peer)
            panel.fill_between(x, low, high, color=COLOURS.get(peer), alpha=0.15, linewidth=0)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted({r["described"]["n_k"] for r in of_group}))
        panel.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_title(group, fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(groups) :]:
        panel.remove()
    shown: dict[str, Any] = {}
    for panel in panels.flat[: len(groups)]:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(6, len(shown)), fontsize=8)
    figure.supylabel(f"{timed[0]['unit']} over the sequence length", fontsize=8)
    _title(figure, data, f"{timed[0]['unit']} on attended pairs, higher is better")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panels(data: Data, timed: list[Row], path: Path) -> None:
    """Time over the columns of each paper's table."""
    import matplotlib.pyplot as plt

    found = panels(timed)
    across = min(3, len(found))
    down = math.ceil(len(found) / across)
    figure, axes = plt.subplots(
        down, across, figsize=(1 + 4.6 * across, 1 + 3.2 * down), squeeze=False, layout="constrained"
    )
    for panel, (title, columns, lines) in zip(axes.flat, found, strict=False):
        others = iter(plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
        for peer in sorted(lines, key=lambda name: (name != "attngen", name not in COLOURS)):
            places = [place for place, column in enumerate(columns) if column in lines[peer]]
            times = [lines[peer][column] for column in columns if column in lines[peer]]
            y = [1e3 * t["median"] for t in times]
            spread = [[1e3 * abs(t[p] - t["median"]) for t in times] for p in ("p20", "p80")]
            panel.errorbar(
                places, y, yerr=spread, color=COLOURS.get(peer) or next(others), marker="o", markersize=3, capsize=2,
                linewidth=2.4 if peer == "attngen" else 1.2, linestyle="--" if peer in COLOURS else "-", label=peer,
            )  # fmt: skip
        panel.set_yscale("log")
        panel.set_xticks(range(len(columns)), list(columns.values()))
        panel.set_xlim(-0.5, len(columns) - 0.5)
        panel.set_title(title, fontsize=9)
        panel.tick_params(labelsize=7, which="both")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for panel in axes.flat[len(found) :]:
        panel.remove()
    figure.supylabel("milliseconds", fontsize=8)
    _title(figure, data, "time with 20th and 80th percentile, lower is better; dense attention is dashed")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _dots(data: Data, timed: list[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(r["case"] for r in timed))
    figure, panel = plt.subplots(figsize=(10, 1.8 + 0.32 * len(cases)), layout="constrained")
    for peer in reversed(_peers(timed)):
        of_peer = [r for r in timed if r["peer"] == peer]
        x = [1e3 * r["timing"]["median"] for r in of_peer]
        y = [cases.index(r["case"]) for r in of_peer]
        spread = [[1e3 * abs(r["timing"][p] - r["timing"]["median"]) for r in of_peer] for p in ("p20", "p80")]
        panel.errorbar(
            x, y, xerr=spread, fmt="o", color=COLOURS.get(peer), markersize=8 if peer == "attngen" else 5, capsize=2,
            label=peer, alpha=0.9,
        )  # fmt: skip
    panel.set_xscale("log")
    panel.set_yticks(range(len(cases)), cases, fontsize=7)
    panel.set_ylim(len(cases) - 0.5, -0.5)
    panel.grid(alpha=0.3)
    panel.set_xlabel("milliseconds", fontsize=8)
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=min(5, len(labels)), fontsize=8)
    _title(figure, data, "time, with 20th and 80th percentile; lower is better")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _peers(records: Iterable[Row]) -> list[str]:
    """attngen first, the others as they come."""
    found = dict.fromkeys(r["peer"] for r in records)
    return sorted(found, key=lambda peer: peer != "attngen")
