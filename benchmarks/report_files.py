"""Tables and charts from the files that `python -m benchmarks` writes.

python -m benchmarks.report_files DIR
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.measure import OK

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
    "attngen-longest-first": "#9c36b5",
    "flex": "#1971c2",
    "flex-max-autotune": "#74c0fc",
    "sdpa": "#2f9e44",
    "sdpa-cudnn": "#2f9e44",
    "sdpa-flash": "#e8590c",
    "sdpa-efficient": "#ae3ec9",
    "sdpa-math": "#868e96",
    "flashinfer": "#f59f00",
    "create_block_mask": "#1971c2",
    "create_block_mask-compiled": "#74c0fc",
    "dense-mask": "#868e96",
}


def write(folder: Path) -> list[Path]:
    """A table of all suites in the folder and a chart for each: README.md and SUITE.png. The paths written."""
    suites = load(folder)
    written = []
    for data in suites:
        path = folder / f"{data['suite']}.png"
        if chart(data, path):
            written.append(path)
    if suites:
        table = folder / "README.md"
        table.write_text(markdown(suites), encoding="utf-8")
        written.append(table)
    return written


def load(folder: Path) -> list[dict[str, Any]]:
    """The suites' files in the order of the suites."""
    found = []
    for suite in CASES:
        path = folder / f"{suite}.json"
        if path.exists():
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


# -- tables -----------------------------------------------------------------------------------------------------------


def markdown(suites: Iterable[Data]) -> str:
    """Everything as one page."""
    parts = [
        "# Measured",
        "Made from the JSON files beside this page; `benchmarks/results/README.md` says how to run it again.",
    ]
    parts.append(
        "Times are medians with the 20th and 80th percentile. Every implementation was checked against float64 before it was "
        "timed. FLOP/s count attended pairs only, 4 D a pair forward and 10 D backward; GB/s count each live tensor once. "
        "The bound is modelled: the largest of matrix work, bytes and exponentials at the rates of this device. The ratio is "
        "the best peer's time over attngen's: above 1 attngen is faster."
    )
    for data in suites:
        parts.append(f"## {data['suite']}")
        parts.append(", ".join(f"{name} {value}" for name, value in data["setting"].items() if value not in (None, "")))
        parts.append(f"![{data['suite']}]({data['suite']}.png)")
        parts.append(table(data))
        others = [r for r in data["records"] if r["status"] != OK]
        if others:
            parts.append("Without a time:")
            parts.append("\n".join(_grouped(others)))
    return "\n\n".join(parts) + "\n"


def table(data: Data) -> str:
    """A row per case, attngen first, then the peers by their time."""
    rows = [
        "| case | implementation | time | figure | of the bound | ratio to the best peer | schedule, or memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, records in by_case(data).items():
        timed = [r for r in records if r["status"] == OK]
        timed.sort(key=lambda r: (r["peer"] != "attngen", r["timing"]["median"]))
        for number, r in enumerate(timed):
            t = r["timing"]
            time = f"{duration(t['median'])} ({duration(t['p20'])} .. {duration(t['p80'])})"
            figure = f"{r['figure']:.4g} {r['unit']}" if r["unit"].endswith("/s") else ""
            bound = f"{r['bound_fraction']:.0%} ({r['bound_limit']})" if "bound_fraction" in r else ""
            versus = f"{r['ratio']:.2f} ({r['best_peer']})" if "ratio" in r else ""
            rows.append(
                f"| {case if number == 0 else ''} | {r['peer']} | {time} | {figure} | {bound} | {versus} | {_notes(r)} |"
            )
    return "\n".join(rows)


def by_case(data: Data) -> dict[str, list[Row]]:
    """Records grouped by case, in the order they were measured."""
    grouped: dict[str, list[Row]] = {}
    for record in data["records"]:
        grouped.setdefault(record["case"], []).append(record)
    return grouped


def duration(seconds: float) -> str:
    """With the unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _notes(r: Row) -> str:
    notes = r.get("notes", {})
    if "schedule" in notes:
        kept = {"forward": ("block", "num"), "backward": ("dq", "dkv")}.get(r["described"]["direction"], ("",))
        chosen = [f"{n}={v}" for n, v in notes["schedule"].items() if n.startswith(kept)]
        return f"{', '.join(chosen)}; {notes['origin'].partition(':')[0]}"
    if notes.get("peak bytes") is not None:
        return f"peak {notes['peak bytes'] / 2**20:.3g} MiB"
    return ", ".join(
        f"{name} {value['registers']} registers, {value['spills']} spills"
        if isinstance(value, dict)
        else f"{name} {value}"
        for name, value in notes.items()
    )


def _grouped(records: Iterable[Row]) -> list[str]:
    """One line for each peer, status and reason, with its cases."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for r in records:
        lines.setdefault((r["peer"], r["status"], r.get("reason", "")), []).append(r["case"])
    return [
        f"- {peer} {status}: {reason} ({len(cases)} {'case' if len(cases) == 1 else 'cases'}: {'; '.join(cases[:3])}"
        f"{'; ...' if len(cases) > 3 else ''})"
        for (peer, status, reason), cases in lines.items()
    ]


# -- charts -----------------------------------------------------------------------------------------------------------


def chart(data: Data, path: Path) -> bool:
    """Lines over the length where a group of cases has several, else a row of dots a case. False if nothing was timed."""
    import matplotlib

    matplotlib.use("Agg")
    timed = [r for r in data["records"] if r["status"] == OK]
    if not timed:
        return False
    lengths: dict[str, set[int]] = {}
    for r in timed:
        lengths.setdefault(r["described"]["group"], set()).add(r["described"]["n_k"])
    if data["suite"] == "dense" and all(len(found) > 1 for found in lengths.values()):
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


def main(arguments: list[str] | None = None) -> int:
    """Write the files again."""
    parser = argparse.ArgumentParser("python -m benchmarks.report_files", description=__doc__)
    parser.add_argument("folder", type=Path)
    for path in write(parser.parse_args(arguments).folder):
        print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
