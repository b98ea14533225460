"""Which tokens a partial step runs: how they are scored, and the choice of the highest scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from sostenuto.anatomy import SiteKind
from sostenuto.attention_tap import is_guided
from sostenuto.errors import MethodError
from sostenuto.sites import Site
from sostenuto.state import Wanted

Selection = Literal["random", "value-norm", "attention", "cross-entropy"]
SELECTIONS: tuple[Selection, ...] = ("random", "value-norm", "attention", "cross-entropy")

Maps = Iterator[torch.Tensor]  # of each head [rows, queries, keys]


class Scores(Protocol):
    """How important tokens are, staleness and spread left aside."""

    macs: int
    """Multiply-accumulates spent so far."""

    def observe(self, path: str, output: Any, kwargs: Mapping[str, Any]) -> None:
        """Take in what an observed module returned."""
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

    def observe(self, path: str, output: Any, kwargs: Mapping[str, Any]) -> None:
        """Nothing: random scores know no features."""

    def at(self, step: int, sites: Sequence[int], num_tokens: int) -> torch.Tensor:
        """The step's draw."""
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + step) % 2**32)
        draw = torch.rand(self._num_sites, 1, num_tokens, generator=generator, device="cpu")
        return draw[list(sites)]


def value_norms(value: torch.Tensor, heads: int) -> torch.Tensor:
    """``Σ_heads (1 − ‖v_j‖₂)`` of each token: tokens with small values come first (DuCa's first version)."""
    return (1 - value.float().unflatten(-1, (heads, -1)).norm(dim=-1)).sum(dim=-1)


def head_maps(query: torch.Tensor, key: torch.Tensor, heads: int, mask: torch.Tensor | None = None) -> Maps:
    """The softmax map of one head after the other, to hold one at a time.

    Args:
        query: ``[rows, queries, channels]``.
        key: ``[rows, keys, channels]``, of as many heads or of fewer that are shared.
        heads: heads of the query.
        mask: added to the logits, or ``False`` where a key is hidden; broadcasts to ``[rows, queries, keys]``.
    """
    query = query.float().unflatten(-1, (heads, -1))
    key = key.float().unflatten(-1, (-1, query.shape[-1]))
    for head in range(heads):
        shared = head * key.shape[-2] // heads
        logits = query[..., head, :] @ key[..., shared, :].transpose(1, 2) * query.shape[-1] ** -0.5
        if mask is not None and mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, -math.inf)
        elif mask is not None:
            logits = logits + mask
        yield logits.softmax(dim=-1)


def column_sums(maps: Maps, heads: int) -> torch.Tensor:
    """``Σ_q P_qj`` of the head-averaged map: how much all tokens attend to token j."""
    total: Any = sum(head.sum(dim=1) for head in maps)
    return total / heads


def entropy(attention_map: torch.Tensor) -> torch.Tensor:
    """``1 − Σ_k p log p`` of each query's row of a map: tokens that attend to much of the text come first."""
    return 1 + torch.special.entr(attention_map).sum(dim=-1)


@dataclass(frozen=True)
class Reading:
    """How a score is read off the attention of a block.

    Attributes:
        kind: which attention.
        inner: its projections that are observed.
        statistic: of their outputs, the number of heads and the mask: a tensor that guidance halves may be averaged in.
        importance: of that, ``[rows, tokens]``, before it is normalised over the tokens.
    """

    kind: SiteKind
    inner: tuple[str, ...]
    statistic: Callable[..., torch.Tensor]
    importance: Callable[[torch.Tensor], torch.Tensor] = lambda statistic: statistic


_READINGS: dict[str, Reading] = {
    "value-norm": Reading(SiteKind.SELF_ATTENTION, ("to_v",), lambda v, heads, mask: value_norms(v, heads)),
    "attention": Reading(
        SiteKind.SELF_ATTENTION,
        ("to_q", "to_k"),
        lambda q, k, heads, mask: column_sums(head_maps(q, k, heads, mask), heads),
    ),
    "cross-entropy": Reading(
        SiteKind.CROSS_ATTENTION,
        ("to_q", "to_k"),
        lambda q, k, heads, mask: sum(head_maps(q, k, heads, mask)) / heads,
        entropy,
    ),
}


def observed_modules(selection: Selection, denoiser: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Paths of what a selection listens to: the attention of every block and its projections.

    Raises:
        MethodError: a block has no such attention, or it isn't made of the projections.
    """
    if selection == "random":
        return []
    reading = _READINGS[selection]
    paths = []
    for site in _attention_of_blocks(selection, sites).values():
        attention = denoiser.get_submodule(site.id)
        missing = [name for name in reading.inner if not isinstance(getattr(attention, name, None), nn.Module)]
        if missing:
            raise _unscored(f"{site.id} has no {missing[0]}", selection)
        if not _heads(denoiser, site):
            raise _unscored(f"{site.id} doesn't say its number of heads", selection)
        if "to_q" in reading.inner and getattr(attention, "norm_q", None) is not None:
            raise _unscored(f"{site.id} normalises its queries after to_q", selection)
        paths += [f"{site.id}.{name}" for name in reading.inner] + [site.id]
    return paths


class ObservedScores:
    """Scores of all tokens from the attention of their block at its last full step, L2-normalised over the tokens.

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
        self._reading = _READINGS[selection]
        attention = _attention_of_blocks(selection, sites)
        self._attention = [attention[site.block].id for site in sites]  # of each site's block
        self._heads = {site.id: _heads(denoiser, site) for site in attention.values()}
        self._num_rows = latents.shape[0]
        crossed = any(site.kind is SiteKind.CROSS_ATTENTION for site in sites)
        self._halves_agree = crossed and is_guided(latents)
        self._projected: dict[str, torch.Tensor] = {}  # of the attention that is under way
        self._scores: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def observe(self, path: str, output: Any, kwargs: Mapping[str, Any]) -> None:
        """Take in a projection, or the end of its attention."""
        if path not in self._heads:
            self._projected[path.rpartition(".")[2]] = output
            return
        missing = [name for name in self._reading.inner if name not in self._projected]
        if missing:
            raise _unscored(f"{path} ran without its {missing[0]}, as with fused projections", self._selection)
        projected, self._projected = [self._projected[name] for name in self._reading.inner], {}
        if len(projected) == 2:
            query, key = projected
            self.macs += query.numel() * key.shape[1]
        statistic = self._reading.statistic(*projected, self._heads[path], _mask(kwargs))
        if len(statistic) != self._num_rows:
            raise _unscored(f"{path} has {len(statistic)} rows for a batch of {self._num_rows}", self._selection)
        if self._halves_agree:
            statistic = statistic.unflatten(0, (2, -1)).mean(dim=0)
        self._scores[path] = F.normalize(self._reading.importance(statistic), dim=-1)

    def at(self, step: int, sites: Sequence[int], num_tokens: int) -> torch.Tensor:
        """The scores of these sites' blocks."""
        found = []
        for index in sites:
            path = self._attention[index]
            if path not in self._scores:
                raise _unscored(f"{path} was not computed at the last full step", self._selection)
            scores = self._scores[path]
            if scores.shape[-1] != num_tokens:
                length = scores.shape[-1]
                raise _unscored(
                    f"{path} sees {length} tokens, another branch of its block {num_tokens}", self._selection
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

    def observe(self, path: str, output: Any, kwargs: Mapping[str, Any]) -> None:
        """Hand on what the scores are made of."""
        self._scores.observe(path, output, kwargs)

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


def _attention_of_blocks(selection: Selection, sites: Sequence[Site]) -> dict[int, Site]:
    """The attention of every block that a selection reads."""
    kind = _READINGS[selection].kind
    found: dict[int, Site] = {}
    for site in sites:
        if site.kind is kind:
            found.setdefault(site.block, site)
    bare = sorted({site.block for site in sites if site.kind is not SiteKind.BLOCKS} - found.keys())
    if bare:
        raise _unscored(f"block {bare[0]} has no {kind.value}", selection)
    return found


def _heads(denoiser: nn.Module, site: Site) -> int:
    heads = getattr(denoiser.get_submodule(site.id), "heads", 0)
    return heads if isinstance(heads, int) else 0


def _like(score: torch.Tensor, value: torch.Tensor | int) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.full_like(score, value)


def _mask(kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """An attention's mask such that it broadcasts to ``[rows, queries, keys]``."""
    mask = kwargs.get("attention_mask")
    if mask is None or mask.ndim == 3:
        return mask
    return mask[:, None] if mask.ndim == 2 else mask[:, 0]  # the same for all heads


def _unscored(reason: str, selection: Selection) -> MethodError:
    return MethodError(f'{reason}: selection="{selection}" can\'t score its tokens, use selection="random"')
