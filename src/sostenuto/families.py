"""The table of what is known: one row per class of networks."""

from __future__ import annotations

from sostenuto.anatomy import Anatomy, BlockList, Branch, SiteKind

ANATOMIES: dict[str, Anatomy] = {
    "DiTTransformer2DModel": Anatomy(
        blocks=(
            BlockList(
                "transformer_blocks",
                (
                    Branch(SiteKind.SELF_ATTENTION, "attn1", front=("norm1",)),
                    Branch(SiteKind.MLP, "ff", front=("norm3",)),
                ),
            ),
        ),
    ),
    "PixArtTransformer2DModel": Anatomy(
        blocks=(
            BlockList(
                "transformer_blocks",
                (
                    Branch(SiteKind.SELF_ATTENTION, "attn1", front=("norm1",)),
                    Branch(SiteKind.CROSS_ATTENTION, "attn2"),  # reads the residual stream itself
                    Branch(SiteKind.MLP, "ff", front=("norm2",)),
                ),
            ),
        ),
    ),
}
