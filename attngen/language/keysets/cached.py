"""Key sets of caches: pages, contexts that samples share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attngen.errors import SpecError
from attngen.language.keyset import KeySet, positive


@dataclass(frozen=True)
class Paged(KeySet):
    """k, v [pages, page_size, Hkv, *], or [pages, Hkv, page_size, *] if `head_major`. page_table int [B, pages per row],
    k_len int [B].
    """

    page_size: int = 16
    head_major: bool = False

    name: ClassVar[str] = "paged"
    prepared: ClassVar[tuple[str, ...]] = ("page_table", "k_len")  # checked, once for all calls with one plan
    used: ClassVar[tuple[str, ...]] = ("page_table", "k_len")
    optional: ClassVar[tuple[str, ...]] = ("k_len",)

    def __post_init__(self) -> None:
        if type(self.page_size) is not int or not 1 <= self.page_size <= 256:
            raise SpecError(f"paged: page_size is an int from 1 to 256, got {self.page_size!r}")
        if not isinstance(self.head_major, bool):
            raise SpecError(f"paged: head_major is a bool, got {self.head_major!r}")


def paged(page_size: int = 16, head_major: bool = False) -> Paged:
    """Attention to a paged cache: `Spec(keys=ag.paged(page_size=16), mask=ag.causal())`, called with k and v
    [pages, page_size, Hkv, D] (`head_major`: [pages, Hkv, page_size, D]), page_table= int [B, pages per row] and optionally
    k_len= int [B]: keys at logical positions k_len[b] and beyond are not there. Masks and scores see logical positions;
    queries that end the row have q_offset = k_len - Nq.

    page_size from 1 to 256; rows may share pages. Entries of the table for pages that nobody sees, behind k_len or by the
    mask, may be anything. Inference only. InputError names the row and the slot of an entry that is no page though some
    query sees it, and the row of a length out of range; on a GPU the device asserts it. With ATTNGEN_CHECK=0 such entries
    are clamped.
    """
    return Paged(page_size, head_major)


@dataclass(frozen=True)
class SharedPrefix(KeySet):
    """k, v hold each sample's own suffix. prefix_k, prefix_v [G, Hkv, Mc, *], G dividing B; tuples of `levels` tensors, the
    outermost context first, where levels > 1. k_len int [B], lengths of the suffixes.
    """

    levels: int = 1

    name: ClassVar[str] = "shared_prefix"
    used: ClassVar[tuple[str, ...]] = ("prefix_k", "prefix_v", "k_len")
    rows: ClassVar[tuple[str, ...]] = ("prefix_k", "prefix_v")
    optional: ClassVar[tuple[str, ...]] = ("k_len",)

    def __post_init__(self) -> None:
        positive("shared_prefix: levels", self.levels)


def shared_prefix(levels: int = 1) -> SharedPrefix:
    """One context for many samples (bifurcated attention, arXiv 2403.08845): `Spec(keys=ag.shared_prefix(), mask=...)`, with
    each sample's own keys as k, v [B, Hkv, Md, D], called with prefix_k= and prefix_v= [G, Hkv, Mc, D]: sample b continues
    context b * G // B. levels > 1: tuples of as many tensors, the outermost context first, each with a G of its own.
    Optionally k_len= int [B], the suffixes' lengths.

    Logical positions count the contexts one after the other and then the suffix; q_offset, masks, scores and captures are
    in these. The keys read are Mc + B * Md, not B * (Mc + Md). Differentiable in the contexts. Raises InputError.
    """
    return SharedPrefix(levels)


@dataclass(frozen=True)
class Ragged(KeySet):
    """Lengths given at the call, of any spec without keys: "k_len" of a padded cache, "k_offset" of a sliding one, both, or
    "packed", the ends cu_q and cu_k of sequences packed into one row. No part of a spec: whoever calls with such captures asks for it.
    """

    kind: str

    @property
    def names(self) -> tuple[str, ...]:
        """Its captures."""
        return ("cu_q", "cu_k") if self.kind == "packed" else tuple(self.kind.split(", "))

    @property
    def used(self) -> tuple[str, ...]:  # type: ignore[override]
        """All of them, next to a preparation too: they say that the call is ragged, and are compared with what it was made from."""
        return self.names

    def captures(self) -> tuple[str, ...]:
        return self.names
