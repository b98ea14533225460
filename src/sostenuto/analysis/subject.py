"""What is analysed: a model with its sampler, the methods that are looked at on it, and the paths that instruments share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import torch

from sostenuto import compat
from sostenuto.analysis.trajectory import Trajectory, Watch, record
from sostenuto.anatomy import SiteKind
from sostenuto.calibrations import EBCalibration, calibrate
from sostenuto.engine import scheduler_of
from sostenuto.errors import InputError, MethodError, SostenutoError
from sostenuto.methods import FORA, EBCache, EpsilonScaling
from sostenuto.methods.base import Method
from sostenuto.seeds import CALIBRATED, OWN_SAMPLES, noise_seed
from sostenuto.sites import Site, inspect
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable

_KINDS = {SiteKind.MLP: "MLP", SiteKind.FUSED: "both in one"}
_MOST_DECODED = 12  # steps of a path, where decoding is work
_SCALE = 0.98  # of the noise, where no table says better; the papers' models had 0.955 to 0.98


@dataclass
class Subject:
    """A model as it is analysed.

    Attributes:
        target: the pipeline, or its denoiser (then with ``scheduler``). Nothing may be enabled on it.
        sample: runs one generation of the user's own kind: ``sample(pipe, generator, num_inference_steps=…)``.
        scheduler: for a bare denoiser.
        num_inference_steps: steps of the sampler, 4 or more.
        num_samples: rows of the denoiser's batch that every instrument looks at, 1 or more.
        seed: every generation starts from it, so that paths differ by their method alone.
        real_latents: real data as the denoiser takes it, for exposure bias; ``None``: what the uncached sampler makes.
        decode: turns latents ``[rows, …]`` into images ``[rows, channels, height, width]`` about ``[−1, 1]``; ``None``: the
            latents are looked at themselves.
        table: the cache table of EB-Cache; ``None``: one that ships, or is calibrated.
        tell: is told in a few words what is being done, for progress.
    """

    target: Any
    sample: Callable[..., Any]
    scheduler: Any = None
    num_inference_steps: int = 50
    num_samples: int = 16
    seed: int = 0
    real_latents: torch.Tensor | None = None
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None
    table: CacheTable | None = None
    tell: Callable[[str], Any] = lambda _: None
    _paths: dict[str, Trajectory] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_inference_steps < 4 or self.num_samples < 1:
            raise InputError(
                f"an analysis needs 4 steps and 1 sample at least, not {self.num_inference_steps} and {self.num_samples}"
            )
        _ = self.sampler  # refused now, not by every instrument

    @property
    def sampler(self) -> Any:
        """The scheduler.

        Raises:
            MethodError: a bare denoiser comes without one.
        """
        return scheduler_of(self.target, self.scheduler)

    @property
    def denoiser(self) -> Any:
        """The network."""
        return compat.unwrapped(compat.find_denoiser(self.target))

    @cached_property
    def sites(self) -> list[Site]:
        """The branches of the network that cache methods reuse."""
        return inspect(self.denoiser)

    @property
    def places(self) -> dict[str, list[int]]:
        """The positions of the branches among the sites: of attention, of MLPs, and where there are any of both in one."""
        kinds = ["attention" if site.kind.is_attention else _KINDS.get(site.kind, "") for site in self.sites]
        found = {
            kind: [i for i, own in enumerate(kinds) if own == kind] for kind in ("attention", "MLP", "both in one")
        }
        return {kind: places for kind, places in found.items() if places or kind != "both in one"}

    # --- paths ---------------------------------------------------------------------------------------------------

    def path(self, name: str, method: Method) -> Trajectory:
        """The path by a method, recorded once under its name."""
        if name not in self._paths:
            self.tell(f"sample {name}")
            self._paths[name] = self.record(method)
        return self._paths[name]

    def record(
        self, method: str | Method = "none", watch: Watch | None = None, num_slots: int = 1, count: bool = False
    ) -> Trajectory:
        """A path that is not kept."""
        return record(
            self.target,
            self.sample,
            method,
            num_inference_steps=self.num_inference_steps,
            num_samples=self.num_samples,
            generator=self.generator(),
            scheduler=self.scheduler,
            watch=watch,
            num_slots=num_slots,
            count=count,
        )

    @property
    def uncached(self) -> Trajectory:
        """The path of the uncached sampler."""
        from sostenuto.methods import NoCache

        return self.path("uncached", NoCache())

    def generator(self) -> torch.Generator:
        """A generator at the seed."""
        return torch.Generator().manual_seed(self.seed)

    def real_batches(self) -> list[torch.Tensor]:
        """Clean latents, one tensor for each generation, of the rows that it makes.

        Raises:
            InputError: there are fewer real latents than rows.
        """
        rows = self.uncached.rows
        clean = self.own_samples if self.real_latents is None else self.real_latents
        if len(clean) < sum(rows):
            raise InputError(f"real_latents has {len(clean)} rows, the samples have {sum(rows)}: give one for each")
        return list(clean[: sum(rows)].split(list(rows)))

    @cached_property
    def own_samples(self) -> torch.Tensor:
        """Samples that stand for real data, of noise of their own: paired with what made it, one would be known by it."""
        _ = self.uncached.clean  # refused before more is sampled where it isn't known
        self.tell("sample in place of real data")
        noise = torch.Generator().manual_seed(noise_seed(self.seed, OWN_SAMPLES))
        return record(
            self.target,
            self.sample,
            "none",
            num_inference_steps=self.num_inference_steps,
            num_samples=self.num_samples,
            generator=noise,
            scheduler=self.scheduler,
        ).clean

    @property
    def pictured_steps(self) -> list[int]:
        """The steps whose images are looked at: all of them, or a dozen where they must be decoded."""
        steps = self.uncached.num_steps
        return list(range(0, steps, 1 if self.decode is None else -(-steps // _MOST_DECODED)))

    def images(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as images ``[rows, channels, height, width]``, of a video frame by frame.

        Raises:
            InputError: they lie on no grid and there is no decoder.
        """
        decoded = latents if self.decode is None else self.decode(latents).float().cpu()
        if decoded.ndim == 5:  # [rows, channels, frames, height, width], of CogVideoX frames first
            channels = compat.config_of(self.denoiser).get("in_channels")
            frames_first = self.decode is None and decoded.shape[1] != channels == decoded.shape[2]
            decoded = (decoded if frames_first else decoded.transpose(1, 2)).flatten(0, 1)
        if decoded.ndim != 4:
            raise InputError(
                f"latents of shape {list(latents.shape[1:])} lie on no grid of pixels: pass decode=… to make images"
            )
        return decoded

    # --- methods -------------------------------------------------------------------------------------------------

    @cached_property
    def intervals(self) -> tuple[int, ...]:
        """The intervals of uniform caching that are compared."""
        return tuple(interval for interval in (2, 3, 5) if interval < self.num_inference_steps)

    @property
    def noise_scale(self) -> float:
        """b of the scaled paths: the mean of EB-Cache's table where that scales."""
        table = self.eb_table
        mean = 1.0 if table is None else fmean(table.eps_scale)
        return _SCALE if mean == 1 else mean

    def scaled(self, method: Method) -> Method:
        """A method with its noise scaled by a constant b."""
        return method | EpsilonScaling(1 / self.noise_scale)

    @cached_property
    def eb_table(self) -> CacheTable | None:
        """EB-Cache's table for this model and sampler: the given one, one that ships, or one calibrated now for 60 %."""
        if self.table is not None:
            return self.table
        try:
            found = EBCache().prepare(self.denoiser, self.sampler).table
            assert isinstance(found, CacheTable)
            found.check_steps(self.uncached.timesteps)
            return found
        except SostenutoError:
            pass
        self.tell("calibrate EB-Cache")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the share that could be had is in the table
                made = calibrate(
                    self.target,
                    EBCalibration(target_fraction=0.6, forecast_order=0),
                    self.sample,
                    num_inference_steps=self.num_inference_steps,
                    num_samples=min(4, self.num_samples),
                    generator=torch.Generator().manual_seed(noise_seed(self.seed, CALIBRATED)),
                    scheduler=self.scheduler,
                )
            return replace(made, eps_scale=(_SCALE,) * made.num_inference_steps)
        except SostenutoError:
            return None

    def eb(self, branches: bool = False) -> Method:
        """EB-Cache by that table, reusing single branches where asked also where the table keeps the whole stack.

        Raises:
            MethodError: no table can be made for this model.
        """
        table = self.eb_table
        if table is None:
            raise MethodError("EB-Cache can't be calibrated on this model")
        return EBCache(replace(table, fill="branches") if branches else table)

    def kinds_cached(self, state: StepState, interval: int = 3) -> Method:
        """Uniform caching of one kind of branch: reused in all but every ``interval``-th step."""
        states = [StepState.COMPUTE if step % interval == 0 else state for step in range(self.uncached.num_steps)]
        return EBCache(CacheTable(tuple(states)), eps_scale=1.0)

    def uniform(self, interval: int) -> Method:
        """Uniform caching of all branches, as FORA does it."""
        return FORA(interval)
