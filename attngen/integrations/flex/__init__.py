"""FlexAttention's interface. Mods (mask_mod, score_mod) are run with symbols; a program of torch operations comes out; it means a
spec.

    trace -> Program -> meaning (with the vocabulary) -> Spec -> ag.compile
"""

from attngen.integrations.flex.attention import flex_attention, from_flex
from attngen.integrations.flex.masks import create_block_mask

__all__ = ["create_block_mask", "flex_attention", "from_flex"]
