"""Where: the sites of a denoiser, found from one table row per network class."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import nn

from sostenuto import compat
from sostenuto.errors import AnatomyError


class SiteKind(Enum):
    """What a tapped branch does; methods choose sites by it."""

    SELF_ATTENTION = "self-attention"
    CROSS_ATTENTION = "cross-attention"
    TEMPORAL_ATTENTION = "temporal-attention"
    JOINT_ATTENTION = "joint-attention"
    MLP = "mlp"
    BLOCKS = "blocks"
    """A range of whole blocks."""
    DEEP = "deep"
    """All of a U-Net that lies beyond one of its skip connections."""
    OUTPUT = "output"
    """The denoiser's output: skipping it skips the call."""

    @property
    def is_attention(self) -> bool:
        """Whether methods that cache "attention" mean this branch."""
        return self in (SiteKind.SELF_ATTENTION, SiteKind.CROSS_ATTENTION)


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block.

    Attributes:
        kind: what it does.
        module: path of the submodule whose output is cached, relative to the block.
        norm: path of the norm in front of it, if nothing else reads that norm's hidden states. When the branch is
            skipped the norm sees one token only: what it returns besides (gates, shifts) stays exact, and the
            normalisation and modulation of all the other tokens is not computed.
    """

    kind: SiteKind
    module: str
    norm: str | None = None


@dataclass(frozen=True)
class Anatomy:
    """How to find the sites of one class of networks.

    Attributes:
        blocks: path of the ``ModuleList`` of blocks.
        branches: the branches of each block, in the order in which they run.
        timestep: name of ``forward``'s timestep argument.
    """

    blocks: str
    branches: tuple[Branch, ...]
    timestep: str = "timestep"


@dataclass(frozen=True)
class Site:
    """One tap point.

    Attributes:
        id: stable name: the tapped submodule's path, such as ``transformer_blocks.3.attn1``; of a range of blocks
            ``transformer_blocks.2-5``; of the denoiser's output ``output``.
        kind: what is tapped.
        block: index of its block, the first one of a range; of the deep part of a U-Net the number of its skip connection;
            −1 for the output.
        norm: path of the norm that feeds only this branch, or ``None``.
        parameters: number of parameters of the tapped submodules.
        last_block: index of the last block of a range.
        residual: whether what a range adds to its input is kept, instead of its output.
    """

    id: str
    kind: SiteKind
    block: int
    norm: str | None
    parameters: int
    last_block: int | None = None
    residual: bool = False

    def covers(self, other: Site) -> bool:
        """Whether the other site lies within this one, and is not reached when this one is skipped."""
        if self.kind is SiteKind.OUTPUT:
            return other.kind is not SiteKind.OUTPUT
        last = other.block if other.last_block is None else other.last_block
        return (
            self.last_block is not None and other is not self and self.block <= other.block <= last <= self.last_block
        )


_ANATOMIES: dict[str, Anatomy] = {
    "DiTTransformer2DModel": Anatomy(
        blocks="transformer_blocks",
        branches=(
            Branch(SiteKind.SELF_ATTENTION, "attn1", norm="norm1"),
            Branch(SiteKind.MLP, "ff", norm="norm3"),
        ),
    ),
    "PixArtTransformer2DModel": Anatomy(
        blocks="transformer_blocks",
        branches=(
            Branch(SiteKind.SELF_ATTENTION, "attn1", norm="norm1"),
            Branch(SiteKind.CROSS_ATTENTION, "attn2"),  # reads the residual stream itself
            Branch(SiteKind.MLP, "ff", norm="norm2"),
        ),
    ),
}


def register_anatomy(model_class: type[nn.Module], anatomy: Anatomy) -> None:
    """Teach the library the sites of a network class; replaces what was known of a class of that name.

    Raises:
        AnatomyError: the arguments are not a module class and an :class:`Anatomy`.
    """
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise AnatomyError(f"register_anatomy takes a class of torch.nn.Module, not {model_class!r}")
    if not isinstance(anatomy, Anatomy):
        raise AnatomyError(f"register_anatomy takes an Anatomy, not {anatomy!r}")
    _ANATOMIES[model_class.__name__] = anatomy


def anatomy_of(denoiser: nn.Module) -> Anatomy:
    """The anatomy of a denoiser, by its class or the nearest base class that is known.

    Raises:
        AnatomyError: no class of it is known.
    """
    for base in type(denoiser).__mro__:
        if base.__name__ in _ANATOMIES:
            return _ANATOMIES[base.__name__]
    raise AnatomyError(
        f"the sites of a {type(denoiser).__name__} are not known (known: {', '.join(sorted(_ANATOMIES))}): "
        "describe them with sostenuto.register_anatomy"
    )


def timestep_argument(denoiser: nn.Module) -> str:
    """Name of ``forward``'s timestep argument; ``timestep``, as everywhere in diffusers, where the class isn't known."""
    return next(
        (_ANATOMIES[c.__name__].timestep for c in type(denoiser).__mro__ if c.__name__ in _ANATOMIES), "timestep"
    )


def inspect(denoiser: nn.Module) -> list[Site]:
    """The sites of a denoiser, in the order in which they run.

    Raises:
        AnatomyError: the class isn't known, or a path of its anatomy leads nowhere.
    """
    denoiser = compat.unwrapped(denoiser)
    if not isinstance(denoiser, nn.Module):
        raise AnatomyError(f"a denoiser is a torch.nn.Module, not a {type(denoiser).__name__}")
    anatomy = anatomy_of(denoiser)

    def find(path: str) -> nn.Module:
        try:
            return denoiser.get_submodule(path)
        except AttributeError:
            raise AnatomyError(f"{type(denoiser).__name__} has no submodule {path!r}: its anatomy names it") from None

    sites: list[Site] = []
    tapped: dict[nn.Module, str] = {}
    for index, _ in enumerate(find(anatomy.blocks).children()):
        for branch in anatomy.branches:
            path = f"{anatomy.blocks}.{index}.{branch.module}"
            norm = f"{anatomy.blocks}.{index}.{branch.norm}" if branch.norm else None
            for name in (path, norm):
                if name and (other := tapped.setdefault(find(name), f"{path}|{name}")) != f"{path}|{name}":
                    raise AnatomyError(
                        f"{name} serves {other.split('|')[0]} and {path}: a tapped module or norm must serve one branch only"
                    )
            parameters = sum(p.numel() for p in find(path).parameters())
            sites.append(Site(path, branch.kind, index, norm, parameters))
    if not sites:
        raise AnatomyError(f"{type(denoiser).__name__}.{anatomy.blocks} is empty: there is nothing to cache")
    return sites


def num_blocks(denoiser: nn.Module) -> int:
    """Number of blocks of a denoiser.

    Raises:
        AnatomyError: the class isn't known.
    """
    denoiser = compat.unwrapped(denoiser)
    return len(list(denoiser.get_submodule(anatomy_of(denoiser).blocks).children()))


def block_range(denoiser: nn.Module, first: int, last: int, residual: bool = True) -> Site:
    """The site of the blocks ``first`` … ``last``, both included.

    Args:
        denoiser: the network.
        first: index of the first block.
        last: index of the last block.
        residual: keep what the range adds to its input, to be added to another input, or else its output.

    Raises:
        AnatomyError: the class isn't known, or there are no such blocks.
    """
    denoiser = compat.unwrapped(denoiser)
    count = num_blocks(denoiser)
    if not 0 <= first <= last < count:
        raise AnatomyError(f"{type(denoiser).__name__} has {count} blocks: there is no range {first} to {last}")
    path = anatomy_of(denoiser).blocks
    modules = [denoiser.get_submodule(f"{path}.{index}") for index in range(first, last + 1)]
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    name = f"{path}.{first}-{last}" + ("" if residual else ":hidden")
    return Site(name, SiteKind.BLOCKS, first, None, parameters, last_block=last, residual=residual)


OUTPUT = Site("output", SiteKind.OUTPUT, -1, None, 0)
"""The site of the denoiser's output."""
