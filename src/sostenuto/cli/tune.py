"""``sostenuto tune`` and ``sostenuto advise``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from sostenuto.cli.common import SamplerChoice, write_json
from sostenuto.cli.judging import Judging
from sostenuto.distributed.world import world
from sostenuto.pipelines import PROMPT


@dataclass(frozen=True)
class Tune:
    """Find the best plan for a speed-up, and the frontier around it; "generate --table" takes what it saves."""

    shared: ClassVar[bool] = True

    choice: Annotated[SamplerChoice, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplerChoice)
    speedup: float = 2.0
    """How much faster it should be, above 1."""
    speedups: tuple[float, ...] = (1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0)
    """The targets of the frontier."""
    budget: Literal["macs", "time"] = "macs"
    """What speed is counted in: multiply-accumulates, or measured time."""
    prefer: Literal["score", "nearness"] = "score"
    """Where images are scored: what decides, their Fréchet distance or how near they are to the uncached ones."""
    output: Path = Path("runs/tune")
    """Folder of tables, figures and of what was measured; the same command goes on where it was stopped."""
    num_samples: int = 16
    """Rows of the instrumented run."""
    trial_samples: int = 16
    """Rows of each real generation that plans are compared by."""
    refinements: int = 4
    """Local changes that are tried at each point."""
    kinds: tuple[str, ...] | None = None
    """What may be reused: sample, stack, branches, attention, mlp; by default all. Sample and stack take the least memory."""
    published: tuple[str, ...] = ("eb", "feb", "smoothcache", "smoothcache-site")
    """Calibrations whose plans compete with those that are searched."""
    max_work: float | None = None
    """The most that tuning may cost, in uncached generations of one row of the denoiser's batch; by default 50 000 / 30."""
    score_images: int = 128
    """On the demo model, or with --reference: how many images a distance is taken of, 128 or more to say something; 0 goes
    by nearness alone."""
    judging: Annotated[Judging, tyro.conf.OmitArgPrefixes] = field(default_factory=Judging)
    json: Path | None = None
    """Also write the frontier to this file."""

    def run(self) -> None:
        """Tune, save tables and figures, print the frontier."""
        import torch

        import sostenuto
        import sostenuto.report.frontier  # what draws is missed now, not when all is done
        from sostenuto.tuning.options import check_speedup
        from sostenuto.tuning.result import table_path

        check_speedup(self.speedup)  # before a model is loaded
        self.judging.check("--score-images", self.score_images)
        pipe = self.choice.pipeline()
        options = sostenuto.TuneOptions(
            speedups=self.speedups,
            budget=self.budget,
            prefer=self.prefer,
            trial_samples=self.trial_samples,
            refinements=self.refinements,
            kinds=self.kinds,
            published=self.published,
        )
        if self.max_work is not None:
            options = replace(options, max_work=self.max_work)
        sample = self.choice.sample(pipe)
        scoring = self.judging.scoring(pipe, self.choice, self.score_images, self.output)
        if not scoring and self.score_images and world().is_main:
            print("no images are scored without --reference: plans are chosen by nearness alone", file=sys.stderr)
        tuned = sostenuto.tune(
            pipe,
            sample,
            num_inference_steps=self.choice.num_inference_steps,
            speedup=self.speedup,
            num_samples=self.num_samples,
            generator=torch.Generator().manual_seed(self.choice.seed),
            folder=self.output,
            show_progress=True,
            options=options,
            **scoring,
        )
        if not world().is_main:
            return
        print(tuned)
        print(table_path(self.output, tuned.target))
        write_json(self.json, tuned.as_dict())
        for path in tuned.draw(self.output):
            print(path)


@dataclass(frozen=True)
class Advise:
    """Say whether caching pays for a model and sampler, with which method, at what gain and memory."""

    choice: Annotated[SamplerChoice, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplerChoice)
    output: Path | None = None
    """Write the plan that is advised to this file, for "generate --table"."""
    json: Path | None = None
    """Also write the advice to this file."""

    def run(self) -> None:
        """Measure and print."""
        import torch

        import sostenuto

        pipe = self.choice.pipeline()
        advice = sostenuto.advise(
            pipe,
            self.choice.sample(pipe, prompt=PROMPT),
            num_inference_steps=self.choice.num_inference_steps,
            generator=torch.Generator().manual_seed(self.choice.seed),
            show_progress=True,
        )
        print(advice)
        if self.output is not None:
            table = getattr(advice.method, "table", None)
            if isinstance(table, sostenuto.CacheTable):
                table.save(self.output)
                print(self.output)
            else:
                print(f"no plan is advised, {self.output} is not written", file=sys.stderr)
        write_json(self.json, advice.as_dict())
