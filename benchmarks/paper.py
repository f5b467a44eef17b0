"""What a paper's table is, and what the papers' workloads share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.case import SDPA, Case, Sizes, System

Shape = tuple[int, int, int, int, int, int, str]  # B, Hq, Hkv, Nq, Nk, D, dtype

TIME, OVER_DENSE, OVER_BEST, PEAK = "time", "over attngen's dense", "over the best dense", "peak memory"


@dataclass(frozen=True)
class Row:
    """One row: what of which peer's records. part: "pattern direction" of its cases, where a table has several. printed: the
    authors' figures by column, printed_as: of what, if not the label; a row without a peer has nothing else.
    """

    label: str
    peer: str = ""
    part: str = ""
    what: str = TIME
    printed_as: str = ""
    printed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Paper:
    """A paper's table. name: the `table` of its cases. workload: at full size. hardware: what the printed figures are from, as
    far as known. remark: what they do not say, and how this measurement differs.
    """

    name: str
    source: str
    workload: str
    hardware: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    remark: str = ""


def figures_of(columns: Iterable[str], figures: str) -> dict[str, str]:
    """Figures with / between them, in the order of the columns; an empty one is not printed."""
    return {column: figure for column, figure in zip(columns, figures.split("/"), strict=False) if figure}


def dense_peers(sizes: Sizes) -> tuple[str, ...]:
    """SDPA where it needs no matrix of all pairs."""
    return SDPA[:2] if sizes.cuda else ("sdpa-flash",)


def half(sizes: Sizes) -> str:
    """Of papers in float16."""
    return "float16" if sizes.cuda else sizes.dtype


def case_of(
    paper: Paper, column: str, pattern: str, direction: str, shape: Shape, peers: tuple[str, ...],
    *systems: System,
) -> Case:  # fmt: skip
    """A case of the suite `seeds` for that column."""
    return Case("seeds", pattern, direction, *shape, peers, systems=systems, table=paper.name, column=column)
