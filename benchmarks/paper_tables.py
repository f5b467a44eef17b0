"""The papers' tables, from the records of the suites' files: as the paper prints them, the authors' figures beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.paper import OVER_BEST, OVER_DENSE, PEAK, TIME, Paper, Row
from benchmarks.papers import PAPERS

Record = Mapping[str, Any]  # a record as the file has it
Cells = dict[tuple[str, str, str], Record]  # by column, part and peer

NOTHING = "–"


def duration(seconds: float) -> str:
    """With the unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def papers_of(records: Sequence[Record]) -> list[tuple[Paper, Cells]]:
    """The papers that some of the records stand in, each with these."""
    found = []
    for paper in PAPERS:
        own = [r for r in records if r["described"].get("table") == paper.name]
        if own:
            found.append((paper, {(d["column"], part_of(d), r["peer"]): r for r in own for d in (r["described"],)}))
    return found


def part_of(described: Mapping[str, Any]) -> str:
    """Which of several parts of its table a record belongs to."""
    return f"{described['pattern']} {described['direction']}"


def table(paper: Paper, cells: Cells, where: str) -> str:
    """A title, the shapes measured here, and a line for each row and for what its authors print. where: on which device, and
    whether at small sizes.
    """
    columns = [name for name in paper.columns if any(name == column for column, _, _ in cells)]
    printed = {name for row in paper.rows for name in row.printed}
    columns = [name for name in paper.columns if name in columns or name in printed]
    lines = [
        f"### {paper.source}",
        "",
        f"At full size: {paper.workload}. " + (f"{paper.remark}" if paper.remark else ""),
        "",
        "|  | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        f"| measured on {where}: | " + " | ".join(_shape(cells, column) for column in columns) + " |",
    ]
    source = f"printed, {paper.hardware}" if paper.hardware else "printed"
    for row in paper.rows:
        if any(_record(cells, column, row) for column in columns):
            shown = [_cell(cells, column, row) for column in columns]
            lines.append(f"| {row.label} | " + " | ".join(shown) + " |")
        elif not row.printed:
            continue
        if row.printed:
            figures = [f"*{row.printed[column]}*" if column in row.printed else "" for column in columns]
            lines.append(f"| *{row.printed_as or row.label} ({source})* | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _record(cells: Cells, column: str, row: Row) -> Record | None:
    found = [r for (c, part, peer), r in cells.items() if (c, peer) == (column, row.peer) and row.part in ("", part)]
    return found[0] if found else None


def _cell(cells: Cells, column: str, row: Row) -> str:
    record = _record(cells, column, row)
    if record is None:
        return NOTHING
    if record["status"] != "ok":
        return str(record["status"])
    if row.what == TIME:
        return duration(record["timing"]["median"])
    if row.what == PEAK:
        peak = record.get("notes", {}).get("peak bytes")
        return "not measured" if peak is None else f"{peak / 1e6:,.0f} MB"
    if row.what == OVER_BEST:
        return f"{record['ratio']:.2f}x {record['best_peer']}" if "ratio" in record else NOTHING
    assert row.what == OVER_DENSE
    dense = cells.get((column, part_of(record["described"]), "attngen"))
    if dense is None or dense["status"] != "ok":
        return NOTHING
    return f"{dense['timing']['median'] / record['timing']['median']:.2f}x"


def _shape(cells: Cells, column: str) -> str:
    for (name, _, _), record in cells.items():
        if name == column:
            d = record["described"]
            heads = f"H{d['heads_q']}" if d["heads_q"] == d["heads_kv"] else f"Hq{d['heads_q']} Hkv{d['heads_kv']}"
            return f"B{d['batch']} {heads} d{d['head_dim']} {_length(cells, column)} {d['dtype']}"
    return "not measured"


def _length(cells: Cells, column: str) -> str:
    """Of the column's cases: decoding has one query a sequence, all others as many as keys."""
    return next(f"N{r['described']['n_k']}" for (name, _, _), r in cells.items() if name == column)


# -- charts -----------------------------------------------------------------------------------------------------------


def panels(records: Sequence[Record]) -> list[tuple[str, dict[str, str], dict[str, dict[str, Mapping[str, float]]]]]:
    """For each paper and part of it: a title, its columns with labels that say what was measured, and for each peer its
    timings by column.
    """
    found = []
    for paper, cells in papers_of(records):
        for part in dict.fromkeys(part for _, part, _ in cells):
            lines: dict[str, dict[str, Mapping[str, float]]] = {}
            for (column, own, peer), record in cells.items():
                if own == part and record["status"] == "ok":
                    lines.setdefault(peer, {})[column] = record["timing"]
            columns = [name for name in paper.columns if any(name in line for line in lines.values())]
            if columns:
                labels = [f"{name}\n{_length(cells, name)}" for name in columns]
                found.append((f"{paper.name}: {part}", dict(zip(columns, labels, strict=True)), lines))
    return found
