"""Where: the tap points of a denoiser, found from what is known of its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from torch import nn

from sostenuto import compat
from sostenuto.anatomy import Anatomy, BlockList, Branch, SiteKind
from sostenuto.discovery import discover
from sostenuto.errors import AnatomyError
from sostenuto.families import ANATOMIES
from sostenuto.source import accepts, argument_names


@dataclass(frozen=True)
class Site:
    """One tap point.

    Attributes:
        id: stable name: the tapped submodule's path, such as ``transformer_blocks.3.attn1``; of a range of blocks
            ``transformer_blocks.2-5``; of the denoiser's output ``output`` or ``output:sample``.
        kind: what is tapped.
        block: position of its block among all blocks of the network, in running order; of a range that of its first one; of the
            deep part of a U-Net the number of its skip connection; −1 for the output.
        parameters: number of parameters of the tapped submodules.
        front: paths of the modules in front that feed only this branch, see :class:`~sostenuto.anatomy.Branch`.
        hollow: paths of the modules on the way that are skipped with it.
        calls: how often one denoiser call calls the module.
        tokenwise: whether tokens come out one by one as they go in, where the kind is one of which that is expected.
        optional: whether some calls of the denoiser leave it out.
        last_block: position of the last block of a range, or of the block itself where that is the branch.
        residual: whether what a range adds to its input is kept, instead of its output.
        in_list: position of its block within its own list of blocks; of a network's only list that is ``block``.
        clean: whether of the denoiser's output the clean sample that follows from it is kept, instead of the prediction.
    """

    id: str
    kind: SiteKind
    block: int
    parameters: int
    front: tuple[str, ...] = ()
    hollow: tuple[str, ...] = ()
    calls: int = 1
    tokenwise: bool = True
    optional: bool = False
    last_block: int | None = None
    residual: bool = False
    in_list: int | None = None
    clean: bool = False

    @property
    def takes_some_tokens(self) -> bool:
        """Whether it can be run for some tokens.

        Of attention and MLP with a shared projection the MLP can, behind a norm of its own and with what attention gave those
        tokens before.
        """
        if not self.tokenwise or self.calls > 1 or self.kind is SiteKind.JOINT_ATTENTION:
            return False
        return self.kind is not SiteKind.FUSED or (bool(self.front) and len(self.hollow) == 1)

    def covers(self, other: Site) -> bool:
        """Whether the other site lies within this one, and is not reached when this one is skipped."""
        if self.kind is SiteKind.OUTPUT:
            return other.kind is not SiteKind.OUTPUT
        last = other.block if other.last_block is None else other.last_block
        return (
            self.last_block is not None and other is not self and self.block <= other.block <= last <= self.last_block
        )

    def meets(self, other: Site) -> bool:
        """Whether the other site is not reached, or not to its end, when this one is skipped."""
        if self.covers(other) or self.last_block is None or other.last_block is None:
            return self.covers(other)
        return self.block <= other.last_block and other.block <= self.last_block


OUTPUT = Site("output", SiteKind.OUTPUT, -1, 0)
"""The site of the denoiser's output."""
CLEAN_SAMPLE = replace(OUTPUT, id="output:sample", clean=True)
"""The same, kept as the clean sample: a prediction made of it follows the noise that the sampler put in since."""


@dataclass(frozen=True)
class Block:
    """One block of a network.

    Attributes:
        path: where it is.
        place: the list that it belongs to, which says what a block of it is given and returns.
        number: its position there.
    """

    path: str
    place: BlockList
    number: int


def register_anatomy(model_class: type[nn.Module], anatomy: Anatomy) -> None:
    """Teach the library the sites of a network class; replaces what was known of a class of that name.

    Raises:
        AnatomyError: the arguments are not a module class and an :class:`Anatomy`, or the class takes no argument that
            ``stepwise`` names.
    """
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise AnatomyError(f"register_anatomy takes a class of torch.nn.Module, not {model_class!r}")
    if not isinstance(anatomy, Anatomy):
        raise AnatomyError(f"register_anatomy takes an Anatomy, not {anatomy!r}")
    unknown = [name for name in anatomy.stepwise if not accepts(model_class, name)]
    if unknown:
        raise AnatomyError(
            f"{model_class.__name__}.forward has no argument {unknown[0]!r} that could change from step to step, only "
            f"{', '.join(argument_names(model_class))}: correct its anatomy, Anatomy(…, stepwise=…)"
        )
    ANATOMIES[model_class.__name__] = anatomy


def anatomy_of(denoiser: nn.Module) -> Anatomy:
    """The anatomy of a denoiser, by its class or the nearest base class that is known, else by its structure.

    Raises:
        AnatomyError: no class of it is known, and its structure doesn't tell.
    """
    denoiser = compat.unwrapped(denoiser)
    if not isinstance(denoiser, nn.Module):
        raise AnatomyError(f"a denoiser is a torch.nn.Module, not a {type(denoiser).__name__}")
    return known_anatomy(denoiser) or discover(denoiser)


def known_anatomy(denoiser: nn.Module) -> Anatomy | None:
    """The anatomy of a denoiser, or ``None`` where no class of it is known."""
    return next((ANATOMIES[base.__name__] for base in type(denoiser).__mro__ if base.__name__ in ANATOMIES), None)


def inspect(denoiser: nn.Module) -> list[Site]:
    """The sites of a denoiser, in the order in which they run.

    Raises:
        AnatomyError: the class isn't known, or a path of its anatomy leads nowhere.
    """
    denoiser = compat.unwrapped(denoiser)
    found: list[Site] = []
    owners: dict[nn.Module, int] = {}
    for index, block in enumerate(blocks_of(denoiser)):
        for branch in block.place.branches:
            site = _site(denoiser, block.path, branch, index)
            if site is None:
                continue
            site = replace(site, in_list=block.number)
            for path in (site.id, *site.front, *site.hollow):
                module = _find(denoiser, path)
                if owners.setdefault(module, len(found)) != len(found):
                    raise AnatomyError(
                        f"{path} serves {found[owners[module]].id} and {site.id}: a tapped module or one in front of "
                        "it must serve one branch only"
                    )
            found.append(site)
    if not found:
        lists = ", ".join(place.path for place in anatomy_of(denoiser).blocks)
        raise AnatomyError(f"{type(denoiser).__name__} has no blocks in {lists}: there is nothing to cache")
    return found


def blocks_of(denoiser: nn.Module) -> list[Block]:
    """All blocks of a denoiser that can be cached, in the order in which they run.

    Raises:
        AnatomyError: the class isn't known, or a path of its anatomy leads nowhere.
    """
    denoiser = compat.unwrapped(denoiser)
    anatomy = anatomy_of(denoiser)
    lists = [
        [
            Block(f"{place.path}.{name}", place, number)
            for number, (name, _) in enumerate(_find(denoiser, place.path).named_children())
        ]
        for place in anatomy.blocks
    ]
    if not anatomy.interleaved:
        return list(chain.from_iterable(lists))
    return [block for turn in zip(*lists, strict=True) for block in turn]


def num_blocks(denoiser: nn.Module) -> int:
    """Number of blocks of a denoiser.

    Raises:
        AnatomyError: the class isn't known.
    """
    return len(blocks_of(denoiser))


def stack(denoiser: nn.Module, residual: bool = True) -> Site:
    """The site of all blocks that may be skipped as one range.

    Raises:
        AnatomyError: the class isn't known, or it has no such blocks.
    """
    first, last = stack_range(denoiser)
    return block_range(denoiser, first, last, residual)


def has_stack(denoiser: nn.Module) -> bool:
    """Whether any blocks may be skipped as a range."""
    return any(block.place.whole for block in blocks_of(denoiser))


def stack_range(denoiser: nn.Module) -> tuple[int, int]:
    """Positions of the first and the last block of :func:`stack`.

    Raises:
        AnatomyError: the class isn't known, or it has no such blocks.
    """
    whole = [index for index, block in enumerate(blocks_of(denoiser)) if block.place.whole]
    if not whole:
        raise AnatomyError(
            f"the blocks of {type(compat.unwrapped(denoiser)).__name__} can't be skipped as a range: use a method that "
            "caches branches"
        )
    return whole[0], whole[-1]


def block_range(denoiser: nn.Module, first: int, last: int, residual: bool = True) -> Site:
    """The site of the blocks ``first`` … ``last``, both included, by their position among all blocks.

    Args:
        denoiser: the network.
        first: position of the first block.
        last: position of the last block.
        residual: keep what the range adds to its input, to be added to another input, or else its output.

    Raises:
        AnatomyError: the class isn't known, there are no such blocks, or the network reads what is between them.
    """
    denoiser = compat.unwrapped(denoiser)
    blocks = blocks_of(denoiser)
    if not 0 <= first <= last < len(blocks):
        raise AnatomyError(f"{type(denoiser).__name__} has {len(blocks)} blocks: there is no range {first} to {last}")
    members = blocks[first : last + 1]
    bare = next((block for block in members if not block.place.whole), None)
    if bare is not None:
        raise AnatomyError(f"the network reads what {bare.path} returns: a range with it can't be skipped")
    _check_skips(denoiser, blocks, first, last)
    parameters = sum(_num_parameters(denoiser.get_submodule(block.path)) for block in members)
    begin, end = members[0].path, members[-1].path
    same_list = begin.rpartition(".")[0] == end.rpartition(".")[0]
    name = f"{begin}-{end.rpartition('.')[2] if same_list else end}" + ("" if residual else ":hidden")
    return Site(name, SiteKind.BLOCKS, first, parameters, last_block=last, residual=residual)


def _check_skips(denoiser: nn.Module, blocks: Sequence[Block], first: int, last: int) -> None:
    """Refuse a range that other blocks would read stale outputs from.

    With long skips block n − 1 − i reads what block i returns, which a skipped range hands on unchanged but for its last one.
    """
    for place in {id(block.place): block.place for block in blocks[first : last + 1]}.values():
        if not place.long_skips or first == last:
            continue
        inside = [index for index, block in enumerate(blocks) if block.place is place]
        begin, count = inside[0], len(inside)
        if last - begin < count - 1 - (first - begin) and first - begin < count // 2 - 1:
            raise AnatomyError(
                f"blocks {first} to {last} of {type(denoiser).__name__} can't be skipped as a range: later blocks read what "
                f"each of them returns; a range from block {first} must reach block {begin + count - 1 - (first - begin)}"
            )


def _site(denoiser: nn.Module, block: str, branch: Branch, index: int) -> Site | None:
    """The site of a branch of one block, or ``None`` where the block lacks it."""
    if not branch.module:
        inside = tuple(f"{block}.{name}" for name in branch.hollow)
        parameters = _num_parameters(denoiser.get_submodule(block))
        return Site(
            block, branch.kind, index, parameters, hollow=inside, tokenwise=False, last_block=index, residual=True
        )
    path = f"{block}.{branch.module}"
    if _is_absent(denoiser, path):
        return None
    front = tuple(f"{block}.{name}" for name in branch.front if not _is_absent(denoiser, f"{block}.{name}"))
    hollow = tuple(f"{block}.{name}" for name in branch.hollow if not _is_absent(denoiser, f"{block}.{name}"))
    parameters = sum(_num_parameters(_find(denoiser, name)) for name in (path, *hollow))
    return Site(path, branch.kind, index, parameters, front, hollow, branch.calls, branch.tokenwise, branch.optional)


def _is_absent(denoiser: nn.Module, path: str) -> bool:
    """Whether a block has ``None`` in the place of the module."""
    parent, _, name = path.rpartition(".")
    return getattr(_find(denoiser, parent), name, path) is None


def _find(denoiser: nn.Module, path: str) -> nn.Module:
    try:
        return denoiser.get_submodule(path)
    except AttributeError:
        parent, _, name = path.rpartition(".")
        owner = _find(denoiser, parent)  # the first part that isn't there is the one to tell of
        children = ", ".join(child for child, _ in owner.named_children()) or "nothing"
        raise AnatomyError(
            f"{type(denoiser).__name__} has no submodule {path!r}, which its anatomy names: in {parent or 'it'} there is "
            f"{children}; correct {name!r} with sostenuto.register_anatomy"
        ) from None


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
