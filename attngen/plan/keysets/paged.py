"""A key/value cache in pages, for inference: a page table says where a row's logical positions lie."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attngen.analysis.call_facts import facts_of
from attngen.analysis.summaries import Axis
from attngen.analysis.tiles import check_positive, run
from attngen.errors import InputError
from attngen.language import expression
from attngen.language.call import Call, bind
from attngen.language.checks import check_lengths, check_tensor, checked, require
from attngen.language.keysets.cached import Paged
from attngen.language.plain import PLAIN, PlainSpec, PlainTensor
from attngen.plan.planner import FAMILIES, Family, Planner, inner_spec, mask_of
from attngen.plan.steps import Result

if TYPE_CHECKING:
    from attngen.language.spec import Spec


def plan_paged(keys: Paged, planner: Planner) -> Result:
    """One attention whose kernels find their keys through the page table."""
    given = dict(planner.sizes.given)
    lengths = ("k_len",) if "k_len" in given else ()
    reads = ("page_table", *lengths, *planner.mask_reads)
    make = partial(_prepare, keys, planner.spec)
    found = planner.prepare("check pages", make, reads, ("page_table", *lengths), planner.mask_params)

    def build() -> dict[str, Any]:
        from attngen.language.moved import b, j

        mask = planner.mask
        if lengths:
            mask = mask & (j < planner.tensor("k_len", 1)[b])
        return {"mask": mask, "score": planner.score, "page_size": keys.page_size}

    return planner.attend("pages", ("paged", bool(lengths)), build, "q", "k", "v", found, offset=True, looks=True)


def _prepare(keys: Paged, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """The page table and lengths, int32. A page that a query sees has to be one that is there."""
    table, held, device = given["page_table"], call.k.shape[0], call.q.device
    table = check_tensor("page_table", table, "int", tuple(table.shape), "[B, pages per row]", device)
    lengths = {}
    if given.get("k_len") is not None:
        slots, batch = table.shape[1], call.q.shape[0]
        what = f"what {slots} pages of {keys.page_size} hold"
        lengths["k_len"] = check_lengths("k_len", given["k_len"], batch, slots * keys.page_size, what, device)
    if checked():
        only = _mask_in_pages(spec, keys.page_size, bool(lengths))
        known = {**call.captures, **call.params, **lengths, "page_table": table}
        named = {name: value for name, value in known.items() if name in only.tensors or name in only.params}
        bound = bind(only, call.q, call.k, call.v, q_offset=call.q_offset, captures=named, values=False)
        right = ((table >= 0) & (table < held)) | ~reached(bound)
        wanted = f"pages in 0 .. {held - 1} where the mask lets a query see them"
        require("page_table", right, wanted, table, "at [batch row, page slot]")
    # A key that nobody sees may lie in a tile that is read: its page has to be one that is there too.
    return {"page_table": table.clamp(0, max(held - 1, 0)).to(torch.int32), **lengths}


def bind_pages(
    keys: Paged,
    spec: Spec,
    q: Any,
    k: Any,
    v: Any,
    q_offset: Any,
    captures: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Call:
    """The checked call on pages, as [pages, Hkv, page size, *]. InputError."""
    if not keys.head_major:
        for name, pages in (("k", k), ("v", v)):
            if isinstance(pages, torch.Tensor) and (pages.dim() != 4 or pages.shape[1] != keys.page_size):
                wanted = f"[pages, page_size = {keys.page_size}, Hkv, *]"
                raise InputError(name, wanted, f"shape {list(pages.shape)}", "head_major=True is the other order")
        k, v = (t.transpose(1, 2) if isinstance(t, torch.Tensor) else t for t in (k, v))
    if given.get("page_table") is None:
        raise InputError("page_table", "int [B, pages per row]", "nothing", "pass page_table=... at the call")
    learned = [q, k, v, *captures.values()]
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in learned):
        raise InputError("k", "inference only, with pages", "an argument that requires a gradient", "torch.no_grad()")
    named = {**captures, "page_table": given["page_table"]}
    return bind(_in_pages(spec, keys.page_size), q, k, v, q_offset=q_offset, captures=named, values=False)


def _in_pages(spec: Spec, page_size: int) -> Spec:
    """The spec without its key set, on pages: what a call is checked against."""
    if spec is PLAIN:  # a preparation's, some of whose captures are not known yet
        table = PlainTensor("page_table", 2, "int")
        plain: Any = PlainSpec(tensors={table.name: table}, plain_dims={table.name: ()}, page_size=page_size)
        return plain

    def build() -> dict[str, Any]:
        sink = None if spec.sink is None else expression.Expr(spec.sink)
        return {"mask": mask_of(spec), "score": expression.Expr(spec.score), "sink": sink, "page_size": page_size}

    return inner_spec(spec, ("in pages", page_size), build)


def reached(call: Call) -> torch.Tensor:
    """Pages with a key that the mask lets some query of their row see: bool [B, pages per row]. By the walk that the kernels
    make: of a mask that no intervals describe, some that nobody sees are among them.
    """
    (batch, heads, n_q, _), page_size, device = call.q.shape, call.spec.page_size, call.q.device
    assert page_size is not None
    slots = torch.arange(call.n_k // page_size, device=device)
    if n_q == 0 or len(slots) == 0:
        return torch.zeros((batch, len(slots)), dtype=torch.bool, device=device)
    known = facts_of(call.spec)
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


def _mask_in_pages(spec: Spec, page_size: int, limited: bool) -> Spec:
    """The mask alone, with k_len as part of it."""

    def build() -> dict[str, Any]:
        from attngen.language.moved import b, j

        mask = mask_of(spec)
        if limited:
            mask = mask & (j < expression.Tensor("k_len", 1, torch.int32)[b])
        return {"mask": mask, "scale": None, "page_size": page_size}

    return inner_spec(spec, ("mask in pages", page_size, limited), build)


FAMILIES[Paged] = Family(plan_paged, bind=bind_pages)
