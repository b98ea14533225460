"""``sostenuto analyze``: look inside a model with the instruments behind the papers' figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sostenuto.cli.common import SamplerChoice, write_json
from sostenuto.errors import InputError
from sostenuto.pipelines import PROMPT

_TINY = "tiny:"


@dataclass(frozen=True)
class Analyze:
    """Look inside a model: what caching does there, as data, figures and a page beside what the papers claim."""

    model: str = "demo"
    """A diffusers folder, a hub id, "demo", or a tiny one with random weights such as "tiny:FluxTransformer2DModel"."""
    only: list[str] = field(default_factory=list)
    """Only these instruments: snr, exposure-bias, frequency, similarity, feature-error, error-images, consecutive-outputs,
    tokens, components."""
    output: Path = Path("analysis")
    """Folder for index.html and, of every instrument, data (JSON) and figure (SVG, PDF, PNG)."""
    num_samples: int = 16
    """Samples that every instrument looks at."""
    num_inference_steps: int | None = None
    """Steps of the sampler; by default 50, and 20 for a tiny network."""
    scheduler: str | None = None
    """Class of the diffusers scheduler to sample with, such as DDIMScheduler; by default the model's own."""
    table: Path | None = None
    """EB-Cache's table, as "sostenuto calibrate" makes it; by default one that ships, or is calibrated now."""
    data: Path | None = None
    """The demo model: folder with Fashion-MNIST's four IDX files, for exposure bias; by default where Debian's package puts
    them, and without them the model's own samples."""
    prompt: str = PROMPT
    """What is generated where the pipeline takes a prompt."""
    labels: tuple[int, ...] | None = None
    """Class labels of a generation; by default 0 … 9 over and over."""
    guidance_scale: float = 1.0
    """1 is none: every row of a guided call would count by itself. A network that is given the scale as an input, such as
    FLUX.1-dev, wants the one that it is used with."""
    pipe_arguments: tuple[str, ...] = ()
    """What else the pipeline is called with, such as height=512 width=512."""
    decode: bool = True
    """Look at images, where the pipeline has a VAE, and not at latents."""
    seed: int = 0
    device: str = "auto"
    """Where a pipeline runs: cpu, cuda, or auto, which takes the GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What its weights are loaded as: auto takes bfloat16 on a GPU and float32 on a CPU, and float32 for the demo model."""
    offload: Literal["none", "model", "sequential"] = "none"
    """On a GPU that holds less than the whole pipeline, as diffusers offloads (with accelerate)."""
    json: Path | None = None
    """Also write all numbers to this file."""

    def run(self) -> None:
        """Measure, save, print what was found."""
        import jinja2  # noqa: F401  # what draws is missed now, not when all is done

        import sostenuto
        import sostenuto.analysis.style

        if self.data is not None and self.model != "demo":
            raise InputError("--data is of the demo model; another's real latents are passed from Python")
        target, sample, options = self._tiny() if self.model.startswith(_TINY) else self._loaded()
        steps = self.num_inference_steps or (20 if self.model.startswith(_TINY) else 50)
        analysis = sostenuto.analyze(
            target,
            sample,
            only=self.only,
            num_inference_steps=steps,
            num_samples=self.num_samples,
            seed=self.seed,
            table=self.table,
            folder=self.output,
            show_progress=True,
            **options,
        )
        write_json(self.json, analysis.as_dict())
        page = analysis.save(self.output)
        for observation in analysis.observations.values():
            found = observation.finding or f"not measured: {observation.error}"
            print(f"{observation.instrument.title}: {found}\n")
        print(f"page: {page}")
        reasons = [observation.error for observation in analysis.observations.values()]
        if all(reasons):
            raise InputError(f"no instrument could measure anything on this model; the first one: {reasons[0]}")

    def _tiny(self) -> tuple[Any, Any, dict[str, Any]]:
        if self.pipe_arguments or self.guidance_scale != 1 or self.scheduler:
            raise InputError(
                "a tiny network is no pipeline: leave out --scheduler, --pipe-arguments and --guidance-scale"
            )
        from sostenuto.cli.examine import tiny_model
        from sostenuto.zoo.sampling import flow_sampler

        network, sample, scheduler = flow_sampler(tiny_model(self.model.removeprefix(_TINY)))
        return network, sample, {"scheduler": scheduler}

    def _loaded(self) -> tuple[Any, Any, dict[str, Any]]:
        from sostenuto.analysis import image_decoder

        labels = list(self.labels or (index % 10 for index in range(min(self.num_samples, 20))))
        choice = SamplerChoice(
            self.model,
            scheduler=self.scheduler,
            guidance_scale=self.guidance_scale,
            labels=tuple(labels),
            pipe_arguments=self.pipe_arguments,
            device=self.device,
            dtype=self.dtype,
            offload=self.offload,
        )
        pipe = choice.pipeline()
        sample = choice.sample(pipe, prompt=self.prompt)
        to_images = choice.sample(pipe, "pt", prompt=self.prompt)
        options: dict[str, Any] = {"decode": image_decoder(pipe, to_images) if self.decode else None}
        if self.model == "demo":
            options["real_latents"] = self._real(labels)
        return pipe, sample, options

    def _real(self, labels: list[int]) -> Any:
        """Test images of the labels that are generated, where the set is at hand."""
        from sostenuto.demo import data

        generations = -(-self.num_samples // len(labels))
        try:
            return data.of_labels("test", labels * generations, self.data)
        except data.NoDataError:
            if self.data is not None:
                raise
            return None
