"""What ToCa and DuCa share: cycles of full and partial steps, and the share of tokens that a partial step runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from sostenuto.anatomy import SiteKind
from sostenuto.fused_tap import FusedTap
from sostenuto.methods.base import Facts, Method
from sostenuto.methods.checks import check_choice, check_finite, check_number, check_whole
from sostenuto.plan import Action, Plan
from sostenuto.sites import Site, inspect
from sostenuto.tap import Tap
from sostenuto.tokens import SELECTIONS, ObservedScores, RandomScores, Selection, TokenSelector, observed_modules

if TYPE_CHECKING:
    from typing_extensions import Self

Anchor = Literal["end", "start", "last-full"]


class StepKind(Enum):
    """What a step does as a whole; the values are the papers' letters."""

    FULL = "F"
    PARTIAL = "C"
    """Conservative: some tokens of some branches run, everything else is reused."""
    AGGRESSIVE = "A"
    """The stack of blocks is skipped."""


@dataclass(frozen=True)
class RatioSchedule:
    """Share of tokens ``fresh_ratio · f_step · f_layer · f_branch`` over steps, depth and branches, within 0 and 1.

    ``f_step = 1 + w − 2w·i/S`` with the descending index i, ``f_layer = 1 + u − 2u·l/(L−1)``. Below 0 counts as 0, so that a
    steep w leaves the noisiest steps without any tokens. The official code divides by 27 whatever the depth.

    Attributes:
        step_weight: w; above 0 favours the last steps.
        layer_weight: u; above 0 favours the first blocks.
        mlp: f_branch of MLPs, 0 or more, also of those that share a projection with attention.
        cross_attention: f_branch of cross-attention, 0 or more. Other attention is never partial.
        ascending: count steps upward: ``f_step = 1 − w + 2w·p/S``, which differs by 2w/S.
        streams: a further factor for the blocks in lists of these names, in networks that have them all.
    """

    step_weight: float = 0.0
    layer_weight: float = 0.0
    mlp: float = 1.0
    cross_attention: float = 0.0
    ascending: bool = False
    streams: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("step_weight", "layer_weight"):
            check_finite(f"a RatioSchedule's {name}", getattr(self, name))
        for name, value in (("mlp", self.mlp), ("cross_attention", self.cross_attention), *self.streams):
            check_number(f"a RatioSchedule's factor for {name}", value, least=0)

    def fit(self, sites: Sequence[Site]) -> RatioSchedule:
        """The schedule for a network: without factors for lists of blocks that it doesn't have all."""
        lists = {site.id.partition(".")[0] for site in sites}
        return self if {name for name, _ in self.streams} <= lists else replace(self, streams=())

    def share(self, site: Site, num_blocks: int, step: int, num_steps: int) -> float:
        """``f_step · f_layer · f_branch`` of a site, below 0 as 0."""
        factors = {SiteKind.MLP: self.mlp, SiteKind.FUSED: self.mlp, SiteKind.CROSS_ATTENTION: self.cross_attention}
        weight = factors.get(site.kind, 0.0) if site.takes_some_tokens else 0.0
        if self.ascending:
            f_step = 1 - self.step_weight + 2 * self.step_weight * step / num_steps
        else:
            f_step = 1 + self.step_weight - 2 * self.step_weight * (num_steps - 1 - step) / num_steps
        depth = site.block / (num_blocks - 1) if num_blocks > 1 else 0.5
        f_layer = 1 + self.layer_weight - 2 * self.layer_weight * depth
        stream = dict(self.streams).get(site.id.partition(".")[0], 1.0)
        return max(0.0, f_step) * max(0.0, f_layer) * weight * stream


RATIO_SCHEDULES: dict[str, RatioSchedule] = {
    "ddim50": RatioSchedule(step_weight=2.0, layer_weight=-0.2, mlp=2.5),
    "ddpm250": RatioSchedule(step_weight=0.4, layer_weight=0.8, mlp=2.5),
    "pixart": RatioSchedule(step_weight=-0.9, layer_weight=0.6, mlp=1.6, cross_attention=0.6, ascending=True),
    "open-sora": RatioSchedule(mlp=1.495),
    "flux": RatioSchedule(layer_weight=0.5, streams=(("transformer_blocks", 0.4), ("single_transformer_blocks", 1.6))),
    "constant": RatioSchedule(cross_attention=1.0),
}


@dataclass(frozen=True)
class TokenCycle(Method):
    """Full steps, and between them steps that run some tokens only. The base of ToCa and DuCa.

    The kind of a step is decided once, before the sampling. At a full step with descending index i the distance to the next
    one becomes ``thr = round(N / (1 + w − 2w·i/S))``; a step is full if ``i mod thr = 0``, and the first one always is. A fresh
    ratio of 0 sets w to 0, as in the official code; N = 1 means no caching.

    A partial step runs the chosen tokens of the MLPs, and of cross-attention where there is one; all other attention is
    reused. Where MLP and attention share their projection (a single-stream block of FLUX) it is applied to the chosen tokens:
    to their fresh MLP and to what attention gave them at the last full step, which is kept besides.

    Tokens are ordered by ``importance + λ₃·a/N`` with a, the partial steps since a token was last computed; the best
    token of each tile of the image is raised. Selections:

    - ``"random"``: uniform, the same draw for all rows of a batch and for separate calls of guidance.
    - ``"attention"``: column sums of the block's head-averaged self- or joint-attention map; ``"value-norm"``:
      ``Σ_heads (1 − ‖v‖₂)``; ``"cross-entropy"``: 1 + the entropy of the block's cross-attention map. All are
      L2-normalised over the tokens, taken at full steps, and need an uncompiled denoiser. Maps are computed a second time,
      since fused attention hides its own.

    Attributes:
        interval: the paper's N, 1 (no caching) or more.
        fresh_ratio: the paper's r from 0 (plain reuse) to 1, before the schedule's factors; where their product is 1 or
            more, all tokens are computed.
        selection: what makes a token important.
        ratio_schedule: how the ratio varies over steps, depth and branches: a name of ``RATIO_SCHEDULES`` or a schedule.
        staleness_weight: the paper's λ₃, 0 or more.
        spatial_bonus: by which share the score of the best token in a tile is raised, 0 (off) or more.
        tile: side of the tiles in tokens, 1 or more.
        threshold_weight: w of the distance between full steps, between −1 and 1; above 0 they are denser at the end.
        middle_interval: distance between full steps for ``0.2·S ≤ i < 0.4·S``; ``None``: as elsewhere.
        anchor: where steps are counted from: the last step (i, as in the DiT code), the first one, or the last full step.
        first_full_steps: so many steps at the beginning are full, 1 or more.
        cross_attention_every: cross-attention is computed at every so many full steps, and is partial at the others.
        seed: of random tokens, 0 or more; nothing else depends on it.
    """

    interval: int = 3
    fresh_ratio: float = 0.07
    selection: Selection = "random"
    ratio_schedule: str | RatioSchedule = "ddim50"
    staleness_weight: float = 0.25
    spatial_bonus: float = 0.6
    tile: int = 2
    threshold_weight: float = 0.4
    middle_interval: int | None = 2
    anchor: Anchor = "end"
    first_full_steps: int = 1
    cross_attention_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        mine = type(self).__name__
        for name in ("interval", "tile", "first_full_steps", "cross_attention_every"):
            check_whole(f"{mine}'s {name}", getattr(self, name), 1)
        check_whole(f"{mine}'s seed", self.seed, 0)
        if self.middle_interval is not None:
            check_whole(f"{mine}'s middle_interval", self.middle_interval, 1)
        check_choice(f"{mine}'s selection", self.selection, SELECTIONS)
        check_choice(f"{mine}'s anchor", self.anchor, ("end", "start", "last-full"))
        if not isinstance(self.ratio_schedule, RatioSchedule):
            check_choice(f"{mine}'s ratio_schedule", self.ratio_schedule, (*RATIO_SCHEDULES, "a RatioSchedule"))
        for name in ("staleness_weight", "spatial_bonus"):
            check_number(f"{mine}'s {name}", getattr(self, name), least=0)
        check_finite(f"{mine}'s fresh_ratio", self.fresh_ratio, 0, 1)
        check_number(f"{mine}'s threshold_weight", self.threshold_weight, above=-1, below=1)

    @classmethod
    def _evenly(cls, selection: Selection = "random", **options: Any) -> Self:
        """What later presets share: no token preferred by its tile, full steps at equal distances, random tokens as a rule."""
        return cls(selection=selection, spatial_bonus=0.0, threshold_weight=0.0, middle_interval=None, **options)

    def between(self, offset: int, since_full: int) -> StepKind:
        """The kind of a step that is not full, by its offset ``i mod thr`` and its distance from the last full step."""
        return StepKind.PARTIAL

    def kinds(self, num_steps: int, first_step: int = 0) -> tuple[StepKind, ...]:
        """The kind of every step, in sampling order; steps before ``first_step``, which are left out, count as full."""
        kinds = [StepKind.FULL] * first_step
        last_full, threshold = first_step, 1
        for step in range(first_step, num_steps):
            index = num_steps - 1 - step
            counted = {"end": index, "start": step - first_step, "last-full": step - last_full}[self.anchor]
            offset = counted % threshold
            if step < first_step + self.first_full_steps or offset == 0:
                kinds.append(StepKind.FULL)
                time = (num_steps - step if self.anchor == "start" else index) / num_steps
                last_full, threshold = step, self._threshold(time)
            else:
                kinds.append(self.between(offset, step - last_full))
        return tuple(kinds)

    def _threshold(self, time: float) -> int:
        """Distance to the next full step, after one at ``time = i/S``; counted from the start at ``1 − p/S``."""
        if self.interval == 1:
            return 1
        if self.middle_interval is not None and 0.2 <= time < 0.4:
            return self.middle_interval
        weight = self.threshold_weight if self.fresh_ratio else 0.0
        return max(1, round(self.interval / (1 + weight - 2 * weight * time)))

    def plan(self, facts: Facts) -> Plan:
        """One kind a step; in partial steps the ratios by step, depth and branch."""
        kinds = self.kinds(facts.num_steps, facts.first_step)
        named = self.ratio_schedule
        schedule = (named if isinstance(named, RatioSchedule) else RATIO_SCHEDULES[named]).fit(facts.sites)
        num_blocks = 1 + max(site.block for site in facts.sites)
        within = [any(larger.covers(site) for larger in facts.sites) for site in facts.sites]
        actions, ratios = [], []
        for step, kind in enumerate(kinds):
            row = [
                min(1.0, self.fresh_ratio * schedule.share(site, num_blocks, step, facts.num_steps))
                for site in facts.sites
            ]
            crossed = self._computes_cross_attention(kinds[facts.first_step :], step - facts.first_step)
            ratios.append(tuple(row))
            actions.append(
                tuple(
                    Action.SKIP if inside and kind is StepKind.AGGRESSIVE else _action(site, kind, ratio, crossed)
                    for site, ratio, inside in zip(facts.sites, row, within, strict=True)
                )
            )
        return Plan(tuple(actions), ratios=tuple(ratios))

    def _computes_cross_attention(self, kinds: Sequence[StepKind], step: int) -> bool:
        """Whether a full step is one of those that compute cross-attention."""
        if step < self.first_full_steps:
            return True
        return kinds[self.first_full_steps : step + 1].count(StepKind.FULL) % self.cross_attention_every == 0

    def tap(self, site: Site, denoiser: nn.Module) -> Tap:
        """Where attention and MLP share a projection, one that can run for some tokens."""
        fused = site.kind is SiteKind.FUSED and site.takes_some_tokens
        return FusedTap(site, denoiser) if fused else super().tap(site, denoiser)

    @property
    def works_compiled(self) -> bool:
        """With random tokens, which no score is read for."""
        return self.selection == "random"

    def observed(self, denoiser: nn.Module) -> list[str]:
        """The attention that the scores are read off."""
        return observed_modules(self.selection, denoiser, inspect(denoiser))

    def selector(self, facts: Facts, latents: torch.Tensor) -> TokenSelector:
        """The selection with this method's staleness and spread."""
        if self.selection == "random":
            scores = RandomScores(self.seed, len(facts.sites))
        else:
            scores = ObservedScores(self.selection, facts.denoiser, facts.sites, latents)
        partial_before = [0]
        for kind in self.kinds(facts.num_steps, facts.first_step):
            partial_before.append(partial_before[-1] + (kind is StepKind.PARTIAL))
        weight = self.staleness_weight / self.interval
        return TokenSelector(scores, partial_before, weight, self.spatial_bonus, self.tile, latents)


def _action(site: Site, kind: StepKind, ratio: float, crossed: bool) -> Action:
    """What a site does in a step of a kind."""
    if kind is StepKind.AGGRESSIVE:
        return Action.REUSE
    if site.kind is SiteKind.BLOCKS:
        return Action.COMPUTE
    if kind is StepKind.FULL and (crossed or site.kind is not SiteKind.CROSS_ATTENTION):
        return Action.COMPUTE
    if ratio >= 1:
        return Action.COMPUTE
    return Action.PARTIAL if ratio > 0 else Action.REUSE
