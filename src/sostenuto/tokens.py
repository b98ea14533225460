"""Which tokens a partial step runs: how they are scored, and the choice of the highest scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from sostenuto.anatomy import SiteKind
from sostenuto.attended import Attended
from sostenuto.attention_tap import is_guided
from sostenuto.errors import MethodError
from sostenuto.sites import Site
from sostenuto.state import Wanted

Selection = Literal["random", "value-norm", "attention", "cross-entropy"]
SELECTIONS: tuple[Selection, ...] = ("random", "value-norm", "attention", "cross-entropy")

_QUERIES_AT_ONCE = 4096  # of a map, whose whole would not fit for a video's tokens


class Scores(Protocol):
    """How important tokens are, staleness and spread left aside."""

    macs: int
    """Multiply-accumulates spent so far."""

    def observe(self, path: str, output: Any, attended: Sequence[Attended]) -> None:
        """Take in what an observed module returned, and what attention was given within it."""
        ...

    def at(self, step: int, sites: Sequence[int], num_tokens: int) -> torch.Tensor:
        """The scores of these sites ``[sites, rows, num_tokens]`` in float32; one row stands for the whole batch."""
        ...


class RandomScores:
    """Uniform in [0, 1): one draw for all rows of the batch, so that both halves of fused guidance get the same.

    Every step has a generator of its own, seeded by the step alone: the draw depends neither on the order of calls (guidance
    in separate calls gets the same tokens) nor on the device, and leaves the global generator alone.

    Args:
        seed: of the whole generation.
        num_sites: of the denoiser.
    """

    macs = 0

    def __init__(self, seed: int, num_sites: int) -> None:
        self._seed, self._num_sites = seed, num_sites

    def observe(self, path: str, output: Any, attended: Sequence[Attended]) -> None:
        """Nothing: random scores know no features."""

    def at(self, step: int, sites: Sequence[int], num_tokens: int) -> torch.Tensor:
        """The step's draw."""
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + step) % 2**32)
        draw = torch.rand(self._num_sites, 1, num_tokens, generator=generator, device="cpu")
        return draw[list(sites)]


def value_norms(value: torch.Tensor, heads: int) -> torch.Tensor:
    """``Σ_heads (1 − ‖v_j‖₂)`` of each token: tokens with small values come first (DuCa's first version)."""
    return (1 - value.float().unflatten(-1, (heads, -1)).norm(dim=-1)).sum(dim=-1)


def column_sums(attended: Attended) -> torch.Tensor:
    """``Σ_q P_qj`` of the head-averaged map: how much all tokens attend to token j, ``[rows, keys]``."""
    heads, queries = attended.query.shape[1:3]
    parts = [slice(first, first + _QUERIES_AT_ONCE) for first in range(0, queries, _QUERIES_AT_ONCE)]
    total: Any = sum(attended.head_map(head, part).sum(dim=1) for head in range(heads) for part in parts)
    return total / heads


def averaged_map(attended: Attended) -> torch.Tensor:
    """The head-averaged map ``[rows, queries, keys]``."""
    heads = attended.query.shape[1]
    total: Any = sum(attended.head_map(head) for head in range(heads))
    return total / heads


def entropy(attention_map: torch.Tensor) -> torch.Tensor:
    """``1 − Σ_k p log p`` of each query's row of a map: tokens that attend to much of the text come first."""
    return 1 + torch.special.entr(attention_map).sum(dim=-1)


def of_streams(sums: torch.Tensor, value: torch.Tensor, sample: torch.Tensor) -> list[torch.Tensor]:
    """What joint attention says of all tokens ``[rows, keys]`` by stream, the sample's first; its text comes before or behind.

    Args:
        sums: of all tokens.
        value: what attention is given, ``[rows, heads, keys, channels]``.
        sample: the values of the sample's stream, ``[rows, tokens, channels]``: unlike keys no network changes them on the way.
    """
    sample, tokens = sample.unflatten(-1, (value.shape[1], -1)).transpose(1, 2).to(value.dtype), sample.shape[1]
    if torch.equal(value[:, :, :tokens], sample):
        return [sums[:, :tokens], sums[:, tokens:]]
    return [sums[:, -tokens:], sums[:, :-tokens]] if torch.equal(value[:, :, -tokens:], sample) else []


_JOINT = SiteKind.JOINT_ATTENTION
_READ: dict[Selection, dict[SiteKind, tuple[str, ...]]] = {
    "value-norm": {
        SiteKind.SELF_ATTENTION: ("to_v",),
        SiteKind.FUSED: ("to_v",),
        _JOINT: ("to_v", "add_v_proj", "to_v_t"),
    },
    "attention": {SiteKind.SELF_ATTENTION: (), SiteKind.FUSED: (), _JOINT: ("to_v",)},
    "cross-entropy": {SiteKind.CROSS_ATTENTION: ()},
}
"""The kinds of attention that a selection reads, each with its projections that are observed besides, the sample's first."""


class Reading(NamedTuple):
    """What is observed of the attention of a block: its path, its projections; and its number of heads, 0 if unknown."""

    path: str
    projections: tuple[str, ...]
    heads: int


def observed_modules(selection: Selection, denoiser: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Paths of what a selection listens to: the attention of every block, and projections of it.

    Raises:
        MethodError: a block has no such attention, or it lacks what is observed.
    """
    if selection == "random":
        return []
    readings = _attention_of_blocks(selection, denoiser, sites).values()
    return [path for read in readings for path in (*(f"{read.path}.{name}" for name in read.projections), read.path)]


class ObservedScores:
    """Scores of all tokens from the attention of their block at its last full step, L2-normalised over the tokens.

    Where two streams attend to each other, the tokens of a stream are scored by how much those of both attend to them, and
    are normalised among themselves, as in ToCa's code for FLUX.

    In a network with cross-attention the conditional and the unconditional half of a batch (told by equal latents) get the
    same scores, from the average of both, as in the papers' PixArt code; otherwise every row has scores of its own.

    Args:
        selection: which score.
        denoiser: the network.
        sites: its sites.
        latents: what the pass begins with, ``[batch, …]``.
    """

    def __init__(self, selection: Selection, denoiser: nn.Module, sites: Sequence[Site], latents: torch.Tensor) -> None:
        self.macs = 0
        self._selection: Selection = selection
        attention = _attention_of_blocks(selection, denoiser, sites)
        self._readings = {read.path: read for read in attention.values()}
        self._attention = {i: attention[site.block].path for i, site in enumerate(sites) if site.block in attention}
        # Which of its block's branches of the kind a site is: they stand in the order of the streams, the sample's first.
        alike = [(site.block, site.kind) for site in sites]
        self._stream = [alike[:index].count(one) for index, one in enumerate(alike)]
        self._num_rows = latents.shape[0]
        crossed = any(site.kind is SiteKind.CROSS_ATTENTION for site in sites)
        self._halves_agree = crossed and is_guided(latents)
        self._projected: dict[str, torch.Tensor] = {}  # of the attention that is under way
        self._scores: dict[str, list[torch.Tensor]] = {}  # by stream, where the attention tells them apart

    @torch.no_grad()
    def observe(self, path: str, output: Any, attended: Sequence[Attended]) -> None:
        """Take in a projection, or the end of its attention."""
        if path not in self._readings:
            self._projected[path.rpartition(".")[2]] = output
            return
        projected, self._projected = self._projected, {}
        self._scores[path] = []
        for statistic in self._statistics(self._readings[path], projected, attended):
            if len(statistic) != self._num_rows:
                raise _unscored(f"{path} has {len(statistic)} rows for a batch of {self._num_rows}", self._selection)
            if self._halves_agree:
                statistic = statistic.unflatten(0, (2, -1)).mean(dim=0)
            importance = entropy(statistic) if self._selection == "cross-entropy" else statistic
            self._scores[path].append(F.normalize(importance, dim=-1))

    def _statistics(
        self, read: Reading, projected: Mapping[str, torch.Tensor], attended: Sequence[Attended]
    ) -> list[torch.Tensor]:
        """What is averaged over the halves of guidance, by stream: a number for each token, or the map of cross-attention."""
        missing = [name for name in read.projections if name not in projected]
        if missing:
            raise _unscored(f"{read.path} ran without its {missing[0]}, as with fused projections", self._selection)
        if self._selection == "value-norm":
            return [value_norms(projected[name], read.heads) for name in read.projections]
        if len(attended) != 1:
            raise _unscored(
                f"{read.path} calls torch's scaled_dot_product_attention {len(attended)} times, not once (attention backends "
                "other than 'native' never do)",
                self._selection,
            )
        self.macs += attended[0].query.numel() * attended[0].key.shape[-2]
        if self._selection == "cross-entropy":
            return [averaged_map(attended[0])]
        sums = column_sums(attended[0])
        if not read.projections or projected["to_v"].shape[1] == sums.shape[1]:
            return [sums]
        streams = of_streams(sums, attended[0].value, projected["to_v"])
        if not streams:
            raise _unscored(f"{read.path} attends to other values than those of its to_v", self._selection)
        return streams

    def at(self, step: int, sites: Sequence[int], num_tokens: int) -> torch.Tensor:
        """The scores of these sites' blocks."""
        found = []
        for index in sites:
            path = self._attention[index]
            if path not in self._scores:
                raise _unscored(f"{path} was not computed at the last full step", self._selection)
            streams, own = self._scores[path], self._stream[index]
            scores = next((one for one in streams[own:] + streams[:own] if one.shape[-1] == num_tokens), None)
            if scores is None:
                lengths = " and ".join(str(one.shape[-1]) for one in streams)
                raise _unscored(
                    f"{path} sees {lengths} tokens, another branch of its block {num_tokens}", self._selection
                )
            found.append(scores)
        return torch.stack(found)


class TokenSelector:
    """Chooses the tokens with the highest ``importance + λ₃·a/N``, raised for the best one of each tile.

    ``a`` counts the partial steps since a token was last computed. All sites of a step are chosen at once.

    Args:
        scores: the importance.
        partial_before: for each step, and the end, how many partial steps come before it.
        staleness_weight: what a partial step adds to a token that was left out, λ₃/N.
        spatial_bonus: by which share the score of the best token in a tile is raised.
        tile: side of the tiles, in tokens.
        latents: ``[batch, channels, height, width]``, for the tokens' grid.
    """

    def __init__(
        self,
        scores: Scores,
        partial_before: Sequence[int],
        staleness_weight: float,
        spatial_bonus: float,
        tile: int,
        latents: torch.Tensor,
    ) -> None:
        self._scores, self._partial_before = scores, partial_before
        self._staleness_weight, self._spatial_bonus, self._tile = staleness_weight, spatial_bonus, tile
        self._latents_shape = tuple(latents.shape)
        self._refreshed: dict[int, torch.Tensor | int] = {}  # per site: the partial steps up to a token's last refresh

    @property
    def macs(self) -> int:
        """Multiply-accumulates spent on scores so far."""
        return self._scores.macs

    def observe(self, path: str, output: Any, attended: Sequence[Attended]) -> None:
        """Hand on what the scores are made of."""
        self._scores.observe(path, output, attended)

    def computed(self, step: int, site: int) -> None:
        """All tokens of the site are fresh."""
        self._refreshed[site] = self._partial_before[step + 1]

    @torch.no_grad()
    def select(self, step: int, wanted: Sequence[Wanted], device: torch.device) -> list[torch.Tensor]:
        """The tokens of every site: ``[num_tokens]``, or ``[batch, num_tokens]`` where the rows have scores of their own."""
        chosen: dict[int, torch.Tensor] = {}
        for length in {site.shape[1] for site in wanted}:
            group = [site for site in wanted if site.shape[1] == length]
            ranked = self._rank(step, group, length).to(device)
            for site, tokens in zip(group, ranked, strict=True):
                tokens, rows = tokens[:, : site.num_tokens], site.shape[0]
                chosen[site.site] = tokens[0] if len(tokens) == 1 else tokens.repeat(rows // len(tokens), 1)
        return [chosen[site.site] for site in wanted]

    def _rank(self, step: int, group: Sequence[Wanted], length: int) -> torch.Tensor:
        """The tokens ``[sites, rows, …]`` of some sites, the highest scores first, as many as the greediest site wants."""
        sites = [site.site for site in group]
        score = self._scores.at(step, sites, length)
        refreshed = torch.stack([_like(score[0], self._refreshed[index]) for index in sites])
        score = score + self._staleness_weight * (self._partial_before[step] - refreshed)
        if self._spatial_bonus:
            score = raise_best_of_tiles(score, self._grid(length), self._tile, self._spatial_bonus)
        counts = torch.tensor([site.num_tokens for site in group])
        most = int(counts.max())
        tokens = score.topk(most, dim=-1).indices
        taken = (torch.arange(most) < counts[:, None])[:, None].to(score.device)
        now = torch.where(taken, self._partial_before[step + 1], refreshed.gather(-1, tokens))
        self._refreshed.update(zip(sites, refreshed.scatter(-1, tokens, now), strict=True))
        return tokens

    def _grid(self, num_tokens: int) -> tuple[int, int]:
        if len(self._latents_shape) == 4:
            height, width = self._latents_shape[-2:]
            patch = max(1, math.isqrt(height * width // num_tokens))
            if (height // patch) * (width // patch) == num_tokens:
                return height // patch, width // patch
        raise MethodError(
            f"{num_tokens} tokens of latents {list(self._latents_shape)} don't lie on a grid that could be tiled: set "
            "spatial_bonus=0"
        )


def raise_best_of_tiles(score: torch.Tensor, grid: tuple[int, int], tile: int, bonus: float) -> torch.Tensor:
    """``score + bonus · |score|`` for the best token of each tile.

    Args:
        score: ``[sites, rows, tokens]``.
        grid: height and width of the tokens.
        tile: side of the tiles; those at the right and lower edge may be smaller.
        bonus: 0 or more.
    """
    best = F.max_pool2d(score.unflatten(-1, grid), tile, ceil_mode=True, return_indices=True)[1].flatten(2)
    return score.scatter_add(-1, best, bonus * score.gather(-1, best).abs())


def _attention_of_blocks(selection: Selection, denoiser: nn.Module, sites: Sequence[Site]) -> dict[int, Reading]:
    """The attention of every block that a selection reads; a block that runs no branch for some tokens may lack it."""
    read = _READ[selection]
    found: dict[int, Reading] = {}
    for site in sites:
        if site.block in found or site.kind not in read or (site.kind is SiteKind.FUSED and not site.takes_some_tokens):
            continue
        path = site.hollow[0] if site.kind is SiteKind.FUSED else site.id
        attention = denoiser.get_submodule(path)
        names, heads = read[site.kind], getattr(attention, "heads", None)
        there = tuple(name for name in names if isinstance(getattr(attention, name, None), nn.Module))
        if there[:1] != names[:1]:
            raise _unscored(f"{path} has no {names[0]}", selection)
        if selection == "value-norm" and not (isinstance(heads, int) and heads):
            raise _unscored(f"{path} doesn't say its number of heads", selection)
        found[site.block] = Reading(path, there, _value_heads(attention, heads) if heads else 0)
    bare = {site.block for site in sites if site.takes_some_tokens and site.kind is not SiteKind.BLOCKS} - found.keys()
    if bare:
        kinds = " or ".join(kind.value for kind in read if kind.is_attention)
        raise _unscored(f"block {min(bare)} has no {kinds}", selection)
    return found


def _value_heads(attention: nn.Module, heads: int) -> int:
    """Heads of the values: fewer than of the queries where several of these share one (grouped-query attention)."""
    widths = [getattr(getattr(attention, name, None), "out_features", None) for name in ("to_q", "to_k")]
    queries, keys = (width if isinstance(width, int) else 1 for width in widths)
    return max(1, heads * keys // queries) if 1 < keys < queries else heads


def _like(score: torch.Tensor, value: torch.Tensor | int) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.full_like(score, value)


def _unscored(reason: str, selection: Selection) -> MethodError:
    remedy = 'selection="random"' + (' or "value-norm"' if selection == "attention" else "")
    return MethodError(f'{reason}: selection="{selection}" can\'t score its tokens, use {remedy}')
