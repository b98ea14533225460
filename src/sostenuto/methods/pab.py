"""PAB: broadcast attention outputs over a few steps, over more the smoother their type (arXiv 2408.12588)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

from sostenuto.anatomy import SiteKind
from sostenuto.errors import MethodError
from sostenuto.methods.base import Facts, Method
from sostenuto.methods.checks import check_choice, is_number, is_whole
from sostenuto.plan import Action, Plan
from sostenuto.sites import Site

MLPBroadcast = Mapping[float, tuple[Sequence[int], int]]


@dataclass(frozen=True)
class PAB(Method):
    """Pyramid Attention Broadcast (arXiv 2408.12588): in the middle of the sampling attention is computed every few steps.

    At step p with timestep t a type's outputs are reused if ``lo < t < hi`` and ``p mod range ≠ 0``. As in the authors' code
    steps are counted from the first one, not from where the window begins, so that the first step in the window may reuse
    what the one before it computed. Spatial attention changes fastest, then temporal, then cross-attention: hence a
    pyramid of ranges such as 2/4/6. Joint attention (text and image in one) counts as spatial.

    The window is in the scheduler's timesteps, which a flow-matching shift does not spread evenly over the steps: a larger
    shift leaves fewer of them below a given timestep.

    Attributes:
        spatial_range: self-attention and joint attention are computed every so many steps, 1 or more; ``None``: always.
        temporal_range: the same for attention over time.
        cross_range: the same for cross-attention.
        window: ``(lo, hi)``, the timesteps between which attention is broadcast, both excluded.
        mlp: ``{timestep: (blocks, skip_count)}``: at the step nearest to the timestep the MLPs of these blocks are computed,
            and their outputs serve for the next ``skip_count`` steps, whatever the window. Blocks are counted from 0 in each
            list of blocks by itself, so that of a network with spatial and temporal blocks ``range(5)`` means five of each.
            The authors' code wants exact timesteps, which other numbers of steps don't have.
    """

    spatial_range: int | None = 2
    temporal_range: int | None = 4
    cross_range: int | None = 6
    window: tuple[float, float] = (100, 800)
    mlp: MLPBroadcast = field(default_factory=dict)

    name: ClassVar[str] = "pab"
    paper: ClassVar[str] = "arXiv 2408.12588"
    summary: ClassVar[str] = "computes attention every few steps in the middle of the sampling, by type"
    state: ClassVar[str] = "one output of every attention, and of the MLPs that are broadcast"
    bytes_per_token: ClassVar[str] = "b × d × attentions"

    def __post_init__(self) -> None:
        for name in ("spatial_range", "temporal_range", "cross_range"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, least=1):
                raise MethodError(f"PAB's {name} must be a whole number of 1 or more, or None, not {value!r}")
        window = self.window
        if not (
            isinstance(window, tuple) and len(window) == 2 and all(map(is_number, window)) and window[0] < window[1]
        ):
            raise MethodError(f"PAB's window must be two timesteps (lo, hi) with lo < hi, not {window!r}")
        if not isinstance(self.mlp, Mapping):
            raise MethodError(f"PAB's mlp must be {{timestep: (blocks, skip_count)}}, not {self.mlp!r}")
        for timestep, entry in self.mlp.items():
            if not (is_number(timestep) and _is_mlp_entry(entry)):
                raise MethodError(
                    "PAB's mlp must map a timestep to its blocks and a skip_count of 1 or more, such as "
                    f"{{720: (range(5), 2)}}, not {timestep!r} to {entry!r}"
                )

    @classmethod
    def pab_246(cls) -> PAB:
        """The paper's PAB246: spatial 2, temporal 4, cross 6."""
        return cls(2, 4, 6)

    @classmethod
    def pab_357(cls) -> PAB:
        """The paper's PAB357: spatial 3, temporal 5, cross 7."""
        return cls(3, 5, 7)

    @classmethod
    def pab_579(cls) -> PAB:
        """The paper's PAB579: spatial 5, temporal 7, cross 9."""
        return cls(5, 7, 9)

    @classmethod
    def open_sora(cls) -> PAB:
        """Open-Sora 1.2: 2/4/6 for t in 450–930, MLPs of blocks 0–4 from t = 864, 788 and 676 for two steps."""
        return cls(2, 4, 6, (450, 930), {t: (range(5), 2) for t in (864, 788, 676)})

    @classmethod
    def open_sora_plan(cls, version: Literal["1.1", "1.2"] = "1.1") -> PAB:
        """Open-Sora-Plan 1.1: 2/4/6 for t in 100–850, MLPs of blocks 0–6 from t = 738, 714, …, 426 for two steps.

        Version 1.2 has no temporal attention and was published without MLPs: 2/–/6; its window wasn't, and is 1.1's here.
        """
        check_choice("Open-Sora-Plan's version", version, ("1.1", "1.2"))
        if version == "1.2":
            return cls(2, None, 6, (100, 850))
        return cls(2, 4, 6, (100, 850), {t: (range(7), 2) for t in range(738, 425, -24)})

    @classmethod
    def latte(cls) -> PAB:
        """Latte: 2/3/6 for t in 100–800, MLPs of blocks 0–4 from t = 720, 640, 560, 480 and 400 for two steps."""
        return cls(2, 3, 6, (100, 800), {t: (range(5), 2) for t in range(720, 399, -80)})

    @classmethod
    def cogvideox_2b(cls) -> PAB:
        """CogVideoX-2B: joint attention every 2 steps for t in 100–850."""
        return cls(2, None, None, (100, 850))

    @classmethod
    def cogvideox_5b(cls) -> PAB:
        """CogVideoX-5B: as for 2B."""
        return cls.cogvideox_2b()

    @classmethod
    def vchitect(cls) -> PAB:
        """Vchitect 2: 2/4/6 for t in 100–800."""
        return cls(2, 4, 6, (100, 800))

    @property
    def skips_every_kind(self) -> bool:
        """Attention, and MLPs only where they are listed."""
        return False

    def plan(self, facts: Facts) -> Plan:
        """Reuse by the step's number and timestep.

        Raises:
            MethodError: no timestep lies in the window, the network has none of the attention that is to be broadcast, or
                ``mlp`` names a block that it lacks or a timestep far from all steps.
        """
        self._check_fits(facts)
        mlp = self._mlp_steps(facts)
        return Plan(
            tuple(
                tuple(Action.REUSE if self._reuses(site, step, facts, mlp) else Action.COMPUTE for site in facts.sites)
                for step in range(facts.num_steps)
            )
        )

    def _reuses(self, site: Site, step: int, facts: Facts, mlp: Mapping[int, set[int]]) -> bool:
        if site.kind is SiteKind.MLP:
            return step in mlp.get(_number(site), ())
        lo, hi = self.window
        every = self._range(site.kind)
        return every is not None and lo < facts.timesteps[step] < hi and (step - facts.first_step) % every != 0

    def _range(self, kind: SiteKind) -> int | None:
        return {
            SiteKind.SELF_ATTENTION: self.spatial_range,
            SiteKind.JOINT_ATTENTION: self.spatial_range,
            SiteKind.TEMPORAL_ATTENTION: self.temporal_range,
            SiteKind.CROSS_ATTENTION: self.cross_range,
        }.get(kind)

    def _mlp_steps(self, facts: Facts) -> dict[int, set[int]]:
        """For every block, by its number in its list, the steps at which its MLP is reused."""
        computed: dict[int, set[int]] = {}
        reused: dict[int, set[int]] = {}
        for timestep, (blocks, skip_count) in self.mlp.items():
            step = _nearest(facts.timesteps, timestep)
            for block in blocks:
                computed.setdefault(block, set()).add(step)
                reused.setdefault(block, set()).update(range(step + 1, step + 1 + skip_count))
        return {block: steps - computed[block] for block, steps in reused.items()}

    def _check_fits(self, facts: Facts) -> None:
        num_blocks = 1 + max(map(_number, facts.sites))
        odd = sorted(block for blocks, _ in self.mlp.values() for block in blocks if block >= num_blocks)
        if odd:
            raise MethodError(f"PAB's mlp names block {odd[0]}, but the network has {num_blocks} blocks in a list")
        if all(every in (None, 1) for every in (self.spatial_range, self.temporal_range, self.cross_range)):
            return
        if not self.mlp and all(self._range(site.kind) in (None, 1) for site in facts.sites):
            kinds = ", ".join(sorted({site.kind.value for site in facts.sites}))
            raise MethodError(f"PAB has no range for what this network has ({kinds}): set spatial_range or another one")
        lo, hi = self.window
        if not any(lo < timestep < hi for timestep in facts.timesteps):
            raise MethodError(
                f"none of the scheduler's timesteps ({_span(facts.timesteps)}) lies in PAB's window {self.window}: give the "
                "window in the scheduler's own timesteps"
            )


def _number(site: Site) -> int:
    return site.block if site.in_list is None else site.in_list


def _nearest(timesteps: Sequence[float], wanted: float) -> int:
    """The step nearest to a timestep, no farther away than neighbouring steps are from each other."""
    step = min(range(len(timesteps)), key=lambda p: abs(timesteps[p] - wanted))
    spacing = max((abs(a - b) for a, b in pairwise(timesteps)), default=math.inf)
    if abs(timesteps[step] - wanted) > spacing:
        raise MethodError(
            f"PAB's mlp names timestep {wanted:g}, far from the scheduler's ({_span(timesteps)}): give it in their unit"
        )
    return step


def _span(timesteps: Sequence[float]) -> str:
    return f"{max(timesteps):g} to {min(timesteps):g}"


def _is_mlp_entry(entry: object) -> bool:
    if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], Sequence)):
        return False
    blocks, skip_count = entry
    return all(is_whole(block, least=0) for block in blocks) and is_whole(skip_count, least=1)
