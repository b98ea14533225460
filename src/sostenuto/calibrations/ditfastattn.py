"""DiTFastAttn's calibration: a greedy plan under an error bound that grows over depth (arXiv 2406.08552)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from sostenuto import compat
from sostenuto.attention_tap import ConditionalHalf, is_guided, usual_half
from sostenuto.calibrations.base import Calibration, Settings, made_for
from sostenuto.clock import Tick
from sostenuto.distributed.world import until
from sostenuto.engine import Handle, attach
from sostenuto.errors import MethodError
from sostenuto.features import as_rows
from sostenuto.methods.base import Method
from sostenuto.methods.checks import check_choice, check_number
from sostenuto.methods.ditfastattn import DiTFastAttn, check_attention
from sostenuto.plan import Action, Op, Plan, lower
from sostenuto.probe import Prober
from sostenuto.progress import Bar, progress
from sostenuto.sites import Site
from sostenuto.table import CacheTable
from sostenuto.tap import Tap

Loss = Literal["ratio_abs", "ratio_signed"]
_OPS = {op.action: op for op in (Op.REUSE, Op.WINDOW | Op.SHARE, Op.WINDOW, Op.SHARE, Op.COMPUTE)}  # cheapest first
CANDIDATES = tuple(action for action in _OPS if action is not Action.COMPUTE)


@dataclass(frozen=True)
class DiTFastAttnCalibration(Calibration):
    """DiTFastAttn's greedy search (arXiv 2406.08552, section 3.4).

    At every step but the first the network runs once uncompressed; then for layers ``l = 1 … L`` in order, with the choices
    of the layers and steps before active, the first candidate is taken whose loss against that run is below ``l/L · θ``.
    The growing bound leaves deep layers the error that shallow ones may not yet spend. The sampler goes on with the
    compressed output, so that the plan is consistent with its own drift. It costs at most one run of the network, and one
    for every layer and candidate, per step; it keeps one output and one residual per layer.

    Where ``sample`` has to be called several times for the samples, every generation makes its own plan and each step and
    layer takes the majority's action, ties to the dearer one. Passes of a step in separate calls share the first one's
    choices. Candidates that share guidance are tried only where both passes are in one batch, and a window only where it
    costs less than full attention.

    Attributes:
        theta: the paper's θ, a number above 0; published: D1 … D6 = 0.025, 0.05 … 0.15 for images.
        window: as for :class:`~sostenuto.DiTFastAttn`; ``None``: an eighth of the tokens.
        conditional_half: as for :class:`~sostenuto.DiTFastAttn`; the table keeps it.
        loss: the mean of ``|y − ŷ| / (max(y, ŷ) + 10⁻⁶)``, clipped to 0 … 10, over the network's output: with the larger
            absolute value in the denominator (``"ratio_abs"``), or with the larger signed one as in the official code
            (``"ratio_signed"``), which doesn't count elements where both are negative.
        candidates: the actions that are tried besides ``compute``, cheapest first.
    """

    theta: float = 0.1
    window: int | None = None
    conditional_half: ConditionalHalf | None = None
    loss: Loss = "ratio_abs"
    candidates: tuple[Action, ...] = CANDIDATES

    method: ClassVar[str] = "ditfastattn"

    def __post_init__(self) -> None:
        check_number("theta", self.theta, above=0)
        check_attention(self.window, self.conditional_half)
        check_choice("loss", self.loss, ("ratio_abs", "ratio_signed"))
        if not self.candidates or not all(candidate in CANDIDATES for candidate in self.candidates):
            known = ", ".join(f"Action.{action.name}" for action in CANDIDATES)
            raise MethodError(f"candidates must be among {known}, one at least, not {self.candidates!r}")

    @classmethod
    def dit_xl_2(cls, level: int = 4) -> DiTFastAttnCalibration:
        """Published for DiT-XL/2 at 512²: window 128, θ of D1 … D6 = 0.025, 0.05 … 0.15, 8 samples, DPM-Solver 50."""
        return cls._published(DiTFastAttn.dit_xl_2(), level)

    @classmethod
    def pixart_alpha(cls, level: int = 4) -> DiTFastAttnCalibration:
        """Published for PixArt at 1024²: window 512, θ of D1 … D6 = 0.025, 0.05 … 0.15, 6 samples, DPM-Solver 50."""
        return cls._published(DiTFastAttn.pixart_alpha(), level)

    @classmethod
    def pixart_sigma(cls, level: int = 4, image_size: Literal[1024, 2048] = 2048) -> DiTFastAttnCalibration:
        """Published for PixArt: window 2048 at 2048², 512 at 1024², θ of D1 … D6 = 0.025, 0.05 … 0.15, 6 samples."""
        return cls._published(DiTFastAttn.pixart_sigma(image_size=image_size), level)

    @classmethod
    def open_sora(cls, level: int = 4, window: Literal[50, 200] = 200) -> DiTFastAttnCalibration:
        """Published for Open-Sora: windows of 50 and 200, θ of D1 … D6 = 0.01, 0.02 … 0.06, 4 samples."""
        return cls._published(DiTFastAttn.open_sora(window=window), level, unit=0.01)

    @classmethod
    def _published(cls, method: DiTFastAttn, level: int, unit: float = 0.025) -> DiTFastAttnCalibration:
        if level not in range(1, 7):
            raise MethodError(f"level must be 1 … 6 for the published D1 … D6, not {level!r}")
        assert method.conditional_half is not None
        return cls(round(level * unit, 3), method.window, method.conditional_half)

    def run(self, settings: Settings) -> CacheTable:
        """Search in as many generations as the samples need."""
        method = _Taps(DiTFastAttn(window=self.window, conditional_half=self.conditional_half))
        with (
            attach(settings.target, method, scheduler=settings.scheduler) as handle,
            progress(settings.num_samples * settings.num_inference_steps, "calibrate", settings.show_progress) as bar,
        ):

            def generation(call: int) -> _Found:
                search = handle.driver = GreedySearch(handle, self, bar)
                settings.generate(settings.generator_of(call))
                settings.check_steps(len(search.actions), search.num_steps)
                return _Found(search.num_samples, search.actions, search.losses)

            found = until(settings.enough(lambda one: one.num_samples), generation)
            search = handle.driver
            assert isinstance(search, GreedySearch)
            identity, names = made_for(handle), [site.id for site in handle.sites]
            table = CacheTable(
                actions=tuple(dict(zip(names, row, strict=True)) for row in _vote([one.actions for one in found])),
                method=self.method,
                calibration={
                    "num_samples": sum(one.num_samples for one in found),
                    "seed": settings.seed,
                    "theta": self.theta,
                    "window": self.window,
                    "conditional_half": self.conditional_half or usual_half(handle._denoiser),
                    "loss": self.loss,
                    "candidates": [candidate.value for candidate in self.candidates],
                    "losses": found[0].losses,
                },
                model=identity["model"],
                scheduler=identity["scheduler"],
            )
            return replace(table, macs_fraction=search.macs_fraction(table.plan(handle.sites)))


class _Found(NamedTuple):
    """What one generation's search found."""

    num_samples: int
    actions: list[list[Action]]
    losses: list[list[float | None]]


@dataclass(frozen=True)
class _Taps(Method):
    """The taps of a method, without its plan."""

    of: DiTFastAttn

    def sites(self, denoiser: nn.Module) -> list[Site]:
        return self.of.sites(denoiser)

    def tap(self, site: Site, denoiser: nn.Module) -> Tap:
        return self.of.tap(site, denoiser)


class GreedySearch:
    """One run over the steps: at every denoiser call choose the layers' actions, then go on with them."""

    def __init__(self, handle: Handle, options: DiTFastAttnCalibration, bar: Bar) -> None:
        self.handle, self.options, self._bar = handle, options, bar
        self.actions: list[list[Action]] = []  # [step][site]
        self.losses: list[list[float | None]] = []  # of the chosen candidates
        self.num_samples = self.num_steps = 0
        self._signature = 0
        self._candidates: list[Action] = []

    def __call__(self, tick: Tick, prober: Prober) -> Any:
        """Carry out one denoiser call of the calibration; what it returns goes on to the sampler."""
        if tick.pass_index == 0:
            self.num_samples, self.num_steps = prober.batch_size, tick.num_steps
            self._signature = prober.call.signature
            self._choose(prober)
            self._bar.update(prober.batch_size)
        actions = self.actions[-1]
        if prober.state.begins:  # there is nothing to share yet
            actions = [Action.COMPUTE] * len(actions)
        return prober.run([_kept(_OPS[action]) for action in actions])

    def macs_fraction(self, plan: Plan) -> float:
        """Multiply-accumulates of a generation with the plan, of one without; counted, not derived."""
        rows = lower(plan).ops
        return sum(map(self._count, rows)) / (len(rows) * self._count([Op.COMPUTE] * len(self.handle.sites)))

    def _count(self, ops: Sequence[Op]) -> int:
        return self.handle.count(self._signature, ops)

    def _choose(self, prober: Prober) -> None:
        depth = len(self.handle.sites)
        actions = [Action.COMPUTE] * depth
        losses: list[float | None] = [None] * depth
        self.actions.append(actions)
        self.losses.append(losses)
        if prober.state.begins:
            self._candidates = self._worthwhile(is_guided(prober.call.latents))
            return
        fresh = self._output(prober, actions)
        for layer in range(depth):
            bound = (layer + 1) / depth * self.options.theta
            for candidate in self._candidates:
                actions[layer] = candidate
                loss = compression_loss(fresh, self._output(prober, actions), self.options.loss)
                if loss < bound:
                    losses[layer] = float(f"{loss:.6g}")  # the table stays readable
                    break
            else:
                actions[layer] = Action.COMPUTE

    def _worthwhile(self, guided: bool) -> list[Action]:
        """The candidates that can be carried out and cost less than the whole, which a wide window doesn't."""
        depth = len(self.handle.sites)
        whole = self._count([Op.COMPUTE] * depth)
        possible = [action for action in self.options.candidates if guided or not _OPS[action] & Op.SHARE]
        return [action for action in possible if self._count([_OPS[action]] * depth) < whole]

    def _output(self, prober: Prober, actions: Sequence[Action]) -> torch.Tensor:
        """The network's output; nothing of it is kept."""
        return as_rows(compat.prediction_of(prober.run([_OPS[action] for action in actions])))


def compression_loss(fresh: torch.Tensor, compressed: torch.Tensor, loss: Loss = "ratio_abs") -> float:
    """``mean(clip(|y − ŷ| / (max(y, ŷ) + 10⁻⁶), 0, 10))`` of two outputs of the network, ``y`` uncompressed.

    Args:
        fresh: ``y``, any shape.
        compressed: ``ŷ``, the same shape.
        loss: whether the maximum is that of the absolute or of the signed values.
    """
    y, y_hat = fresh.float(), compressed.float()
    largest = torch.maximum(y, y_hat) if loss == "ratio_signed" else torch.maximum(y.abs(), y_hat.abs())
    return ((y - y_hat).abs() / (largest + 1e-6)).clamp(0, 10).mean().item()


def _kept(op: Op) -> Op:
    """The op that also keeps all that a later step might read."""
    if op is Op.REUSE:
        return op
    return op | Op.STORE if op & Op.WINDOW else op | Op.STORE | Op.RESIDUAL


def _vote(runs: Sequence[Sequence[Sequence[Action]]]) -> list[list[Action]]:
    """The majority of the runs for every step and site, ties to the dearer action."""
    dearest = {action: rank for rank, action in enumerate(reversed(_OPS))}

    def majority(votes: Sequence[Action]) -> Action:
        counts = Counter(votes)
        return min(counts, key=lambda action: (-counts[action], dearest[action]))

    return [[majority(votes) for votes in zip(*rows, strict=True)] for rows in zip(*runs, strict=True)]
