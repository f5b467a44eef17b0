"""Block masks: lazy ones, which are their mask_mod, and torch's, which are lists of blocks."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.attention import flex_attention as torchs
from torch.nn.attention.flex_attention import BlockMask

from attngen.analysis import EMPTY, FULL, tile_map
from attngen.errors import InputError, SpecError
from attngen.integrations.flex.meaning import StepError, spec_of
from attngen.integrations.flex.trace import Mod, located, record
from attngen.integrations.flex.warn import warn_once
from attngen.language.expression.functions import B, H
from attngen.language.keysets.tiles import Block
from attngen.language.spec import Spec

_LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices",
          "full_q_num_blocks", "full_q_indices", "dq_write_order", "dq_write_order_full", "dq_kv_order", "dq_kv_order_spt")  # fmt: skip


class LazyBlockMask(BlockMask):
    """A mask_mod and the sizes it is for. Its lists of blocks are made when somebody asks for them; attention never does.

    The lists are those of `ag.tile_map`: no block with a pair is missing, and none is called full that isn't. Where the analysis
    can't tell, a block is listed, as partial, though the mask may leave nothing or all of it.
    """

    def __init__(
        self, mask_mod: Mod, sizes: tuple[int, int, int, int], device: torch.device, block: Block, separate_full: bool
    ):
        self.mask_mod = self.made_of = mask_mod
        self.sizes, self.device, self.BLOCK_SIZE, self.separate_full = sizes, device, block, separate_full
        self.seq_lengths = sizes[2:]

    @property
    def is_its_mod(self) -> bool:
        """False once somebody has given it another mask_mod, which then holds inside the blocks of the first one."""
        return self.mask_mod is self.made_of

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    def __getattr__(self, name: str) -> Any:
        if name not in _LISTS:
            raise AttributeError(f"a BlockMask has no attribute {name!r}")
        blocks = _listed(self.made_of, self.sizes, self.device, self.BLOCK_SIZE, self.separate_full)
        for each in _LISTS:
            setattr(self, each, getattr(blocks, each, None))
        return getattr(blocks, name, None)

    def to(self, device: torch.device | str) -> BlockMask:
        if not self.is_its_mod:
            return super().to(device)
        return LazyBlockMask(self.mask_mod, self.sizes, torch.device(device), self.BLOCK_SIZE, self.separate_full)

    def _adjust(self, new_q_len: int, new_kv_len: int) -> Any:
        if not self.is_its_mod:
            raise InputError("block_mask", "one whose mask_mod nobody changed", "another mask_mod", "create a new one")
        sizes = (*self.sizes[:2], new_q_len, new_kv_len)
        return LazyBlockMask(self.mask_mod, sizes, self.device, self.BLOCK_SIZE, self.separate_full)


def create_block_mask(
    mask_mod: Mod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
) -> BlockMask:
    """torch's `create_block_mask`, which here computes nothing: attention finds its tiles from what mask_mod says.

    mask_mod(b, h, q_idx, kv_idx) -> bool; B, H: None for masks that are the same for all. BLOCK_SIZE, separate_full_blocks: of the
    lists, if somebody reads them (`kv_num_blocks`, `sparsity()`, `mask[0]`, ...); they are computed then, without a mask of
    pairs. _compile has no meaning here, nor have compute_dq_write_order and dq_kv_order, of torch's FLASH kernels. Raises
    InputError.
    """
    if not callable(mask_mod):
        raise InputError("mask_mod", "a function of (b, h, q_idx, kv_idx)", type(mask_mod).__name__)
    if compute_dq_write_order:
        raise InputError("compute_dq_write_order", "False", True, "attngen's backward adds in a fixed order anyway")
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    block = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else (BLOCK_SIZE[0], BLOCK_SIZE[1])
    sizes = (1 if B is None else B, 1 if H is None else H, Q_LEN, KV_LEN)
    return LazyBlockMask(mask_mod, sizes, torch.device(device), block, separate_full_blocks)


def mask_of(mask_mod: Mod, device: torch.device) -> tuple[Spec, dict[str, torch.Tensor]]:
    """The spec of a mask_mod alone and its captures. SpecError."""
    try:
        program, captures = record(mask_mod, None, torch.float32, device)
        return spec_of(program), captures
    except StepError as error:
        raise error.error from None
    except Exception as error:
        raise located(error) from error


def _listed(
    mask_mod: Mod, sizes: tuple[int, int, int, int], device: torch.device, block: Block, separate_full: bool
) -> Any:
    """torch's BlockMask for a mask."""
    try:
        spec, captures = mask_of(mask_mod, device)
    except SpecError as error:
        warn_once(f"create_block_mask computes the mask of all pairs, with torch: {error}")
        return torchs.create_block_mask(mask_mod, *sizes, device, block, separate_full_blocks=separate_full)
    batch, heads, n_q, n_k = sizes
    state = _map(spec, captures, batch, heads, n_q, n_k, block)
    # torch counts places beyond the end as masked
    if n_q % block[0]:
        state[:, :, -1] = state[:, :, -1].clamp(max=1)
    if n_k % block[1]:
        state[..., -1] = state[..., -1].clamp(max=1)
    state = state.expand(batch, heads, -1, -1)
    partial, full = (state == 1, state == FULL) if separate_full else (state != EMPTY, None)
    lists: dict[str, Any] = dict(zip(("kv_num_blocks", "kv_indices"), _list(partial.to(device)), strict=True))
    if full is not None:
        lists |= dict(zip(("full_kv_num_blocks", "full_kv_indices"), _list(full.to(device)), strict=True))
    return BlockMask.from_kv_blocks(**lists, BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(n_q, n_k))


def _map(
    spec: Spec, captures: dict[str, Any], batch: int, heads: int, n_q: int, n_k: int, block: Block
) -> torch.Tensor:
    """What the mask makes of all blocks: int8 [B or 1, H or 1, blocks_q, blocks_k] on the CPU."""
    symbols = spec.mask.free_symbols
    bs, hs = range(batch if B in symbols else 1), range(heads if H in symbols else 1)
    captures = {name: value.cpu() for name, value in captures.items()}
    maps = [tile_map(spec, n_q, n_k, *block, b=b, h=h, **captures) for b in bs for h in hs]
    return torch.stack(maps).unflatten(0, (len(bs), len(hs)))


def _list(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [.., blocks_q] and indices [.., blocks_q, blocks_k], both int32: of each row the live blocks first."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def blocks_of(block_mask: BlockMask, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which blocks are listed, and which of them as full, None without such a list: bool [B', H', blocks_q, columns]."""
    live = _layout(block_mask.kv_num_blocks, block_mask.kv_indices, columns)
    if block_mask.full_kv_num_blocks is None or block_mask.full_kv_indices is None:
        return live, None
    full = _layout(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)
    return live | full, full


def _layout(counts: torch.Tensor, indices: torch.Tensor, columns: int) -> torch.Tensor:
    while counts.dim() < 3:
        counts, indices = counts.unsqueeze(0), indices.unsqueeze(0)
    counted = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    # What is listed beyond the count is undefined: it goes to a column of its own.
    places = torch.where(counted, indices, columns).long()
    live = torch.zeros((*counts.shape, columns + 1), dtype=torch.bool, device=indices.device)
    return live.scatter(-1, places, True)[..., :columns]


_agreements: WeakKeyDictionary[BlockMask, tuple[Any, bool]] = WeakKeyDictionary()


def agrees(block_mask: BlockMask, q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the listed blocks say nothing that mask_mod doesn't, as those of torch's create_block_mask: then attention can
    find its tiles by itself. Asked once per mask and sizes, since the answer waits for the device. SpecError.
    """
    lists = [getattr(block_mask, name) for name in _LISTS[:4]]
    versions = [None if x is None or x.is_inference() else (id(x), x._version) for x in lists]
    asked = (block_mask.mask_mod, q.shape[:3], k.shape[2], versions)
    known = _agreements.get(block_mask)
    if known is None or known[0] != asked:
        spec, captures = mask_of(block_mask.mask_mod, q.device)
        batch, heads, n_q, _ = q.shape
        state = _map(spec, captures, batch, heads, n_q, k.shape[2], block_mask.BLOCK_SIZE)
        live, full = blocks_of(block_mask, state.shape[-1])
        same = not bool((~live.cpu() & (state != EMPTY)).any())
        same = same and (full is None or not bool((full.cpu() & (state != FULL)).any()))
        known = _agreements[block_mask] = (asked, same)
    return known[1]
