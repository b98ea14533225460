"""Networks that are not in the table: what their structure tells of them. Claims only what is certain, else refuses."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

from torch import nn

from sostenuto import source
from sostenuto.anatomy import Anatomy, BlockList, Branch, SiteKind
from sostenuto.errors import AnatomyError
from sostenuto.unet import is_unet

_log = logging.getLogger(__name__)
_ANNOUNCED: WeakSet[type[nn.Module]] = WeakSet()

_ATTENTION = re.compile(r"(.+_)?(attn|attention)_?\d*")
_MLP = re.compile(r"(.+_)?(ff|ffn|mlp|feed_?forward)(_context|_moe_gen|_[it])?")
_TIMESTEPS = (
    "timestep",
    "timesteps",
    "t",
    "time",
    "time_step",
    "time_steps",
    "noise_level",
    "noise_levels",
    "sigma",
    "sigmas",
)
_CONTEXT = re.compile(r".*(encoder_hidden|context|cond|memory|text|txt|prompt|caption|cross|encoder_out).*|ctx|y|kv")
_CROSS = re.compile(r"cross|_to_|multihead|2$")
# Lists that run on the conditioning alone, or a few blocks in front of the main ones.
_ASIDE = re.compile(
    r"text|txt|context|ctx|caption|prompt|cond\w*|refiners?|embed\w*|perceiver|conditioner|tokenizer|control\w*"
)
_NAMES = "attn, attn1, attn2, attention, self_attn, cross_attn, …, ff, ffn, mlp, feed_forward, …"
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_STACKS = (nn.TransformerEncoder, nn.TransformerDecoder)


@dataclass(frozen=True)
class _List:
    """A list of blocks, and what became of it."""

    path: str
    blocks: list[nn.Module]
    found: BlockList | None = None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.path} ({len(self.blocks)} × {type(self.blocks[0]).__name__}: {self.reason})"


def discover(denoiser: nn.Module) -> Anatomy:
    """The anatomy of a network of an unknown class, from the lists of blocks in it that have an attention and an MLP.

    Branches are found by the names of the field and by what the block's source gives them. No branch has a ``front`` but those
    of torch's own transformer layers, whose code is known. A range of blocks may be skipped only where the source shows that
    one tensor goes from block to block and that nothing else reads it.

    Raises:
        AnatomyError: nothing was found, or the network is a U-Net; says what was looked for, what is there and what to write.
    """
    name = type(denoiser).__name__
    if is_unet(denoiser) or all(
        isinstance(getattr(denoiser, path, None), nn.Module) for path in ("down_blocks", "up_blocks")
    ):
        raise AnatomyError(
            f"{name} is a U-Net, whose branches can't be cached: use a method for U-Nets (DeepCache), one that keeps the "
            "output alone (ABCache) or one that skips nothing (EpsilonScaling, TimeShift); or describe its branches with "
            "sostenuto.register_anatomy"
        )
    lists = list(_lists(denoiser))
    blocks = tuple(each.found for each in lists if each.found is not None)
    if not blocks:
        raise AnatomyError(
            f"the sites of a {name} are not known and its structure doesn't tell them: looked for a ModuleList of two or more "
            f"blocks of one class with an attention and an MLP ({_NAMES}), found {_what_is_there(denoiser, lists)}; describe "
            f"it: {snippet(denoiser, lists)} (sostenuto models lists the classes that are known)"
        )
    if len(blocks) > 1:  # in which order they run isn't certain
        blocks = tuple(replace(place, whole=False) for place in blocks)
    try:
        anatomy = replace(arguments_of(denoiser), blocks=blocks)
    except AnatomyError as error:
        raise AnatomyError(f"{error}: {snippet(denoiser, lists)}") from None
    _announce(type(denoiser), lists)
    return anatomy


def arguments_of(denoiser: nn.Module) -> Anatomy:
    """An anatomy without blocks: which argument of ``forward`` is the timestep, by its name, and which the latents.

    Raises:
        AnatomyError: no argument has the name of a timestep.
    """
    names = source.argument_names(type(denoiser))
    known = [name for name in _TIMESTEPS if name in names]
    others = [name for name in names if name not in known]
    if not known or not others:
        missing = "argument for the latents" if known else f"timestep (looked for {', '.join(_TIMESTEPS)})"
        raise AnatomyError(
            f"{type(denoiser).__name__}.forward({', '.join(names)}) has no {missing}: name "
            "its arguments with sostenuto.register_anatomy, Anatomy(…, timestep=…, latents=…)"
        )
    stepwise = [name for name in others[1:] if re.search(r"timestep|time_step|sigma|noise_level", name)]
    caches = [name for name in others if "cache" in name]
    return Anatomy(
        (),
        timestep=known[0],
        latents=others[0],
        stepwise=(*known[1:], *stepwise),
        prefill=_no_caches(type(denoiser).__name__, caches) if caches else None,
    )


def snippet(denoiser: nn.Module, lists: list[_List] | None = None) -> str:
    """The call of ``register_anatomy`` to begin with: what was found, and an ellipsis for what wasn't."""
    lists = list(_lists(denoiser)) if lists is None else lists
    found = [each.found for each in lists if each.found is not None]
    if not found:
        found = [BlockList(each.path, (), _streams(each.blocks[0])[0]) for each in lists[:1]]
    try:
        arguments = arguments_of(denoiser)
        named = "" if arguments.timestep == "timestep" else f", timestep={arguments.timestep!r}"
    except AnatomyError:
        named = ", timestep=…"
    written = ", ".join(_written(place) for place in found) or "sostenuto.BlockList(…)"
    return f"sostenuto.register_anatomy({type(denoiser).__name__}, sostenuto.Anatomy(({written},){named}))"


def _written(place: BlockList) -> str:
    branches = ", ".join(
        f"sostenuto.Branch(sostenuto.SiteKind.{branch.kind.name}, {branch.module!r}"
        + (f", {branch.front!r}" if branch.front else "")
        + (f", hollow={branch.hollow!r})" if branch.hollow else ")")
        for branch in place.branches
    )
    # The trailing comma of a tuple of one.
    return f"sostenuto.BlockList({place.path!r}, ({branches or '…'},), {place.streams!r}, whole={place.whole})"


def _announce(model_class: type[nn.Module], lists: list[_List]) -> None:
    """Say once for a class what was recognised and what was left out."""
    if model_class in _ANNOUNCED:
        return
    _ANNOUNCED.add(model_class)
    left_out = "; ".join(str(each) for each in lists if each.found is None)
    _log.info(
        "%s is not in the table: its blocks were recognised by their structure in %s; left out: %s; sostenuto.inspect shows "
        "what was found, sostenuto.verify proves it",
        model_class.__name__,
        ", ".join(each.path for each in lists if each.found is not None),
        left_out or "nothing",
    )


def _no_caches(name: str, caches: list[str]) -> Any:
    def prefill(arguments: Mapping[str, Any]) -> bool:
        used = next((cache for cache in caches if arguments.get(cache)), None)
        if used is not None:
            raise AnatomyError(
                f"{name} was given {used}: whether the call fills a cache of the network's own can't be told from its "
                "structure; describe it with sostenuto.register_anatomy, Anatomy(…, prefill=…)"
            )
        return False

    return prefill


# --- lists of blocks -----------------------------------------------------------------------------------------------


def _lists(denoiser: nn.Module) -> Iterator[_List]:
    """All lists of two or more blocks of one class, those within blocks of another one left out; the best first."""
    found: list[_List] = []
    for path, module in denoiser.named_modules():
        blocks = list(module.children())
        if (
            type(module) in (nn.ModuleList, nn.Sequential)
            and len(blocks) > 1
            and len({type(block) for block in blocks}) == 1
            and any(True for _ in blocks[0].children())
            and not any(path.startswith(f"{each.path}.") for each in found)
        ):
            found.append(_judged(denoiser, path, blocks))
    found.sort(key=lambda each: each.found is None)
    yield from found


def _judged(denoiser: nn.Module, path: str, blocks: list[nn.Module]) -> _List:
    if any(_ASIDE.fullmatch(word) for word in re.split(r"[._]", path)):
        return _List(path, blocks, reason="by its name it runs on the conditioning or in front of the main blocks")
    branches = _layer_branches(blocks) if isinstance(blocks[0], _LAYERS) else _branches(path, blocks)
    if not (any(branch.kind.is_attention for branch in branches) and any(b.kind is SiteKind.MLP for b in branches)):
        children = ", ".join(name for name, _ in blocks[0].named_children())
        return _List(path, blocks, reason=f"no attention and MLP among {children}")
    stream = _chained(denoiser, path, blocks[0])
    if stream is None:
        return _List(path, blocks, BlockList(path, branches, *_streams(blocks[0]), whole=False))
    return _List(path, blocks, BlockList(path, branches, (stream,)))


def _branches(path: str, blocks: list[nn.Module]) -> tuple[Branch, ...]:
    """The attentions and MLPs that all blocks have, or have ``None`` in the place of."""
    children = {name: child for block in reversed(blocks) for name, child in block.named_children()}
    joint = len(source.returned(type(blocks[0])) or ()) > 1
    found: list[Branch] = []
    for name, child in children.items():
        if not all(hasattr(block, name) for block in blocks) or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            continue
        if isinstance(child, nn.MultiheadAttention) or _ATTENTION.fullmatch(name):
            crossed = any(other != name and _CROSS.search(other) and _ATTENTION.fullmatch(other) for other in children)
            kind = _kind(path, name, source.given(type(blocks[0]), name), joint, crossed)
            found.append(Branch(kind, name, tokenwise=False))
        elif _MLP.fullmatch(name) and sum(p.ndim > 1 for p in child.parameters()) > 1:  # not one projection
            found.append(Branch(SiteKind.MLP, name, tokenwise=False))
    return tuple(found)


def _kind(path: str, name: str, given: list[str] | None, joint: bool, crossed: bool) -> SiteKind:
    """What an attention is, by its name, by what its block gives it and by whether the block has another for the context."""
    if "temporal" in f"{path}.{name}":
        return SiteKind.TEMPORAL_ATTENTION
    contextual = any(_CONTEXT.fullmatch(word) for word in given or ())
    if joint and contextual and "self" not in name and not _CROSS.search(name):
        return SiteKind.JOINT_ATTENTION
    if _CROSS.search(name) and (contextual or given is None or not name.endswith("2")):
        return SiteKind.CROSS_ATTENTION
    if "self" in name or name.endswith("1") or crossed:
        return SiteKind.SELF_ATTENTION
    return SiteKind.CROSS_ATTENTION if contextual else SiteKind.SELF_ATTENTION


def _layer_branches(blocks: list[nn.Module]) -> tuple[Branch, ...]:
    """The branches of torch's own transformer layers, whose code is known; none where a subclass has code of its own."""
    block: Any = blocks[0]
    layer = next(each for each in _LAYERS if isinstance(block, each))
    methods = ("forward", "_sa_block", "_mha_block", "_ff_block")
    if any(getattr(type(block), name, None) is not getattr(layer, name, None) for name in methods):
        return ()
    crossed = layer is nn.TransformerDecoderLayer
    layers: list[Any] = blocks
    normed = all(each.norm_first for each in layers)  # else the norms stand behind the sums

    def front(norm: str) -> tuple[str, ...]:
        return (norm,) if normed else ()

    return (
        Branch(SiteKind.SELF_ATTENTION, "self_attn", front("norm1"), tokenwise=False),
        *([Branch(SiteKind.CROSS_ATTENTION, "multihead_attn", front("norm2"), tokenwise=False)] if crossed else []),
        Branch(
            SiteKind.MLP,
            "linear2",
            front("norm3" if crossed else "norm2"),
            hollow=("linear1",),
            tokenwise=all(each.self_attn.batch_first for each in layers),
        ),
    )


def _streams(block: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The arguments of a block that it hands on, and the order in which it returns several."""
    names = source.argument_names(type(block))
    returned = source.returned(type(block)) or ()
    if len(returned) > 1 and set(returned) <= set(names):
        return tuple(name for name in names if name in returned), returned
    return names[:1], ()


def _chained(denoiser: nn.Module, path: str, block: nn.Module) -> str | None:
    """The argument through which one tensor that nothing else reads goes from block to block; ``None`` if not certain."""
    names = source.argument_names(type(block))
    parent, _, name = path.rpartition(".")
    owner = denoiser.get_submodule(parent)
    above = [denoiser.get_submodule(".".join(parent.split(".")[:depth])) for depth in range(len(parent.split(".")))]
    if parent and any(source.mentions(type(each), name) for each in above):
        return None
    if type(owner) in _STACKS and type(block) in _LAYERS:
        return names[0]
    place = source.chained(type(owner), name)
    if place is None or len(source.returned(type(block)) or ()) != 1:
        return None
    if isinstance(place, int):
        place = names[place] if place < len(names) else ""
    return place if place in names else None


def _what_is_there(denoiser: nn.Module, lists: list[_List]) -> str:
    if lists:
        return "; ".join(str(each) for each in lists)
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in denoiser.named_children())
    return f"no such list, only {children or 'no submodules'}"
