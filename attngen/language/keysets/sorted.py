"""Key sets that sort queries and keys so that what belongs together is a run: SCFA (arXiv 2306.01160), HyperAttention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attngen.language.keyset import KeySet, positive


@dataclass(frozen=True)
class QKSparse(KeySet):
    """Dropped queries and keys. keep_q bool [B, Hq, Nq], keep_k bool [B, Hkv, Nk]."""

    name: ClassVar[str] = "qk_sparse"
    prepared: ClassVar[tuple[str, ...]] = ("keep_q", "keep_k")


@dataclass(frozen=True)
class HashSparse(KeySet):
    """Attention inside buckets. q_bucket int [B, Hq, Nq], k_bucket int [B, Hkv, Nk], at least 0, and below `buckets` where
    that is given (which saves memory traffic on a GPU).
    """

    buckets: int | None = None

    name: ClassVar[str] = "hash_sparse"
    prepared: ClassVar[tuple[str, ...]] = ("q_bucket", "k_bucket")

    def __post_init__(self) -> None:
        if self.buckets is not None:
            positive("hash_sparse: buckets", self.buckets)


def qk_sparse() -> QKSparse:
    """Per (b, h) some queries and keys are dropped: `Spec(keys=ag.qk_sparse(), mask=ag.causal())`, called with
    keep_q= bool [B, Hq, Nq] and keep_k= bool [B, Hkv, Nk]. A dropped query's out is 0 and its lse -inf; dropped queries and
    keys get no gradient (arXiv 2306.01160).
    """
    return QKSparse()


def hash_sparse(buckets: int | None = None) -> HashSparse:
    """A query sees the keys of its own bucket: `Spec(keys=ag.hash_sparse(), mask=ag.causal())`, called with
    q_bucket= int [B, Hq, Nq] and k_bucket= int [B, Hkv, Nk], numbers of at least 0 (below `buckets` if given);
    `ag.lsh_buckets` makes them (arXiv 2306.01160).
    """
    return HashSparse(buckets)


@dataclass(frozen=True)
class Hyper(KeySet):
    """See the module. Called with seed=, an int: equal seeds draw equal projections and samples on one kind of device."""

    block: int = 256
    samples: int = 256
    min_len: int = 4096

    name: ClassVar[str] = "hyper"
    prepared: ClassVar[tuple[str, ...]] = ("seed",)

    def __post_init__(self) -> None:
        positive("hyper: block", self.block)
        positive("hyper: samples", self.samples, 0)
        if type(self.min_len) is int and self.min_len == 0:  # as 1: nothing is too short to be sampled
            object.__setattr__(self, "min_len", 1)
        positive("hyper: min_len", self.min_len)


def hyper(block: int = 256, samples: int = 256, min_len: int = 4096) -> Hyper:
    """HyperAttention: `Spec(keys=ag.hyper(), mask=ag.causal())` or without a mask, called with seed=.

    block: keys in a bucket's block; samples: keys drawn for the rest; min_len: fewer keys than this are attended exactly.
    Memory is O(N), time O(N * (block + samples)), with a factor log N where causal. Other conditions in the mask hold
    pair by pair; the estimate stays unbiased (arXiv 2310.05869).

    A causal mask over 2 * min_len queries or more needs as many queries as keys and no q_offset: InputError else.
    """
    return Hyper(block, samples, min_len)
