"""A key/value cache in pages, for inference: a page table says where a row's logical positions lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attngen.errors import InputError, SpecError
from attngen.expression import Expr
from attngen.inputs import bind
from attngen.keys.base import KeySet, Pieces, Result, b, check_tensor, j
from attngen.keys.checks import check_lengths, require

if TYPE_CHECKING:
    from attngen.inputs import Call
    from attngen.spec import Spec


@dataclass(frozen=True)
class Paged(KeySet):
    """k, v [pages, page_size, Hkv, *], or [pages, Hkv, page_size, *] if `head_major`. page_table int [B, pages per row],
    k_len int [B].
    """

    page_size: int = 16
    head_major: bool = False

    name: ClassVar[str] = "paged"
    used: ClassVar[tuple[str, ...]] = ("page_table", "k_len")
    optional: ClassVar[tuple[str, ...]] = ("k_len",)

    def __post_init__(self) -> None:
        if type(self.page_size) is not int or not 1 <= self.page_size <= 256:
            raise SpecError(f"paged: page_size is an int from 1 to 256, got {self.page_size!r}")
        if not isinstance(self.head_major, bool):
            raise SpecError(f"paged: head_major is a bool, got {self.head_major!r}")

    def bind(
        self, spec: Spec, q: Any, k: Any, v: Any, q_offset: Any, captures: Mapping[str, Any], given: Mapping[str, Any]
    ) -> Call:
        if not self.head_major:
            for name, pages in (("k", k), ("v", v)):
                if isinstance(pages, torch.Tensor) and (pages.dim() != 4 or pages.shape[1] != self.page_size):
                    wanted = f"[pages, page_size = {self.page_size}, Hkv, *]"
                    raise InputError(name, wanted, f"shape {list(pages.shape)}", "head_major=True is the other order")
            k, v = (t.transpose(1, 2) if isinstance(t, torch.Tensor) else t for t in (k, v))
        if given.get("page_table") is None:
            raise InputError("page_table", "int [B, pages per row]", "nothing", "pass page_table=... at the call")
        named = {**captures, "page_table": given["page_table"]}
        return bind(_in_pages(spec, self.page_size), q, k, v, q_offset=q_offset, captures=named)

    def run(self, pieces: Pieces, plan: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
        call, device, k_len = pieces.call, pieces.call.q.device, given.get("k_len")
        learned = [call.q, call.k, call.v, *call.captures.values()]
        if torch.is_grad_enabled() and any(t.requires_grad for t in learned):
            raise InputError(
                "k", "inference only, with pages", "an argument that requires a gradient", "torch.no_grad()"
            )
        table, batch = given["page_table"], call.q.shape[0]
        table = check_tensor("page_table", table, "int", tuple(table.shape), "[B, pages per row]", device)
        held, limited = call.k.shape[0], k_len is not None
        needed = torch.ones_like(table, dtype=torch.bool)
        extra: dict[str, Any] = {}
        if limited:
            what = f"what {table.shape[1]} pages of {self.page_size} hold"
            extra["k_len"] = check_lengths("k_len", k_len, batch, call.n_k, what, device)
            first = torch.arange(table.shape[1], device=device) * self.page_size
            needed = first < extra["k_len"].unsqueeze(-1)
        right = ~needed | ((table >= -1) & (table < held))
        require("page_table", right, f"pages in 0 .. {held - 1}, or -1 for one not needed", table, "in [row, page]")

        def build() -> dict[str, Any]:
            mask = pieces.mask
            if limited:
                mask = mask & (j < pieces.tensor("k_len", 1)[b])
            return {"mask": mask, "score": pieces.score, "page_size": self.page_size}

        # A key that nobody sees may lie in a tile that is read: its page must be one that is there.
        extra["page_table"] = table.clamp(0, max(held - 1, 0)).to(torch.int32)
        return pieces.attend(("paged", limited), build, call.q, call.k, call.v, call.q_offset, **extra)


@lru_cache(maxsize=256)
def _in_pages(spec: Spec, page_size: int) -> Spec:
    """The spec without its key set, on pages: what a call is checked against."""
    from attngen.spec import Spec

    declared = {**spec.tensors, **spec.params}
    sink = None if spec.sink is None else Expr(spec.sink, declared)
    mask, score = Expr(spec.mask, declared), Expr(spec.score, declared)
    return Spec(mask, score, scale=spec.scale, sink=sink, page_size=page_size)


def paged(page_size: int = 16, head_major: bool = False) -> Paged:
    """Attention to a paged cache: `Spec(keys=ag.paged(page_size=16), mask=ag.causal())`, called with k and v
    [pages, page_size, Hkv, D] (`head_major`: [pages, Hkv, page_size, D]), page_table= int [B, pages per row] and optionally
    k_len= int [B]: keys at logical positions k_len[b] and beyond are not there. Masks and scores see logical positions;
    queries that end the row have q_offset = k_len - Nq.

    page_size from 1 to 256; rows may share pages; entries of the table behind k_len may be anything, and those of pages
    that the mask lets nobody see -1. Inference only. InputError names the row of a page or a length out of range.
    """
    return Paged(page_size, head_major)
