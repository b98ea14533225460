"""What every calibration is given, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from sostenuto import compat
from sostenuto.clock import Tick
from sostenuto.cost import Cost
from sostenuto.distributed.world import until
from sostenuto.engine import Handle, Prober, attach
from sostenuto.errors import MethodError
from sostenuto.machine import where
from sostenuto.measured import identity
from sostenuto.methods.base import Method
from sostenuto.methods.none import NoCache
from sostenuto.plan import Action
from sostenuto.progress import progress
from sostenuto.seeds import noise_seed
from sostenuto.sites import Site, inspect
from sostenuto.table import CacheTable, Fill, whole_sites

Sample = Callable[..., Any]
Score = Callable[[Any], float]
T = TypeVar("T")


def too_few(score: Any, images: int | None) -> str | None:
    """What a score that has a ``too_few(n)`` says of the number of its images; ``None``: nothing."""
    judge = getattr(score, "__self__", score)  # of a method the object
    return None if images is None or not hasattr(judge, "too_few") else judge.too_few(images)


@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`sostenuto.calibrate` that are the same for every method.

    ``kept`` is the folder in which a search of several runs keeps what each of them found, to go on from there when it was
    interrupted; whoever names it answers for that everything else is the same.
    """

    target: Any
    sample: Sample
    num_inference_steps: int
    num_samples: int
    generator: torch.Generator | None = None
    score: Score | None = None
    score_sample: Sample | None = None
    scheduler: Any = None
    show_progress: bool = False
    kept: Path | None = None

    def __post_init__(self) -> None:
        if self.num_inference_steps < 2 or self.num_samples < 1:
            raise MethodError(
                f"calibration needs 2 steps and 1 sample at least, not {self.num_inference_steps} and {self.num_samples}"
            )

    @property
    def seed(self) -> int:
        """The seed that every run starts from."""
        return self.generator.initial_seed() if self.generator else 0

    @property
    def machine(self) -> str:
        """What the denoiser runs on, as far as it sets how long that takes."""
        return where(compat.execution_device(compat.find_denoiser(self.target)))

    def fresh_generator(self) -> torch.Generator:
        """A generator at the seed, on the device of the one that was given."""
        return torch.Generator(self.generator.device if self.generator else "cpu").manual_seed(self.seed)

    def generator_of(self, call: int) -> torch.Generator:
        """The noise of one of several generations, which processes may share: that of the first is at the seed itself."""
        generator = self.fresh_generator()
        return generator.manual_seed(noise_seed(self.seed, call)) if call else generator

    def enough(self, rows: Callable[[T], int]) -> Callable[[list[T]], bool]:
        """Whether some generations have so many rows of the denoiser's batch as there should be samples."""
        return lambda results: sum(map(rows, results)) >= self.num_samples

    def generate(self, generator: torch.Generator) -> Any:
        """One generation of the user's own kind."""
        return self.sample(self.target, generator, num_inference_steps=self.num_inference_steps)

    def check_steps(self, ran: int, listed: int | None = None) -> None:
        """Refuse a generation that was not one whole run of the steps asked for.

        Args:
            ran: the number of steps that were run.
            listed: the number of steps that the scheduler lists, which is what counts where it is more than asked for: one
                of second order lists every denoiser call. By default as many as asked for.

        Raises:
            MethodError: with both numbers and the remedy.
        """
        asked = self.num_inference_steps
        listed = asked if listed is None else listed
        if ran != listed or listed < asked:
            raise MethodError(
                f"sample ran {ran} steps instead of {max(listed, asked)}: it must pass num_inference_steps on, and run one "
                "whole generation; a denoiser that serves a part of the steps alone (one of Wan 2.2's two, image to image) "
                "can't be measured: use a method without a calibration"
            )


class Calibration:
    """Base of the calibrations: frozen dataclasses of a method's options, which :func:`sostenuto.calibrate` runs."""

    method: ClassVar[str] = ""

    @classmethod
    def at_cost(cls, fraction: float) -> Calibration:
        """The calibration for this share of the uncached multiply-accumulates.

        Raises:
            MethodError: what is measured has no cost to choose.
        """
        raise MethodError(f"the calibration of {cls.method} has no cost to choose: leave out --target-fraction")

    @classmethod
    def default_for(cls, settings: Settings) -> Calibration:
        """The options where the method is asked for by its name alone."""
        return cls()

    def run(self, settings: Settings) -> Any:
        """Measure and return what the method needs, such as a :class:`~sostenuto.table.CacheTable`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Tapped(NoCache):
    """Computes everything, with the sites of tables that are filled like this."""

    fills: tuple[Fill, ...]

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """All branches, and after them the whole stack and the clean sample where those are kept."""
        return inspect(denoiser) + [site for fill in self.fills for site in whole_sites(denoiser, fill)]


def made_for(handle: Handle) -> dict[str, dict[str, Any]]:
    """The identity of model and scheduler that goes into a table: ``{"model": …, "scheduler": …}``."""
    return identity(handle._denoiser, handle._scheduler())


def measure_uncached(
    settings: Settings,
    method: Method,
    measure: Callable[[Tick, Prober], tuple[Any, Any]],
    num_slots: int = 1,
) -> tuple[list[dict[int, Any]], dict[str, Any]]:
    """Measure something at every denoiser call of as many uncached generations as the samples need.

    Args:
        settings: of the calibration.
        method: its sites and taps are attached; its decisions are not carried out.
        measure: makes the call by the prober; returns the denoiser's output and what it measured.
        num_slots: outputs that a site keeps.

    Returns:
        Of every pass of each generation the measurements by step, of the first pass at every step (a second one may be left
        out at some, where guidance ends early); and what the result was made for, with how it was made:
        ``{"model": …, "scheduler": …, "calibration": …}``.

    Raises:
        MethodError: a generation has another number of steps than asked for.
    """
    with (
        attach(settings.target, method, scheduler=settings.scheduler) as handle,
        progress(settings.num_samples, "calibrate", settings.show_progress) as bar,
    ):
        handle.driver_slots = num_slots

        def generation(call: int) -> tuple[int, list[dict[int, Any]]]:
            passes: dict[int, dict[int, Any]] = {}
            rows, listed = 0, settings.num_inference_steps

            def driver(tick: Tick, prober: Prober) -> Any:
                nonlocal rows, listed
                rows, listed = prober.batch_size, tick.num_steps
                output, measured = measure(tick, prober)
                passes.setdefault(tick.pass_index, {})[tick.step] = measured
                return output

            handle.driver = driver
            settings.generate(settings.generator_of(call))
            settings.check_steps(len(passes.get(0, {})), listed)
            bar.update(rows)
            return rows, list(passes.values())

        generations = until(settings.enough(lambda made: made[0]), generation)
        calibration = {"num_samples": sum(rows for rows, _ in generations), "seed": settings.seed}
        return [one for _, passes in generations for one in passes], {**made_for(handle), "calibration": calibration}


def macs_fraction(table: CacheTable, sites: Sequence[Site], cost: Cost) -> float:
    """Multiply-accumulates of a generation with the table, of one without."""
    skipped = sum(
        macs
        for row in table.plan(sites).actions
        for macs, action in zip(cost.site_macs, row, strict=True)
        if action not in (Action.COMPUTE, Action.SKIP)
    )
    return 1 - skipped / (cost.macs * table.num_inference_steps)
