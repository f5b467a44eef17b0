"""Tables and charts from the files that `python -m benchmarks` writes.

python -m benchmarks.report_files DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.charts import Data, Row, chart
from benchmarks.measure import OK
from benchmarks.paper_tables import duration, papers_of
from benchmarks.paper_tables import table as paper_table


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
        "The bound is modelled: the largest of matrix work, bytes and exponentials at the rates of this device; a backward that "
        "keeps its weights instead of computing them again, as on a CPU, does less than that convention and may pass it. The "
        "ratio is the best peer's time over attngen's: above 1 attngen is faster. A sparse system's is that of the best dense "
        "attention: they compute different things. What is printed in the papers was measured elsewhere, on the machine that "
        "is named: it is quoted, not compared."
    )
    for data in suites:
        parts.append(f"## {data['suite']}")
        parts.append(", ".join(f"{name} {value}" for name, value in data["setting"].items() if value not in (None, "")))
        parts.append(f"![{data['suite']}]({data['suite']}.png)")
        parts += [paper_table(paper, cells, _machine(data)) for paper, cells in papers_of(data["records"])]
        if parts[-1].startswith("###"):
            parts.append("### Every record")
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


def _machine(data: Data) -> str:
    return f"{data['setting']['device']}{', small sizes' if data['setting']['size'] == 'small' else ''}"


def by_case(data: Data) -> dict[str, list[Row]]:
    """Records grouped by case. Cases that differ in batch and length only stand together, by length; otherwise as measured."""
    grouped: dict[str, list[Row]] = {}
    for record in data["records"]:
        grouped.setdefault(record["case"], []).append(record)
    first = {case: records[0]["described"] for case, records in grouped.items()}
    groups = list(dict.fromkeys(about["group"] for about in first.values()))
    order = sorted(
        first, key=lambda case: (groups.index(first[case]["group"]), first[case]["n_k"], first[case]["batch"])
    )
    return {case: grouped[case] for case in order}


def _notes(r: Row) -> str:
    notes = dict(r.get("notes", {}))
    said, peak = [], notes.pop("peak bytes", None)
    if "schedule" in notes:
        kept = {"forward": ("block", "num"), "backward": ("dq", "dkv")}.get(r["described"]["direction"], ("",))
        chosen = [f"{n}={v}" for n, v in notes.pop("schedule").items() if n.startswith(kept)]
        said.append(f"{', '.join(chosen)}; {notes.pop('origin').partition(':')[0]}")
    said += [f"{piece['piece']}: {piece['origin'].partition(':')[0]}" for piece in notes.pop("pieces", ())]
    for name, value in notes.items():
        figures = f"{value['registers']} registers, {value['spills']} spills" if isinstance(value, dict) else value
        said.append(f"{name} {figures}")
    if peak is not None:
        said.append(f"peak {peak / 2**20:.3g} MiB")
    return ", ".join(said)


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


def main(arguments: list[str] | None = None) -> int:
    """Write the files again."""
    parser = argparse.ArgumentParser("python -m benchmarks.report_files", description=__doc__)
    parser.add_argument("folder", type=Path)
    for path in write(parser.parse_args(arguments).folder):
        print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
