"""Where features can be tapped in ComfyUI's own networks, told by their structure: they aren't those of diffusers."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from sostenuto.anatomy import BlockList, Branch, SiteKind
from sostenuto.discovery import arguments_of
from sostenuto.sites import known_anatomy, register_anatomy
from sostenuto.source import accepts

# Flux, Chroma, HunyuanVideo: the attention of a block is a function between its projections, and the blocks add in place.
_DOUBLE = BlockList(
    "double_blocks", (Branch(SiteKind.FUSED, "", hollow=("img_attn.qkv",)),), ("img", "txt"), in_place=True
)
_SINGLE = BlockList("single_blocks", (Branch(SiteKind.FUSED, "", hollow=("linear1",)),), ("x",), in_place=True)

_WAN = BlockList(
    "blocks",
    (
        Branch(SiteKind.SELF_ATTENTION, "self_attn", ("norm1",)),
        Branch(SiteKind.CROSS_ATTENTION, "cross_attn", ("norm3",)),
        Branch(SiteKind.MLP, "ffn", ("norm2",)),
    ),
    ("x",),
)

# Lumina 2, Z-Image.
_LUMINA = BlockList(
    "layers",
    (
        Branch(SiteKind.SELF_ATTENTION, "attention", ("attention_norm1",)),
        Branch(SiteKind.MLP, "feed_forward", ("ffn_norm1",)),
    ),
    ("x",),
)


def teach(network: nn.Module) -> None:
    """Register the anatomy of a network of ComfyUI's, where its class isn't known and its structure is one of these.

    Any other network is left to its class (Qwen-Image has diffusers' names) or to discovery.

    Raises:
        AnatomyError: no argument of the network has the name of a timestep.
    """
    lists = tuple(place for place in (_DOUBLE, _SINGLE, _WAN, _LUMINA) if _matches(network, place))
    if lists and known_anatomy(network) is None:
        register_anatomy(type(network), replace(arguments_of(network), blocks=lists))


def _matches(network: nn.Module, place: BlockList) -> bool:
    """Whether a network has such blocks: every module that is named, and every stream."""
    blocks = getattr(network, place.path, None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return False
    block = blocks[0]
    paths = [path for branch in place.branches for path in (branch.module, *branch.front, *branch.hollow) if path]
    known = {name for name, _ in block.named_modules()}
    return known.issuperset(paths) and all(accepts(type(block), stream) for stream in place.streams)
