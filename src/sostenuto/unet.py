"""Where, in a U-Net: what lies beyond each of its skip connections, found from the structure of its blocks."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

from torch import nn

from sostenuto import compat
from sostenuto.errors import AnatomyError

_UNETS = ("UNet2DModel", "UNet2DConditionModel")

# Down blocks that hand a skip connection on from every layer and from the downsampler, up blocks that join one in every
# layer; a layer is a residual network and, in most of them, an attention after it.
_DOWN = (
    "DownBlock2D",
    "AttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "SimpleCrossAttnDownBlock2D",
    "ResnetDownsampleBlock2D",
)
_UP = ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")


def is_unet(denoiser: nn.Module) -> bool:
    """Whether the denoiser is one of diffusers' U-Nets for images."""
    return _is_a(compat.unwrapped(denoiser), _UNETS)


def num_branches(unet: nn.Module) -> int:
    """Number of skip connections with something beyond them: all, but for the deepest of a U-Net without middle block.

    Raises:
        AnatomyError: the structure of a block isn't known.
    """
    return sum(len(layers) for _, layers in _blocks(unet, "up_blocks")) - (unet.mid_block is None)


def beyond(unet: nn.Module, branch: int) -> list[str]:
    """Paths of the modules that lie beyond a skip connection, in the order in which they run.

    Connection 0 leads from the input convolution to the last layer of the up path; the down path hands on one more after
    every layer and every downsampler, and the layers of the up path join them last to first. Nothing runs between these
    modules, so that the output of the last of them is all that the layer which joins the connection gets to see of them.
    Blocks that lie beyond it with all their layers are named whole.

    Args:
        unet: the network.
        branch: number of the skip connection, from 0 up to :func:`num_branches` − 1.

    Raises:
        AnatomyError: the structure of a block isn't known.
    """
    down, up = _blocks(unet, "down_blocks"), _blocks(unet, "up_blocks")
    handed_on = 1 + sum(len(layers) for _, layers in down)
    joined = sum(len(layers) for _, layers in up)
    if handed_on != joined:
        raise AnatomyError(
            f"the down path of this {type(unet).__name__} hands on {handed_on} skip connections, its up path joins {joined}: "
            "only U-Nets that join every one of them are known"
        )
    middle = [] if unet.mid_block is None else ["mid_block"]
    return [*_deeper(down, branch, count(1)), *middle, *_deeper(up, branch, count(joined - 1, -1))]


_Block = tuple[str, list[list[str]]]  # path, and the paths of the modules of each of its layers


def _blocks(unet: nn.Module, name: str) -> list[_Block]:
    """The blocks of the down or up path; a downsampler is a layer of its own, an upsampler runs with the last layer."""
    known = _DOWN if name == "down_blocks" else _UP
    blocks: list[_Block] = []
    for path, block in ((f"{name}.{index}", block) for index, block in unet.get_submodule(name).named_children()):
        if not _is_a(block, known):
            raise AnatomyError(
                f"{path} is a {type(block).__name__}, whose skip connections are not known (known: {', '.join(known)})"
            )
        attentions = _indices(block, "attentions")
        layers = [
            [f"{path}.resnets.{index}"] + ([f"{path}.attentions.{index}"] if index in attentions else [])
            for index in _indices(block, "resnets")
        ]
        if downsamplers := [f"{path}.downsamplers.{index}" for index in _indices(block, "downsamplers")]:
            layers.append(downsamplers)
        blocks.append((path, layers))
    return blocks


def _deeper(blocks: Iterable[_Block], branch: int, numbers: Iterable[int]) -> Iterable[str]:
    """The modules of the layers whose connection has a number above ``branch``; ``numbers`` goes along the layers."""
    numbers = iter(numbers)
    for path, layers in blocks:
        deep = [layer for layer in layers if next(numbers) > branch]
        yield from [path] if len(deep) == len(layers) else (module for layer in deep for module in layer)


def _indices(block: nn.Module, name: str) -> range:
    return range(len(getattr(block, name, None) or ()))


def _is_a(module: nn.Module, names: Iterable[str]) -> bool:
    return any(base.__name__ in names for base in type(module).__mro__)
