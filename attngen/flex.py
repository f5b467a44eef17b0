"""torch.nn.attention.flex_attention on attngen's kernels: import from here instead of there, and change nothing else.

    from attngen.flex import flex_attention, create_block_mask

Mods are not compiled from their source: they run once per call on symbols, with whatever they close over. So they may be functions,
closures, partials, methods and callable objects, use what `mask_mod` and `score_mod` of torch's documentation use, and read tensors
by index: `slope[h]`, `bias[h][q_idx, kv_idx]`, `table[kind[kv_idx]]`. Tensors may require gradients, in all of them and on every
device. What a kernel can't do for one pair of a query and a key is a SpecError that names the line of the mod:

    refused                                            why                                          instead
    if, and, or, not, a < b < c, min, max of symbols   the value is known in the kernel only        torch.where, & | ~, torch.minimum
    .item(), float(), range() of symbols, of captured  the same; a wait for the device at each      0-d tensors, numbers taken outside
        tensors, and branches on them                      call
    sums, softmax, sorts, matrix products, stack, of   a kernel reads elements, one pair at a time  do it outside of the mod, to whole
        rows of captured tensors too                                                                    tensors
    slices of and arithmetic on rows, 5 dimensions     the same                                     index down to a number
    exp, abs, products by tensors, ... of -inf         -inf excludes a key: it is no number here    choose it last, or add it
    functions that the language lacks (lgamma, atan,   -                                            the functions that the error names
        log1p, ...), complex numbers
    randomness (torch.rand) in a mod                   one number for all pairs                     ag.Spec(dropout=...)

An index that is out of range for a pair that attends is an InputError, one below 0 included (torch counts it from the end), and
so is a scale that is not above 0. Differences that remain: floating-point conversions (`.half()`) do not round; `max_scores` of
AuxRequest is not kept; BlockMasks made here are lazy, and those of torch's whose blocks say the same as their mask_mod are treated
alike.
"""

from torch.nn.attention.flex_attention import (
    AuxOutput,
    AuxRequest,
    BlockMask,
    FlexKernelOptions,
    and_masks,
    create_mask,
    noop_mask,
    or_masks,
)

from attngen.integrations.flex import create_block_mask, flex_attention

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "FlexKernelOptions",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "flex_attention",
    "noop_mask",
    "or_masks",
]
