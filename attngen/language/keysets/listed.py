"""Key sets of single keys: codebooks, rows chosen by whoever calls, the edges of a graph, SPARSEK."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attngen.errors import SpecError
from attngen.language.keyset import Described, KeySet, positive
from attngen.language.lists import RowLists


@dataclass(frozen=True)
class Codebook(KeySet):
    """Keys that stand for several tokens each. count [B, Hkv, Nk], int or float, at least 0."""

    name: ClassVar[str] = "codebook"
    used: ClassVar[tuple[str, ...]] = ("count",)


@dataclass(frozen=True)
class Gather(KeySet):
    """Keys by index, one list for all rows of a head, index int [B, H, K], or one for each row, [B, H, Nq, K], H being Hkv or
    Hq; -1 for none; optional log_weight float of that shape.
    """

    name: ClassVar[str] = "gather"
    prepared: ClassVar[tuple[str, ...]] = ("index",)
    used: ClassVar[tuple[str, ...]] = ("log_weight",)
    optional: ClassVar[tuple[str, ...]] = ("log_weight",)

    def check_spec(self, spec: Described) -> None:
        check_list_names(self.name, spec, RowLists(weighted=True))
        super().check_spec(spec)


def codebook() -> Codebook:
    """Attention to codewords that stand for many tokens each (LongVQ, arXiv 2404.11163): `Spec(keys=ag.codebook())`, with
    the codewords as k [B, Hkv, S, D] and v, and count= [B, Hkv, S] tokens per codeword. A codeword's logit gains
    log(count), as if each of its tokens had that key and value; one with count 0 is not there. j is the codeword's number.
    A float count gets a gradient. InputError for a count that is negative, infinite or nan.
    """
    return Codebook()


def gather() -> Gather:
    """The keys whose rows are given: `Spec(keys=ag.gather(), mask=...)`, called with index= int [B, H, K], one list for all
    queries of a (kv or query) head, or int [B, H, Nq, K], one for each query; -1 for none; and
    optionally log_weight= float of the same shape, added to the logits
    and differentiable. A row listed twice counts twice. The mask reads the keys' original positions. InputError for rows out
    of range, and for weights that are nan or infinite (but for -inf, a row that is not there).
    """
    return Gather()


@dataclass(frozen=True)
class Graph(KeySet):
    """Edges from queries to keys. crow int [Nq + 1], [B, Nq + 1] or [B, H, Nq + 1]; col int of the same leading dimensions,
    H the number of kv or query heads; or graph, a networkx graph.
    """

    name: ClassVar[str] = "graph"
    prepared: ClassVar[tuple[str, ...]] = ("crow", "col", "graph")
    optional: ClassVar[tuple[str, ...]] = ("crow", "col", "graph")

    def check_spec(self, spec: Described) -> None:
        check_list_names(self.name, spec, RowLists())
        super().check_spec(spec)


def check_list_names(place: str, spec: Described, lists: RowLists) -> None:
    """SpecError if the spec has a tensor or param with the name of one of the list's tensors."""
    for name in lists.names:
        if name in spec.tensors or name in spec.params:
            raise SpecError(f"{name!r} is the name of a list that {place}() makes", fix="give it another name")


def graph() -> Graph:
    """Attention along a graph's edges (arXiv 2502.01659): `Spec(keys=ag.graph(), mask=...)`, called with crow= and col=, CSR
    in int32 or int64 whose rows are queries: crow [Nq + 1] and col [E] for all, [B, Nq + 1] and [B, E] per batch, or
    [B, H, Nq + 1] and [B, H, E] per kv or query head. What lies behind crow's last value in col is padding of any value.

    Or with graph=, a networkx Graph or DiGraph with nodes 0 .. N - 1: an edge u-v lets query u see key v (undirected:
    both ways). `attn.plan(...)` converts and sorts once for many calls.

    Rows of any degree, their edges in any order; an edge listed twice counts twice; the spec's mask and score hold on top.
    Edges that the mask rules out by positions alone (causal, a window) cost nothing. InputError for offsets that do not start
    at 0, fall, or pass col's length, and for keys out of range; with ATTNGEN_CHECK=0 those are clamped.
    """
    return Graph()


@dataclass(frozen=True)
class SparseK(KeySet):
    """See `sparse_k`."""

    k: int
    window: int | None = None
    incremental: bool = False
    capacity: int | None = None

    name: ClassVar[str] = "sparse_k"
    prepared: ClassVar[tuple[str, ...]] = ("u",)
    used: ClassVar[tuple[str, ...]] = ("u",)

    def __post_init__(self) -> None:
        positive("sparse_k: k", self.k)
        if self.window is not None:
            positive("sparse_k: window", self.window)
        if not isinstance(self.incremental, bool):
            raise SpecError(f"sparse_k: incremental is True or False, got {self.incremental!r}")
        if self.capacity is not None:
            positive("sparse_k: capacity", self.capacity)
            if not self.incremental:
                raise SpecError("sparse_k: capacity is for incremental=True, which makes lists of earlier keys")


def sparse_k(k: int, window: int | None = None, incremental: bool = False, capacity: int | None = None) -> SparseK:
    """SPARSEK: `Spec(keys=ag.sparse_k(512, window=256, incremental=True), mask=ag.causal())`, called with
    u= float [B, Hkv, Nk], a score per key.

    k: how much is chosen: sum p = k (everything, as it is, where there are no more than k keys). window: keys closer than
    this are attended besides, as they are, and not chosen. incremental: p is made for every query from the keys up to it
    (causal language models); else once from all keys. A score of -inf stands for a key that is not there. Gradients flow to u
    (arXiv 2406.16747).

    incremental=True makes, for every 128 queries, a list of the earlier keys that they may choose: about k of them, more
    where many scores differ by less than 1. capacity: the longest list; longer ones raise an InputError, asserted on the
    device. Without it lists are as long as the scores need, for which `plan` (or each call, without a plan) waits for the
    device once.
    """
    return SparseK(k, window, incremental, capacity)
