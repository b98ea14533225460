"""The words that describe where features can be tapped in a class of networks; the descriptions are in ``families.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sostenuto.errors import AnatomyError


class SiteKind(Enum):
    """What a tapped branch does; methods choose sites by it."""

    SELF_ATTENTION = "self-attention"
    CROSS_ATTENTION = "cross-attention"
    TEMPORAL_ATTENTION = "temporal-attention"
    JOINT_ATTENTION = "joint-attention"
    """Two streams (such as image and text) attend to each other in one module, which returns both."""
    MLP = "mlp"
    FUSED = "fused"
    """Attention and MLP share their last projection: they are skipped together or not at all."""
    BLOCKS = "blocks"
    """A range of whole blocks."""
    DEEP = "deep"
    """All of a U-Net that lies beyond one of its skip connections."""
    OUTPUT = "output"
    """The denoiser's output: skipping it skips the call."""

    @property
    def is_attention(self) -> bool:
        """Whether methods that cache "attention" mean this branch."""
        return self in _ATTENTIONS

    @property
    def is_whole(self) -> bool:
        """Whether it stands for all branches of a step at once."""
        return self in (SiteKind.BLOCKS, SiteKind.OUTPUT)


_ATTENTIONS = (
    SiteKind.SELF_ATTENTION,
    SiteKind.CROSS_ATTENTION,
    SiteKind.TEMPORAL_ATTENTION,
    SiteKind.JOINT_ATTENTION,
)


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block. All paths are relative to the block.

    A block whose ``module`` is ``None`` lacks the branch, as the last block of SD3 lacks the text's MLP; so does one whose
    ``hollow`` module is ``None`` lack that.

    Where a block computes its attention by a function, so that no module could be skipped in the middle of it, the block
    itself is its only branch: ``Branch(SiteKind.FUSED, "")``. What it adds to its streams is kept then.

    Attributes:
        kind: what it does.
        module: path of the submodule whose output is cached; empty for the block itself.
        front: paths of modules in front of it (its norm, as a rule) whose token outputs nothing but this branch reads. When
            the branch is skipped they are given the first token only: what they return besides (gates, shifts) stays exact,
            and their work on all the other tokens is not done.
        hollow: paths of modules between ``front`` and ``module`` that are skipped with it, such as the attention in front of
            a fused projection; they hand on what they are given. Of a whole block, the first module that is given the
            normalised and modulated stream.
        calls: how often one call of the block calls ``module``.
        tokenwise: whether the module takes ``[batch, tokens, channels]`` and its output for a token depends on no other token,
            where its kind is one of which that is expected; not so for convolutions over the image, or for experts that
            choose their tokens.
        optional: whether some calls of the network don't run it, such as the audio branches where there is no audio.
    """

    kind: SiteKind
    module: str
    front: tuple[str, ...] = ()
    hollow: tuple[str, ...] = ()
    calls: int = 1
    tokenwise: bool = True
    optional: bool = False

    def __post_init__(self) -> None:
        _check(self.kind, SiteKind, "Branch's kind")
        _check(self.module, str, "Branch's module")
        for name in ("front", "hollow"):
            _check_all(getattr(self, name), str, f"Branch's {name}")
        if not self.module and (self.kind is not SiteKind.FUSED or self.front or self.calls != 1):
            raise AnatomyError(
                f"a Branch without a module is the block itself, Branch(SiteKind.FUSED, '', hollow=…), not {self!r}"
            )
        if not isinstance(self.calls, int) or self.calls < 1:
            raise AnatomyError(f"Branch's calls must be a whole number of 1 or more, not {self.calls!r}")


@dataclass(frozen=True)
class BlockList:
    """A ``ModuleList`` of blocks of one class.

    Attributes:
        path: where it is in the network.
        branches: the branches of each block, in the order in which they run.
        streams: the arguments of a block that it changes and hands on to the next one, the sample's first.
        returns: those in the order in which a block returns them; by default that of ``streams``. A block with one stream
            returns the tensor itself.
        whole: whether the network reads only what the last block returns, so that a range of blocks may be skipped.
        long_skips: whether the blocks of the second half also read what those of the first half return, last to first.
        in_place: whether a block writes into the streams that it is given.
    """

    path: str
    branches: tuple[Branch, ...]
    streams: tuple[str, ...] = ("hidden_states",)
    returns: tuple[str, ...] = ()
    whole: bool = True
    long_skips: bool = False
    in_place: bool = False

    def __post_init__(self) -> None:
        _check(self.path, str, "BlockList's path")
        _check_all(self.branches, Branch, "BlockList's branches")
        for name in ("streams", "returns"):
            _check_all(getattr(self, name), str, f"BlockList's {name}")
        if len(self.branches) > 1 and not all(branch.module for branch in self.branches):
            raise AnatomyError(f"{self.path}: a branch that is the block itself must be the only one of its blocks")
        if not self.streams:
            raise AnatomyError("BlockList's streams must name the block's argument with the sample, such as ('x',)")


@dataclass(frozen=True)
class Anatomy:
    """How to find the sites of one class of networks, and what its arguments are.

    Attributes:
        blocks: its lists of blocks, in the order in which they run.
        interleaved: whether the lists run in turn, one block of each, instead of one list after the other.
        timestep: name of ``forward``'s timestep argument.
        reversed_timestep: whether the network is given 1 − t / 1000 for the scheduler's timestep t.
        timestep_offset: what is added to the scheduler's timestep before the network is given it.
        negated_prediction: whether its pipelines hand the negative of what it returns to the scheduler.
        latents: name of ``forward``'s argument with the noisy latents; by default its first.
        noisy_last: whether conditions stand before the noisy sample in what its pipelines give it as latents, and text or
            conditions in what it returns, so that the sample comes last; else it comes first.
        stepwise: names of other arguments of ``forward`` that change from step to step, such as a second stream's latents.
        converted: tells from the network's configuration whether its pipelines turn what it returns into something else before
            the scheduler sees it, so that the scheduler doesn't tell what the network predicts.
        prefill: tells from a call's arguments by name whether it fills a key-value cache of the network's own: such a call
            always runs in full, and steps after it begin anew.
    """

    blocks: tuple[BlockList, ...]
    interleaved: bool = False
    timestep: str = "timestep"
    reversed_timestep: bool = False
    timestep_offset: float = 0.0
    negated_prediction: bool = False
    latents: str = ""
    noisy_last: bool = False
    stepwise: tuple[str, ...] = ()
    prefill: Callable[[Mapping[str, Any]], bool] | None = None
    converted: Callable[[Mapping[str, Any]], bool] | None = None

    def __post_init__(self) -> None:
        _check_all(self.blocks, BlockList, "Anatomy's blocks")
        _check(self.timestep, str, "Anatomy's timestep")
        _check(self.latents, str, "Anatomy's latents")
        _check_all(self.stepwise, str, "Anatomy's stepwise")


def _check(value: Any, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        raise AnatomyError(f"{name} must be a {kind.__name__}, not {value!r}")


def _check_all(values: Any, kind: type, name: str) -> None:
    if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
        raise AnatomyError(f"{name} must be a tuple of {kind.__name__}, such as (…,), not {values!r}")
