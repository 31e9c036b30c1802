"""Stand-ins for foreign models, with the public ones' attribute names, signatures and formulas."""

from .official import FeedForward, FlattenDiTBlock, NerfBlock, PixNerDiT, RAttention, RMSNorm, rotary
from .radiance import ChromaRadiance, NerfGLUBlock, ScaleNorm, cast_operations, plain_operations
from .text import (
    HeavyPixNerDiT,
    PackedFeedForward,
    TextAttention,
    TextDiTBlock,
    TextNerfBlock,
    TextPixNerDiT,
    TextRefineAttention,
    TextRefineBlock,
)

__all__ = [
    "ChromaRadiance", "FeedForward", "FlattenDiTBlock", "HeavyPixNerDiT", "NerfBlock", "NerfGLUBlock",
    "PackedFeedForward", "PixNerDiT", "RAttention", "RMSNorm", "ScaleNorm", "TextAttention", "TextDiTBlock",
    "TextNerfBlock", "TextPixNerDiT", "TextRefineAttention", "TextRefineBlock", "cast_operations",
    "plain_operations", "rotary",
]  # fmt: skip
