"""The gradients of captured tensors that a kernel adds up, as outlines and signatures see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attngen.analysis.capture_sites import buffer_name
from attngen.analysis.sites import Site

_BUFFERS = {
    "total": "[B, heads, tiles]",
    "rows": "[B, heads, n_q]",
    "keys": "[B, heads, n_k]",
    "pairs": "[B or 1, heads or 1, n_q, n_k]",
    "bins": "[B, heads, tiles, bins]",
    "atomic": "[B, heads, bins]",
    "edges": "[B, list heads, listed keys]",
}
_STRIDES = {"pairs": "bhn", "edges": "bh"}
# Variables that an outline reads, by kind, apart from those that every gradient kernel has.
_READS = {"edges": {"edge", "first_edge", "kv_head"}, "total": {"query_tile"}, "bins": {"query_tile"}}


@dataclass(frozen=True)
class Gradient:
    """own: what variables about it are named after. tensor: what the kernel calls the captured tensor. bins: for "bins" and "atomic"
    the arguments whose product is how many elements of it a pair may reach.
    """

    site: Site
    own: str
    tensor: str
    bins: tuple[str, ...]

    @property
    def kind(self) -> str:
        """See `attngen.analysis.capture_sites`."""
        return self.site.kind

    @property
    def name(self) -> str:
        """The argument that points to its buffer."""
        return f"grad_{self.own}"

    @property
    def buffer(self) -> str:
        """The buffer among a kernel's tensors."""
        return buffer_name(self.site.tensor, self.site.number)

    @property
    def comment(self) -> str:
        """The buffer's dimensions, in words."""
        return _BUFFERS[self.kind]

    @property
    def strides(self) -> str:
        """The dimensions whose strides are arguments."""
        return _STRIDES.get(self.kind, "")

    @property
    def shared(self) -> bool:
        """Whether a program adds pairs of several batches or heads to one element, one after the other."""
        return self.kind == "pairs" and not (self.site.by_batch and self.site.by_head)

    @property
    def reads(self) -> set[str]:
        """Variables that the outline reads for it."""
        return _READS.get(self.kind, set()) | ({self.tensor, *self.bins} if self.bins else set())


def gradients_of(sites: Sequence[Site], names: Mapping[str, str]) -> tuple[Gradient, ...]:
    """For the sites of one kernel. names: what it calls captured tensors."""
    out: list[Gradient] = []
    for site in sites:
        tensor = names.get(site.tensor, "edges")
        before = sum(other.site.tensor == site.tensor for other in out)
        bins = tuple(f"{tensor}_size_{dim}" for dim in site.dims) if site.kind in ("bins", "atomic") else ()
        out.append(Gradient(site, f"{tensor}_{before + 1}" if before else tensor, tensor, bins))
    return tuple(out)
