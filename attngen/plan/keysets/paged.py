"""A key/value cache in pages, for inference: a page table says where a row's logical positions lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attngen.analysis import Axis, facts, run
from attngen.analysis.tiles import check_positive
from attngen.errors import InputError, SpecError
from attngen.language.call import bind
from attngen.language.checks import check_lengths, checked, require
from attngen.language.expression import Expr, Tensor
from attngen.plan.keysets.base import KeySet, Pieces, Result, b, check_tensor, j

if TYPE_CHECKING:
    from attngen.language.call import Call
    from attngen.language.spec import Spec


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
        return bind(_in_pages(spec, self.page_size), q, k, v, q_offset=q_offset, captures=named, values=False)

    def prepare(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
        if checked():
            table, held = given["page_table"], call.k.shape[0]
            lengths = self._lengths(call, table, given.get("k_len"))
            only = _mask_in_pages(spec, self.page_size, bool(lengths))
            known = {**call.captures, **call.params, **lengths, "page_table": table}
            named = {name: value for name, value in known.items() if name in only.tensors or name in only.params}
            bound = bind(only, call.q, call.k, call.v, q_offset=call.q_offset, captures=named, values=False)
            right = ((table >= 0) & (table < held)) | ~reached(bound)
            wanted = f"pages in 0 .. {held - 1} where the mask lets a query see them"
            require("page_table", right, wanted, table, "at [batch row, page slot]")
        return {}

    def _lengths(self, call: Call, table: torch.Tensor, k_len: Any) -> dict[str, torch.Tensor]:
        """k_len, checked, if it is given."""
        if k_len is None:
            return {}
        slots, batch = table.shape[1], call.q.shape[0]
        what = f"what {slots} pages of {self.page_size} hold"
        return {"k_len": check_lengths("k_len", k_len, batch, slots * self.page_size, what, call.q.device)}

    def run(self, pieces: Pieces, plan: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
        call, device, k_len = pieces.call, pieces.call.q.device, given.get("k_len")
        pieces.trusted = False  # rows stay where they are
        learned = [call.q, call.k, call.v, *call.captures.values()]
        if torch.is_grad_enabled() and any(t.requires_grad for t in learned):
            raise InputError(
                "k", "inference only, with pages", "an argument that requires a gradient", "torch.no_grad()"
            )
        table = given["page_table"]
        table = check_tensor("page_table", table, "int", tuple(table.shape), "[B, pages per row]", device)
        held, limited = call.k.shape[0], k_len is not None
        extra = self._lengths(call, table, k_len)

        def build() -> dict[str, Any]:
            mask = pieces.mask
            if limited:
                mask = mask & (j < pieces.tensor("k_len", 1)[b])
            return {"mask": mask, "score": pieces.score, "page_size": self.page_size}

        # A key that nobody sees may lie in a tile that is read: its page has to be one that is there.
        extra["page_table"] = table.clamp(0, max(held - 1, 0)).to(torch.int32)
        return pieces.attend(("paged", limited), build, call.q, call.k, call.v, call.q_offset, **extra)


def reached(call: Call) -> torch.Tensor:
    """Pages with a key that the mask lets some query of their row see: bool [B, pages per row]. By the walk that the kernels
    make: of a mask that no intervals describe, some that nobody sees are among them.
    """
    (batch, heads, n_q, _), page_size, device = call.q.shape, call.spec.page_size, call.q.device
    assert page_size is not None
    slots = torch.arange(call.n_k // page_size, device=device)
    if n_q == 0 or len(slots) == 0:
        return torch.zeros((batch, len(slots)), dtype=torch.bool, device=device)
    known = facts(call.spec)
    env: dict[str, Any] = {**call.captures, **call.params}
    env |= {
        "b": torch.arange(batch, device=device).view(-1, 1, 1),
        "h": torch.arange(heads, device=device).view(1, -1, 1),
    }
    check_positive(known.walk_keys, env)
    env["q_offset"] = offset = (
        call.q_offset.view(-1, 1, 1) if isinstance(call.q_offset, torch.Tensor) else call.q_offset
    )
    queries, keys = Axis("i", offset, n_q), Axis("j", 0, call.n_k)  # one tile of all queries
    segments = run(known.walk_keys, known.program_keys, env, queries, keys, n_q, page_size, device)
    found = torch.zeros((1, 1, 1), dtype=torch.bool, device=device)
    for first, count in (*segments[0], *segments[1]):
        found = found | ((slots >= first) & (slots < first + count))
    return found.any(1).expand(batch, -1)


@lru_cache(maxsize=256)
def _mask_in_pages(spec: Spec, page_size: int, limited: bool) -> Spec:
    """The mask alone, with k_len as part of it."""
    from attngen.language.spec import Spec

    mask = Expr(spec.mask, {**spec.tensors, **spec.params})
    if limited:
        mask = mask & (j < Tensor("k_len", 1, torch.int32)[b])
    return Spec(mask, page_size=page_size)


@lru_cache(maxsize=256)
def _in_pages(spec: Spec, page_size: int) -> Spec:
    """The spec without its key set, on pages: what a call is checked against."""
    from attngen.language.spec import Spec

    declared = {**spec.tensors, **spec.params}
    sink = None if spec.sink is None else Expr(spec.sink, declared)
    mask, score = Expr(spec.mask, declared), Expr(spec.score, declared)
    return Spec(mask, score, scale=spec.scale, sink=sink, page_size=page_size)


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
